"""Verification from the leaves: the target's law to the last digit, whatever the tree, and more drafts of it."""

import functools
import itertools

import chains
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_verify
import tiny_bundles
from tiny import FAST

import cascade_jax as cj
from cascade_jax import traversal, trees
from cascade_jax.drafters.jacobi import Jacobi
from cascade_jax.sampling import Sampling

VOCAB = 3


@functools.cache
def laws():
    """Of target and drafter after every path of up to three tokens; some tokens are impossible under either."""
    rng = np.random.default_rng(0)
    paths = [path for depth in range(4) for path in itertools.product(range(VOCAB), repeat=depth)]
    target = {path: rng.dirichlet(np.ones(VOCAB)) for path in paths}
    drafter = {path: 0.5 * target[path] + 0.5 * rng.dirichlet(np.ones(VOCAB)) for path in paths}
    for path in paths[::4]:
        target[path] = np.array([0.7, 0.3, 0.0])
        drafter[path[:-1]] = np.array([0.0, 0.4, 0.6])
    return target, drafter


def draws(law, count):
    """All draws without replacement, -1 where tokens run out, and their probabilities."""
    possible = np.flatnonzero(law)
    for tokens in itertools.permutations(possible, min(count, len(possible))):
        chance, left = 1.0, 1.0
        for token in tokens:
            chance, left = chance * law[token] / left, left - law[token]
        yield (*tokens, *[-1] * (count - len(tokens))), chance


def drafted(tree, likeliest):
    """Every way in which a tree can be filled: its probability, and every node's path, None where there is no node."""
    _, drafter = laws()
    children = tree.topology.children

    def fill(nodes, paths, chance):
        if not nodes:
            yield chance, paths
            return
        node, born = nodes[0], [child for child in children[nodes[0]] if child >= 0]
        if paths[node] is None:
            yield from fill(nodes[1:], paths | dict.fromkeys(born), chance)
            return
        law = drafter[paths[node]]
        ways = [(np.argsort(-law)[: len(born)], 1.0)] if likeliest else draws(law, len(born))
        for tokens, own in ways:
            below = {c: (*paths[node], int(x)) if x >= 0 else None for c, x in zip(born, tokens)}
            yield from fill(nodes[1:], paths | below, chance * own)

    return list(fill(list(tree.inner), {0: ()}, 1.0))


def ends(tree, ways, likeliest):
    """What the engine makes of all of them: `Ends` with a leading axis, NumPy."""
    target, drafter = laws()
    at = lambda table, path: table[() if path is None else path]
    tokens = np.array(
        [[0 if n == 0 else -1 if p[n] is None else p[n][-1] for n in range(tree.num_nodes)] for _, p in ways]
    )
    probs = np.array([[at(target, paths[n]) for n in tree.inner] for _, paths in ways], np.float32)
    drafts = np.array([[at(drafter, paths[n]) for n in tree.inner] for _, paths in ways], np.float32)
    inner = np.array(tree.inner)
    examine = lambda tokens, drafts, probs: traversal.examine(tree.topology, inner, tokens, drafts, probs)
    made = jax.jit(jax.vmap(examine, (0, None if likeliest else 0, 0)), compiler_options=FAST)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), made(tokens, None if likeliest else drafts, probs))


def emitted(tree, likeliest):
    """The exact law [V] * (depth + 1) of the first tokens, what is not emitted drawn from the target, and the mean
    number of accepted drafts."""
    target, _ = laws()
    ways = drafted(tree, likeliest)
    found, children = ends(tree, ways, likeliest), tree.topology.children
    law, accepted = np.zeros([VOCAB] * (tree.depth + 1)), 0.0

    def after(node):
        for child in children[node]:
            if child >= 0:
                yield from after(child)
        yield node

    def follow(path, mass):
        if len(path) == tree.depth + 1:
            law[path] += mass
            return
        for token in range(VOCAB):
            follow((*path, token), mass * target[path][token])

    for i, (chance, paths) in enumerate(ways):
        for node in after(0):
            here = chance if node == 0 else chance * found.chance[i, node]
            chance -= here
            if here <= 0:
                continue
            accepted += here * len(paths[node])
            bonus = found.leftover[i, tree.inner.index(node)] if node in tree.inner else target[paths[node]]
            for token in range(VOCAB):
                follow((*paths[node], token), here * bonus[token])
    return law, accepted


def targets(depth):
    target, _ = laws()
    law = np.zeros([VOCAB] * depth)
    for path in itertools.product(range(VOCAB), repeat=depth):
        law[path] = np.prod([target[path[:t]][path[t]] for t in range(depth)])
    return law


TREES = ("0", "0 1 2", "0 00", "0 1 00 10", "0 1 00 01 10 000", "0 00 01 000")


@pytest.mark.parametrize("likeliest", [False, True], ids=["drawn", "likeliest"])
@pytest.mark.parametrize("text", TREES)
def test_the_law_is_the_targets_by_enumeration(text, likeliest):
    tree = trees.parse(text)
    law, _ = emitted(tree, likeliest)
    np.testing.assert_allclose(law, targets(tree.depth + 1), atol=1e-6)  # float32 sums of a few terms


def test_a_chain_is_verified_as_a_block():
    """Sun et al.'s probabilities, term by term."""
    rng, size = np.random.default_rng(5), 4
    q, p = rng.dirichlet(np.ones(6), (2, size + 1))
    tokens = np.array([0, *[rng.choice(6, p=law) for law in p[:size]]])
    tree = trees.chain(size)
    found = jax.jit(lambda *x: traversal.examine(tree.topology, np.array(tree.inner), *x), compiler_options=FAST)(
        tokens, p[:size].astype(np.float32), q[:size].astype(np.float32)
    )
    h = [1.0]
    for i in range(size):
        h.append(min(1.0, h[-1] * q[i][tokens[i + 1]] / p[i][tokens[i + 1]]))
    want = [1.0]
    for i in range(1, size):
        rest = np.maximum(h[i] * q[i] - p[i], 0).sum()
        want.append(rest / (rest + 1 - h[i]))
    np.testing.assert_allclose(found.chance, [*want, h[size]], rtol=1e-5)
    for i in range(size):
        left = np.maximum(h[i] * q[i] - p[i], 0)
        if want[i] > 0:  # else no output ends there
            np.testing.assert_allclose(found.leftover[i], left / left.sum(), atol=1e-6)
    assert np.sum(np.array(want) > 0) > 2


@functools.cache
def verified(verifier):
    """Verdicts on random trees, and drafts drawn from the drafter's own laws."""
    x = test_verify.problems()
    one = lambda *args: cj.verify(*args[:4], jnp.log(args[4]), args[5], cj.strict(), verifier=verifier)
    many, verdicts = jax.jit(jax.vmap(one), compiler_options=FAST), []
    for seed in range(40):
        keys = jax.random.split(jax.random.key(seed), test_verify.PROBLEMS)
        verdicts.append(many(keys, x.topology, x.drawn, x.drafts, x.target, x.features))
    return jax.tree.map(lambda *v: np.stack(v), *verdicts)


def test_the_path_ends_where_a_node_says_so_and_leads_there():
    x, verdict = test_verify.problems(), verified("traversal")
    depths = x.topology.depths[np.arange(test_verify.PROBLEMS), verdict.path.max(-1)]
    np.testing.assert_array_equal(verdict.accepted, depths)
    for seed, i in itertools.product(range(40), range(0, test_verify.PROBLEMS, 10)):
        path = verdict.path[seed, i, : verdict.accepted[seed, i] + 1]
        np.testing.assert_array_equal(x.topology.parents[i][path[1:]], path[:-1])
        assert np.all(x.drawn[i][path[1:]] >= 0)


def test_more_drafts_are_accepted_than_on_the_walk():
    """Over trees drawn at random; for a single draft the two are the same."""
    assert emitted(trees.parse("0"), False)[1] == pytest.approx(walked(trees.parse("0")), abs=1e-6)
    for text in TREES[2:]:
        tree = trees.parse(text)
        assert emitted(tree, False)[1] > walked(tree) + 1e-4


def walked(tree):
    """The mean number of drafts that the walk from the root accepts, exactly."""
    target, drafter = laws()
    children, total = tree.topology.children, 0.0
    for chance, paths in drafted(tree, False):
        node, reached = 0, chance

        def descend(node, reached):
            gained, r, d = 0.0, target[paths[node]], drafter[paths[node]]
            for child in children[node]:
                if child < 0 or paths[child] is None:
                    continue
                token = paths[child][-1]
                accept = min(1.0, r[token] / d[token])
                gained += reached * accept + descend(child, reached * accept)
                reached *= 1 - accept
                left = np.maximum(r - d, 0)
                r = left / left.sum() if left.sum() > 1e-12 else r
                d = np.where(np.arange(VOCAB) == token, 0, d)
                d = d / d.sum() if d.sum() > 0 else d
            return gained

        total += descend(node, reached)
    return total


CASES = {
    "a window": (Jacobi("repeat"), trees.chain(3), Sampling(top_k=2)),
    "candidates": (Jacobi(), trees.window(2, 3), Sampling()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_window_drawn_afresh_has_the_targets_law(name):
    drafter, tree, settings = CASES[name]
    target = chains.Chain(3, seed=1)
    counts, sums = chains.outputs(target, drafter, tree, 6, 1_000_000, cj.strict(), settings, verifier="traversal")
    assert chains.pvalue(counts, chains.law(target, 6, settings)) > 1e-3
    np.testing.assert_array_equal(sums.steps + sums.accepted, 5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rule": cj.grouped(2), "verifier": "traversal"}, "a relaxed rule takes the walk"),
        ({"rule": cj.strict(), "verifier": "block"}, "one of walk, traversal, not 'block'"),
    ],
)
def test_a_verifier_is_for_its_rule(given, message):
    nothing = jnp.zeros(2, int), None, jnp.zeros((2, 3)), jnp.zeros((2, 1))
    with pytest.raises(ValueError, match=message):
        cj.verify(jax.random.key(0), trees.chain(1), *nothing, **given)


def test_coupled_redraws_are_refused():
    model = tiny_bundles.bundle("llamagen").drafting(Jacobi(coupled=True))
    with pytest.raises(ValueError, match="lossless with the walk alone"):
        model.program(trees.chain(2), verifier="traversal")


@pytest.mark.slow
def test_coupled_redraws_would_not_be_lossless():
    """They keep drafts that were looked at when the drafts before them were judged."""
    target, drafter = chains.Chain(3, seed=1), Jacobi(coupled=True)
    given = trees.chain(3), 6, 200_000, cj.strict(), Sampling()
    counts, _ = chains.outputs(target, drafter, *given, verifier="traversal")
    assert chains.pvalue(counts, chains.law(target, 6, Sampling())) < 1e-9
