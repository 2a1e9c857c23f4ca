"""What drafters are trained on: training-time test against plain passes, the loss against NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import FAST

from cascade_jax import cache as kv
from cascade_jax.cache import Context
from cascade_jax.models.prompt import Prompt
from cascade_jax.training import drafter as recipe
from cascade_jax.training.drafter import Objective

BATCH, LENGTH, PREFIX = 3, 16, 5


@pytest.fixture(scope="module", params=["eagle1", "eagle3", "parallel", pytest.param("hydra", marks=pytest.mark.slow)])
def kind(request):
    return request.param


@dataclasses.dataclass
class Case:
    """A drafter of a kind for the tiny target, and a batch with kept features."""

    graphs: recipe.Graphs
    target: nnx.State
    params: nnx.State
    batch: dict

    def loss(self, objective, batch=None, key=0):
        arguments = self.params, self.batch if batch is None else batch, jax.random.key(key), self.target
        return _loss(self.graphs, objective, *arguments)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=FAST)
def _loss(graphs, objective, *arguments):
    return recipe.drafter_loss(graphs, objective, *arguments)


@pytest.fixture(scope="module")
def case(tiny, kind) -> Case:
    config = recipe.sizes(kind, tiny.target.config)
    graph, params = recipe.start(config, 1)
    rng = np.random.default_rng(0)
    for _, leaf in nnx.to_flat_state(params):  # larger than they start, so that everything matters
        if leaf.ndim > 1:
            leaf[...] = jnp.asarray(rng.normal(0, leaf.shape[0] ** -0.5, leaf.shape), jnp.float32)
    target_graph, target = nnx.split(tiny.target)
    graphs = recipe.Graphs(target_graph, graph, config.taps)
    prompts = Prompt(features=rng.normal(size=(BATCH, PREFIX, 8)).astype(np.float32))
    tokens = rng.integers(40, size=(BATCH, LENGTH)).astype(np.int32)

    @functools.partial(jax.jit, compiler_options=FAST)
    def features(target, prompts, tokens):
        module = nnx.merge(target_graph, target)
        return recipe.branch_features(module, recipe.prefix_of(graphs, module, None, prompts), tokens, config.taps)

    batch = {
        "tokens": tokens,
        "prompts": prompts,
        "row": np.arange(BATCH, dtype=np.int32),
        "unconditional": np.array([False, True, False]),
        "features": features(target, prompts, tokens),
    }
    return Case(graphs, target, params, batch)


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def _ahead(graph, params, embeddings, features):
    return nnx.merge(graph, params).ahead(embeddings, features, 3)


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def _plain(graph, params, embeddings, features):
    """One causal pass over pairs [R, n, d], the first at slot 0."""
    drafter, (rows, size, _) = nnx.merge(graph, params), features.shape
    slots = jnp.broadcast_to(jnp.arange(size), (rows, size))
    return drafter(embeddings, features, Context(drafter.rope(slots), kv.bias(kv.causal(size))[None, None]))[0]


@pytest.mark.parametrize("kind", ["eagle1", "eagle3"], indirect=True)
def test_every_position_of_training_time_test_is_a_chain_drafted_there(case):
    rng, graph = np.random.default_rng(1), case.graphs.drafter
    embeddings = rng.normal(size=(2, 9, 32)).astype(np.float32)
    read = rng.normal(size=(2, 8, 32 * max(1, len(case.graphs.taps)))).astype(np.float32)
    fused = np.asarray(nnx.merge(graph, case.params).fuse(read))
    estimates = _ahead(graph, case.params, embeddings, read)
    for at in (0, 4):
        pairs, features = np.zeros((2, 8, 32), np.float32), np.zeros((2, 8, 32), np.float32)
        pairs[:, : at + 1], features[:, : at + 1] = embeddings[:, 1 : at + 2], fused[:, : at + 1]
        for i in range(3):
            hidden = np.asarray(_plain(graph, case.params, pairs, features))[:, at + i]
            np.testing.assert_allclose(estimates[i][:, at], hidden, atol=3e-5)
            if at + i + 1 < 8:
                pairs[:, at + i + 1], features[:, at + i + 1] = embeddings[:, at + i + 2], hidden


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _expected(case, objective):
    """The loss in NumPy, from the drafter's estimates; and the share of positions that weigh more."""
    target, drafter = nnx.merge(case.graphs.target, case.target), nnx.merge(case.graphs.drafter, case.params)
    kept, tokens = np.asarray(case.batch["features"]), case.batch["tokens"]
    guided = objective.guidance is not None
    if guided:
        kept = np.concatenate([kept[:, 0], kept[:, 1]])
        everywhere = np.concatenate([tokens, tokens])
    else:
        kept = np.stack([row[int(free)] for row, free in zip(kept, case.batch["unconditional"])])
        everywhere = tokens
    taps = len(case.graphs.taps)
    features, read = (kept, kept) if not taps else (kept[..., :32], kept[..., 32:])
    filler = np.broadcast_to(target.embed(jnp.int32(0)), (len(kept), PREFIX, 32))
    embeddings = np.concatenate([filler, target.embed(jnp.asarray(everywhere[:, :-1]))], axis=1)
    estimates = drafter.ahead(jnp.asarray(embeddings), read[:, :-1], objective.unroll)

    def head(x, drafted):
        logits = np.asarray(drafter.logits(x, target) if drafted else target.logits(x), np.float64)
        if guided:
            logits = logits[BATCH:] + objective.guidance * (logits[:BATCH] - logits[BATCH:])
        return logits

    true = features[:, PREFIX:]  # yields the second token and those behind it
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    total, converged = 0.0, []
    for i in range(objective.unroll):
        soft, hard, count = 0.0, 0.0, 0
        estimate = np.asarray(estimates[i])[:, PREFIX - 1 : PREFIX - 1 + LENGTH - 1 - i]
        q, p = _softmax(head(jnp.asarray(true[:, i:]), False)), _softmax(head(jnp.asarray(estimate), True))
        for row in range(BATCH):
            for k in range(LENGTH - 1 - i):
                here = true[row, i + k]
                ahead = i + k + 1 < LENGTH - 1 and cosine(here, true[row, i + k + 1]) >= objective.tau_seq
                weight = objective.convergence_weight if ahead else 1.0
                converged += [ahead] * (i == 0)
                soft -= weight * np.sum(q[row, k] * np.log(p[row, k]))
                hard -= np.log(p[row, k, tokens[row, 1 + i + k]])
                count += 1
        error = np.abs(estimate - true[:, i:])
        feature = np.mean(np.where(error < 1, 0.5 * error**2, error - 0.5))
        step = (objective.soft * soft + objective.hard * hard) / count + objective.feature * feature
        total += objective.unroll_decay**i * step
    return total, np.mean(converged)


OBJECTIVES = {
    "eagle1": [
        Objective(noise=0.0, convergence_weight=2.0, tau_seq=0.1),
        Objective(noise=0.0, convergence_weight=2.0, tau_seq=0.1, guidance=2.0, hard=0.3),
    ],
    "eagle3": [
        Objective(noise=0.0, soft=1.0, feature=0.0, unroll=3, convergence_weight=2.0, tau_seq=0.1, guidance=2.0)
    ],
    "parallel": [Objective(noise=0.0, soft=1.0, unroll=3, convergence_weight=2.0, tau_seq=0.1, guidance=2.0)],
}


def test_the_loss_is_the_papers(case, kind):
    for objective in OBJECTIVES[kind]:
        got, metrics = case.loss(objective)
        expected, converged = _expected(case, objective)
        np.testing.assert_allclose(got, expected, rtol=2e-5)
        np.testing.assert_allclose(metrics["converged"], converged, rtol=1e-6)
        assert 0 < metrics["acceptance"] < 1
        assert metrics["top1"] <= metrics["top2"] <= metrics["top3"]


def test_features_computed_in_the_step_give_the_loss_of_kept_ones(case, kind):
    objective = OBJECTIVES[kind][-1]
    without = {name: value for name, value in case.batch.items() if name != "features"}
    np.testing.assert_allclose(case.loss(objective, without)[0], case.loss(objective)[0], rtol=1e-5)


def test_a_weight_of_one_is_exactly_the_standard_drafter(case, kind):
    objective = OBJECTIVES[kind][0]
    standard = dataclasses.replace(objective, convergence_weight=1.0)
    loss = case.loss(standard)[0]
    np.testing.assert_allclose(loss, _expected(case, standard)[0], rtol=2e-5)
    # a threshold that nothing reaches: another program, whose weights are all 1, up to float32's rounding
    np.testing.assert_allclose(case.loss(dataclasses.replace(objective, tau_seq=2.0))[0], loss, rtol=1e-6)
    assert case.loss(objective)[0] > loss  # features of these tokens do converge somewhere


def test_rematerialised_gradients_are_the_same_and_reach_everything(case, kind):
    @functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
    def gradient(remat):
        objective = dataclasses.replace(OBJECTIVES[kind][0], remat=remat, unroll=2)
        arguments = case.batch, jax.random.key(0), case.target
        return jax.grad(lambda p: recipe.drafter_loss(case.graphs, objective, p, *arguments)[0])(case.params)

    kept, again = gradient(False), gradient(True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), kept, again)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(kept))


OBJECTIVES["hydra"] = OBJECTIVES["parallel"]


def anchored(case, kind, count, key=0):
    objective = dataclasses.replace(OBJECTIVES[kind][0], unroll=2, anchors=count)
    return case.loss(objective, key=key)[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eagle3", "parallel"], indirect=True)
def test_anchors_are_some_of_all_places(case, kind):
    everywhere = anchored(case, kind, None)
    np.testing.assert_allclose(anchored(case, kind, 99), everywhere, rtol=1e-5)  # as many as there are
    # a half of the 14 places, one of every two neighbours: on average they are all
    some = [anchored(case, kind, 7, key) for key in range(64)]
    assert np.std(some) > 0
    np.testing.assert_allclose(np.mean(some), everywhere, atol=4 * np.std(some) / 8)


def test_anchors_spread_over_all_places():
    drawn = np.array([recipe._anchors(4, 10, jax.random.key(seed)) for seed in range(50)])
    assert set(drawn.ravel()) == set(range(10))
    assert np.all(np.diff(drawn, axis=1) > 0)
    np.testing.assert_array_equal(recipe._anchors(20, 10, jax.random.key(0)), np.arange(10))


@pytest.mark.parametrize("kind", ["eagle1", "parallel"], indirect=True)  # EAGLE-3 is trained without noise
def test_a_rows_noise_depends_on_its_number_alone(case, kind):
    objective = Objective(noise=5.0, guidance=2.0)
    first = case.loss(objective)[0]
    assert case.loss(objective, key=1)[0] != first
    turned = jax.tree.map(lambda x: x[np.array([2, 0, 1])], case.batch)
    np.testing.assert_allclose(case.loss(objective, turned)[0], first, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unroll": 0}, "unroll must be at least 1"),
        ({"anchors": 0}, "anchors must be at least 1"),
        ({"soft": -1.0}, "soft must be at least 0"),
        ({"unconditional": 1.5}, "a share between 0 and 1"),
        ({"dtype": "float16"}, "float32 or bfloat16"),
    ],
)
def test_impossible_objectives_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Objective(**settings)
