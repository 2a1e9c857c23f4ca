"""CASCADE: context-aware relaxation for speculative image decoding (arXiv 2605.07230), in JAX and Flax."""

from cascade_jax import tree as trees
from cascade_jax.acceptance import (
    bounded,
    cascade,
    grouped,
    lantern,
    lantern_pp,
    nearest_codes,
    strict,
)
from cascade_jax.bundle import Bundle, BundleError, Prompt
from cascade_jax.pipeline import Generated, generate, load, score
from cascade_jax.sampling import Sampling
from cascade_jax.tree import DynamicTree, Tree
from cascade_jax.verify import Verdict, verify

__all__ = [
    "Bundle",
    "BundleError",
    "DynamicTree",
    "Generated",
    "Prompt",
    "Sampling",
    "Tree",
    "Verdict",
    "bounded",
    "cascade",
    "generate",
    "grouped",
    "lantern",
    "lantern_pp",
    "load",
    "nearest_codes",
    "score",
    "strict",
    "trees",
    "verify",
]
