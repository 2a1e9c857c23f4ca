"""The registry of ways to read prompts: what a bundle's `text` stands for."""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from cascade_jax.bundle import BundleError, Config, Prompt
from cascade_jax.scenes import captions
from cascade_jax.text import classes, t5, tokens

Read = Callable[[Sequence[str]], list[Prompt]]


def reader(config: Config, table, encoder: Callable | None, folder: pathlib.Path) -> Read | None:
    """The function that reads a model's prompts (`Bundle.read`); None where they come encoded.

    Args:
      table: the conditions' features, of "scenes".
      encoder: the text encoder's module, or whatever else maps ids int [B, C] and their mask to features.
      folder: where the tokenizer lies.

    Raises:
      BundleError: if there is no such way.
    """
    if config.text is None:
        return None
    if config.text not in READERS:
        raise BundleError(f"unknown text {config.text!r}; this version knows: {', '.join(READERS)}")
    return READERS[config.text](config, table, encoder, folder)


def _scenes(config: Config, table, encoder, folder: pathlib.Path) -> Read:
    def read(texts: Sequence[str]) -> list[Prompt]:
        ids = np.stack([captions.encode(captions.placed(captions.parse(text))) for text in texts])
        return [Prompt(features=features) for features in captions.features(table, ids)]

    return read


def _t5(config: Config, table, encoder, folder: pathlib.Path) -> Read:
    return t5.reader(encoder, folder / "tokenizer.json", config.target.condition_slots)


def _tokens(config: Config, table, encoder, folder: pathlib.Path) -> Read:
    return tokens.reader(folder / "tokenizer.json", config.target)


def _class(config: Config, table, encoder, folder: pathlib.Path) -> Read:
    return classes.reader(config.target.classes)


# By the name in config.json.
READERS = {"scenes": _scenes, "t5": _t5, "tokens": _tokens, "class": _class}
