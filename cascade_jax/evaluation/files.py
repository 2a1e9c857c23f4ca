"""Where results go: places are tried before the work starts, and files appear whole or not at all."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo


def check_folder(folder: pathlib.Path) -> None:
    """Makes sure that files can be written into `folder`, without leaving a trace.

    Raises:
      ValueError: if they cannot; the message says why.
    """
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"cannot write to {folder}: {place} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror or error}") from error


def check_file(path: pathlib.Path) -> None:
    """Makes sure that the file `path` can be written; as `check_folder`."""
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    check_folder(path.parent)


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


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path beside `path` that takes its place if the block succeeds, and vanishes if it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def published(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder whose files move into `folder` if the block succeeds, and vanish if it does not.

    Files of other names that `folder` holds already stay; a new folder appears at once with all its files.
    """
    folder = folder.absolute()
    there = folder.is_dir()
    (folder if there else folder.parent).mkdir(parents=True, exist_ok=True)
    name = f".{folder.name}.{os.getpid()}"
    temporary = folder / name if there else folder.with_name(name)
    temporary.mkdir()
    try:
        yield temporary
        if there:
            for file in sorted(temporary.iterdir()):
                file.replace(folder / file.name)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_png(path: pathlib.Path, image: np.ndarray, **notes: str) -> None:
    """Writes uint8 [H, W, 3]; `notes` become the file's text entries."""
    info = PngInfo()
    for name, text in notes.items():
        info.add_itxt(name, text)
    with whole(path) as temporary:
        Image.fromarray(image).save(temporary, "PNG", pnginfo=info)


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes what JSON can hold."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
