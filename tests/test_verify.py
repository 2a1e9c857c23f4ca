import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import struct
from scipy import stats
from tiny import FAST

import cascade_jax as cj
from cascade_jax import acceptance, sampling
from cascade_jax import tree as trees
from cascade_jax.tree import Topology, Tree
from cascade_jax.verify import walk

# Random trees, tables and thresholds against the reference.

PROBLEMS, VOCAB, NODES, WIDTH, DEPTH = 250, 12, 16, 4, 4


def random_topology(rng) -> Topology:
    """A random tree of NODES nodes, at most WIDTH wide and DEPTH deep, in arrays of one size."""
    paths = [()]
    while len(paths) < NODES:
        parent = paths[rng.integers(len(paths))]
        born = sum(path[:-1] == parent for path in paths if path)
        if len(parent) < DEPTH and born < WIDTH:
            paths.append((*parent, born))
    topology = Tree.from_choices(paths[1:]).topology
    children = np.full((NODES, WIDTH), -1, np.int32)
    children[:, : topology.children.shape[1]] = topology.children
    return topology.replace(children=children, depth=DEPTH)


def random_table(rng, rows):
    """Uneven distributions, a fifth of whose entries are zero."""
    table = rng.dirichlet(np.full(VOCAB, 0.5), rows) * (rng.random((rows, VOCAB)) > 0.2) + 1e-3 * np.eye(VOCAB)[0]
    return table / table.sum(-1, keepdims=True)


@functools.cache
def problems():
    """Trees with two kinds of drafts: `drawn` without replacement from `drafts`, and `likeliest`, point masses."""
    rng = np.random.default_rng(0)
    topologies = [random_topology(rng) for _ in range(PROBLEMS)]
    target = np.stack([random_table(rng, NODES) for _ in range(PROBLEMS)])
    drafts = np.stack([random_table(rng, NODES) for _ in range(PROBLEMS)])
    drafts = np.where(rng.random((PROBLEMS, NODES, 1)) < 0.5, drafts, 0.7 * target + 0.3 * drafts)
    drawn, likeliest = np.full((2, PROBLEMS, NODES), -1, np.int32)
    for i, topology in enumerate(topologies):
        for node in range(NODES):
            born = topology.children[node][topology.children[node] >= 0]
            possible = np.flatnonzero(drafts[i, node])
            count = min(len(born), len(possible))
            drawn[i, born[:count]] = rng.choice(VOCAB, count, replace=False, p=drafts[i, node])
            likeliest[i, born] = np.argsort(-drafts[i, node])[: len(born)]
    drawn[:, 0] = likeliest[:, 0] = 0
    return types.SimpleNamespace(
        topology=jax.tree.map(lambda *x: np.stack(x), *topologies),
        target=target,
        drafts=drafts,
        drawn=drawn,
        likeliest=likeliest,
        features=rng.normal(size=(PROBLEMS, NODES, 3)),  # three dimensions: cosines of all sizes
        keys=jax.random.split(jax.random.key(1), PROBLEMS),
        neighbours=np.stack([cj.nearest_codes(rng.normal(size=(VOCAB, 2)), 5) for _ in range(PROBLEMS)]),
        tau_pos=rng.uniform(-0.5, 1, PROBLEMS),
        tau_seq=rng.uniform(-0.5, 1, PROBLEMS),
        budget=rng.uniform(0, 0.6, PROBLEMS),
        delta=rng.uniform(0, 0.8, PROBLEMS),
        lam=rng.uniform(1, 4, PROBLEMS),
        relaxation=rng.uniform(0.5, 2, PROBLEMS),
        annealing=rng.uniform(0, 1, PROBLEMS),
        scale=rng.uniform(1, 5, PROBLEMS),
        calm=rng.uniform(1, 5, PROBLEMS),
        floor=rng.uniform(0, 0.5, PROBLEMS),
    )


def pairs(x):
    """The rules, ours with leaves [PROBLEMS, ...] and the reference's for problem i."""
    cascade = x.tau_pos, x.tau_seq, x.budget
    annealed, entropic = (x.relaxation, x.annealing), (x.scale, x.calm, x.floor)
    near, near_pp = cj.lantern(x.neighbours, x.delta), cj.lantern_pp(x.neighbours, x.lam)
    return {
        "strict": (cj.strict(), lambda i: reference.strict),
        "lantern": (near, lambda i: reference.lantern(x.neighbours[i], x.delta[i])),
        "lantern++": (near_pp, lambda i: reference.lantern_pp(x.neighbours[i], x.lam[i])),
        "grouped even": (cj.grouped(4), lambda i: reference.grouped(4)),
        "grouped odd": (cj.grouped(5), lambda i: reference.grouped(5)),
        "cascade": (cj.cascade(*cascade), lambda i: reference.cascade(*[c[i] for c in cascade])),
        "cascade next": (
            cj.cascade(*cascade, mass="next"),
            lambda i: reference.cascade(*[c[i] for c in cascade], mass="next"),
        ),
        "cascade coupled": (
            cj.cascade(*cascade, ledger="coupled"),
            lambda i: reference.bounded(reference.cascade(x.tau_pos[i], x.tau_seq[i], np.inf), x.budget[i]),
        ),
        "annealed": (cj.annealed(*annealed), lambda i: reference.annealed(*[a[i] for a in annealed], DEPTH)),
        "entropic": (cj.entropic(*entropic), lambda i: reference.entropic(*[e[i] for e in entropic])),
        "bounded annealed": (
            cj.bounded(cj.annealed(*annealed), x.budget),
            lambda i: reference.bounded(reference.annealed(*[a[i] for a in annealed], DEPTH), x.budget[i]),
        ),
        "bounded grouped": (
            cj.bounded(cj.grouped(4), x.budget),
            lambda i: reference.bounded(reference.grouped(4), x.budget[i]),
        ),
    }


@functools.partial(jax.jit, compiler_options=FAST)
@jax.vmap
def verify_all(key, topology, tokens, drafts, target, features, rule):
    return cj.verify(key, topology, tokens, drafts, jnp.log(target), features, rule)


@functools.cache
def expected(name, kind):
    """The reference's walks, under the same random numbers."""
    x = problems()
    walk_keys = jax.vmap(lambda key: jax.random.split(key)[0])(x.keys)
    uniforms = np.asarray(jax.vmap(lambda key: jax.random.uniform(key, (DEPTH, WIDTH)))(walk_keys))
    rule = pairs(x)[name][1]
    return [
        reference.verify(
            uniforms[i],
            x.topology.children[i],
            getattr(x, kind)[i],
            x.drafts[i] if kind == "drawn" else None,
            x.target[i],
            x.features[i],
            rule(i),
        )
        for i in range(PROBLEMS)
    ]


ALL_RULES = list(pairs(problems()))


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "drawn") for name in ALL_RULES)]
    + [(name, "likeliest") for name in ("strict", "lantern", "grouped odd", "cascade", "cascade coupled")],
)
def test_verification_is_the_references(name, kind):
    x, walks = problems(), expected(name, kind)
    rule = jax.tree.map(jnp.asarray, pairs(x)[name][0])
    drafts = x.drafts if kind == "drawn" else None
    got = jax.tree.map(np.asarray, verify_all(x.keys, x.topology, getattr(x, kind), drafts, x.target, x.features, rule))
    leftover = jnp.asarray(np.stack([walk.leftover for walk in walks]), jnp.float32)
    bonus = jax.vmap(lambda key, probs: sampling.draw(jax.random.split(key)[1], probs))(x.keys, leftover)
    paths = np.array([walk.path + [-1] * (DEPTH + 1 - len(walk.path)) for walk in walks])
    np.testing.assert_array_equal(got.path, paths)
    np.testing.assert_array_equal(got.accepted, [len(walk.path) - 1 for walk in walks])
    np.testing.assert_array_equal(got.next_token, bonus)
    np.testing.assert_array_equal(got.diverged, [walk.diverged for walk in walks])
    # float32 sums of at most 16 probabilities, divided by drafter probabilities of 1e-3 and more
    np.testing.assert_allclose(got.nominal, [walk.nominal for walk in walks], atol=2e-5)
    np.testing.assert_allclose(got.coupled, [walk.coupled for walk in walks], atol=2e-4)
    assert got.diverged.any() == (name != "strict")


@functools.partial(jax.jit, compiler_options=FAST)
@jax.vmap
def fates(key, topology, tokens, drafts, target, features, rule):
    """Acceptance probabilities and charges of all drafts [N], as their turns tell them; and the turns."""
    inner, warp = np.arange(NODES), jax.nn.softmax
    turns = walk(key, topology, inner, tokens, drafts, jnp.log(target), features, rule, warp).turns
    probability, charge, _ = jax.vmap(rule.decide)(turns.spent, turns.target, turns.draft, turns.offers)
    return probability, charge, turns


@pytest.mark.parametrize("name", ["cascade", "grouped even"])
def test_turns_retell_the_walk(name):
    x, walks = problems(), expected(name, "drawn")
    rule = jax.tree.map(jnp.asarray, pairs(x)[name][0])
    found = fates(x.keys, x.topology, x.drawn, x.drafts, x.target, x.features, rule)
    for i, walked in enumerate(walks):
        probability, charge, turns = jax.tree.map(lambda a: np.asarray(a[i]), found)
        visited = np.flatnonzero(~np.isnan(turns.uniform))
        strict = acceptance.ratio(turns.target, turns.draft)
        # as of the ledgers above
        np.testing.assert_allclose(np.abs(probability - strict)[visited], walked.charges, atol=2e-4)
        assert np.sum(charge[visited]) == pytest.approx(walked.nominal, abs=2e-5)
        accepted = visited[turns.uniform[visited] < probability[visited]]
        assert [0, *accepted] == walked.path


def run_problems(rule, keys=None, kind="drawn"):
    x = problems()
    drafts = x.drafts if kind == "drawn" else None
    keys = x.keys if keys is None else keys
    return verify_all(keys, x.topology, getattr(x, kind), drafts, x.target, x.features, rule)


def test_rules_with_nothing_to_relax_are_strict_bit_for_bit():
    x, zero = problems(), np.zeros(PROBLEMS)
    strict = run_problems(cj.strict())
    nothing = {
        "tau > 1": cj.cascade(zero + 1.01, zero + 1.01, x.budget),
        "tau > 1, mass next": cj.cascade(zero + 1.01, zero + 1.01, x.budget, mass="next"),
        "tau > 1, coupled": cj.cascade(zero + 1.01, zero + 1.01, x.budget, ledger="coupled"),
        "budget 0": cj.cascade(x.tau_pos, x.tau_seq, zero),
        "budget 0, coupled": cj.cascade(x.tau_pos, x.tau_seq, zero, ledger="coupled"),
        "budget 0, bounded": cj.bounded(cj.grouped(4), zero),
        "size 1": cj.grouped(1),
        "k 0": cj.lantern(x.neighbours[:, :, :0], x.delta),
        "delta 0": cj.lantern(x.neighbours, zero),
        "k 0, ++": cj.lantern_pp(x.neighbours[:, :, :0], x.lam),
        "lambda 1": cj.lantern_pp(x.neighbours, zero + 1),
        "relaxation 1": cj.annealed(zero + 1, zero),
        "budget 0, bounded annealed": cj.bounded(cj.annealed(x.relaxation, x.annealing), zero),
        "floor 1": cj.entropic(x.scale, zero + np.inf, zero + 1),
        "budget 0, bounded entropic": cj.bounded(cj.entropic(x.scale, x.calm, x.floor), zero),
    }
    for name, rule in nothing.items():
        chex.assert_trees_all_equal(run_problems(rule), strict, custom_message=name)
    relaxed = run_problems(cj.cascade(x.tau_pos, x.tau_seq, x.budget))
    assert np.mean(relaxed.accepted > strict.accepted) > 0.05  # so the equalities above are no accident


@pytest.mark.parametrize("name", [name for name in ALL_RULES if name != "strict"])
def test_the_coupled_ledger_is_the_probability_of_parting_from_the_strict_decoder(name):
    rule, difference = pairs(problems())[name][0], []
    for seed in range(60):
        verdict = run_problems(rule, jax.random.split(jax.random.key(100 + seed), PROBLEMS))
        difference.append(verdict.coupled - verdict.diverged)
    difference = np.concatenate(difference)
    # mean zero, 15,000 independent draws; four standard errors
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(difference.size)
    assert difference.std() > 0.1


@struct.dataclass
class Charging:
    """Another rule whose ledger shows |accept - strict| of all candidates examined, in place of the added mass."""

    rule: acceptance.Rule

    def offer(self, siblings, j):
        return self.rule.offer(siblings, j)

    def decide(self, spent, target, draft, offer):
        probability, _, spent = self.rule.decide(spent, target, draft, offer)
        return probability, jnp.abs(probability - acceptance.ratio(target, draft)), spent


@pytest.mark.parametrize("name", ["cascade coupled", "bounded grouped"])
def test_no_step_moves_acceptance_by_more_than_the_coupled_budget(name):
    x = problems()
    verdict = run_problems(Charging(pairs(x)[name][0]))
    # the ledger is a float32 sum of at most 16 terms below 1
    assert np.all(verdict.nominal <= x.budget + 1e-6)
    assert np.all(verdict.coupled <= x.budget + 1e-6)
    assert np.mean(verdict.nominal > x.budget - 1e-6) > 0.05  # and the budget is used up, partially if need be


def test_a_nominal_budget_bounds_no_such_thing():
    x = problems()
    verdict = run_problems(Charging(cj.cascade(x.tau_pos, x.tau_seq, x.budget)))
    assert np.max(verdict.nominal - x.budget) > 0.3


def test_a_static_tree_and_the_same_tree_as_data_give_the_same_verdict():
    rng, tree = np.random.default_rng(3), trees.parse("0 1 2 00 01 10 000")
    target, drafts = rng.dirichlet(np.ones(VOCAB), (2, 100, tree.num_nodes))
    tokens, features = np.arange(tree.num_nodes), rng.normal(size=(100, tree.num_nodes, 3))
    rule, keys = cj.cascade(0.3, 0.3, 0.5), jax.random.split(jax.random.key(4), 100)

    @functools.partial(jax.jit, compiler_options=FAST)
    @functools.partial(jax.vmap, in_axes=(0, None, 0, 0, 0))
    def both(key, topology, target, drafts, features):
        args = tokens, drafts, jnp.log(target), features, rule
        return cj.verify(key, tree, *args), cj.verify(key, topology, *args)

    static, data = both(keys, tree.topology, target, drafts, features)
    chex.assert_trees_all_equal(static, data)
    assert np.unique(static.accepted).size == 4
    assert np.unique(static.coupled).size > 20


def test_thresholds_vmap_like_a_loop():
    x, i = problems(), int(np.argmax([np.sum(np.array(w.charges) > 0.1) for w in expected("cascade", "drawn")]))
    args = x.keys[i], jax.tree.map(lambda a: a[i], x.topology), x.drawn[i], x.drafts[i], x.target[i], x.features[i]
    tau_pos, tau_seq = (g.ravel() for g in np.meshgrid(np.linspace(-0.9, 1.01, 5), np.linspace(-0.9, 1.01, 5)))

    def one(tau_pos, tau_seq):
        key, topology, tokens, drafts, target, features = args
        return cj.verify(
            key, topology, tokens, drafts, jnp.log(target), features, cj.cascade(tau_pos, tau_seq, 0.4, "coupled")
        )

    swept = jax.jit(jax.vmap(one), compiler_options=FAST)(tau_pos, tau_seq)
    single = jax.jit(one, compiler_options=FAST)
    looped = [single(*taus) for taus in zip(tau_pos, tau_seq)]
    assert single._cache_size() == 1
    # a vmapped sum may round differently
    chex.assert_trees_all_close(swept, jax.tree.map(lambda *v: np.stack(v), *looped), atol=1e-6)
    assert np.unique(swept.coupled).size > 2


def test_a_lone_root_draws_the_bonus_token_from_the_target():
    verdict = cj.verify(
        jax.random.key(0), trees.ROOT, jnp.zeros(1, int), None, jnp.eye(1, 9, 4) * 99, jnp.ones((1, 2)), cj.strict()
    )
    assert (int(verdict.next_token), int(verdict.accepted), list(verdict.path)) == (4, 0, [0])


def test_point_masses_of_target_and_drafter_leave_nothing_undefined():
    tree = trees.parse("0 1 00")
    for target, draft, path in ((3, 3, [0, 1, 3]), (3, 5, [0, -1, -1])):
        logits = jnp.where(jnp.arange(9) == target, 0.0, -jnp.inf) * jnp.ones((4, 1))
        drafts = jax.nn.one_hot(jnp.full(4, draft), 9)
        tokens = jnp.array([0, draft, -1, draft])
        verdict = jax.jit(cj.verify, static_argnums=1)(
            jax.random.key(1), tree, tokens, drafts, logits, jnp.zeros((4, 2)), cj.cascade(0.5, 0.5)
        )
        assert verdict.path.tolist() == path
        assert int(verdict.next_token) == target
        assert float(verdict.coupled) == 0


# The law of what a step emits. Both models are Markov chains here: a token's successor has the distribution of its row.


def emitted_law(key, samples, tree, rule, target, drafter, features, settings, tokens=None, topology=None):
    """Counts of the first three tokens after token 0: int [V, V, V], and means of the coupled ledger and divergence.

    Drafts are drawn without replacement on `tree`, or are `tokens` on `topology`. What a step does not emit is drawn
    from the target, so a step with the target's law gives the target's counts.
    """
    vocab = len(target)

    def sample(key):
        draft_key, verify_key, rest_key = jax.random.split(key, 3)
        warp = functools.partial(sampling.warp, sampling=settings)
        if tokens is None:
            log_p = jnp.log(warp(drafter))
            inner = np.array(tree.inner)

            def born(drafts, node):
                key, node, children = node
                drawn = sampling.draw_distinct(key, log_p[jnp.maximum(drafts[node], 0)], tree.width)
                return drafts.at[jnp.where(children >= 0, children, len(drafts))].set(drawn, mode="drop"), None

            nodes = jax.random.split(draft_key, len(inner)), inner, tree.topology.children[inner]
            drafts = jax.lax.scan(born, jnp.zeros(tree.num_nodes, jnp.int32), nodes)[0]
            probs = jnp.exp(log_p)[jnp.maximum(drafts, 0)]
        else:
            drafts, probs = tokens, None
        before = jnp.maximum(drafts, 0)
        verdict = cj.verify(
            verify_key,
            tree if tokens is None else topology,
            drafts,
            probs,
            target[before],
            features[before],
            rule,
            warp,
        )
        padded = jnp.pad(verdict.path, (0, 4), constant_values=-1)

        def follow(last, i):
            drawn = sampling.draw(jax.random.fold_in(rest_key, i), warp(target[last]))
            free = jnp.where(i == verdict.accepted, verdict.next_token, drawn)
            token = jnp.where(i < verdict.accepted, drafts[padded[i + 1]], free)
            return token, token

        _, out = jax.lax.scan(follow, jnp.int32(0), jnp.arange(3))
        return out @ jnp.array([vocab**2, vocab, 1]), verdict.coupled, verdict.diverged

    codes, coupled, diverged = jax.lax.map(sample, jax.random.split(key, samples), batch_size=5000)
    counts = jnp.zeros(vocab**3, jnp.int32).at[codes].add(1)
    return counts.reshape(vocab, vocab, vocab), coupled.mean(), diverged.mean()


emitted_law = jax.jit(emitted_law, static_argnums=(1, 2))


def exact_law(target, settings):
    q = np.asarray(jax.jit(sampling.warp)(target, settings), np.float64)
    q /= q.sum(-1, keepdims=True)
    return q[0][:, None, None] * q[:, :, None] * q[None]


DYNAMIC = trees.parse("0 1 2 3 00 01 10 20 000 100")
LIKELIEST = np.array([0, 2, 4, 1, -1, 0, 3, 2, 2, 1, 4])  # tokens of DYNAMIC, one of which does not exist


@pytest.mark.parametrize(
    "tree",
    [
        trees.chain(3),
        None,
        *(pytest.param(tree, marks=pytest.mark.slow) for tree in (trees.EAGLE_25, trees.full(4, 1))),
    ],
    ids=str,
)
def test_strict_verification_emits_the_targets_law(tree):
    rng = np.random.default_rng(11)
    target, drafter = jnp.asarray(rng.normal(size=(2, 5, 5)) * 1.5, jnp.float32)
    settings, samples = sampling.Sampling(temperature=0.8, top_k=4).checked(), 1_000_000
    drafts = (LIKELIEST, DYNAMIC.topology) if tree is None else (None, None)
    counts, _, _ = emitted_law(
        jax.random.key(0), samples, tree, cj.strict(), target, drafter, jnp.ones((5, 2)), settings, *drafts
    )
    counts, law = np.asarray(counts), exact_law(target, settings)
    assert counts[law == 0].sum() == 0
    assert stats.chisquare(counts[law > 0], samples * law[law > 0]).pvalue > 1e-3


def total_variation(counts, law):
    """Of counts from a law, and how much it may exceed the true distance: the expected sampling error, by
    Cauchy-Schwarz at most sqrt(p / n) a cell, and three standard deviations of the whole (McDiarmid)."""
    samples = counts.sum()
    error = 0.5 * np.sqrt(counts / samples**2).sum() + 3 * 0.5 / np.sqrt(samples)
    return 0.5 * np.abs(counts / samples - law).sum(), error


ADVERSARIAL = {
    # half of the drafts are impossible under the target, whose mass lies with their siblings
    "spread": ([0.25] * 4 + [0] * 4, [0.125] * 8),
    # the drafter all but excludes what the target wants
    "averse": ([0.4, 0.3, 0.2, 0.1, 0, 0, 0, 0], [1e-4] * 4 + [0.4, 0.3, 0.2, 0.0996]),
    "uneven": ([0.01, 0.5, 0.02, 0.2, 0.03, 0.15, 0.04, 0.05], [0.3, 0.02, 0.25, 0.03, 0.2, 0.05, 0.1, 0.05]),
}
BOUNDED = {
    "cascade": lambda budget: cj.cascade(-1.0, -1.0, budget, ledger="coupled"),
    "lantern": lambda budget: cj.bounded(cj.lantern((np.arange(8)[:, None] + np.arange(1, 8)) % 8, 1.0), budget),
    "grouped": lambda budget: cj.bounded(cj.grouped(5), budget),
}


def adversarial_step(rule, table):
    """Total variation distance between the first two tokens and the target's, its tolerance, and the coupled ledger."""
    target, drafter = (jnp.log(jnp.tile(jnp.array(row, jnp.float32), (8, 1))) for row in ADVERSARIAL[table])
    settings = sampling.Sampling().checked()
    tree = trees.parse("0 1 2 3 00 01 10 20")
    counts, coupled, diverged = emitted_law(
        jax.random.key(1), 200_000, tree, rule, target, drafter, jnp.ones((8, 2)), settings
    )
    counts, law = np.asarray(counts).sum(2), exact_law(target, settings).sum(2)
    return *total_variation(counts, law), float(coupled), float(diverged)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        pytest.param(name, table, marks=[] if (name, table) == ("cascade", "averse") else pytest.mark.slow)
        for name in BOUNDED
        for table in ADVERSARIAL
    ],
)
def test_the_coupled_budget_bounds_total_variation(name, table):
    for budget in (0.02, 0.25):
        distance, error, coupled, diverged = adversarial_step(BOUNDED[name](budget), table)
        assert distance <= coupled + error  # the coupling inequality
        assert coupled <= budget + 1e-6
        assert abs(coupled - diverged) < 4 * 0.5 / np.sqrt(200_000)
        if (name, table) != ("cascade", "averse"):  # there, siblings have no mass to lend
            assert coupled > 0.5 * budget  # the rule does use its allowance: the bound is not met by idleness


def test_the_nominal_budget_does_not_bound_total_variation():
    distance, error, coupled, _ = adversarial_step(cj.cascade(-1.0, -1.0, 0.25), "spread")
    assert distance - error > 0.25
    assert distance <= coupled + error


def test_a_window_with_candidates_is_walked_without_loops_on_a_gpu():
    """Every turn of a loop there is a launch of all of its kernels."""
    tree, vocab = trees.window(32, 4), 8
    inner, rows = np.array(tree.inner), jnp.ones((len(tree.inner), vocab)) / vocab
    tokens, features = jnp.arange(tree.num_nodes) % vocab, jnp.ones((tree.num_nodes, 2))

    def judge(key):
        return walk(key, tree.topology, inner, tokens, rows, jnp.log(rows), features, cj.strict(), jax.nn.softmax).end

    for platform, loops in (("cuda", False), ("cpu", True)):
        text = jax.jit(judge).trace(jax.random.key(0)).lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.while" in text) == loops
