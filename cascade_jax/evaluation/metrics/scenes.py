"""The judge of scenes, which two metrics ask."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from cascade_jax.evaluation.metrics.metric import Flag, Order

if TYPE_CHECKING:
    from cascade_jax.evaluation.networks.judge import Referee

FLAG = Flag("judge", pathlib.Path, "DIR", "of scenes: a run of `scenes train judge`", "(default: the package's)")


def referee_of(order: Order) -> Referee | None:
    """The judge that an order asks for; None for models that do not draw scenes, or a package without one."""
    from cascade_jax.evaluation.networks import judge

    return judge.load_referee(order.given.get(FLAG.name)) if order.bundle.config.of_scenes else None
