"""Several methods on the same prompts: an evaluation whose run folder goes when its report is written.

DIR/report.json, report.md, grid.png    what was found
DIR/unfinished-DIGEST/                  the run folder, while the work is under way; whoever starts again goes on
"""

import hashlib
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from cascade_jax import files
from cascade_jax.bundle import Bundle
from cascade_jax.evaluation import report as reports
from cascade_jax.evaluation import run, tables
from cascade_jax.evaluation.metrics import Gauge
from cascade_jax.evaluation.metrics.metric import Progress, cautions
from cascade_jax.methods import Method
from cascade_jax.sampling import Sampling
from cascade_jax.tree import name_of

_UNFINISHED = "unfinished-"


def compare(
    bundle: Bundle,
    methods: Mapping[str, Method],
    prompts: Sequence[str],
    folder: pathlib.Path,
    *,
    timed: int,
    sampling: Sampling,
    seed: int = 0,
    gauges: Sequence[Gauge] = (),
    about: Mapping[str, Any],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Draws a picture for every prompt by every method, measures them, and writes the report, all of it or nothing.

    Args:
      methods: by label; token-by-token decoding is "ar".
      folder: receives the report; nobody else may work in it meanwhile.
      timed: how many of the prompts are drawn one at a time, with a clock; the others are drawn in batches.
      sampling, seed, gauges, progress: as of `run.evaluate`.
      about: what else the report tells: "model", "tree", "sampling" and "command", see `report.build`.

    Returns:
      The report.
    """
    weights = run.weights_of(bundle)
    knobs = [None if knob is None else float(knob) for knob in vars(sampling).values()]
    drawn = [[label, own.name, name_of(own.tree), own.settings] for label, own in methods.items()]
    place = _unfinished(folder, [list(prompts), seed, knobs, weights, run.dtype_of(bundle), drawn])
    with cautions() as careful:
        figures = run.evaluate(
            bundle, methods, prompts, place, seed=seed, timed=timed, sampling=sampling, weights=weights,
            keep_turns=True, gauges=gauges, progress=progress,
        )  # fmt: skip
    report = reports.build(figures, prompts, timed=timed, seed=seed, weights=weights, cautions=careful, **about)
    shown = reports.first_pictures(place, list(figures), len(prompts))
    with files.published(folder) as temporary:
        files.write_json(temporary / "report.json", report)
        (temporary / "report.md").write_text(tables.markdown(report), encoding="utf-8")
        reports.picture_grid(shown, report, prompts).save(temporary / "grid.png")
    shutil.rmtree(place)
    return report


def _unfinished(folder: pathlib.Path, job: Any) -> pathlib.Path:
    """The run folder of a job; those of other jobs, which nobody went on with, go."""
    digest = hashlib.sha256(json.dumps(job).encode()).hexdigest()[:8]
    for other in folder.glob(f"{_UNFINISHED}*"):
        if other.name != _UNFINISHED + digest:
            shutil.rmtree(other)
    return folder / (_UNFINISHED + digest)
