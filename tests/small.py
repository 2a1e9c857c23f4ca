"""A random model of the smallest useful size, for tests of everything around the model."""

import pathlib

import jax
import numpy as np
from flax import nnx

from cascade_jax import bundle
from cascade_jax.drafters.eagle import Eagle1, EagleConfig
from cascade_jax.models.llamagen import LlamaGen, LlamaGenConfig
from cascade_jax.models.transformer import BlockConfig
from cascade_jax.models.vq import VQConfig, VQModel
from cascade_jax.scenes import captions

TARGET = LlamaGenConfig(
    dim=32,
    layers=2,
    heads=2,
    image_tokens=16,
    vocab_size=64,
    condition_tokens=captions.CONDITION_SLOTS,
    caption_dim=8,
    ffn_multiple=16,
)
DRAFTER = EagleConfig(
    BlockConfig(32, 2, 2, 16, 48, input_norm=False), grid=4, condition_slots=captions.CONDITION_SLOTS - 1
)
VQ = VQConfig(codebook_size=64, channels=8, channel_multipliers=(1, 1), res_blocks=1, z_channels=8, norm_groups=4)


def write_bundle(directory: str | pathlib.Path, *, drafter: bool = True, cascade: dict | None = None) -> pathlib.Path:
    """Writes a random scenes bundle that draws 16 codes, 8 x 8 pixels, and returns its directory."""
    config = bundle.Config(
        family="llamagen",
        target=TARGET,
        drafter=DRAFTER if drafter else None,
        vq=VQ,
        text="scenes",
        sampling={"temperature": 1.0, "top_k": 40, "guidance": 2.0},
        cascade=cascade or {},
    )
    rng = np.random.default_rng(0)

    def random(leaf):
        # Modules start with small or zero weights: without contrast, all rules would do the same.
        if leaf.ndim == 1:
            return np.ones(leaf.shape, np.float32)
        return rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape).astype(np.float32)

    def state(module, config):
        # NumPy, and shapes alone: eager initialisers would be compiled one by one.
        return jax.tree.map(random, nnx.state(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0)))))

    params = {
        "target": state(LlamaGen, TARGET),
        "drafter": state(Eagle1, DRAFTER) if drafter else None,
        "vq": state(VQModel, VQ),
        "text": rng.normal(size=(captions.NUM_CONDITIONS, TARGET.caption_dim)).astype(np.float32),
    }
    # of a device, as recipes leave them: a file that tells where they lay is what other processes must cope with
    bundle.save(directory, config, jax.tree.map(jax.numpy.asarray, params))
    return pathlib.Path(directory)
