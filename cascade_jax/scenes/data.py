"""Scenes without end, as batches that are functions of a seed and a step number."""

import functools
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor

import numpy as np

from cascade_jax.scenes import captions, render, world

CELL = 8  # pixels per side of the squares that `cover` is told for


def random_captions(count: int, seed: int, *, training: bool = False) -> list[str]:
    """Captions of random scenes; the i-th depends on the seed and i alone.

    Args:
      training: captions to train on, which evaluation draws under no seed.
    """

    def caption(index: int) -> str:
        rng = np.random.default_rng(np.random.SeedSequence((seed, index, 1) if training else (seed, index)))
        return captions.describe(world.sample_scene(rng), rng)

    return [caption(index) for index in range(count)]


def scene_batch(
    seed: int, step: int, batch: int, *, complete: bool | Sequence[bool] = False, pool: Executor | None = None
) -> dict[str, np.ndarray]:
    """Random scenes, rendered. Row r depends on (seed, step, r) alone.

    Args:
      seed: of the whole sequence of batches.
      step: number of the batch.
      batch: number of rows, B.
      complete: whether ids say all there is to say of a scene, or only what a random caption of it says; one for all
        rows or one for each.
      pool: renders rows, see `renderers`; they are rendered here without one.

    Returns:
      images: uint8 [B, 128, 128, 3]
      ids: int32 [B, 10], see `captions.encode`
      cover: float32 [B, 16, 16], the largest part of a pixel that a thing covers, in each cell of 8 x 8 pixels
    """
    rows = zip([(seed, step, row) for row in range(batch)], np.broadcast_to(complete, batch).tolist())
    drawn = map(_draw, rows) if pool is None else pool.map(_draw, rows, chunksize=4)
    images, ids, covers = zip(*drawn)
    return {"images": np.stack(images), "ids": np.stack(ids), "cover": np.stack(covers)}


@functools.cache
def renderers() -> Executor | None:
    """A pool of processes that render, one for each core but one; None where there are fewer than four cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Spawned, not forked: JAX runs threads here.
    return ProcessPoolExecutor(cores - 1, multiprocessing.get_context("spawn")) if cores >= 4 else None


def _draw(row):
    key, complete = row
    rng = np.random.default_rng(np.random.SeedSequence(key))
    scene = world.sample_scene(rng)
    image, cover = render.render_and_cover(scene, rng)
    said = captions.attributes_of(scene) if complete else captions.parse(captions.describe(scene, rng))
    cells = cover.reshape(world.PIXELS // CELL, CELL, world.PIXELS // CELL, CELL)
    return image, captions.encode(said), cells.max((1, 3))
