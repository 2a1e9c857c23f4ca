"""Prompts of class-conditional models: a class's number."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from cascade_jax.bundle import Prompt


def reader(classes: int) -> Callable[[Sequence[str]], list[Prompt]]:
    """A function from numbers in words to encoded prompts, for a model of this many classes.

    Its errors are ValueErrors that name the classes there are.
    """

    def read(prompts: Sequence[str]) -> list[Prompt]:
        for text in prompts:
            if not text.strip().isdecimal() or not int(text) < classes:
                raise ValueError(f"a prompt is the number of a class, 0 to {classes - 1}, not {text!r}")
        return [Prompt(ids=jnp.int32(int(text))) for text in prompts]

    return read
