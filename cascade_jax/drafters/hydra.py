"""A drafter in one pass whose levels are told what was drafted above (Hydra, Ankner et al. 2024, arXiv 2402.05109).

The pass over the root and the learned slots behind it is that of `parallel`. Then, level by level, two small matrices
join the level's hidden state with the embedding of the token that it drafts behind. So a node has a law of its own, for
a product of the head a level; what is spared of EAGLE's are the passes of its block, and their caches.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from cascade_jax.cache import Context, Segment
from cascade_jax.draft import Draft
from cascade_jax.drafters.filling import Head, candidates, fill_static, grow, root_of, tile
from cascade_jax.drafters.pairs import Pairs, at_slots
from cascade_jax.drafters.parallel import Parallel, ParallelConfig
from cascade_jax.models.transformer import Linear
from cascade_jax.tree import Tree


@dataclass(frozen=True)
class HydraConfig(ParallelConfig):
    """Sizes, those of `parallel`."""


class Hydra(Parallel):
    """The drafter."""

    def __init__(self, config: HydraConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        dim = config.block.dim
        self.join = Linear(2 * dim, 2 * dim, rngs=rngs)
        self.joined = Linear(2 * dim, dim, rngs=rngs)

    def told(self, hidden: jax.Array, embeddings: jax.Array) -> jax.Array:
        """A level's hidden states [R, n, d], told the tokens above with these embeddings [R, n, d]."""
        both = jnp.concatenate([embeddings.astype(hidden.dtype), hidden], axis=-1)
        return hidden + self.joined(jax.nn.silu(self.join(both)))

    def fill(self, target, tree, memory: Pairs, hidden, keys, greedy, head: Head, layout, noise) -> Draft:
        """The tree, level by level, given the hidden states [R, D, d] of its levels; see `filling`."""
        rows, root = hidden.shape[0], hidden[:, :1]

        def below(tokens, depth):  # hidden states [R, n, d] at a level's nodes of these tokens, int [B, n]
            embeddings = tile(self.embed(jnp.maximum(tokens, 0), target), rows)
            level = jnp.broadcast_to(hidden[:, depth : depth + 1], embeddings.shape)
            return self.told(level, embeddings)

        if isinstance(tree, Tree):

            def descend(depth, parents, tokens, hiddens, above):
                del hiddens, above
                return below(jnp.stack([tokens[node] for node in parents], axis=1), depth), None

            arguments = self, target, tree, memory, root[:, 0], keys, greedy, head, layout, noise
            return fill_static(*arguments, descend=descend)

        def best(hidden, depth):
            logits = head(self, target, layout, hidden, depth)
            return candidates(logits, head.sampling, tree.top_k, noise, depth)

        def expand(depth, frontier, origin, above):
            del origin
            return best(below(frontier, depth), depth), above

        return grow(tree, root_of(memory), best(root, 0), expand, None)

    def advance(self, i: int, slots, embeddings, fused, hidden, context: Context, past) -> tuple[jax.Array, Segment]:
        """Step i > 0 is told the token at slot s + 1 + i; see `pairs.PairDrafter.ahead`."""
        hidden, fresh = super().advance(i, slots, embeddings, fused, hidden, context, past)
        return self.told(hidden, at_slots(embeddings, slots + 1 + i)) if i else hidden, fresh
