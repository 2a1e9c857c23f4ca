"""How a drafter that grows its tree level by level fills it: a static tree (EAGLE-1) or a dynamic one (EAGLE-2).

The drafter is a `pairs.PairDrafter`. `hidden` is its hidden state at the root, [R, d]. `shared` is the noise of output
positions, [B, D + 1, V], if the target draws with it; drafted is then what it makes of the drafter's laws.

Shapes: `B` sequences, `G` guidance branches, `R = G B` rows (branch-major), `N` nodes, `V` tokens, `d` model width.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cascade_jax import cache as kv
from cascade_jax.cache import Context
from cascade_jax.draft import Draft
from cascade_jax.sampling import Layout, Sampling, guided_logits, likeliest_of, propose, warp_logits
from cascade_jax.tree import DynamicTree, Topology, Tree, ancestors_of


@struct.dataclass
class Head:
    """From the drafter's hidden states [R, n, d] to guided logits [B, n, V] of the tokens behind them; `depth` of them
    all, or of each, int [n]."""

    sampling: Sampling
    position: jax.Array  # int [B], the output position that the root's children would take

    def __call__(self, drafter, target, layout: Layout | None, hidden: jax.Array, depth) -> jax.Array:
        batch = self.position.shape[0]
        hidden = hidden.reshape(-1, batch, *hidden.shape[1:])
        head = functools.partial(drafter.logits, target=target)
        logits = guided_logits(head, hidden, self.sampling.guidance, linear=drafter.linear_head(target))
        if layout is not None:
            logits = layout.constrain(logits, self.position[:, None] + depth)
        return logits


def fill_static(
    drafter, target, tree: Tree, state, hidden, keys, greedy, head, layout, shared=None, descend=None
) -> Draft:
    """EAGLE-1: children are drawn without replacement, all of a level at once.

    `descend` gives the hidden states at a level's nodes, and what it leaves to the next levels; None for a pass of the
    drafter, see `_descend`.
    """
    descend = functools.partial(_descend, drafter, target, tree, state) if descend is None else descend
    tokens = [None] * tree.num_nodes
    tokens[0] = root_of(state)
    hiddens, probs, above, noise = {0: hidden}, [], [], None
    children = tree.topology.children

    for depth, level in enumerate(tree.levels[:-1]):
        parents = [node for node in level if node in tree.inner]
        if depth:
            x, fresh = descend(depth, parents, tokens, hiddens, above)
            above.append((fresh, parents))
            hiddens = {node: x[:, i] for i, node in enumerate(parents)}
        logits = head(drafter, target, layout, jnp.stack([hiddens[n] for n in parents], axis=1), depth)
        width = max(int(np.sum(children[node] >= 0)) for node in parents)
        if noise is None and shared is None:  # all of the step's at once: one generator call in place of one a level
            shape = (len(tree.inner), logits.shape[-1])
            noise = jnp.where(greedy, 0.0, jax.vmap(lambda key: jax.random.gumbel(key, shape))(keys))
        first = tree.inner.index(parents[0])
        own = noise, first
        if shared is not None:
            own = jnp.broadcast_to(shared[:, depth : depth + 1], logits.shape), 0
        level, drawn = propose(logits, *own, head.sampling, width)
        probs.append(level)
        for i, node in enumerate(parents):
            for rank, child in enumerate(children[node][children[node] >= 0]):
                tokens[child] = drawn[:, i, rank]
    return Draft(jnp.stack(tokens, axis=1), jnp.concatenate(probs, axis=1), None)


def _descend(drafter, target, tree, state, depth, nodes, tokens, hiddens, above):
    """The drafter's hidden states [R, n, d] at `nodes`, all of one depth, and their keys and values, given those of the
    levels `above` and the nodes that they are of."""
    rows = state.length.shape[0]
    ancestors = tree.topology.ancestors
    features = jnp.stack([hiddens[tree.parents[n]] for n in nodes], axis=1)
    drafts = jnp.maximum(jnp.stack([tokens[n] for n in nodes], axis=1), 0)
    embeddings = tile(drafter.embed(drafts, target), rows)
    slots = jnp.broadcast_to(state.length[:, None] + depth - 1, (rows, len(nodes)))
    past, masks = zip(*above) if above else ((), ())
    masks = tuple(kv.bias(ancestors[np.ix_(nodes, placed)])[None, None] for placed in masks)
    context = Context(
        drafter.rope(slots),
        kv.bias(np.eye(len(nodes), dtype=bool))[None, None],
        (seen_pairs(state), *masks),
        (kv.Filled(state.length), *(None for _ in masks)),
    )
    return drafter(embeddings, features, context, (state.cache, *past))


def fill_dynamic(drafter, target, tree: DynamicTree, state, hidden, keys, greedy, head, layout, shared=None) -> Draft:
    """EAGLE-2: the drafter reads the likeliest nodes of a round to find the next round's, see `grow`."""
    del keys, greedy  # nothing is drawn: these drafts are deterministic
    rows, k = hidden.shape[0], tree.top_k

    def best(hidden, depth):  # [R, n, d] -> log probabilities, tokens [B, n, k]
        return candidates(head(drafter, target, layout, hidden, depth), head.sampling, k, shared, depth)

    def expand(depth, frontier, origin, above):
        features, tree_cache, seen = above  # seen: bool [B, k, placed], which placed nodes are the frontier's ancestors
        if origin is None:
            features = jnp.broadcast_to(features[:, None], (rows, k, features.shape[-1]))
        else:
            features = jnp.take_along_axis(features, tile(origin, rows)[..., None], axis=1)
            here = jax.nn.one_hot(origin, k, dtype=bool)
            before = None if seen is None else jnp.take_along_axis(seen, origin[..., None], axis=1)
            seen = here if before is None else jnp.concatenate([before, here], axis=-1)
        slots = jnp.broadcast_to(state.length[:, None] + depth - 1, (rows, k))
        past, past_bias, within = (state.cache,), (seen_pairs(state),), (kv.Filled(state.length),)
        if tree_cache is not None:
            past, past_bias = (*past, tree_cache), (*past_bias, tile(kv.bias(seen), rows)[:, None])
            within = (*within, None)
        context = Context(drafter.rope(slots), kv.bias(np.eye(k, dtype=bool))[None, None], past_bias, within)
        x, fresh = drafter(tile(drafter.embed(frontier, target), rows), features, context, past)
        return best(x, depth), (x, kv.join(tree_cache, fresh), seen)

    return grow(tree, root_of(state), best(hidden[:, None], 0), expand, (hidden, None, None))


def candidates(logits, sampling: Sampling, count: int, shared, depth) -> tuple[jax.Array, jax.Array]:
    """Scores and tokens [B, n, count] of the likeliest tokens by logits [B, n, V]. Under noise that the target draws
    with, what is near to be drawn stands for what is likely."""
    if shared is None:
        return likeliest_of(logits, sampling, count)
    return likeliest_of(warp_logits(logits, sampling) + shared[:, depth : depth + 1], Sampling().checked(), count)


def grow(tree: DynamicTree, root: jax.Array, first, expand, above) -> Draft:
    """EAGLE-2's tree: expand the likeliest nodes round by round, keep the likeliest candidates of all rounds.

    Args:
      root: int [B].
      first: log probabilities and tokens [B, 1, k] of the root's candidates.
      expand: of (depth, tokens [B, k] of the nodes to expand, which of the last round's k nodes each is a child of, or
        None for the root's, what the last call left): log probabilities and tokens [B, k, k] of their candidates, and
        what is left to the next call.
      above: what is left to the first call.
    """
    batch, k = root.shape[0], tree.top_k
    values, tokens = first
    scores, frontier, origin = values[:, 0], tokens[:, 0], None
    ids = jnp.broadcast_to(jnp.arange(k), (batch, k))  # candidate numbers of the frontier, by round and rank
    all_scores, all_tokens = [scores], [frontier]
    all_parents, all_ranks = [jnp.full((batch, k), -1)], [jnp.broadcast_to(jnp.arange(k), (batch, k))]

    for depth in range(1, tree.rounds + 1):
        (values, tokens), above = expand(depth, frontier, origin, above)
        expanded = (scores[..., None] + values).reshape(batch, k * k)
        begin = k + (depth - 1) * k * k
        all_scores.append(expanded)
        all_tokens.append(tokens.reshape(batch, k * k))
        all_parents.append(jnp.repeat(ids, k, axis=1))
        all_ranks.append(jnp.broadcast_to(jnp.tile(jnp.arange(k), k), (batch, k * k)))
        if depth < tree.rounds:
            scores, chosen = jax.lax.top_k(expanded, k)
            ids, origin = begin + chosen, chosen // k
            frontier = jnp.take_along_axis(tokens.reshape(batch, k * k), chosen, axis=1)

    found = [jnp.concatenate(x, axis=1) for x in (all_scores, all_tokens, all_parents, all_ranks)]
    tokens, topology = jax.vmap(lambda *c: _keep_best(tree, *c))(*found)
    return Draft(jnp.concatenate([root[:, None], tokens], axis=1), None, topology)


def _keep_best(tree: DynamicTree, scores, tokens, parents, ranks) -> tuple[jax.Array, Topology]:
    """The best candidates by score, as a tree. A parent never scores below its child and stands before it, so it is
    always kept with it; likewise a sibling of higher rank."""
    kept = jnp.sort(jax.lax.top_k(scores, tree.drafts)[1])  # candidate numbers, in order of depth
    node_of = jnp.full(len(scores) + 1, -1).at[kept].set(jnp.arange(1, tree.num_nodes)).at[-1].set(0)
    parent = node_of[parents[kept]]  # parent -1, the root, reads the last entry: node 0
    exists = jnp.isfinite(scores[kept])
    depth_of = np.concatenate([[1] * tree.top_k, *([d] * tree.top_k**2 for d in range(2, tree.rounds + 2))])
    depths = jnp.append(0, jnp.asarray(depth_of)[kept])
    nodes = jnp.arange(1, tree.num_nodes)
    children = jnp.full((tree.num_nodes, tree.top_k), -1).at[parent, ranks[kept]].set(jnp.where(exists, nodes, -1))
    parents = jnp.append(-1, parent)
    topology = Topology(parents, depths, children, ancestors_of(parents, tree.depth), tree.depth)
    return jnp.where(exists, tokens[kept], -1), topology


def root_of(memory) -> jax.Array:
    """The tree's root int [B], the last of the pending pairs' tokens."""
    return jnp.take_along_axis(memory.tokens, (memory.pending - 1)[:, None], axis=1)[:, 0]


def seen_pairs(memory) -> jax.Array:
    """Additive mask [R, 1, 1, T] of the drafter's own cache."""
    return kv.filled(kv.slots(memory.cache), memory.length)


def tile(x: jax.Array, rows: int) -> jax.Array:
    """Per-sequence values [B, ...] repeated for every guidance branch, [R, ...]."""
    return jnp.concatenate(list(itertools.repeat(x, rows // x.shape[0])), axis=0)
