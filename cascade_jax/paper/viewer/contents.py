"""What the page knows: a trace as plain lists, which JSON can hold, and pictures as data URLs of a bounded size."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from cascade_jax.acceptance import Bounded
from cascade_jax.paper import traces
from cascade_jax.paper.traces import MAPS, NOT_VISITED, REASONS, Trace
from cascade_jax.paper.viewer.patches import Patches, cells_of

PICTURE_BYTES, SHEET_BYTES = 400_000, 1_200_000  # at most, before they become text, which takes a third more
QUALITIES = (92, 85, 75)
TURN = (
    "node", "target", "draft", "strict", "probability", "gained", "uniform", "reason", "spent", "first", "second",
    "interchangeable", "convergent",
)  # fmt: skip


def contents(trace: Trace, patches: Patches, beside: np.ndarray | None = None) -> dict[str, Any]:
    """All that the page shows of a trace of S steps.

    Args:
      beside: uint8, the same key's picture drawn token by token; None to leave it out.

    Returns:
      "steps": of each its "position", "tokens", "path" (accepted drafts), "next" (the target's own token), charges,
      "patches" (each node's in the sheet), "parents" if they differ from step to step, and "turns", a row of `TURN` for
      each draft that had one; its last two list (node, mass) of the sets I and C. Besides, what all steps share.
    """
    shared = bool((trace.parents == trace.parents[:1]).all())
    sheet, columns = _sheet(patches.cells)
    return {
        "length": len(trace.output),
        "grid": list(trace.places.shape),
        "cells": cells_of(trace).tolist(),
        "output": trace.output.tolist(),
        "rule": _rule(trace),
        "reasons": list(REASONS),
        "fields": list(TURN),
        "parents": trace.parents[0].tolist() if shared else None,
        "steps": [_step(trace, patches, step, shared) for step in range(len(trace))],
        "maps": {what: _rounded(traces.relaxation_map(trace, what=what).ravel()) for what in MAPS},
        "picture": encoded(trace.image, PICTURE_BYTES),
        "beside": None if beside is None else encoded(beside, PICTURE_BYTES),
        "sheet": {"picture": encoded(sheet, SHEET_BYTES), "columns": columns, "count": len(patches.cells)},
    }


def _rule(trace: Trace) -> dict[str, Any]:
    """The rule as far as the page speaks of it: thresholds if it is CASCADE's, and what a step may charge."""
    rule, taus = trace.rule, traces.thresholds(trace.rule)
    bounded = isinstance(rule, Bounded)
    budget = float(rule.budget) if bounded or taus is not None else None
    return {
        "tau_pos": taus and taus[0],
        "tau_seq": taus and taus[1],
        "budget": budget if budget is None or math.isfinite(budget) else None,
        "ledger": "coupled" if bounded else "nominal",
    }


def _step(trace: Trace, patches: Patches, step: int, shared: bool) -> dict[str, Any]:
    path = trace.path[step]
    found = {
        "position": int(trace.position[step]),
        "tokens": trace.tokens[step].tolist(),
        "patches": patches.index[step].tolist(),
        "path": path[path > 0].tolist(),
        "next": int(trace.next_token[step]),
        **{name: _number(getattr(trace, name)[step]) for name in ("nominal", "coupled")},
        "diverged": bool(trace.diverged[step]),
        "turns": _turns(trace, step),
    }
    return found if shared else found | {"parents": trace.parents[step].tolist()}


def _turns(trace: Trace, step: int) -> list[list[Any]]:
    parents, exists = trace.parents[step], trace.tokens[step] >= 0
    both = traces.sets(trace, step) if traces.thresholds(trace.rule) else None
    rows = []
    for node in np.flatnonzero(trace.reason[step] != NOT_VISITED):
        row = [_number(getattr(trace, name)[step, node]) for name in TURN[1:-2]]
        pairs = [[], []]
        if both is not None:
            families = np.flatnonzero(exists & (parents == parents[node])), np.flatnonzero(exists & (parents == node))
            masses = trace.beside[step, node], trace.below[step, node]
            for pair, members, family, mass in zip(pairs, both, families, masses):
                pair += [[int(n), _number(mass[rank])] for rank, n in enumerate(family) if members[node, n]]
        rows.append([int(node), *row, *pairs])
    return rows


def _number(value: Any) -> float | int | None:
    """Four figures, which is more than anyone reads; None for what nobody knows."""
    if np.issubdtype(np.asarray(value).dtype, np.integer):
        return int(value)
    return float(f"{float(value):.4g}") if np.isfinite(value) else None


def _rounded(values: Sequence[float]) -> list[float | int | None]:
    return [_number(value) for value in values]


def _sheet(cells: np.ndarray) -> tuple[np.ndarray, int]:
    """Patches [K, h, w, 3] side by side in one picture, and how many stand in a row of it."""
    columns = max(math.ceil(math.sqrt(len(cells))), 1)
    rows, (height, width) = max(-(-len(cells) // columns), 1), cells.shape[1:3]
    sheet = np.zeros((rows * columns, height, width, 3), np.uint8)
    sheet[: len(cells)] = cells
    return sheet.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(
        rows * height, columns * width, 3
    ), columns


def encoded(pixels: np.ndarray, budget: int) -> str:
    """A picture uint8 [H, W, 3] as a data URL of a file of at most `budget` bytes: a PNG if that fits, else a JPEG, of
    half the size and half again if need be."""
    image = Image.fromarray(pixels)
    while True:
        ways = [{"format": "PNG"}] + [{"format": "JPEG", "quality": own, "subsampling": 0} for own in QUALITIES]
        for way in ways:
            image.save(stream := io.BytesIO(), **way)
            if stream.tell() <= budget:
                text = base64.b64encode(stream.getvalue()).decode("ascii")
                return f"data:image/{way['format'].lower()};base64,{text}"
        image = image.resize((max(image.width // 2, 1), max(image.height // 2, 1)), Image.Resampling.BOX)
