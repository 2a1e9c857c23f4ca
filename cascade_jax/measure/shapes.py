"""Models of published sizes with random weights, for measuring alone."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp

from cascade_jax import platforms
from cascade_jax.bundle import Bundle, Config, Prompt, abstract, laid_out
from cascade_jax.drafters.eagle import EagleConfig
from cascade_jax.models import chameleon, cosmos, emu3, families, janus, liquid, llamagen, lumina2, movq, simplear
from cascade_jax.models.vq import CHAMELEON, DS16, IBQ

SHAPES = {
    "llamagen-xl": llamagen.preset("XL", image_tokens=1024),
    "llamagen-7b": llamagen.preset("7B", image_tokens=1024),
    "lumina-mgpt-7b": chameleon.preset("lumina-mgpt-7b-768"),
    "janus-pro-7b": janus.preset("7B"),
    "lumina-mgpt-2-7b": lumina2.preset("lumina-mgpt-2-7b"),
    "emu3-gen-8b": emu3.preset("emu3-gen-8b"),
    "emu3.5-image-34b": emu3.preset("emu3.5-image-34b"),
    "simplear-0.5b": simplear.preset("0.5B"),
    "simplear-1.5b": simplear.preset("1.5B"),
    "liquid-7b": liquid.preset("7B"),
}
TOKENIZERS = {
    "lumina-mgpt-2-7b": movq.MOVQGAN,
    "emu3-gen-8b": movq.EMU3,
    "emu3.5-image-34b": IBQ,
    "simplear-0.5b": cosmos.DV8X16X16,
    "simplear-1.5b": cosmos.DV8X16X16,
    "liquid-7b": CHAMELEON,
}
"""Of shapes whose picture tokenizer is no LlamaGen's."""


def config_of(shapes: str) -> Config:
    """A configuration of published sizes with a drafter.

    Raises:
      ValueError: for unknown names.
    """
    if shapes not in SHAPES:
        raise ValueError(f"unknown shapes {shapes!r}; known: {', '.join(SHAPES)}")
    target = SHAPES[shapes]
    family = families.kind_of("target", target)
    drafter = EagleConfig(dataclasses.replace(target.block, input_norm=False), **target.picture_places)
    sampling = {"temperature": 1.0, "top_k": 2000, "guidance": 3.0}
    vq = TOKENIZERS.get(shapes) or dataclasses.replace(DS16, codebook_size=target.codebook_size)
    return Config(family, target, drafter, vq, sampling=sampling)


def random_bundle(shapes: str, dtype=None, layers: int | None = None) -> Bundle:
    """A model with random weights of published sizes, for measuring alone; its drafter is EAGLE-1's.

    Args:
      layers: of the target; None for as many as are published.

    Raises:
      ValueError: for other names, or if there is not enough memory.
    """
    config = config_of(shapes)
    if layers is not None:
        config = dataclasses.replace(config, target=dataclasses.replace(config.target, layers=layers))
    dtype = platforms.defaults().decoding if dtype is None else dtype
    shapes_of = abstract(config, dtype).params
    skeleton = {part: shapes_of[part] for part in ("target", "drafter", "vq")}
    needed = _bytes(skeleton, dtype)
    if needed > 0.8 * platforms.free_memory():
        free = platforms.free_memory() / 1e9
        raise ValueError(f"{shapes} needs {needed / 1e9:.1f} GB, and {free:.1f} GB are free: try --dtype bfloat16")

    @functools.partial(jax.jit, static_argnums=0)
    def fill(shape, key):
        return 0.02 * jax.random.normal(key, shape, dtype)

    def leaf(path, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.arange(x.size, dtype=x.dtype)
        if "scale" in jax.tree_util.keystr(path):
            return jnp.ones(x.shape, dtype)
        filled = fill(x.shape, jax.random.key(zlib.crc32(jax.tree_util.keystr(path).encode())))
        product = "kernel" in jax.tree_util.keystr(path) and "vq" not in jax.tree_util.keystr(path[:1])
        return laid_out(filled) if product else filled

    return Bundle(config, {"text": None, **jax.tree_util.tree_map_with_path(leaf, skeleton)})


def blank(bundle: Bundle, count: int) -> list[Prompt]:
    """Encoded prompts without meaning."""
    return [bundle.config.target.blank()] * count


def _bytes(tree, dtype) -> int:
    return sum(x.size for x in jax.tree.leaves(tree)) * jnp.dtype(dtype).itemsize
