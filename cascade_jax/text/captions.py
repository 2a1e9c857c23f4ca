"""The one reader of prompts, for every command: captions from MS-COCO, PartiPrompts, text files, JSON lines, or scenes.

    captions = read("annotations/captions_val2017.json")
    captions = read("scenes", count=64)
    check(bundle, captions, "prompts.txt")  # names file and line of the first that the model cannot read

Which format a file has is told from its ending:

    .json    MS-COCO's captions. Every picture has about five, of which the one with the lowest annotation id is taken;
             pictures are in the order of their ids. The 2017 validation set gives 5,000.
    .tsv     PartiPrompts: a row of titles with Prompt and Category among them, then a prompt a row. Quotation marks
             are part of a prompt.
    .jsonl   an object a line: {"text": ..., "category": ...}, the latter optional.
    others   a caption a line.

Lines may end as on any system, blank ones do not count, and byte-order marks are left out wherever they stand.
"""

import codecs
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from cascade_jax.bundle import Bundle
from cascade_jax.scenes import data

_MOST_REPORTED = 5  # bad rows that an error lists


@dataclasses.dataclass(frozen=True)
class Caption:
    """A caption, and where it comes from.

    Attributes:
      text: in one line, without space around it.
      number: its place among the captions, from 0: the number of its picture.
      category: what kind of caption it is, where the file says so.
      source: what it is in its file, such as "image 139" or "line 4".
    """

    text: str
    number: int
    category: str | None = None
    source: str = ""


def read(spec: str | os.PathLike, count: int | None = None, seed: int = 0) -> list[Caption]:
    """The captions of a file, or of random scenes.

    Args:
      spec: a file, or "scenes" for the embedded model's own world.
      count: how many, from the first on; None for all of a file's.
      seed: of scenes; the i-th caption depends on it and i alone.

    Raises:
      ValueError: if there is no such file, it has no caption or bad ones (the message says in which lines), or fewer
        than `count`.
    """
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    if str(spec) == "scenes":
        if count is None:
            raise ValueError("random scenes have no end: say how many captions (count)")
        return [
            Caption(text, number, source=f"scene {number} of seed {seed}")
            for number, text in enumerate(data.random_captions(count, seed))
        ]
    path = pathlib.Path(spec)
    reader = _READERS.get(path.suffix.lower(), _text)
    rows, bad = reader(path, content(path))
    if bad:
        more = f"; and {len(bad) - _MOST_REPORTED} more" if len(bad) > _MOST_REPORTED else ""
        raise ValueError(f"{path} has bad rows: {'; '.join(bad[:_MOST_REPORTED])}{more}")
    if not rows:
        raise ValueError(f"the prompts file {path} is empty: it has one prompt a line")
    if count is not None and count > len(rows):
        raise ValueError(f"{path} has {len(rows)} prompts, and {count} are asked for")
    return [Caption(text, number, category, source) for number, (text, category, source) in enumerate(rows[:count])]


def listed(captions: Sequence[str | Caption]) -> list[Caption]:
    """Captions with their places in the list as numbers; plain texts become captions.

    Raises:
      ValueError: if there is none, or one is empty.
    """
    if not captions:
        raise ValueError("there are no captions")
    found = [
        dataclasses.replace(caption, number=number) if isinstance(caption, Caption) else Caption(caption, number)
        for number, caption in enumerate(captions)
    ]
    for caption in found:
        if not caption.text.strip():
            raise ValueError(f"caption {caption.number} is empty")
    return found


def check(bundle: Bundle, captions: Sequence[str | Caption], file: str | os.PathLike | None = None) -> None:
    """Makes sure that a model can read captions.

    A text encoder with a network of its own reads everything, and takes its time: it is shown one caption alone, which
    tells whether all that it needs is there.

    Args:
      file: where they come from, for the message.

    Raises:
      ValueError: names the first that it cannot read, with file and line.
    """
    found = listed(captions)
    for caption in found if bundle.config.encoder is None else found[:1]:
        try:
            bundle.encode([caption.text])
        except ValueError as error:
            place = caption.source or f"prompt {caption.number + 1}"
            place = place if file is None else f"{file}, {place}"
            raise ValueError(f"{place}, {caption.text!r}: {error}") from error


def content(path: pathlib.Path) -> str:
    """A text file, its lines ended by newlines alone and without byte-order marks.

    Raises:
      ValueError: if there is no such file, or it is no text; names the line.
    """
    if not path.is_file():
        raise ValueError(f"there is no prompts file {path}")
    try:
        raw = path.read_bytes()
        wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = raw.decode("utf-16" if wide else "utf-8")
    except OSError as error:
        raise ValueError(f"cannot read the prompts file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: it is no UTF-8 text ({error.reason})") from error
    # files that were joined have the marks of their parts within
    return text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")


_Rows = tuple[list[tuple[str, str | None, str]], list[str]]  # (text, category, source) of the good ones; the bad ones


def _coco(path: pathlib.Path, text: str) -> _Rows:
    try:
        stored = json.loads(text)
        images = {image["id"] for image in stored["images"]}
        annotations = stored["annotations"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} is no file of MS-COCO captions, which holds "images" and "annotations" (JSON lines have .jsonl): '
            f"{type(error).__name__}: {error}"
        ) from error
    first: dict[int, tuple[int, str]] = {}
    bad = []
    for number, annotation in enumerate(annotations, 1):
        try:
            image, own, caption = annotation["image_id"], annotation["id"], one_line(annotation["caption"])
            found = image in images
        except (KeyError, TypeError, AttributeError) as error:
            bad.append(f"annotation {number}: {_what(error)}")
            continue
        if not found:
            bad.append(f"annotation {number}: there is no image {image}")
        elif not caption:
            bad.append(f"annotation {number}: the caption is empty")
        elif image not in first or own < first[image][0]:
            first[image] = own, caption
    return [(first[image][1], None, f"image {image}") for image in sorted(first)], bad


def _parti(path: pathlib.Path, text: str) -> _Rows:
    head, *lines = [line.split("\t") for line in _lines(text)]
    for title in ("Prompt", "Category"):
        if title not in head:
            raise ValueError(f"{path} is no file of PartiPrompts: its first line lacks the title {title}")
    prompt, category = head.index("Prompt"), head.index("Category")
    rows, bad = [], []
    for number, cells in enumerate(lines, 2):
        if cells == [""]:
            continue
        if len(cells) <= max(prompt, category):
            bad.append(f"line {number}: {len(cells)} columns")
        elif not (caption := one_line(cells[prompt])):
            bad.append(f"line {number}: the prompt is empty")
        else:
            rows.append((caption, cells[category].strip() or None, f"line {number}"))
    return rows, bad


def _json_lines(path: pathlib.Path, text: str) -> _Rows:
    rows, bad = [], []
    for number, row in objects(text):
        if row is None:
            bad.append(f"line {number}: it is no JSON")
            continue
        try:
            caption, category = one_line(row["text"]), row.get("category")
        except (KeyError, TypeError, AttributeError) as error:
            bad.append(f"line {number}: {_what(error)}")
            continue
        if not caption:
            bad.append(f"line {number}: the text is empty")
        else:
            rows.append((caption, None if category is None else str(category), f"line {number}"))
    return rows, bad


def _text(path: pathlib.Path, text: str) -> _Rows:
    lines = [(one_line(line), None, f"line {number}") for number, line in enumerate(_lines(text), 1)]
    return [line for line in lines if line[0]], []


_READERS = {".json": _coco, ".tsv": _parti, ".jsonl": _json_lines}


def objects(text: str) -> Iterator[tuple[int, Any]]:
    """The objects of JSON lines and their lines' numbers; None where a line is no JSON."""
    for number, line in enumerate(_lines(text), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError:
                yield number, None


def one_line(text: str) -> str:
    """A caption in one line."""
    return " ".join(text.split())


def _what(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else "it is not what was expected"


def _lines(text: str) -> list[str]:
    """The lines of a file; other than `str.splitlines`, what looks like an end of line within a caption is none."""
    return text.split("\n")
