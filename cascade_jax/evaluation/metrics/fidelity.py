"""Fidelity: the share of a caption's attributes that the judge of scenes reads in its picture; and of shapes alone."""

from collections.abc import Callable

import numpy as np

from cascade_jax.evaluation.metrics.metric import PICTURES, Album, Gauge, Metric, Order, Progress, mean_of, stacks
from cascade_jax.evaluation.metrics.scenes import FLAG, referee_of

NAME, OF_SHAPES = "fidelity", "shape_fidelity"
LOSS = 0.02  # below AR's that still counts as its quality


def _gauge(name: str, shares: Callable) -> Gauge:
    """Of what `shares` reads in pictures [B, H, W, 3] of given texts, [B]."""

    def measure(album: Album, progress: Progress | None = None) -> np.ndarray:
        found: list[float] = []
        for images in stacks(album.images()):
            found.extend(shares(images, album.texts[len(found) : len(found) + len(images)]))
        return np.array(found)

    return Gauge(name, measure)


def _open(order: Order) -> Gauge | None:
    referee = referee_of(order)
    if referee is None:
        if order.bundle.config.of_scenes:
            order.say("the package comes without a judge, so that fidelity stays unknown: give one with --judge DIR")
        return None
    return _gauge(NAME, referee.fidelity)


def _open_shapes(order: Order) -> Gauge | None:
    referee = referee_of(order)
    return None if referee is None else _gauge(OF_SHAPES, referee.shapes)


FIDELITY = Metric(
    NAME,
    PICTURES,
    mean_of(NAME),
    "fidelity",
    meaning="Fidelity is the share of a prompt's attributes that the judge reads in its picture.",
    interval=True,
    axis="fidelity",
    bar=lambda base: base - LOSS,
    within=f"fidelity within {LOSS} of AR's",
    flags=(FLAG,),
    open=_open,
)
SHAPES = Metric(
    OF_SHAPES,
    PICTURES,
    mean_of(OF_SHAPES),
    interval=True,
    flags=(FLAG,),
    open=_open_shapes,
)
