"""From PyTorch's layouts to ours. Every function takes arrays and only moves numbers about.

PyTorch keeps a linear map as [out, in] and a convolution as [out, in, height, width]; Flax as [in, out] and [height,
width, in, out]. What one matrix product can feed is one kernel here (see `cascade_jax.models.transformer`).
"""

import functools
from collections.abc import Callable

import numpy as np


def linear(weight: np.ndarray) -> np.ndarray:
    """[out, in] -> [in, out]."""
    return weight.T


def integers(values: np.ndarray) -> np.ndarray:
    """Any integers as int32."""
    return values.astype(np.int32)


def conv(weight: np.ndarray) -> np.ndarray:
    """[out, in, height, width] -> [height, width, in, out]."""
    return weight.transpose(2, 3, 1, 0)


def stacked(*weights: np.ndarray) -> np.ndarray:
    """Several [out, in] -> [in, number, out]."""
    return np.stack([weight.T for weight in weights], axis=1)


def rows(*biases: np.ndarray) -> np.ndarray:
    """Several [out] -> [number, out], the biases of `stacked`."""
    return np.stack(biases)


@functools.cache
def qkv(heads: int, kv_heads: int) -> Callable[..., np.ndarray]:
    """q [H D, d], k [K D, d], v [K D, d], or all three as one tensor in this order -> [d, K, H/K + 2, D]."""

    def joined(*weights: np.ndarray) -> np.ndarray:
        if len(weights) == 1:
            head_dim, rest = divmod(len(weights[0]), heads + 2 * kv_heads)
            if rest:
                raise ValueError("the rows are no multiple of the heads")
            cuts = heads * head_dim, (heads + kv_heads) * head_dim
            weights = weights[0][: cuts[0]], weights[0][cuts[0] : cuts[1]], weights[0][cuts[1] :]
        q, k, v = weights
        width = q.shape[1]
        groups = (x.reshape(kv_heads, -1, q.shape[0] // heads, width) for x in (q, k, v))
        return np.concatenate(list(groups), axis=1).transpose(3, 0, 1, 2)

    return joined


@functools.cache
def qkv_bias(heads: int, kv_heads: int) -> Callable[..., np.ndarray]:
    """The biases that belong to `qkv`: q [H D], k [K D], v [K D] -> [K, H/K + 2, D]."""
    join = qkv(heads, kv_heads)
    return lambda *biases: join(*(bias[:, None] for bias in biases))[0]


def one_more(weight: np.ndarray) -> np.ndarray:
    """Gemma keeps by how much a norm's scale is more than one; summed in float32, [d] -> [d]."""
    return (1 + weight.astype(np.float32)).astype(weight.dtype)


@functools.cache
def halves_to_pairs(heads: int) -> Callable[[np.ndarray], np.ndarray]:
    """Rows of a projection [H D, ...] from rotary pairs (0, D/2), (1, D/2 + 1) ... to (0, 1), (2, 3) ..."""

    def permuted(weight: np.ndarray) -> np.ndarray:
        split = weight.reshape(heads, 2, -1, *weight.shape[1:])
        return split.swapaxes(1, 2).reshape(weight.shape)

    return permuted


@functools.cache
def pairs_to_halves(heads: int) -> Callable[[np.ndarray], np.ndarray]:
    """The inverse of `halves_to_pairs`."""

    def permuted(weight: np.ndarray) -> np.ndarray:
        split = weight.reshape(heads, -1, 2, *weight.shape[1:])
        return split.swapaxes(1, 2).reshape(weight.shape)

    return permuted


@functools.cache
def rows_between(first: int, end: int) -> Callable[[np.ndarray], np.ndarray]:
    """The part of a head [vocabulary, in] from one row to another -> [in, rows]."""
    return lambda weight: weight[first:end].T


def code_rows(weight: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """A head [vocabulary, in] and every VQ code's text token [codes] -> [in, codes]."""
    return weight[codes].T


@functools.cache
def head_norm(heads: int, *, pairs: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """What a norm of queries or keys has for all heads [D], for every shard of heads [shards, D] or for every head
    [H, D] -> [H, D]; with `pairs` from rotary pairs to halves, as `pairs_to_halves`."""

    def repeated(weight: np.ndarray) -> np.ndarray:
        weight = weight.reshape(-1, weight.shape[-1])
        if pairs:
            weight = weight.reshape(len(weight), -1, 2).swapaxes(1, 2).reshape(weight.shape)
        times, rest = divmod(heads, len(weight))
        if rest:
            raise ValueError("the heads are no multiple of the shards")
        return np.repeat(weight, times, axis=0)

    return repeated


@functools.cache
def qkv_in_pairs(heads: int, kv_heads: int) -> Callable[..., np.ndarray]:
    """`qkv` of projections whose rotary pairs are neighbours; the pairs' members end up half a head apart."""
    join, query, key = qkv(heads, kv_heads), pairs_to_halves(heads), pairs_to_halves(kv_heads)
    return lambda q, k, v: join(query(q), key(k), v)
