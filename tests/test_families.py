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
from cascade_jax.drafters.jacobi import Jacobi

FAMILIES = [*tiny_bundles.TARGETS, *tiny_bundles.VARIANTS]
TREES = {
    "static": trees.parse("0 1 00"),
    "dynamic": trees.DynamicTree(top_k=2, rounds=1, drafts=4),
    "window": trees.window(4, 2),
}
WINDOWED = Jacobi("repeat", coupled=True)
QUICK = [
    ("classes", "eagle1", "static", 2.0, False),
    ("chameleon", "eagle3", "dynamic", None, True),
    ("chameleon", "itself", "window", 2.0, True),
    ("chameleon", "parallel", "static", 2.0, True),
]
TRAINED = [(drafter, tree) for drafter in ("eagle1", "eagle3", "parallel", "hydra") for tree in ("static", "dynamic")]
DRAWN = [*TRAINED, ("itself", "window")]
ALL = [(f, d, t, g, exact) for f in FAMILIES for d, t in DRAWN for g in (2.0, None) for exact in (False, True)]
ALL += [(f, d, t, 2.0, t == "window") for f in tiny_bundles.KIN for d, t in (DRAWN[0], DRAWN[-1])]


@functools.cache
def bundle(family, drafter):
    return tiny_bundles.bundle(family, drafter="eagle1" if drafter == "itself" else drafter)


@functools.cache
def token_by_token(family, drafter, guidance, exact=False):
    return draw(family, drafter, trees.ROOT, guidance, exact).tokens[:, : bundle(family, drafter).length]


def draw(family, drafter, tree, guidance, exact=False):
    """The state after the last token, drawn without randomness, or with the noise of output positions."""
    model = bundle(family, drafter).drafting(WINDOWED if drafter == "itself" else None)
    settings = cj.Sampling(temperature=0.0, guidance=guidance)
    if exact:
        settings = settings.replace(temperature=0.9, top_k=20)
    settings, rule = settings.checked(), cj.exact() if exact else cj.strict()
    program = model.program(tree, "gumbel" if exact else "fresh")
    state = pipeline.start(model, program, tiny_bundles.prompts(family, 2), jax.random.key(0), settings)
    return tiny.run(program, model.decoding_params(program), state, rule, settings, jnp.int32(99))


@pytest.fixture(autouse=True)
def forgotten():
    """Nothing compiled outlives its test: XLA has died of a process that held all of these programs."""
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    ("family", "drafter", "tree", "guidance", "exact"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in ALL],
)
def test_a_family_draws_with_any_drafter_on_any_tree(family, drafter, tree, guidance, exact):
    """What is drawn token by token, greedily or exactly. Floating point may part them where two tokens' logits (and
    noise) sum to nearly the same: a tree's pass rounds otherwise than a token's."""
    drawn = draw(family, drafter, TREES[tree], guidance, exact)
    want, length = token_by_token(family, drafter, guidance, exact), bundle(family, drafter).length
    np.testing.assert_array_equal(drawn.tokens[:, :length], want)
    np.testing.assert_array_equal(drawn.stats.steps + drawn.stats.accepted, length - 1)
