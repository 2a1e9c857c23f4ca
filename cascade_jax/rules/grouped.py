"""Grouped speculative decoding: tokens that the target likes about equally well stand for one another."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from cascade_jax.acceptance import mass_at, ratio
from cascade_jax.sampling import top


class Group(NamedTuple):
    """What the entries around a candidate have beside it: residual mass, drafter mass."""

    target: jax.Array
    draft: jax.Array


@struct.dataclass
class Grouped:
    """Grouped speculative decoding (So et al. 2025, arXiv 2508.07747) on a drafter.

    Tokens are sorted by the target's residual; candidate and ratio are those of the group of `size` entries around the
    candidate's rank: (residual mass of the group) / (drafter mass of the group). It may accept less often than strict.
    """

    size: int = struct.field(pytree_node=False)

    def offer(self, siblings, j):
        token, r = jnp.maximum(siblings.tokens[j], 0), siblings.residual
        before, after = (self.size - 1) // 2, self.size // 2
        if self.size == 1:
            return Group(jnp.zeros(()), jnp.zeros(()))
        ids = jnp.arange(r.shape[0])
        # entries ranked before x: larger, or equal with a lower id; the group is clipped at both ends of the ranking
        ahead = (r > r[token]) | ((r == r[token]) & (ids < token))
        behind = ~ahead & (ids != token)
        key_ahead, nearest_ahead = top(jnp.where(ahead, -r, -jnp.inf)[::-1], before) if before else (None, None)
        key_behind, nearest_behind = top(jnp.where(behind, r, -jnp.inf), after)
        group = jnp.where(jnp.isfinite(key_behind), nearest_behind, -1)
        if before:
            group = jnp.concatenate([group, jnp.where(jnp.isfinite(key_ahead), r.shape[0] - 1 - nearest_ahead, -1)])
        return Group(mass_at(r, group, group >= 0), mass_at(siblings.draft, group, group >= 0))

    def decide(self, spent, target, draft, offer):
        return ratio(target + offer.target, draft + offer.draft), offer.target, spent


def grouped(size: int) -> Grouped:
    """GSD with groups of `size` tokens; 25 in the paper's runs."""
    if size < 1:
        raise ValueError(f"a group has at least 1 token, not {size}")
    return Grouped(int(size))
