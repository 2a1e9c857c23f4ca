"""Prompts of class-conditional models: a class's number, or its name if the classes are ImageNet's.

`imagenet.txt` has the 1,000 names in the order of the numbers, as torchvision gives them (Copyright Soumith Chintala,
BSD 3-Clause). One pair differs in nothing but a capital: Cardigan is a dog and cardigan a garment.
"""

import difflib
import functools
import pathlib
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from cascade_jax.bundle import Prompt

IMAGENET = pathlib.Path(__file__).parent / "imagenet.txt"


@functools.cache
def names(classes: int) -> tuple[str, ...]:
    """What the classes are called, by number; empty unless they are ImageNet's."""
    known = tuple(IMAGENET.read_text(encoding="utf-8").splitlines())
    return known if classes == len(known) else ()


def number(text: str, classes: int) -> int:
    """The class that a prompt means: a number, or a name in any case.

    Raises:
      ValueError: if there is no such class, or two; the message names the classes there are, or those that are like it.
    """
    text = " ".join(text.split())
    if text.isdecimal() and int(text) < classes:
        return int(text)
    known = names(classes)
    if text in known:
        return known.index(text)
    lower = [name.lower() for name in known]
    if lower.count(text.lower()) == 1:
        return lower.index(text.lower())
    what = f"a prompt is the number of a class, 0 to {classes - 1}"
    if not known:
        raise ValueError(f"{what}, not {text!r}")
    within = [name for name in lower if text.lower() in name.replace("-", " ").split()]
    alike = within[:5] or difflib.get_close_matches(text.lower(), lower, n=3)
    told = (f"{known[i]} ({i})" for i, name in enumerate(lower) if name in (text.lower(), *alike))
    hint = ", ".join(told)
    raise ValueError(f"{what}, or ImageNet's name for it, not {text!r}" + (f"; there is {hint}" if hint else ""))


def reader(classes: int) -> Callable[[Sequence[str]], list[Prompt]]:
    """A function from numbers in words, or names, to encoded prompts, for a model of this many classes.

    Its errors are those of `number`.
    """

    def read(prompts: Sequence[str]) -> list[Prompt]:
        return [Prompt(ids=jnp.int32(number(text, classes))) for text in prompts]

    return read
