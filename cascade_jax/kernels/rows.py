"""A function of a row, for every row, as one kernel: the row is held in registers, so passes over it read no memory.

On GPUs XLA makes some 130 kernels of the search for a row's k-th largest alone, and at batch 1 each costs as much as
reading some megabytes. The function is the one that other platforms run; it has to make do with what Triton knows:
element by element, sums, maxima and loops.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

LARGEST = 1 << 17  # numbers of a row


def by_row(
    function: Callable,
    shared,
    rows: Sequence[jax.Array],
    fills: Sequence[float],
    results: Sequence[tuple[int, jnp.dtype]],
    *,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """`function(shared, *row)` of every row of `rows`.

    Args:
      shared: a tree of scalars.
      rows: arrays [n, V], each with a width V of its own.
      fills: what rows are filled up with for `function`, to the next power of two.
      results: width and type of what `function` returns, a tuple of rows, which may be as long as filled ones.
      interpret: whether to run on any platform, slowly.

    Returns:
      [n, width] for every result.
    """
    leaves, structure = jax.tree.flatten(shared)
    leaves = [jnp.asarray(leaf).reshape(1) for leaf in leaves]

    def program(*refs):
        scalars = jax.tree.unflatten(structure, [ref[np.int32(0)] for ref in refs[: len(leaves)]])
        given, made = refs[len(leaves) : len(leaves) + len(rows)], refs[len(leaves) + len(rows) :]
        loaded = [_load(ref, fill) for ref, fill in zip(given, fills, strict=True)]
        for ref, row in zip(made, function(scalars, *loaded), strict=True):
            places = jnp.arange(row.shape[0])
            triton.store(ref.at[pl.ds(0, row.shape[0])], row.astype(ref.dtype), mask=places < ref.shape[0])

    count = rows[0].shape[0]
    shapes = [jax.ShapeDtypeStruct((count, width), dtype) for width, dtype in results]
    specs = [pl.BlockSpec((None, x.shape[1]), lambda i: (i, 0)) for x in (*rows, *shapes)]
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
        )(*leaves, *rows)
    )


def _load(ref, fill: float) -> jax.Array:
    width = ref.shape[0]
    filled = 1 << (width - 1).bit_length()
    return triton.load(ref.at[pl.ds(0, filled)], mask=jnp.arange(filled) < width, other=jnp.asarray(fill, ref.dtype))
