"""Looking inside: how alike the target's features are, and every step of one picture.

    seen = trace(bundle, "a red ball on gravel", jax.random.key(0), cj.cascade(0.85, 0.5), cj.trees.EAGLE_25)
    interchangeable, convergent = sets(seen, step=12)
    rates, examined = acceptance_by_depth_and_rank(seen)
    heat = relaxation_map(seen)

`figures.draw_step` draws a step, `viewer` makes a page for a browser of all; how sure the target is of its tokens,
`confidence` says.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from cascade_jax import decode, interrupts, pipeline
from cascade_jax.acceptance import Bounded, Exact, Rule, ratio
from cascade_jax.bundle import Bundle, Prompt, default_sampling
from cascade_jax.methods import Method
from cascade_jax.rules.cascade import Cascade, Sets
from cascade_jax.sampling import FRESH, GUMBEL, Sampling
from cascade_jax.tree import DynamicTree, Tree
from cascade_jax.verify import WALK, Turns, cosines

REASONS = ("not visited", "rejected", "strict", "I", "C")
NOT_VISITED, REJECTED, STRICT, FIRST, SECOND = range(len(REASONS))
MAPS = ("coupled", "nominal", "relaxed")


@dataclasses.dataclass(frozen=True)
class Trace:
    """Every step of one picture: S steps, N nodes of a tree of depth D and width W, L output tokens, H x W codes.

    What a node's fields say of its draft holds for its turn, when all of its elder siblings were rejected. The root's
    entries are void, and so are those of nodes that a dynamic tree lacks, whose token is -1.

    Attributes:
      rule: the acceptance rule.
      output: int [L], the picture's tokens.
      image: uint8, the picture.
      places: int [H, W], where in the output the picture's codes stand.
      position: int [S], the place in the output that the root's children aspire to.
      tokens: int [S, N], every node's token.
      parents: int [S, N], every node's parent; -1 for the root.
      depths: int [S, N], 0 for the root.
      cosine: float32 [S, N, N], of every two nodes' features: the target's hidden states after them.
      target: float32 [S, N], the draft's probability in the target's residual, r(x).
      draft: float32 [S, N], its probability under the drafter, p(x).
      strict: float32 [S, N], min(1, r(x) / p(x)), the probability of accepting it strictly.
      probability: float32 [S, N], that of accepting it by the rule; NaN where not visited.
      gained: float32 [S, N], the mass that the rule added to r(x); 0 where not visited.
      spent: float32 [S, N], the ledger when its turn came; NaN where not visited.
      first: float32 [S, N], the mass of CASCADE's I, granted or not; 0 with other rules.
      second: float32 [S, N], that of its C, of which I may hold some already; likewise.
      beside: float32 [S, N, W], the masses that siblings could bring in, r(sibling), in their order. [S, N, 0] with
        other rules. Which of them are in I, `sets` says; a sibling of the draft's own token brings nothing.
      below: float32 [S, N, W], the same of the draft's children.
      uniform: float32 [S, N], the random number that was held against both; NaN where not visited.
      reason: int8 [S, N], an index into `REASONS`: a draft is accepted because it would have been strictly, else by the
        rule's first kind of relaxation alone (CASCADE's I, or all that another rule adds), else by the second too (C).
      path: int [S, D + 1], the accepted nodes from the root down; -1 after the last.
      accepted: int [S], how many drafts were.
      next_token: int [S], the token that the target added.
      nominal: float32 [S], as `coupled` and `diverged`, bool [S]: see `verify.Verdict`.
    """

    rule: Rule
    output: np.ndarray
    image: np.ndarray
    places: np.ndarray
    position: np.ndarray
    tokens: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    cosine: np.ndarray
    target: np.ndarray
    draft: np.ndarray
    strict: np.ndarray
    probability: np.ndarray
    gained: np.ndarray
    spent: np.ndarray
    first: np.ndarray
    second: np.ndarray
    beside: np.ndarray
    below: np.ndarray
    uniform: np.ndarray
    reason: np.ndarray
    path: np.ndarray
    accepted: np.ndarray
    next_token: np.ndarray
    nominal: np.ndarray
    coupled: np.ndarray
    diverged: np.ndarray

    def __len__(self) -> int:
        return len(self.position)


def trace(
    bundle: Bundle,
    prompt: str | Prompt,
    key: jax.Array,
    rule: Rule,
    tree: Tree | DynamicTree,
    sampling: Sampling | None = None,
    progress: Callable[[int, int], None] | None = None,
    drafter: nnx.Module | None = None,
    noise: str | None = None,
    verifier: str = WALK,
) -> Trace:
    """Draws a picture step by step: the picture that `pipeline.generate` draws from this prompt alone with this key.

    Args:
      key: as of `pipeline.generate`: a random key, or an array of the picture's own, [1].
      sampling: None for the model's own settings.
      progress: called before every step with (tokens drawn, tokens in all).
      drafter, noise, verifier: as of `pipeline.generate`. Traversal judges paths as a whole: no draft is visited, and
        none has a random number or a reason of its own.

    Raises:
      ValueError: if the model is divided over devices, the prompt is unreadable, or a setting is out of range.
    """
    if bundle.mesh is not None:
        raise ValueError("a trace is made on one device: load the model without a mesh")
    sampling = (default_sampling(bundle.config) if sampling is None else sampling).checked()
    bundle = bundle.drafting(drafter)
    program = bundle.program(tree, noise or (GUMBEL if isinstance(rule, Exact) else FRESH), verifier)
    program.check(rule)
    params = bundle.decoding_params(program)
    state = pipeline.start(bundle, program, [prompt], key, sampling)
    rows = []
    while (drawn := int(state.count[0])) < program.length:
        interrupts.check()
        if progress is not None:
            progress(drawn, program.length)
        state, row = _step(program, params, state, _Watched(rule) if thresholds(rule) else rule, sampling)
        rows.append(jax.device_get(row))
    fields = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    alone = fields.pop("alone")
    visited, accepted = ~np.isnan(fields["uniform"]), np.zeros(alone.shape, bool)
    for step, path in enumerate(fields["path"]):
        accepted[step, path[path > 0]] = True
    fields["reason"] = np.select(
        [~visited, ~accepted, fields["uniform"] < fields["strict"], fields["uniform"] < alone],
        [NOT_VISITED, REJECTED, STRICT, FIRST],
        SECOND,
    ).astype(np.int8)
    output = np.asarray(state.tokens[:, : program.length])
    return Trace(rule=rule, output=output[0], image=bundle.images(output)[0], places=places(bundle), **fields)


def of_method(
    bundle: Bundle,
    method: Method,
    prompt: str | Prompt,
    seed: int,
    number: int = 0,
    sampling: Sampling | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """The trace of the picture of that number, as `methods.draw_all` draws it. Raises as `trace`."""
    key = pipeline.picture_keys(jax.random.key(seed), np.array([number]))
    rule, tree, drafter = method.rule, method.tree, method.drafter
    return trace(bundle, prompt, key, rule, tree, sampling, progress, drafter, **method.drawn)


class _Looked(NamedTuple):
    """CASCADE's offer, and the masses that it is made of; see `Trace`."""

    sets: Sets
    beside: jax.Array
    below: jax.Array


@struct.dataclass
class _Watched:
    """CASCADE's rule, whichever its ledger, that decides the same and remembers what it looked at."""

    rule: Rule

    def offer(self, siblings, j):
        def masses(tokens):
            brings = (tokens >= 0) & (tokens != siblings.tokens[j])
            return jnp.where(brings, siblings.residual[jnp.maximum(tokens, 0)], 0.0)

        own = self.rule.rule if isinstance(self.rule, Bounded) else self.rule
        below = siblings.next_probs[j] if own.mass == "next" else masses(siblings.grandchildren[j])
        return _Looked(self.rule.offer(siblings, j), masses(siblings.tokens), below)

    def decide(self, spent: jax.Array, target: jax.Array, draft: jax.Array, offer: Any):
        return self.rule.decide(spent, target, draft, offer.sets)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(program, params, state, rule, sampling):
    """`decode.step` of one picture, and what a `Trace` holds of it; `alone` is the probability of accepting a draft if
    there were but the first kind of relaxation."""
    position = state.count
    state, seen = decode.step(program, params, state, rule, sampling)
    tokens, topology = seen.draft.tokens, seen.draft.topology
    if topology is None:
        topology = jax.tree.map(lambda x: jnp.asarray(x)[None], program.tree.topology)
    row = {
        "position": position,
        "tokens": tokens,
        "parents": topology.parents,
        "depths": topology.depths,
        "cosine": jax.vmap(cosines)(seen.features[: len(tokens)]),
        **{name: getattr(seen.verdict, name) for name in ("path", "accepted", "next_token")},
        **{name: getattr(seen.verdict, name) for name in ("nominal", "coupled", "diverged")},
        **_fared(rule, seen.turns, tokens),
    }
    return state, jax.tree.map(lambda x: x[0], row)


def _fared(rule: Rule, turns: Turns | None, tokens: jax.Array) -> dict[str, jax.Array]:
    """How drafts [1, N] fared; nobody knows where there are no turns."""
    zero, unknown = jnp.zeros(tokens.shape), jnp.full(tokens.shape, jnp.nan)
    none = jnp.zeros((*tokens.shape, 0))
    sets = {"first": zero, "second": zero, "beside": none, "below": none}
    if turns is None:
        known = dict.fromkeys(("target", "draft", "strict", "gained", "alone"), zero)
        return known | dict.fromkeys(("uniform", "probability", "spent"), unknown) | sets

    def decide(offers):
        judged = jax.vmap(jax.vmap(rule.decide))(turns.spent, turns.target, turns.draft, offers)
        return jax.tree.map(lambda x, no: jnp.where(turns.allowed, x, no), judged, (0.0, 0.0, turns.spent))

    first_only, visited = turns.offers, ~jnp.isnan(turns.uniform)
    probability, gained, _ = decide(turns.offers)
    if isinstance(turns.offers, _Looked):
        both, beside, below = turns.offers
        first_only = turns.offers._replace(sets=Sets(both.first, zero, zero))
        sets = {"first": both.first, "second": both.second, "beside": beside, "below": below}
    return {
        "target": turns.target,
        "draft": turns.draft,
        "strict": ratio(turns.target, turns.draft),
        "uniform": turns.uniform,
        "spent": turns.spent,
        "probability": jnp.where(visited, probability, jnp.nan),
        "gained": jnp.where(visited, gained, 0.0),
        "alone": decide(first_only)[0],
        **sets,
    }


def sets(
    trace: Trace, step: int, tau_pos: float | None = None, tau_seq: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The interchangeable and the convergent set of a step (the paper's equations 1 and 2), bool [N, N] each.

    Args:
      tau_pos: least cosine of siblings; None for the rule's.
      tau_seq: least cosine of a node and its child; likewise.

    Returns:
      Whether a and b are interchangeable siblings, at [a, b] and [b, a]; whether a and its child b converge, at [a, b].

    Raises:
      ValueError: if a threshold is left to a rule that has none.
    """
    own = thresholds(trace.rule)
    if own is None and (tau_pos is None or tau_seq is None):
        raise ValueError("this rule has no thresholds: give tau_pos and tau_seq")
    tau_pos = own[0] if tau_pos is None else tau_pos
    tau_seq = own[1] if tau_seq is None else tau_seq
    parents, cosine = trace.parents[step], trace.cosine[step]
    draft = (trace.tokens[step] >= 0) & (trace.depths[step] > 0)
    both = draft[:, None] & draft
    siblings = both & (parents[:, None] == parents) & ~np.eye(len(parents), dtype=bool)
    below = both & (parents == np.arange(len(parents))[:, None])
    return siblings & (cosine >= tau_pos), below & (cosine >= tau_seq)


def thresholds(rule: Rule) -> tuple[float, float] | None:
    """tau_pos and tau_seq of a CASCADE rule, whichever its ledger; None for other rules."""
    rule = rule.rule if isinstance(rule, Bounded) else rule
    return (float(rule.tau_pos), float(rule.tau_seq)) if isinstance(rule, Cascade) else None


def acceptance_by_depth_and_rank(traces: Trace | Sequence[Trace]) -> tuple[np.ndarray, np.ndarray]:
    """How often drafts are accepted when their turn comes, by depth (from 1) and sibling rank (from 0).

    Returns:
      Shares [D, W], NaN where none had a turn; and how many had, int [D, W].
    """
    traces = [traces] if isinstance(traces, Trace) else traces
    depth = max(int(own.depths.max(initial=0)) for own in traces)
    width = max(int(_ranks(own).max(initial=0)) + 1 for own in traces)
    accepted, examined = np.zeros((2, depth, width), int)
    for own in traces:
        for counts, chosen in ((examined, own.reason >= REJECTED), (accepted, own.reason >= STRICT)):
            np.add.at(counts, (own.depths[chosen] - 1, _ranks(own)[chosen]), 1)
    return np.where(examined > 0, accepted / np.maximum(examined, 1), np.nan), examined


def _ranks(trace: Trace) -> np.ndarray:
    """Every node's rank among its siblings, int [S, N]: they stand in that order."""
    same = trace.parents[:, :, None] == trace.parents[:, None, :]
    return np.sum(np.tril(same, -1), axis=2)


def relaxation_map(trace: Trace, shape: tuple[int, int] | None = None, *, what: str = "coupled") -> np.ndarray:
    """Where on the picture the rule strayed from strict acceptance, float [H, W], a value for every code.

    Args:
      shape: H and W; None for the picture's own.
      what: "coupled": |acceptance probability - strict one|, summed over the drafts that had a turn there; "nominal":
        the mass that the rule added to them; "relaxed": 1 where a draft was accepted that was not to be strictly.

    Raises:
      ValueError: if `what` is none of these, or `shape` does not hold the picture.
    """
    if what not in MAPS:
        raise ValueError(f"what must be one of {', '.join(MAPS)}, not {what!r}")
    charge = {
        "coupled": np.abs(trace.probability - trace.strict),
        "nominal": trace.gained,
        "relaxed": (trace.reason >= FIRST).astype(np.float32),
    }[what]
    visited = trace.reason != NOT_VISITED
    place = trace.position[:, None] + trace.depths - 1
    total = np.zeros(len(trace.output) + trace.path.shape[1])  # the last tree may reach beyond the end
    np.add.at(total, place[visited], charge[visited])
    return total[trace.places] if shape is None else total[trace.places].reshape(shape)


def places(bundle: Bundle) -> np.ndarray:
    """Where in the output a picture's codes stand, int [H, W]: some models have other tokens between them."""
    return np.asarray(bundle.config.target.codes(np.arange(bundle.length)[None])[0])


def similarity(features: jax.Array) -> np.ndarray:
    """Cosine similarity of every two positions' features [T, h], float32 [T, T] (the paper's figures 9 and 10)."""
    return np.asarray(_similarity(jnp.asarray(features)[None])[0])


def similarity_rows(features: jax.Array, width: int) -> np.ndarray:
    """The same within every row of the picture, float32 [H, width, width] (the paper's figure 3).

    Args:
      features: [H * width, h], of all codes from the first row to the last.

    Raises:
      ValueError: if they make no rows of that width.
    """
    if width < 1 or len(features) % width:
        raise ValueError(f"{len(features)} features make no rows of {width}")
    return np.asarray(_similarity(jnp.asarray(features).reshape(-1, width, features.shape[-1])))


_similarity = jax.jit(jax.vmap(cosines))
