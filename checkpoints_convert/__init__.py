"""PyTorch checkpoints to cascade_jax bundles: one engine, and one table of names per family.

sources.py      files and their tensors, read one at a time
table.py        rules from tensors to parameters; what is missing, left over or misshapen
transforms.py   from PyTorch's layouts to ours
formats.py      what a table says beside its rules
llamagen.py ... the tables
convert.py      the engine
"""

from checkpoints_convert.convert import convert, merge
from checkpoints_convert.families import FAMILIES
from checkpoints_convert.sources import ConvertError

__all__ = ["FAMILIES", "ConvertError", "convert", "merge"]
