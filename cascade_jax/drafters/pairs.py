"""Drafters that read pairs (a token, the target's feature before it) with a cache of their own: EAGLE-1 and EAGLE-3.

The cache holds pairs of accepted tokens and *true* target features; at the start of every step the drafter takes in the
pairs that the last step accepted, the tree's root being the last of them. A pair takes the slot of its feature, so the
drafter's positions are one behind the target's.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx, struct

from cascade_jax import cache as kv
from cascade_jax import mesh
from cascade_jax.cache import Context, Prefix, Segment
from cascade_jax.draft import Draft, Outcome
from cascade_jax.drafters.filling import Head, fill_dynamic, fill_static, seen_pairs, tile
from cascade_jax.sampling import Layout, Sampling
from cascade_jax.tree import DynamicTree, Tree


@struct.dataclass
class Pairs:
    """What the drafter remembers between steps.

    Attributes:
      cache: its keys and values.
      length: int [R], pairs in the cache.
      tokens: int [B, D + 1], tokens of the pairs that it has not taken in yet.
      features: [R, D + 1, d], the target's features before these tokens; what the drafter reads in their place if it
        reads other layers, [R, D + 1, taps d].
      pending: int [B], how many of them are real; at least 1, and the last is the tree's root.
    """

    cache: Segment = mesh.by_row()
    length: jax.Array = mesh.by_row()
    tokens: jax.Array = mesh.by_sequence()
    features: jax.Array = mesh.by_row()
    pending: jax.Array = mesh.by_sequence()


class PairDrafter(nnx.Module):
    """A `draft.Trainable` made of a network over pairs.

    The network has `embed(tokens, target)`, `fuse(features)`, `rope(slots)`, `__call__(embeddings, fused features,
    context, past)`, `logits(hidden, target)`, and `linear_head(target)`, which tells whether the last is a linear map.
    """

    memory = Pairs
    reads_laws = False

    @property
    def taps(self) -> tuple[int, ...]:
        return self.config.taps

    def start(
        self, target, tree, prefix: Prefix, features: jax.Array, first: jax.Array, slots: int, layout=None
    ) -> Pairs:
        """Takes in the pairs of the prefix; see `draft.Drafter`."""
        del target, layout
        rows, size, _ = features.shape
        pairs = max(size - 1, 1)  # behind a prefix of one slot there is none: what is taken in then is never seen
        positions = jnp.broadcast_to(jnp.arange(pairs), (rows, pairs))
        context = Context(self.rope(positions), kv.bias(kv.causal(pairs))[None, None])
        _, fresh = self(prefix.drafter_embeddings[:, -pairs:], self.fuse(features[:, :pairs]), context)
        last = jnp.take_along_axis(features, (prefix.length - 1)[:, None, None], axis=1)
        return Pairs(
            cache=kv.write(kv.room(fresh, slots), fresh, jnp.zeros(rows, jnp.int32)),
            length=prefix.length - 1,
            tokens=jnp.pad(first[:, None], ((0, 0), (0, tree.depth))),
            features=jnp.pad(last, ((0, 0), (0, tree.depth), (0, 0))),
            pending=jnp.ones(first.shape, jnp.int32),
        )

    def propose(
        self,
        target,
        tree: Tree | DynamicTree,
        memory: Pairs,
        keys: jax.Array,
        sampling: Sampling,
        position: jax.Array,
        layout: Layout | None = None,
        noise: jax.Array | None = None,
    ) -> tuple[Draft, Pairs]:
        """Looks behind the root (`look`), then fills the tree (`fill`); see `draft.Drafter`.

        At temperature 0 the drafter's likeliest tokens at temperature 1 are proposed, which fills the whole tree and is
        lossless all the same.
        """
        greedy = sampling.temperature == 0
        head = Head(sampling.replace(temperature=jnp.where(greedy, 1.0, sampling.temperature)), position)
        hidden, memory = self.look(target, memory, tree)
        noise = None if noise is None else jnp.where(greedy, 0.0, noise)
        return self.fill(target, tree, memory, hidden, keys, greedy, head, layout, noise), memory

    def look(self, target, memory: Pairs, tree: Tree | DynamicTree) -> tuple[jax.Array, Pairs]:
        """Takes in the pending pairs: the root's hidden states [R, d], and the new memory."""
        del tree
        return take_in(self, target, memory)

    def fill(self, target, tree: Tree | DynamicTree, memory: Pairs, hidden, keys, greedy, head, layout, noise) -> Draft:
        """The tree, given what `look` found; see `filling`."""
        fill = fill_static if isinstance(tree, Tree) else fill_dynamic
        return fill(self, target, tree, memory, hidden, keys, greedy, head, layout, noise)

    def observe(self, target, memory: Pairs, outcome: Outcome) -> Pairs:
        """Keeps the accepted tokens and the target's features before them, to be taken in by the next step."""
        del target
        path = tile(outcome.path, memory.length.shape[0])  # not len: an exported program does not know its batch
        features = jnp.take_along_axis(outcome.features, path[..., None], axis=1)
        return memory.replace(tokens=outcome.emitted, features=features, pending=jnp.maximum(outcome.kept, 1))

    def ahead(
        self,
        embeddings: jax.Array,
        features: jax.Array,
        steps: int,
        remat: bool = False,
        anchors: jax.Array | None = None,
    ) -> list[jax.Array]:
        """Step i sees the true pairs up to where its chain begins and the chain's own steps; see `draft.Trainable`.

        Step 0 is teacher forcing.
        """
        rows, size = features.shape[:2]
        slots = jnp.broadcast_to(jnp.arange(size), (rows, size))
        fused, seen = self.fuse(features), kv.bias(kv.causal(size))[None, None]

        def step(slots, seen, hidden, past, i):
            past_bias = tuple(seen if j == 0 else None for j in range(i))
            context = Context(self.rope(slots + i), None if i else seen, past_bias)
            return self.advance(i, slots, embeddings, fused, hidden, context, past)

        hidden, past, estimates = fused, (), []
        for i in range(steps):
            if i == 1 and anchors is not None:
                slots, hidden = anchors, at_slots(hidden, anchors)
                seen = kv.bias(jnp.arange(size) <= anchors[..., None])[:, None]
            run = functools.partial(step, i=i)
            hidden, fresh = (jax.checkpoint(run) if remat else run)(slots, seen, hidden, past)
            estimates.append(hidden)
            past = (*past, fresh)
        return estimates

    def advance(self, i: int, slots, embeddings, fused, hidden, context: Context, past) -> tuple[jax.Array, Segment]:
        """Estimates [R, n, d] of step i of the chains that begin at `slots` int [R, n], and their keys and values.

        Here that is EAGLE-3's training-time test: it takes in the token at slot s + 1 + i and its own estimate of step
        i - 1, at rotary position s + i.

        Args:
          embeddings, fused: see `ahead`; features are fused already.
          hidden: [R, n, d], the last step's estimates; in step 0 `fused`.
        """
        del fused
        return self(at_slots(embeddings, slots + 1 + i), hidden, context, past)


def at_slots(x: jax.Array, slots: jax.Array) -> jax.Array:
    """`x` [R, S, d] at slots int [R, n]; at those behind the end, the last."""
    return jnp.take_along_axis(x, jnp.minimum(slots, x.shape[1] - 1)[..., None], axis=1)


def take_in(drafter: PairDrafter, target, memory: Pairs) -> tuple[jax.Array, Pairs]:
    """Runs the pending pairs through the drafter; returns its hidden state at the last, [R, d], and the new memory."""
    rows, size = memory.features.shape[:2]
    slots = memory.length[:, None] + jnp.arange(size)
    causal, within = kv.bias(kv.causal(size))[None, None], kv.Filled(memory.length)
    context = Context(drafter.rope(slots), causal, (seen_pairs(memory),), (within,))
    embeddings = tile(drafter.embed(jnp.maximum(memory.tokens, 0), target), rows)
    hidden, fresh = drafter(embeddings, drafter.fuse(memory.features), context, (memory.cache,))
    pending = tile(memory.pending, rows)
    last = jnp.take_along_axis(hidden, (pending - 1)[:, None, None], axis=1)[:, 0]
    cache = kv.write(memory.cache, fresh, memory.length, after=last[:, 0])
    return last, memory.replace(cache=cache, length=memory.length + pending)
