"""Where pictures go: places are tried before the work starts, and files appear whole or not at all."""

import pathlib
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cascade_jax.files import check_file, check_folder, published, whole, write_json

__all__ = ["check_file", "check_folder", "picture_paths", "published", "whole", "write_json", "write_png"]


def picture_paths(prompts: Sequence[str], out: pathlib.Path | None) -> list[pathlib.Path]:
    """Where each prompt's picture goes.

    Args:
      out: a .png file for one picture, or a folder; None for a file or folder here.

    Raises:
      ValueError: if it cannot be written.
    """
    slugs = [re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "picture" for prompt in prompts]
    if len(prompts) == 1 and (out is None or out.suffix.lower() == ".png"):
        path = pathlib.Path(f"{slugs[0]}.png") if out is None else out
        check_file(path)
        return [path]
    if out is not None and out.suffix.lower() == ".png":
        raise ValueError(f"{out} is one picture, and {len(prompts)} are asked for: give a folder")
    if out is not None and out.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        raise ValueError(f"pictures are written as PNG: --out ends in .png or is a folder, not {out}")
    folder = pathlib.Path("pictures") if out is None else out
    check_folder(folder)
    paths = [folder / f"{slug}-{number}.png" for number, slug in enumerate(slugs)]
    for path in paths:
        if path.is_dir():
            raise ValueError(f"cannot write {path}: it is a folder")
    return paths


def write_png(path: pathlib.Path, image: np.ndarray, **notes: str) -> None:
    """Writes uint8 [H, W, 3]; `notes` become the file's text entries."""
    info = PngInfo()
    for name, text in notes.items():
        info.add_itxt(name, text)
    with whole(path) as temporary:
        Image.fromarray(image).save(temporary, "PNG", pnginfo=info)
