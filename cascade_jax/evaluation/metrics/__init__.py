"""THE registry of metrics: what methods are measured by, one idea a file. A new metric is one file and one line here.

Tables, reports, curves, flags and help are made of it. May import recipes, scenes, bundle, models and what lies below.
"""

from collections.abc import Mapping
from typing import Any

from cascade_jax.evaluation.metrics import clip, distribution, fid, fidelity, renders, speed, steps
from cascade_jax.evaluation.metrics.metric import Album, Flag, Gauge, Measured, Metric, Order

METRICS: tuple[Metric, ...] = (
    speed.SECONDS,
    speed.SPEEDUP,
    steps.TARGET_STEPS,
    steps.FEWER_STEPS,
    steps.ALPHA,
    steps.TOKENS,
    distribution.NOMINAL,
    distribution.COUPLED,
    distribution.DIVERGENCE,
    distribution.ADDED_PER_IMAGE,
    distribution.ADDED_PER_TOKEN,
    fidelity.FIDELITY,
    fidelity.SHAPES,
    renders.FRECHET,
    fid.FID,
    clip.CLIP_SCORE,
)  # in the order of a table's columns


def by_name(name: str) -> Metric:
    """A metric.

    Raises:
      KeyError: if there is none of that name.
    """
    return {metric.name: metric for metric in METRICS}[name]


def flags() -> tuple[Flag, ...]:
    """The flags that metrics are opened with, each once."""
    return tuple({flag.name: flag for metric in METRICS for flag in metric.flags}.values())


def check(given: Mapping[str, Any]) -> None:
    """Raises a ValueError unless these values of flags fit together."""
    for metric in METRICS:
        metric.check(given)


def opened(order: Order) -> list[Gauge]:
    """The gauges that an order asks for and its model allows.

    Raises:
      ValueError: if what a flag names is unusable.
    """
    found = [metric.open(order) for metric in METRICS if metric.open is not None]
    return [gauge for gauge in found if gauge is not None]


__all__ = ["METRICS", "Album", "Flag", "Gauge", "Measured", "Metric", "Order", "by_name", "check", "flags", "opened"]
