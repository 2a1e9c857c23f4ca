"""What Hugging Face calls Llama's layers and their settings. Chameleon, Janus-Pro, Qwen, Gemma, LlamaGen in that layout
and drafters have them in common."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cascade_jax.models.transformer import BlockConfig
from checkpoints_convert.formats import Known, StandIn
from checkpoints_convert.sources import Source
from checkpoints_convert.table import Rule, Transform, as_is
from checkpoints_convert.tensors import ConvertError
from checkpoints_convert.transforms import head_norm, linear, qkv, qkv_bias, stacked


def blocks(prefix: str, block: BlockConfig, norm: Transform = as_is) -> Sequence[Rule]:
    """Llama's layers, and those of its kin; the `{}`-th is `blocks.{}`. `norm` makes a norm's scale of its weight."""
    layer, heads, kv_heads = f"{prefix}.{{}}", block.heads, block.kv_heads
    biases = tuple(f"{layer}.self_attn.{x}_proj.bias" for x in "qkv")
    bias = Rule(biases, "blocks.{}.attention.qkv.bias", qkv_bias(heads, kv_heads))
    return (
        Rule(f"{layer}.input_layernorm.weight", "blocks.{}.attention_norm.scale", norm),
        Rule(
            tuple(f"{layer}.self_attn.{x}_proj.weight" for x in "qkv"),
            "blocks.{}.attention.qkv.kernel",
            qkv(heads, kv_heads),
        ),
        *((bias,) if block.qkv_bias else ()),
        *(
            Rule(f"{layer}.self_attn.{x[0]}_norm.{theirs}", f"blocks.{{}}.attention.{x}_norm.{ours}", head_norm(own))
            for x, own in (("query", heads), ("key", kv_heads))
            for theirs, ours in (("weight", "scale"), ("bias", "bias"))
            if block.qk_norm and (ours == "scale" or not block.qk_rms)
        ),
        Rule(f"{layer}.self_attn.o_proj.weight", "blocks.{}.attention.out.kernel", linear),
        Rule(f"{layer}.post_attention_layernorm.weight", "blocks.{}.ffn_norm.scale", norm),
        Rule((f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"), "blocks.{}.ffn.gate_up.kernel", stacked),
        Rule(f"{layer}.mlp.down_proj.weight", "blocks.{}.ffn.down.kernel", linear),
    )


TIED = (
    # a head that is the embedding is left out by safetensors
    StandIn("lm_head.weight", ("model.embed_tokens.weight",), unless=("tie_word_embeddings", False)),
)


def layers(source: Source, prefix: str) -> int:
    """How many layers there are, by their numbers.

    Raises:
      ConvertError: if there are none.
    """
    numbers = [int(m[1]) for name in source.tensors if (m := re.match(re.escape(prefix) + r"\.(\d+)\.", name))]
    if not numbers:
        raise ConvertError(f"{source.path} has no layers")
    return max(numbers) + 1


def check_settings(
    source: Source, settings: Mapping[str, Any], prefix: str, dim: int, heads: int, head_dim: int | None = None
) -> None:
    """Compares config.json's sizes with those of the layers called `prefix`, and refuses what our layers cannot do.
    Heads share the width unless their size is given.

    Raises:
      ConvertError: if config.json contradicts the tensors, or asks for another activation or rotary embedding.
    """
    if head_dim is None and (dim % heads or dim // heads % 2):
        raise ConvertError(f"{source.path}: {heads} heads do not share a width of {dim} in pairs")
    source.check_settings(
        settings,
        num_hidden_layers=layers(source, prefix),
        hidden_size=dim,
        intermediate_size=source.shape(f"{prefix}.0.mlp.gate_proj.weight")[0],
        head_dim=head_dim or dim // heads,
    )
    check_kind(source, settings)


def check_kind(source: Source, settings: Mapping[str, Any]) -> None:
    """Raises a ConvertError if config.json asks for another activation or rotary embedding than our layers have."""
    if (activation := settings.get("hidden_act") or "silu") not in ("silu", "swish"):
        raise ConvertError(f"{source.path} has the activation {activation}, and the published models have silu")
    for name in ("rope_scaling", "rope_parameters"):
        scaling = settings.get(name) or {}
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if kind != "default":
            raise ConvertError(f"{source.path} scales its rotary embedding ({kind}), which no published model does")


def rope_base(source: Source, settings: Mapping[str, Any]) -> float:
    """The rotary embedding's base, wherever a version of transformers keeps it."""
    newer = settings.get("rope_parameters") or {}
    return source.number(newer if settings.get("rope_theta") is None else settings, "rope_theta", 10000)


def check_published(source: Source, known: Known, dim: int, count: int, published: Iterable[Any]) -> None:
    """Warns where nothing but the published models' sizes tells that layers are missing."""
    usual = sorted({config.layers for config in published if config.dim == dim})
    if usual and count not in usual:
        known.say(
            f"warning: {source.path} has {count} layers, and published models of this width have "
            f"{' or '.join(map(str, usual))}: is it whole?"
        )
