"""Entropy-aware acceptance: where the target is sure of itself, drafts are judged more leniently.

What follows the paper and what its public code (krennic999/ARsample): the paper scales the random number by the
entropy and keeps it nearer to its mean. The code for Lumina-mGPT does the first alone, with (entropy / 9 + 0.05):
`scale=9, calm=inf, floor=0.05`. The code for LlamaGen scales by entropy / 8 and then, as an ablation was left in it,
halves the number whatever the entropy: `scale=inf, calm=inf, floor=0.5`. Both are cut off at 1, so that what strict
verification is sure to accept is accepted. The paper prints (1 - lambda entropy) with lambda 16; only entropy / 16
makes sense of that. After a rejection paper and code leave what strict verification leaves.
"""

import jax
import jax.numpy as jnp
from flax import struct

from cascade_jax.acceptance import ratio, within


@struct.dataclass
class Entropic:
    """The entropy-aware rule (Ma et al. 2025, arXiv 2510.09012). With H the entropy in nats of the target's law at the
    draft's place, and u uniform, a draft is accepted if

        min(1, H / scale + floor) (1/2 + (1 - H / calm) (u - 1/2)) <= min(1, r(x) / p(x)).

    The left side is uniform, so that this is a probability: higher than strict's where H is low; where it is high,
    unlikely drafts may be rejected that strict verification would now and then accept.
    """

    scale: jax.Array
    calm: jax.Array
    floor: jax.Array

    def offer(self, siblings, j):
        return siblings.entropy

    def decide(self, spent, target, draft, offer):
        strict = ratio(target, draft)
        height = jnp.clip(offer / self.scale + self.floor, 0.0, 1.0)
        chance = jnp.clip(1.0 - offer / self.calm, 0.0, 1.0)
        least, width = height * (1.0 - chance) / 2, height * chance
        above = strict - least
        within_it = jnp.clip(above / jnp.where(width > 0, width, 1.0), 0.0, 1.0)
        probability = jnp.where(width > 0, within_it, (above >= 0).astype(strict.dtype))
        probability = jnp.where(strict >= 1.0, 1.0, jnp.where(strict > 0, probability, 0.0))
        gained = jnp.where(probability > strict, jnp.maximum(probability * draft - target, 0.0), 0.0)
        return probability, gained, spent


def entropic(scale: float = 8.0, calm: float = 16.0, floor: float = 0.0) -> Entropic:
    """The entropy-aware rule with the paper's constants.

    Args:
      scale: the paper's e: entropy, in nats, from which on the random number is no longer made smaller.
      calm: the paper's lambda: entropy from which on chance plays no part; inf for the scale alone.
      floor: added to entropy / scale; public code has 0.05. `floor` 1 and `calm` inf are strict.
    """
    scale, calm = within("scale", scale, 1e-6, float("inf")), within("calm", calm, 1e-6, float("inf"))
    return Entropic(scale, calm, within("floor", floor, 0.0, float("inf")))
