"""Annealed relaxation: drafts near the root are accepted more freely than strictly, those further down less.

What follows the paper and what is inferred: the ratio, the law after a rejection, the exponential schedule and its rate
of 0.7 are the paper's. Its schedule has a constant, mu, by which we take it that the mean of the multipliers over a
step's levels is `relaxation`, as in the paper's comparison with a schedule that does not fall. Its levels are those of
a chain; on a tree a draft has its depth's multiplier, and elder siblings were rejected by the same.
"""

import jax
import jax.numpy as jnp
from flax import struct

from cascade_jax.acceptance import ratio, within


@struct.dataclass
class Annealed:
    """COOL-SD (Li et al. 2026, arXiv 2601.09212): the ratio times w(i) at depth i of L,

        w(i) = relaxation exp(-annealing i - mu),  mu so that the mean over i = 1 ... L is `relaxation`,

    and after a rejection what is left is [r - min(p, w r)]_+, for which no acceptance accounts (its Theorem 2). Where w
    is at least 1 that is what strict verification leaves (Proposition 1). Where it is below 1, deep in the tree, drafts
    are accepted less often than strictly, and without loss: the coupled charge counts decisions that differ, and there
    it charges for what moves no law.
    """

    relaxation: jax.Array
    annealing: jax.Array

    def offer(self, siblings, j):
        # from 0 on, so that a steep schedule does not vanish; mu makes up for it
        fall = jnp.exp(-self.annealing * jnp.arange(siblings.levels))
        return self.relaxation * jnp.exp(-self.annealing * (siblings.depth - 1)) / jnp.mean(fall)

    def decide(self, spent, target, draft, offer):
        return ratio(offer * target, draft), jnp.maximum(offer - 1.0, 0.0) * target, spent

    def remainder(self, siblings, j):
        r = siblings.residual
        return jnp.maximum(r - jnp.minimum(siblings.draft, self.offer(siblings, j) * r), 0.0)


def annealed(relaxation: float, annealing: float = 0.7) -> Annealed:
    """COOL-SD with its mean multiplier (the paper's delta) and how fast that falls with depth (nu).

    `relaxation` 1 and `annealing` 0 are strict; the paper reports 1.1 and 2.
    """
    return Annealed(within("relaxation", relaxation, 0.0, 1e6), within("annealing", annealing, 0.0, 1e3))
