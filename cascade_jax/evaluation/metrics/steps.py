"""How many steps of the target pictures take: what a method gains before the clock is looked at."""

import numpy as np

from cascade_jax.evaluation.metrics.metric import STEPS, Measured, Metric, Rows


def _alpha(own: Measured, base: Measured | None, rows: Rows) -> float:
    return float(np.sum(own.stats.accepted[rows]) / np.maximum(np.sum(own.stats.steps[rows]), 1))


def _steps(own: Measured, base: Measured | None, rows: Rows) -> float:
    return float(np.mean(own.stats.steps[rows]))


def _fewer(own: Measured, base: Measured | None, rows: Rows) -> float | None:
    return None if base is None else _steps(base, None, rows) / _steps(own, None, rows)


TARGET_STEPS = Metric("target_steps", STEPS, _steps, "target steps", "{:.1f}")
FEWER_STEPS = Metric("step_speedup", STEPS, _fewer, "fewer steps", "{:.2f}x")
ALPHA = Metric(
    "alpha", STEPS, _alpha, "alpha", "{:.2f}", "Alpha is the mean number of accepted drafts per step.", interval=True
)
TOKENS = Metric("tokens_per_step", STEPS, lambda own, base, rows: _alpha(own, base, rows) + 1)
