"""Key-value caches, and what a forward pass of several new tokens may see.

Attention runs over *segments*. The past consists of zero or more segments of keys (the cache of accepted tokens; while
a drafter descends its tree, also the tree's upper levels), and the new tokens are the last segment, under a mask of
their own: the causal triangle while a prompt is read, a tree's ancestor matrix while drafts are verified. One softmax
spans all of them. A forward pass returns the new tokens' keys and values and writes nothing: committing those that
turn out to be part of the output is the decoding loop's business, so a cache never holds a rejected token.

Shapes: `R` rows (guidance branches times batch), `S` new tokens, `T` slots of a segment, `K` key-value heads, `D` head
size.
"""

import jax
import jax.numpy as jnp
from flax import struct

from cascade_jax import mesh

MASKED = -1e30


@struct.dataclass
class KV:
    """Keys and values of one layer, [R, K, T, D] each. One head's keys lie together in memory: on CPU the order
    [R, T, K, D] makes attention over a long cache nine times slower."""

    key: jax.Array
    value: jax.Array


Segment = tuple[KV, ...]  # one KV a layer


@struct.dataclass
class Context:
    """What the new tokens of a forward pass see, computed once and shared by all layers.

    Attributes:
      rope: [R, S, D/2, 2], cosine and sine of the new tokens' rotary angles.
      new_bias: additive mask among the new tokens, broadcastable to [R, 1, S, S].
      past_bias: for every past segment its additive mask, broadcastable to [R, 1, S, T].

    In place of a mask None says that new token i sees slot i of that segment and no other, as the chains of EAGLE-3's
    training-time test do, one for every position of a sequence: S scores in place of S x S.
    """

    rope: jax.Array
    new_bias: jax.Array | None
    past_bias: tuple[jax.Array | None, ...] = ()


def bias(mask: jax.Array) -> jax.Array:
    """Additive attention mask: 0 where `mask` is true, a large negative number elsewhere."""
    return jnp.where(mask, 0.0, MASKED).astype(jnp.float32)


def causal(size: int) -> jax.Array:
    """The lower triangle, bool [size, size]."""
    return jnp.tril(jnp.ones((size, size), bool))


def filled(slots: int, length: jax.Array, holes: jax.Array | None = None) -> jax.Array:
    """Additive mask [R, 1, 1, slots] of a cache whose row r holds `length[r]` tokens.

    Args:
      slots: the cache's size.
      length: int [R].
      holes: bool [R, P], true where one of the first P slots is padding that nobody may see; None for no padding.
    """
    seen = jnp.arange(slots) < length[:, None]
    if holes is not None:
        seen = seen & ~jnp.pad(holes, ((0, 0), (0, slots - holes.shape[1])))
    return bias(seen)[:, None, None, :]


def empty(rows: int, layers: int, heads: int, slots: int, head_dim: int, dtype) -> Segment:
    """A cache of zeros."""
    return tuple(
        KV(jnp.zeros((rows, heads, slots, head_dim), dtype), jnp.zeros((rows, heads, slots, head_dim), dtype))
        for _ in range(layers)
    )


def write(cache: Segment, new: Segment, start: jax.Array, after: jax.Array | None = None) -> Segment:
    """Writes row r's new keys and values [R, K, S, D] into its slots start[r] ... start[r] + S - 1.

    Args:
      after: float [R], anything that was computed from all layers of this cache. New keys do not depend on what their
        layer's attention reads, so XLA may want to write first and, to be able to, copies every cache twice a step.
        Slots that depend on `after` make it read first, and then it writes in place.
    """
    if after is not None:
        start = jnp.where(jnp.isnan(after), 0, start)

    def put(slots, rows):
        written = jax.vmap(lambda s, r, at: jax.lax.dynamic_update_slice_in_dim(s, r, at, axis=1))(
            slots, rows.astype(slots.dtype), start
        )
        return mesh.divided(written, 1)

    return jax.tree.map(put, cache, new)


def take(new: Segment, nodes: jax.Array) -> Segment:
    """The keys and values of `nodes` int [R, n] out of a segment of new tokens, [R, K, n, D]."""
    return jax.tree.map(lambda x: jnp.take_along_axis(x, nodes[:, None, :, None], axis=2), new)


def join(a: Segment | None, b: Segment) -> Segment:
    """Two segments as one, along the slots."""
    return b if a is None else jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=2), a, b)
