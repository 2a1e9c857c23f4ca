"""Fidelity: the share of a caption's attributes that the judge of scenes reads in its picture."""

import numpy as np

from cascade_jax.evaluation.metrics.metric import PICTURES, Album, Gauge, Metric, Order, Progress, mean_of, stacks
from cascade_jax.evaluation.metrics.scenes import FLAG, referee_of

NAME = "fidelity"
LOSS = 0.02  # below AR's that still counts as its quality


def _open(order: Order) -> Gauge | None:
    referee = referee_of(order)
    if referee is None:
        if order.bundle.config.of_scenes:
            order.say("the package comes without a judge, so that fidelity stays unknown: give one with --judge DIR")
        return None

    def measure(album: Album, progress: Progress | None = None) -> np.ndarray:
        shares: list[float] = []
        for images in stacks(album.images()):
            shares.extend(referee.fidelity(images, album.texts[len(shares) : len(shares) + len(images)]))
        return np.array(shares)

    return Gauge(NAME, measure)


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
