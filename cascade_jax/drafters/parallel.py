"""A drafter in one pass (P-EAGLE, Hui et al. 2026, arXiv 2602.01469; Medusa, arXiv 2401.10774, in its draft laws).

EAGLE-1's network takes in the root's pair and, behind it, a learned slot for every further level of the tree, all at
once; the target's head turns what comes out into a law a level in one product. A slot stands where the pair would that
is not drafted yet: it sees all pairs up to the root, and the slots before it.

So the law of a level does not know what was drafted above it. It is the same under every node of the level, and known
exactly: verification is that of any tree.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cascade_jax import cache as kv
from cascade_jax.cache import Context, Segment
from cascade_jax.draft import Draft
from cascade_jax.drafters.eagle import Eagle1, EagleConfig
from cascade_jax.drafters.filling import Head, candidates, grow, root_of, seen_pairs, tile
from cascade_jax.drafters.pairs import Pairs
from cascade_jax.models.transformer import run_blocks
from cascade_jax.sampling import Sampling, propose
from cascade_jax.tree import DynamicTree, Tree


@dataclass(frozen=True)
class ParallelConfig(EagleConfig):
    """Sizes of a drafter in one pass: those of EAGLE-1's, and how deep it drafts.

    Attributes:
      depth: levels of the deepest tree that it can fill.
    """

    depth: int = 5

    def __post_init__(self):
        if self.depth < 1:
            raise ValueError(f"a drafter drafts at least one level, not {self.depth}")

    @classmethod
    def for_target(cls, target, ahead: int) -> "ParallelConfig":
        """A new drafter's sizes for a target of these sizes: one of its blocks, and a slot for every token ahead."""
        return replace(super().for_target(target, ahead), depth=ahead)


class Parallel(Eagle1):
    """The drafter."""

    standard: ClassVar[dict] = {"soft": 1.0, "unroll": 5, "noise": 0.0}

    def __init__(self, config: ParallelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.slots = nnx.Param(jax.random.normal(rngs.params(), (config.depth - 1, config.block.dim)) * 0.02)

    @property
    def depth(self) -> int:
        """Levels of the deepest tree that it can fill."""
        return self.config.depth

    def start(self, target, tree, prefix, features, first, slots, layout=None) -> Pairs:
        """Takes in the pairs of the prefix; see `draft.Drafter`.

        Raises:
          ValueError: if the tree is too deep.
        """
        if tree.depth > self.depth:
            raise ValueError(f"this drafter drafts at most {self.depth} levels, and the tree has {tree.depth}")
        return super().start(target, tree, prefix, features, first, slots, layout)

    def fill(self, target, tree, memory: Pairs, hidden, keys, greedy, head: Head, layout, noise) -> Draft:
        """The tree, given the hidden states [R, D, d] of its levels; see `filling`."""
        logits = head(self, target, layout, hidden, jnp.arange(tree.depth))
        if isinstance(tree, Tree):
            return _drawn(tree, root_of(memory), logits, keys, greedy, head.sampling, noise)
        return _likeliest(tree, root_of(memory), logits, head.sampling, noise)

    def look(self, target, memory: Pairs, tree: Tree | DynamicTree) -> tuple[jax.Array, Pairs]:
        """Hidden states [R, depth, d], at the root and at the slots behind it, in one pass; and the new memory."""
        depth = tree.depth
        rows, size = memory.features.shape[:2]
        pending, pairs, ahead = tile(memory.pending, rows), jnp.arange(size), jnp.arange(1, depth)
        x = self.paired(tile(self.embed(jnp.maximum(memory.tokens, 0), target), rows), memory.features)
        slots = jnp.broadcast_to(self.slots[...][: depth - 1].astype(x.dtype), (rows, depth - 1, x.shape[-1]))
        places = jnp.concatenate([jnp.broadcast_to(pairs, (rows, size)), (pending - 1)[:, None] + ahead], axis=1)
        real = jnp.concatenate(  # a pair is seen from where it stands on, but what follows the root by nobody else
            [pairs < pending[:, None], jnp.ones((rows, depth - 1), bool)], axis=1
        )
        order = np.tril(np.ones((size + depth - 1, size + depth - 1), bool))
        among = order & (real[:, None] | np.eye(len(order), dtype=bool))
        context = Context(
            self.rope(memory.length[:, None] + places),
            kv.bias(among)[:, None],
            (seen_pairs(memory),),
            (kv.Filled(memory.length),),
        )
        hidden, fresh = run_blocks(self.blocks, jnp.concatenate([x, slots], axis=1), context, (memory.cache,))
        root = jnp.take_along_axis(hidden, (pending - 1)[:, None, None], axis=1)
        fresh = kv.each(lambda axis, new: jax.lax.slice_in_dim(new, 0, size, axis=axis), fresh)
        cache = kv.write(memory.cache, fresh, memory.length, after=root[:, 0, 0])
        hidden = jnp.concatenate([root, hidden[:, size:]], axis=1)
        return hidden, memory.replace(cache=cache, length=memory.length + pending)

    def advance(self, i: int, slots, embeddings, fused, hidden, context: Context, past) -> tuple[jax.Array, Segment]:
        """Step i > 0 takes in the i-th learned slot; see `pairs.PairDrafter.ahead`."""
        if i == 0:
            return super().advance(i, slots, embeddings, fused, hidden, context, past)
        if i >= self.depth:
            raise ValueError(f"this drafter looks at most {self.depth} tokens ahead: unroll as many")
        x = jnp.broadcast_to(self.slots[...][i - 1].astype(hidden.dtype), hidden.shape)
        return run_blocks(self.blocks, x, context, past)


def _drawn(tree: Tree, root, logits, keys, greedy, sampling: Sampling, shared) -> Draft:
    """Children of all inner nodes, drawn without replacement from their level's law, of logits [B, D, V]."""
    children, depths = tree.topology.children[list(tree.inner)], tree.topology.depths[list(tree.inner)]
    logits, shape = logits[:, depths], (len(depths), logits.shape[-1])
    if shared is None:
        noise = jnp.where(greedy, 0.0, jax.vmap(lambda key: jax.random.gumbel(key, shape))(keys))
    else:
        noise = jnp.broadcast_to(shared[:, depths], logits.shape)
    probs, drawn = propose(logits, noise, 0, sampling, int(np.max(np.sum(children >= 0, axis=1))))
    tokens = [root] * tree.num_nodes
    for i, rank in np.argwhere(children >= 0):
        tokens[children[i, rank]] = drawn[:, i, rank]
    return Draft(jnp.stack(tokens, axis=1), probs, None)


def _likeliest(tree: DynamicTree, root, logits, sampling: Sampling, shared) -> Draft:
    """EAGLE-2's tree: the nodes of a level all have the same candidates."""
    batch, k = root.shape[0], tree.top_k

    def best(depth):
        return candidates(logits[:, depth : depth + 1], sampling, k, shared, depth)

    def expand(depth, frontier, origin, above):
        del frontier, origin
        return tuple(jnp.broadcast_to(found, (batch, k, k)) for found in best(depth)), above

    return grow(tree, root, best(0), expand, None)
