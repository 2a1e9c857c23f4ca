"""Emu3's text tokenizer, `emu3.tiktoken` with `emu3_vision_tokens.txt`, as the tokenizer.json that does the same.

The former has a word's bytes and its number on every line; the latter names the tokens of pictures. Between the two
stand tokens that the authors' code names. Words are split and joined as tiktoken does: in pieces by a pattern, and in a
piece the pair first whose word has the lowest number, unless the piece is a word itself.
"""

import base64
import binascii
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

from checkpoints_convert.tensors import ConvertError

PICTURES = "emu3_vision_tokens.txt"
_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def _characters() -> dict[int, str]:
    """What a byte is called in a tokenizer.json: itself where it can be seen, else a character beyond 255."""
    seen = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256))
    others = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _called(word: bytes) -> str:
    return "".join(map(_characters().__getitem__, word))


def _words(file: pathlib.Path) -> dict[bytes, int]:
    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line]
        return {base64.b64decode(word, validate=True): int(number) for word, number in lines}
    except (OSError, ValueError, binascii.Error) as error:
        raise ConvertError(f"{file} is damaged: {error}") from error


def _added(file: pathlib.Path, first: int) -> dict[str, int]:
    pictures = file.with_name(PICTURES)
    if not pictures.is_file():
        raise ConvertError(f"{file} lacks {PICTURES} beside it, which names the tokens of pictures: download it too")
    names = pictures.read_text(encoding="utf-8").split("\n")
    return {name: first + i for i, name in enumerate((*_MARKS, *filter(None, map(str.strip, names))))}


def vocabulary(file: pathlib.Path) -> dict[str, int]:
    """All tokens by name.

    Raises:
      ConvertError: if a file is damaged or missing.
    """
    words = _words(file)
    return {_called(word): number for word, number in words.items()} | _added(file, len(words))


def tokenizer_json(file: pathlib.Path) -> dict[str, Any]:
    """The contents of the tokenizer.json. Raises as `vocabulary`."""
    words = _words(file)
    merges = []
    for word in sorted(words, key=words.__getitem__):
        halves = ((word[:i], word[i:]) for i in range(1, len(word)))
        known = [pair for pair in halves if pair[0] in words and pair[1] in words]
        merges += [[_called(a), _called(b)] for a, b in sorted(known, key=lambda pair: [*map(words.__getitem__, pair)])]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": _PIECES}, "behavior": "Isolated", "invert": False}
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, **plain} for name, i in _added(file, len(words)).items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, by_bytes]},
        "post_processor": None,
        "decoder": by_bytes,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {_called(word): number for word, number in words.items()},
            "merges": merges,
        },
    }


def text(file: pathlib.Path) -> str:
    """The tokenizer.json itself. Raises as `vocabulary`."""
    return json.dumps(tokenizer_json(file), ensure_ascii=False)


def encoder(file: pathlib.Path) -> Callable[[str], list[int]]:
    """From text to tokens, adding nothing, by such a file or a tokenizer.json.

    Raises:
      ConvertError: if it is damaged, or the library that reads it is missing.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConvertError(
            "the unconditional branch reads words, which takes the tokenizers library: pip install 'cascade_jax[text]'"
        ) from error
    content = text(file) if file.suffix == ".tiktoken" else file.read_text(encoding="utf-8")
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library raises no narrower one
        raise ConvertError(f"{file} is damaged: {error}") from error
    return lambda words: tokenizer.encode(words, add_special_tokens=False).ids
