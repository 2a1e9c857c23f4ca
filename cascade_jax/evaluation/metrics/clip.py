"""CLIP's score: how well pictures fit their captions."""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING

import numpy as np

from cascade_jax import files
from cascade_jax.evaluation.metrics.metric import PICTURES, Album, Flag, Gauge, Metric, Order, Progress, mean_of

if TYPE_CHECKING:
    from cascade_jax.evaluation.networks.clip import Scorer

NAME = "clip"
KEPT = "clip.json"  # cosines of a method's pictures


def gauge(scorer: Scorer) -> Gauge:
    """The score by a scorer; the cosines of an album are kept in its folder."""

    from cascade_jax.evaluation.networks.moments import finite

    def measure(album: Album, progress: Progress | None = None) -> np.ndarray:
        about = {"network": scorer.digest, "pictures": len(album)}
        keep = None if album.folder is None else album.folder / KEPT
        if keep is not None and keep.is_file():
            there = json.loads(keep.read_text(encoding="utf-8"))
            if all(there.get(name) == value for name, value in about.items()):
                return np.array(there["scores"])
        told = None if progress is None else lambda done, total: progress("CLIP score", done, total)
        scores = scorer.scores(album.images(), album.texts, progress=told).astype(np.float64)
        finite(scores, album.names, "the CLIP score")
        if keep is not None:
            files.write_json(keep, {**about, "scores": scores.tolist()})
        return scores

    return Gauge(NAME, measure)


def _open(order: Order) -> Gauge | None:
    directory = order.given.get(FLAG.name)
    if directory is None:
        return None
    from cascade_jax.evaluation.networks import clip

    return gauge(clip.load(directory))


FLAG = Flag("clip", pathlib.Path, "DIR", "a converted CLIP: score pictures against their captions")
CLIP_SCORE = Metric(
    NAME,
    PICTURES,
    mean_of(NAME),
    "CLIP",
    "{:.4f}",
    meaning="CLIP is the mean cosine of a picture and its caption.",
    interval=True,
    axis="CLIP cosine",
    flags=(FLAG,),
    open=_open,
)
