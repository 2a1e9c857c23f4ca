"""How long pictures take: medians over turns at batch 1, and how much sooner they are there than token by token."""

import numpy as np

from cascade_jax.evaluation.metrics.metric import TIMES, Measured, Metric, Rows


def _seconds(own: Measured, base: Measured | None, rows: Rows) -> float | None:
    return float(np.median(own.seconds[rows])) if len(own.seconds) else None


def _speedup(own: Measured, base: Measured | None, rows: Rows) -> float | None:
    """Ratio of median times: resampled rows are of the same captions for both."""
    return None if base is None or not len(own.seconds) else _seconds(base, None, rows) / _seconds(own, None, rows)


SECONDS = Metric("seconds_per_image", TIMES, _seconds, "seconds per picture", "{:.3g}", interval=True)
SPEEDUP = Metric("speedup", TIMES, _speedup, "speedup", "{:.2f}x", interval=True)
