"""Captions to text tokens, for targets that read text themselves, by the tokenizer that was published with them."""

import functools
import os
import pathlib
from collections.abc import Callable, Sequence

from cascade_jax.bundle import BundleError, Prompt


def reader(tokenizer: str | os.PathLike, config) -> Callable[[Sequence[str]], list[Prompt]]:
    """A function from captions to encoded prompts.

    Args:
      tokenizer: the model's tokenizer.json.
      config: the target's configuration, whose `read` puts a caption into the words that the model was trained on.

    The function raises a BundleError where the tokenizer library or the file is missing, or the file is damaged.
    """
    words = functools.cache(lambda: open_tokenizer(pathlib.Path(tokenizer)))
    encode = lambda text: words().encode(text, add_special_tokens=False).ids
    return lambda captions: [config.read(encode, caption) for caption in captions]


def open_tokenizer(file: pathlib.Path):
    """A published tokenizer.json. Raises a BundleError where the library or the file is missing, or it is damaged."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise BundleError("reading captions needs the tokenizers library: pip install 'cascade_jax[text]'") from error
    if not file.is_file():
        raise BundleError(f"the model lacks its text tokenizer, {file}: convert it with its tokenizer.json")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        raise BundleError(f"{file} is damaged: {error}") from error
