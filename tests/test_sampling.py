import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cascade_jax import sampling
from cascade_jax.sampling import Layout, Sampling

warp = jax.jit(sampling.warp)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def top_k_logits_warper(scores, top_k):
    """transformers' TopKLogitsWarper: what is smaller than the k-th largest score goes."""
    kth = np.sort(scores, axis=-1)[..., -min(top_k, scores.shape[-1]), None]
    return np.where(scores < kth, -np.inf, scores)


def top_p_logits_warper(scores, top_p):
    """transformers' TopPLogitsWarper: in ascending order, what has a cumulative mass of 1 - p or less goes."""
    order = np.argsort(scores, axis=-1, kind="stable")
    mass = np.cumsum(softmax(np.take_along_axis(scores, order, -1)), axis=-1)
    remove = mass <= 1 - top_p
    remove[..., -1:] = False
    scattered = np.zeros_like(remove)
    np.put_along_axis(scattered, order, remove, -1)
    return np.where(scattered, -np.inf, scores)


def reference(logits, settings):
    logits = np.asarray(logits, np.float64)
    if settings.temperature == 0:
        return np.where(np.arange(logits.shape[-1]) == logits.argmax(-1)[..., None], logits, -np.inf)
    logits = logits / settings.temperature
    if settings.top_k is not None:
        logits = top_k_logits_warper(logits, settings.top_k)
    if settings.top_p is not None:
        logits = top_p_logits_warper(logits, settings.top_p)
    return logits


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(1.0),
        Sampling(0.7, top_k=1),
        Sampling(1.3, top_k=7),
        Sampling(0.7, top_k=1000),
        Sampling(1.0, top_p=0.03),
        Sampling(0.8, top_p=0.71),
        Sampling(1.5, top_k=12, top_p=0.89),
        Sampling(0.5, top_k=3, top_p=0.37),
        Sampling(0.0, top_k=5, top_p=0.5),
        Sampling(1.0, top_k=5, top_p=1.0),
    ],
    ids=str,
)
def test_warping_is_transformers(settings):
    rng = np.random.default_rng(0)
    rough = rng.normal(size=(40, 33)) * 2
    ties = rng.integers(-2, 3, (40, 33))
    for logits in (rough, ties):
        logits = logits.astype(np.float32)
        probs, wanted = np.asarray(warp(logits, settings.checked())), reference(logits, settings)
        np.testing.assert_array_equal(probs > 0, np.isfinite(wanted))
        np.testing.assert_allclose(probs, softmax(wanted), atol=1e-6)  # float32 exponentials and a sum of 33


def test_top_k_keeps_what_ties_with_the_kth_and_top_p_the_tail_of_a_stable_sort():
    logits = jnp.array([1.0, 3.0, 3.0, 2.0, 3.0, 2.0])
    kept = lambda settings, x=logits: np.flatnonzero(warp(x, settings.checked())).tolist()
    assert kept(Sampling(top_k=1)) == [1, 2, 4]
    assert kept(Sampling(top_k=3)) == [1, 2, 4]
    assert kept(Sampling(top_k=4)) == [1, 2, 3, 4, 5]
    level = jnp.zeros(4)  # masses of exactly 1/4: at p = 1/2 the boundary itself goes, and of the ties the first
    assert kept(Sampling(top_p=0.5), level) == [2, 3]
    assert kept(Sampling(top_p=0.51), level) == [1, 2, 3]
    assert kept(Sampling(top_p=0.01), level) == [3]


def test_temperature_zero_takes_the_first_of_the_largest():
    logits = jnp.array([[0.0, 2.0, 2.0, -1.0], [-5.0, -7.0, -jnp.inf, -6.0]])
    probs = warp(logits, Sampling(0.0, top_k=3).checked())
    np.testing.assert_array_equal(probs, [[0, 1, 0, 0], [1, 0, 0, 0]])


def test_a_change_of_settings_compiles_nothing():
    before = warp._cache_size()
    for settings in (Sampling(1.0, 5, 0.9, 2.0), Sampling(0.0, 3, 0.5, 7.5), Sampling(2.5, 1000, 0.99, 1.0)):
        warp(jnp.zeros((2, 9)), settings.checked())
    assert warp._cache_size() == before + 1


def test_kth_largest_is_a_sort_s():
    rng = np.random.default_rng(1)
    x = np.concatenate(
        [
            rng.normal(size=(6, 50)) * 10.0 ** rng.integers(-30, 30, (6, 50)),
            rng.integers(-2, 3, (6, 50)),
            np.where(rng.random((3, 50)) < 0.3, -np.inf, rng.normal(size=(3, 50))),
            np.where(rng.random((3, 50)) < 0.3, np.inf, -np.abs(rng.normal(size=(3, 50)))),
            np.full((1, 50), -np.inf),
            np.full((1, 50), -3.5),
        ]
    ).astype(np.float32)
    kth = jax.jit(sampling.kth_largest)
    for k in (1, 2, 17, 49, 50, 51, 10_000):
        np.testing.assert_array_equal(kth(x, jnp.int32(k)), np.sort(x, axis=-1)[:, -min(k, 50), None])


def test_guidance_extrapolates_from_the_unconditional_branch():
    logits = jnp.array([[[1.0, 2.0]], [[0.5, 4.0]]])  # [G, B, V]
    np.testing.assert_allclose(sampling.guide(logits, jnp.float32(3.0)), [[2.0, -2.0]])
    np.testing.assert_array_equal(sampling.guide(logits, jnp.float32(1.0)), logits[0])
    np.testing.assert_array_equal(sampling.guide(logits[:1], None), logits[0])


def test_a_linear_head_sees_guided_features_and_any_other_head_both_branches():
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(2, 3, 4, 8)), jnp.float32)  # [G, B, n, d]
    kernel, calls = jnp.asarray(rng.normal(size=(8, 11)), jnp.float32), []

    def head(x):
        calls.append(x.shape)
        return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)

    both = sampling.guided_logits(head, features, jnp.float32(3.0), linear=False)
    mixed = sampling.guided_logits(head, features, jnp.float32(3.0), linear=True)
    np.testing.assert_allclose(mixed, both, atol=1e-4)
    sampling.guided_logits(head, features.astype(jnp.bfloat16), jnp.float32(3.0), linear=True)
    assert calls == [(2, 3, 4, 8), (3, 4, 8), (2, 3, 4, 8)]
    np.testing.assert_array_equal(sampling.guided_logits(head, features[:1], None, linear=True), head(features[0]))


def test_the_likeliest_token_is_argmax():
    x = np.random.default_rng(1).integers(0, 5, (50, 9)).astype(np.float32)  # full of ties
    x[:10, :4] = -np.inf
    np.testing.assert_array_equal(sampling.likeliest(jnp.asarray(x)), x.argmax(-1))


def test_draws_without_replacement_have_their_conditional_probabilities():
    p = np.array([0.4, 0.3, 0.15, 0.1, 0.05, 0.0])
    draw = jax.jit(jax.vmap(lambda key: sampling.draw_distinct(key, jnp.log(p), 3)))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 300_000)))
    law = np.zeros((6, 6, 6))
    for a in range(5):
        for b in set(range(5)) - {a}:
            for c in set(range(5)) - {a, b}:
                law[a, b, c] = p[a] * p[b] / (1 - p[a]) * p[c] / (1 - p[a] - p[b])
    counts = np.bincount(drawn @ [36, 6, 1], minlength=216)
    possible = law.ravel() > 0
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], 300_000 * law.ravel()[possible]).pvalue > 1e-3


def test_draws_run_out_of_possible_tokens_as_minus_one():
    log_probs = jnp.log(jnp.array([0.0, 0.25, 0.0, 0.75]))
    for seed in range(20):
        drawn = np.asarray(sampling.draw_distinct(jax.random.key(seed), log_probs, 4))
        assert set(drawn[:2]) == {1, 3}
        assert list(drawn[2:]) == [-1, -1]


def test_without_noise_the_likeliest_tokens_come_in_order():
    log_probs = jax.nn.log_softmax(jnp.array([0.1, 2.0, -1.0, 1.0, 0.5]))
    np.testing.assert_array_equal(sampling.distinct(log_probs, 4), [1, 3, 4, 0])


def test_a_draw_has_the_probabilities_it_is_given():
    p = np.array([0.5, 0.0, 0.3, 0.2])
    keys = jax.random.split(jax.random.key(2), 100_000)
    counts = np.bincount(jax.jit(jax.vmap(lambda key: sampling.draw(key, jnp.asarray(p))))(keys), minlength=4)
    assert counts[1] == 0
    assert stats.chisquare(counts[p > 0], 100_000 * p[p > 0]).pvalue > 1e-3


def test_a_draw_from_many_tokens_has_their_weights_in_every_block():
    p = np.zeros(300)  # three blocks, the last one not full
    p[[0, 5, 127, 128, 140, 256, 299]] = [4, 1, 0.5, 2, 0.25, 1, 3]
    keys = jax.random.split(jax.random.key(3), 200_000)
    counts = np.bincount(jax.jit(jax.vmap(lambda key: sampling.draw(key, jnp.asarray(p))))(keys), minlength=300)
    assert counts[p == 0].sum() == 0
    assert stats.chisquare(counts[p > 0], 200_000 * p[p > 0] / p.sum()).pvalue > 1e-3


@pytest.mark.parametrize("uniform", [0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))])
def test_the_inverse_meets_possible_tokens_alone(uniform):
    for weights in ([0, 0, 3, 0], [0, 1e-30, 1, 1e-30, 0], [1, 1e-9, 0, 0]):
        found = sampling._inverse(jnp.asarray(weights, jnp.float32), jnp.float32(uniform))
        assert weights[int(found)] > 0


@pytest.mark.parametrize(
    "settings", [Sampling(1.0), Sampling(0.0), Sampling(7.0, top_k=3, top_p=0.5), Sampling(0.1, top_k=4)], ids=str
)
def test_forced_tokens_have_probability_one_and_free_ones_stay_in_range(settings):
    layout = Layout(forced=(-1, 7, -1, 2), free_tokens=6)
    logits = jnp.asarray(np.random.default_rng(4).normal(size=(3, 6, 9)) * 5, jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(6), (3, 6))  # the last two lie beyond the layout, which repeats its end
    probs = np.asarray(warp(layout.constrain(logits, positions), settings.checked()))
    for position, token in ((1, 7), (3, 2), (4, 2), (5, 2)):
        assert np.all(probs[:, position] == np.eye(9)[token])
    in_range = np.asarray(warp(jnp.where(jnp.arange(9) < 6, logits, -jnp.inf), settings.checked()))
    np.testing.assert_array_equal(probs[:, [0, 2]], in_range[:, [0, 2]])
    assert np.all(in_range[..., 6:] == 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Sampling(temperature=-0.1), "temperature must be at least 0, not -0.1"),
        (Sampling(temperature=float("inf")), "temperature"),
        (Sampling(temperature=float("nan")), "temperature"),
        (Sampling(top_k=0), "top_k must be at least 1, not 0"),
        (Sampling(top_k=-5), "top_k"),
        (Sampling(top_p=0.0), r"top_p must be in \(0, 1\], not 0.0"),
        (Sampling(top_p=1.2), "top_p"),
        (Sampling(top_p=float("nan")), "top_p"),
        (Sampling(guidance=-1.0), "guidance must be at least 0, not -1.0"),
        (Sampling(guidance=float("nan")), "guidance"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        settings.checked()


def test_checked_settings_have_the_same_types_however_they_were_written():
    written = [
        Sampling(1, 20, 0.5, 3),
        Sampling(1.0, np.int64(20), np.float64(0.5), 3.0),
        Sampling(1.0, 20, 0.5, 3.0).checked(),
    ]
    types = {tuple((x.dtype, x.shape, x.weak_type) for x in jax.tree.leaves(s.checked())) for s in written}
    assert len(types) == 1
    assert Sampling(top_p=1).checked().top_p is None


def test_a_layout_may_force_tokens_that_have_no_logits():
    layout = Layout((-1, 6), free_tokens=4)
    constrained = layout.constrain(jnp.zeros((2, 5)), jnp.arange(2))
    np.testing.assert_array_equal(jnp.isfinite(constrained), [[1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]])
