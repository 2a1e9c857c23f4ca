"""Flax NNX modules, one architecture a file, and the registry that knows them all, `families`.

A file may import `transformer`, the block that targets share, `prompt`, and the engine below; none imports another.
"""
