"""Quality over speed, as matplotlib figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cascade_jax.evaluation import metrics
from cascade_jax.evaluation.metrics import Metric
from cascade_jax.evaluation.metrics.speed import SPEEDUP
from cascade_jax.evaluation.metrics.steps import TARGET_STEPS

LEAST = 0.05  # an axis spans at least this share of its largest value, so that noise does not look like an effect


def figure(methods: Mapping[str, Mapping[str, Any]]):
    """What is known of quality over speed; variants of a method are joined by a line."""
    speed, title = SPEEDUP, "speedup over AR"
    if any(figures[SPEEDUP.name] is None for figures in methods.values()):
        speed, title = TARGET_STEPS, "target steps per picture"
    panels = quality(methods.values())
    page, columns = panelled(panels, 5.2, 4.2)
    names = list(dict.fromkeys(figures["method"] for figures in methods.values()))
    for axes, metric in zip(columns, panels):
        for number, name in enumerate(names):
            own = sorted((f for f in methods.values() if f["method"] == name), key=lambda f: f[speed.name])
            x, y = np.array([f[speed.name] for f in own]), np.array([f[metric.name] for f in own])
            errors = {"xerr": spread(own, speed, x), "yerr": spread(own, metric, y)}
            axes.errorbar(x, y, **errors, marker="o", markersize=4, linewidth=1, capsize=2, color=f"C{number % 10}")
        for label, figures in methods.items():
            spot = figures[speed.name], figures[metric.name]
            axes.annotate(label, spot, (5, 4), textcoords="offset points", fontsize=8)
        axes.set(xlabel=title, ylabel=metric.axis)
        widen(axes)
    return page


def quality(methods: Sequence[Mapping[str, Any]]) -> list[Metric]:
    """The metrics of quality that all methods have figures of."""
    return [m for m in metrics.METRICS if m.axis and all(figures.get(m.name) is not None for figures in methods)]


def panelled(panels: Sequence[Metric], width: float, height: float):
    """A matplotlib figure, and axes for every metric beside each other."""
    from matplotlib.figure import Figure  # slow to import

    page = Figure(figsize=(width * len(panels), height), layout="constrained")
    columns = np.atleast_1d(page.subplots(1, len(panels)))
    for axes in columns:
        axes.spines[["top", "right"]].set_visible(False)
    return page, columns


def widen(axes) -> None:
    """Lets both axes span enough for small differences to look small."""
    for limits, setter in ((axes.get_xlim(), axes.set_xlim), (axes.get_ylim(), axes.set_ylim)):
        low, high = sorted(limits)
        missing = LEAST * max(abs(low), abs(high)) - (high - low)
        if missing > 0:
            setter(low - missing / 2, high + missing / 2)


def spread(methods: Sequence[Mapping[str, Any]], metric: Metric, values: np.ndarray) -> np.ndarray | None:
    """Distances [2, n] to the ends of the intervals; None where there are none."""
    if not all(metric.name in figures["intervals"] for figures in methods):
        return None
    ends = np.array([figures["intervals"][metric.name] for figures in methods]).T
    return np.abs(ends - values)
