"""CASCADE: relaxation where the target's hidden states say that candidates mean the same (arXiv 2605.07230)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from cascade_jax.acceptance import Bounded, mass_at, ratio, within


class Sets(NamedTuple):
    """What CASCADE's two sets could add to r(x).

    Attributes:
      first: the mass of I, the interchangeable siblings.
      second: the mass of C, the converging children, if I was not added.
      second_after_first: the same, if it was: entries that both contribute count once.
    """

    first: jax.Array
    second: jax.Array
    second_after_first: jax.Array


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
            return Sets(first, second, second)
        converging &= below != token
        shared = jnp.any((below[:, None] == tokens) & similar, axis=-1)
        second = mass_at(siblings.residual, below, converging)
        return Sets(first, second, mass_at(siblings.residual, below, converging & ~shared))

    def decide(self, spent, target, draft, offer):
        take_first = spent + offer.first <= self.budget
        gained = jnp.where(take_first, offer.first, 0.0)
        second = jnp.where(take_first & (offer.first > 0), offer.second_after_first, offer.second)
        gained += jnp.where(spent + gained + second <= self.budget, second, 0.0)
        return ratio(target + gained, draft), gained, spent + gained


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
    budget = within("budget", budget, 0.0, float("inf"))
    taus = within("tau_pos", tau_pos, -1.0, float("inf")), within("tau_seq", tau_seq, -1.0, float("inf"))
    if ledger == "coupled":
        return Bounded(Cascade(*taus, jnp.full_like(budget, jnp.inf), mass), budget)
    return Cascade(*taus, budget, mass)
