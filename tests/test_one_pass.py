"""Decoding with a drafter in one pass: learned slots stand where pairs are not drafted yet."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx
from laws import assert_law
from tiny import FAST, Tiny

import cascade_jax as cj
from cascade_jax import cache as kv
from cascade_jax import cli
from cascade_jax import tree as trees
from cascade_jax.cache import Context
from cascade_jax.drafters.parallel import Parallel, ParallelConfig
from cascade_jax.models.transformer import run_blocks
from cascade_jax.sampling import Sampling, guide, warp
from cascade_jax.training import distill, log, run
from cascade_jax.training.batches import Batches
from cascade_jax.training.drafter import Objective, Schedule
from cascade_jax.tree import DynamicTree

SMALL, DYNAMIC = trees.parse("0 1 00 01 10 000"), DynamicTree(top_k=4, rounds=2, drafts=12)
SAMPLED = Sampling(temperature=1.0, top_k=20, guidance=2.0)
GREEDY = SAMPLED.replace(temperature=0.0)


def one_pass(tiny: Tiny, depth: int, scale: float) -> Tiny:
    """The model under a drafter in one pass that is the other one's network, with slots large enough to matter."""
    own = tiny.drafter.config
    config = ParallelConfig(own.block, grid=own.grid, condition_slots=own.condition_slots, depth=depth)
    drafter = Parallel(config, rngs=nnx.Rngs(9))
    nnx.update(drafter, nnx.state(tiny.drafter))
    drafter.slots[...] *= scale / 0.02
    return dataclasses.replace(tiny, drafter=drafter)


@pytest.fixture(scope="module")
def drafting(tiny) -> Tiny:
    return one_pass(tiny, 3, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("tree", [SMALL, DYNAMIC], ids=str)
def test_strict_greedy_decoding_is_the_autoregressive_sequence(tiny, drafting, tree):
    expected, got = tiny.generate(trees.ROOT, GREEDY), drafting.generate(tree, GREEDY)
    np.testing.assert_array_equal(got.tokens[:, :16], expected.tokens[:, :16])
    np.testing.assert_array_equal(got.stats.steps + got.stats.accepted, 15)
    assert np.sum(got.stats.accepted) > 0


@pytest.mark.slow
@pytest.mark.parametrize("verifier", ["walk", "traversal"])
def test_strict_decoding_has_the_law_of_the_target_over_several_steps(tiniest, verifier):
    """All 625 outputs of 4 tokens: siblings are drawn without replacement, cousins from the same law."""
    drafting = one_pass(tiniest, 2, 1.0)
    steps = assert_law(drafting, trees.parse("0 1 2 00 01 10"), verifier)
    assert np.bincount(steps, minlength=4)[1:].min() > 0.01 * len(steps)


@pytest.fixture(scope="module")
def midway(drafting):
    """Four steps into a picture: rows have different counts, and pairs that the drafter has not taken in yet."""
    prefix = drafting.prefix(8)
    state = drafting.run(SMALL, drafting.start(SMALL, SAMPLED, prefix=prefix), SAMPLED, limit=4)
    assert len(np.unique(state.drafter.pending)) > 1
    return prefix, state


def plain_levels(drafting, prefix, state, depth):
    """The drafter's laws [B, depth, V] from one causal pass over all pairs, and slots behind the last, of each row."""
    graph, params = nnx.split(drafting.drafter)
    tokens = state.tokens[:, : drafting.length]
    embedded = drafting.target.embed(jnp.concatenate([tokens] * 2))
    embedded = jnp.concatenate([prefix.drafter_embeddings[:, 1:], embedded], axis=1)
    features = drafting.features(prefix, tokens)

    @functools.partial(jax.jit, compiler_options=FAST, static_argnums=3)
    def hidden(params, embedded, features, depth):
        drafter, rows = nnx.merge(graph, params), len(features)
        slots = jnp.broadcast_to(drafter.slots[...][: depth - 1], (rows, depth - 1, features.shape[-1]))
        x = jnp.concatenate([drafter.paired(embedded, features), slots], axis=1)
        places = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        context = Context(drafter.rope(places), kv.bias(kv.causal(x.shape[1]))[None, None])
        return run_blocks(drafter.blocks, x, context)[0][:, -depth:]

    laws = []
    for row, count in enumerate(np.asarray(state.count)):
        pairs = prefix.embeddings.shape[1] - 1 + count
        both = np.array([row, row + 8])
        logits = drafting.target.logits(hidden(params, embedded[both, :pairs], features[both, :pairs], depth))
        laws.append(guide(logits, SAMPLED.guidance))
    return np.asarray(jax.jit(warp)(jnp.stack(laws), SAMPLED.checked()))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), compiler_options=FAST)
def _propose(program, graph, tree, shared, params, memory, keys, settings, count, noise):
    drafter, target = nnx.merge(program, params["drafter"]), nnx.merge(graph, params["target"])
    return drafter.propose(target, tree, memory, keys, settings, count, noise=noise if shared else None)[0]


def drafted(drafting, state, tree, settings=SAMPLED, noise=None):
    graphs = nnx.graphdef(drafting.drafter), nnx.graphdef(drafting.target)
    arguments = drafting.params(tree), state.drafter, drafting.keys(8), settings.checked(), state.count, noise
    return jax.tree.map(np.asarray, _propose(*graphs, tree, noise is not None, *arguments))


def test_a_static_trees_drafts_come_from_the_laws_of_a_plain_pass(drafting, midway):
    laws, sampled = plain_levels(drafting, *midway, 3), drafted(drafting, midway[1], SMALL)
    greedy = drafted(drafting, midway[1], SMALL, GREEDY)
    assert np.abs(laws[:, 0] - laws[:, 1]).max() > 0.05  # the levels' laws differ
    for drafts in (sampled, greedy):
        for i, node in enumerate(SMALL.inner):
            law = laws[:, SMALL.depths[node]]
            np.testing.assert_allclose(drafts.probs[:, i], law, atol=1e-4)  # float32 in other orders of summation
            born = drafts.tokens[:, SMALL.topology.children[node][SMALL.topology.children[node] >= 0]]
            assert np.all(np.take_along_axis(law, born, axis=1) > 0)
            assert all(len(set(row)) == len(row) for row in born)
            if drafts is greedy:
                np.testing.assert_array_equal(born, np.argsort(-law, axis=1)[:, : born.shape[1]])
    cousins = [sampled.tokens[:, SMALL.topology.children[node][0]] for node in (1, 2)]
    assert not np.array_equal(*cousins)  # one law, but draws of their own


def test_drafts_by_the_targets_noise_are_what_it_makes_of_the_levels_laws(drafting, midway):
    laws = plain_levels(drafting, *midway, 3)
    noise = jax.random.gumbel(jax.random.key(3), (8, 4, laws.shape[-1]))
    drafts = drafted(drafting, midway[1], SMALL, noise=noise)
    with np.errstate(divide="ignore"):
        scores = np.log(laws) + np.asarray(noise)[:, :3]
    for node in SMALL.inner:
        born = drafts.tokens[:, SMALL.topology.children[node][SMALL.topology.children[node] >= 0]]
        best = np.argsort(-scores[:, SMALL.depths[node]], axis=1)[:, : born.shape[1]]
        np.testing.assert_array_equal(born, best)


def test_a_dynamic_tree_holds_the_likeliest_of_all_paths(drafting, midway):
    laws, drafts = plain_levels(drafting, *midway, 3), drafted(drafting, midway[1], DYNAMIC)
    for row in range(8):
        best = [np.sort(level)[::-1][:4] for level in laws[row]]
        paths = [(i,) for i in range(4)]
        scores = {path: best[0][path[0]] for path in paths}
        frontier = paths
        for level in (1, 2):
            grown = {(*path, i): scores[path] * best[level][i] for path in frontier for i in range(4)}
            scores |= grown
            frontier = sorted(grown, key=lambda path: -grown[path])[:4]
        expected = sorted(scores.values(), reverse=True)[:12]
        topology, got = jax.tree.map(lambda x: x[row], drafts.topology), [1.0]
        for node in range(1, DYNAMIC.num_nodes):
            parent = topology.parents[node]
            got.append(got[parent] * laws[row, topology.depths[node] - 1, drafts.tokens[row, node]])
        np.testing.assert_allclose(sorted(got[1:], reverse=True), expected, rtol=1e-3)


def test_a_tree_deeper_than_the_drafter_is_refused(drafting):
    with pytest.raises(ValueError, match="drafts at most 3 levels, and the tree has 4"):
        jax.eval_shape(lambda: drafting.start(trees.chain(4), SAMPLED))
    with pytest.raises(ValueError, match="at least one level, not 0"):
        dataclasses.replace(drafting.drafter.config, depth=0)


def test_the_training_layout_is_that_of_decoding(drafting):
    """Estimates at a slot, of all slots at once, are the levels that decoding drafts there; also of some alone."""
    rng = np.random.default_rng(1)
    embeddings, features = (jnp.asarray(rng.normal(size=(2, n, 32)), jnp.float32) for n in (9, 8))
    ahead = jax.jit(drafting.drafter.ahead, static_argnums=2, compiler_options=FAST)
    estimates, anchors = ahead(embeddings, features, 3), jnp.array([[1, 4], [2, 4]])
    for at in (0, 4):
        x = drafting.drafter.paired(embeddings[:, 1 : at + 2], features[:, : at + 1])
        x = jnp.concatenate([x, jnp.broadcast_to(drafting.drafter.slots[...], (2, 2, 32))], axis=1)
        places = jnp.broadcast_to(jnp.arange(at + 3), (2, at + 3))
        context = Context(drafting.drafter.rope(places), kv.bias(kv.causal(at + 3))[None, None])
        hidden = run_blocks(drafting.drafter.blocks, x, context)[0]
        for i in range(3):
            np.testing.assert_allclose(estimates[i][:, at], hidden[:, at + i], atol=3e-5)
    some = ahead(embeddings, features, 3, anchors=anchors)
    np.testing.assert_allclose(some[0], estimates[0], atol=1e-6)
    for i in (1, 2):
        np.testing.assert_allclose(some[i], estimates[i][np.arange(2)[:, None], anchors], atol=3e-5)


# From training to pictures, on the smallest model.

OBJECTIVE = Objective(guidance=2.0, soft=1.0, unroll=2, anchors=6, noise=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.write_bundle(tmp_path_factory.mktemp("model") / "small", drafter=False, cascade={"tree": "chain:2"})


@pytest.fixture(scope="module")
def rows(folder, tmp_path_factory):
    return distill.draw(
        cj.load(folder), tmp_path_factory.mktemp("data") / "drawn", ["a red ball on gravel"], count=10, batch=5, seed=0,
        sampling=SAMPLED, features=(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(folder, rows, tmp_path_factory):
    """A run of twelve steps: its folder, and what came out."""
    where = tmp_path_factory.mktemp("run") / "whole"
    return where, *fit(folder, rows, where)


def fit(folder, rows, where):
    return run.train(
        cj.load(folder), rows, where, kind="parallel", objective=OBJECTIVE, batch=4, steps=12, save_every=5,
        schedule=Schedule(rate=3e-3),
    )  # fmt: skip


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bits(folder, rows, finished, tmp_path, monkeypatch):
    make = Batches.__call__

    def until_eight(self, step):
        if step == 8:
            raise KeyboardInterrupt
        return make(self, step)

    monkeypatch.setattr(Batches, "__call__", until_eight)
    with pytest.raises(KeyboardInterrupt):
        fit(folder, rows, tmp_path)
    monkeypatch.undo()
    config, params = fit(folder, rows, tmp_path)
    assert config == finished[1]
    assert config.depth == 2
    jax.tree.map(np.testing.assert_array_equal, params, finished[2])
    record = log.read(finished[0] / "log.csv")
    assert record["loss"][-1] < record["loss"][0]
    assert "acceptance2" in record


@pytest.fixture(scope="module")
def made(folder, finished, tmp_path_factory):
    """The model with the trained drafter, and one whose own tree is too deep for it."""
    where = tmp_path_factory.mktemp("made") / "model"
    run.merge(folder, finished[0], where, dtype=jnp.float32)
    return where


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        [
            "generate",
            "a red ball",
            "--method",
            "eagle",
            "--tree",
            "full:2x2",
            "--verifier",
            "traversal",
            "--out",
            "OUT",
        ],
        ["export", "--method", "cascade", "--platforms", "cpu", "--out", "OUT"],
        ["distill", "--count", "2", "--batch", "2", "--features", "parallel", "--out", "OUT"],
        ["tune-tree", "--method", "eagle", "--count", "1", "--steps", "2", "--repeats", "1", "--most-drafts", "4"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_take_a_model_with_such_a_drafter(made, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = [str(tmp_path / "out") if word == "OUT" else word for word in arguments]
    assert cli.main([*given, "--model", str(made)]) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_a_tree_of_another_depth_is_one_line_and_status_2(folder, rows, made, tmp_path, capsys):
    out = str(tmp_path / "out")
    for arguments, message in (
        (["generate", "a red ball", "--model", str(made), "--method", "eagle", "--tree", "chain:3", "--out", out],
         "was trained to draft 2 levels, and the tree has 3: name one that is no deeper (--tree chain:2, say)"),
        (["generate", "a red ball", "--model", str(made), "--method", "lantern", "--out", out], "to draft 2 levels"),
        (["train", "--model", str(folder), "--data", str(rows.folder), "--drafter", "parallel", "--unroll", "1",
          "--out", out], "to draft 1 levels"),
        (["train", "--model", str(folder), "--data", str(rows.folder), "--drafter", "parallel", "--anchors", "0",
          "--out", out], "anchors must be at least 1, not 0"),
    ):  # fmt: skip
        assert cli.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert not (tmp_path / "out").exists()
