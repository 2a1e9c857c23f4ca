import jax
import numpy as np
import pytest

import cascade_jax as cj
from cascade_jax import tree as trees
from cascade_jax.tree import DynamicTree, Tree

SHAPES = {
    "root": trees.ROOT,
    "chain": trees.chain(4),
    "full": trees.full(3, 2),
    "eagle": trees.EAGLE_25,
    "lantern++": trees.LANTERNPP_57,
    "lopsided": Tree.from_choices([[0], [1], [1, 0], [1, 1], [1, 1, 0]]),
}


def test_nodes_are_ordered_by_depth_and_path_whatever_the_order_of_the_list():
    assert Tree.from_choices([[0], [1], [0, 0]]).parents == (-1, 0, 0, 1)
    shuffled = Tree.from_choices([[1, 0], [0, 1], [1], [0, 0], [0]])
    assert shuffled.paths == ((), (0,), (1,), (0, 0), (0, 1), (1, 0))
    assert shuffled == Tree.from_choices(iter([(0,), (1,), (0, 0), (0, 1), (1, 0)]))


@pytest.mark.parametrize(
    ("tree", "drafts", "depth", "width"),
    [
        (trees.ROOT, 0, 0, 0),
        (trees.EAGLE_25, 25, 5, 4),
        (trees.LANTERNPP_57, 57, 5, 5),
        (trees.chain(7), 7, 7, 1),
        (trees.full(3, 2), 12, 2, 3),
        (trees.full(4, 1), 4, 1, 4),
    ],
)
def test_presets_have_the_published_sizes(tree, drafts, depth, width):
    assert (tree.num_nodes, tree.depth, tree.width) == (drafts + 1, depth, width)
    assert str(tree) == f"{drafts} drafts, depth {depth}"


def test_the_eagle_tree_has_the_published_nodes_by_level():
    assert [len(level) for level in trees.EAGLE_25.levels] == [1, 4, 8, 8, 3, 2]
    assert [len(level) for level in trees.LANTERNPP_57.levels] == [1, 5, 13, 16, 14, 9]
    parents = "0000 11122334 55566778 DDD LL"  # one digit or letter a node, A for 10
    assert [int(p, 36) for p in parents.replace(" ", "")] == list(trees.EAGLE_25.parents[1:])


@pytest.mark.parametrize("tree", SHAPES.values(), ids=SHAPES)
def test_every_constant_follows_from_the_paths(tree):
    paths, index = tree.paths, {path: node for node, path in enumerate(tree.paths)}
    topology = tree.topology
    assert list(paths) == sorted(paths, key=lambda path: (len(path), path))
    assert list(topology.parents) == [index[path[:-1]] if path else -1 for path in paths]
    assert list(topology.depths) == list(tree.depths) == [len(path) for path in paths]
    assert topology.depth == tree.depth == max(tree.depths)
    for node, path in enumerate(paths):
        for other, prefix in enumerate(paths):
            assert topology.ancestors[node, other] == (path[: len(prefix)] == prefix)
        children = [index.get((*path, rank), -1) for rank in range(tree.width)]
        assert list(topology.children[node]) == children
        assert (node in tree.inner) == any(child > 0 for child in children)
    assert [node for level in tree.levels for node in level] == list(range(tree.num_nodes))
    assert all(tree.depths[node] == depth for depth, level in enumerate(tree.levels) for node in level)


def test_equal_trees_are_one_static_argument():
    assert len({trees.parse("0 1 00"), Tree.from_choices([[0], [0, 0], [1]]), trees.chain(2)}) == 2
    assert cj.Tree is Tree
    assert cj.trees.EAGLE_25 is trees.EAGLE_25


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "at least one path"),
        ([[0], []], r"the path \[\] is the root"),
        ([[0], [0, -1]], r"path \[0, -1\] has a negative"),
        ([[0], [1], [0]], r"path \[0\] is there twice"),
        ([[0], [1, 0]], r"path \[1, 0\] lacks its parent \[1\]"),
        ([[0], [0, 0, 0]], r"path \[0, 0, 0\] lacks its parent \[0, 0\]"),
        ([[1]], r"path \[1\] lacks its elder sibling \[0\]"),
        ([[0], [0, 0], [0, 2]], r"path \[0, 2\] lacks its elder sibling \[0, 1\]"),
    ],
)
def test_a_list_that_is_no_tree_is_refused_by_the_name_of_its_path(paths, message):
    with pytest.raises(ValueError, match=message):
        Tree.from_choices(paths)


@pytest.mark.parametrize(
    "make",
    [
        lambda: trees.chain(0),
        lambda: trees.full(0, 2),
        lambda: trees.full(2, 0),
        lambda: DynamicTree(0, 1, 1),
        lambda: DynamicTree(2, -1, 1),
        lambda: DynamicTree(2, 1, 0),
        lambda: DynamicTree(2, 1, 7),
    ],
)
def test_impossible_sizes_are_refused(make):
    with pytest.raises(ValueError):
        make()


def test_a_dynamic_tree_is_eagle_2s_by_default():
    tree = DynamicTree()
    assert (tree.top_k, tree.rounds, tree.drafts) == (10, 4, 59)
    assert (tree.num_nodes, tree.depth) == (60, 5)
    assert tree == trees.EAGLE_2
    assert hash(tree) == hash(trees.EAGLE_2)
    assert str(tree) == "59 drafts, depth at most 5, dynamic"
    assert DynamicTree(2, 1, 6).num_nodes == 7  # all of its 2 + 4 candidates


def test_arrays_of_a_topology_are_constants_of_the_program():
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(trees.EAGLE_25.topology))
