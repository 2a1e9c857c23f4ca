"""VQGAN tokenizers: under LlamaGen's names, and under taming-transformers', as Chameleon's `vqgan.ckpt` has them.

In the latter a level is `down.I` or `up.I`, its blocks are `block.J` and `attn.J`, and the middle is `block_1`,
`attn_1`, `block_2`.
"""

from collections.abc import Sequence

from cascade_jax.models.vq import VQConfig
from checkpoints_convert.sources import Source
from checkpoints_convert.table import Rule
from checkpoints_convert.tensors import ConvertError
from checkpoints_convert.transforms import conv


def own_names(prefix: str = "") -> Sequence[Rule]:
    """LlamaGen's names, which our module bears."""
    return (Rule(f"{prefix}quantize.embedding.weight", "quantize.embedding"), *leaves(f"{prefix}**", "**"))


def taming_names(config: VQConfig, prefix: str = "", *, finest_first: bool) -> Sequence[Rule]:
    """taming-transformers' names. Its decoder numbers levels from the finest; Hugging Face's from the coarsest."""
    levels = len(config.channel_multipliers)
    rules = [Rule(f"{prefix}quantize.embedding.weight", "quantize.embedding")]
    for i in range(levels):
        up = levels - 1 - i if finest_first else i
        for theirs, ours in (
            (f"encoder.down.{i}", f"encoder.conv_blocks.{i}"),
            (f"decoder.up.{up}", f"decoder.conv_blocks.{i}"),
        ):
            rules += leaves(f"{prefix}{theirs}.block.**", f"{ours}.res.**")
            rules += leaves(f"{prefix}{theirs}.**", f"{ours}.**")
    for side in ("encoder", "decoder"):
        for i, name in enumerate(("block_1", "attn_1", "block_2")):
            rules += leaves(f"{prefix}{side}.mid.{name}.**", f"{side}.mid.{i}.**")
    return (*rules, *leaves(f"{prefix}**", "**"))


def leaves(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{theirs}.weight", f"{ours}.kernel", conv),
        Rule(f"{theirs}.weight", f"{ours}.scale"),
        Rule(f"{theirs}.bias", f"{ours}.bias"),
    )


def configure(
    source: Source, prefix: str, *, down: str, block: str, kind: type[VQConfig] = VQConfig, **stated
) -> VQConfig:
    """Sizes from shapes; `down` and `block` are what the encoder calls its levels and their residual blocks.

    A tokenizer of another kind has its own class of configuration, and what shapes do not tell is `stated`.
    """
    codes, width = source.shape(f"{prefix}quantize.embedding.weight")
    channels = source.shape(f"{prefix}encoder.conv_in.weight")[0]
    level = lambda i, j: f"{prefix}encoder.{down}.{i}.{block}.{j}.conv1.weight"
    levels = _count(source, lambda i: level(i, 0))
    if not levels:
        raise ConvertError(f"{source.path} lacks the tensor {level(0, 0)}")
    attention = f"{prefix}encoder.{down}.{levels - 1}.attn.0."
    return kind(
        codebook_size=codes,
        codebook_dim=width,
        channels=channels,
        channel_multipliers=tuple(source.shape(level(i, 0))[0] // channels for i in range(levels)),
        res_blocks=_count(source, lambda j: level(0, j)),
        z_channels=source.shape(f"{prefix}encoder.conv_out.weight")[0],
        attention=any(name.startswith(attention) for name in source.tensors),
        **stated,
    )


def _count(source: Source, name) -> int:
    count = 0
    while name(count) in source.tensors:
        count += 1
    return count
