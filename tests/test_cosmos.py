"""Cosmos' discrete video tokenizer on pictures, and the TorchScript archives that it comes in."""

import pathlib
import pickle
import zipfile

import numpy as np
import oracles
import published
import pytest
import torch
from flax import nnx
from torch.nn import functional

from cascade_jax.models import cosmos as models
from checkpoints_convert import ConvertError, cosmos, torchscript
from checkpoints_convert.sources import open_source

GOLDEN = pathlib.Path(__file__).parent / "golden"
SMALL = models.CosmosConfig(channels=8, res_blocks=1, z_channels=6)


class Holder(torch.nn.Module):
    """A module of that name and place, as far as a TorchScript archive tells."""

    def forward(self, x):
        return x


def write_jit(file: pathlib.Path, tensors: published.Tensors, buffers: dict | None = None) -> pathlib.Path:
    """An archive of modules that hold these tensors."""
    root = Holder()
    for name, value in {**tensors, **(buffers or {})}.items():
        *parents, own = name.split(".")
        place = root
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, Holder())
            place = getattr(place, parent)
        place.register_buffer(own, torch.from_numpy(np.array(value)))
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.jit.script(root).save(file)
    return file


def write_cosmos(folder: pathlib.Path, whole: bool, levels: tuple[int, ...] = SMALL.levels) -> pathlib.Path:
    """The files that are published: archives of both halves, and one of both, or without it."""
    levels = {"_levels": np.array(levels, np.int32)}
    weights = published.cosmos()
    encodes = lambda name: name.startswith(("encoder.", "quant_conv."))
    sides = {"encoder": {n: w for n, w in weights.items() if encodes(n)}}
    sides["decoder"] = {n: w for n, w in weights.items() if not encodes(n)}
    quantisers = {"encoder": "quantizer.", "decoder": "inv_quant.quantizer."}
    for side, own in sides.items():
        write_jit(folder / f"{side}.jit", own, {quantisers[side] + name: x for name, x in levels.items()})
    if whole:
        waves = {"encoder.patcher3d.wavelets": np.ones(2, np.float32)}
        write_jit(folder / "autoencoder.jit", weights, waves | {f"quantizer.{n}": x for n, x in levels.items()})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["the whole and its halves", "halves"])
def test_pictures_are_encoded_and_decoded_as_the_public_code_does(whole, tmp_path):
    """golden/README.md says what was run: films of one frame. Decoded pictures are as large as 24 here."""
    golden = np.load(GOLDEN / "cosmos.npz")
    vq = oracles.module(cosmos.DISCRETE_VIDEO, write_cosmos(tmp_path / "Cosmos", whole))
    assert vq.config == SMALL and vq.config.downsampling == 16
    latents, codes, decoded = oracles.through_vq(vq, golden["pixels"], golden["codes"])
    np.testing.assert_allclose(latents, golden["latents"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(codes, golden["encoded"])
    np.testing.assert_allclose(decoded, golden["decoded"], rtol=0, atol=1e-3)


def film(x: torch.Tensor, weight, bias, **settings) -> torch.Tensor:
    """A convolution over a film [B, C, T, H, W] that stands still, by definition: every frame there is, is the same."""
    frames = weight.shape[2]
    return functional.conv3d(x.repeat(1, 1, frames, 1, 1), weight, bias, **settings)


def test_layers_over_time_and_space_are_one_convolution_on_a_single_frame():
    rng = torch.Generator().manual_seed(0)
    noise = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
    space, time, last = noise(3, 3, 1, 3, 3), noise(3, 3, 3, 1, 1), noise(3, 3, 1, 1, 1)
    biases, x = [noise(3) for _ in range(3)], noise(1, 3, 1, 6, 4)
    arrays = lambda *tensors: [tensor.numpy() for tensor in tensors]

    def ours(x, kernel, bias, **settings):
        kernel, bias = (torch.from_numpy(np.asarray(array, np.float64)) for array in (kernel, bias))
        return functional.conv2d(x[:, :, 0], kernel.permute(3, 2, 0, 1), bias, **settings)

    both = film(film(x, space, biases[0], padding=(0, 1, 1)), time, biases[1])[:, :, 0]
    bias = cosmos.pair_bias(*arrays(time, biases[0], biases[1]))
    close = dict(rtol=0, atol=1e-5)  # kernels are made in float32
    torch.testing.assert_close(ours(x, cosmos.pair(*arrays(space, time)), bias, padding=1), both, **close)

    padded = functional.pad(x, (0, 1, 0, 1))
    halved = film(padded, space, biases[0], stride=(1, 2, 2)) + functional.avg_pool3d(padded, (1, 2, 2))
    timed = film(film(halved, time, biases[1]) + halved, last, biases[2])[:, :, 0]
    kernel = cosmos.down_timed(*arrays(space, time, last))
    bias = cosmos.down_timed_bias(*arrays(time, last, *biases))
    torch.testing.assert_close(ours(padded, kernel, bias, stride=2), timed, **close)
    untimed = film(halved, last, biases[2])[:, :, 0]
    bias = cosmos.pair_bias(*arrays(last, biases[0], biases[2]))
    torch.testing.assert_close(ours(padded, cosmos.down(*arrays(space, last)), bias, stride=2), untimed, **close)

    grown = film(film(x, space, biases[0], padding=(0, 1, 1)) + x, last, biases[2])[:, :, 0]
    torch.testing.assert_close(ours(x, cosmos.up(*arrays(space, last)), bias, padding=1), grown, **close)
    moved = film(x, time, biases[1])[:, :, 0] + x[:, :, 0]
    torch.testing.assert_close(ours(x, cosmos.up_time(*arrays(time)), biases[1]), moved, **close)


def test_wavelets_of_a_picture_are_its_own_and_nothing_moves():
    pixels = np.random.default_rng(1).uniform(-1, 1, (1, 8, 4, 3)).astype(np.float32)
    bands = np.asarray(models.to_bands(pixels, 4))
    assert bands.shape == (1, 2, 1, 192)
    np.testing.assert_allclose(bands[..., :3], pixels.reshape(1, 2, 4, 1, 4, 3).mean((2, 4)), atol=1e-6)
    np.testing.assert_array_equal(bands[..., 96:], 0)
    np.testing.assert_allclose(models.from_bands(bands, 4), pixels, atol=1e-6)


def test_a_code_is_the_number_whose_digits_are_the_levels_of_its_vector():
    config = models.CosmosConfig(codebook_size=8 * 5, codebook_dim=2, levels=(8, 5))
    quantizer = models.ScalarQuantizer(config)
    codebook = np.asarray(quantizer.codebook())
    np.testing.assert_allclose(codebook[[0, 7, 8, 39]], [[-1, -1], [0.75, -1], [-1, -0.5], [0.75, 1]])
    latents = np.random.default_rng(2).normal(0, 2, (1, 9, 9, 2)).astype(np.float32)
    found = quantizer(latents)
    np.testing.assert_allclose(codebook[found.codes], found.vectors, atol=1e-6)
    assert len(np.unique(found.codes)) > 20
    bounded = np.tanh(latents + np.array([np.arctanh(1 / 7.007), 0])) * [3.5035, 2.002] - [0.5, 0]
    digits = np.round(bounded).astype(int) + np.array([4, 2])
    np.testing.assert_array_equal(found.codes, digits @ [1, 8])


def test_shapes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"levels \(8, 5\) make 40 codes of 2 channels, not 64000 of 6"):
        models.CosmosConfig(levels=(8, 5))
    with pytest.raises(ValueError, match="patch must be a power of two, not 3"):
        models.CosmosConfig(patch=3)


def test_the_published_shape_is_that_of_the_public_code():
    config = models.DV8X16X16
    assert (config.downsampling, config.codebook_size, config.bands) == (16, 64000, 192)
    vq = nnx.eval_shape(lambda: models.Cosmos(config, rngs=nnx.Rngs(0)))
    assert vq.decoder.conv_in.kernel.shape == (3, 3, 16, 512) and vq.decoder.conv_out.kernel.shape == (3, 3, 256, 192)


def test_an_archives_tensors_are_those_of_its_state_dict(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.Linear(3, 2)).to(torch.bfloat16)
    module[1].weight.data = torch.randn(3, 2).to(torch.bfloat16).T  # lies the other way round
    file = tmp_path / "model.jit"
    torch.jit.script(module).save(file)
    source = open_source(file)
    assert list(source.tensors) == list(module.state_dict())
    for name, want in module.state_dict().items():
        tensor = source.tensors[name]
        np.testing.assert_array_equal(tensor.read().astype(np.float32), want.float().numpy())
        assert (tensor.shape, str(tensor.dtype)) == (tuple(want.shape), "bfloat16")


def test_an_archive_that_asks_for_more_than_tensors_is_refused(tmp_path):
    def archive(content: bytes) -> pathlib.Path:
        file = tmp_path / "model.jit"
        with zipfile.ZipFile(file, "w") as made:
            made.writestr("m/constants.pkl", b"")
            made.writestr("m/data.pkl", content)
        return file

    with pytest.raises(ConvertError, match=r"is refused: it asks for posix\.system, which weights have no need of"):
        torchscript.read(archive(b"cposix\nsystem\n(S'true'\ntR."))
    with pytest.raises(ConvertError, match=r"model\.jit is damaged"):
        torchscript.read(archive(pickle.dumps([1])[:-3]))
    with pytest.raises(ConvertError, match="is damaged"):
        torchscript.read(archive(pickle.dumps({"a": 1})))


def test_a_tokenizer_that_lacks_a_half_is_refused(tmp_path):
    folder = write_cosmos(tmp_path / "Cosmos", whole=False)
    with pytest.raises(ConvertError, match=r"lacks the tensor encoder\.conv_in\.0\.conv3d\.weight"):
        cosmos.DISCRETE_VIDEO.configure(open_source(folder / "decoder.jit"), None)
