"""Flax NNX modules, one architecture a file."""
