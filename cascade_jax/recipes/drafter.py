"""The scenes drafter: the recipe of every drafter (`training.run`) with settings that suit a small model.

Pictures that the target drew from random captions, with the guidance that decoding uses. The losses are those of
EAGLE's public code and of the paper: conditional and unconditional rows learn from their own branch, and guidance is
left to decoding.
"""

import pathlib
from collections.abc import Callable
from typing import Any

from flax import nnx

from cascade_jax.bundle import Bundle
from cascade_jax.sampling import Sampling
from cascade_jax.scenes import data
from cascade_jax.training import distill as distilling
from cascade_jax.training import run
from cascade_jax.training.data import Data
from cascade_jax.training.drafter import Schedule

SCHEDULE = Schedule(rate=2e-3, warmup=1 / 30, decay="cosine", clip=None, norm=1.0)
STEPS = 600


def distill(
    model: Bundle, folder, *, count: int, batch: int, seed: int, sampling: Sampling, say: Callable[[str], None]
) -> Data:
    """Pictures that the target draws from `count` random captions, and its features of them."""
    return distilling.draw(
        model, folder, data.random_captions(count, seed, training=True), count=count, batch=batch, seed=seed,
        sampling=sampling, features=(), name="scenes", say=say,
    )  # fmt: skip


def train_drafter(
    folder: str | pathlib.Path,
    model: Bundle,
    rows: Data,
    *,
    steps: int = STEPS,
    batch: int = 8,
    seed: int = 0,
    **settings: Any,
) -> tuple[Any, nnx.State]:
    """Trains a drafter for the bundle's target on `distill`'s sequences; returns its sizes and parameters.

    Args:
      settings: of `training.run.train`.
    """
    return run.train(model, rows, folder, schedule=SCHEDULE, steps=steps, batch=batch, seed=seed, **settings)
