import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import FAST

from cascade_jax import cache, decode
from cascade_jax import tree as trees
from cascade_jax.cache import Context
from cascade_jax.sampling import Sampling, guide, warp
from cascade_jax.tree import DynamicTree

SMALL, DYNAMIC = trees.parse("0 1 00 01 10 000"), DynamicTree(top_k=4, rounds=2, drafts=12)
SAMPLED = Sampling(temperature=1.3, top_k=20, guidance=2.0)


@dataclasses.dataclass
class Plain:
    """The drafter without a cache: one causal pass over all pairs of a sequence, from the prefix to a draft."""

    tiny: object
    prefix: decode.Prefix
    state: decode.DecodeState

    def __post_init__(self):
        tiny, prefix, state = self.tiny, self.prefix, self.state
        self.batch, self.slots = len(state.count), prefix.embeddings.shape[1]
        self.count = np.asarray(state.count)
        tokens = state.tokens[:, : tiny.length]
        rows = jnp.concatenate([tokens] * 2)
        size = self.slots - 1 + tiny.length + 3
        self.embeddings = np.zeros((2 * self.batch, size, tiny.target.config.dim), np.float32)
        self.features = np.zeros_like(self.embeddings)
        # the pair at slot i: what stands at slot i + 1, and the target's feature at slot i
        embedded = jnp.concatenate([prefix.drafter_embeddings[:, 1:], tiny.target.embed(rows)], axis=1)
        known = tiny.features(prefix, tokens)
        self.embeddings[:, : embedded.shape[1]] = embedded
        self.features[:, : known.shape[1]] = known
        graph, params = nnx.split(tiny.drafter)

        @functools.partial(jax.jit, compiler_options=FAST)
        def forward(params, embeddings, features):
            drafter, size = nnx.merge(graph, params), features.shape[1]
            slots = jnp.broadcast_to(jnp.arange(size), features.shape[:2])
            causal = cache.bias(cache.causal(size))[None, None]
            return drafter(embeddings, features, Context(drafter.rope(slots), causal))[0]

        self.forward = functools.partial(forward, params)
        self.warp = jax.jit(warp)

    def __call__(self, path, settings=SAMPLED):
        """The drafter's distribution [B, V] after the path of tokens int [B, n] below the root."""
        embeddings, features = self.embeddings.copy(), self.features.copy()
        root = self.slots - 2 + self.count  # the root's pair is the last one known
        last = np.concatenate([root, root])
        every = np.arange(2 * self.batch)
        hidden = np.asarray(self.forward(embeddings, features))[every, last]
        for token in np.asarray(path).T.reshape(-1, self.batch):
            last = last + 1
            embeddings[every, last] = np.concatenate([np.asarray(self.tiny.target.embed(token))] * 2)
            features[every, last] = hidden
            hidden = np.asarray(self.forward(embeddings, features))[every, last]
        logits = self.tiny.target.logits(jnp.asarray(hidden)).reshape(2, self.batch, -1)
        return np.asarray(self.warp(guide(logits, settings.guidance), settings.checked()))


@pytest.fixture(scope="module")
def midway(tiny):
    """Four steps into a picture: rows have different counts, and pairs that the drafter has not taken in yet."""
    prefix = tiny.prefix(8)
    state = tiny.run(SMALL, tiny.start(SMALL, SAMPLED, prefix=prefix), SAMPLED, limit=4)
    assert len(np.unique(state.count)) > 2
    assert len(np.unique(state.drafter.pending)) > 1
    return prefix, state


def drafted(tiny, state, tree, settings=SAMPLED):
    graphs = nnx.graphdef(tiny.drafter), nnx.graphdef(tiny.target)

    @functools.partial(jax.jit, compiler_options=FAST)
    def go(params, memory, count, settings):
        drafter, target = nnx.merge(graphs[0], params["drafter"]), nnx.merge(graphs[1], params["target"])
        return drafter.propose(target, tree, memory, tiny.keys(8), settings, count)[0]

    return [
        jax.tree.map(np.asarray, go(tiny.params(tree), state.drafter, state.count, s.checked()))
        for s in (settings, settings.replace(temperature=0.0))
    ]


def test_a_static_trees_drafts_come_from_the_drafters_plain_forward_pass(tiny, midway):
    prefix, state = midway
    plain, (sampled, greedy) = Plain(tiny, prefix, state), drafted(tiny, state, SMALL)
    root = np.asarray(state.tokens)[np.arange(8), np.asarray(state.count) - 1]
    for drafts, settings in ((sampled, SAMPLED), (greedy, SAMPLED.replace(temperature=1.0))):
        np.testing.assert_array_equal(drafts.tokens[:, 0], root)
        for i, node in enumerate(SMALL.inner):
            above = np.flatnonzero(SMALL.topology.ancestors[node])[1:]
            probs = plain(drafts.tokens[:, above], settings)
            # float32 passes in different orders of summation
            np.testing.assert_allclose(drafts.probs[:, i], probs, atol=1e-4)
            born = drafts.tokens[:, SMALL.topology.children[node][SMALL.topology.children[node] >= 0]]
            assert np.all(np.take_along_axis(probs, born, axis=1) > 0)
            assert all(len(set(row)) == len(row) for row in born)
            if drafts is greedy:
                np.testing.assert_array_equal(born, np.argsort(-probs, axis=1)[:, : born.shape[1]])
    assert not np.array_equal(sampled.tokens, greedy.tokens)


def test_a_dynamic_tree_holds_the_likeliest_of_all_candidates(tiny, midway):
    prefix, state = midway
    plain, (drafts, greedy) = Plain(tiny, prefix, state), drafted(tiny, state, DYNAMIC)
    rows, k = np.arange(8), DYNAMIC.top_k

    def expand(paths, scores):
        """The k likeliest children of n nodes a row: paths [B, n * k, depth], scores [B, n * k]."""
        grown, values = [], []
        for n in range(scores.shape[1]):
            log_probs = np.log(plain(paths[:, n]) + 1e-30)
            best = np.argsort(-log_probs, axis=1)[:, :k]
            for rank in range(k):
                grown.append(np.concatenate([paths[:, n], best[:, rank, None]], axis=1))
                values.append(scores[:, n] + log_probs[rows, best[:, rank]])
        return np.stack(grown, 1), np.stack(values, 1)

    frontier, score = expand(np.zeros((8, 1, 0), int), np.zeros((8, 1)))
    candidates = [[(tuple(path), value) for path, value in zip(*row)] for row in zip(frontier, score)]
    for _ in range(DYNAMIC.rounds):
        grown, values = expand(frontier, score)
        for row, new in zip(candidates, zip(grown, values)):
            row += [(tuple(path), value) for path, value in zip(*new)]
        best = np.argsort(-values, axis=1)[:, :k]
        frontier, score = grown[rows[:, None], best], np.take_along_axis(values, best, axis=1)

    for row in range(8):
        expected = dict(sorted(candidates[row], key=lambda c: -c[1])[: DYNAMIC.drafts])
        topology = jax.tree.map(lambda x: x[row], drafts.topology)
        tokens, paths = drafts.tokens[row], {0: ()}
        for node in range(1, DYNAMIC.num_nodes):
            parent = topology.parents[node]
            assert parent < node
            paths[node] = (*paths[parent], int(tokens[node]))
            assert topology.depths[node] == len(paths[node])
            assert np.array_equal(
                topology.ancestors[node], topology.ancestors[parent] | (np.arange(DYNAMIC.num_nodes) == node)
            )
        assert {path for path in paths.values() if path} == set(expected)
        for node, children in enumerate(topology.children):
            born = [child for child in children if child >= 0]
            assert sorted(born) == [n for n in paths if topology.parents[n] == node and n]
            chances = [expected[paths[child]] for child in born]
            assert chances == sorted(chances, reverse=True)
    np.testing.assert_array_equal(greedy.tokens.shape, drafts.tokens.shape)
    assert any(
        not np.array_equal(a, b) for a, b in itertools.pairwise(drafts.topology.parents)
    )  # trees differ between rows
