"""Key-value caches, and what a forward pass of several new tokens may see.

Attention runs over *segments*. The past consists of zero or more segments of keys (the cache of accepted tokens; while
a drafter descends its tree, also the tree's upper levels), and the new tokens are the last segment, under a mask of
their own: the causal triangle while a prompt is read, a tree's ancestor matrix while drafts are verified. One softmax
spans all of them. A forward pass returns the new tokens' keys and values and writes nothing: committing those that
turn out to be part of the output is the decoding loop's business, so a cache never holds a rejected token.

Shapes: `R` rows (guidance branches times batch), `S` new tokens, `T` slots of a segment, `K` key-value heads, `D` head
size. `P` prefix slots, `d` model width.
"""

import jax
import jax.numpy as jnp
from flax import struct

from cascade_jax import mesh, platforms
from cascade_jax.kernels.append import APPENDED, append

MASKED = -1e30


@struct.dataclass
class KV:
    """Keys [R, K, D, T] and values [R, K, T, D] of one layer: both of attention's products find their second factor as
    it lies. On CPU keys [R, K, T, D] make the scores of several new tokens take twice as long, and [R, T, K, D] slows
    attention over a long cache down nine times."""

    key: jax.Array
    value: jax.Array


Segment = tuple[KV, ...]  # one KV a layer
_SLOTS = KV(key=3, value=2)  # the axes that slots lie along
_APART = 4  # so many rows are written one after the other: XLA makes a scatter of a write at several places at once


def each(function, *segments: Segment) -> Segment:
    """`function(axis, *arrays)` of the keys, and of the values, of every layer; slots lie along `axis`."""
    return tuple(jax.tree.map(function, _SLOTS, *layers) for layers in zip(*segments, strict=True))


def slots(segment: Segment) -> int:
    """A segment's slots (T)."""
    return segment[0].value.shape[2]


@struct.dataclass
class Prefix:
    """Encoded prompts: what stands before the first output token.

    Attributes:
      embeddings: [R, P, d], as the target takes them in; of one that embeds tokens itself (see `targets`) these tokens,
        int [R, P].
      drafter_embeddings: [R, P, d], as the drafter does; None for one that takes in none.
      length: int [R], slots in use; the rest of a row is filler.
      holes: bool [R, P], padding inside the used slots, seen by nobody but itself; None for none.
    """

    embeddings: jax.Array
    drafter_embeddings: jax.Array | None
    length: jax.Array
    holes: jax.Array | None = None


@struct.dataclass
class Filled:
    """What is in a cache: `length[r]` slots of row r, but for those that are padding; see `filled` for its mask.

    Attributes:
      length: int [R].
      holes: bool [R, P], true where one of the first P slots is padding that nobody may see; None for no padding.
    """

    length: jax.Array
    holes: jax.Array | None = None


@struct.dataclass
class Context:
    """What the new tokens of a forward pass see, computed once and shared by all layers.

    Attributes:
      rope: [R, S, D/2, 2], cosine and sine of the new tokens' rotary angles.
      new_bias: additive mask among the new tokens, broadcastable to [R, 1, S, S].
      past_bias: for every past segment its additive mask, broadcastable to [R, 1, S, T].
      past_filled: for every past segment what its mask shows, if that is so many slots: kernels need no mask then, and
        read no further. None for other masks. Empty if all are.

    In place of a mask None says that new token i sees slot i of that segment and no other, as the chains of EAGLE-3's
    training-time test do, one for every position of a sequence: S scores in place of S x S.
    """

    rope: jax.Array
    new_bias: jax.Array | None
    past_bias: tuple[jax.Array | None, ...] = ()
    past_filled: tuple[Filled | None, ...] = ()


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


def capacity(prefix: int, length: int, depth: int) -> int:
    """Slots of the cache of a picture of `length` tokens: the last step may write a whole path of a tree of this depth
    behind the last but one.

    Rounded up to a multiple of 32: what is not one of 8 is copied to be one before every product on GPUs, and read in
    narrower pieces by kernels.
    """
    return -(-(prefix + length + depth + 1) // 32) * 32


def room(segment: Segment, slots: int) -> Segment:
    """A cache of `slots` zeros for keys and values like these, of a type that suits the platform."""

    def zeros(axis, x):
        shape = list(x.shape)
        shape[axis] = slots
        return jnp.zeros(shape, platforms.cache_dtype(x.dtype))

    return each(zeros, segment)


def write(
    cache: Segment, new: Segment, start: jax.Array, after: jax.Array | None = None, nodes: jax.Array | None = None
) -> Segment:
    """Writes row r's new keys and values, a segment of S slots, into its slots start[r] ... start[r] + S - 1.

    Args:
      after: float [R], anything that was computed from all layers of this cache. New keys do not depend on what their
        layer's attention reads, so XLA may want to write first and, to be able to, copies every cache twice a step.
        Slots that depend on `after` make it read first, and then it writes in place.
      nodes: int [R, n], which of the new slots to write, one behind the other; None for all of them.
    """
    if after is not None:
        start = jnp.where(jnp.isnan(after), 0, start)

    def general(cache, new, start, nodes):
        def put(axis, slots, rows):
            count = start.shape[0]  # not len(start): an exported program does not know its batch
            if mesh.shards() == 1 and isinstance(count, int) and count <= _APART:
                for row in range(count):
                    at = [jnp.int32(0)] * 4
                    at[0], at[axis] = jnp.int32(row), start[row]
                    slots = jax.lax.dynamic_update_slice(slots, rows[row : row + 1].astype(slots.dtype), at)
                return slots
            place = jax.vmap(lambda s, r, at: jax.lax.dynamic_update_slice_in_dim(s, r, at, axis=axis - 1))
            return mesh.divided(place(slots, rows.astype(slots.dtype), start), 1)

        return each(put, cache, new if nodes is None else take(new, nodes))

    def at_once(cache, new, start, nodes, interpret=False):
        if nodes is None:
            nodes = jnp.broadcast_to(jnp.arange(slots(new)), (start.shape[0], slots(new)))
        cache, new = ([(layer.key, layer.value) for layer in segment] for segment in (cache, new))
        return tuple(KV(*pair) for pair in append(cache, new, nodes, start, interpret=interpret))

    count = slots(new) if nodes is None else nodes.shape[1]
    function = platforms.by_lowering(general, at_once) if count <= APPENDED else general
    return function(cache, new, start, nodes)


def take(new: Segment, nodes: jax.Array) -> Segment:
    """The segment of `nodes` int [R, n] out of a segment of new tokens."""

    def chosen(axis, x):
        others = [other for other in (1, 2, 3) if other != axis]
        return jnp.take_along_axis(x, jnp.expand_dims(nodes, others), axis=axis)

    return each(chosen, new)


def join(a: Segment | None, b: Segment) -> Segment:
    """Two segments as one, along the slots."""
    return b if a is None else each(lambda axis, x, y: jnp.concatenate([x, y], axis=axis), a, b)
