"""LlamaGen (https://github.com/FoundationVision/LlamaGen) as its authors publish it, and in the Hugging Face layout of
`jadohu/LlamaGen-T2I`; its VQ tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any

from cascade_jax import bundle
from cascade_jax.models.llamagen import LlamaGenConfig, preset
from cascade_jax.models.vq import VQConfig
from checkpoints_convert import eagle, folders, llama, t5, vqgan
from checkpoints_convert.formats import Family, Format, Known
from checkpoints_convert.sources import Source
from checkpoints_convert.table import Rule
from checkpoints_convert.tensors import ConvertError
from checkpoints_convert.transforms import linear, qkv, stacked

_HEADS = {3200: 32, 4096: 32}  # 3B and 7B; all smaller models have heads of 64
_SIZES = ("B", "L", "XL", "XXL", "XXXL", "1B", "3B", "7B")


def _original(config: LlamaGenConfig) -> Sequence[Rule]:
    heads = config.block
    return (
        *_conditions("cls_embedding"),
        Rule("tok_embeddings.weight", "embedding"),
        Rule("layers.{}.attention_norm.weight", "blocks.{}.attention_norm.scale"),
        Rule("layers.{}.attention.wqkv.weight", "blocks.{}.attention.qkv.kernel", qkv(heads.heads, heads.kv_heads)),
        Rule("layers.{}.attention.wo.weight", "blocks.{}.attention.out.kernel", linear),
        Rule("layers.{}.ffn_norm.weight", "blocks.{}.ffn_norm.scale"),
        Rule(
            ("layers.{}.feed_forward.w1.weight", "layers.{}.feed_forward.w3.weight"),
            "blocks.{}.ffn.gate_up.kernel",
            stacked,
        ),
        Rule("layers.{}.feed_forward.w2.weight", "blocks.{}.ffn.down.kernel", linear),
        Rule("norm.weight", "norm.scale"),
        Rule("output.weight", "head.kernel", linear),
    )


def _hugging_face(config: LlamaGenConfig) -> Sequence[Rule]:
    return (
        *_conditions("model.cls_embedding"),
        Rule("model.embed_tokens.weight", "embedding"),
        *llama.blocks("model.layers", config.block),
        Rule("model.norm.weight", "norm.scale"),
        Rule("lm_head.weight", "head.kernel", linear),
    )


def _conditions(prefix: str) -> Sequence[Rule]:
    """The caption embedder, or the table of classes, whose last row is the unconditional one."""
    return (
        Rule(f"{prefix}.uncond_embedding", "caption.unconditional"),
        Rule(f"{prefix}.cap_proj.fc1.weight", "caption.fc1.kernel", linear),
        Rule(f"{prefix}.cap_proj.fc2.weight", "caption.fc2.kernel", linear),
        Rule(f"{prefix}.embedding_table.weight", "label"),
    )


def _configure_original(source: Source, known: Known) -> LlamaGenConfig:
    vocab, dim = source.shape("tok_embeddings.weight")
    heads = _HEADS.get(dim, dim // 64)
    if not heads or dim % heads:
        raise ConvertError(f"{source.path} has width {dim}, which is no LlamaGen's")
    sizes = _condition_sizes(source, "cls_embedding")
    _check_vq(source, known, "c2i" if "classes" in sizes else "t2i")
    return LlamaGenConfig(
        dim,
        _layers(source, known, dim, "layers"),
        heads,
        image_tokens=_image_tokens(source, known),
        vocab_size=vocab,
        **sizes,
    )


def _configure_hugging_face(source: Source, known: Known) -> LlamaGenConfig:
    vocab, dim = source.shape("model.embed_tokens.weight")
    settings = source.settings
    heads = settings.get("num_attention_heads") or _HEADS.get(dim, max(dim // 64, 1))
    kv_heads = settings.get("num_key_value_heads") or heads
    sizes = _condition_sizes(source, "model.cls_embedding")
    _check_vq(source, known, "c2i" if "classes" in sizes else "t2i")
    llama.check_settings(source, settings, "model.layers", dim, heads)
    source.check_settings(settings, cls_token_num=sizes["condition_tokens"], caption_dim=sizes.get("caption_dim"))
    stated = settings.get("num_hidden_layers")
    return LlamaGenConfig(
        dim,
        stated or _layers(source, known, dim, "model.layers"),
        heads,
        image_tokens=_image_tokens(source, known, settings.get("block_size")),
        vocab_size=vocab,
        kv_heads=None if kv_heads == heads else kv_heads,
        norm_eps=source.number(settings, "rms_norm_eps", 1e-5),
        rope_base=source.number(settings, "rope_base", 10000),
        **sizes,
    )


def _condition_sizes(source: Source, prefix: str) -> dict[str, int]:
    if (table := f"{prefix}.embedding_table.weight") in source.tensors:
        return {"classes": source.shape(table)[0] - 1, "condition_tokens": 1}
    slots, width = source.shape(f"{prefix}.uncond_embedding")
    return {"condition_tokens": slots, "caption_dim": width}


def _check_vq(source: Source, known: Known, kind: str) -> None:
    """Warns of the picture tokenizer of the other kind of models, which has as many codes: only its name tells."""
    other = "t2i" if kind == "c2i" else "c2i"
    if (path := known.paths.get("vq")) and other in path.stem.lower().split("_"):
        known.say(f"warning: {source.path} is a {kind} model, and {path} is named for {other} models")


def _layers(source: Source, known: Known, dim: int, prefix: str) -> int:
    count = llama.layers(source, prefix)
    llama.check_published(source, known, dim, count, map(preset, _SIZES))
    return count


def _image_tokens(source: Source, known: Known, told: int | None = None) -> int:
    """Tokens of a picture, which config.json tells. The original files do not hold the picture's size, but their names
    do: t2i_XL_stage1_256.pt, c2i_B_384.pt."""
    square = known.parts["vq"].downsampling if "vq" in known.parts else 16
    named = folders.number_in_name(source.path, (256, 384, 512)) if told is None else None
    pixels = known.pixels or named
    if isinstance(told, int) and pixels is None:
        return told
    if pixels is None:
        raise ConvertError(f"{source.path.name} does not say how large its pictures are: give --pixels 256, 384 or 512")
    if pixels % square:
        raise ConvertError(f"pixels must be a multiple of {square}, not {pixels}")
    if told is not None and (pixels // square) ** 2 != told:
        raise ConvertError(
            f"{source.path}: config.json's block_size says {told} codes a picture, and {pixels} pixels are "
            f"{(pixels // square) ** 2} codes"
        )
    if named not in (None, pixels):
        known.say(f"warning: {source.path} draws {named} pixels a side by its name, and it is told to draw {pixels}")
    return (pixels // square) ** 2


def _configure_vq(source: Source, known: Known) -> VQConfig:
    del known
    return vqgan.configure(source, "", down="conv_blocks", block="res", l2_norm=True)


def _assemble(parts: Mapping[str, Any]) -> bundle.Config:
    target, vq = parts["target"], parts["vq"]
    if target.vocab_size != vq.codebook_size:
        raise ConvertError(f"the model draws {target.vocab_size} codes and the VQ has {vq.codebook_size}")
    if "text" in parts and target.classes is not None:
        raise ConvertError("the model draws classes and reads no captions: leave T5 out")
    text = "class" if target.classes is not None else "t5" if "text" in parts else None
    if "text" in parts and parts["text"].dim != target.caption_dim:
        raise ConvertError(f"the model reads captions of width {target.caption_dim}, and T5's is {parts['text'].dim}")
    # CASCADE's settings (its appendix); for classes, which it does not draw, LlamaGen's own guidance (sample_c2i.py).
    sampling = {"temperature": 1.0, "top_k": 2000, "top_p": 1.0, "guidance": 4.0 if text == "class" else 3.0}
    return bundle.Config(
        family="llamagen",
        target=target,
        drafter=parts.get("drafter"),
        vq=vq,
        text=text,
        encoder=parts.get("text"),
        sampling=sampling,
        cascade={"tau_pos": 0.85, "tau_seq": 0.5},
    )


ORIGINAL = Format(
    "LlamaGen",
    "target",
    ("tok_embeddings.weight", "layers.{}.attention.wqkv.weight", "cls_embedding.**"),
    _configure_original,
    _original,
    skip=("freqs_cis", "causal_mask", "layers.{}.attention.kv_cache.**"),  # constants and leftovers of inference
)
HUGGING_FACE = Format(
    "LlamaGen, Hugging Face layout",
    "target",
    ("model.embed_tokens.weight", "model.cls_embedding.**", "lm_head.weight"),
    _configure_hugging_face,
    _hugging_face,
    skip=("model.layers.{}.self_attn.rotary_emb.inv_freq",),  # a constant, and of another rotary embedding
    stand_ins=llama.TIED,
)
VQ = Format(
    "LlamaGen's VQ",
    "vq",
    ("quantize.embedding.weight", "encoder.conv_blocks.{}.res.{}.conv1.weight", "decoder.conv_in.weight"),
    _configure_vq,
    lambda config: vqgan.own_names(),
    skip=("quantize.codebook_used",),  # statistics of training
)
FAMILY = Family(
    "llamagen", (ORIGINAL, HUGGING_FACE, VQ, eagle.EAGLE1, eagle.EAGLE3, t5.ENCODER), ("target", "vq"), _assemble
)
