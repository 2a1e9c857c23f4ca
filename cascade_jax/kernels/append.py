"""Writing some of a pass's keys and values behind those of a cache, many layers in one kernel.

XLA makes a kernel of every array that is written, two a layer, each for a few numbers. A program of this one does one
key-value head of one row in one layer. It writes in place: of the caches nothing is read, and nothing else is touched.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

APPENDED = 16  # as many slots as a program holds in registers
LAYERS = 18  # as many as a kernel writes: the time to compile one grows faster than their number
Pair = tuple[jax.Array, jax.Array]  # keys [R, K, D, T] and values [R, K, T, D]


def append(cache: Sequence[Pair], new: Sequence[Pair], nodes: jax.Array, start: jax.Array, *, interpret: bool = False):
    """`cache.append`: by layer, the new tokens' slots `nodes` int [R, n] into slots from `start` int [R] on."""
    if len(cache) > LAYERS:
        parts = [(cache[i : i + LAYERS], new[i : i + LAYERS]) for i in range(0, len(cache), LAYERS)]
        return [pair for part in parts for pair in append(*part, nodes, start, interpret=interpret)]
    rows, heads, _, size = cache[0][1].shape
    layers, count = len(cache), nodes.shape[1]
    targets, sources = [x for pair in cache for x in pair], [x for pair in new for x in pair]

    def program(*refs):
        nodes, start, refs = refs[0], refs[1], refs[2:]
        sources, made = refs[: 2 * layers], refs[4 * layers :]
        first, places = start[np.int32(0)], [nodes[np.int32(i)] for i in range(count)]

        def write(layer):
            keys, values, key_slots, value_slots = *sources[2 * layer :][:2], *made[2 * layer :][:2]
            read = [(keys[:, place], values[place, :]) for place in places]
            for i, (key, value) in enumerate(read):
                key_slots[:, first + i] = key.astype(key_slots.dtype)
                value_slots[first + i, :] = value.astype(value_slots.dtype)

        for layer in range(layers):
            pl.when(pl.program_id(2) == layer)(functools.partial(write, layer))

    def own(x):
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda r, k, _: (r, k, 0, 0))

    specs = [pl.BlockSpec((None, count), lambda r, k, _: (r, 0)), pl.BlockSpec((1,), lambda r, k, _: (r,))]
    made = pl.pallas_call(
        program,
        grid=(rows, heads, layers),
        in_specs=[*specs, *map(own, sources), *map(own, targets)],
        out_specs=[own(x) for x in targets],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in targets],
        input_output_aliases={2 + 2 * layers + i: i for i in range(2 * layers)},
        interpret=interpret,
        compiler_params=None if interpret else triton.CompilerParams(num_warps=1 if size <= 64 else 2, num_stages=1),
        name="append",
    )(nodes.astype(jnp.int32), start.astype(jnp.int32), *sources, *targets)
    return list(zip(made[::2], made[1::2]))
