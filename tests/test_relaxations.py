"""Laws of what a step emits under relaxed rules, by enumeration: every draft, every decision, to the last digit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from test_traversal import VOCAB, drafted, laws, targets
from tiny import FAST

import cascade_jax as cj
from cascade_jax import acceptance, trees
from cascade_jax.rules.annealed import Annealed
from cascade_jax.verify import examine

TREE = trees.parse("0 1 00")  # siblings, and a draft one level down


@functools.cache
def ways():
    """Every filling of the tree: probabilities, paths by node, tokens [n, N], and laws at the inner nodes [n, M, V]."""
    target, drafter = laws()
    found = drafted(TREE, likeliest=False)
    at = lambda table, path: table[() if path is None else path]
    tokens = np.array([[-1 if p[n] is None else (0, *p[n])[-1] for n in range(TREE.num_nodes)] for _, p in found])
    probs, drafts = (np.array([[at(t, p[n]) for n in TREE.inner] for _, p in found]) for t in (target, drafter))
    return found, tokens, jnp.asarray(probs, jnp.float32), jnp.asarray(drafts, jnp.float32)


@functools.partial(jax.jit, compiler_options=FAST)
@functools.partial(jax.vmap, in_axes=(0, 0, 0, None))
def examined(tokens, drafts, probs, rule):
    features = jnp.zeros((TREE.num_nodes, 2))
    return examine(TREE.topology, np.array(TREE.inner), tokens, drafts, probs, probs < 0, features, rule)


def emitted(rule):
    """The law [V] * 3 of the first tokens, what a step does not emit drawn from the target; the mean coupled charge,
    and the largest of a step; and the mean number of accepted drafts."""
    target, _ = laws()
    found, tokens, probs, drafts = ways()
    candidates = jax.tree.map(np.asarray, examined(tokens, drafts, probs, rule))
    law, mean, most, accepted = np.zeros([VOCAB] * 3), 0.0, 0.0, 0.0

    def follow(path, mass):
        if len(path) == 3:
            law[path] += mass
            return
        for token in range(VOCAB):
            follow((*path, token), mass * target[path][token])

    for i, (chance, paths) in enumerate(found):
        own = jax.tree.map(lambda x, i=i: x[i], candidates)

        def walk(node, mass, together, spent, charged, own=own, paths=paths):
            """`mass` of the walk, and of its part in which the strict decoder has decided likewise so far."""
            nonlocal mean, most, accepted
            if node not in TREE.inner:
                return follow(paths[node], mass)
            slot = TREE.inner.index(node)
            for j, child in enumerate(own.nodes[slot]):
                p = own.draft[slot, j]
                if child < 0 or p == 0:
                    continue
                r, offer = own.target[slot, j], jax.tree.map(lambda x, j=j: x[slot, j], own.offers)
                probability, _, after = (float(x) for x in rule.decide(jnp.float32(spent), r, p, offer))
                strict = float(acceptance.ratio(r, p))
                mean += together * abs(probability - strict)
                charged += abs(probability - strict)
                most = max(most, charged)
                accepted += mass * probability
                walk(child, mass * probability, together * min(probability, strict), after, charged)
                mass, together, spent = mass * (1 - probability), together * min(1 - probability, 1 - strict), after
            for token in range(VOCAB):
                follow((*paths[node], token), mass * own.leftover[slot, token])

        walk(0, chance, chance, 0.0, 0.0)
    return law, mean, most, accepted


def distance(law):
    return 0.5 * np.abs(law - targets(3)).sum()


@struct.dataclass
class StrictlyLeft(Annealed):
    """Broken where its multiplier is below 1: what is left is strict verification's."""

    def remainder(self, siblings, j):
        return jnp.maximum(siblings.residual - siblings.draft, 0.0)


def test_annealed_below_one_is_lossless_by_what_it_leaves():
    law, charge, _, fewer = emitted(cj.annealed(0.6, 0.3))
    np.testing.assert_allclose(law, targets(3), atol=1e-6)  # float32 sums of a few terms
    assert charge > 0.1  # decisions differ, and no law does
    assert fewer < emitted(cj.strict())[3] - 0.05
    assert distance(emitted(StrictlyLeft(jnp.float32(0.6), jnp.float32(0.3)))[0]) > 0.02


RELAXED = {
    "annealed": lambda: cj.annealed(2.0, 0.7),
    "entropic": lambda: cj.entropic(4.0, 2.0),
    "entropic, the code's": lambda: cj.entropic(9.0, np.inf, 0.05),
}


@pytest.mark.parametrize("name", RELAXED)
def test_a_relaxed_rule_strays_no_further_than_its_coupled_charge(name):
    law, charge, _, more = emitted(RELAXED[name]())
    np.testing.assert_allclose(law.sum(), 1, atol=1e-6)
    assert 0.02 < distance(law) <= charge + 1e-6
    assert more > emitted(cj.strict())[3] + 0.05


@pytest.mark.parametrize("name", ["annealed", "entropic"])
def test_bounded_keeps_it_within_the_budget(name):
    for budget in (0.0, 0.1):
        law, charge, most, _ = emitted(cj.bounded(RELAXED[name](), budget))
        assert distance(law) <= charge + 1e-6
        assert most <= budget + 1e-6
    assert most > 0.1 - 1e-6  # and it is used up


def family(residual, draft, depth=1, levels=5, entropy=0.0):
    """The children of one node, as rules without features see them."""
    none = jnp.zeros((1, 1))
    rows = (jnp.asarray(x, jnp.float32) for x in (residual, draft))
    sizes = jnp.float32(entropy), jnp.int32(depth), levels
    return acceptance.Siblings(jnp.array([0]), *rows, none, -jnp.ones((1, 1), int), none, none, *sizes)


def test_annealed_falls_with_depth_around_its_mean_and_leaves_what_no_acceptance_accounts_for():
    rng, rule = np.random.default_rng(0), cj.annealed(1.1, 0.7)
    multipliers = np.array([rule.offer(family([1.0], [1.0], depth), 0) for depth in range(1, 6)])
    np.testing.assert_allclose(multipliers, 1.1 * np.exp(-0.7 * np.arange(5)) / np.mean(np.exp(-0.7 * np.arange(5))))
    assert multipliers.mean() == pytest.approx(1.1) and multipliers[1] > 1 > multipliers[2]
    for depth, multiplier in enumerate(multipliers, 1):
        r, p = rng.dirichlet(np.full(6, 0.5), 2).astype(np.float32)
        left = acceptance.remainder(rule, family(r, p, depth), 0)
        accepted = np.minimum(1, multiplier * r / p)
        np.testing.assert_allclose(left, np.maximum(r - p * accepted, 0), atol=1e-6)
        if multiplier >= 1:
            np.testing.assert_allclose(left, np.maximum(r - p, 0), atol=1e-6)


def test_entropic_accepts_as_often_as_the_papers_random_number_is_small():
    uniform = (np.arange(20_000) + 0.5) / 20_000
    for entropy in (0.0, 0.5, 3.0, 6.0, 9.5, 20.0):
        for strict in (0.02, 0.3, 0.7, 0.99, 1.0):
            for scale, calm, floor in ((8, 16, 0), (8, np.inf, 0), (9, np.inf, 0.05), (np.inf, np.inf, 0.5)):
                number = min(entropy / scale + floor, 1) * (0.5 + max(1 - entropy / calm, 0) * (uniform - 0.5))
                rule = cj.entropic(scale, calm, floor)
                offer = rule.offer(family([1.0], [1.0], entropy=entropy), 0)
                found = rule.decide(jnp.float32(0), jnp.float32(strict), jnp.float32(1), offer)[0]
                assert found == pytest.approx(np.mean(np.minimum(number, 1) <= strict), abs=1e-4)  # of a grid
    never = cj.entropic().decide(jnp.float32(0), jnp.float32(0), jnp.float32(0.5), jnp.float32(0))[0]
    assert never == 0  # what the target excludes, sure as it may be
