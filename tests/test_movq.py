"""MoVQ's tokenizers, MoVQGAN's and Emu3's, against the public code, on small random checkpoints in their formats."""

import pathlib

import jax
import numpy as np
import oracles
import published
import pytest
import torch
from flax import nnx

from cascade_jax import bundle
from cascade_jax.models import movq as models
from cascade_jax.models.vq import VectorQuantizer, VQConfig
from checkpoints_convert import ConvertError, movq
from checkpoints_convert.convert import planned
from checkpoints_convert.formats import Known
from checkpoints_convert.sources import open_source

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.mark.slow
def test_movqgan_encodes_and_decodes_as_the_public_code_does(tmp_path):
    """golden/README.md says what was run. Averages of the weights, and what they were trained against, lie beside."""
    golden = np.load(GOLDEN / "movqgan.npz")
    weights = published.movqgan()
    beside = {"loss.discriminator.main.0.weight": (8, 3, 4, 4), "ema_encoder.conv_inweight": (32, 3, 3, 3)}
    weights |= {name: np.zeros(shape, np.float32) for name, shape in beside.items()}
    vq = oracles.module(movq.MOVQGAN, published.write_pickle(tmp_path / "movqgan_270M.ckpt", weights))
    assert vq.config == models.MoVQConfig(64, channels=32, channel_multipliers=(1, 2), res_blocks=1)
    latents, codes, decoded = oracles.through_vq(vq, golden["pixels"], golden["codes"])
    np.testing.assert_allclose(decoded, golden["decoded"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(latents, golden["latents"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(codes, golden["encoded"])


@pytest.fixture(scope="module")
def emu3():
    return oracles.emu3_vq()


@pytest.fixture(scope="module")
def hub(emu3, tmp_path_factory):
    """Emu3's tokenizer as a Hugging Face model holds it, and under its authors' names."""
    hub = tmp_path_factory.mktemp("hub")
    weights = {f"vqmodel.{name}": value.numpy() for name, value in emu3.state_dict().items()}
    published.write_folder(hub / "hf", weights, {})
    published.write_folder(hub / "original", oracles.emu3_vq_original(weights), {})
    return hub


@pytest.mark.slow
def test_emu3s_tokenizer_encodes_and_decodes_pictures_as_that_of_transformers(emu3, hub):
    """A picture is four equal frames there, and the first of four decoded ones."""
    vq, rng = oracles.module(movq.EMU3_HUGGING_FACE, hub / "hf"), np.random.default_rng(7)
    pixels = rng.uniform(-1, 1, (2, 16, 12, 3)).astype(np.float32)
    codes = rng.integers(0, oracles.CODES, (2, 8, 6))
    with torch.no_grad():
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        hidden = emu3.encoder(images.unsqueeze(1).repeat(1, 4, 1, 1, 1)).permute(0, 2, 1, 3, 4)
        latents = emu3.quant_conv(hidden)[:, :, 0].permute(0, 2, 3, 1).numpy()
        encoded = torch.stack(emu3.encode(images, image_sizes=torch.tensor([[16, 12]] * 2)).image_tokens).numpy()
        decoded = emu3.decode(torch.from_numpy(codes)).permute(0, 2, 3, 1).numpy()
    own = oracles.through_vq(vq, pixels, codes)
    np.testing.assert_allclose(own[0], latents, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(own[1], encoded)
    np.testing.assert_allclose(own[2], decoded, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_both_layouts_of_emu3s_tokenizer_hold_the_same_one(hub):
    one = oracles.module(movq.EMU3_HUGGING_FACE, hub / "hf")
    other = oracles.module(movq.EMU3, hub / "original")
    assert one.config == other.config and one.config.temporal
    jax.tree.map(np.testing.assert_array_equal, nnx.state(one), nnx.state(other))


def test_what_the_convolutions_over_time_do_to_equal_frames_are_convolutions_in_space():
    """By definition, in NumPy: four equal frames, two at a step, zeros before the first."""
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 3, 3, 4, 1, 1))
    x = rng.normal(size=3)
    padded = np.concatenate([np.zeros((2, 3)), np.tile(x, (4, 1))])
    step = lambda kernel, frames: np.einsum("oik,ki->o", kernel[..., 0, 0], frames)
    two = [step(first, padded[:4]), step(first, padded[2:])]
    one = step(second, np.concatenate([np.zeros((2, 3)), two]))
    made = x @ movq.four_frames(first)[0, 0]
    np.testing.assert_allclose(made, np.concatenate(two), atol=1e-6)
    np.testing.assert_allclose(np.concatenate(two) @ movq.two_frames(second)[0, 0], one, atol=1e-6)


@pytest.mark.slow
def test_a_tokenizer_that_joins_another_number_of_frames_is_refused(hub, tmp_path):
    weights = {name: np.array(tensor.read()) for name, tensor in open_source(hub / "original").tensors.items()}
    one = {name: value for name, value in weights.items() if "encoder.time_conv.1" not in name}
    published.write_folder(tmp_path, one, {})
    with pytest.raises(ConvertError, match="halves the number of frames 1 times in its encoder"):
        planned(movq.EMU3, open_source(tmp_path), Known({}))


def test_codes_by_inner_product_are_those_of_the_largest():
    config = VQConfig(32, 4, l2_norm=False, by_product=True)
    quantize = VectorQuantizer(config, rngs=nnx.Rngs(0))
    latents = jax.random.normal(jax.random.key(1), (1, 3, 5, 4))
    products = np.asarray(latents) @ np.asarray(quantize.codebook()).T
    np.testing.assert_array_equal(quantize(latents).codes, products.argmax(-1))


def test_movqgan_270m_has_270_million_parameters():
    shapes = bundle.shapes("vq", models.MOVQGAN).values()
    assert sum(int(np.prod(shape)) for shape in shapes) // 10**6 == 270
