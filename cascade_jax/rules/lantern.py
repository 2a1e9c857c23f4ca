"""LANTERN and LANTERN++: a token may be accepted on the strength of its neighbours in the codebook.

What follows the papers and what their public code: the bound on added mass and its use on the ratio are both's. After a
rejection the papers leave the residual of strict verification; public code leaves less (`residual="lantern"`). At
temperature 0 public code still relaxes; here a target without randomness allows its likeliest token alone, and no rule
accepts another. Neighbours are measured between raw codebook vectors, as public code does.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cascade_jax.acceptance import ratio, within


@struct.dataclass
class Neighbourhood:
    """Rules that add the mass of the token's nearest neighbours in the codebook, as many of them, nearest first, as
    have a cumulative mass within a bound.

    Attributes:
      neighbours: int [V, k], every code's nearest others; with `wide_remainder` [V, k + 1], the last of which counts
        for that alone.
      wide_remainder: what is left after a rejection. False: what strict verification leaves. True: what LANTERN's
        public code leaves. If the bound has room for the nearest neighbour, that takes the k + 1 nearest out of the
        target's distribution where drafts are deterministic; where they were drawn, out of the drafter's, before this
        is subtracted.
    """

    neighbours: jax.Array
    wide_remainder: bool = struct.field(pytree_node=False, default=False, kw_only=True)

    def offer(self, siblings, j):
        near, fits = self._near(siblings, j)
        return jnp.sum(jnp.where(fits, near, 0.0))

    def decide(self, spent, target, draft, offer):
        return ratio(target + offer, draft), offer, spent

    def remainder(self, siblings, j):
        r, p = siblings.residual, siblings.draft
        if not self.wide_remainder:
            return jnp.maximum(r - p, 0.0)
        token = jnp.maximum(siblings.tokens[j], 0)
        fits = self._near(siblings, j)[1]
        apart = jnp.zeros(r.shape, bool).at[self.neighbours[token]].set(jnp.any(fits[:1]))
        certain = p[token] >= 1.0
        return jnp.maximum(jnp.where(apart & certain, 0.0, r) - jnp.where(apart & ~certain, 0.0, p), 0.0)

    def _near(self, siblings, j):
        """The residual mass of x's neighbours, [k], and which of them the bound has room for."""
        count = self.neighbours.shape[-1] - self.wide_remainder
        near = siblings.residual[self.neighbours[jnp.maximum(siblings.tokens[j], 0), :count]]
        return near, jnp.cumsum(near) <= self.limit(siblings, j)


@struct.dataclass
class Lantern(Neighbourhood):
    """LANTERN (Jang et al. 2024, arXiv 2410.03355): within `delta`."""

    delta: jax.Array

    def limit(self, siblings, j):
        return self.delta


@struct.dataclass
class LanternPP(Neighbourhood):
    """LANTERN++ (Park et al. 2025, arXiv 2502.06352): within (lambda - 1) r(x), and on a deep tree."""

    lam: jax.Array

    def limit(self, siblings, j):
        return (self.lam - 1.0) * siblings.residual[jnp.maximum(siblings.tokens[j], 0)]


def lantern(neighbours: jax.Array, delta: float, residual: str = "strict") -> Lantern:
    """LANTERN with a table int [V, k] of every token's nearest neighbours, nearest first (see `nearest_codes`).

    Args:
      delta: bound on the mass of a token's neighbours.
      residual: what is left after a rejection, "strict" or "lantern", see `Neighbourhood`; the latter takes one more
        column of the table, [V, k + 1].
    """
    wide = _wide(residual)
    return Lantern(jnp.asarray(neighbours, jnp.int32), within("delta", delta, 0.0, float("inf")), wide_remainder=wide)


def lantern_pp(neighbours: jax.Array, lam: float, residual: str = "strict") -> LanternPP:
    """LANTERN++ with such a table; `lam` is at least 1, and 1 adds nothing. `residual` as of `lantern`."""
    wide = _wide(residual)
    return LanternPP(jnp.asarray(neighbours, jnp.int32), within("lam", lam, 1.0, float("inf")), wide_remainder=wide)


def _wide(residual: str) -> bool:
    if residual not in ("strict", "lantern"):
        raise ValueError(f'residual must be "strict" or "lantern", not {residual!r}')
    return residual == "lantern"


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
