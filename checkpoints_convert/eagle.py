"""Drafters: EAGLE-1's (`jadohu/llamagen_drafter` and its like: `config.json`, `pytorch_model.bin`) and EAGLE-3's."""

import re
from collections.abc import Sequence

from cascade_jax.drafters.eagle import EagleConfig
from cascade_jax.drafters.eagle3 import Eagle3Config, layers_read
from cascade_jax.models.llamagen import LlamaGenConfig
from cascade_jax.models.transformer import BlockConfig
from checkpoints_convert.formats import Format, Known
from checkpoints_convert.sources import CODES, ConvertError, Source
from checkpoints_convert.table import Rule
from checkpoints_convert.transforms import head_norm, integers, linear, qkv, stacked


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
            if block.qk_norm
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
        vocab_size=source.shape("embed_tokens.weight")[0] if "embed_tokens.weight" in source.tensors else None,
    )


EAGLE1 = Format(
    "EAGLE-1",
    "drafter",
    ("fc.weight", "layers.0.self_attn.q_proj.weight"),
    _configure,
    _eagle1,
    skip=("layers.{}.self_attn.rotary_emb.**", CODES),  # constants; the target's vocabulary
)


def _eagle3(config: Eagle3Config) -> Sequence[Rule]:
    block = config.block
    return (
        Rule("embed_tokens.weight", "embedding"),
        Rule("fc.weight", "fc.kernel", linear),
        Rule("midlayer.input_layernorm.weight", "embedding_norm.scale"),
        Rule("midlayer.hidden_norm.weight", "feature_norm.scale"),
        Rule(
            tuple(f"midlayer.self_attn.{x}_proj.weight" for x in "qkv"),
            "attention.qkv.kernel",
            qkv(block.heads, block.kv_heads),
        ),
        Rule("midlayer.self_attn.o_proj.weight", "attention.out.kernel", linear),
        Rule("midlayer.post_attention_layernorm.weight", "ffn_norm.scale"),
        Rule(("midlayer.mlp.gate_proj.weight", "midlayer.mlp.up_proj.weight"), "ffn.gate_up.kernel", stacked),
        Rule("midlayer.mlp.down_proj.weight", "ffn.down.kernel", linear),
        Rule("norm.weight", "norm.scale"),
        Rule("lm_head.weight", "head.kernel", linear),
        Rule("d2t", "offsets", integers),
    )


def _configure3(source: Source, known: Known) -> Eagle3Config:
    target = known.parts.get("target")
    if target is None:
        raise ConvertError(f"{source.path} is a drafter, and a drafter needs its target: convert or merge it with one")
    settings, (dim, fused) = source.settings, source.shape("fc.weight")
    if fused != 3 * target.dim:
        raise ConvertError(
            f"the drafter {source.path} reads features of width {fused // 3}, the target's are {target.dim}"
        )
    heads = settings.get("num_attention_heads") or target.block.heads
    head_dim = source.shape("midlayer.self_attn.q_proj.weight")[0] // heads
    return Eagle3Config(
        block=BlockConfig(
            dim,
            heads,
            source.shape("midlayer.self_attn.k_proj.weight")[0] // head_dim,
            head_dim,
            source.shape("midlayer.mlp.gate_proj.weight")[0],
            norm_eps=settings.get("rms_norm_eps", 1e-6),
            rope="half",
        ),
        draft_vocab=source.shape("lm_head.weight")[0],
        vocab_size=source.shape("t2d")[0] if "t2d" in source.tensors else target.vocab_size,
        target_dim=target.dim,
        taps=layers_read(target.layers),
        rope_base=float(settings.get("rope_theta", 10000)),
        own_embedding="embed_tokens.weight" in source.tensors,
    )


EAGLE3 = Format(
    "EAGLE-3",
    "drafter",
    ("fc.weight", "midlayer.self_attn.q_proj.weight", "midlayer.hidden_norm.weight", "lm_head.weight", "d2t"),
    _configure3,
    _eagle3,
    # the inverse of d2t; d2t of a head that draws every token; a constant
    skip=("t2d", "d2t", "midlayer.self_attn.rotary_emb.inv_freq"),
)
