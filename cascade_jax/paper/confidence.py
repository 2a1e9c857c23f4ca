"""How sure a target is of its next token: entropy and top-1 probability over image tokens (the paper's figure 8)."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cascade_jax import decode
from cascade_jax.bundle import Bundle, Prompt
from cascade_jax.sampling import Sampling, guide, warp
from cascade_jax.tree import ROOT


@dataclasses.dataclass(frozen=True)
class Confidence:
    """Per picture and image position, [B, T] each, of the distribution that decoding samples from.

    Attributes:
      entropy: in nats.
      top1: the largest probability.
    """

    entropy: np.ndarray
    top1: np.ndarray


def confidence(model: Bundle, prompts: Sequence[str | Prompt], tokens, sampling: Sampling) -> Confidence:
    """The target's confidence along given token sequences int [B, T], under `sampling`'s guidance and warping."""
    sampling, program = sampling.checked(), model.program(ROOT)
    prefix = model.prefix(model.encode(prompts), guided=sampling.guidance is not None)
    entropy, top1 = _confidence(
        program.target, model.params["target"], prefix, jnp.asarray(tokens, jnp.int32), sampling
    )
    return Confidence(np.asarray(entropy), np.asarray(top1))


@jax.jit(static_argnums=0)
def _confidence(graph, state, prefix: decode.Prefix, tokens: jax.Array, sampling: Sampling):
    target = nnx.merge(graph, state)
    branches = len(prefix.length) // len(tokens)
    every = jnp.concatenate([tokens] * branches)
    features = decode.at_tokens(decode.teacher_forced(target, prefix, every), prefix, tokens.shape[1])
    logits = target.logits(features).reshape(branches, *tokens.shape, -1)
    probs = warp(guide(logits, sampling.guidance), sampling)
    entropy = -jnp.sum(jnp.where(probs > 0, probs * jnp.log(jnp.where(probs > 0, probs, 1.0)), 0.0), axis=-1)
    return entropy, jnp.max(probs, axis=-1)
