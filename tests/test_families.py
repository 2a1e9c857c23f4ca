"""Every family draws with every drafter on every kind of tree: what it would have drawn token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_bundles

import cascade_jax as cj
from cascade_jax import pipeline, trees

FAMILIES = [*tiny_bundles.TARGETS, *tiny_bundles.VARIANTS]
TREES = {"static": trees.parse("0 1 00"), "dynamic": trees.DynamicTree(top_k=2, rounds=1, drafts=4)}
QUICK = [("classes", "eagle1", "static", 2.0), ("chameleon", "eagle3", "dynamic", None)]
ALL = [(f, d, t, g) for f in FAMILIES for d in ("eagle1", "eagle3") for t in TREES for g in (2.0, None)]


@functools.cache
def bundle(family, drafter):
    return tiny_bundles.bundle(family, drafter=drafter)


@functools.cache
def token_by_token(family, drafter, guidance):
    return draw(family, drafter, trees.ROOT, guidance).tokens[:, : bundle(family, drafter).length]


def draw(family, drafter, tree, guidance):
    """Without randomness: the state after the last token."""
    model, settings = bundle(family, drafter), cj.Sampling(temperature=0.0, guidance=guidance).checked()
    state = pipeline.start(model, tiny_bundles.prompts(family, 2), jax.random.key(0), tree, settings)
    program = model.program(tree)
    return tiny.run(program, model.decoding_params(program), state, cj.strict(), settings, jnp.int32(99))


@pytest.mark.parametrize(
    ("family", "drafter", "tree", "guidance"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in ALL],
)
def test_a_family_draws_with_any_drafter_on_any_tree(family, drafter, tree, guidance):
    drawn = draw(family, drafter, TREES[tree], guidance)
    want, length = token_by_token(family, drafter, guidance), bundle(family, drafter).length
    np.testing.assert_array_equal(drawn.tokens[:, :length], want)
    np.testing.assert_array_equal(drawn.stats.steps + drawn.stats.accepted, length - 1)
