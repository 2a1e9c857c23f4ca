"""Pictures with captions: NAME.txt beside NAME.png, or lines {"file_name": ..., "text": ...} in metadata.jsonl."""

import pathlib

from cascade_jax import pictures
from cascade_jax.text.captions import Caption, content, objects, one_line

LISTING = "metadata.jsonl"


def read(folder: pathlib.Path) -> list[tuple[pathlib.Path, Caption]]:
    """Pictures and captions of a folder, by name, or in the order of its metadata.jsonl.

    Raises:
      ValueError: if there are none, a picture is not there or has no caption, or a line says something else; names
        file and line.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder of pictures {folder}")
    listing = folder / LISTING
    found = _listed(listing) if listing.exists() else _beside(folder)
    if not found:
        raise ValueError(f"{folder} holds no pictures with captions")
    return found


def _listed(listing: pathlib.Path) -> list[tuple[pathlib.Path, Caption]]:
    found = []
    for number, row in objects(content(listing)):
        place = f"{listing}, line {number}"
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("file_name", "text")):
            raise ValueError(f'{place}: it is not {{"file_name": ..., "text": ...}}')
        found.append((listing.parent / row["file_name"], Caption(one_line(row["text"]), len(found), source=place)))
        path, caption = found[-1]
        if not path.is_file() or not caption.text:
            raise ValueError(f"{place}: {path} {'has an empty caption' if path.is_file() else 'is not there'}")
    return found


def _beside(folder: pathlib.Path) -> list[tuple[pathlib.Path, Caption]]:
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in pictures.ENDINGS):
        beside = path.with_suffix(".txt")
        if not beside.exists():
            raise ValueError(f"{path} has no caption: put it into {beside.name} beside it")
        found.append((path, Caption(one_line(content(beside)), len(found), source=str(beside))))
        if not found[-1][1].text:
            raise ValueError(f"{path} has an empty caption in {beside.name}")
    return found
