"""EAGLE-1 drafters (`jadohu/llamagen_drafter` and its like): `config.json` and `pytorch_model.bin`."""

import re
from collections.abc import Sequence

from cascade_jax.models.eagle import EagleConfig
from cascade_jax.models.llamagen import LlamaGenConfig
from cascade_jax.models.transformer import BlockConfig
from checkpoints_convert.formats import Format, Known
from checkpoints_convert.sources import CODES, ConvertError, Source
from checkpoints_convert.table import Rule
from checkpoints_convert.transforms import head_norm, linear, qkv, stacked


def llama_blocks(prefix: str, block: BlockConfig) -> Sequence[Rule]:
    """Hugging Face's names of Llama's layers, and of Chameleon's; the `{}`-th is `blocks.{}`."""
    layer, heads, kv_heads = f"{prefix}.{{}}", block.heads, block.kv_heads
    return (
        Rule(f"{layer}.input_layernorm.weight", "blocks.{}.attention_norm.scale"),
        Rule(
            tuple(f"{layer}.self_attn.{x}_proj.weight" for x in "qkv"),
            "blocks.{}.attention.qkv.kernel",
            qkv(heads, kv_heads),
        ),
        *(
            Rule(f"{layer}.self_attn.{x[0]}_norm.{theirs}", f"blocks.{{}}.attention.{x}_norm.{ours}", head_norm(own))
            for x, own in (("query", heads), ("key", kv_heads))
            for theirs, ours in (("weight", "scale"), ("bias", "bias"))
        ),
        Rule(f"{layer}.self_attn.o_proj.weight", "blocks.{}.attention.out.kernel", linear),
        Rule(f"{layer}.post_attention_layernorm.weight", "blocks.{}.ffn_norm.scale"),
        Rule((f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"), "blocks.{}.ffn.gate_up.kernel", stacked),
        Rule(f"{layer}.mlp.down_proj.weight", "blocks.{}.ffn.down.kernel", linear),
    )


def _eagle1(config: EagleConfig) -> Sequence[Rule]:
    return (
        Rule("embed_tokens.weight", "embedding"),
        Rule("fc.weight", "fc.kernel", linear),
        Rule("fc.bias", "fc.bias"),
        *llama_blocks("layers", config.block),
    )


def _configure(source: Source, known: Known) -> EagleConfig:
    target = known.parts.get("target")
    if target is None:
        raise ConvertError(f"{source.path} is a drafter, and a drafter needs its target: convert or merge it with one")
    settings, dim = source.settings, source.shape("fc.weight")[0]
    if dim != target.dim:
        raise ConvertError(f"the drafter {source.path} has width {dim}, and the target {target.dim}")
    heads = settings.get("num_attention_heads") or target.block.heads
    head_dim = dim // heads
    image = isinstance(target, LlamaGenConfig)
    return EagleConfig(
        block=BlockConfig(
            dim,
            heads,
            settings.get("num_key_value_heads") or source.shape("layers.0.self_attn.k_proj.weight")[0] // head_dim,
            head_dim,
            source.shape("layers.0.mlp.gate_proj.weight")[0],
            norm_eps=settings.get("rms_norm_eps", 1e-6),
            rope="interleaved" if image else "half",
            input_norm="layers.0.input_layernorm.weight" in source.tensors,
            qk_norm="layers.0.self_attn.q_norm.weight" in source.tensors,
        ),
        layers=1 + max(int(m[1]) for name in source.tensors if (m := re.match(r"layers\.(\d+)\.", name))),
        grid=target.grid if image else None,
        condition_slots=target.condition_tokens - 1 if image else 0,
        rope_base=float(settings.get("rope_theta", 10000)),
        vocab_size=source.shape("embed_tokens.weight")[0],
    )


EAGLE1 = Format(
    "EAGLE-1",
    "drafter",
    ("fc.weight", "embed_tokens.weight", "layers.0.self_attn.q_proj.weight"),
    _configure,
    _eagle1,
    skip=("layers.{}.self_attn.rotary_emb.**", CODES),  # constants; the target's vocabulary
)
