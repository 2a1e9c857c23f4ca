"""Random bundles of every family, in memory, with sizes that four devices can share."""

import dataclasses

import jax
import numpy as np
from flax import nnx
from small import VQ

from cascade_jax.bundle import Bundle, Config, Prompt, abstract
from cascade_jax.drafters.eagle import EagleConfig
from cascade_jax.drafters.eagle3 import Eagle3Config
from cascade_jax.drafters.hydra import HydraConfig
from cascade_jax.drafters.parallel import ParallelConfig
from cascade_jax.models.chameleon import ChameleonConfig
from cascade_jax.models.emu3 import Emu3Config
from cascade_jax.models.fusion import FusionConfig
from cascade_jax.models.janus import JanusConfig
from cascade_jax.models.liquid import LiquidConfig
from cascade_jax.models.llamagen import LlamaGenConfig
from cascade_jax.models.simplear import SimpleARConfig

LLAMAGEN = LlamaGenConfig(
    dim=32, layers=1, heads=4, image_tokens=16, vocab_size=64, condition_tokens=5, caption_dim=8, ffn_multiple=16
)
CHAMELEON = ChameleonConfig(
    dim=32, layers=1, heads=4, ffn_dim=64, rows=4, columns=4, codebook_size=64, vocab_size=128, begin=0, turn=100,
    image_start=101, image_end=102, newline=103, size=104,
)  # fmt: skip
JANUS = JanusConfig(
    dim=32, layers=1, heads=4, ffn_dim=64, grid=4, codebook_size=64, vocab_size=96, begin=90, image_start=91, pad=92
)
TARGETS = {"llamagen": LLAMAGEN, "chameleon": CHAMELEON, "janus": JANUS}
EMU3 = Emu3Config(
    dim=32, layers=1, heads=4, kv_heads=4, head_dim=16, ffn_dim=64, style="emu3.5", rows=4, columns=4, codebook_size=64,
    vocab_size=160, qk_norm=True, first_code=96, begin=90, turn=91, image_start=92, image=93, image_end=94, newline=95,
    zero=15, times=9, unguided=(90, 70, 91),
)  # fmt: skip
KIN = {
    "simplear": SimpleARConfig(
        dim=32, layers=1, heads=4, kv_heads=2, ffn_dim=64, grid=4, codebook_size=64, vocab_size=160, first_code=96,
        begin=90, image_start=92, flaws=(70, 71),
    ),
    "liquid": LiquidConfig(
        dim=32, layers=1, heads=2, head_dim=32, ffn_dim=64, image_start=92, nothing=(70,), grid=4, codebook_size=64,
        vocab_size=160, first_code=96, begin=90,
    ),
}  # fmt: skip
"""Families that draw like others, with other blocks."""
VARIANTS = {
    "classes": dataclasses.replace(LLAMAGEN, classes=10, condition_tokens=1),
    "anole": dataclasses.replace(CHAMELEON, style="anole"),
    "emu3": EMU3,
}
"""Other ways in which the families draw, and families whose block is one of theirs."""


def config(family: str, drafter: str = "eagle1") -> Config:
    """The smallest configuration of a family, or of one of VARIANTS, with a drafter."""
    target = (TARGETS | VARIANTS | KIN)[family]
    places = {}
    if isinstance(target, LlamaGenConfig):
        places = {"grid": target.grid, "condition_slots": target.condition_tokens - 1}
    if drafter == "eagle3":
        own = Eagle3Config(target.block, 64, 64, target.dim, (1, 1, 1), **places)
    else:
        table = target.vocab_size if isinstance(target, FusionConfig) else None
        kinds = {"eagle1": EagleConfig, "parallel": ParallelConfig, "hydra": HydraConfig}
        own = kinds[drafter](dataclasses.replace(target.block, input_norm=False), vocab_size=table, **places)
    name = {"classes": "llamagen", "anole": "chameleon"}.get(family, family)
    return Config(name, target, own, VQ, sampling={"temperature": 1.0, "top_k": 40, "guidance": 2.0})


def bundle(family: str, seed: int = 0, drafter: str = "eagle1") -> Bundle:
    """That configuration with random weights, with enough contrast for every rule to do something else."""
    rng = np.random.default_rng(seed)

    def random(path, leaf):
        if not np.issubdtype(leaf.dtype, np.floating):
            return np.arange(4, 4 + leaf.size, dtype=leaf.dtype)  # Chameleon's ids of codes
        if "scale" in jax.tree_util.keystr(path):
            return np.ones(leaf.shape, np.float32)
        return rng.normal(0, leaf.shape[0] ** -0.5, leaf.shape).astype(np.float32)

    skeleton = abstract(config(family, drafter))
    params = jax.tree_util.tree_map_with_path(random, skeleton.params)
    if drafter == "eagle3":
        return Bundle(skeleton.config, jax.tree.map(jax.numpy.asarray, params))
    # the drafter guesses that the feature changes little, so that part of its drafts is accepted
    width = skeleton.config.target.dim
    fc = dict(nnx.to_flat_state(params["drafter"]))["fc", "kernel"]
    fc.set_value(fc.get_value() + np.concatenate([np.zeros((width, width)), np.eye(width)]).astype(np.float32))
    return Bundle(skeleton.config, jax.tree.map(jax.numpy.asarray, params))


def prompts(family: str, count: int) -> list[Prompt]:
    """Encoded prompts, token prompts of different lengths."""
    rng = np.random.default_rng(1)
    if family == "llamagen":
        shape = LLAMAGEN.condition_tokens, LLAMAGEN.caption_dim
        return [Prompt(features=rng.normal(size=shape).astype(np.float32)) for _ in range(count)]
    if family == "classes":
        return [Prompt(ids=np.int32(3 + i)) for i in range(count)]
    first = (TARGETS | VARIANTS | KIN)[family].begin
    return [Prompt(ids=np.array([first, *rng.integers(70, 90, 2 + i % 5)], np.int32)) for i in range(count)]
