"""What every draft looks like at its place: the picture's cell, decoded with the draft in place of what came.

A tokenizer's decoder sees the whole picture, its norms and attention above all, so a cell cannot be decoded alone. Many
can at once: drafts whose places lie `APART` cells from each other hardly touch, and are put into the same picture.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from cascade_jax.paper.traces import Trace

APART = 3
BATCH = 16


@dataclasses.dataclass(frozen=True)
class Patches:
    """Drafts' patches, K of them: a draft that comes up again at its place has the same one.

    Attributes:
      cells: uint8 [K, h, w, 3].
      index: int [S, N], which is whose; -1 where there is nothing to see: no draft, or beyond the picture.
    """

    cells: np.ndarray
    index: np.ndarray


def cut(
    trace: Trace, decode: Callable[[np.ndarray], np.ndarray], progress: Callable[[int, int], None] | None = None
) -> Patches:
    """Every draft's patch, the roots' included.

    Args:
      trace: of S steps with N nodes each.
      decode: output tokens int [B, L] to pictures uint8, `Bundle.images`; it is given batches of one size.
      progress: called with (drafts decoded, drafts in all).
    """
    cell_of = cells_of(trace)
    place = trace.position[:, None] + trace.depths - 1
    there = (trace.tokens >= 0) & (place < len(cell_of))
    there &= cell_of[np.where(there, place, 0)] >= 0
    pairs = np.stack([place[there], trace.tokens[there]], axis=1)
    pairs, which = np.unique(pairs, axis=0, return_inverse=True)
    index = np.full(trace.tokens.shape, -1)
    index[there] = which.reshape(-1)

    height, width = _cell(trace.image, trace.places)
    cells = np.zeros((len(pairs), height, width, 3), np.uint8)

    def keep(pair: int, image: np.ndarray) -> None:
        row, column = divmod(int(cell_of[pairs[pair, 0]]), trace.places.shape[1])
        cells[pair] = image[row * height : (row + 1) * height, column * width : (column + 1) * width]

    came = trace.output[pairs[:, 0]] == pairs[:, 1]
    for pair in np.flatnonzero(came):
        keep(pair, trace.image)
    rounds, done = list(_rounds(np.flatnonzero(~came), cell_of[pairs[:, 0]], trace.places.shape)), 0
    size = min(BATCH, max(len(rounds), 1))
    for start in range(0, len(rounds), size):
        chunk = rounds[start : start + size]
        tokens = np.repeat(trace.output[None], size, axis=0)
        for row, chosen in enumerate(chunk):
            tokens[row, pairs[chosen, 0]] = pairs[chosen, 1]
        for chosen, image in zip(chunk, decode(tokens)):
            for pair in chosen:
                keep(pair, image)
        done += sum(map(len, chunk))
        if progress is not None:
            progress(done, int(np.sum(~came)))
    return Patches(cells, index)


def cells_of(trace: Trace) -> np.ndarray:
    """Which cell of the picture, row by row, stands at each place of the output, int [L]; -1 for none, as newlines."""
    cell_of = np.full(len(trace.output), -1)
    cell_of[trace.places.ravel()] = np.arange(trace.places.size)
    return cell_of


def _cell(image: np.ndarray, places: np.ndarray) -> tuple[int, int]:
    return image.shape[0] // places.shape[0], image.shape[1] // places.shape[1]


def _rounds(pairs: np.ndarray, cell: np.ndarray, shape: tuple[int, int]) -> Iterator[np.ndarray]:
    """Divides `pairs` into sets whose cells lie apart; the fullest cells come first, so that few sets do."""
    waiting: dict[int, list[int]] = {}
    for pair in pairs:
        waiting.setdefault(int(cell[pair]), []).append(int(pair))
    while waiting:
        taken, chosen = np.zeros(shape, bool), []
        for own in sorted(waiting, key=lambda own: -len(waiting[own])):
            row, column = divmod(own, shape[1])
            if not taken[row, column]:
                chosen.append(waiting[own].pop())
                taken[max(row - APART + 1, 0) : row + APART, max(column - APART + 1, 0) : column + APART] = True
        waiting = {own: left for own, left in waiting.items() if left}
        yield np.array(chosen)
