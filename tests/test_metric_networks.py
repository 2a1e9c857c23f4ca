"""CLIP and the Inception of FID: their numbers, and what the commands do with them.

The oracle of CLIP is `transformers`; of Inception it is `pytorch-fid`, run once (see golden/README.md). Tolerance: 1e-4
for float32 sums in another order, of the largest feature for Inception, whose random weights know no scale.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import published
import pytest
import torch
from flax import nnx
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from cascade_jax import bundle, cli, pictures
from cascade_jax.evaluation.metrics.metric import FewPictures
from cascade_jax.evaluation.networks import clip as clip_score
from cascade_jax.evaluation.networks import inception as fid
from cascade_jax.evaluation.networks.moments import statistics
from cascade_jax.models import clip, inception
from checkpoints_convert import ConvertError, convert

GOLDEN = pathlib.Path(__file__).parent / "golden"
FAST = {"xla_backend_optimization_level": 0}
START, END, POSITIONS = 48, 49, 10


def _captions() -> np.ndarray:
    """Three, int [3, POSITIONS]; shorter ones are padded by end tokens, as CLIP's tokenizer does."""
    ids = np.random.default_rng(1).integers(0, START, (3, POSITIONS))
    ids[:, 0] = START
    for row, length in enumerate((5, 10, 2)):
        ids[row, length - 1 :] = END
    return ids


@pytest.fixture(scope="module", params=[END, 2], ids=["end token named", "end token as published"])
def pair(request, tmp_path_factory):
    """A CLIP of `transformers`, and the same converted."""
    home, model = tmp_path_factory.mktemp("clip"), oracles.clip(request.param)
    oracles.save(model, home / "source")
    if request.param == 2:  # the published file is a pickle, with positions among the weights
        weights = {name: value.numpy() for name, value in model.state_dict().items()}
        for tower, count in (("vision", 17), ("text", POSITIONS)):
            weights[f"{tower}_model.embeddings.position_ids"] = np.arange(count)[None]
        (home / "source" / "model.safetensors").unlink()
        published.write_pickle(home / "source" / "pytorch_model.bin", weights)
    convert("clip", [home / "source"], home / "clip")
    return model, bundle.load_metric(home / "clip")


def _measured(network: clip.CLIP, pictures, ids) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Vectors of pictures, vectors of captions, similarities."""
    return _measured_jit(*nnx.split(network), pictures, ids)


@functools.partial(jax.jit, static_argnums=0)
def _measured_jit(graph, state, pictures, ids):
    network = nnx.merge(graph, state)
    return network.image_features(pictures), network.text_features(ids), network(pictures, ids)


def _pictures() -> np.ndarray:
    return np.random.default_rng(2).standard_normal((2, 32, 32, 3)).astype(np.float32)


def test_clip_gives_the_features_and_similarities_of_transformers(pair):
    model, ours = pair
    pictures, ids = _pictures(), _captions()
    with torch.no_grad():
        given = {"input_ids": torch.tensor(ids), "pixel_values": torch.tensor(pictures.transpose(0, 3, 1, 2).copy())}
        image = model.visual_projection(model.vision_model(given["pixel_values"]).pooler_output)
        text = model.text_projection(model.text_model(given["input_ids"]).pooler_output)
        logits = model(**given).logits_per_image
    for found, expected in zip(_measured(ours, pictures, ids), (image, text, logits)):
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_clip_reads_a_caption_up_to_its_end_and_sizes_are_checked(pair):
    _, ours = pair
    ids, after = _captions(), np.array([[5], [10], [2]])
    padded = np.where(np.arange(POSITIONS) < after, ids, 7)
    for found, expected in zip(_measured(ours, _pictures(), padded), _measured(ours, _pictures(), ids)):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match=r"must be \[B, 32, 32, 3\]"):
        ours.image_features(jnp.zeros((1, 24, 24, 3)))
    with pytest.raises(ValueError, match="at most 10 tokens, not 11"):
        ours.text_features(jnp.zeros((1, 11), int))


def test_pictures_are_normalised_as_clips_were_trained():
    np.testing.assert_allclose(clip.normalise(jnp.asarray(OPENAI_CLIP_MEAN)), 0, atol=1e-6)
    ones = np.asarray(OPENAI_CLIP_MEAN) + np.asarray(OPENAI_CLIP_STD)
    np.testing.assert_allclose(clip.normalise(jnp.asarray(ones)), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (clip.CLIPConfig(), 151_277_313),
        (inception.InceptionConfig(), 21_768_352),  # without the classifier, each convolution with one bias
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(config, count):
    assert sum(int(np.prod(shape)) for shape in bundle.shapes("metric", config).values()) == count


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A converted Inception's folder; nothing on the command line says what it is."""
    home, shapes = tmp_path_factory.mktemp("inception"), json.loads(str(np.load(GOLDEN / "inception.npz")["shapes"]))
    file = published.write_pickle(home / "pt_inception-2015-12-05-6726825d.pth", published.inception(shapes))
    convert("auto", [file], home / "inception")
    return home / "inception"


def test_inception_gives_the_features_of_pytorch_fid(network):
    squares = np.random.default_rng(5).random((2, 3, 8, 8), dtype=np.float32)
    pictures = np.kron(squares, np.ones((12, 12), np.float32)).transpose(0, 2, 3, 1)
    ours = bundle.load_metric(network)
    ours.config = inception.InceptionConfig(size=96)
    graph, state = nnx.split(ours)
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x), compiler_options=FAST)
    features = run(state, pictures)
    expected = np.load(GOLDEN / "inception.npz")["features"]
    np.testing.assert_allclose(features, expected, atol=1e-4 * np.abs(expected).max())
    # a tolerance that means something: the two pictures differ by far more
    assert np.abs(expected[0] - expected[1]).max() > 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("shape", [(50, 64), (299, 299), (384, 320)])
def test_pictures_are_resized_as_torch_does(shape):
    pictures = np.random.default_rng(3).random((1, *shape, 3), dtype=np.float32)
    given = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(given, size=(299, 299), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(inception.resize(jnp.asarray(pictures), 299), theirs.permute(0, 2, 3, 1), atol=1e-4)


@pytest.mark.slow
def test_a_folders_statistics_are_those_of_the_networks_features(network, tmp_path):
    images = np.random.default_rng(7).integers(0, 256, (3, 20, 30, 3), np.uint8)
    for number, image in enumerate(images):
        pictures.write(tmp_path / f"{number}.png", image)
    loaded, found = fid.load(network), pictures.paths(tmp_path)
    moments = fid.gather(loaded, pictures.batches(found, 2), found, batch=2)
    graph, state = nnx.split(bundle.load_metric(network))
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x), compiler_options=FAST)
    expected = np.asarray(run(state, images / np.float32(255)), np.float64)
    np.testing.assert_allclose(moments.mean, expected.mean(axis=0), atol=1e-4 * np.abs(expected).max())
    with pytest.warns(FewPictures):
        distance = fid.Distance(loaded, fid.reference(loaded, tmp_path)).of(statistics(moments))
    # the square roots of eigenvalues that are zero but for rounding, of 2,048 features
    assert abs(distance) < 1e-4 * np.trace(statistics(moments).covariance)
    with pytest.raises(ValueError, match="is no CLIP"):
        clip_score.load(network)


def test_commands_know_what_measures_from_what_draws(network, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["info", str(network)]) == 0
    said = capsys.readouterr().out
    for line in (
        "metric",
        "kind  inception",
        "parameters  21,768,352",
        "pt_inception-2015-12-05-6726825d.pth  sha256:",
    ):
        assert line in said
    for argv in (["generate", "a cat", "--model"], ["neighbours"]):
        assert cli.main([*argv, str(network)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert "is a network that measures pictures (inception), not a model that draws them" in err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(bundle.BundleError, match="is a model that draws, and one that measures is needed: clip, incep"):
        bundle.load_metric(pathlib.Path(bundle.__file__).parents[1] / "scenes" / "small_weights")


def test_what_is_no_such_network_is_told_apart(network, tmp_path):
    file = network.parent / "pt_inception-2015-12-05-6726825d.pth"
    with pytest.raises(ConvertError, match=r"is no part of clip: it looks like Inception-v3 \(inception\)"):
        convert("clip", [file], tmp_path / "out")
    other = oracles.clip(END)
    other.config.vision_config.hidden_act = "gelu"
    oracles.save(other, tmp_path / "other")
    with pytest.raises(ConvertError, match="is a CLIP with gelu, and OpenAI's have quick_gelu"):
        convert("clip", [tmp_path / "other"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
