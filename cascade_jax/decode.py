"""Decoding: prefill, then draft, verify and commit until every picture has its tokens, all on the device.

There is one loop. Autoregressive decoding is the loop with the one-node tree; a method is a rule, a tree and a drafter.
Everything here is a pure function of (parameters, state); what shapes the program sits in a hashable `Program`.

A target is a module that says how a pass goes (see `models.llamagen`), or functions over a cache of its own (see
`targets`): `passes` makes one of both.

Shapes: `B` sequences, `G` guidance branches (2 with guidance, else 1), `R = G B` rows, conditional ones
first. `P` prefix slots, `N` nodes, `D` tree depth, `d` model width, `L` output tokens.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from cascade_jax import cache as kv
from cascade_jax import mesh, passes
from cascade_jax import sampling as warping
from cascade_jax.acceptance import Rule
from cascade_jax.cache import Context, Prefix
from cascade_jax.draft import Draft, Outcome
from cascade_jax.passes import Pass, Passes
from cascade_jax.sampling import Layout, Sampling
from cascade_jax.tree import DynamicTree, Tree
from cascade_jax.verify import TRAVERSAL, WALK, Turns, Verdict, check, conclude, finish, walk


@dataclass(frozen=True)
class Program:
    """What shapes the compiled program.

    Attributes:
      target: the target's graph definition, or anything hashable that `passes.of` takes in its place.
      drafter: the drafter's (see `draft.Drafter`), or None if the tree is a lone root.
      tree: the draft tree.
      length: output tokens of a picture (L).
      layout: what may stand where in the output; None for no restriction.
      taps: the target's layers that the drafter reads in place of its features (see `models.transformer.run_target`).
      noise: where randomness comes from: "fresh" numbers every step, or "gumbel" noise that belongs to the output
        position, so that the output is one and the same for every tree and drafter (see `acceptance.Exact`).
      verifier: see `verify.verify`.
    """

    target: Any
    drafter: nnx.GraphDef | None
    tree: Tree | DynamicTree
    length: int
    layout: Layout | None = None
    taps: tuple[int, ...] = ()
    noise: str = warping.FRESH
    verifier: str = WALK

    def check(self, rule: Rule) -> None:
        """Raises a ValueError unless it can be decoded with this rule."""
        check(rule, self.noise, self.verifier, drafts=self.tree.depth > 0)


@struct.dataclass
class Stats:
    """Sums over a sequence's steps, [B] each. The prefill, which yields the first token, is not a step.

    Attributes:
      steps: verification steps, each one pass of the target.
      accepted: draft tokens among the output.
      nominal: probability mass that the rule added.
      coupled: probability of parting from the strict decoder (see `verify.Verdict`).
      diverged: steps in which the strict decoder, given the same random numbers, would have decided differently.
    """

    steps: jax.Array
    accepted: jax.Array
    nominal: jax.Array
    coupled: jax.Array
    diverged: jax.Array


@struct.dataclass
class DecodeState:
    """Everything that a step reads and writes.

    Attributes:
      tokens: int [B, L + D + 1], the output so far; what lies beyond `count` is not part of it.
      count: int [B], tokens of the output that are known; the last of them is the next tree's root.
      keys: [B], every sequence's own random key. Step s draws from fold_in(key, s): nothing else in the batch matters.
      cache: what the target keeps of prefix and accepted tokens, the root's excluded: keys and values, see `passes`.
      length: int [R], slots of the cache in use.
      holes: as in `Prefix`.
      drafter: the drafter's memory, its own business; None without a drafter.
      stats: sums so far.
    """

    tokens: jax.Array = mesh.by_sequence()
    count: jax.Array = mesh.by_sequence()
    keys: jax.Array = mesh.by_sequence()
    cache: Any = mesh.by_row()
    length: jax.Array = mesh.by_row()
    holes: jax.Array | None = mesh.by_row()
    drafter: Any | None = struct.field()
    stats: Stats = mesh.by_sequence()


@struct.dataclass
class Seen:
    """What a step saw and did.

    Attributes:
      draft: the tree.
      features: [R, N, d], the target's after every node.
      verdict: with a leading B.
      turns: how every draft fared, with a leading B; None for a lone root.
    """

    draft: Draft
    features: jax.Array
    verdict: Verdict
    turns: Turns | None


def prefill(program: Program, params, prefix: Prefix, keys: jax.Array, sampling: Sampling) -> DecodeState:
    """Reads the prefix and draws the first token.

    Args:
      params: {"target": state, "drafter": state or None}.
      keys: a random key for every sequence, [B].
    """
    target, batch, depth = passes.of(program.target, params["target"]), keys.shape[0], program.tree.depth
    capacity = kv.capacity(prefix.embeddings.shape[1], program.length, depth)
    seen, cache = target.read(prefix, capacity, program.taps)
    last = jnp.take_along_axis(seen.said, (prefix.length - 1)[:, None, None], axis=1)
    zeroth = jnp.zeros((batch, 1), jnp.int32)
    logits = _guided_logits(program, target, last, sampling, zeroth)[:, 0]
    first_keys = jax.vmap(lambda key: jax.random.fold_in(key, program.length))(keys)  # no step has that number
    if program.noise == warping.FRESH:
        first = warping.draw_warped(first_keys, logits, sampling)
    else:
        first = warping.drawn_with(warping.position_noise(keys, zeroth, logits.shape[-1])[:, 0], logits, sampling)
    tokens = jnp.zeros((batch, program.length + depth + 1), jnp.int32).at[:, 0].set(first)

    memory = None
    if program.drafter is not None:
        drafter = nnx.merge(program.drafter, params["drafter"])
        memory = drafter.start(target.module, program.tree, prefix, seen.read, first, capacity, program.layout)
    count, zero = jnp.ones(batch, jnp.int32), jnp.zeros(batch)
    stats = Stats(count * 0, count * 0, zero, zero, zero)
    return DecodeState(tokens, count, keys, cache, prefix.length, prefix.holes, memory, stats)


def step(program: Program, params, state: DecodeState, rule: Rule, sampling: Sampling) -> tuple[DecodeState, Seen]:
    """One step: draft a tree, verify it in one pass of the target, commit the accepted path. Finished rows stay put."""
    with jax.named_scope("draft"):
        noise = position_noise(program, params, state)
        drafted, memory = propose(program, params, state, sampling, noise)
    with jax.named_scope("target"):
        seen, fresh = target_pass(program, params, state, drafted)
    with jax.named_scope("verify"):
        verdict, turns, laws = decide(program, params, state, drafted, seen, rule, sampling, noise)
    with jax.named_scope("commit"):
        after = commit(program, params, state, drafted, memory, seen, fresh, verdict, laws)
    return after, Seen(drafted, seen.features, verdict, turns)


def run(program: Program, params, state: DecodeState, rule: Rule, sampling: Sampling, limit=None) -> DecodeState:
    """Steps until every sequence is complete, or `limit` more steps were taken (traced; None for no limit)."""

    def unfinished(state):
        return mesh.anywhere(jnp.any(state.count < program.length))

    def go(carry):
        taken, more, _ = carry
        return more if limit is None else more & (taken < limit)

    def body(carry):
        taken, _, state = carry
        state, _ = step(program, params, state, rule, sampling)
        return taken + 1, unfinished(state), state

    return jax.lax.while_loop(go, body, (jnp.int32(0), unfinished(state), state))[2]


def generate(program: Program, params, prefix: Prefix, keys: jax.Array, rule: Rule, sampling: Sampling) -> DecodeState:
    """From prefix to the last token in one program."""
    return run(program, params, prefill(program, params, prefix, keys, sampling), rule, sampling)


def teacher_forced(target, prefix: Prefix, tokens: jax.Array, taps: tuple[int, ...] = ()) -> jax.Array:
    """The target's features [R, P + T - 1, d] over prefix and given tokens int [R, T], the last token left out.

    Row r's feature at slot `prefix.length[r] - 1 + t` yields token t's distribution: see `at_tokens`. With `taps` the
    layers that a drafter reads stand behind the features: see `passes.split`.
    """
    rows, slots, width = prefix.embeddings.shape
    size = slots + tokens.shape[1] - 1
    place = jax.vmap(lambda x, new, at: jax.lax.dynamic_update_slice_in_dim(x, new, at, axis=0))
    x = jnp.zeros((rows, size, width), prefix.embeddings.dtype).at[:, :slots].set(prefix.embeddings)
    x = place(x, target.embed(tokens[:, :-1]).astype(x.dtype), prefix.length)
    seen = kv.causal(size)[None]
    if prefix.holes is not None:
        holes = jnp.pad(prefix.holes, ((0, 0), (0, size - slots)))
        seen = seen & ~holes[:, None] | jnp.eye(size, dtype=bool)
    positions = jnp.broadcast_to(jnp.arange(size), (rows, size))
    return target(x, Context(target.rope(positions), kv.bias(seen)[:, None]), taps=taps)[0]


def at_tokens(features: jax.Array, prefix: Prefix, count: int) -> jax.Array:
    """The features [R, count, d] that yield the tokens, out of `teacher_forced`'s."""
    cut = jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, count, axis=0))
    return cut(features, prefix.length - 1)


def position_noise(program: Program, params, state: DecodeState) -> jax.Array | None:
    """The noise [B, D + 1, V] of the output positions that a step may reach; None where it is fresh."""
    if program.noise == warping.FRESH:
        return None
    places = jnp.arange(program.tree.depth + 1)
    vocab = warping.columns(passes.of(program.target, params["target"]).vocab, program.layout)
    return warping.position_noise(state.keys, state.count[:, None] + places, vocab)


def propose(
    program: Program, params, state: DecodeState, sampling: Sampling, noise: jax.Array | None = None
) -> tuple[Draft, Any | None]:
    """First part of a step: a tree of drafts behind the last known token, and the drafter's memory."""
    if program.drafter is None:
        return Draft(jnp.take_along_axis(state.tokens, (state.count - 1)[:, None], axis=1), None, None), None
    target = passes.of(program.target, params["target"]).module
    drafter = nnx.merge(program.drafter, params["drafter"])
    keys, noise = _step_keys(state, 0), position_noise(program, params, state) if noise is None else noise
    return drafter.propose(target, program.tree, state.drafter, keys, sampling, state.count, program.layout, noise)


def target_pass(program: Program, params, state: DecodeState, drafted: Draft) -> tuple[Pass, Any]:
    """Second part: one pass over all nodes; and what committing some of them takes, their keys and values."""
    branches = _branches(state)
    depths, ancestors = _shape_of(program, drafted)
    if depths.shape[0] > 1:
        depths, ancestors = jnp.concatenate([depths] * branches), jnp.concatenate([ancestors] * branches)
    tokens, filled = jnp.concatenate([drafted.tokens] * branches), kv.Filled(state.length, state.holes)
    target = passes.of(program.target, params["target"])
    return target.look(state.cache, filled, tokens, depths, ancestors, program.taps)


def decide(
    program: Program,
    params,
    state: DecodeState,
    drafted: Draft,
    seen: Pass,
    rule: Rule,
    sampling: Sampling,
    noise: jax.Array | None = None,
) -> tuple[Verdict, Turns | None, jax.Array | None]:
    """Third part: which drafts are accepted, and the token behind them (see `verify`); how every draft fared; and the
    target's distributions [B, N, V] behind all nodes, if the drafter reads them."""
    program.check(rule)
    target, keys = passes.of(program.target, params["target"]), _step_keys(state, 1)
    noise = position_noise(program, params, state) if noise is None else noise
    branches = _branches(state)
    depths = jnp.broadcast_to(_shape_of(program, drafted)[0], drafted.tokens.shape)

    def logits_at(nodes):  # int [B, n] -> [B, n, V]
        chosen = jnp.take_along_axis(seen.said, jnp.concatenate([nodes] * branches)[..., None], axis=1)
        positions = state.count[:, None] + jnp.take_along_axis(depths, nodes, axis=1)
        return _guided_logits(program, target, chosen, sampling, positions)

    def laws_of(logits, nodes):
        if noise is None:
            return warping.warp(logits, sampling)
        below = jnp.take_along_axis(depths, nodes, axis=1)[..., None]
        return warping.settled(jnp.take_along_axis(noise, below, axis=1), logits, sampling)

    static, size = isinstance(program.tree, Tree), program.tree.num_nodes
    inner = np.array(program.tree.inner if static else range(size), np.int32)
    batch = keys.shape[0]  # not len(keys): an exported program does not know its batch
    every = program.drafter is not None and nnx.merge(program.drafter, params["drafter"]).reads_laws
    chain = size - len(inner) == 1 and size > 1 and not every  # its one leaf costs less here than the head once more
    nodes = np.arange(size, dtype=np.int32) if every or chain else inner
    nodes = jnp.broadcast_to(nodes, (batch, len(nodes)))
    logits = logits_at(nodes) if size > 1 or every else None
    judged = slice(len(inner)) if chain else slice(None)
    laws = None if logits is None else laws_of(logits[:, judged], nodes[:, judged])
    topology = program.tree.topology if static else drafted.topology

    def one(key, topology, tokens, draft_probs, laws, features):
        return walk(key, topology, inner, tokens, draft_probs, laws, features, rule, lambda x: x, program.verifier)

    at_inner = laws[:, inner] if every else laws
    walked = jax.vmap(one, (0, None if static else 0, 0, 0, 0, 0))(
        keys, topology, drafted.tokens, drafted.probs, at_inner, seen.features[:batch]
    )
    end = walked.end[:, None]
    at_end = lambda table: jnp.take_along_axis(table, end[..., None], axis=1)
    if every:
        return jax.vmap(finish)(walked, at_end(laws)[:, 0]), walked.turns, laws
    last = at_end(logits) if chain else logits_at(end)
    if noise is not None:
        return jax.vmap(finish)(walked, laws_of(last, end)[:, 0]), walked.turns, None
    bonus = warping.draw_warped(walked.key, last[:, 0], sampling, walked.leftover)
    return jax.vmap(conclude)(walked, bonus), walked.turns, None


def commit(
    program: Program,
    params,
    state: DecodeState,
    drafted: Draft,
    memory: Any | None,
    seen: Pass,
    fresh: Any,
    verdict: Verdict,
    laws: jax.Array | None = None,
) -> DecodeState:
    """Fourth part: adds the accepted path and the bonus token to output, caches and sums; the drafter observes it."""
    branches = _branches(state)
    steps = jnp.arange(program.tree.depth + 1)
    path = jnp.maximum(verdict.path, 0)  # what lies behind the accepted nodes is written too, and overwritten later
    below = jnp.concatenate([path[:, 1:], path[:, :1]], axis=1)
    drafts = jnp.take_along_axis(drafted.tokens, below, axis=1)
    emitted = jnp.where(steps == verdict.accepted[:, None], verdict.next_token[:, None], drafts)
    kept = jnp.minimum(verdict.accepted + 1, program.length - state.count)  # 0 in finished rows
    tokens = jax.vmap(lambda t, e, at: jax.lax.dynamic_update_slice(t, e, (at,)))(state.tokens, emitted, state.count)

    row_path, row_kept = jnp.concatenate([path] * branches), jnp.concatenate([kept] * branches)
    target = passes.of(program.target, params["target"])
    cache = target.keep(state.cache, fresh, state.length, row_path, row_kept, seen.features[:, 0, 0])
    if memory is not None:
        drafter, keys = nnx.merge(program.drafter, params["drafter"]), _step_keys(state, 2)
        outcome = Outcome(drafted, path, verdict.accepted, emitted, kept, seen.read, laws, keys, state.count)
        memory = drafter.observe(target.module, memory, outcome)
    going = kept > 0
    stats = Stats(
        state.stats.steps + going,
        state.stats.accepted + jnp.maximum(kept - 1, 0),
        state.stats.nominal + jnp.where(going, verdict.nominal, 0.0),
        state.stats.coupled + jnp.where(going, verdict.coupled, 0.0),
        state.stats.diverged + jnp.where(going, verdict.diverged, False),
    )
    return state.replace(
        tokens=tokens,
        count=state.count + kept,
        cache=cache,
        length=state.length + row_kept,
        drafter=memory,
        stats=stats,
    )


def check_drafter(drafter: Any, noise: str, verifier: str) -> None:
    """Raises a ValueError unless there is such noise, and a drafter, a module or None, is for the verifier."""
    if noise not in warping.NOISES:
        raise ValueError(f"noise must be one of {', '.join(warping.NOISES)}, not {noise!r}")
    if verifier == TRAVERSAL and getattr(drafter, "coupled", False):
        raise ValueError("coupled redraws are lossless with the walk alone: traversal judges drafts that they keep")


prefill_jit = jax.jit(prefill, static_argnums=0)
step_jit = jax.jit(step, static_argnums=0)
run_jit = jax.jit(run, static_argnums=0, donate_argnums=2)
generate_jit = jax.jit(generate, static_argnums=0)


def _shape_of(program: Program, drafted: Draft) -> tuple[jax.Array, jax.Array]:
    """Depths int [1 or B, N] and ancestor masks bool [1 or B, N, N] of the draft tree."""
    if isinstance(program.tree, Tree):
        return jnp.asarray(program.tree.topology.depths)[None], jnp.asarray(program.tree.topology.ancestors)[None]
    return drafted.topology.depths, drafted.topology.ancestors


def _branches(state: DecodeState) -> int:
    return state.length.shape[0] // state.count.shape[0]


def _guided_logits(
    program: Program, target: Passes, said: jax.Array, sampling: Sampling, positions: jax.Array
) -> jax.Array:
    """Guided logits [B, n, V] of the tokens at output `positions` int [B, n], from what was said there, [R, n, x]."""
    said = said.reshape(-1, *positions.shape, said.shape[-1])
    logits = warping.guided_logits(target.logits, said, sampling.guidance, linear=target.linear)
    return logits if program.layout is None else program.layout.constrain(logits, positions)


def _step_keys(state: DecodeState, part: int) -> jax.Array:
    """Every sequence's key for drafting (part 0), verifying (part 1) or observing (part 2) in its current step."""
    return jax.vmap(lambda key, step: jax.random.fold_in(jax.random.fold_in(key, step), part))(
        state.keys, state.stats.steps
    )
