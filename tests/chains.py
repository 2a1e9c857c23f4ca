"""A target that is a pair of tables, with a memory: cheap enough for millions of pictures, whose law can be told."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import stats
from tiny import FAST

from cascade_jax import decode, sampling
from cascade_jax.cache import KV, Prefix
from cascade_jax.sampling import Layout, Sampling


class Chain(nnx.Module):
    """After a token x and `seen` (how often each token has come, x included) the logits are table[x] + seen @ habit.

    The prefix is a token 0. With tables [V, V] every token matters to all that follow.
    """

    linear_head = True

    def __init__(self, vocab, seed, contrast=1.5):
        rng = np.random.default_rng(seed)
        self.table = nnx.Param(jnp.asarray(rng.normal(size=(vocab, vocab)) * contrast, jnp.float32))
        self.habit = nnx.Param(jnp.asarray(rng.normal(size=(vocab, vocab)) * contrast / 2, jnp.float32))

    @property
    def vocab(self):
        return len(self.table[...])

    def embed(self, tokens):
        return jax.nn.one_hot(jnp.minimum(tokens, self.vocab - 1), 2 * self.vocab)  # as wide as the features

    def rope(self, slots):
        return jnp.zeros((*slots.shape, 1, 2))

    def __call__(self, x, context, past=(), taps=()):
        x = x[..., : self.vocab]
        sum_of = lambda bias, seen: jnp.broadcast_to(bias[:, 0] == 0, (len(x), x.shape[1], seen.shape[1])) @ seen
        seen = sum_of(context.new_bias, x)
        for segment, bias in zip(past, context.past_bias):
            seen += sum_of(bias, segment[0].value[:, 0])
        fresh = KV(jnp.zeros((len(x), 1, 1, x.shape[1])), x[:, None])
        return jnp.concatenate([x, seen], axis=-1), (fresh,)

    def logits(self, features):
        return features @ jnp.concatenate([self.table[...], self.habit[...]])


def law(target, length, settings: Sampling, layout: Layout | None = None):
    """The probabilities [V] * length of all outputs."""
    vocab = _vocab(target, layout)
    one_hot = np.asarray(target.embed(jnp.arange(vocab)))[:, : target.vocab]
    made, features = np.ones(()), np.concatenate([one_hot[0], one_hot[0]])
    for t in range(length):
        logits = target.logits(jnp.asarray(features))
        if layout is not None:
            logits = layout.constrain(logits, jnp.full(logits.shape[:-1], t))
        q = np.asarray(sampling.warp(logits, settings.checked()), np.float64)
        made = made[..., None] * q / q.sum(-1, keepdims=True)
        seen = features[..., None, len(one_hot[0]) :] + one_hot
        features = np.concatenate([np.broadcast_to(one_hot, seen.shape), seen], axis=-1)
    return made


def _vocab(target, layout):
    return target.vocab if layout is None else max(target.vocab, max(layout.forced) + 1)


@functools.partial(jax.jit, static_argnums=(0, 3), compiler_options=FAST)
def _counts(program, params, key, size, rule, settings, vocab):
    keys = jax.random.split(key, size)
    first = nnx.merge(program.target, params["target"]).embed(jnp.int32(0))
    x = jnp.broadcast_to(first, (size, 1, len(first)))
    prefix = Prefix(x, x, jnp.ones(size, jnp.int32))
    with mock.patch.object(sampling, "_BLOCK", 4):  # draws from vocabularies as small as these need no blocks of 128
        state = decode.generate(program, params, prefix, keys, rule, settings)
    codes = jnp.zeros(size, jnp.int32)
    for t in range(program.length):
        codes = codes * vocab + state.tokens[:, t]
    return codes, state.stats


def outputs(target, drafter, tree, length, samples, rule, settings: Sampling, layout=None, seed=0, **static):
    """Counts [V] * length of as many pictures, and the sums over their steps."""
    program = decode.Program(
        nnx.graphdef(target), None if drafter is None else nnx.graphdef(drafter), tree, length, layout, **static
    )
    params = {"target": nnx.state(target), "drafter": None if drafter is None else nnx.state(drafter)}
    vocab = _vocab(target, layout)
    counts, sums, batch = np.zeros(vocab**length, np.int64), [], 50_000
    for part in range(samples // batch):
        key = jax.random.fold_in(jax.random.key(seed), part)
        codes, stats_ = _counts(program, params, key, batch, rule, settings.checked(), vocab)
        counts += np.bincount(np.asarray(codes), minlength=len(counts))
        sums.append(jax.tree.map(np.asarray, stats_))
    return counts.reshape([vocab] * length), jax.tree.map(lambda *x: np.concatenate(x), *sums)


def pvalue(counts, law):
    """Of a chi-square test; outputs that are expected less than 5 times share a cell. 0 if an impossible one came."""
    counts, expected = counts.ravel(), counts.sum() * (law / law.sum()).ravel()
    if counts[expected == 0].sum():
        return 0.0
    rare = expected < 5
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    return stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue
