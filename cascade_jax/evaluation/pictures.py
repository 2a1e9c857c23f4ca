"""Folders of pictures: what lies in them, read in batches."""

import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from cascade_jax.training.distill import PICTURES, read_picture


def paths(folder: str | os.PathLike) -> list[pathlib.Path]:
    """The pictures in a folder, by name.

    Raises:
      ValueError: if there is no such folder, it cannot be read, or it holds no picture.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder of pictures {folder}")
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    except OSError as error:
        raise ValueError(f"cannot read the folder {folder}: {error.strerror or error}") from error
    if not found:
        raise ValueError(f"the folder {folder} holds no pictures ({', '.join(PICTURES)})")
    return found


def read(path: pathlib.Path, square: int | None = None) -> np.ndarray:
    """A picture, uint8 [H, W, 3].

    Args:
      square: cut the largest square out of its middle, and resize that to so many pixels a side.

    Raises:
      ValueError: if it cannot be read.
    """
    if square is not None:
        return read_picture(path, square, square)
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the picture {path}: {error}") from error


def batches(found: Sequence[pathlib.Path], size: int, square: int | None = None) -> Iterator[np.ndarray]:
    """Pictures in batches, uint8 [at most `size`, H, W, 3].

    Raises:
      ValueError: if one cannot be read, or their sizes differ.
    """
    shape = None
    for start in range(0, len(found), size):
        batch = []
        for path in found[start : start + size]:
            batch.append(read(path, square))
            shape = shape or batch[-1].shape
            if batch[-1].shape != shape:
                sizes = " and ".join(f"{width} x {height}" for height, width, _ in (shape, batch[-1].shape))
                raise ValueError(
                    f"the pictures in {path.parent} have different sizes ({sizes} pixels: {path.name}): bring them to "
                    "one size, or let them be cropped (square)"
                )
        yield np.stack(batch)
