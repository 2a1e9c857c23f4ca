"""The batches of a drafter's training, as a function of the step number."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from cascade_jax.training.data import Data, by_row
from cascade_jax.training.drafter import Objective


class Batches:
    """The batches of a run: step -> {"tokens": int [B, T], "prompts": stacked prompts, see `data.by_row`, "row": int
    [B], its number in the batch, "unconditional": bool [B], "features": kept features [B, 2, S, w], if there are any}.

    Epochs go over the first `rows` rows of the data. With several processes each gets its own part of a batch.
    """

    def __init__(self, data: Data, target: Any, *, rows: int, batch: int, seed: int, objective: Objective, taps):
        if not batch <= rows:
            raise ValueError(f"a batch of {batch} does not fit into {rows} rows to train on")
        self._data, self._target, self._rows, self._batch, self._seed = data, target, rows, batch, seed
        self._unconditional = objective.unconditional
        self.per_epoch = rows // batch
        self._columns = None if data.taps is None or not set(taps) <= set(data.taps) else _columns(data.taps, taps)
        self._epoch = functools.lru_cache(maxsize=4)(lambda epoch: data.order(rows, seed, epoch))
        self._widest = self._longest()

    def __call__(self, step: int) -> dict[str, Any]:
        epoch, within = divmod(step, self.per_epoch)
        chosen = self._epoch(epoch)[within * self._batch : (within + 1) * self._batch]
        number = np.arange(self._batch)
        unconditional = np.random.default_rng((self._seed, 1, step)).random(self._batch) < self._unconditional
        part = np.array_split(number, jax.process_count())[jax.process_index()]
        tokens, _, prompts = self._data.rows(chosen[part])
        made = {
            "tokens": tokens,
            "prompts": by_row(self._target.stack(prompts), self._widest),
            "row": number[part].astype(np.int32),
            "unconditional": unconditional[part],
        }
        if self._columns is not None:
            slots = self._data.kept_slots if self._widest is None else self._widest + tokens.shape[1] - 1
            kept = self._data.features(chosen[part], slots)
            kept = kept.reshape(*kept.shape[:3], -1, self._target.dim)[..., self._columns, :]
            made["features"] = kept.reshape(*kept.shape[:3], -1)
        return made

    def _longest(self) -> int | None:
        """Slots of the longest prompt, where they differ: then all batches have one shape."""
        first = self._target.stack(self._data.rows([0])[2])
        if not hasattr(first, "length"):
            return None
        widest = 0
        for start in range(0, self._data.count, 1024):
            prompts = self._data.rows(range(start, min(start + 1024, self._data.count)))[2]
            widest = max(widest, self._target.stack(prompts).ids.shape[1])
        return widest


def _columns(kept: Sequence[int], taps: Sequence[int]) -> list[int]:
    """Where the features and the layers `taps` stand among kept ones."""
    return [0, *(1 + list(kept).index(tap) for tap in taps)]
