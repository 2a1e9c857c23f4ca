"""docs/engine.md does what it says: its blocks run, in order, as they stand, and its requests have the model's law."""

import itertools
import pathlib
import re

import chains
import jax
import numpy as np
import pytest

import cascade_jax as cj
from cascade_jax import trees

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "engine.md"


@pytest.fixture(scope="module")
def engine():
    running = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S):
        exec(compile(block, PAGE.name, "exec"), running)
    return running


def law(model, prompt, length):
    """The probabilities [V] * length of all that the model writes behind a prompt, token by token."""
    last, seen = (np.asarray(model[name], np.float64) for name in ("last", "seen"))

    def after(tokens):
        logits = last[tokens[-1]] + np.bincount(tokens, minlength=len(last)) @ seen
        return np.exp(logits) / np.exp(logits).sum()

    made = np.ones([len(last)] * length)
    for output in itertools.product(range(len(last)), repeat=length):
        for place, token in enumerate(output):
            made[output] *= after([*prompt, *output[:place]])[token]
    return made


@pytest.mark.slow
def test_every_request_of_a_ragged_batch_has_the_models_law(engine):
    """All 9 outputs of the first two tokens, which one step may write or two."""
    seeds = jax.random.split(jax.random.key(1), 20_000)
    outputs, counts = jax.tree.map(np.asarray, jax.jit(jax.vmap(engine["serve"]))(seeds))
    assert counts[:, 2].max() == 2 and (counts[:, :2].mean(axis=0) > 2.2).all()  # drafts are accepted
    for row, prompt in enumerate(engine["PROMPTS"]):
        came = np.bincount(outputs[:, row, :2] @ [3, 1], minlength=9)
        assert chains.pvalue(came, law(engine["model"], prompt, 2)) > 1e-3
    # another request's law would show
    came = np.bincount(outputs[:, 0, :2] @ [3, 1], minlength=9)
    assert chains.pvalue(came, law(engine["model"], engine["PROMPTS"][1], 2)) < 1e-6


@pytest.mark.slow
def test_a_relaxed_rule_takes_the_same_place(engine):
    seeds = jax.random.split(jax.random.key(1), 500)
    relaxed = jax.jit(jax.vmap(lambda seed: engine["serve"](seed, rule=cj.cascade(-1.0, -1.0, 9.0))))(seeds)
    strict = jax.jit(jax.vmap(engine["serve"]))(seeds)
    assert np.mean(relaxed[1]) > np.mean(strict[1])


def test_a_tree_as_data_is_the_tree():
    for tree in (trees.EAGLE_25, trees.chain(3), trees.full(2, 2)):
        size = tree.num_nodes + 3  # three that do not exist
        parents = np.full(size, -1)
        parents[: tree.num_nodes] = tree.parents
        made = jax.jit(trees.topology_of, static_argnums=(1, 2))(parents, tree.width + 1, tree.depth)
        for name in ("parents", "depths"):
            np.testing.assert_array_equal(getattr(made, name)[: tree.num_nodes], getattr(tree.topology, name))
        np.testing.assert_array_equal(made.children[: tree.num_nodes, :-1], tree.topology.children)
        np.testing.assert_array_equal(made.children[tree.num_nodes :], -1)
        np.testing.assert_array_equal(made.ancestors[: tree.num_nodes, : tree.num_nodes], tree.topology.ancestors)
        np.testing.assert_array_equal(made.ancestors[tree.num_nodes :], np.eye(size)[tree.num_nodes :])
