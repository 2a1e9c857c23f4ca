"""A function of a row, for every row, as one kernel: the row is held in registers, so passes over it read no memory.

On GPUs XLA makes some 130 kernels of the search for a row's k-th largest alone, and at batch 1 each costs as much as
reading some megabytes. The function is the one that other platforms run; it has to make do with what Triton knows:
element by element, sums, maxima and loops.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from cascade_jax import platforms

SMALLEST, LARGEST = 128, 1 << 17  # numbers of a row that is worth a kernel, and that registers hold


@dataclass(frozen=True)
class Rows:
    """Rows that a function is applied to.

    Attributes:
      array: [..., V].
      fill: what a row is filled up with for the function, to the next power of two.
      cut: None if there is one row for every result; (first, all) if of every `all` rows on the last axis but one the
        first result belongs to row `first`, the next to the next.
    """

    array: jax.Array
    fill: float = 0.0
    cut: tuple[int, int] | None = None


def on_rows(
    general: Callable, of_row: Callable, shared, rows: Sequence[Rows], results: Sequence[tuple[int, jnp.dtype]]
) -> tuple[jax.Array, ...]:
    """`general(shared, *arrays)`, a tuple of arrays [..., width]; on a GPU `of_row(shared, *row)` for every row, which
    has to give the same, as one kernel.

    Args:
      shared: a tree of scalars.
      rows: the first has a row for every result.
      results: width and type of what is returned; `of_row` may return rows that are filled up.
    """
    arrays = tuple(own.array for own in rows)
    lead, widths = arrays[0].shape[:-1], [array.shape[-1] for array in arrays]

    def at_once(shared, *arrays, interpret=False):
        flat = [dataclasses.replace(own, array=x.reshape(-1, x.shape[-1])) for own, x in zip(rows, arrays)]
        made = by_row(of_row, shared, flat, results, lead[-1], interpret=interpret)
        return tuple(x.reshape(*lead, x.shape[-1]) for x in made)

    if widths[0] < SMALLEST or max(widths) > LARGEST:
        return general(shared, *arrays)
    return platforms.by_lowering(general, at_once)(shared, *arrays)


def by_row(function: Callable, shared, rows, results, beside: int, *, interpret: bool = False):
    """`function(shared, *row)` of every row of `rows`, arrays [n, V], `beside` of which belong together: see `Rows`."""
    leaves, structure = jax.tree.flatten(shared)
    leaves = [jnp.asarray(leaf).reshape(1) for leaf in leaves]

    def program(*refs):
        scalars = jax.tree.unflatten(structure, [ref[np.int32(0)] for ref in refs[: len(leaves)]])
        given, made = refs[len(leaves) : len(leaves) + len(rows)], refs[len(leaves) + len(rows) :]
        loaded = [_load(ref, own.fill) for ref, own in zip(given, rows, strict=True)]
        for ref, row in zip(made, function(scalars, *loaded), strict=True):
            places = jnp.arange(row.shape[0])
            triton.store(ref.at[pl.ds(0, row.shape[0])], row.astype(ref.dtype), mask=places < ref.shape[0])

    def place(cut, i):
        return (i if cut is None else i // beside * cut[1] + cut[0] + i % beside, 0)

    count = rows[0].array.shape[0]
    shapes = [jax.ShapeDtypeStruct((count, width), dtype) for width, dtype in results]
    blocks = [(own.array.shape[1], own.cut) for own in rows] + [(width, None) for width, _ in results]
    specs = [pl.BlockSpec((None, width), functools.partial(place, cut)) for width, cut in blocks]
    return tuple(
        pl.pallas_call(
            program,
            grid=(count,),
            in_specs=[pl.BlockSpec((1,), lambda i: (0,))] * len(leaves) + specs[: len(rows)],
            out_specs=specs[len(rows) :],
            out_shape=shapes,
            interpret=interpret,
            compiler_params=None if interpret else triton.CompilerParams(num_warps=16, num_stages=1),
            name="by_row",
        )(*leaves, *(own.array for own in rows))
    )


def _load(ref, fill: float) -> jax.Array:
    width = ref.shape[0]
    filled = 1 << (width - 1).bit_length()
    return triton.load(ref.at[pl.ds(0, filled)], mask=jnp.arange(filled) < width, other=jnp.asarray(fill, ref.dtype))
