"""How far a rule strays from the target's distribution: per step, and the mass that it adds to a whole picture."""

import numpy as np

from cascade_jax.evaluation.metrics.metric import STEPS, Measured, Metric, Rows


def _per_step(name: str):
    """A mean over all steps, of what `Report` holds per picture."""

    def figure(own: Measured, base: Measured | None, rows: Rows) -> float:
        steps = own.stats.steps[rows]
        return float(np.sum(getattr(own.stats, name)[rows] * steps) / np.maximum(np.sum(steps), 1))

    return figure


def _added(own: Measured, rows: Rows) -> float:
    return float(np.sum(own.stats.nominal[rows] * own.stats.steps[rows]))


def _per_image(own: Measured, base: Measured | None, rows: Rows) -> float:
    return _added(own, rows) / len(own.stats.steps[rows])


def _per_token(own: Measured, base: Measured | None, rows: Rows) -> float:
    """The paper's section 5.1; the first token of a picture comes from the prefill."""
    return _added(own, rows) / float(np.sum((own.stats.steps + own.stats.accepted + 1)[rows]))


NOMINAL = Metric(
    "nominal", STEPS, _per_step("nominal"), "nominal",
    meaning="Nominal is the probability mass that the rule added per step.",
)  # fmt: skip
COUPLED = Metric(
    "coupled", STEPS, _per_step("coupled"), "coupled",
    meaning="Coupled is the probability per step of parting from the strict decoder under the same random numbers.",
)  # fmt: skip
DIVERGENCE = Metric(
    "divergence", STEPS, _per_step("divergence"), "divergence", axis="divergence",
    meaning="Divergence is the share of steps that did.",
)  # fmt: skip
ADDED_PER_IMAGE = Metric("tvd_per_image", STEPS, _per_image)
ADDED_PER_TOKEN = Metric("tvd_per_token", STEPS, _per_token)
