"""Emu3-Gen as its authors publish it and in the Hugging Face layout, and Emu3.5-Image, each with its picture tokenizer.

The first are `BAAI/Emu3-Gen` with `BAAI/Emu3-VisionTokenizer`, and `Emu3-community/Emu3-Gen-hf`, which holds both; the
last is `BAAI/Emu3.5-Image` with `BAAI/Emu3.5-VisionTokenizer`, and with the text tokenizer of github.com/baaivision/
Emu3.5. Names of tensors and files are those of the public code; of the published files themselves none could be seen.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cascade_jax.models.emu3 import Emu3Config, preset
from cascade_jax.models.vq import VQConfig
from checkpoints_convert import eagle, llama, movq, vqgan
from checkpoints_convert.formats import Family, Format, Known, of_tokens
from checkpoints_convert.sources import TIKTOKEN, TOKENIZERS, Source
from checkpoints_convert.table import Rule
from checkpoints_convert.tensors import ConvertError
from checkpoints_convert.tiktoken import encoder
from checkpoints_convert.transforms import rows_between

_PUBLISHED = {"emu3": preset("emu3-gen-8b"), "emu3.5": preset("emu3.5-image-34b")}
_CODE = "<|visual token {:06d}|>"
_MARKS = {
    "begin": "<|extra_203|>",
    "turn": "<|extra_100|>",
    "image_start": "<|image start|>",
    "image": "<|image token|>",
    "image_end": "<|image end|>",
    "newline": "<|extra_200|>",
    "zero": "0",
    "times": "*",
}
_SETTINGS = {  # where the authors' config.json has the same
    "begin": "bos_token_id",
    "image_start": "boi_token_id",
    "image": "img_token_id",
    "image_end": "eoi_token_id",
    "newline": "eol_token_id",
}


def _rules(prefix: str, head: str = "lm_head.weight") -> Callable[[Emu3Config], Sequence[Rule]]:
    def rules(config: Emu3Config) -> Sequence[Rule]:
        codes = rows_between(config.first_code, config.first_code + config.codebook_size)
        return (
            Rule(f"{prefix}.embed_tokens.weight", "embedding"),
            *llama.blocks(f"{prefix}.layers", config.block),
            Rule(f"{prefix}.norm.weight", "norm.scale"),
            Rule(head, "head.kernel", codes),
        )

    return rules


def _configure(style: str, prefix: str, settings_of: str | None = None) -> Callable[[Source, Known], Emu3Config]:
    published = _PUBLISHED[style]

    def configure(source: Source, known: Known) -> Emu3Config:
        settings = source.settings if settings_of is None else source.settings.get(settings_of) or {}
        vocab, dim = source.shape(f"{prefix}.embed_tokens.weight")
        width = source.shape(f"{prefix}.layers.0.self_attn.q_proj.weight")[0]
        heads = settings.get("num_attention_heads") or (published.heads if dim == published.dim else width // 128)
        head_dim = width // heads
        count = llama.layers(source, f"{prefix}.layers")
        llama.check_settings(source, settings, f"{prefix}.layers", dim, heads, head_dim)
        if settings.get("num_hidden_layers") is None:
            llama.check_published(source, known, dim, count, _PUBLISHED.values())
        base = llama.rope_base(source, {"rope_theta": published.rope_base} | settings)
        config = Emu3Config(
            dim=dim,
            layers=count,
            heads=heads,
            kv_heads=source.shape(f"{prefix}.layers.0.self_attn.k_proj.weight")[0] // head_dim,
            head_dim=head_dim,
            ffn_dim=source.shape(f"{prefix}.layers.0.mlp.gate_proj.weight")[0],
            style=style,
            vocab_size=vocab,
            norm_eps=source.number(settings, "rms_norm_eps", published.norm_eps),
            rope_base=base,
            qk_norm=published.qk_norm,
            **_size(style, source, settings, known),
            **_marks(source, settings, known, vocab, published),
        )
        file = source.beside(TOKENIZERS) or source.beside(TIKTOKEN)
        return replace(config, unguided=config.unconditional(encoder(file)) if file else (config.begin,))

    return configure


def _size(style: str, source: Source, settings: Mapping[str, Any], known: Known) -> dict[str, int]:
    """Codes a side, of square pictures. Emu3's config.json states their area; Emu3.5's script does."""
    published = _PUBLISHED[style]
    square = known.parts["vq"].downsampling if "vq" in known.parts else 8 if style == "emu3" else 16
    area = settings.get("image_area") if style == "emu3" else None
    pixels = known.pixels or (math.isqrt(area) if isinstance(area, int) and area > 0 else published.rows * square)
    if pixels % square:
        raise ConvertError(f"pixels must be a multiple of {square}, not {pixels}")
    return {"rows": pixels // square, "columns": pixels // square}


def _marks(source: Source, settings, known: Known, vocab: int, published: Emu3Config) -> dict[str, int]:
    """Text tokens by their names, or by config.json, or else as they are published; and where the codes are."""
    names = source.vocabulary()
    found = {mark: names[name] for mark, name in _MARKS.items() if name in names}
    stated = {mark: settings[name] for mark, name in _SETTINGS.items() if isinstance(settings.get(name), int)}
    if _CODE.format(0) not in names:  # the codes are the vocabulary's last part
        codes = known.parts["vq"].codebook_size if "vq" in known.parts else published.codebook_size
        return stated | found | {"first_code": vocab - codes, "codebook_size": codes}
    first, codes = names[_CODE.format(0)], sum(name.startswith("<|visual token ") for name in names)
    last = names.get(_CODE.format(codes - 1))
    if last != first + codes - 1 or names.get("9", 9) - names.get("0", 0) != 9:
        raise ConvertError(f"{source.path}: the vocabulary does not number its {codes} codes and its digits in order")
    if last >= vocab:
        raise ConvertError(
            f"{source.path} lacks picture tokens: its head has {vocab} rows, and the codes are {first} to {last}"
        )
    return stated | found | {"first_code": first, "codebook_size": codes}


def _configure_ibq(source: Source, known: Known) -> VQConfig:
    del known
    return vqgan.configure(source, "", down="down", block="block", l2_norm=False, by_product=True)


_LAYER = "model.layers.{}.self_attn"
_CONSTANTS = (f"{_LAYER}.rotary_emb.inv_freq",)
_IN_ORDER = dict(skip=_CONSTANTS, tokenizer=True)
ORIGINAL = Format(
    "Emu3",
    "target",
    ("model.embed_tokens.weight", f"{_LAYER}.q_proj.weight", "lm_head.weight"),
    _configure("emu3", "model"),
    _rules("model"),
    absent=(f"{_LAYER}.q_norm.weight", f"{_LAYER}.q_proj.bias"),
    **_IN_ORDER,
)
HUGGING_FACE = Format(
    "Emu3, Hugging Face layout",
    "target",
    ("text_model.model.embed_tokens.weight", "text_model.lm_head.weight"),
    _configure("emu3", "text_model.model", "text_config"),
    _rules("text_model.model", "text_model.lm_head.weight"),
    skip=("vqmodel.**",),  # the other part
    tokenizer=True,
)
EMU35_MODEL = Format(
    "Emu3.5",
    "target",
    ("model.embed_tokens.weight", f"{_LAYER}.q_norm.weight", "lm_head.weight"),
    _configure("emu3.5", "model"),
    _rules("model"),
    absent=(f"{_LAYER}.q_norm.bias",),  # Chameleon
    **_IN_ORDER,
)
IBQ = Format(
    "Emu3.5's vision tokenizer",
    "vq",
    ("quantize.embedding.weight", "encoder.down.{}.block.{}.conv1.weight", "decoder.conv_in.weight"),
    _configure_ibq,
    lambda config: vqgan.taming_names(config, finest_first=True),
    skip=("loss.**",),  # what it was trained against
    absent=("decoder.norm_out.norm_layer.weight",),  # MoVQ
)
EMU3 = Family(
    "emu3",
    (ORIGINAL, HUGGING_FACE, movq.EMU3, movq.EMU3_HUGGING_FACE, eagle.EAGLE1),
    ("target", "vq"),
    of_tokens("emu3"),
)
EMU35 = Family("emu3.5", (EMU35_MODEL, IBQ, eagle.EAGLE1), ("target", "vq"), of_tokens("emu3"), architecture="emu3")
