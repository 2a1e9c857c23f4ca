"""Checkpoint files of every kind, told by what is in them and not by their names: a hub's blobs have no endings."""

import json
import pathlib
from typing import Any

from checkpoints_convert import pickles, safetensors, torchscript
from checkpoints_convert.tensors import Contents, ConvertError

SAFETENSORS = (".safetensors",)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".jit")
_PAGE = ("<!doctype html", "<html", "<head", "<?xml")


def read_tensors(file: pathlib.Path) -> Contents:
    """The tensors of one file.

    Raises:
      ConvertError: if it cannot be read, is damaged, or is of another kind.
    """
    try:
        with file.open("rb") as stream:
            head = stream.read(1024)
        if not head:
            raise ConvertError(f"{file} is empty: download it again")
        if head.startswith((b"PK\x03\x04", b"\x80")):
            return torchscript.read(file) if torchscript.is_archive(file) else pickles.read(file)
        if head[8:9] == b"{" or (file.suffix in SAFETENSORS and not _text(head)):
            return safetensors.read(file)
        check_text(file, head)
        if file.suffix in PICKLES:
            return pickles.read(file)
    except OSError as error:
        raise ConvertError(f"cannot read {file}: {error.strerror or error}") from error
    raise ConvertError(f"{file} is no checkpoint: known are {', '.join(SAFETENSORS + PICKLES)}")


def read_json(file: pathlib.Path) -> Any:
    """A JSON file's content.

    Raises:
      ConvertError: if it cannot be read or is damaged.
    """
    try:
        content = file.read_bytes()
        return json.loads(content)
    except OSError as error:
        raise ConvertError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        check_text(file, content[:1024])
        raise ConvertError(f"{file} is damaged: {error}") from error


def check_text(file: pathlib.Path, head: bytes) -> None:
    """Raises a ConvertError if a file begins with what servers and Git put in the place of large files."""
    text = _text(head)
    if text.startswith("version https://git-lfs"):
        raise ConvertError(
            f"{file} is a pointer of Git LFS and not the file itself: run `git lfs pull`, or download it again"
        )
    if text.lstrip().lower().startswith(_PAGE):
        raise ConvertError(
            f"{file} is a web page and not the file itself: its address needs a login, or is that of a page about it"
        )
    if text and file.suffix in SAFETENSORS + PICKLES:
        line = " ".join(text.split())[:80]
        raise ConvertError(f'{file} is a text and not a checkpoint: "{line}". Download it again')


def _text(head: bytes) -> str:
    """The beginning of a file, if it is a text."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # else the cut is in a letter
            return ""
        text = head[: error.start].decode()
    return text if all(letter.isprintable() or letter.isspace() for letter in text) else ""
