"""Draft trees that `tune-tree` found for this machine, in the user's cache: nothing of a machine lies in a model.

    CACHE/cascade_jax/trees/DIGEST.json    of a model: where it lay, and what was found by kind of device and method

A model is known by a digest of its config.json and of how its parameters lie on disk, so that it may be moved, and one
that was trained or converted again is another.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

from cascade_jax import files

Found = dict[str, dict[str, dict[str, Any]]]  # by kind of device and method; each has a "tree" among its entries

_SMALL = 2**16  # bytes of a file that is read for the digest; of larger ones the name and size tell


@dataclasses.dataclass(frozen=True)
class Entry:
    """What was found for a model, a kind of device and a method.

    Attributes:
      digest: of the model.
      model: where it lay.
      device: a kind of device.
      method: the method's name.
      tree: the tree, as `tree.named` reads it.
    """

    digest: str
    model: str
    device: str
    method: str
    tree: str


def folder() -> pathlib.Path:
    """Where the trees lie."""
    return files.cache_folder() / "trees"


def digest(model: str | os.PathLike) -> str:
    """Of a model directory, 16 digits; it takes no time, for parameters are not read."""
    model, found = pathlib.Path(model), hashlib.sha256()
    places = [model / "config.json", *sorted(path for path in (model / "params").rglob("*") if path.is_file())]
    for path in places:
        size = path.stat().st_size
        found.update(f"{path.relative_to(model).as_posix()} {size}\n".encode())
        if size <= _SMALL:
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def read(model: str | os.PathLike) -> Found:
    """What was found for a model directory; empty if nothing was.

    Raises:
      ValueError: if its file is damaged; the message says which it is.
    """
    return _stored(_place(digest(model)))["found"]


def store(model: str | os.PathLike, device: str, method: str, found: dict[str, Any]) -> pathlib.Path:
    """Keeps what was found for a kind of device and a method, and returns the file; it changes as a whole."""
    place = _place(digest(model))
    stored = _stored(place)
    stored["model"] = str(pathlib.Path(model).absolute())
    stored["found"].setdefault(device, {})[method] = found
    files.write_json(place, stored)
    return place


def listed() -> list[Entry]:
    """Everything that was found, for all models. Raises as `read`."""
    return [
        Entry(place.stem, stored["model"], device, method, found["tree"])
        for place in sorted(folder().glob("*.json"))
        for stored in [_stored(place)]
        for device, own in stored["found"].items()
        for method, found in own.items()
    ]


def remove(start: str = "") -> int:
    """Removes what was found for the models whose digests start so; returns for how many."""
    places = [place for place in sorted(folder().glob("*.json")) if place.stem.startswith(start)]
    for place in places:
        place.unlink()
    return len(places)


def _place(name: str) -> pathlib.Path:
    return folder() / f"{name}.json"


def _stored(place: pathlib.Path) -> dict[str, Any]:
    if not place.is_file():
        return {"model": "", "found": {}}
    try:
        stored = json.loads(place.read_text(encoding="utf-8"))
        kept = [found["tree"] for own in stored["found"].values() for found in own.values()] + [stored["model"]]
        if not all(isinstance(text, str) for text in kept):
            raise ValueError("a tree is no text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{place} is damaged (remove it, or run cascade-jax tune-tree again): {error}") from error
    return stored
