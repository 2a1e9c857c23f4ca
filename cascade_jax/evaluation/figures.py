"""From what is known of methods' pictures to the figures that reports hold: one of every metric, with intervals."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cascade_jax.evaluation import metrics
from cascade_jax.evaluation.metrics import Measured
from cascade_jax.evaluation.metrics.metric import STEPS, TIMES, interval
from cascade_jax.pipeline import Report
from cascade_jax.text.captions import Caption
from cascade_jax.tree import name_of

ALL = slice(None)


def summarise(measured: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
    """Every method's figures, as a report holds them; None for what is unknown.

    Speedups are those over the first method that draws token by token: ratios of median times, or of mean numbers of
    target steps. 95 % intervals resample the timed captions for times, of both methods alike, and pictures for all
    else.
    """
    base = next((own for own in measured.values() if not own.method.tree.depth), None)
    return {name: _figures(own, base) for name, own in measured.items()}


def _figures(own: Measured, base: Measured | None) -> dict[str, Any]:
    known = {metric.name: metric.figure(own, base, ALL) for metric in metrics.METRICS}
    spans = {}
    for metric in metrics.METRICS:
        if metric.interval and known[metric.name] is not None:
            count = len(own.seconds if metric.kind == TIMES else own.stats.steps)
            spans[metric.name] = interval(functools.partial(metric.figure, own, base), count)
    return {
        "method": own.method.name,
        **known,
        "tree": name_of(own.method.tree),
        "settings": own.method.settings,
        "intervals": spans,
    }


def acceptance_figures(stats: Report) -> dict[str, float]:
    """The figures of how pictures were decoded, of pictures' `Report`: per step over all their steps, target steps per
    picture, and the mass that the rule added, accumulated over a picture ("tvd_per_image") and per token of the output
    (the paper's section 5.1)."""
    own = Measured(None, np.zeros(0), stats)
    found = {metric.name: metric.figure(own, None, ALL) for metric in metrics.METRICS if metric.kind == STEPS}
    return {name: figure for name, figure in found.items() if figure is not None}


def by_category(
    measured: Mapping[str, Measured], captions: Sequence[Caption]
) -> dict[str, dict[str, dict[str, float]]]:
    """Figures of every category of captions and every method; empty where captions have none.

    Returns:
      {category: {label: {"pictures", and of the metrics that are known and have intervals over pictures}}}, categories
      by name.
    """
    found = {}
    for category in sorted({caption.category for caption in captions if caption.category}):
        rows = np.array([row for row, caption in enumerate(captions) if caption.category == category])
        found[category] = {}
        for label, own in measured.items():
            figures = {m.name: m.figure(own, None, rows) for m in metrics.METRICS if m.interval and m.kind != TIMES}
            known = {name: figure for name, figure in figures.items() if figure is not None}
            found[category][label] = {"pictures": len(rows), **known}
    return found
