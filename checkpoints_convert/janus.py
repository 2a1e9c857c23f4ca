"""Janus-Pro as its authors publish it, and in the Hugging Face layout.

The former is `deepseek-ai/Janus-Pro-1B` and `-7B`, the latter `deepseek-community/Janus-Pro-1B` and `-7B`. One
checkpoint holds the model and its VQ; what only understands pictures is skipped.
"""

from collections.abc import Callable, Sequence

from cascade_jax.models.janus import JanusConfig, preset
from cascade_jax.models.vq import VQConfig
from checkpoints_convert import eagle, llama, vqgan
from checkpoints_convert.formats import Family, Format, Known, of_tokens
from checkpoints_convert.sources import Source
from checkpoints_convert.table import Rule
from checkpoints_convert.tensors import ConvertError
from checkpoints_convert.transforms import linear

_PUBLISHED_HEADS = {2048: 16, 4096: 32}  # by width; the authors' config.json leaves defaults out


def _mlp(theirs: tuple[str, str], ours: str) -> Sequence[Rule]:
    pairs = zip(theirs, ("fc1", "fc2"))
    return [
        rule
        for name, layer in pairs
        for rule in (
            Rule(f"{name}.weight", f"{ours}.{layer}.kernel", linear),
            Rule(f"{name}.bias", f"{ours}.{layer}.bias"),
        )
    ]


def _original(config: JanusConfig) -> Sequence[Rule]:
    return (
        Rule("language_model.model.embed_tokens.weight", "text_embedding"),
        Rule("gen_embed.weight", "embedding"),
        *_mlp(("gen_aligner.layers.0", "gen_aligner.layers.2"), "aligner"),
        *llama.blocks("language_model.model.layers", config.block),
        Rule("language_model.model.norm.weight", "norm.scale"),
        *_mlp(("gen_head.output_mlp_projector", "gen_head.vision_head"), "head"),
    )


def _hugging_face(config: JanusConfig) -> Sequence[Rule]:
    return (
        Rule("model.language_model.embed_tokens.weight", "text_embedding"),
        Rule("model.generation_embeddings.weight", "embedding"),
        *_mlp(("model.generation_aligner.fc1", "model.generation_aligner.hidden_layers.0"), "aligner"),
        *llama.blocks("model.language_model.layers", config.block),
        Rule("model.language_model.norm.weight", "norm.scale"),
        *_mlp(("model.generation_head.proj_out", "model.generation_head.vision_head"), "head"),
    )


def _configure(text: str, codes: str, hidden: str, settings_of: str) -> Callable[[Source, Known], JanusConfig]:
    """From the names of the language model, the codes' embedding, the head's hidden layer, and the language model's
    settings."""

    def configure(source: Source, known: Known) -> JanusConfig:
        settings, prefix = source.settings.get(settings_of) or {}, f"{text}.layers"
        vocab, dim = source.shape(f"{text}.embed_tokens.weight")
        heads = settings.get("num_attention_heads") or _PUBLISHED_HEADS.get(dim) or dim // 128
        kv_heads = settings.get("num_key_value_heads") or heads
        codebook_size, code_dim = source.shape(codes)
        count = llama.layers(source, prefix)
        llama.check_settings(source, settings, prefix, dim, heads)
        if settings.get("num_hidden_layers") is None:
            llama.check_published(source, known, dim, count, [preset("1B"), preset("7B")])
        return JanusConfig(
            dim=dim,
            layers=count,
            heads=heads,
            ffn_dim=source.shape(f"{prefix}.0.mlp.gate_proj.weight")[0],
            grid=_grid(source, known),
            kv_heads=None if kv_heads == heads else kv_heads,
            codebook_size=codebook_size,
            code_dim=code_dim,
            head_width=source.shape(hidden)[0],
            vocab_size=vocab,
            norm_eps=source.number(settings, "rms_norm_eps", 1e-6),
            rope_base=llama.rope_base(source, settings),
            **_marks(source),
        )

    return configure


def _grid(source: Source, known: Known) -> int:
    """Codes per side of a picture. Pictures are drawn as large as they are read, which config.json says."""
    square = known.parts["vq"].downsampling if "vq" in known.parts else 16
    vision = source.settings.get("vision_config") or {}
    told = vision.get("image_size") or (vision.get("params") or {}).get("image_size")
    if known.pixels and told and known.pixels != told:
        raise ConvertError(f"{source.path}: config.json says pictures of {told} pixels a side, not {known.pixels}")
    pixels = known.pixels or told or 384
    if pixels % square:
        raise ConvertError(f"pixels must be a multiple of {square}, not {pixels}")
    return pixels // square


def _marks(source: Source) -> dict[str, int]:
    """Tokens that the prompt needs, by their names in the tokenizer beside the weights."""
    names = {"begin": "<｜begin▁of▁sentence｜>", "image_start": "<begin_of_image>", "pad": "<｜▁pad▁｜>"}
    vocabulary = source.vocabulary()
    return {mark: vocabulary[name] for mark, name in names.items() if name in vocabulary}


def _configure_vq(prefix: str, down: str, block: str) -> Callable[[Source, Known], VQConfig]:
    return lambda source, known: vqgan.configure(source, prefix, down=down, block=block, l2_norm=True)


# Everything that reads pictures, and the head that writes text.
_SIGLIP = ("vision_model.**", "aligner.**", "language_model.lm_head.weight")
_SIGLIP_HF = ("model.vision_model.**", "model.aligner.**", "lm_head.weight")
_TARGET = ("language_model.**", "gen_embed.weight", "gen_aligner.**", "gen_head.**")
_TARGET_HF = ("model.language_model.**", "model.generation_**")

ORIGINAL = Format(
    "Janus-Pro",
    "target",
    ("language_model.model.embed_tokens.weight", "gen_embed.weight", "gen_head.vision_head.weight"),
    _configure("language_model.model", "gen_embed.weight", "gen_head.output_mlp_projector.weight", "language_config"),
    _original,
    skip=("gen_vision_model.**", *_SIGLIP, "language_model.model.layers.{}.self_attn.rotary_emb.inv_freq"),
    tokenizer=True,
)
HUGGING_FACE = Format(
    "Janus-Pro, Hugging Face layout",
    "target",
    ("model.language_model.embed_tokens.weight", "model.generation_embeddings.weight"),
    _configure(
        "model.language_model",
        "model.generation_embeddings.weight",
        "model.generation_head.proj_out.weight",
        "text_config",
    ),
    _hugging_face,
    skip=("model.vqmodel.**", *_SIGLIP_HF),
    tokenizer=True,
)
VQ = Format(
    "Janus-Pro's VQ",
    "vq",
    ("gen_vision_model.quantize.embedding.weight", "gen_vision_model.decoder.conv_in.weight"),
    _configure_vq("gen_vision_model.", "conv_blocks", "res"),
    lambda config: vqgan.own_names("gen_vision_model."),
    skip=("gen_vision_model.quantize.codebook_used", *_SIGLIP, *_TARGET),  # statistics of training; the other parts
)
VQ_HUGGING_FACE = Format(
    "Janus-Pro's VQ, Hugging Face layout",
    "vq",
    ("model.vqmodel.quantize.embedding.weight", "model.vqmodel.decoder.conv_in.weight"),
    _configure_vq("model.vqmodel.", "down", "block"),
    lambda config: vqgan.taming_names(config, "model.vqmodel.", finest_first=False),
    skip=(*_SIGLIP_HF, *_TARGET_HF),
)
FAMILY = Family(
    "janus", (ORIGINAL, HUGGING_FACE, VQ, VQ_HUGGING_FACE, eagle.EAGLE1), ("target", "vq"), of_tokens("janus")
)
