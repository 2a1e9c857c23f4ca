"""Drafters: EAGLE-1's (`jadohu/llamagen_drafter` and its like: `config.json`, `pytorch_model.bin`) and EAGLE-3's."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cascade_jax.drafters.eagle import EagleConfig
from cascade_jax.drafters.eagle3 import Eagle3Config, layers_read
from cascade_jax.models.chameleon import ChameleonConfig
from cascade_jax.models.llamagen import LlamaGenConfig
from cascade_jax.models.transformer import BlockConfig
from checkpoints_convert import llama
from checkpoints_convert.formats import Format, Known, StandIn
from checkpoints_convert.sources import CODES, Source
from checkpoints_convert.table import Rule
from checkpoints_convert.tensors import ConvertError, Tensor
from checkpoints_convert.transforms import integers, linear, qkv, stacked


def _eagle1(config: EagleConfig) -> Sequence[Rule]:
    return (
        Rule("embed_tokens.weight", "embedding"),
        Rule("fc.weight", "fc.kernel", linear),
        Rule("fc.bias", "fc.bias"),
        *llama.blocks("layers", config.block),
    )


def _target(source: Source, known: Known) -> Any:
    """The target's sizes, if the drafter may be one for it.

    Raises:
      ConvertError: if there is no target, or the drafter's settings name another kind.
    """
    target, settings = known.parts.get("target"), source.settings
    if target is None:
        raise ConvertError(f"{source.path} is a drafter, and a drafter needs its target: convert or merge it with one")
    if settings.get("model_type") == "chameleon" and not isinstance(target, ChameleonConfig):
        raise ConvertError(f"{source.path} is a drafter for Chameleon by config.json, and the target is no Chameleon")
    if (theirs := settings.get("input_type")) and theirs != (ours := _input_type(target)):
        raise ConvertError(
            f"{source.path} is a drafter for {theirs} by config.json's input_type, and the target is "
            f"{ours or 'no LlamaGen'}"
        )
    return target


def _input_type(target: Any) -> str | None:
    """What LANTERN calls a LlamaGen: c2i draws classes, t2i captions at 256 pixels, t2i2 at 512."""
    if not isinstance(target, LlamaGenConfig):
        return None
    return "c2i" if target.classes is not None else "t2i2" if target.image_tokens >= 1024 else "t2i"


def _table(source: Source, known: Known, target: Any) -> int | None:
    """Rows of the drafter's own embedding, of which the target may read every one; None without.

    Raises:
      ConvertError: if there are too few.
    """
    if "embed_tokens.weight" not in source.tensors:
        return None
    rows = source.shape("embed_tokens.weight")[0]
    need = target.table_rows
    if rows < need:
        raise ConvertError(f"the drafter {source.path} has an embedding of {rows} tokens, and the target has {need}")
    if rows > need:
        known.say(f"warning: {source.path} has an embedding of {rows} rows: the first {need} are the target's tokens")
    return rows


def _configure(source: Source, known: Known) -> EagleConfig:
    target = _target(source, known)
    settings, dim = source.settings, source.shape("fc.weight")[0]
    if dim != target.dim:
        raise ConvertError(f"the drafter {source.path} has width {dim}, and the target {target.dim}")
    heads = settings.get("num_attention_heads") or target.block.heads
    head_dim, count = dim // heads, llama.layers(source, "layers")
    llama.check_settings(source, settings, "layers", dim, heads)
    normed = [f"layers.{i}.input_layernorm.weight" in source.tensors for i in range(count)]
    return EagleConfig(
        block=BlockConfig(
            dim,
            heads,
            settings.get("num_key_value_heads") or source.shape("layers.0.self_attn.k_proj.weight")[0] // head_dim,
            head_dim,
            source.shape("layers.0.mlp.gate_proj.weight")[0],
            norm_eps=source.number(settings, "rms_norm_eps", 1e-6),
            rope=target.block.rope,
            input_norm=any(normed),
            qk_norm="layers.0.self_attn.q_norm.weight" in source.tensors,
        ),
        layers=count,
        **target.picture_places,
        rope_base=llama.rope_base(source, settings),
        vocab_size=_table(source, known, target),
        bare_first=any(normed) and not normed[0],
    )


def _no_bias(weight: Tensor) -> Tensor:
    """A bias that adds nothing, for a linear map [out, in]."""
    return Tensor(weight.shape[:1], weight.dtype, lambda: np.zeros(weight.shape[:1], weight.dtype))


EAGLE1 = Format(
    "EAGLE-1",
    "drafter",
    ("fc.weight", "layers.0.self_attn.q_proj.weight"),
    _configure,
    _eagle1,
    skip=("layers.{}.self_attn.rotary_emb.**", CODES),  # constants; the target's vocabulary
    stand_ins=(StandIn("fc.bias", ("fc.weight",), unless=("bias", True), make=_no_bias),),
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
    target = _target(source, known)
    settings, (dim, fused) = source.settings, source.shape("fc.weight")
    if fused != 3 * target.dim:
        raise ConvertError(
            f"the drafter {source.path} reads features of width {fused // 3}, the target's are {target.dim}"
        )
    rows = _table(source, known, target)
    if rows is None and dim != target.dim:
        raise ConvertError(
            f"the drafter {source.path} has width {dim} and no embedding of its own, and the target's has width "
            f"{target.dim}"
        )
    heads = settings.get("num_attention_heads") or target.block.heads
    head_dim = source.shape("midlayer.self_attn.q_proj.weight")[0] // heads
    ffn_dim = source.shape("midlayer.mlp.gate_proj.weight")[0]
    source.check_settings(settings, num_hidden_layers=1, hidden_size=dim, intermediate_size=ffn_dim, head_dim=head_dim)
    llama.check_kind(source, settings)
    vocab = source.shape("t2d")[0] if "t2d" in source.tensors else target.vocab_size
    if vocab != target.vocab_size:
        raise ConvertError(
            f"the drafter {source.path} is one for {vocab} tokens, and the target has {target.vocab_size}"
        )
    config = Eagle3Config(
        block=BlockConfig(
            dim,
            heads,
            source.shape("midlayer.self_attn.k_proj.weight")[0] // head_dim,
            head_dim,
            ffn_dim,
            norm_eps=source.number(settings, "rms_norm_eps", 1e-6),
            rope="half",
        ),
        draft_vocab=source.shape("lm_head.weight")[0],
        vocab_size=vocab,
        target_dim=target.dim,
        taps=layers_read(target.layers),
        rope_base=llama.rope_base(source, settings),
        own_embedding=rows is not None,
    )
    _check_drafts(source, config)
    return config


def _check_drafts(source: Source, config: Eagle3Config) -> None:
    """Raises a ConvertError if `d2t` does not give every token that the head draws one of the target's."""
    offsets = source.tensors.get("d2t")
    if offsets is None or offsets.fault or offsets.shape != (config.draft_vocab,):
        return  # said with everything else that is missing or misshapen
    drawn = np.arange(config.draft_vocab) + offsets.read()
    if drawn.min() < 0 or drawn.max() >= config.vocab_size or len(np.unique(drawn)) != len(drawn):
        raise ConvertError(
            f"{source.path} is damaged: its d2t does not lead to {len(drawn)} of {config.vocab_size} tokens"
        )
    if config.draft_vocab == config.vocab_size and offsets.read().any():
        raise ConvertError(f"{source.path} draws every token, but by its d2t in another order than the target's")


EAGLE3 = Format(
    "EAGLE-3",
    "drafter",
    ("fc.weight", "midlayer.self_attn.q_proj.weight", "midlayer.hidden_norm.weight", "lm_head.weight"),
    _configure3,
    _eagle3,
    # the inverse of d2t; d2t of a head that draws every token; a constant
    skip=("t2d", "d2t", "midlayer.self_attn.rotary_emb.inv_freq"),
)
