"""Losses for training drafters, as pure functions of arrays (the paper's section 4.3; EAGLE-1's public recipe).

Shapes: `...` any leading axes, `K` consecutive positions, `V` tokens, `d` feature width.
"""

import jax
import jax.numpy as jnp


def soft_cross_entropy(target_logits: jax.Array, drafter_logits: jax.Array) -> jax.Array:
    """-sum_x q(x) log p(x), [...], of the target's distribution q and the drafter's p, from logits [..., V]."""
    return -jnp.sum(jax.nn.softmax(target_logits) * jax.nn.log_softmax(drafter_logits), axis=-1)


def smooth_l1(predicted: jax.Array, true: jax.Array) -> jax.Array:
    """Mean over features [..., d] of the Huber loss with unit threshold, [...]."""
    error = jnp.abs(predicted - true)
    return jnp.mean(jnp.where(error < 1, 0.5 * error**2, error - 0.5), axis=-1)


def convergence_weights(features: jax.Array, weight: float, tau_seq: float) -> jax.Array:
    """Equation 4's w_k, [..., K], from features [..., K, d]: `weight` where cos(F_k, F_{k+1}) >= tau_seq, 1 elsewhere.

    The last position has no successor and weighs 1.
    """
    unit = features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    cosine = jnp.sum(unit[..., :-1, :] * unit[..., 1:, :], axis=-1)
    weights = jnp.where(cosine >= tau_seq, weight, 1.0)
    return jnp.concatenate([weights, jnp.ones_like(weights[..., :1])], axis=-1)


def expected_acceptance(target_logits: jax.Array, drafter_logits: jax.Array) -> jax.Array:
    """sum_x min(q(x), p(x)), [...]: the probability that strict sampling accepts one draft from p."""
    return jnp.sum(jnp.minimum(jax.nn.softmax(target_logits), jax.nn.softmax(drafter_logits)), axis=-1)
