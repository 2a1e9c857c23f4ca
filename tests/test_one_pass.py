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
from cascade_jax import cli, decode
from cascade_jax import tree as trees
from cascade_jax.cache import Context
from cascade_jax.drafters.hydra import Hydra, HydraConfig
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


KINDS = {"parallel": (ParallelConfig, Parallel), "hydra": (HydraConfig, Hydra)}


def one_pass(tiny: Tiny, kind: str, depth: int, scale: float) -> Tiny:
    """The model under a drafter in one pass that is the other one's network, and otherwise large enough to matter."""
    own, (config, module) = tiny.drafter.config, KINDS[kind]
    drafter = module(
        config(own.block, grid=own.grid, condition_slots=own.condition_slots, depth=depth), rngs=nnx.Rngs(9)
    )
    nnx.update(drafter, nnx.state(tiny.drafter))
    drafter.slots[...] *= scale / 0.02
    if kind == "hydra":
        for matrix in (drafter.join, drafter.joined):
            matrix.kernel[...] *= matrix.kernel.shape[0] ** -0.5 / 0.02
    return dataclasses.replace(tiny, drafter=drafter)


@pytest.fixture(scope="module", params=["parallel", pytest.param("hydra", marks=pytest.mark.slow)])
def drafting(request, tiny) -> Tiny:
    return one_pass(tiny, request.param, 3, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("tree", [SMALL, DYNAMIC], ids=str)
def test_strict_greedy_decoding_is_the_autoregressive_sequence(tiny, drafting, tree):
    expected, got = tiny.generate(trees.ROOT, GREEDY), drafting.generate(tree, GREEDY)
    np.testing.assert_array_equal(got.tokens[:, :16], expected.tokens[:, :16])
    np.testing.assert_array_equal(got.stats.steps + got.stats.accepted, 15)
    assert np.sum(got.stats.accepted) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "verifier"), [("parallel", "walk"), ("parallel", "traversal"), ("hydra", "walk")])
def test_strict_decoding_has_the_law_of_the_target_over_several_steps(tiniest, kind, verifier):
    """All 625 outputs of 4 tokens: siblings are drawn without replacement, cousins from the same law or their own."""
    steps = assert_law(one_pass(tiniest, kind, 2, 1.0), trees.parse("0 1 2 00 01 10"), verifier)
    assert np.bincount(steps, minlength=4)[1:].min() > 0.01 * len(steps)


@pytest.fixture(scope="module")
def midway(drafting):
    """Four steps into a picture: rows have different counts, and pairs that the drafter has not taken in yet."""
    prefix = drafting.prefix(8)
    state = drafting.run(SMALL, drafting.start(SMALL, SAMPLED, prefix=prefix), SAMPLED, limit=4)
    assert len(np.unique(state.drafter.pending)) > 1
    return prefix, state


@dataclasses.dataclass
class Plain:
    """The drafter without a cache: its levels from one causal pass a row, over all pairs and slots behind them."""

    drafting: Tiny
    prefix: decode.Prefix
    state: decode.DecodeState

    def __post_init__(self):
        drafting, prefix, state = self.drafting, self.prefix, self.state
        graph, params = nnx.split(drafting.drafter)
        tokens = state.tokens[:, : drafting.length]
        embedded = drafting.target.embed(jnp.concatenate([tokens] * 2))
        embedded = jnp.concatenate([prefix.drafter_embeddings[:, 1:], embedded], axis=1)
        features = drafting.features(prefix, tokens)

        @functools.partial(jax.jit, compiler_options=FAST)
        def levels(params, embedded, features):
            drafter, rows = nnx.merge(graph, params), len(features)
            x = drafter.paired(embedded, features)
            slots = jnp.broadcast_to(drafter.slots[...], (rows, drafter.depth - 1, x.shape[-1]))
            return causal_pass(drafter, jnp.concatenate([x, slots], axis=1))[:, -drafter.depth :]

        found = []
        for row, count in enumerate(np.asarray(state.count)):
            pairs, both = prefix.embeddings.shape[1] - 1 + count, np.array([row, row + 8])
            found.append(levels(params, embedded[both, :pairs], features[both, :pairs]))
        self.levels = jnp.stack(found, axis=1)  # [2, B, D, d]
        self.warp = jax.jit(warp)

    def __call__(self, depth, above):
        """The law [B, V] behind nodes of this depth whose tokens are `above`, int [B]."""
        hidden = self.levels[:, :, depth]
        if depth and isinstance(self.drafting.drafter, Hydra):
            hidden = self.drafting.drafter.told(hidden, jnp.stack([self.drafting.target.embed(above)] * 2))
        logits = guide(self.drafting.target.logits(hidden), SAMPLED.guidance)
        return np.asarray(self.warp(logits, SAMPLED.checked()))


def causal_pass(drafter, x):
    places = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    context = Context(drafter.rope(places), kv.bias(kv.causal(x.shape[1]))[None, None])
    return run_blocks(drafter.blocks, x, context)[0]


def born(drafts, node):
    """The tokens [B, n] of a node's children."""
    children = SMALL.topology.children[node]
    return drafts.tokens[:, children[children >= 0]]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), compiler_options=FAST)
def _propose(program, graph, tree, shared, params, memory, keys, settings, count, noise):
    drafter, target = nnx.merge(program, params["drafter"]), nnx.merge(graph, params["target"])
    return drafter.propose(target, tree, memory, keys, settings, count, noise=noise if shared else None)[0]


def drafted(drafting, state, tree, settings=SAMPLED, noise=None):
    graphs = nnx.graphdef(drafting.drafter), nnx.graphdef(drafting.target)
    arguments = drafting.params(tree), state.drafter, drafting.keys(8), settings.checked(), state.count, noise
    return jax.tree.map(np.asarray, _propose(*graphs, tree, noise is not None, *arguments))


def test_a_static_trees_drafts_come_from_the_laws_of_a_plain_pass(drafting, midway):
    plain, state = Plain(drafting, *midway), midway[1]
    sampled, greedy = drafted(drafting, state, SMALL), drafted(drafting, state, SMALL, GREEDY)
    for drafts in (sampled, greedy):
        for i, node in enumerate(SMALL.inner):
            law, new = plain(SMALL.depths[node], drafts.tokens[:, node]), born(drafts, node)
            np.testing.assert_allclose(drafts.probs[:, i], law, atol=1e-4)  # float32 in other orders of summation
            assert np.all(np.take_along_axis(law, new, axis=1) > 0)
            assert all(len(set(row)) == len(row) for row in new)
            if drafts is greedy:
                np.testing.assert_array_equal(new, np.argsort(-law, axis=1)[:, : new.shape[1]])
    same = [np.abs(sampled.probs[:, i] - sampled.probs[:, 1]).max() < 1e-6 for i in (0, 2)]
    assert same == [False, not isinstance(drafting.drafter, Hydra)]  # levels differ; nodes of one if they are told
    assert not np.array_equal(born(sampled, 1)[:, 0], born(sampled, 2)[:, 0])  # draws of their own in any case


def test_drafts_by_the_targets_noise_are_what_it_makes_of_the_laws(drafting, midway):
    plain, noise = Plain(drafting, *midway), jax.random.gumbel(jax.random.key(3), (8, 4, 40))
    drafts = drafted(drafting, midway[1], SMALL, noise=noise)
    for node in SMALL.inner:
        depth, new = SMALL.depths[node], born(drafts, node)
        with np.errstate(divide="ignore"):
            scores = np.log(plain(depth, drafts.tokens[:, node])) + np.asarray(noise)[:, depth]
        np.testing.assert_array_equal(new, np.argsort(-scores, axis=1)[:, : new.shape[1]])


@pytest.mark.slow
def test_a_dynamic_tree_holds_the_likeliest_of_all_paths(drafting, midway):
    plain, drafts = Plain(drafting, *midway), drafted(drafting, midway[1], DYNAMIC)
    tokens, scores, found = np.zeros((8, 1), int), np.ones((8, 1)), []
    for depth in range(3):
        laws = np.stack([plain(depth, column) for column in tokens.T], axis=1)
        best = np.argsort(-laws, axis=-1)[..., :4]
        grown = (scores[..., None] * np.take_along_axis(laws, best, axis=-1)).reshape(8, -1)
        found.append(grown)
        kept = np.argsort(-grown, axis=1)[:, :4]
        tokens, scores = (np.take_along_axis(x.reshape(8, -1), kept, axis=1) for x in (best, grown))
    expected = -np.sort(-np.concatenate(found, axis=1), axis=1)[:, : DYNAMIC.drafts]
    got, rows = [np.ones(8)], np.arange(8)
    for node in range(1, DYNAMIC.num_nodes):
        parent, depth = drafts.topology.parents[:, node], drafts.topology.depths[:, node]
        above = drafts.tokens[rows, parent]
        laws = np.stack([plain(level, above) for level in range(3)])
        got.append(np.stack(got)[parent, rows] * laws[depth - 1, rows, drafts.tokens[:, node]])
    np.testing.assert_allclose(-np.sort(-np.stack(got[1:], axis=1), axis=1), expected, rtol=1e-3)


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
    drafter = drafting.drafter
    for at in (0, 4):
        x = drafter.paired(embeddings[:, 1 : at + 2], features[:, : at + 1])
        x = jnp.concatenate([x, jnp.broadcast_to(drafter.slots[...], (2, 2, 32))], axis=1)
        hidden = jax.jit(lambda x: causal_pass(drafter, x), compiler_options=FAST)(x)
        for i in range(3):
            level = hidden[:, at + i]
            if i and isinstance(drafter, Hydra):
                level = drafter.told(level, embeddings[:, at + 1 + i])
            np.testing.assert_allclose(estimates[i][:, at], level, atol=3e-5)
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
