"""Captions to text tokens, by the tokenizer that was published with a model."""

import os
from collections.abc import Callable, Sequence

from cascade_jax.models.prompt import Prompt


def reader(tokenizer: str | os.PathLike, config) -> Callable[[Sequence[str]], list[Prompt]]:
    """A function from captions to prompts.

    Args:
      tokenizer: a `tokenizer.json`.
      config: the target's configuration, whose `read` puts a caption into the words that the model was trained on.

    Raises:
      ValueError: if the file is no such tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        encoder = Tokenizer.from_file(str(tokenizer))
    except Exception as error:
        raise ValueError(f"{tokenizer} is not a tokenizer: {error}") from error
    encode = lambda text: encoder.encode(text, add_special_tokens=False).ids
    return lambda texts: [config.read(encode, text) for text in texts]
