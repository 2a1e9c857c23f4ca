"""Draft trees: which tokens are proposed in one step, and under which others.

Node 0 is the root: the last token that is part of the output but not yet in the target's cache. Every other node is a
draft token. Nodes are ordered by (depth, path). Two kinds of tree exist:

- `Tree`, static: its topology is a hashable, trace-time constant, so masks derived from it are literals of the program.
- `DynamicTree`, EAGLE-2's: only its size is fixed; its topology is found while drafting.

Both reach verification as a `Topology`, the same arrays, constants in one case and data in the other.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class Topology:
    """A tree of N nodes as arrays.

    Attributes:
      parents: int [N], the parent's node id; -1 at the root.
      depths: int [N], 0 at the root.
      children: int [N, W], node ids by child rank, -1 where there is none.
      ancestors: bool [N, N], [n, m] true where m is n or one of n's ancestors: n's row of the attention mask.
      depth: the largest depth that can occur (static).
    """

    parents: jax.Array
    depths: jax.Array
    children: jax.Array
    ancestors: jax.Array
    depth: int = struct.field(pytree_node=False)


@dataclass(frozen=True)
class Tree:
    """A static tree, given by its nodes' parents (see `from_choices` for the usual way to write one).

    Attributes:
      parents: the parent's node id of every node, in (depth, path) order; -1 for the root, node 0.
    """

    parents: tuple[int, ...]

    @classmethod
    def from_choices(cls, paths: Iterable[Sequence[int]]) -> "Tree":
        """The tree whose nodes are `paths`, each a list of child ranks from the root: [0], [1], [0, 0], ...

        Raises:
          ValueError: if there is no path, or a path is empty, negative, doubled, or lacks its parent or elder sibling.
        """
        nodes = [tuple(int(rank) for rank in path) for path in paths]
        if not nodes:
            raise ValueError("a tree needs at least one path, for example [[0]]")
        known = set()
        for path in sorted(nodes, key=lambda path: (len(path), path)):
            if not path:
                raise ValueError("the path [] is the root, which every tree has: leave it out")
            if min(path) < 0:
                raise ValueError(f"path {list(path)} has a negative child rank")
            if path in known:
                raise ValueError(f"path {list(path)} is there twice")
            if len(path) > 1 and path[:-1] not in known:
                raise ValueError(f"path {list(path)} lacks its parent {list(path[:-1])}")
            if path[-1] > 0 and (*path[:-1], path[-1] - 1) not in known:
                raise ValueError(f"path {list(path)} lacks its elder sibling {[*path[:-1], path[-1] - 1]}")
            known.add(path)
        order = [(), *sorted(known, key=lambda path: (len(path), path))]
        index = {path: node for node, path in enumerate(order)}
        return cls((-1, *(index[path[:-1]] for path in order[1:])))

    @property
    def num_nodes(self) -> int:
        """Number of nodes, the root included."""
        return len(self.parents)

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """Every node's path of child ranks; () for the root."""
        paths, born = [()], [0] * self.num_nodes
        for parent in self.parents[1:]:
            paths.append((*paths[parent], born[parent]))
            born[parent] += 1
        return tuple(paths)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Every node's depth; 0 for the root."""
        return tuple(len(path) for path in self.paths)

    @property
    def depth(self) -> int:
        """The deepest node's depth: the most drafts that one step can accept."""
        return max(self.depths)

    @cached_property
    def width(self) -> int:
        """The largest number of children."""
        return max((self.parents.count(node) for node in range(self.num_nodes)), default=0)

    @cached_property
    def inner(self) -> tuple[int, ...]:
        """Ids of the nodes that have children."""
        return tuple(sorted(set(self.parents[1:])))

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Node ids by depth."""
        nodes = range(self.num_nodes)
        return tuple(tuple(n for n in nodes if self.depths[n] == d) for d in range(self.depth + 1))

    @cached_property
    def topology(self) -> Topology:
        """The tree as NumPy arrays: constants of whatever program they are used in."""
        size = self.num_nodes
        children = np.full((size, self.width), -1, np.int32)
        ancestors = np.eye(size, dtype=bool)
        for node in range(1, size):
            parent = self.parents[node]
            children[parent, self.paths[node][-1]] = node
            ancestors[node] |= ancestors[parent]
        parents, depths = np.array(self.parents, np.int32), np.array(self.depths, np.int32)
        return Topology(parents, depths, children, ancestors, self.depth)

    def __str__(self) -> str:
        return f"{self.num_nodes - 1} drafts, depth {self.depth}"


@dataclass(frozen=True)
class DynamicTree:
    """EAGLE-2's tree (Li et al. 2024, arXiv 2406.16858): fixed size, topology found while drafting.

    Attributes:
      top_k: children proposed under every expanded node, and nodes expanded in every round.
      rounds: how often the best `top_k` nodes are expanded after the root.
      drafts: how many of all candidates, by cumulative log probability, are kept.
    """

    top_k: int = 10
    rounds: int = 4
    drafts: int = 59

    def __post_init__(self):
        candidates = self.top_k + self.rounds * self.top_k**2
        if self.top_k < 1 or self.rounds < 0 or not 1 <= self.drafts <= candidates:
            raise ValueError(
                f"a dynamic tree with top_k {self.top_k} and {self.rounds} rounds has {candidates} candidates"
            )

    @property
    def num_nodes(self) -> int:
        """Number of nodes, the root included."""
        return self.drafts + 1

    @property
    def depth(self) -> int:
        """The largest depth that a node can have."""
        return self.rounds + 1

    def __str__(self) -> str:
        return f"{self.drafts} drafts, depth at most {self.depth}, dynamic"


def topology_of(parents: jax.Array, width: int, depth: int) -> Topology:
    """A tree that is data: found while drafting, or one request's among several, padded to the size of the largest.

    Args:
      parents: int [N], every node's parent, which stands before it; -1 at the root and where there is no node. Elder
        siblings stand before younger ones.
      width: the largest number of children.
      depth: the largest depth.
    """
    parents = jnp.asarray(parents)
    nodes = jnp.arange(len(parents))
    ancestors = ancestors_of(parents, depth)
    elder = (parents[:, None] == parents) & (nodes < nodes[:, None])
    place = jnp.where(parents >= 0, parents, len(parents)), jnp.sum(elder, axis=1)
    children = jnp.full((len(parents), width), -1).at[place].set(nodes, mode="drop")
    return Topology(parents, jnp.sum(ancestors, axis=1) - 1, children, ancestors, depth)


def ancestors_of(parents: jax.Array, depth: int) -> jax.Array:
    """Which nodes are a node's ancestors, or itself: bool [N, N], of parents int [N], negative where there is none."""
    size = parents.shape[0]
    ancestors = (parents[:, None] == jnp.arange(size)) | jnp.eye(size, dtype=bool)
    for _ in range(int(np.ceil(np.log2(max(depth, 2))))):
        ancestors = (ancestors.astype(jnp.float32) @ ancestors.astype(jnp.float32)) > 0
    return ancestors


def chain(depth: int) -> Tree:
    """`depth` drafts in a row."""
    if depth < 1:
        raise ValueError(f"a chain needs a depth of at least 1, not {depth}")
    return Tree.from_choices([[0] * d for d in range(1, depth + 1)])


def full(width: int, depth: int) -> Tree:
    """Every node above `depth` has `width` children."""
    if width < 1 or depth < 1:
        raise ValueError(f"a full tree needs a width and a depth of at least 1, not {width} and {depth}")
    return Tree.from_choices(p for d in range(1, depth + 1) for p in itertools.product(range(width), repeat=d))


def window(size: int, candidates: int) -> Tree:
    """`size` drafts in a row, and further candidates beside the first of them: what `drafters.jacobi` drafts."""
    if size < 1 or candidates < 1:
        raise ValueError(f"a window needs a size and candidates of at least 1, not {size} and {candidates}")
    return Tree.from_choices([[0] * d for d in range(1, size + 1)] + [[rank] for rank in range(1, candidates)])


def parse(text: str) -> Tree:
    """The tree that `text` lists: digits are child ranks, words are paths, as in "0 1 00 01 000"."""
    return Tree.from_choices([[int(rank) for rank in path] for path in text.split()])


ROOT = Tree((-1,))
"""No drafts at all: autoregressive decoding."""

EAGLE_25 = parse("0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001")
"""EAGLE-1's tree, "mc_sim_7b_63" in its public code."""

LANTERNPP_57 = parse(
    "0 1 2 3 4 "
    "00 01 02 03 10 11 12 20 21 22 30 31 40 "
    "000 001 002 003 010 011 012 020 021 022 030 031 100 101 110 200 "
    "0000 0001 0002 0003 0010 0011 0012 0020 0021 0030 0100 0101 0110 0200 "
    "00000 00001 00002 00010 00011 00100 00101 00110 00200 "
)
"""LANTERN++'s tree, "naive_extend_57" in its public code."""

EAGLE_2 = DynamicTree()

NAMED = {"eagle25": EAGLE_25, "lanternpp57": LANTERNPP_57, "eagle2": EAGLE_2}
_MOST_DRAFTS = 512


def named(text: str) -> Tree | DynamicTree:
    """A tree by name (eagle25, lanternpp57, eagle2), by shape (chain:4, full:2x3, window:16x4), or as paths
    ("0 1 00 01").

    Raises:
      ValueError: if it is none of these, or larger than is of use.
    """
    text = text.strip()
    if text in NAMED:
        return NAMED[text]
    if match := re.fullmatch(r"chain:(\d+)", text):
        depth = int(match[1])
        _check_size(text, depth)
        return chain(depth)
    if match := re.fullmatch(r"full:(\d+)x(\d+)", text):
        width, depth = int(match[1]), int(match[2])
        _check_size(text, depth if width < 2 else sum(width**d for d in range(1, min(depth, 10) + 1)))
        return full(width, depth)
    if match := re.fullmatch(r"window:(\d+)x(\d+)", text):
        size, candidates = int(match[1]), int(match[2])
        _check_size(text, size + candidates - 1)
        return window(size, candidates)
    if re.fullmatch(r"\d+(\s+\d+)*", text):
        _check_size(text, len(text.split()))
        return parse(text)
    raise ValueError(
        f'unknown tree {text!r}; known: {", ".join(NAMED)}, chain:DEPTH, full:WIDTHxDEPTH, or paths such as "0 1 00 01"'
    )


def name_of(tree: Tree | DynamicTree) -> str:
    """The name that `named` knows a tree by, or its paths."""
    names = {known: name for name, known in NAMED.items()} | {ROOT: "root"}
    if tree in names:
        return names[tree]
    if isinstance(tree, DynamicTree):
        return str(tree)
    if tree.width == 1:
        return f"chain:{tree.depth}"
    if tree.depth > 1 and tree == window(tree.depth, tree.num_nodes - tree.depth):
        return f"window:{tree.depth}x{tree.num_nodes - tree.depth}"
    return " ".join("".join(map(str, path)) for path in tree.paths[1:])


def _check_size(text: str, drafts: int) -> None:
    if drafts > _MOST_DRAFTS:
        raise ValueError(f"the tree {text[:40]!r} has more than {_MOST_DRAFTS} drafts")
