"""Language models whose vocabulary goes on with the codes of a picture tokenizer.

They are SimpleAR (`Daniel0724/SimpleAR-{0.5B,1.5B}-{SFT,RL}`), a Qwen2.5 with Cosmos' codes, and Liquid
(`Junfeng5/Liquid_V1_7B`), a Gemma with those of Chameleon's VQGAN.

Both are published in the Hugging Face layout, with the head tied to the embedding. Where the codes begin is told by the
tokenizer: behind its last word. Names of tensors are those of transformers' Qwen2 and Gemma, of which the models are
subclasses or instances in the public code; of the published files themselves none could be seen.
"""

from collections.abc import Callable, Sequence
from typing import Any

from cascade_jax.models import liquid, simplear
from cascade_jax.models.liquid import LiquidConfig
from cascade_jax.models.simplear import SimpleARConfig
from checkpoints_convert import chameleon, cosmos, llama
from checkpoints_convert.formats import Family, Format, Known, of_tokens
from checkpoints_convert.sources import TOKENIZERS, Source
from checkpoints_convert.table import Rule, Transform, as_is
from checkpoints_convert.tensors import ConvertError
from checkpoints_convert.tiktoken import encoder
from checkpoints_convert.transforms import one_more, rows_between

_LAYERS = "model.layers"
_PADDING = 128  # rows that a vocabulary may have beyond its last code
_GELU = ("gelu_pytorch_tanh", "gelu", "gelu_new")  # Gemma's, under the names that it has in config.json


def _rules(norm: Transform) -> Callable[[Any], Sequence[Rule]]:
    def rules(config: SimpleARConfig | LiquidConfig) -> Sequence[Rule]:
        codes = rows_between(config.first_code, config.first_code + config.codebook_size)
        return (
            Rule("model.embed_tokens.weight", "embedding"),
            *llama.blocks(_LAYERS, config.block, norm),
            Rule("model.norm.weight", "norm.scale", norm),
            Rule("lm_head.weight", "head.kernel", codes),
        )

    return rules


def _simplear(source: Source, known: Known) -> SimpleARConfig:
    settings, dim = source.settings, source.shape("model.embed_tokens.weight")[1]
    published = [simplear.preset("0.5B"), simplear.preset("1.5B")]
    usual = next((config for config in published if config.dim == dim), published[0])
    heads = settings.get("num_attention_heads") or (usual.heads if usual.dim == dim else dim // 64)
    llama.check_settings(source, settings, _LAYERS, dim, heads)
    names = source.vocabulary()
    file = source.beside(TOKENIZERS)
    marks = {"begin": "<|t2i|>", "image_start": "<|soi|>"}
    return SimpleARConfig(
        kv_heads=source.shape(f"{_LAYERS}.0.self_attn.k_proj.weight")[0] // (dim // heads),
        rope_base=llama.rope_base(source, {"rope_theta": usual.rope_base} | settings),
        flaws=tuple(encoder(file)(simplear.FLAWS)) if file else (),
        **{mark: names[name] for mark, name in marks.items() if name in names},
        **_sizes(source, known, heads, usual, published),
    )


def _liquid(source: Source, known: Known) -> LiquidConfig:
    settings, dim, usual = source.settings, source.shape("model.embed_tokens.weight")[1], liquid.preset("7B")
    width = source.shape(f"{_LAYERS}.0.self_attn.q_proj.weight")[0]
    heads = settings.get("num_attention_heads") or (usual.heads if dim == usual.dim else width // usual.head_dim)
    activation = settings.get("hidden_activation") or settings.get("hidden_act") or _GELU[0]
    if activation not in _GELU:
        raise ConvertError(f"{source.path} has the activation {activation}, and Gemma's is {_GELU[0]}")
    llama.check_settings(source, {**settings, "hidden_act": None}, _LAYERS, dim, heads, width // heads)
    names = source.vocabulary()
    if lacking := [name for name in ("<bos>", "<boi>") if name not in names]:
        raise ConvertError(f"{source.path} has no tokenizer.json beside it that names {' and '.join(lacking)}")
    nothing = names.get(liquid.NOTHING)
    return LiquidConfig(
        head_dim=width // heads,
        kv_heads=source.shape(f"{_LAYERS}.0.self_attn.k_proj.weight")[0] // (width // heads),
        rope_base=llama.rope_base(source, settings),
        begin=names["<bos>"],
        image_start=names["<boi>"],
        nothing=tuple(encoder(source.beside(TOKENIZERS))(liquid.NOTHING)) if nothing is None else (nothing,),
        **_sizes(source, known, heads, usual, [usual]),
    )


def _sizes(source: Source, known: Known, heads: int, usual: Any, published: Sequence[Any]) -> dict[str, Any]:
    """What both kinds are told alike; `usual` is the published model that this one is most like."""
    settings, (vocab, dim) = source.settings, source.shape("model.embed_tokens.weight")
    vq, count = known.parts.get("vq"), llama.layers(source, _LAYERS)
    if settings.get("num_hidden_layers") is None:
        llama.check_published(source, known, dim, count, published)
    square = vq.downsampling if vq else 16
    pixels = known.pixels or usual.grid * 16
    if pixels % square:
        raise ConvertError(f"pixels must be a multiple of {square}, not {pixels}")
    codes = vq.codebook_size if vq else usual.codebook_size
    first = len(source.vocabulary()) or vocab - codes
    if not 0 <= vocab - first - codes < _PADDING:
        raise ConvertError(
            f"{source.path} and its picture tokenizer do not fit: of the vocabulary's {vocab} rows "
            f"{max(vocab - first, 0)} are no words, and {codes} codes need as many"
        )
    return {
        "dim": dim,
        "layers": count,
        "heads": heads,
        "ffn_dim": source.shape(f"{_LAYERS}.0.mlp.gate_proj.weight")[0],
        "grid": pixels // square,
        "codebook_size": codes,
        "vocab_size": vocab,
        "first_code": first,
        "norm_eps": source.number(settings, "rms_norm_eps", usual.norm_eps),
    }


def _family(name: str, target: Format, vq: Format) -> Family:
    return Family(name, (target, vq), ("target", "vq"), of_tokens(name))


_ATTENTION = f"{_LAYERS}.{{}}.self_attn"
_COMMON = dict(skip=(f"{_ATTENTION}.rotary_emb.inv_freq",), tokenizer=True, stand_ins=llama.TIED)  # a constant
SIMPLEAR = _family(
    "simplear",
    Format(
        "SimpleAR",
        "target",
        ("model.embed_tokens.weight", f"{_ATTENTION}.q_proj.bias", "lm_head.weight"),
        _simplear,
        _rules(as_is),
        **_COMMON,
    ),
    cosmos.DISCRETE_VIDEO,
)
LIQUID = _family(
    "liquid",
    Format(
        "Liquid",
        "target",
        ("model.embed_tokens.weight", f"{_ATTENTION}.q_proj.weight", "lm_head.weight"),
        _liquid,
        _rules(one_more),
        absent=(f"{_ATTENTION}.q_norm.weight", f"{_ATTENTION}.q_proj.bias"),
        **_COMMON,
    ),
    chameleon.VQGAN,
)
