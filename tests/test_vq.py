import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cascade_jax.models import vq
from cascade_jax.recipes import tokenizer

SMALL = vq.VQConfig(32, 4, channels=8, channel_multipliers=(1, 2), res_blocks=1, z_channels=8, norm_groups=4)


@pytest.fixture(scope="module")
def model():
    return vq.VQModel(SMALL, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(1), (2, 8, 12, 3), minval=-1, maxval=1)


def test_codes_have_the_downsampled_shape_and_decode_to_pictures(model, images):
    codes = model.encode_codes(images)
    assert codes.shape == (2, 4, 6) and codes.dtype == jnp.int32
    decoded = model.decode_codes(codes)
    assert decoded.shape == images.shape and jnp.all(jnp.abs(decoded) <= 1)


def test_codes_are_the_nearest_of_unit_vectors(model, images):
    quantised = model.encode(images)
    codebook = np.asarray(model.codebook())
    np.testing.assert_allclose(np.linalg.norm(codebook, axis=-1), 1, atol=1e-6)
    latents = np.asarray(model.latents(images))
    latents = latents / np.linalg.norm(latents, axis=-1, keepdims=True)
    distances = ((latents[..., None, :] - codebook) ** 2).sum(-1)
    np.testing.assert_array_equal(quantised.codes, distances.argmin(-1))
    # z + (chosen - z) rounds differently from the chosen vector.
    np.testing.assert_allclose(quantised.vectors, codebook[quantised.codes], atol=1e-6)


def test_gradients_pass_straight_through(model):
    latents = jax.random.normal(jax.random.key(2), (1, 2, 2, 4))
    weights = jax.random.normal(jax.random.key(3), latents.shape)
    through = jax.grad(lambda z: jnp.sum(weights * model.quantize(z).vectors))(latents)
    around = jax.grad(lambda z: jnp.sum(weights * model.quantize.normalise(z)))(latents)
    np.testing.assert_allclose(through, around, atol=1e-6)


def test_each_loss_moves_its_own_side(model):
    graphdef, params = nnx.split(model.quantize)
    latents = jax.random.normal(jax.random.key(2), (1, 2, 2, 4))

    def loss(name):
        return lambda params, z: getattr(nnx.merge(graphdef, params)(z), name)

    for name, moved in (("codebook_loss", (True, False)), ("commitment_loss", (False, True))):
        gradients = jax.grad(loss(name), argnums=(0, 1))(params, latents)
        sizes = [sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(tree)) for tree in gradients]
        assert [size > 0 for size in sizes] == list(moved)


def test_group_norm_is_flax_group_norm():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (2, 5, 7, 8))
    # float32 sums in another order.
    expected = nnx.GroupNorm(8, 4, epsilon=1e-6, rngs=nnx.Rngs(0))(x)
    np.testing.assert_allclose(vq.GroupNorm(8, SMALL, rngs=nnx.Rngs(0))(x), expected, atol=2e-5)


def test_downsampling_pads_on_the_right_and_below_only():
    down = vq.Downsample(1, dtype=None, rngs=nnx.Rngs(0))
    down.conv.kernel[...] = jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1.0)
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(down(x)[0, :, :, 0], [[0, 2], [8, 10]])


def test_upsampling_repeats_pixels():
    up = vq.Upsample(1, dtype=None, rngs=nnx.Rngs(0))
    up.conv.kernel[...] = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    np.testing.assert_array_equal(up(jnp.asarray([[1.0, 2.0]])[None, ..., None])[0, :, :, 0], [[1, 1, 2, 2]] * 2)


def test_bfloat16_computation_stays_close_and_returns_float32(images):
    exact, rough = (vq.VQModel(SMALL, dtype=dtype, rngs=nnx.Rngs(0)) for dtype in (None, jnp.bfloat16))
    vectors = exact.encode(images).vectors
    decoded = rough.decode(vectors)
    assert decoded.dtype == jnp.float32
    # bfloat16 keeps 8 bits; a handful of layers add up their rounding.
    np.testing.assert_allclose(decoded, exact.decode(vectors), atol=0.1)


@pytest.mark.parametrize(("config", "count"), [(vq.DS16, 71_883_403), (vq.DS8, 70_109_835)])
def test_presets_have_the_published_number_of_parameters(config, count):
    model = nnx.eval_shape(lambda: vq.VQModel(config, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == count


def test_attention_stands_at_the_lowest_resolution_and_in_the_middle_only():
    model = nnx.eval_shape(lambda: vq.VQModel(vq.DS16, rngs=nnx.Rngs(0)))
    assert [len(level.attn) for level in model.encoder.conv_blocks] == [0, 0, 0, 0, 2]
    assert [len(level.attn) for level in model.decoder.conv_blocks] == [3, 0, 0, 0, 0]
    assert [len(level.res) for level in model.decoder.conv_blocks] == [3] * 5


def test_uint8_pictures_survive_the_way_there_and_back():
    pixels = jnp.arange(256, dtype=jnp.uint8)
    np.testing.assert_array_equal(vq.to_uint8(vq.to_float(pixels)), pixels)


def _unit_vectors(seed, count, width=4):
    vectors = jax.random.normal(jax.random.key(seed), (count, width))
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def test_perplexity_is_the_number_of_codes_in_even_use():
    np.testing.assert_allclose(tokenizer.perplexity(jnp.arange(64) % 16, 32), 16, rtol=1e-5)
    np.testing.assert_allclose(tokenizer.perplexity(jnp.zeros(64, jnp.int32), 32), 1, rtol=1e-5)


def test_reviving_replaces_dead_codes_by_points_and_keeps_the_others():
    points, dead = _unit_vectors(0, 50), jnp.asarray([1, 3])
    codebook = points[:6].at[dead].set(-points.mean(0) / jnp.linalg.norm(points.mean(0)))
    nearest = np.asarray(jnp.argmax(points @ codebook.T, -1))
    used = np.isin(np.arange(6), nearest)
    revived = tokenizer.revive(jax.random.key(1), codebook, points)
    np.testing.assert_array_equal(revived[used], codebook[used])
    assert not used.all() and all((row == points).all(-1).any() for row in revived[~used])


def test_kmeans_finds_separate_bundles():
    directions = jnp.eye(4)
    points = jnp.repeat(directions, 20, axis=0) + 0.05 * _unit_vectors(2, 80)
    points = points / jnp.linalg.norm(points, axis=-1, keepdims=True)
    centres = tokenizer.spherical_kmeans(jax.random.key(0), points, 12)
    np.testing.assert_allclose(jnp.linalg.norm(centres, axis=-1), 1, atol=1e-6)
    # A bundle's points deviate by 0.05 at most, so do their centres.
    assert jnp.all(jnp.max(points @ centres.T, axis=-1) > 0.99)
