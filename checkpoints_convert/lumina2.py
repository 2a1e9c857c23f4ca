"""Lumina-mGPT 2.0 in the Hugging Face layout, with MoVQGAN's `movqgan_270M.ckpt`.

The model is `Alpha-VLLM/Lumina-mGPT-2.0`, whose files could not be seen. What is read here is what the public code
(github.com/Alpha-VLLM/Lumina-mGPT-2.0) writes and reads: Chameleon's tensors, a tokenizer.json that names the marks,
and codes that are the text tokens from 155000 on, by number alone.
"""

from collections.abc import Mapping, Sequence

from cascade_jax.models.lumina2 import PIXELS, Lumina2Config, preset
from checkpoints_convert import eagle, llama, movq
from checkpoints_convert.files import read_json
from checkpoints_convert.formats import Family, Format, Known, of_tokens
from checkpoints_convert.sources import TOKENIZERS, Source
from checkpoints_convert.table import Rule
from checkpoints_convert.tensors import ConvertError, listed
from checkpoints_convert.transforms import rows_between

_PUBLISHED = preset("lumina-mgpt-2-7b")
_MARKS = {
    "turn": "<reserved08706>",
    "image_start": "<racm3:break>",
    "image_end": "<eoss>",
    "newline": "<reserved08799>",
    "size": "<reserved08800>",
}


def _rules(config: Lumina2Config) -> Sequence[Rule]:
    codes = rows_between(config.first_code, config.first_code + config.codebook_size)
    return (
        Rule("model.embed_tokens.weight", "embedding"),
        *llama.blocks("model.layers", config.block),
        Rule("model.norm.weight", "norm.scale"),
        Rule("lm_head.weight", "head.kernel", codes),
    )


def _configure(source: Source, known: Known) -> Lumina2Config:
    settings = source.settings
    for name in ("swin_norm", "attention_bias", "mlp_bias"):
        if settings.get(name):
            raise ConvertError(f"{source.path} has {name}, which the public code leaves out unless told otherwise")
    vocab, dim = source.shape("model.embed_tokens.weight")
    head_dim = source.shape("model.layers.0.self_attn.q_norm.weight")[-1]
    heads, count = dim // head_dim, llama.layers(source, "model.layers")
    llama.check_settings(source, settings, "model.layers", dim, heads)
    source.check_settings(settings, num_attention_heads=heads)
    kv_heads = source.shape("model.layers.0.self_attn.k_proj.weight")[0] // head_dim
    codes = known.parts["vq"].codebook_size if "vq" in known.parts else _PUBLISHED.codebook_size
    if (last := _PUBLISHED.first_code + codes - 1) >= vocab:
        raise ConvertError(
            f"{source.path} lacks picture tokens: its head has {vocab} rows, and the tokenizer's {codes} codes are "
            f"{_PUBLISHED.first_code} to {last}"
        )
    pixels = known.pixels or _PUBLISHED.rows * PIXELS
    if pixels % 32:
        raise ConvertError(f"pixels must be a multiple of 32, not {pixels}")
    return Lumina2Config(
        dim=dim,
        layers=count,
        heads=heads,
        ffn_dim=source.shape("model.layers.0.mlp.gate_proj.weight")[0],
        rows=pixels // PIXELS,
        columns=pixels // PIXELS,
        kv_heads=None if kv_heads == heads else kv_heads,
        codebook_size=codes,
        vocab_size=vocab,
        norm_eps=source.number(settings, "rms_norm_eps", _PUBLISHED.norm_eps),
        rope_base=llama.rope_base(source, settings),
        **_marks(source, pixels),
    )


def _marks(source: Source, pixels: int) -> dict[str, int]:
    names, longest = source.vocabulary(), f"<reserved{8800 + pixels // 32:05d}>"
    if lost := [name for name in (*_MARKS.values(), longest) if name not in names]:
        raise ConvertError(f"{source.path} has no tokenizer.json beside it that names {listed(lost)}: download it too")
    if names[longest] - names[_MARKS["size"]] != pixels // 32:
        raise ConvertError(f"{source.path}: the vocabulary does not number the lengths of pictures in order")
    return {mark: names[name] for mark, name in _MARKS.items()} | _begin(source, names)


def _begin(source: Source, names: Mapping[str, int]) -> dict[str, int]:
    """What the public code begins with: the tokenizer's beginning, or else its end. Published if nothing tells."""
    file = source.beside(TOKENIZERS).with_name("tokenizer_config.json")
    stated = read_json(file) if file.is_file() else {}
    first = stated.get("bos_token") or stated.get("eos_token")
    name = first.get("content") if isinstance(first, Mapping) else first
    return {"begin": names[name]} if name in names else {}


MODEL = Format(
    "Lumina-mGPT 2.0",
    "target",
    ("model.embed_tokens.weight", "model.layers.{}.self_attn.q_norm.bias", "lm_head.weight"),
    _configure,
    _rules,
    # Chameleon's picture encoder, which the code makes and never calls, and constants
    skip=("model.vqmodel.**", "model.layers.{}.self_attn.rotary_emb.inv_freq"),
    tokenizer=True,
    stand_ins=llama.TIED,
)
FAMILY = Family(
    "lumina-mgpt-2", (MODEL, movq.MOVQGAN, eagle.EAGLE1), ("target", "vq"), of_tokens("lumina2", PIXELS), "lumina2"
)
