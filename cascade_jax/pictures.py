"""The one reader of pictures, any that people have, as 8-bit RGB, one by one or a folder in batches; and their writer.

Grey, palettes and print colours become RGB, 16 bits a channel are scaled to 8, and transparency is left out, as
`pytorch-fid` and the training code of published models do. What has no scale of its own (32-bit integers, floating
point) is refused, for a wrong guess would go unseen.
"""

import os
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from cascade_jax import files

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

_DEEP = ("I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes of 16-bit grey
_PREMULTIPLIED = {"RGBa": "RGBA", "La": "LA"}
_KNOWN = ("RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "RGBX", "RGBA", "LA", "PA", *_PREMULTIPLIED, *_DEEP)


def paths(folder: str | os.PathLike) -> list[pathlib.Path]:
    """The pictures in a folder, by name.

    Raises:
      ValueError: if there is no such folder, it cannot be read, or it holds no picture.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder of pictures {folder}")
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    except OSError as error:
        raise ValueError(f"cannot read the folder {folder}: {error.strerror or error}") from error
    if not found:
        raise ValueError(f"the folder {folder} holds no pictures ({', '.join(ENDINGS)})")
    return found


def read(path: pathlib.Path, width: int | None = None, height: int | None = None) -> np.ndarray:
    """A picture, upright, uint8 [H, W, 3].

    Args:
      width: cut the largest part of this shape out of its middle and resize it; with `height`, which is the width
        unless it is given.

    Raises:
      ValueError: if it cannot be read, or its numbers have no scale; names the file.
    """
    image = rgb(_loaded(path), path)
    if width is not None:
        image = ImageOps.fit(image, (width, height or width), Image.Resampling.LANCZOS)
    return np.asarray(image)


def check(path: pathlib.Path) -> None:
    """Reads no more of a picture than its head and checksums. Raises as `read`, of what these show."""
    try:
        with Image.open(path) as image:
            mode, kind = image.mode, image.format
            image.verify()
    except Exception as error:  # see `_loaded`
        raise _unreadable(path, error) from error
    _check_mode(mode, kind, path)


def batches(found: Sequence[pathlib.Path], size: int, square: int | None = None) -> Iterator[np.ndarray]:
    """Pictures in batches, uint8 [at most `size`, H, W, 3].

    Args:
      square: cut the largest square out of each, and resize that to so many pixels a side.

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


def rgb(image: Image.Image, path: str | os.PathLike = "") -> Image.Image:
    """A loaded picture of any mode in mode RGB. Raises as `read`."""
    _check_mode(image.mode, image.format, path)
    if image.mode in (*_DEEP, "I"):
        deep = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.round(np.clip(deep, 0, 65535) / 257).astype(np.uint8)).convert("RGB")
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _check_mode(mode: str, kind: str | None, path) -> None:
    # netpbm's 16-bit grey is of mode I, and PNG's is too for older Pillows
    if mode not in _KNOWN and not (mode == "I" and kind in ("PNG", "PPM")):
        raise ValueError(f"the picture {path} is of Pillow's mode {mode}, whose scale is unknown: save it as 8-bit RGB")


def _loaded(path: pathlib.Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            kind, upright = image.format, ImageOps.exif_transpose(image)
            upright.load()
    except Exception as error:  # whatever a decoder meets in a damaged file: SyntaxError, struct.error, IndexError, ...
        raise _unreadable(path, error) from error
    upright.format = kind
    return upright


def _unreadable(path: pathlib.Path, error: Exception) -> ValueError:
    what = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"cannot read the picture {path}: {what}")


def destinations(prompts: Sequence[str], out: pathlib.Path | None) -> list[pathlib.Path]:
    """Where each prompt's picture goes.

    Args:
      out: a .png file for one picture, or a folder; None for a file or folder here.

    Raises:
      ValueError: if it cannot be written.
    """
    slugs = [re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "picture" for prompt in prompts]
    if len(prompts) == 1 and (out is None or out.suffix.lower() == ".png"):
        path = pathlib.Path(f"{slugs[0]}.png") if out is None else out
        files.check_file(path)
        return [path]
    if out is not None and out.suffix.lower() == ".png":
        raise ValueError(f"{out} is one picture, and {len(prompts)} are asked for: give a folder")
    if out is not None and out.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        raise ValueError(f"pictures are written as PNG: --out ends in .png or is a folder, not {out}")
    folder = pathlib.Path("pictures") if out is None else out
    files.check_folder(folder)
    paths = [folder / f"{slug}-{number}.png" for number, slug in enumerate(slugs)]
    for path in paths:
        if path.is_dir():
            raise ValueError(f"cannot write {path}: it is a folder")
    return paths


def write(path: pathlib.Path, image: np.ndarray, **notes: str) -> None:
    """Writes uint8 [H, W, 3] as a PNG, whole or not at all; `notes` become the file's text entries."""
    info = PngInfo()
    for name, text in notes.items():
        info.add_itxt(name, text)
    with files.whole(path) as temporary:
        Image.fromarray(image).save(temporary, "PNG", pnginfo=info)
