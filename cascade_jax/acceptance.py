"""Acceptance rules: how likely a draft token is accepted, given what the target thinks of it and its surroundings.

Strict speculative sampling accepts a draft x with probability min(1, r(x) / p(x)), `r` being what remains of the
target's distribution and `p` the drafter's. A relaxed rule puts something larger in place of r(x). A rule here is a
small frozen pytree with two pure functions, in the way of an optax transformation:

  offer(siblings, j)                  -> what candidate j could gain: any pytree. Vocabulary-sized work, no ledger.
  decide(spent, target, draft, offer) -> (acceptance probability, nominal charge, spent). Scalars, ledger in hand.

`offer` is computed for all inner nodes of a tree at once; only `decide` runs along the walk. A rule's thresholds are
leaves, so a sweep over them compiles once and can be vmapped; what changes the program is static. A third function
is optional:

  remainder(siblings, j)              -> [V], what is left of the target's distribution once candidate j is rejected.

Whatever a rule says, a token that the target's own sampling settings exclude (top-k, top-p, a layout) is never
accepted.

Ledgers. The *nominal* charge of a candidate is the probability mass its rule added, the quantity that CASCADE's paper
budgets. The *coupled* charge is |acceptance probability - strict acceptance probability|: fed the same random numbers,
the relaxed and the strict decoder part at this candidate with exactly that probability. A step whose coupled charges
cannot exceed d emits a law within total variation distance d of the target's own (coupling inequality); that is what
`bounded` enforces for any rule. The nominal ledger bounds nothing: where p(x) is small, a tiny mass turns a certain
rejection into a certain acceptance.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


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
      entropy: [], of the target's distribution at the node, in nats.
      depth: int [], the children's depth in the tree, from 1 on.
      levels: the tree's depth.
    """

    tokens: jax.Array
    residual: jax.Array
    draft: jax.Array
    alike: jax.Array
    grandchildren: jax.Array
    continued: jax.Array
    next_probs: jax.Array
    entropy: jax.Array
    depth: jax.Array
    levels: int = struct.field(pytree_node=False)


class Rule(Protocol):
    """The two functions of an acceptance rule; see `remainder` for the third."""

    def offer(self, siblings: Siblings, j: jax.Array) -> Any: ...

    def decide(
        self, spent: jax.Array, target: jax.Array, draft: jax.Array, offer: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]: ...


def remainder(rule: Rule, siblings: Siblings, j: jax.Array) -> jax.Array:
    """What is left of the target's distribution once candidate j is rejected, [V], not normalised.

    A rule may have a function `remainder(siblings, j)` of its own. All others leave what makes strict verification
    lossless: max(r - p, 0).
    """
    own = getattr(rule, "remainder", None)
    return jnp.maximum(siblings.residual - siblings.draft, 0.0) if own is None else own(siblings, j)


def ratio(target: jax.Array, draft: jax.Array) -> jax.Array:
    """min(1, target / draft), and 0 for a token that the drafter cannot have proposed."""
    return jnp.where(draft > 0, jnp.minimum(1.0, target / jnp.where(draft > 0, draft, 1.0)), 0.0)


def mass_at(probs: jax.Array, tokens: jax.Array, chosen: jax.Array) -> jax.Array:
    """Summed probability of the chosen tokens."""
    return jnp.sum(jnp.where(chosen, probs[jnp.maximum(tokens, 0)], 0.0), axis=-1)


@struct.dataclass
class Strict:
    """Lossless speculative sampling (Leviathan et al. 2023; the paper's Algorithm 1 and "naive" rows)."""

    def offer(self, siblings, j):
        return ()

    def decide(self, spent, target, draft, offer):
        return ratio(target, draft), jnp.zeros_like(target), spent


@struct.dataclass
class Exact(Strict):
    """Strict, and no random numbers but the noise of output positions (`decode.Program.noise`): the output is the very
    one that token-by-token decoding with that noise draws, whatever was drafted.

    The target's law at a node is then the point mass of the token that it draws there: a draft is accepted if it is
    that token, and what is left after its rejection is that token again.
    """


@struct.dataclass
class Bounded:
    """Any rule under the coupled ledger: a step's charges |accepted - strict| never sum to more than `budget`.

    What a rule asks for beyond what is left of it is granted in part: its acceptance probability is held within the
    remaining budget of the strict one. Every step's law is then within total variation distance `budget` of the
    target's own. That takes the strict remainder after a rejection, whatever the rule's own.
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


def exact() -> Exact:
    """The token-by-token picture of the key: the same tokens as on the lone root, for any tree and drafter."""
    return Exact()


def bounded(rule: Rule, budget: float) -> Bounded:
    """`rule` with the guarantee that no step strays from the target's law by more than `budget` in total variation."""
    return Bounded(rule, within("budget", budget, 0.0, float("inf")))


def within(name: str, value, low: float, high: float) -> jax.Array:
    """`value` as float32. Raises a ValueError that has the name if it is concrete and out of its range."""
    if not isinstance(value, jax.core.Tracer):
        array = np.asarray(value, np.float32)
        if not np.all((array >= low) & (array <= high)):
            bounds = f"at least {low:g}" if np.isinf(high) else f"between {low:g} and {high:g}"
            raise ValueError(f"{name} must be {bounds}, not {value}")
    return jnp.asarray(value, jnp.float32)
