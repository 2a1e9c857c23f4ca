"""PyTorch checkpoints to cascade_jax bundles: one engine, and one table of names per family.

tensors.py      what a file holds
files.py        files by what is in them; safetensors.py, pickles.py and torchscript.py read them
folders.py      which files of a folder are a checkpoint, and what it is called
sources.py      a checkpoint: its tensors, read one at a time, and what lies beside it
table.py        rules from tensors to parameters; what is missing, left over or misshapen
transforms.py   from PyTorch's layouts to ours
formats.py      what a table says beside its rules
llama.py        names and settings that the families have in common
llamagen.py ... the tables
tokenizers.py   the text tokenizers that a bundle takes along; tiktoken.py makes a tokenizer.json of Emu3's
parts.py        which parts of a bundle the sources are
convert.py      the engine
"""

from checkpoints_convert.convert import convert, merge
from checkpoints_convert.families import FAMILIES
from checkpoints_convert.tensors import ConvertError

__all__ = ["FAMILIES", "ConvertError", "convert", "merge"]
