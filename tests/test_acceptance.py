import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import FAST

import cascade_jax as cj
from cascade_jax import acceptance, sampling
from cascade_jax.acceptance import Siblings
from cascade_jax.rules.grouped import Group

TABLE = np.array([[1, 2, 3], [2, 3, 4], [3, 4, 0], [4, 0, 1], [0, 1, 2]])  # "nearest" to x: x + 1, x + 2, x + 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cj.lantern(TABLE, -0.1), "delta must be at least 0, not -0.1"),
        (lambda: cj.lantern(TABLE, float("nan")), "delta"),
        (lambda: cj.lantern_pp(TABLE, 0.99), "lam must be at least 1, not 0.99"),
        (lambda: cj.grouped(0), "a group has at least 1 token, not 0"),
        (lambda: cj.cascade(-1.5, 0.5), "tau_pos must be at least -1, not -1.5"),
        (lambda: cj.cascade(0.5, float("nan")), "tau_seq"),
        (lambda: cj.cascade(0.5, 0.5, -0.1), "budget must be at least 0, not -0.1"),
        (lambda: cj.cascade(0.5, 0.5, np.array([0.1, -0.1])), "budget"),
        (lambda: cj.cascade(0.5, 0.5, ledger="real"), 'ledger must be "nominal" or "coupled", not \'real\''),
        (lambda: cj.cascade(0.5, 0.5, mass="both"), 'mass must be "current" or "next", not \'both\''),
        (lambda: cj.bounded(cj.grouped(3), -1.0), "budget must be at least 0, not -1.0"),
        (lambda: cj.annealed(-0.1), "relaxation must be between 0 and 1e\\+06, not -0.1"),
        (lambda: cj.annealed(1.1, float("inf")), "annealing must be between 0 and 1000, not inf"),
        (lambda: cj.entropic(0.0), "scale must be at least 1e-06, not 0.0"),
        (lambda: cj.entropic(8.0, -1.0), "calm must be at least 1e-06, not -1.0"),
        (lambda: cj.entropic(floor=float("nan")), "floor must be at least 0, not nan"),
    ],
)
def test_thresholds_out_of_range_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("codes", [50, 1100])  # one block of rows, and more than one
def test_nearest_codes_are_brute_forces(codes):
    codebook = np.random.default_rng(0).normal(size=(codes, 3)).astype(np.float32)
    table = cj.nearest_codes(jnp.asarray(codebook), 7)
    assert table.shape == (codes, 7)
    assert table.dtype == np.int32
    rows = np.arange(codes)[:: max(codes // 50, 1)]
    distances = np.linalg.norm(codebook[rows, None].astype(np.float64) - codebook[None], axis=-1)
    distances[np.arange(len(rows)), rows] = np.inf
    found = np.take_along_axis(distances, table[rows], axis=1)
    np.testing.assert_allclose(found, np.sort(distances, axis=1)[:, :7], atol=1e-3)  # float32 squares of norms up to 10
    assert all(len(set(row)) == 7 for row in table)


def test_a_table_of_neighbours_has_between_none_and_all_other_codes():
    codebook = np.eye(4)
    assert cj.nearest_codes(codebook, 0).shape == (4, 0)
    assert cj.nearest_codes(codebook, 3).shape == (4, 3)
    for k in (-1, 4):
        with pytest.raises(ValueError, match=f"k must be between 0 and 3 for 4 codes, not {k}"):
            cj.nearest_codes(codebook, k)


def test_the_strict_ratio_is_capped_at_one_and_zero_for_what_the_drafter_cannot_propose():
    ratio = acceptance.ratio(jnp.array([0.1, 0.4, 0.0, 0.3, 0.0]), jnp.array([0.4, 0.1, 0.2, 0.0, 0.0]))
    np.testing.assert_allclose(ratio, [0.25, 1, 0, 0, 0])


def children(tokens, residual, **fields):
    """Children of one node, unlike each other and without children of their own unless `fields` says otherwise."""
    count = len(tokens)
    fields = {
        "draft": np.full(len(residual), 1 / len(residual)),
        "alike": np.eye(count),
        "grandchildren": np.full((count, 1), -1),
        "continued": np.zeros((count, 1)),
        "next_probs": np.zeros((count, 1)),
        "entropy": 0.0,
        "depth": 1,
        **fields,
    }
    integers = ("grandchildren", "depth")
    return Siblings(
        jnp.asarray(tokens),
        jnp.asarray(residual, jnp.float32),
        **{k: jnp.asarray(v, jnp.int32 if k in integers else jnp.float32) for k, v in fields.items()},
        levels=1,
    )


def added(rule, siblings, j, spent=0.0):
    """The mass that a rule adds for candidate j, and its ledger afterwards."""
    token = siblings.tokens[j]
    offer = rule.offer(siblings, j)
    target, draft = siblings.residual[token], jnp.float32(100.0)  # a ratio far below 1
    probability, charge, spent = rule.decide(jnp.float32(spent), target, draft, offer)
    np.testing.assert_allclose(probability * 100.0, target + charge, rtol=1e-5)
    return pytest.approx(float(charge), abs=1e-6), pytest.approx(float(spent), abs=1e-6)


FAMILY = children(
    [0, 1, 2],
    [0.1, 0.2, 0.05, 0.3, 0.15, 0.2],
    alike=[[1, 0.9, 0.4], [0.9, 1, 0.95], [0.4, 0.95, 1]],
    grandchildren=[[3, 1], [4, -1], [2, 3]],
    continued=[[0.8, 0.7], [0.8, 0.99], [0.9, 0.2]],
    next_probs=[[0.5, 0.25], [0.125, 0.0], [0.5, 0.25]],
)


def test_cascade_adds_similar_siblings_and_converging_children():
    assert added(cj.cascade(0.85, 2.0, 9.0), FAMILY, 0) == (0.2, 0.2)  # token 1
    assert added(cj.cascade(0.85, 2.0, 9.0), FAMILY, 1) == (0.15, 0.15)  # tokens 0 and 2
    assert added(cj.cascade(0.4, 2.0, 9.0), FAMILY, 0) == (0.25, 0.25)  # a threshold is reached by equality
    assert added(cj.cascade(2.0, 0.75, 9.0), FAMILY, 0) == (0.3, 0.3)  # token 3
    assert added(cj.cascade(2.0, 0.75, 9.0), FAMILY, 1) == (0.15, 0.15)  # token 4; there is no second child
    assert added(cj.cascade(2.0, 0.6, 9.0), FAMILY, 0) == (0.5, 0.5)  # tokens 3 and 1
    assert added(cj.cascade(2.0, 2.0, 9.0), FAMILY, 0) == (0, 0)


def test_cascade_counts_a_vocabulary_entry_once_and_the_candidate_never():
    assert added(cj.cascade(0.85, 0.6, 9.0), FAMILY, 0) == (0.5, 0.5)  # 1 as a sibling, 3 and 1 as children
    assert added(cj.cascade(2.0, 0.5, 9.0), FAMILY, 2) == (0, 0)  # its child is its own token
    assert added(cj.cascade(2.0, 0.1, 9.0), FAMILY, 2) == (0.3, 0.3)


def test_cascade_reads_the_childrens_mass_after_the_candidate_on_request():
    assert added(cj.cascade(2.0, 0.75, 9.0, mass="next"), FAMILY, 0) == (0.5, 0.5)
    assert added(cj.cascade(2.0, 0.6, 9.0, mass="next"), FAMILY, 0) == (0.75, 0.75)
    assert added(cj.cascade(0.85, 0.75, 9.0, mass="next"), FAMILY, 0) == (0.7, 0.7)


def test_cascade_adds_each_set_whole_or_not_at_all_within_its_ledger():
    rule = lambda budget: cj.cascade(0.85, 0.75, budget)  # candidate 0: siblings 0.2, then children 0.3
    assert added(rule(0.5 + 1e-6), FAMILY, 0) == (0.5, 0.5)
    assert added(rule(0.45), FAMILY, 0) == (0.2, 0.2)
    assert added(rule(0.19), FAMILY, 0) == (0, 0)
    assert added(rule(0.45), FAMILY, 0, spent=0.3) == (0, 0.3)
    assert added(rule(0.65), FAMILY, 0, spent=0.3) == (0.3 - 0.1, 0.5)
    larger_first = cj.cascade(0.85, 0.6, 0.19)  # candidate 1: siblings 0.15, then child 0.15
    assert added(larger_first, FAMILY, 1) == (0.15, 0.15)
    only_second = children(
        [0, 1], [0.1, 0.5, 0.2, 0.2], alike=np.ones((2, 2)), grandchildren=[[2], [3]], continued=np.ones((2, 1))
    )
    assert added(cj.cascade(0.5, 0.5, 0.3), only_second, 0) == (0.2, 0.2)  # I does not fit, C does
    # an entry of a refused I still counts in C
    overlap = only_second.replace(grandchildren=jnp.array([[1, 2], [3, -1]]), continued=jnp.array([[0.4, 1], [1, 1.0]]))
    assert added(cj.cascade(0.9, 0.4, 0.69), overlap.replace(alike=jnp.eye(2)), 0) == (0, 0)
    assert added(cj.cascade(0.9, 0.4, 0.71), overlap.replace(alike=jnp.eye(2)), 0) == (0.7, 0.7)


def test_lantern_adds_the_longest_prefix_of_neighbours_that_fits():
    family = children([0, 4], [0.1, 0.2, 0.3, 0.05, 0.35])
    assert added(cj.lantern(TABLE, 0.55 + 1e-6), family, 0) == (0.55, 0)  # 0.2 + 0.3 + 0.05
    assert added(cj.lantern(TABLE, 0.51), family, 0) == (0.5, 0)
    assert added(cj.lantern(TABLE, 0.3), family, 0) == (0.2, 0)  # 0.05 would fit, but comes after what does not
    assert added(cj.lantern(TABLE, 0.19), family, 0) == (0, 0)
    assert added(cj.lantern(TABLE, 0.3 + 1e-6), family, 1) == (0.3, 0)  # 0.1 + 0.2


def test_lantern_pp_bounds_the_prefix_by_a_multiple_of_the_candidates_own_mass():
    family = children([0, 4], [0.1, 0.2, 0.3, 0.05, 0.35])
    assert added(cj.lantern_pp(TABLE, 2.9), family, 0) == (0, 0)  # 0.19
    assert added(cj.lantern_pp(TABLE, 3.1), family, 0) == (0.2, 0)  # 0.21
    assert added(cj.lantern_pp(TABLE, 1.9), family, 1) == (0.3, 0)  # 0.315


def test_grouped_compares_the_masses_of_a_group_by_rank():
    family = children([2, 4], [0.1, 0.2, 0.15, 0.15, 0.4], draft=[0.1, 0.1, 0.6, 0.1, 0.1])
    probability = lambda size, j: float(
        cj.grouped(size).decide(
            jnp.float32(0),
            family.residual[family.tokens[j]],
            family.draft[family.tokens[j]],
            cj.grouped(size).offer(family, j),
        )[0]
    )
    # by rank: 4 (0.4), 1 (0.2), 2 (0.15), 3 (0.15), 0 (0.1)
    assert probability(1, 0) == pytest.approx(0.15 / 0.6)
    assert probability(2, 0) == pytest.approx(0.3 / 0.7)  # 2, 3
    assert probability(3, 0) == pytest.approx(0.5 / 0.8)  # 1, 2, 3
    assert probability(4, 0) == pytest.approx(0.6 / 0.9)  # 1, 2, 3, 0
    assert probability(5, 0) == pytest.approx(1.0)
    assert probability(3, 1) == pytest.approx(1.0)  # 4, 1: nothing stands before the first
    assert probability(4, 1) == pytest.approx(0.75 / 0.8)  # 4, 1, 2: less than strict's 1


def random_candidates(rng, count, width=4, below=3, vocab=10):
    """Candidates with all that a rule may look at, residual and draft probabilities of every size among them."""
    tokens = np.stack([rng.permutation(vocab)[:width] for _ in range(count)])
    tokens[rng.random(tokens.shape) < 0.2] = -1
    tokens[:, 0] = np.maximum(tokens[:, 0], 0)
    alike = np.clip(rng.uniform(-1, 1.2, (count, width, width)), -1, 1)
    return Siblings(
        tokens=jnp.asarray(tokens),
        residual=jnp.asarray(rng.dirichlet(np.full(vocab, 0.3), count), jnp.float32),
        draft=jnp.asarray(rng.dirichlet(np.full(vocab, 0.3), count), jnp.float32),
        alike=jnp.asarray((alike + alike.swapaxes(1, 2)) / 2, jnp.float32),
        grandchildren=jnp.asarray(rng.integers(-1, vocab, (count, width, below))),
        continued=jnp.asarray(rng.uniform(-1, 1, (count, width, below)), jnp.float32),
        next_probs=jnp.asarray(rng.dirichlet(np.ones(below), (count, width)), jnp.float32),
        entropy=jnp.zeros(count),
        depth=jnp.ones(count, int),
        levels=1,
    )


@jax.jit
@jax.vmap
def probability(rule, siblings, spent):
    token = siblings.tokens[0]
    return rule.decide(spent, siblings.residual[token], siblings.draft[token], rule.offer(siblings, 0))[0]


def random_rules(rng, count, budget):
    taus = rng.uniform(-1, 1.1, (2, count))
    tables = np.stack([cj.nearest_codes(rng.normal(size=(10, 2)), 4) for _ in range(count)])
    return {
        "cascade": cj.cascade(*taus, budget),
        "cascade next": cj.cascade(*taus, budget, mass="next"),
        "cascade coupled": cj.cascade(*taus, budget, ledger="coupled"),
        "lantern": cj.lantern(tables, rng.uniform(0, 1, count)),
        "lantern++": cj.lantern_pp(tables, rng.uniform(1, 5, count)),
        "bounded lantern": cj.bounded(cj.lantern(tables, rng.uniform(0, 1, count)), budget),
    }


def test_cascade_and_the_lanterns_never_accept_with_a_lower_probability_than_strict():
    rng, count = np.random.default_rng(1), 3000
    siblings, spent = random_candidates(rng, count), jnp.asarray(rng.uniform(0, 0.5, count), jnp.float32)
    token = siblings.tokens[:, :1]
    strict = acceptance.ratio(
        *(np.take_along_axis(np.asarray(x), np.asarray(token), 1)[:, 0] for x in (siblings.residual, siblings.draft))
    )
    for name, rule in random_rules(rng, count, rng.uniform(0, 1, count)).items():
        relaxed = probability(rule, siblings, spent)
        assert np.all(relaxed >= strict), name
        assert np.mean(relaxed > strict + 0.01) > 0.05, name


def test_a_larger_budget_never_lowers_the_first_candidates_acceptance():
    count, rng = 3000, np.random.default_rng(2)
    siblings, spent = random_candidates(rng, count), jnp.zeros(count)
    small = rng.uniform(0, 1, count)
    large = small + rng.exponential(0.2, count)
    before, after = (random_rules(np.random.default_rng(3), count, budget) for budget in (small, large))
    for name in ("cascade", "cascade next", "cascade coupled", "bounded lantern"):
        low, high = probability(before[name], siblings, spent), probability(after[name], siblings, spent)
        # the coupled ledger grants strict + remainder, a sum that float32 rounds
        assert np.all(high >= low - 1e-6), name
        assert np.mean(high > low + 0.01) > 0.02, name


def test_the_coupled_ledger_spends_its_remainder_in_part():
    rule = cj.cascade(0.85, 2.0, 0.3, ledger="coupled")
    family, draft = FAMILY, jnp.float32(0.5)  # strict 0.2, cascade 0.6
    offer = rule.offer(family, 0)
    probability, used, spent = rule.decide(jnp.float32(0), family.residual[0], draft, offer)
    np.testing.assert_allclose([probability, used, spent], [0.5, 0.15, 0.3], rtol=1e-6)
    probability, used, spent = rule.decide(spent, family.residual[0], draft, offer)
    np.testing.assert_allclose([probability, used, spent], [0.2, 0, 0.3], rtol=1e-6)


def test_no_sequence_of_candidates_overdraws_the_coupled_ledger():
    """Whatever the rule wants: more than strict, or less, as grouped may."""
    rng, steps = np.random.default_rng(5), 40
    target, draft, first, more = jnp.asarray(rng.dirichlet(np.full(4, 0.3), (500, steps)), jnp.float32).transpose(
        2, 0, 1
    )
    budget = jnp.asarray(rng.uniform(0, 1, 500), jnp.float32)

    @jax.jit
    @jax.vmap
    def walk(target, draft, first, more, budget):
        rule = cj.bounded(cj.grouped(2), budget)  # grouped's decision: (target + first) / (draft + more)

        def decide(spent, x):
            target, draft, first, more = x
            probability, _, spent = rule.decide(spent, target, draft, Group(first, more))
            return spent, probability - acceptance.ratio(target, draft)

        return jax.lax.scan(decide, jnp.float32(0), (target, draft, first, more))

    spent, moved = walk(target, draft, first, more, budget)
    assert np.all(np.abs(moved).sum(1) <= budget + 1e-5)  # 40 float32 sums
    np.testing.assert_allclose(spent, np.abs(moved).sum(1), atol=1e-5)
    assert np.any(moved > 0.01)
    assert np.any(moved < -0.01)
    assert np.mean(spent > budget - 1e-5) > 0.5


def left_by_public_code(r, p, token, near, bound, deterministic):
    """LANTERN's `evaluate_posterior` after a rejection, for one candidate: what is left of r."""
    r, p = r.copy(), p.copy()
    apart = near if r[near[0]] <= bound else []
    if deterministic:
        r[[token, *apart]] = 0
        return r
    p[apart] = 0
    return np.maximum(r - p, 0)


@pytest.mark.parametrize("deterministic", [False, True])
def test_what_a_rejection_leaves_is_the_strict_residual_or_public_codes(deterministic):
    rng = np.random.default_rng(3)
    parted = 0
    for _ in range(40):
        r, p = rng.dirichlet(np.full(5, 0.5), 2).astype(np.float32)
        token, delta = int(rng.integers(5)), float(rng.uniform(0, 0.4))
        p = np.eye(5, dtype=np.float32)[token] if deterministic else p
        family = children([token], r, draft=p)
        near = [(token + i) % 5 for i in (1, 2, 3)]  # of k = 2 neighbours, public code clears one more
        want = left_by_public_code(r, p, token, near, delta, deterministic)
        wide, strict = cj.lantern(TABLE, delta, residual="lantern"), cj.lantern(TABLE, delta)
        np.testing.assert_allclose(acceptance.remainder(wide, family, 0), want, atol=1e-7)
        np.testing.assert_allclose(acceptance.remainder(strict, family, 0), np.maximum(r - p, 0), atol=1e-7)
        assert added(wide, family, 0) == added(cj.lantern(TABLE[:, :2], delta), family, 0)
        parted += not np.allclose(want, np.maximum(r - p, 0))
        pp = cj.lantern_pp(TABLE, 1 + delta, residual="lantern")
        want = left_by_public_code(r, p, token, near, delta * r[token], deterministic)
        np.testing.assert_allclose(acceptance.remainder(pp, family, 0), want, atol=1e-7)
    assert parted > 10


def test_an_unknown_residual_is_refused():
    with pytest.raises(ValueError, match='residual must be "strict" or "lantern", not \'wide\''):
        cj.lantern(TABLE, 0.1, residual="wide")


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.6}])
def test_no_rule_accepts_what_the_targets_own_sampling_excludes(cut):
    """The drafter loves what the target's top-k and top-p exclude, and every sibling is alike."""
    settings, vocabulary = cj.Sampling(**cut).checked(), 8
    tree, rng = cj.Tree.from_choices([[0], [1], [2]]), np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 1, (4, vocabulary)), jnp.float32)
    warp = functools.partial(sampling.warp, sampling=settings)
    allowed = np.asarray(warp(logits[0]) > 0)
    assert 0 < allowed.sum() < 5
    order = np.argsort(np.asarray(logits[0]))  # the least likely tokens are drafted first
    tokens = jnp.asarray([0, *order[[0, 1, -1]]], jnp.int32)
    draft = jnp.full((4, vocabulary), 1 / vocabulary)
    table = (np.arange(vocabulary)[:, None] + np.arange(1, vocabulary)) % vocabulary
    for rule in (cj.cascade(-1.0, -1.0, 9.0), cj.lantern(table, 9.0), cj.bounded(cj.grouped(7), 9.0)):

        @functools.partial(jax.jit, compiler_options=FAST)
        @jax.vmap
        def judge(key, rule=rule):
            return cj.verify(key, tree, tokens, draft, logits, jnp.ones((4, 2)), rule, warp=warp)

        verdicts = judge(jax.random.split(jax.random.key(0), 500))
        first = np.asarray(jnp.where(verdicts.accepted > 0, tokens[verdicts.path[:, 1]], verdicts.next_token))
        assert np.all(allowed[first])
        assert np.any(verdicts.accepted > 0)
        assert np.all(verdicts.nominal >= 0)
