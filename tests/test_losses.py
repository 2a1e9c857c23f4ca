"""Drafter losses against NumPy transcriptions of their equations."""

import jax.numpy as jnp
import numpy as np

from cascade_jax.sampling import guide
from cascade_jax.training import losses


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_soft_cross_entropy_is_minus_the_target_weighted_log_likelihood():
    rng = np.random.default_rng(0)
    q, p = rng.normal(size=(2, 3, 5, 7))
    expected = -np.sum(_softmax(q) * np.log(_softmax(p)), axis=-1)
    np.testing.assert_allclose(losses.soft_cross_entropy(jnp.asarray(q), jnp.asarray(p)), expected, rtol=1e-5)


def test_hard_cross_entropy_is_minus_the_log_likelihood_of_the_token():
    rng = np.random.default_rng(3)
    p, tokens = rng.normal(size=(3, 5, 7)), rng.integers(7, size=(3, 5))
    expected = [[-np.log(_softmax(p)[i, j, tokens[i, j]]) for j in range(5)] for i in range(3)]
    np.testing.assert_allclose(losses.hard_cross_entropy(jnp.asarray(p), jnp.asarray(tokens)), expected, rtol=1e-5)
    assert np.isfinite(losses.hard_cross_entropy(jnp.asarray(p), jnp.full((3, 5), 8))).all()


def test_the_guidance_aware_loss_compares_guided_distributions():
    rng = np.random.default_rng(4)
    q, p = rng.normal(size=(2, 2, 5, 7))  # both branches of target and drafter
    mix = lambda x: x[1] + 3.0 * (x[0] - x[1])
    expected = -np.sum(_softmax(mix(q)) * np.log(_softmax(mix(p))), axis=-1)
    got = losses.soft_cross_entropy(guide(jnp.asarray(q), 3.0), guide(jnp.asarray(p), 3.0))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_smooth_l1_is_quadratic_below_one_and_linear_above():
    predicted, true = jnp.array([[0.5, 3.0]]), jnp.zeros((1, 2))
    np.testing.assert_allclose(losses.smooth_l1(predicted, true), [(0.125 + 2.5) / 2], rtol=1e-6)


def test_convergence_weights_are_c_exactly_where_consecutive_features_converge():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(4, 9, 3))
    expected = np.ones((4, 9))
    for row in range(4):
        for k in range(8):
            a, b = features[row, k], features[row, k + 1]
            if a @ b / np.linalg.norm(a) / np.linalg.norm(b) >= 0.2:
                expected[row, k] = 2.0
    np.testing.assert_array_equal(losses.convergence_weights(jnp.asarray(features), 2.0, 0.2), expected)
    assert 1 < expected.mean() < 2
    np.testing.assert_array_equal(losses.convergence_weights(jnp.asarray(features), 1.0, 0.2), 1.0)


def test_expected_acceptance_is_one_minus_the_total_variation_distance():
    rng = np.random.default_rng(2)
    q, p = rng.normal(size=(2, 6, 11))
    distance = 0.5 * np.abs(_softmax(q) - _softmax(p)).sum(-1)
    np.testing.assert_allclose(losses.expected_acceptance(jnp.asarray(q), jnp.asarray(p)), 1 - distance, rtol=1e-5)


def test_unrolled_steps_weigh_less_and_less():
    np.testing.assert_allclose(losses.unroll_weights(4), [1, 0.8, 0.64, 0.512])
    assert losses.unroll_weights(1) == (1.0,)


def test_masked_means_leave_out_what_is_masked():
    values, mask = jnp.array([[1.0, jnp.nan, 3.0], [5.0, 7.0, jnp.inf]]), jnp.array([[1, 0, 1], [1, 1, 0]], bool)
    assert losses.masked_mean(values, mask) == 4.0
    assert losses.masked_mean(values, jnp.zeros(3, bool)) == 0.0


def test_ranks_count_what_the_drafter_holds_likelier():
    rng = np.random.default_rng(5)
    q, p = rng.normal(size=(2, 6, 11))
    expected = [sorted(p[i], reverse=True).index(p[i, q[i].argmax()]) for i in range(6)]
    np.testing.assert_array_equal(losses.rank_of_target(jnp.asarray(q), jnp.asarray(p)), expected)
