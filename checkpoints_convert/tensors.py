"""What a checkpoint file holds, whatever its kind: tensors by name, each read on demand."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np


class ConvertError(ValueError):
    """A checkpoint that cannot be converted; the message says what is wrong and what would be right."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Attributes:
      shape: its shape.
      dtype: its NumPy type; bfloat16 is `ml_dtypes.bfloat16`, and 8-bit floats are read as that, which holds them all.
      read: returns it, as a view of the mapped file where that is possible.
      fault: why no model can be made of it, such as that it is quantised; empty if one can.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray] = dataclasses.field(compare=False, repr=False)
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class Contents:
    """What one file holds.

    Attributes:
      tensors: by name.
      notes: what was chosen or passed over in the file, for people.
    """

    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


def listed(names: Iterable[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + rest
