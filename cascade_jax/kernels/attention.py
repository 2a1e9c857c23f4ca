"""Attention of a few new tokens as one kernel: norms of queries and keys, rotary embedding, scores over all segments,
one softmax, values.

For tokens that are drawn, on GPUs: XLA makes ten kernels of it there, and at batch 1 each costs as much as reading some
megabytes. `models.transformer.attend` says what is computed, and is what every other platform runs. A program of the
kernel does one key-value head of one row, with as many of the query heads that share it as it can hold, and reads the
past block by block, no further than it is filled.

The two halves of a head that a rotary embedding turns into one another are loaded apart, wherever they lie; scores are
the sum of both halves' products.

Shapes: as in `models.transformer`.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

MASKED = -1e30
QUERIES = 128  # as many queries of a head of up to 128 as a program holds in registers


@dataclass(frozen=True)
class _Head:
    """What a program knows of its head.

    Attributes:
      new: new tokens.
      groups: query heads that share the key.
      members: as many of them as a program does, filled up to a power of two.
      size: of a head (D).
      style: where rotary pairs lie, see `models.transformer.BlockConfig`.
      epsilon: of the norms.
      dtype: of queries, keys and weights in products.
    """

    new: int
    groups: int
    members: int
    size: int
    style: str
    epsilon: float
    dtype: jnp.dtype

    @property
    def pair(self) -> tuple[int, int]:
        """A head's numbers with its halves apart."""
        return (self.size // 2, 2) if self.style == "interleaved" else (2, self.size // 2)

    def half(self, which: int) -> tuple:
        """Where a half lies in a pair."""
        which = np.int32(which)
        return (slice(None), which) if self.style == "interleaved" else (which, slice(None))

    @property
    def filled(self) -> int:
        """The new tokens, filled up."""
        return _filled(self.new)

    @property
    def exists(self) -> jax.Array:
        """Which of these are tokens, bool [filled]."""
        return jnp.arange(self.filled) < self.new

    @property
    def programs(self) -> int:
        """How many programs share a key."""
        return -(-self.groups // self.members)

    def queries(self, program: jax.Array) -> tuple:
        """Where a program's query heads lie, and which of these members are some: bool [members, 1], None if all."""
        first = program * self.members
        some = first + jnp.arange(self.members)[:, None] < self.groups if self.groups % self.members else None
        return pl.ds(first, self.members), some


def fits(new: int, size: int, biases) -> bool:
    """Whether the kernel takes `new` tokens with heads of `size`, however many share a key."""
    return size == _power(size) >= 32 and _held(new, size) >= 1 and all(bias is not None for bias in biases)


def _held(new: int, size: int) -> int:
    """How many query heads of so many new tokens a program holds."""
    return QUERIES * 128 // (_filled(new) * max(size, 128))


@functools.partial(jax.jit, static_argnames=("style", "epsilon", "interpret"))  # traced once for all layers
def attention(qkv, rope, norms, past, biases, lengths, *, style: str, epsilon: float, interpret: bool = False):
    """What `models.transformer.attend` computes.

    Args:
      qkv: [R, S, K, H/K + 2, D].
      rope: [R, S, D/2, 2].
      norms: None, or scale and shift of queries [H, D] and of keys [K, D], four arrays; None for shifts of norms that
        are root-mean-square ones.
      past: pairs of keys [R, K, D, T] and values [R, K, T, D].
      biases: additive masks [R or 1, 1, S or 1, T], one for every past segment, the new tokens' [R or 1, 1, S, S] last.
        None for a past segment that is seen as far as it is filled.
      lengths: for every past segment int [R], so many slots that its mask hides everything beyond, or None.
      interpret: whether to run on any platform, slowly.

    Returns:
      [R, S, H D], and the new tokens' keys [R, K, D, S] and values [R, K, S, D].
    """
    rows, new, heads, groups, size = *qkv.shape[:3], qkv.shape[3] - 2, qkv.shape[4]
    head = _Head(new, groups, min(_power(groups), _held(new, size)), size, style, epsilon, qkv.dtype)
    of_head = functools.partial(_block, lambda r, k: (r, 0, k))
    of_row, shared = functools.partial(_block, lambda r, k: (r,)), functools.partial(_block, lambda r, k: (0, 0))
    cached, of_key = functools.partial(_block, lambda r, k: (r, k)), functools.partial(_block, lambda r, k: (k,))

    def mask(bias):
        return (shared if bias.shape[0] == 1 else functools.partial(_block, lambda r, k: (r, 0)))(bias)

    operands = [of_head(qkv.reshape(rows, new, heads, groups + 2, *head.pair), 1), of_head(qkv, 1), of_row(rope)]
    norms = norms or (None,) * 4
    operands += [of_key(x.reshape(heads, -1, *head.pair)) for x in norms if x is not None]
    for (key, value), bias, length in zip(past, biases, lengths):
        operands += [cached(key.reshape(rows, heads, *head.pair, -1)), cached(value)]
        operands += [] if bias is None else [mask(bias)]
        operands += [] if length is None else [of_row(length[:, None])]
    operands.append(mask(biases[-1]))
    results = [
        of_head(jax.ShapeDtypeStruct((rows, new, heads, groups, size), qkv.dtype), 1),
        cached(jax.ShapeDtypeStruct((rows, heads, *head.pair, new), qkv.dtype)),
        cached(jax.ShapeDtypeStruct((rows, heads, new, size), qkv.dtype)),
    ]
    (arrays, specs), (shapes, out_specs) = zip(*operands), zip(*results)
    out, key, value = pl.pallas_call(
        functools.partial(
            _program,
            head,
            [x is not None for x in norms],
            [(b is not None, n is not None) for b, n in zip(biases, lengths)],
        ),
        grid=(rows, heads, head.programs),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=shapes,
        interpret=interpret,
        compiler_params=None if interpret else triton.CompilerParams(num_warps=4, num_stages=2),
        name="attention",
    )(*arrays)
    return out.reshape(rows, new, -1), key.reshape(rows, heads, size, new), value


def _block(place, x, kept: int | None = None):
    """`x` and a program's block of it: of axes that `place(row, head)` names one place, but for axis `kept`."""
    named = len(place(0, 0))
    shape = tuple(None if axis < named and axis != kept else n for axis, n in enumerate(x.shape))
    return x, pl.BlockSpec(shape, lambda r, k, _: place(r, k) + (0,) * (x.ndim - named))


def _filled(count: int) -> int:
    """`count` rounded up to what a matrix unit takes and a tensor may measure."""
    return max(16, _power(count))


def _power(count: int) -> int:
    """The smallest power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()


def _program(head: _Head, norms: list[bool], given: list[tuple[bool, bool]], *refs):
    refs = list(refs)
    halves, whole, rope = (refs.pop(0) for _ in range(3))
    scales = [refs.pop(0) if there else None for there in norms]
    past = [[refs.pop(0) if there else None for there in (True, True, *has)] for has in given]
    new_bias, out, fresh_key, fresh_value = refs
    tokens, exists, here, program = pl.ds(0, head.filled), head.exists, slice(None), pl.program_id(2)

    members, some = head.queries(program)
    rotated = functools.partial(_rotated, head, halves, rope)
    queries = [
        (x * jnp.asarray(head.size**-0.5, head.dtype)).reshape(-1, head.size // 2)
        for x in rotated(members, (members, some), *scales[:2])
    ]
    one = slice(None), None
    keys = [x.reshape(-1, head.size // 2).T for x in rotated(pl.ds(head.groups, 1), one, *scales[2:])]
    values = triton.load(whole.at[tokens, np.int32(head.groups + 1), here], mask=exists[:, None], other=0.0)
    written = exists if head.programs == 1 else exists & (program == 0)
    for part, x in enumerate(keys):
        triton.store(fresh_key.at[(*head.half(part), tokens)], x, mask=written[None, :])
    triton.store(fresh_value.at[tokens, here], values, mask=written[:, None])

    bias = triton.load(new_bias.at[tokens, tokens], mask=exists[:, None] & exists[None, :], other=MASKED)
    count = head.filled * head.members
    state = jnp.full(count, MASKED), jnp.zeros(count), jnp.zeros((count, head.size))
    state = _attended(head, queries, state, keys, values, bias)
    for segment in past:
        state = _over(head, queries, state, *segment)
    _, total, mixed = state
    mixed = (mixed / total[:, None]).astype(head.dtype).reshape(head.filled, head.members, head.size)
    triton.store(out.at[tokens, members, here], mixed, mask=_both(exists, some))


def _both(exists, some):
    """Which queries there are, bool [filled, members or 1, 1]."""
    return exists[:, None, None] if some is None else exists[:, None, None] & some[None]


def _rotated(head: _Head, halves, rope, members, scales, scale, shift):
    """The two halves [filled, members, D/2] of one or several heads, normalised if there is a scale, and rotated;
    `scales` is where these heads' scales lie and which there are, see `_Head.queries`."""
    tokens, exists, (own, some) = pl.ds(0, head.filled), head.exists, scales
    first, second = (
        triton.load(halves.at[(tokens, members, *head.half(part))], mask=_both(exists, some), other=0.0)
        for part in (0, 1)
    )
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    if scale is not None:
        if shift is not None:
            mean = (jnp.sum(first, axis=-1, keepdims=True) + jnp.sum(second, axis=-1, keepdims=True)) / head.size
            first, second = first - mean, second - mean
        squares = jnp.sum(first * first, axis=-1, keepdims=True) + jnp.sum(second * second, axis=-1, keepdims=True)
        spread = jax.lax.rsqrt(squares / head.size + head.epsilon)

        def scaled(part, x):
            given = (ref for ref in (scale, shift) if ref is not None)
            factor, *more = (
                _load(ref.at[(own, *head.half(part))], some, 0.0)[None].astype(head.dtype) for ref in given
            )
            return sum(more, (x * spread).astype(head.dtype) * factor).astype(jnp.float32)

        first, second = scaled(0, first), scaled(1, second)
    cos, sin = (
        triton.load(rope.at[tokens, slice(None), np.int32(part)], mask=exists[:, None], other=0.0)[:, None]
        for part in (0, 1)
    )
    return (first * cos - second * sin).astype(head.dtype), (second * cos + first * sin).astype(head.dtype)


def _attended(head: _Head, queries, state, keys, values, bias):
    """The softmax with one more block of `n` slots.

    Args:
      queries: both halves [filled members, D/2].
      state: the largest score so far, the sum of weights, and of weighted values [filled members, D].
      keys: both halves [D/2, n].
      values: [n, D].
      bias: [1 or filled, n].
    """
    top, total, mixed = state
    scores = sum(pl.dot(query, key.astype(head.dtype)) for query, key in zip(queries, keys))
    if bias.shape[0] > 1:  # the same for a token's query heads
        bias = jnp.broadcast_to(bias[:, None], (head.filled, head.members, bias.shape[1])).reshape(scores.shape)
    scores = scores + bias
    higher = jnp.maximum(top, jnp.max(scores, axis=1))
    weights, fading = jnp.exp(scores - higher[:, None]), jnp.exp(top - higher)
    mixed = mixed * fading[:, None] + pl.dot(weights.astype(head.dtype), values.astype(head.dtype))
    return higher, total * fading + jnp.sum(weights, axis=1), mixed


def _over(head: _Head, queries, state, key, value, bias, length):
    """The softmax with a past segment."""
    slots = value.shape[0]
    block = min(64 if jnp.dtype(key.dtype).itemsize == 2 else 32, _filled(slots))
    filled = slots if length is None else length[np.int32(0)]

    def step(i, state):
        at, places = pl.ds(i * block, block), i * block + jnp.arange(block)
        within = places < slots if slots % block else None
        beside, below = (None, None) if within is None else (within[None, :], within[:, None])
        keys = [_load(key.at[(*head.half(part), at)], beside, 0.0) for part in (0, 1)]
        values = _load(value.at[at, slice(None)], below, 0.0)
        if bias is None:
            mask = jnp.where(places < filled, 0.0, MASKED)[None, :]
        elif bias.shape[0] == 1:
            mask = _load(bias.at[pl.ds(0, 1), at], beside, MASKED)
        else:
            seen = head.exists[:, None] if beside is None else head.exists[:, None] & beside
            mask = _load(bias.at[pl.ds(0, head.filled), at], seen, MASKED)
        return _attended(head, queries, state, keys, values, mask)

    return jax.lax.fori_loop(0, (filled + block - 1) // block, step, state)


def _load(ref, mask, other: float):
    return triton.load(ref) if mask is None else triton.load(ref, mask=mask, other=other)
