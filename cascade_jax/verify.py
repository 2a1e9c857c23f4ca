"""Verification: one draft tree against one target.

In three phases. `examine` does the vocabulary-sized work for all inner nodes at once: what remains of the target's
distribution when each child comes up, and what the acceptance rule could add to it. `descend` walks from the root over
levels and siblings with scalars in hand: the ledger, the random numbers, the decision. `finish` draws the bonus token
from what remains where the walk ended. The last phase stands apart because a leaf's distribution is needed only if the
walk ends there: decoding computes it then, for one node. `jax.vmap` gives the batch.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cascade_jax import platforms, sampling, traversal
from cascade_jax.acceptance import Exact, Rule, Siblings, Strict, ratio, remainder
from cascade_jax.kernels.rows import Rows, on_rows
from cascade_jax.tree import Topology, Tree

WALK, TRAVERSAL = "walk", "traversal"
VERIFIERS = (WALK, TRAVERSAL)
UNROLLED, TURNS = 8, 128  # of a loop over siblings; of one over levels and siblings: of a window, 32 and 4


@struct.dataclass
class Verdict:
    """What one verification step decided.

    Attributes:
      path: int [depth + 1], the accepted nodes from the root (0) down; -1 after the last.
      accepted: int, number of accepted drafts.
      next_token: int, the bonus token, which follows the last accepted node.
      nominal: the probability mass that the rule added, over all candidates examined.
      coupled: the probability of parting from the strict decoder, given the same random numbers, summed over the
        candidates examined until the two part. Its mean over steps is the mean of `diverged`.
      diverged: whether the strict decoder, given the same random numbers, would have decided differently somewhere on
        this walk.
    """

    path: jax.Array
    accepted: jax.Array
    next_token: jax.Array
    nominal: jax.Array
    coupled: jax.Array
    diverged: jax.Array


@struct.dataclass
class Turns:
    """How the drafts of a tree fared, by node, [N] each; the root's entries, and those of missing nodes, are void.

    `rule.decide(spent, target, draft, offers)` is what was decided where the token is `allowed`, and `uniform` the
    number that it was held against.

    Attributes:
      target: the draft's probability in the target's residual, if all of its elder siblings were rejected: r(x).
      draft: its probability under the drafter then: p(x).
      offers: what the rule could add then, its offer with leaves [N, ...].
      allowed: whether the target's own sampling settings allow the token at all; if not, the decision is no.
      spent: the ledger when its turn came; NaN where the walk did not get to it.
      uniform: the random number of its turn, likewise.
    """

    target: jax.Array
    draft: jax.Array
    offers: Any
    allowed: jax.Array
    spent: jax.Array
    uniform: jax.Array


@struct.dataclass
class Walk:
    """A verification step before the bonus token is drawn. `path`, `nominal`, `coupled`, `diverged`: as in `Verdict`.

    Attributes:
      end: int, the last accepted node.
      leftover: [V], the target's residual after all of its children were rejected; zeros where it has none. None if
        the tree is a lone root.
      key: for the bonus token.
      turns: how every draft fared; None if the tree is a lone root.
    """

    path: jax.Array
    end: jax.Array
    leftover: jax.Array | None
    nominal: jax.Array
    coupled: jax.Array
    diverged: jax.Array
    key: jax.Array
    turns: Turns | None = None


@struct.dataclass
class Candidates:
    """All candidates of a tree with M inner nodes and W children at most: what the walk needs, and nothing larger.

    Attributes:
      nodes: int [M, W], node ids, -1 where there is none.
      target: [M, W], residual target probability of the candidate when its turn comes.
      draft: [M, W], its drafter probability then; 0 where there is no candidate.
      offers: the rule's, with leaves [M, W, ...].
      allowed: bool [M, W], whether the target's own sampling settings allow the token: only then is it ever accepted.
      leftover: [M, V], the target's residual when all children are rejected.
    """

    nodes: jax.Array
    target: jax.Array
    draft: jax.Array
    offers: Any
    allowed: jax.Array
    leftover: jax.Array


def verify(
    key: jax.Array,
    tree: Tree | Topology,
    tokens: jax.Array,
    draft_probs: jax.Array | None,
    target_logits: jax.Array,
    features: jax.Array,
    rule: Rule,
    warp: Callable[[jax.Array], jax.Array] = jax.nn.softmax,
    verifier: str = WALK,
) -> Verdict:
    """Accepts a path through a draft tree of N nodes (the paper's Algorithm 2; with `strict()`, Algorithm 1 on a tree).

    Args:
      key: random key of this step.
      tree: a static tree, or the topology of a dynamic one.
      tokens: int [N], every node's token; negative at nodes that do not exist.
      draft_probs: [N, V], row n the drafter's distribution from which n's children were drawn without replacement (rows
        of inner nodes are read). None: the drafts are deterministic, each a point mass.
      target_logits: [N, V], row n over node n's children.
      features: [N, h], the target's hidden state after consuming node n, conditional branch.
      rule: the acceptance rule.
      warp: maps logits [..., V] to the probabilities that are sampled. What it excludes (a probability of 0 from a
        finite logit) no rule can accept.
      verifier: "walk" from the root, or "traversal" from the leaves, which accepts more (see `traversal`).

    Returns:
      A `Verdict`. With `strict()` the law of the accepted tokens and the bonus token is the target's own.

    Raises:
      ValueError: for a verifier that there is not, or that is not for the rule.
    """
    check(rule, noise=sampling.GUMBEL if isinstance(rule, Exact) else sampling.FRESH, verifier=verifier)
    if isinstance(tree, Tree):
        inner, topology = np.array(tree.inner, np.int32), tree.topology
    else:
        inner, topology = np.arange(len(tokens), dtype=np.int32), tree
    draft = None if draft_probs is None else draft_probs[inner]
    walked = walk(key, topology, inner, tokens, draft, target_logits[inner], features, rule, warp, verifier)
    return finish(walked, warp(target_logits[walked.end]))


def check(rule: Rule, noise: str = sampling.FRESH, verifier: str = WALK, drafts: bool = True) -> None:
    """Raises a ValueError unless a rule goes with this noise (see `decode.Program`) and this verifier."""
    if verifier not in VERIFIERS:
        raise ValueError(f"verifier must be one of {', '.join(VERIFIERS)}, not {verifier!r}")
    if verifier == TRAVERSAL and not isinstance(rule, Strict):
        raise ValueError("traversal is a lossless verifier, of strict() alone: a relaxed rule takes the walk")
    if noise == sampling.GUMBEL and drafts and not isinstance(rule, Strict):
        raise ValueError("gumbel noise draws the token-by-token picture, and a relaxed rule would not: use exact()")
    if noise == sampling.FRESH and type(rule) is Exact:
        raise ValueError("exact() draws the token-by-token picture of gumbel noise, and the noise is fresh")


def walk(key, topology, inner, tokens, draft_probs, target_logits, features, rule, warp, verifier: str = WALK) -> Walk:
    """`verify` but for the bonus token, given the ids of the inner nodes [M], and the drafter's distributions and the
    target's logits at these alone, [M, V]."""
    walk_key, bonus_key = jax.random.split(key)
    if len(inner) == 0 or topology.depth == 0:
        zero = jnp.float32(0)
        return Walk(jnp.zeros(1, jnp.int32), jnp.int32(0), None, zero, zero, jnp.bool_(False), bonus_key)
    probs = warp(target_logits)
    slot_of = jnp.asarray(slots(inner, len(tokens)))
    if verifier == TRAVERSAL:
        ends, zero = traversal.examine(topology, inner, tokens, draft_probs, probs), jnp.float32(0)
        path, end = traversal.ascend(walk_key, topology, ends)
        leftover = jnp.where(slot_of[end] >= 0, ends.leftover[slot_of[end]], 0.0)
        return Walk(path, end, leftover, zero, zero, jnp.bool_(False), bonus_key)
    excluded = (probs == 0) & ~jnp.isneginf(target_logits)

    def looked(unroll, interpret=False):
        del interpret
        candidates = examine(topology, inner, tokens, draft_probs, probs, excluded, features, rule, unroll)
        return candidates, descend(walk_key, topology, inner, candidates, rule, unroll)

    seen = platforms.by_lowering(functools.partial(looked, False), functools.partial(looked, True))()
    candidates, (path, end, charges, visits) = seen
    slot = slot_of[end]
    has_children = jnp.any(candidates.nodes[slot] >= 0) & (slot >= 0)
    leftover = jnp.where(has_children, candidates.leftover[slot], 0.0)
    return Walk(path, end, leftover, *charges, bonus_key, _turns(candidates, visits, len(tokens)))


def finish(walk: Walk, probs: jax.Array) -> Verdict:
    """Draws the bonus token, given the target's distribution [V] at the walk's end."""
    if walk.leftover is not None:
        probs = jnp.where(jnp.any(walk.leftover > 0), walk.leftover, probs)
    return conclude(walk, sampling.draw(walk.key, probs))


def conclude(walk: Walk, bonus: jax.Array) -> Verdict:
    """The verdict, given the bonus token."""
    return Verdict(walk.path, jnp.sum(walk.path > 0), bonus, walk.nominal, walk.coupled, walk.diverged)


def slots(inner: np.ndarray, size: int) -> np.ndarray:
    """Every node's index among the inner nodes, int [size]; -1 for leaves."""
    table = np.full(size, -1, np.int32)
    table[inner] = np.arange(len(inner))
    return table


def examine(topology, inner, tokens, draft_probs, probs, excluded, features, rule: Rule, unroll=False) -> Candidates:
    """The vocabulary-sized part, for all inner nodes at once; only the sibling index is sequential.

    Args:
      draft_probs: [M, V] or None.
      probs: [M, V], the target's distributions at the inner nodes.
      excluded: bool [M, V], what sampling settings exclude there.
      unroll: whether to write out loops that are short: on a GPU every turn of one is a launch of all its kernels.
    """
    children, size = jnp.asarray(topology.children), len(tokens)
    token_of = jnp.append(tokens, -1)  # index -1, no node, reads the last entry
    nodes = children[inner]
    child_tokens = token_of[nodes]
    grandchildren = jnp.where(nodes[..., None] >= 0, children[nodes], -1)

    cosine = cosines(features)
    alike = jax.vmap(lambda siblings: cosine[siblings[:, None], siblings])(nodes)
    continued = jax.vmap(lambda siblings, below: cosine[siblings[:, None], below])(nodes, grandchildren)

    own = jnp.take_along_axis(probs, jnp.maximum(child_tokens, 0), axis=1)  # [M, W], from the parent
    slot = jnp.asarray(slots(inner, size))[nodes]
    next_probs = jnp.where((slot >= 0)[..., None], own[slot], 0.0)
    entropy = jnp.sum(jax.scipy.special.entr(probs), axis=-1)
    depth = jnp.asarray(topology.depths)[inner] + 1
    below = token_of[grandchildren], continued, next_probs
    family = Siblings(child_tokens, probs, probs, alike, *below, entropy, depth, topology.depth)

    def seen(residual, draft, token):
        """The family when candidate `token` int [M] comes up."""
        return family.replace(residual=residual, draft=_point(residual, token[:, None]) if draft is None else draft)

    def look(residual, draft, j):
        now, token = seen(residual, draft, child_tokens[:, j]), child_tokens[:, j]
        at = lambda x: jnp.take_along_axis(x, jnp.maximum(token, 0)[:, None], axis=1)[:, 0]
        return at(now.residual), jnp.where(token >= 0, at(now.draft), 0.0), jax.vmap(rule.offer, (0, None))(now, j)

    width = nodes.shape[1]
    if unroll and width <= UNROLLED and not hasattr(rule, "remainder"):
        *turns, (leftover, _) = remains(probs, draft_probs, child_tokens)
        columns = [look(*state, j) for j, state in enumerate(turns)]
        target_x, draft_x, offers = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *columns)
    else:

        def turn(state, j):
            token = child_tokens[:, j]
            left = jax.vmap(functools.partial(remainder, rule), (0, None))(seen(*state, token), j)
            return without(*state, token[:, None], left), look(*state, j)

        start = probs, draft_probs
        (leftover, _), columns = jax.lax.scan(turn, start, jnp.arange(width), unroll=unroll and width <= UNROLLED)
        target_x, draft_x, offers = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), columns)
    allowed = ~jnp.take_along_axis(excluded, jnp.maximum(child_tokens, 0), axis=1)
    return Candidates(nodes, target_x, draft_x, offers, allowed, leftover)


def without(residual, draft, token, left=None) -> tuple[jax.Array, jax.Array | None]:
    """What remains of the target's distribution [..., V], and of the drafter's, when `token` int [..., 1] was rejected.

    Both stay as they are where the token is none, or not one that the drafter can have drawn. A `draft` of None means
    that drafts are point masses.

    Args:
      left: [..., V], what is left of the target's distribution, not normalised; None for the strict remainder.
    """
    p = _point(residual, token) if draft is None else draft
    chosen = jnp.arange(residual.shape[-1]) == token
    exists = jnp.max(jnp.where(chosen, p, 0.0), axis=-1, keepdims=True) > 0
    left = jnp.maximum(residual - p, 0.0) if left is None else left
    rest = jnp.where(exists, _normalise(left, residual), residual)
    if draft is None:
        return rest, None
    return rest, jnp.where(exists, _normalise(jnp.where(chosen, 0.0, draft), draft), draft)


def _point(like, token):
    """A point mass [..., V] at `token` int [..., 1]; nothing if that is negative."""
    return (jnp.arange(like.shape[-1]) == token).astype(like.dtype)


def remains(probs: jax.Array, draft: jax.Array | None, tokens: jax.Array) -> list[tuple[jax.Array, jax.Array | None]]:
    """`without` the first 0, 1, ..., W of `tokens` int [M, W], from the distributions [M, V] on."""
    width = tokens.shape[1]

    def general(_, *given):
        *given, tokens = given
        state = (*given, None)[:2]
        states = [state := without(*state, tokens[..., j, None]) for j in range(width)]
        return flat(states)

    def of_row(_, *given):
        *given, tokens = given
        state, places = (*given, None)[:2], jnp.arange(len(tokens))
        chosen = [jnp.max(jnp.where(places == j, tokens, -1)) for j in range(width)]
        return flat([state := without(*state, token) for token in chosen])

    def flat(states):
        return tuple(x for state in states for x in state if x is not None)

    given = [probs] if draft is None else [probs, draft]
    results = [(probs.shape[-1], jnp.float32)] * (len(given) * width)
    made = on_rows(general, of_row, (), [Rows(x) for x in (*given, tokens)], results)
    return [(probs, draft)] + [(*made[i : i + len(given)], None)[:2] for i in range(0, len(made), len(given))]


def descend(key, topology, inner, candidates: Candidates, rule: Rule, unroll=False):
    """The walk: levels, and siblings within each.

    Returns:
      path int [depth + 1], the last accepted node, (nominal, coupled, diverged) as in `Verdict`, and by level and
      sibling, [depth, W] each: (node id, -1 where none was examined; ledger before; random number).
    """
    depth, width = topology.depth, candidates.nodes.shape[1]
    slot_of = jnp.asarray(slots(inner, len(topology.parents)))
    uniforms = jax.random.uniform(key, (depth, width))
    short = unroll and depth * width <= TURNS

    def sibling(state, candidate):
        chosen, spent, nominal, coupled, parted = state
        u, here, node, target, draft, offer, allowed = candidate
        examined = here & (chosen < 0) & (draft > 0)
        wish = rule.decide(spent, target, draft, offer)
        probability, charge, spent_after = jax.tree.map(
            lambda x, no: jnp.where(allowed, x, no), wish, (0.0, 0.0, spent)
        )
        strict = ratio(target, draft)
        accept = u < probability
        state = (
            jnp.where(examined & accept, node, chosen),
            jnp.where(examined, spent_after, spent),
            nominal + jnp.where(examined, charge, 0.0),
            coupled + jnp.where(examined & ~parted, jnp.abs(probability - strict), 0.0),
            parted | (examined & (accept != (u < strict))),
        )
        return state, (jnp.where(examined, node, -1), spent)

    def level(state, u):
        node, going, *ledger = state
        slot = slot_of[node]
        row = jax.tree.map(
            lambda x: x[slot],
            (candidates.nodes, candidates.target, candidates.draft, candidates.offers, candidates.allowed),
        )
        here = jnp.broadcast_to(going & (slot >= 0), (width,))
        start = (jnp.int32(-1), *ledger)
        (chosen, *ledger), visits = jax.lax.scan(sibling, start, (u, here, *row), unroll=short)
        return (jnp.where(chosen >= 0, chosen, node), chosen >= 0, *ledger), (chosen, visits)

    zero = jnp.float32(0)
    start = (jnp.int32(0), jnp.bool_(True), zero, zero, zero, jnp.bool_(False))
    (end, _, _, *charges), (below, visits) = jax.lax.scan(level, start, uniforms, unroll=short)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), below]), end, charges, (*visits, uniforms)


def _turns(candidates: Candidates, visits, size: int) -> Turns:
    def by_node(nodes, values, otherwise):
        table = jnp.full((size, *values.shape[2:]), otherwise, values.dtype)
        return table.at[jnp.where(nodes >= 0, nodes, size)].set(values, mode="drop")

    known = candidates.target, candidates.draft, candidates.offers, candidates.allowed
    known = jax.tree.map(lambda x: by_node(candidates.nodes, x, 0), known)
    nodes, spent, uniform = visits
    return Turns(*known, by_node(nodes, spent, jnp.nan), by_node(nodes, uniform, jnp.nan))


def cosines(features: jax.Array) -> jax.Array:
    """Cosine similarity of every two of N features [N, h], float32 [N, N]."""
    unit = features.astype(jnp.float32)
    unit /= jnp.maximum(jnp.linalg.norm(unit, axis=-1, keepdims=True), 1e-12)
    return unit @ unit.T


def _normalise(mass: jax.Array, otherwise: jax.Array) -> jax.Array:
    """`mass` [M, V] scaled to sum 1 by row; `otherwise` where nothing is left, which rounding alone brings about."""
    total = jnp.sum(mass, axis=-1, keepdims=True)
    return jnp.where(total > 0, mass / jnp.where(total > 0, total, 1.0), otherwise)
