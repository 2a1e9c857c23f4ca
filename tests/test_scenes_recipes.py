"""The recipes of target and drafter on a model of the smallest useful size."""

import csv

import jax
import numpy as np
import pytest
import small
from flax import nnx

from cascade_jax import bundle, pipeline
from cascade_jax.models.vq import VQConfig, VQModel
from cascade_jax.pipeline import load
from cascade_jax.recipes import drafter, target
from cascade_jax.sampling import Sampling
from cascade_jax.training import log, run

SAMPLING = Sampling(guidance=2.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(small.write_bundle(tmp_path_factory.mktemp("small") / "model", drafter=False))


def test_the_target_recipe_lowers_its_loss_and_logs_it(tmp_path):
    config = VQConfig(
        codebook_size=64, channels=4, channel_multipliers=(1,) * 6, res_blocks=1, z_channels=8, norm_groups=2
    )
    tokenizer = VQModel(config, rngs=nnx.Rngs(0))  # 128 pixels to 4 x 4 codes
    edition = target.Edition(small.TARGET, steps=40, batch=2, rate=0.004, adam_rate=1.5e-3)
    params = target.train_target(tmp_path, tokenizer, edition)
    assert params["text"].shape == (target.captions.NUM_CONDITIONS, small.TARGET.caption_dim)
    with open(tmp_path / "log.csv") as log:
        losses = [float(row["loss"]) for row in csv.DictReader(log)]
    assert losses[0] < 1.05 * np.log(64)  # a uniform guess
    assert losses[-1] < losses[0]
    config, kept = target.load_target(tmp_path, tokenizer)
    assert config == small.TARGET
    jax.tree.map(np.testing.assert_array_equal, kept, params)


def test_every_embedded_model_is_of_an_edition():
    assert target.EDITIONS.keys() == pipeline.EMBEDDED.keys()
    for name, edition in target.EDITIONS.items():
        assert bundle.read_config(pipeline.folder(name)).target == edition.config


@pytest.mark.slow
def test_the_drafter_recipe_raises_the_expected_acceptance(model, tmp_path):
    rows = drafter.distill(
        model, tmp_path / "distilled", count=16, batch=8, seed=0, sampling=SAMPLING, say=lambda _: None
    )
    assert rows.taps == ()  # the target's features are kept
    config, params = drafter.train_drafter(tmp_path / "drafter", model, rows, steps=60, batch=4)
    assert config.condition_slots == small.TARGET.condition_tokens - 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    acceptance = log.read(tmp_path / "drafter" / "log.csv")["acceptance"]
    assert acceptance[-1] > acceptance[0]
    found, kept, _ = run.trained(tmp_path / "drafter")
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, kept, params)
