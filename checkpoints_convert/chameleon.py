"""Chameleon's fine-tunes that draw, Lumina-mGPT and Anole, and the VQGAN that they share.

Lumina-mGPT (`Alpha-VLLM/Lumina-mGPT-7B-*`) comes in the Hugging Face layout, Anole in that (`leloy/Anole-7b-v0.1-hf`)
and in Meta's (`GAIR/Anole-7b-v0.1`). Of the head only the rows of image tokens are kept, in the order of the VQ codes;
the vocabulary beside the weights says which they are. The Hugging Face layout holds the VQGAN without its decoder, so
Meta's `vqgan.ckpt` is needed beside it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from cascade_jax.models.chameleon import PIXELS, ChameleonConfig, preset
from cascade_jax.models.vq import VQConfig
from checkpoints_convert import eagle, folders, llama, vqgan
from checkpoints_convert.files import read_json
from checkpoints_convert.formats import Family, Format, Known, of_tokens
from checkpoints_convert.sources import CODES, Source
from checkpoints_convert.table import Rule
from checkpoints_convert.tensors import ConvertError
from checkpoints_convert.transforms import code_rows, head_norm, integers, linear, qkv_in_pairs, stacked

# Text tokens that a prompt or a picture needs, by their names.
_MARKS = {
    "begin": "<s>",
    "turn": "<reserved08706>",
    "image_start": "<racm3:break>",
    "image_end": "<eoss>",
    "newline": "<reserved08799>",
    "size": "<reserved08800>",
}


def _hugging_face(config: ChameleonConfig) -> Sequence[Rule]:
    return (
        Rule("model.embed_tokens.weight", "embedding"),
        Rule(CODES, "code_ids", integers),
        *llama.blocks("model.layers", config.block),
        Rule("model.norm.weight", "norm.scale"),
        Rule(("lm_head.weight", CODES), "head.kernel", code_rows),
    )


def _meta(config: ChameleonConfig) -> Sequence[Rule]:
    layer, (heads, kv_heads) = "layers.{}", (config.block.heads, config.block.kv_heads)
    return (
        Rule("tok_embeddings.weight", "embedding"),
        Rule(CODES, "code_ids", integers),
        Rule(f"{layer}.attention_norm.weight", "blocks.{}.attention_norm.scale"),
        Rule(
            tuple(f"{layer}.attention.w{x}.weight" for x in "qkv"),
            "blocks.{}.attention.qkv.kernel",
            qkv_in_pairs(heads, kv_heads),
        ),
        *(
            Rule(
                f"{layer}.attention.{x[0]}_normalization.{theirs}",
                f"blocks.{{}}.attention.{x}_norm.{ours}",
                head_norm(own, pairs=True),
            )
            for x, own in (("query", heads), ("key", kv_heads))
            for theirs, ours in (("weight", "scale"), ("bias", "bias"))
        ),
        Rule(f"{layer}.attention.wo.weight", "blocks.{}.attention.out.kernel", linear),
        Rule(f"{layer}.ffn_norm.weight", "blocks.{}.ffn_norm.scale"),
        Rule(
            (f"{layer}.feed_forward.w1.weight", f"{layer}.feed_forward.w3.weight"),
            "blocks.{}.ffn.gate_up.kernel",
            stacked,
        ),
        Rule(f"{layer}.feed_forward.w2.weight", "blocks.{}.ffn.down.kernel", linear),
        Rule("norm.weight", "norm.scale"),
        Rule(("output.weight", CODES), "head.kernel", code_rows),
    )


def _configure_hugging_face(style: str) -> Callable[[Source, Known], ChameleonConfig]:
    def configure(source: Source, known: Known) -> ChameleonConfig:
        settings = source.settings
        for name in ("swin_norm", "attention_bias", "mlp_bias"):
            if settings.get(name):
                raise ConvertError(
                    f"{source.path} is a Chameleon with {name}, which none of the published 7B models has"
                )
        vocab, dim = source.shape("model.embed_tokens.weight")
        heads = settings.get("num_attention_heads") or dim // 128
        kv_heads = settings.get("num_key_value_heads") or heads
        llama.check_settings(source, settings, "model.layers", dim, heads)
        return ChameleonConfig(
            dim=dim,
            layers=_layers(source, known, dim, "model.layers", settings.get("num_hidden_layers")),
            heads=heads,
            ffn_dim=source.shape("model.layers.0.mlp.gate_proj.weight")[0],
            kv_heads=None if kv_heads == heads else kv_heads,
            vocab_size=vocab,
            norm_eps=source.number(settings, "rms_norm_eps", 1e-5),
            rope_base=llama.rope_base(source, settings),
            **_picture(style, source, known),
        )

    return configure


def _configure_meta(style: str) -> Callable[[Source, Known], ChameleonConfig]:
    def configure(source: Source, known: Known) -> ChameleonConfig:
        file = source.folder / "params.json"
        params = read_json(file) if file.is_file() else {}
        params = params.get("model", params)
        if params.get("swin_norm"):
            raise ConvertError(
                f"{source.path} is a Chameleon with swin_norm, which none of the published 7B models has"
            )
        vocab, dim = source.shape("tok_embeddings.weight")
        head_dim = source.shape("layers.0.attention.q_normalization.weight")[-1]
        heads, kv_heads = dim // head_dim, source.shape("layers.0.attention.wk.weight")[0] // head_dim
        for name, found in (("dim", dim), ("n_layers", llama.layers(source, "layers")), ("n_heads", heads)):
            if params.get(name) not in (None, found):
                raise ConvertError(f"{file} says {name} {params[name]!r} where the tensors have {found}")
        return ChameleonConfig(
            dim=dim,
            layers=_layers(source, known, dim, "layers", params.get("n_layers")),
            heads=heads,
            ffn_dim=source.shape("layers.0.feed_forward.w1.weight")[0],
            kv_heads=None if kv_heads == heads else kv_heads,
            vocab_size=vocab,
            norm_eps=source.number(params, "norm_eps", 1e-5),
            rope_base=source.number(params, "rope_theta", 10000),
            **_picture(style, source, known),
        )

    return configure


def _picture(style: str, source: Source, known: Known) -> dict[str, Any]:
    """How the model draws. Lumina-mGPT's size is in the model's name; Anole's pictures have 512 pixels a side."""
    if CODES not in source.tensors:
        raise ConvertError(
            f"{source.path} has no vocabulary that names the image tokens: put Meta's text_tokenizer.json beside it"
        )
    told = 512 if style == "anole" else folders.number_in_name(source.path, (512, 768, 1024))
    pixels, step = known.pixels or told, 2 * PIXELS if style == "lumina" else PIXELS
    if pixels is None:
        raise ConvertError(f"{source.path} does not say how large its pictures are: give --pixels 512, 768 or 1024")
    if told not in (None, pixels):
        known.say(f"warning: {source.path} draws {told} pixels a side by its name, and it is told to draw {pixels}")
    if pixels % step or pixels < step:
        raise ConvertError(f"pixels must be a multiple of {step}, not {pixels}")
    (codes,) = source.shape(CODES)
    vocabulary = source.vocabulary()
    marks = {mark: vocabulary[name] for mark, name in _MARKS.items() if name in vocabulary}
    return {"style": style, "rows": pixels // PIXELS, "columns": pixels // PIXELS, "codebook_size": codes, **marks}


def _layers(source: Source, known: Known, dim: int, prefix: str, stated: int | None) -> int:
    count = llama.layers(source, prefix)
    if stated is None:
        llama.check_published(source, known, dim, count, [preset("anole-7b")])
    return count


def _configure_vq(source: Source, known: Known) -> VQConfig:
    del known
    return vqgan.configure(source, "", down="down", block="block", l2_norm=False)


VQGAN = Format(
    "Chameleon's VQGAN",
    "vq",
    ("quantize.embedding.weight", "encoder.down.{}.block.{}.conv1.weight", "decoder.conv_in.weight"),
    _configure_vq,
    lambda config: vqgan.taming_names(config, finest_first=True),
    skip=("loss.**", CODES),  # what it was trained against
    absent=("decoder.norm_out.norm_layer.weight",),  # MoVQGAN
)


def _family(name: str, style: str) -> Family:
    return Family(
        name,
        (
            Format(
                "Chameleon, Hugging Face layout",
                "target",
                ("model.embed_tokens.weight", "model.layers.{}.self_attn.q_norm.bias", "lm_head.weight"),
                _configure_hugging_face(style),
                _hugging_face,
                # the encoder's half of the VQGAN, and constants
                skip=("model.vqmodel.**", "model.layers.{}.self_attn.rotary_emb.inv_freq"),
                tokenizer=True,
                stand_ins=llama.TIED,
            ),
            Format(
                "Chameleon, Meta's layout",
                "target",
                ("tok_embeddings.weight", "layers.{}.attention.q_normalization.weight", "output.weight"),
                _configure_meta(style),
                _meta,
                skip=("rope.freqs",),  # a constant
                tokenizer=True,
            ),
            VQGAN,
            eagle.EAGLE1,
        ),
        ("target", "vq"),
        of_tokens("chameleon", PIXELS),
        architecture="chameleon",
    )


LUMINA, ANOLE = _family("lumina-mgpt", "lumina"), _family("anole", "anole")
