"""Losses for training drafters, as pure functions of arrays (the paper's section 4.3; EAGLE-1's and EAGLE-3's recipes).

Shapes: `...` any leading axes, `K` consecutive positions, `V` tokens, `d` feature width. Logits may be those of one
guidance branch or guided ones: under classifier-free guidance it is the guided distribution that drafts come from, so a
guidance-aware loss is `soft_cross_entropy(sampling.guide(target, g), sampling.guide(drafter, g))`.
"""

import jax
import jax.numpy as jnp


def soft_cross_entropy(target_logits: jax.Array, drafter_logits: jax.Array) -> jax.Array:
    """-sum_x q(x) log p(x), [...], of the target's distribution q and the drafter's p, from logits [..., V]."""
    return -jnp.sum(jax.nn.softmax(target_logits) * jax.nn.log_softmax(drafter_logits), axis=-1)


def hard_cross_entropy(drafter_logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """-log p(x), [...], of the tokens int [...] that the target drew, from the drafter's logits [..., V].

    Tokens that V does not reach, as those that a layout forces, are read as the last: mask them.
    """
    log_probs = jax.nn.log_softmax(drafter_logits)
    tokens = jnp.minimum(tokens, log_probs.shape[-1] - 1)
    return -jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]


def smooth_l1(predicted: jax.Array, true: jax.Array) -> jax.Array:
    """Mean over features [..., d] of the Huber loss with unit threshold, [...]."""
    error = jnp.abs(predicted - true)
    return jnp.mean(jnp.where(error < 1, 0.5 * error**2, error - 0.5), axis=-1)


def convergence_weights(features: jax.Array, weight: float, tau_seq: float) -> jax.Array:
    """Equation 4's w_k, [..., K], from features [..., K, d]: `weight` where cos(F_k, F_{k+1}) >= tau_seq, 1 elsewhere.

    The last position has no successor and weighs 1. A weight of 1 (c = 1) is the standard drafter's loss exactly.
    """
    unit = features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    cosine = jnp.sum(unit[..., :-1, :] * unit[..., 1:, :], axis=-1)
    weights = jnp.where(cosine >= tau_seq, weight, 1.0)
    return jnp.concatenate([weights, jnp.ones_like(weights[..., :1])], axis=-1)


def unroll_weights(steps: int, decay: float = 0.8) -> tuple[float, ...]:
    """What the losses of training-time test's steps are multiplied by, EAGLE-3's 0.8^i."""
    return tuple(decay**i for i in range(steps))


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `values` [...] where `mask` [...] is true; 0 if that is nowhere."""
    mask = jnp.broadcast_to(mask, values.shape)
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def expected_acceptance(target_logits: jax.Array, drafter_logits: jax.Array) -> jax.Array:
    """sum_x min(q(x), p(x)), [...]: the probability that strict sampling accepts one draft from p."""
    return jnp.sum(jnp.minimum(jax.nn.softmax(target_logits), jax.nn.softmax(drafter_logits)), axis=-1)


def rank_of_target(target_logits: jax.Array, drafter_logits: jax.Array) -> jax.Array:
    """How many tokens the drafter holds likelier than the target's likeliest, int [...], from logits [..., V].

    Its top-k accuracy is the share of positions with a rank below k.
    """
    best = jnp.argmax(target_logits, axis=-1)[..., None]
    return jnp.sum(drafter_logits > jnp.take_along_axis(drafter_logits, best, axis=-1), axis=-1)
