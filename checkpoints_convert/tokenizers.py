"""The text tokenizers that a bundle takes along, and whether they are those of the weights."""

import dataclasses
import pathlib
from collections.abc import Callable

from cascade_jax.bundle import Writer
from checkpoints_convert import tiktoken
from checkpoints_convert.files import check_text, read_json
from checkpoints_convert.parts import Part
from checkpoints_convert.sources import SENTENCEPIECE, TIKTOKEN, TOKENIZERS
from checkpoints_convert.tensors import ConvertError


def take(part: Part, writer: Writer) -> None:
    """Puts the text tokenizer that belongs to a part into the bundle, as the reader of prompts knows it."""
    if (found := _tokenizer(part)) is None:
        return
    file, name = found
    if file.name in TIKTOKEN:
        writer.write(tiktoken.text(file), name)
    else:
        writer.copy(file, name)


def _tokenizer(part: Part) -> tuple[pathlib.Path, str] | None:
    """The text tokenizer that belongs to a part, and what it is called in a bundle."""
    if not part.format.tokenizer:
        return None
    # a text encoder comes with its own, and what lies beside a drafter or another model is not that
    source = dataclasses.replace(part.source, others=()) if part.format.part == "text" else part.source
    if file := source.beside(TOKENIZERS) or source.beside(TIKTOKEN):
        return file, "text/tokenizer.json"
    file = source.beside(SENTENCEPIECE)
    return file and (file, "text/spiece.model")


def check_tokenizer(part: Part, say: Callable[[str], None]) -> None:
    """Looks whether captions can be read with a part's tokenizer. One that a target or metric lacks is warned of.

    Raises:
      ConvertError: if a text encoder lacks it, or it is damaged or has tokens that the weights do not know.
    """
    if not part.format.tokenizer:
        return
    if found := _tokenizer(part):
        _check_file(part, found[0])
        return
    text = part.format.part == "text"
    known = (*TOKENIZERS[:1], *SENTENCEPIECE) if text else TOKENIZERS
    lacks = f"{part.source.path} has no text tokenizer ({' or '.join(known)}) beside it"
    if text:
        raise ConvertError(f"{lacks}, and without one no caption can be read: download it too")
    say(f"warning: {lacks}: captions cannot be read until it lies in the model's folder as text/tokenizer.json")


def _check_file(part: Part, file: pathlib.Path) -> None:
    if file.name in SENTENCEPIECE:
        with file.open("rb") as stream:
            check_text(file, stream.read(1024))
        return
    most = max(tiktoken.vocabulary(file).values()) if file.name in TIKTOKEN else _most(file)
    rows = getattr(part.config, "vocab_size", None)
    if rows is not None and most >= rows:
        raise ConvertError(
            f"{file} is no tokenizer of {part.source.path}: it has a token {most}, and the embedding has {rows} rows"
        )


def _most(file: pathlib.Path) -> int:
    """The largest number that a tokenizer.json gives to a token."""
    content = read_json(file)
    try:
        words, added = content["model"]["vocab"], content.get("added_tokens") or ()
        ids = words.values() if isinstance(words, dict) else range(len(words))
        return max((*ids, *(token["id"] for token in added)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConvertError(f"{file} is damaged: it has no vocabulary of tokens and their numbers") from error
