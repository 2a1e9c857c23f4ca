"""Acceptance rules: how likely a draft token is accepted, given what the target thinks of it and its surroundings.

Strict speculative sampling accepts a draft x with probability min(1, r(x) / p(x)), `r` being what remains of the
target's distribution and `p` the drafter's. A relaxed rule puts something larger in place of r(x). A rule here is a
small frozen pytree with two pure functions, in the way of an optax transformation:

  offer(siblings, j)                -> Offer: the masses that candidate j could gain. Vocabulary-sized work, no ledger.
  decide(spent, target, draft, offer) -> (acceptance probability, nominal charge, spent). Scalars, ledger in hand.

`offer` is computed for all inner nodes of a tree at once; only `decide` runs along the walk. A rule's thresholds are
leaves, so a sweep over them compiles once and can be vmapped; what changes the program is static.

Ledgers. The *nominal* charge of a candidate is the probability mass its rule added, the quantity that CASCADE's paper
budgets. The *coupled* charge is |acceptance probability - strict acceptance probability|: fed the same random numbers,
the relaxed and the strict decoder part at this candidate with exactly that probability. A step whose coupled charges
cannot exceed d emits a law within total variation distance d of the target's own (coupling inequality); that is what
`bounded` enforces for any rule. The nominal ledger bounds nothing: where p(x) is small, a tiny mass turns a certain
rejection into a certain acceptance.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cascade_jax.sampling import top


@struct.dataclass
class Siblings:
    """One node's children as rules see them. W children, W2 grandchildren under each, V tokens.

    Attributes:
      tokens: int [W]; -1 where there is no child.
      residual: [V], what remains of the target's distribution when candidate j is examined (`r`).
      draft: [V], the drafter's distribution then: earlier siblings removed, renormalised (`p`).
      alike: [W, W], cosine similarity between the children's features.
      grandchildren: int [W, W2], the tokens of every child's own children; -1 where there is none.
      continued: [W, W2], cosine similarity between a child's feature and its children's.
      next_probs: [W, W2], the target's probability of every grandchild, after its parent.
    """

    tokens: jax.Array
    residual: jax.Array
    draft: jax.Array
    alike: jax.Array
    grandchildren: jax.Array
    continued: jax.Array
    next_probs: jax.Array


@struct.dataclass
class Offer:
    """What a rule could add to candidate x's ratio r(x) / p(x).

    Attributes:
      first: mass added to r(x).
      second: mass added after that, if `first` was not.
      second_after_first: the same, if `first` was: entries that both contribute count once.
      draft: mass added to p(x).
    """

    first: jax.Array
    second: jax.Array
    second_after_first: jax.Array
    draft: jax.Array


class Rule(Protocol):
    """The two functions of an acceptance rule."""

    def offer(self, siblings: Siblings, j: jax.Array) -> Offer: ...

    def decide(
        self, spent: jax.Array, target: jax.Array, draft: jax.Array, offer: Offer
    ) -> tuple[jax.Array, jax.Array, jax.Array]: ...


def ratio(target: jax.Array, draft: jax.Array) -> jax.Array:
    """min(1, target / draft), and 0 for a token that the drafter cannot have proposed."""
    return jnp.where(draft > 0, jnp.minimum(1.0, target / jnp.where(draft > 0, draft, 1.0)), 0.0)


def mass_at(probs: jax.Array, tokens: jax.Array, chosen: jax.Array) -> jax.Array:
    """Summed probability of the chosen tokens."""
    return jnp.sum(jnp.where(chosen, probs[jnp.maximum(tokens, 0)], 0.0), axis=-1)


def _only(mass: jax.Array, draft: jax.Array | float = 0.0) -> Offer:
    zero = jnp.zeros_like(mass)
    return Offer(mass, zero, zero, zero + draft)


@struct.dataclass
class Strict:
    """Lossless speculative sampling (Leviathan et al. 2023; the paper's Algorithm 1 and "naive" rows)."""

    def offer(self, siblings, j):
        return _only(jnp.zeros(()))

    def decide(self, spent, target, draft, offer):
        return ratio(target, draft), jnp.zeros_like(target), spent


@struct.dataclass
class _Additive:
    """Rules that add their whole offer, whatever was spent before."""

    def decide(self, spent, target, draft, offer):
        # kept apart from the bare ratio so that an empty offer leaves it bit for bit
        return ratio(target + offer.first, draft + offer.draft), offer.first, spent


def _nearby(siblings: Siblings, j: jax.Array, neighbours: jax.Array, limit: jax.Array) -> Offer:
    """The mass of the longest prefix of x's neighbours, nearest first, whose cumulative mass is within `limit`."""
    near = siblings.residual[neighbours[jnp.maximum(siblings.tokens[j], 0)]]
    return _only(jnp.sum(jnp.where(jnp.cumsum(near) <= limit, near, 0.0)))


@struct.dataclass
class Lantern(_Additive):
    """LANTERN (Jang et al. 2024, arXiv 2410.03355): adds the mass of the token's nearest neighbours in the codebook, as
    many of them, nearest first, as have a cumulative mass within `delta`."""

    neighbours: jax.Array
    delta: jax.Array

    def offer(self, siblings, j):
        return _nearby(siblings, j, self.neighbours, self.delta)


@struct.dataclass
class LanternPP(_Additive):
    """LANTERN++ (Park et al. 2025, arXiv 2502.06352): as LANTERN, within (lambda - 1) r(x), and on a deep tree."""

    neighbours: jax.Array
    lam: jax.Array

    def offer(self, siblings, j):
        own = siblings.residual[jnp.maximum(siblings.tokens[j], 0)]
        return _nearby(siblings, j, self.neighbours, (self.lam - 1.0) * own)


@struct.dataclass
class Grouped(_Additive):
    """Grouped speculative decoding (So et al. 2025, arXiv 2508.07747) on a drafter.

    Tokens are sorted by the target's residual; candidate and ratio are those of the group of `size` entries around the
    candidate's rank: (residual mass of the group) / (drafter mass of the group). It may accept less often than strict.
    """

    size: int = struct.field(pytree_node=False)

    def offer(self, siblings, j):
        token, r = jnp.maximum(siblings.tokens[j], 0), siblings.residual
        before, after = (self.size - 1) // 2, self.size // 2
        if self.size == 1:
            return _only(jnp.zeros(()))
        ids = jnp.arange(r.shape[0])
        # entries ranked before x: larger, or equal with a lower id; the group is clipped at both ends of the ranking
        ahead = (r > r[token]) | ((r == r[token]) & (ids < token))
        behind = ~ahead & (ids != token)
        key_ahead, nearest_ahead = top(jnp.where(ahead, -r, -jnp.inf)[::-1], before) if before else (None, None)
        key_behind, nearest_behind = top(jnp.where(behind, r, -jnp.inf), after)
        group = jnp.where(jnp.isfinite(key_behind), nearest_behind, -1)
        if before:
            group = jnp.concatenate([group, jnp.where(jnp.isfinite(key_ahead), r.shape[0] - 1 - nearest_ahead, -1)])
        return _only(mass_at(r, group, group >= 0), mass_at(siblings.draft, group, group >= 0))


@struct.dataclass
class Cascade:
    """CASCADE (the paper's equations 1-3 and Algorithm 2), nominal ledger.

    Candidate a gains the mass of I(a), its siblings with cosine >= tau_pos, then of C(a), its children with cosine >=
    tau_seq, each set whole or not at all, while the step's ledger stays within `budget`.
    """

    tau_pos: jax.Array
    tau_seq: jax.Array
    budget: jax.Array
    mass: str = struct.field(pytree_node=False, default="current")

    def offer(self, siblings, j):
        tokens, token = siblings.tokens, siblings.tokens[j]
        similar = (siblings.alike[j] >= self.tau_pos) & (tokens >= 0) & (tokens != token)
        below = siblings.grandchildren[j]
        converging = (siblings.continued[j] >= self.tau_seq) & (below >= 0)
        first = mass_at(siblings.residual, tokens, similar)
        if self.mass == "next":
            second = jnp.sum(jnp.where(converging, siblings.next_probs[j], 0.0))
            return Offer(first, second, second, jnp.zeros(()))
        converging &= below != token
        shared = jnp.any((below[:, None] == tokens) & similar, axis=-1)
        second = mass_at(siblings.residual, below, converging)
        return Offer(first, second, mass_at(siblings.residual, below, converging & ~shared), jnp.zeros(()))

    def decide(self, spent, target, draft, offer):
        take_first = spent + offer.first <= self.budget
        gained = jnp.where(take_first, offer.first, 0.0)
        second = jnp.where(take_first & (offer.first > 0), offer.second_after_first, offer.second)
        gained += jnp.where(spent + gained + second <= self.budget, second, 0.0)
        return ratio(target + gained, draft), gained, spent + gained


@struct.dataclass
class Bounded:
    """Any rule under the coupled ledger: a step's charges |accepted - strict| never sum to more than `budget`.

    What a rule asks for beyond the remainder is granted in part: its acceptance probability is held within the
    remaining budget of the strict one. Every step's law is then within total variation distance `budget` of the
    target's own.
    """

    rule: Rule
    budget: jax.Array

    def offer(self, siblings, j):
        return self.rule.offer(siblings, j)

    def decide(self, spent, target, draft, offer):
        strict = ratio(target, draft)
        wish, gained, _ = self.rule.decide(jnp.zeros_like(spent), target, draft, offer)
        left = jnp.maximum(self.budget - spent, 0.0)
        granted = jnp.clip(wish, strict - left, strict + left)
        # of the added mass, what took effect
        used = jnp.where(granted > strict, jnp.clip(granted * draft - target, 0.0, gained), 0.0)
        return granted, used, spent + jnp.abs(granted - strict)


def strict() -> Strict:
    """Lossless: the law of the output is the target's own."""
    return Strict()


def bounded(rule: Rule, budget: float) -> Bounded:
    """`rule` with the guarantee that no step strays from the target's law by more than `budget` in total variation."""
    return Bounded(rule, _within("budget", budget, 0.0, float("inf")))


def lantern(neighbours: jax.Array, delta: float) -> Lantern:
    """LANTERN with a table int [V, k] of every token's nearest neighbours, nearest first (see `nearest_codes`)."""
    return Lantern(jnp.asarray(neighbours, jnp.int32), _within("delta", delta, 0.0, float("inf")))


def lantern_pp(neighbours: jax.Array, lam: float) -> LanternPP:
    """LANTERN++ with a table int [V, k] of every token's nearest neighbours; lam >= 1, and 1 adds nothing."""
    return LanternPP(jnp.asarray(neighbours, jnp.int32), _within("lam", lam, 1.0, float("inf")))


def grouped(size: int) -> Grouped:
    """GSD with groups of `size` tokens; 25 in the paper's runs."""
    if size < 1:
        raise ValueError(f"a group has at least 1 token, not {size}")
    return Grouped(int(size))


def cascade(
    tau_pos: float, tau_seq: float, budget: float = 0.5, ledger: str = "nominal", mass: str = "current"
) -> Cascade | Bounded:
    """CASCADE with its two cosine thresholds and a budget per verification step.

    Args:
      tau_pos: threshold between siblings (interchangeability); above 1 switches that relaxation off.
      tau_seq: threshold between a node and its children (convergence); above 1 switches that relaxation off.
      budget: the most that a step may charge to its ledger.
      ledger: "nominal" charges added probability mass, as the paper does; "coupled" charges the probability of parting
        from the strict decoder, which makes `budget` a bound on the step's total variation distance.
      mass: where a child's mass in C is read: "current", the distribution under examination (Algorithm 2), or "next",
        the one after the candidate (equation 3 as printed).
    """
    if ledger not in ("nominal", "coupled"):
        raise ValueError(f'ledger must be "nominal" or "coupled", not {ledger!r}')
    if mass not in ("current", "next"):
        raise ValueError(f'mass must be "current" or "next", not {mass!r}')
    budget = _within("budget", budget, 0.0, float("inf"))
    taus = _within("tau_pos", tau_pos, -1.0, float("inf")), _within("tau_seq", tau_seq, -1.0, float("inf"))
    if ledger == "coupled":
        return Bounded(Cascade(*taus, jnp.full_like(budget, jnp.inf), mass), budget)
    return Cascade(*taus, budget, mass)


def nearest_codes(codebook: jax.Array, k: int) -> np.ndarray:
    """Every code's k nearest other codes by Euclidean distance, nearest first, int32 [V, k], from vectors [V, d]."""
    codebook = np.asarray(codebook, np.float32)
    if not 0 <= k < len(codebook):
        raise ValueError(f"k must be between 0 and {len(codebook) - 1} for {len(codebook)} codes, not {k}")
    table = np.empty((len(codebook), k), np.int32)
    norms = np.sum(codebook**2, axis=1)
    for start in range(0, len(codebook), 1024):
        rows = slice(start, start + 1024)
        distance = norms[rows, None] + norms - 2 * codebook[rows] @ codebook.T
        distance[np.arange(len(distance)), np.arange(start, start + len(distance))] = np.inf
        table[rows] = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return table


def _within(name: str, value, low: float, high: float) -> jax.Array:
    if not isinstance(value, jax.core.Tracer):
        array = np.asarray(value, np.float32)
        if not np.all((array >= low) & (array <= high)):
            raise ValueError(f"{name} must be at least {low:g}, not {value}")
    return jnp.asarray(value, jnp.float32)
