"""From logits to the distribution that is sampled: guidance, temperature, top-k, top-p, and draws from it.

Every knob is traced, so changing its value compiles nothing. Target and drafter go through the same functions: that is
what makes strict verification lossless for the *warped* distribution.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cascade_jax import mesh
from cascade_jax.kernels.rows import Rows, on_rows

EXCLUDED = -jnp.inf


@struct.dataclass
class Sampling:
    """How tokens are drawn.

    Attributes:
      temperature: divides the logits; 0 is greedy decoding.
      top_k: keep the k largest logits, and those that tie with the k-th (transformers' semantics); None keeps all.
      top_p: keep the smallest set of likeliest tokens whose mass reaches p; None or 1 keeps all.
      guidance: classifier-free guidance scale g in unconditional + g (conditional - unconditional); None decodes the
        conditional branch alone, at half the work.
    """

    temperature: float | jax.Array = 1.0
    top_k: int | jax.Array | None = None
    top_p: float | jax.Array | None = None
    guidance: float | jax.Array | None = None

    def checked(self) -> "Sampling":
        """The same settings, as arrays; a top_p of 1 becomes None.

        Raises:
          ValueError: if a concrete value is out of its range; the message names it.
        """
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}; a large number draws from all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if self.guidance is not None and not 0 <= self.guidance < float("inf"):
            raise ValueError(f"guidance must be at least 0, not {self.guidance}")
        top_p = None if self.top_p == 1 else self.top_p
        floats = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), self.replace(top_k=None, top_p=top_p))
        return floats.replace(
            top_k=None if self.top_k is None else jnp.asarray(np.minimum(self.top_k, 2**31 - 1), jnp.int32)
        )


def guide(logits: jax.Array, guidance: jax.Array | None) -> jax.Array:
    """Combines the guidance branches' logits [G, B, ..., V], conditional first, into [B, ..., V]."""
    if guidance is None:
        return logits[0]
    conditional, unconditional = logits
    guided = unconditional + guidance * (conditional - unconditional)
    return jnp.where(jnp.isneginf(unconditional), EXCLUDED, guided)  # what a head cannot draw stays so


def guided_logits(head: Callable, features: jax.Array, guidance: jax.Array | None, *, linear: bool) -> jax.Array:
    """Guided logits [B, ..., V] of features [G, B, ..., d], by a `head` that maps features to logits.

    A linear head may be applied to guided features instead of both branches' own, which is half the work. That is done
    in float32 only: a narrower type would round what guidance has magnified.
    """
    if linear and features.dtype == jnp.float32:
        return head(guide(features, guidance))
    return guide(head(features), guidance)


def warp(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The probabilities [..., V] from which a token with these (guided) logits [..., V] is drawn."""
    results = ((logits.shape[-1], jnp.float32),)
    return _on_rows(_warped, _warped, sampling, [Rows(logits, EXCLUDED)], results)[0]


def propose(
    logits: jax.Array, noise: jax.Array, first: int, sampling: Sampling, count: int
) -> tuple[jax.Array, jax.Array]:
    """Warps logits [B, n, V] and draws `count` tokens one after the other without replacement.

    Args:
      noise: [B, m, V], of which rows from `first` on are for these: Gumbel noise; zeros for the likeliest tokens, see
        `distinct`.

    Returns:
      The probabilities [B, n, V], and the tokens int [B, n, count].
    """

    def general(sampling, logits, noise):
        return _proposed(count, top, sampling, logits, noise[:, first : first + logits.shape[1]])

    rows = Rows(logits, EXCLUDED), Rows(noise, cut=(first, noise.shape[1]))
    results = (logits.shape[-1], jnp.float32), (count, jnp.int32)
    return _on_rows(general, functools.partial(_proposed, count, _top_by_rounds), sampling, rows, results)


def likeliest_of(logits: jax.Array, sampling: Sampling, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest log probabilities [..., count] of warped logits [..., V], and their tokens."""
    by_sorting, by_rounds = (functools.partial(_best, count, best) for best in (top, _top_by_rounds))
    results = (count, jnp.float32), (count, jnp.int32)
    return _on_rows(by_sorting, by_rounds, sampling, [Rows(logits, EXCLUDED)], results)


def draw_warped(keys: jax.Array, logits: jax.Array, sampling: Sampling, instead: jax.Array | None = None) -> jax.Array:
    """`draw` from warped logits [B, V], with a key for every row [B]: tokens int [B].

    Args:
      instead: [B, V], what to draw from in rows where any of it is above 0.
    """
    uniforms = jax.vmap(_uniforms)(keys)
    rows = [Rows(logits, EXCLUDED), Rows(uniforms)] + ([] if instead is None else [Rows(instead)])

    def general(sampling, *arrays):
        return jax.vmap(functools.partial(_drawn, _by_product, sampling))(*arrays)

    of_row = functools.partial(_drawn, _by_scan)
    return _on_rows(general, of_row, sampling, rows, ((1, jnp.int32),))[0][:, 0]


def _warped(sampling, logits):
    return (jax.nn.softmax(warp_logits(logits, sampling), axis=-1),)


def _proposed(count, best, sampling, logits, noise):
    log_probs = jax.nn.log_softmax(warp_logits(logits, sampling), axis=-1)
    return jnp.exp(log_probs), distinct(log_probs + noise, count, best)


def _best(count, best, sampling, logits):
    return tuple(best(jax.nn.log_softmax(warp_logits(logits, sampling), axis=-1), count))


def _drawn(cumulative, sampling, logits, uniforms, instead=None):
    (probs,) = _warped(sampling, logits)
    if instead is not None:
        probs = jnp.where(jnp.max(instead) > 0, instead, probs)
    return (_draw_by(cumulative, uniforms, probs)[None],)


def _on_rows(general: Callable, of_row: Callable, sampling: Sampling, rows, results):
    """`on_rows`, but with top-p, which sorts."""
    if sampling.top_p is not None:
        return general(sampling, *(own.array for own in rows))
    return on_rows(general, of_row, sampling, rows, results)


def warp_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Temperature, then top-k, then top-p on logits [..., V]: excluded tokens become -inf."""
    greedy = sampling.temperature == 0
    best = jnp.arange(logits.shape[-1]) == likeliest(logits)[..., None]
    scaled = logits / jnp.where(greedy, 1.0, sampling.temperature)
    logits = jnp.where(greedy & ~best, EXCLUDED, scaled)
    if sampling.top_k is not None:
        logits = jnp.where(logits < kth_largest(logits, sampling.top_k), EXCLUDED, logits)
    if sampling.top_p is not None:
        logits = jnp.where(in_nucleus(logits, sampling.top_p), logits, EXCLUDED)
    return logits


FRESH, GUMBEL = "fresh", "gumbel"
NOISES = (FRESH, GUMBEL)


def position_noise(keys: jax.Array, positions: jax.Array, vocab: int) -> jax.Array:
    """Gumbel noise [B, n, vocab] that belongs to output `positions` int [B, n] of pictures with these keys, [B].

    Whoever draws the token at a position with it (`drawn_with`) draws from the law that it has, and two who have nearly
    the same law draw the same token nearly always (Daliri et al. 2024, arXiv 2408.07978).
    """
    one = lambda key, position: jax.random.gumbel(jax.random.fold_in(key, position), (vocab,))
    return jax.vmap(jax.vmap(one, (None, 0)))(keys, positions)


def drawn_with(noise: jax.Array, logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The tokens int [...] that `noise` [..., V] draws from (guided) logits [..., V]."""
    return likeliest(warp_logits(logits, sampling) + noise).astype(jnp.int32)


def settled(noise: jax.Array, logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The point masses [..., V] of these tokens."""
    return jax.nn.one_hot(drawn_with(noise, logits, sampling), logits.shape[-1])


def likeliest(logits: jax.Array) -> jax.Array:
    """The first of the largest along the last axis, int [...]; argmax as two plain reductions, which vectorise."""
    tokens = jnp.arange(logits.shape[-1])
    top = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(logits == top, tokens, logits.shape[-1] - 1), axis=-1)


def kth_largest(x: jax.Array, k: jax.Array) -> jax.Array:
    """The k-th largest of float32 `x` [..., V] along the last axis, [..., 1]; the smallest if V < k.

    Exact, for a traced k, and without sorting: floats compare like their bits read as integers (negative ones
    mirrored), and 32 counting passes bisect on those bits. On CPU this is 25 times faster than `lax.top_k` with a
    large k.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    ordered = jnp.where(bits & sign != 0, ~bits, bits | sign)
    k = jnp.minimum(k, x.shape[-1])

    def refine(i, found):
        trial = found | (sign >> i.astype(jnp.uint32))
        enough = jnp.sum((ordered >= trial).astype(jnp.int32), axis=-1, keepdims=True) >= k
        return jnp.where(enough, trial, found)

    found = jax.lax.fori_loop(0, 32, refine, jnp.zeros((*x.shape[:-1], 1), jnp.uint32))
    return jax.lax.bitcast_convert_type(jnp.where(found & sign != 0, found ^ sign, ~found), jnp.float32)


def in_nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Which tokens top-p keeps, bool [..., V]: sorted ascending, those beyond a cumulative mass of 1 - p.

    Ties are kept in transformers' order: a stable ascending sort, of which the tail survives. The likeliest token
    always survives.
    """
    order = jnp.argsort(logits, axis=-1, stable=True)
    mass = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1), axis=-1)
    keep = (mass > 1 - top_p).at[..., -1].set(True)
    return jnp.put_along_axis(jnp.zeros_like(keep), order, keep, axis=-1, inplace=False)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which tokens may stand where in the output (Lumina-mGPT's newlines, say).

    Attributes:
      forced: for every output position the only token allowed there, or -1 where the choice is free.
      free_tokens: at free positions only tokens below this number are allowed. A forced token may lie beyond the
        tokens that a model has logits for.
    """

    forced: tuple[int, ...]
    free_tokens: int

    def constrain(self, logits: jax.Array, positions: jax.Array) -> jax.Array:
        """Excludes what the layout forbids from logits [..., V] of the tokens at output `positions` int [...].

        A forced token is left with probability 1, under any temperature, target or drafter. The result has a column
        for every token that the layout forces, [..., max(V, largest forced token + 1)].
        """
        beyond = max(self.forced) + 1 - logits.shape[-1]
        if beyond > 0:
            logits = jnp.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, beyond)])
        forced = jnp.asarray(np.array(self.forced, np.int32))
        forced = forced[jnp.clip(positions, 0, len(self.forced) - 1)][..., None]
        tokens = jnp.arange(logits.shape[-1])
        allowed = jnp.where(forced < 0, tokens < self.free_tokens, tokens == forced)
        return jnp.where(allowed, logits, EXCLUDED)


def columns(vocab: int, layout: Layout | None) -> int:
    """Columns of logits [..., vocab] that a layout has constrained, which may force tokens beyond them."""
    if layout is None:
        return vocab
    given = jax.ShapeDtypeStruct((1, vocab), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.eval_shape(layout.constrain, *given).shape[-1]


def draw(key: jax.Array, probs: jax.Array) -> jax.Array:
    """One token from probabilities [V], which need not sum to 1.

    First a block of 128 tokens, then one of it, each by the inverse of a short cumulative sum. Noise for every token of
    the vocabulary would take a twentieth of a small model's step on CPU, and more of a batch's.
    """
    return _draw_by(_by_product, _uniforms(key), probs)


_BLOCK = 128


def _uniforms(key):
    return jax.random.uniform(key, (2,))


def _draw_by(cumulative: Callable, uniforms: jax.Array, probs: jax.Array) -> jax.Array:
    blocks = jnp.pad(probs, (0, -len(probs) % _BLOCK)) if len(probs) % _BLOCK else probs
    blocks = blocks.reshape(-1, _BLOCK)
    first, second = (jnp.sum(jnp.where(jnp.arange(len(uniforms)) == i, uniforms, 0.0)) for i in (0, 1))
    block = _inverse(jnp.sum(blocks, axis=-1), first, cumulative)
    own = jnp.sum(jnp.where((jnp.arange(len(blocks)) == block)[:, None], blocks, 0.0), axis=0)
    return (block * _BLOCK + _inverse(own, second, cumulative)).astype(jnp.int32)


def _inverse(weights: jax.Array, uniform: jax.Array, cumulative: Callable | None = None) -> jax.Array:
    """The first of positive `weights` [n] with which their cumulative sum exceeds the share `uniform` of it all."""
    mass, places, possible = (cumulative or _by_product)(weights), jnp.arange(len(weights)), weights > 0
    last = jnp.max(jnp.where(possible, places, 0))
    return jnp.min(jnp.where(possible & (mass > uniform * jnp.max(mass)), places, last))


def _by_product(weights):
    """A cumulative sum as a product: XLA makes a dozen small operations of it otherwise."""
    upto = np.triu(np.ones((len(weights), len(weights)), np.float32))
    return jnp.matmul(weights, upto, precision=jax.lax.Precision.HIGHEST)


def _by_scan(weights):
    return jnp.cumsum(weights)


def draw_distinct(key: jax.Array, log_probs: jax.Array, count: int) -> jax.Array:
    """`count` tokens int [count] drawn one after the other without replacement from log probabilities [V].

    Tokens come in the order drawn; -1 where fewer than `count` have positive probability. This is Gumbel top-k.
    """
    return distinct(log_probs + jax.random.gumbel(key, log_probs.shape), count)


def top(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest of `x` [..., V] along the last axis, and where they are; of equals, the first.

    Of an `x` that is divided over devices, each finds its own, and the best of these are the best of all.
    """
    parts = mesh.shards()
    if parts == 1 or x.shape[-1] % parts or x.shape[-1] // parts < count:
        return jax.lax.top_k(x, count)
    values, places = mesh.on_each(lambda own: tuple(jax.lax.top_k(own, count)), x, outputs=2)
    first = x.shape[-1] // parts * jnp.arange(parts)[:, None]
    places = (places.reshape(*x.shape[:-1], parts, count) + first).reshape(*x.shape[:-1], parts * count)
    values, best = jax.lax.top_k(values, count)
    return values, jnp.take_along_axis(places, best, axis=-1)


def _top_by_rounds(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """`top` of a row [V], one after the other, where nothing can be sorted; filled up to the next power of two."""
    places, ranks = jnp.arange(x.shape[0]), jnp.arange(1 << (count - 1).bit_length())
    values, tokens, left = jnp.full(ranks.shape, -jnp.inf), jnp.zeros_like(ranks), places >= 0
    for rank in range(count):
        best = jnp.max(jnp.where(left, x, -jnp.inf))
        token = jnp.min(jnp.where(left & (x == best), places, x.shape[0]))
        values, tokens = jnp.where(ranks == rank, best, values), jnp.where(ranks == rank, token, tokens)
        left = left & (places != token)
    return values, tokens


def distinct(scores: jax.Array, count: int, best: Callable = top) -> jax.Array:
    """The `count` best tokens int [..., count] by score [..., V], best first; -1 in place of those that score -inf.

    With Gumbel noise added to log probabilities these are draws without replacement; without, the likeliest tokens.
    """
    values, tokens = best(scores, count)
    return jnp.where(jnp.isfinite(values), tokens, -1).astype(jnp.int32)
