"""Whether what a tiny model draws has its target's law, by enumeration."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats
from tiny import Tiny, generate

from cascade_jax.acceptance import strict
from cascade_jax.sampling import Sampling, warp
from cascade_jax.tree import DynamicTree, Tree
from cascade_jax.verify import WALK

BATCH, ROUNDS = 10_000, 10
SETTINGS = Sampling(temperature=0.9, top_k=4, guidance=1.5)


def assert_law(tiniest: Tiny, tree: Tree | DynamicTree, verifier: str = WALK) -> np.ndarray:
    """Draws 100,000 outputs of 4 tokens of 5, with guidance, temperature and top-k, and holds them against all 625
    outputs' teacher-forced conditionals; returns the steps that each took."""
    outputs = np.array(list(itertools.product(range(5), repeat=4)))
    prefix = tiniest.prefix(1)
    many = lambda count: jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), prefix)
    logits = tiniest.logits(many(len(outputs)), jnp.asarray(outputs), SETTINGS.guidance)
    conditionals = np.asarray(jax.jit(warp)(logits, SETTINGS.checked()), np.float64)
    law = np.take_along_axis(conditionals, outputs[..., None], axis=-1)[..., 0].prod(-1)
    law /= law.sum()
    program = dataclasses.replace(tiniest.program(tree), verifier=verifier)
    counts, steps = np.zeros(625), []
    for round in range(ROUNDS):
        keys = jax.random.split(jax.random.key(round), BATCH)
        state = generate(program, tiniest.params(tree), many(BATCH), keys, strict(), SETTINGS.checked())
        np.testing.assert_array_equal(state.count, 4)
        np.testing.assert_array_equal(state.stats.steps + state.stats.accepted, 3)
        counts += np.bincount(np.asarray(state.tokens)[:, :4] @ [125, 25, 5, 1], minlength=625)
        steps.append(np.asarray(state.stats.steps))
    assert counts[law == 0].sum() == 0
    expected = BATCH * ROUNDS * law
    rare = expected < 5  # too few for chi-square: one cell for all of them
    observed, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    assert stats.chisquare(observed[expected > 0], expected[expected > 0]).pvalue > 1e-3
    return np.concatenate(steps)
