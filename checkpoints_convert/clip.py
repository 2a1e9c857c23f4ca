"""CLIP (`openai/clip-vit-base-patch32`) in the Hugging Face layout: both towers, to measure pictures with."""

from collections.abc import Sequence

from cascade_jax import bundle
from cascade_jax.models.clip import CLIPConfig, TowerConfig
from checkpoints_convert import llama
from checkpoints_convert.formats import Family, Format, Known
from checkpoints_convert.sources import Source
from checkpoints_convert.table import Rule
from checkpoints_convert.tensors import ConvertError
from checkpoints_convert.transforms import conv, linear, rows, stacked


def _rules(config: CLIPConfig) -> Sequence[Rule]:
    del config
    return (
        Rule("vision_model.embeddings.patch_embedding.weight", "vision.patch", conv),
        Rule("vision_model.embeddings.class_embedding", "vision.class_token"),
        Rule("vision_model.embeddings.position_embedding.weight", "vision.positions"),
        *_norm("vision_model.pre_layrnorm", "vision.norm_in"),
        *_blocks("vision_model", "vision"),
        *_norm("vision_model.post_layernorm", "vision.norm"),
        Rule("text_model.embeddings.token_embedding.weight", "text.embedding"),
        Rule("text_model.embeddings.position_embedding.weight", "text.positions"),
        *_blocks("text_model", "text"),
        *_norm("text_model.final_layer_norm", "text.norm"),
        Rule("visual_projection.weight", "vision_projection.kernel", linear),
        Rule("text_projection.weight", "text_projection.kernel", linear),
        Rule("logit_scale", "logit_scale"),
    )


def _blocks(theirs: str, ours: str) -> Sequence[Rule]:
    layer, block = f"{theirs}.encoder.layers.{{}}", f"{ours}.blocks.{{}}"
    return (
        *_norm(f"{layer}.layer_norm1", f"{block}.attention_norm"),
        Rule(tuple(f"{layer}.self_attn.{x}_proj.weight" for x in "qkv"), f"{block}.qkv.kernel", stacked),
        Rule(tuple(f"{layer}.self_attn.{x}_proj.bias" for x in "qkv"), f"{block}.qkv.bias", rows),
        *_linear(f"{layer}.self_attn.out_proj", f"{block}.out"),
        *_norm(f"{layer}.layer_norm2", f"{block}.ffn_norm"),
        *_linear(f"{layer}.mlp.fc1", f"{block}.up"),
        *_linear(f"{layer}.mlp.fc2", f"{block}.down"),
    )


def _norm(theirs: str, ours: str) -> Sequence[Rule]:
    return Rule(f"{theirs}.weight", f"{ours}.scale"), Rule(f"{theirs}.bias", f"{ours}.bias")


def _linear(theirs: str, ours: str) -> Sequence[Rule]:
    return Rule(f"{theirs}.weight", f"{ours}.kernel", linear), Rule(f"{theirs}.bias", f"{ours}.bias")


def _configure(source: Source, known: Known) -> CLIPConfig:
    del known
    patches, _ = source.shape("vision_model.embeddings.position_embedding.weight")
    patch_size = source.shape("vision_model.embeddings.patch_embedding.weight")[-1]
    side = round((patches - 1) ** 0.5)
    if side**2 != patches - 1:
        raise ConvertError(f"{source.path} has {patches - 1} patches, which are no square")
    positions, _ = source.shape("text_model.embeddings.position_embedding.weight")
    vocab, _ = source.shape("text_model.embeddings.token_embedding.weight")
    end = source.settings.get("text_config", {}).get("eos_token_id", 2)
    return CLIPConfig(
        vision=_tower(source, "vision"),
        text=_tower(source, "text"),
        projection=source.shape("visual_projection.weight")[0],
        image_size=side * patch_size,
        patch_size=patch_size,
        vocab_size=vocab,
        positions=positions,
        # OpenAI's settings say 2 and mean the last token of the vocabulary
        end_token=vocab - 1 if end == 2 else end,
    )


def _tower(source: Source, name: str) -> TowerConfig:
    settings, prefix = source.settings.get(f"{name}_config", {}), f"{name}_model.encoder.layers"
    if (activation := settings.get("hidden_act", "quick_gelu")) != "quick_gelu":
        raise ConvertError(f"{source.path} is a CLIP with {activation}, and OpenAI's have quick_gelu")
    ffn_dim, dim = source.shape(f"{prefix}.0.mlp.fc1.weight")
    heads = settings.get("num_attention_heads", dim // 64)  # OpenAI's heads are 64 wide
    if dim % heads:
        raise ConvertError(f"{source.path} has {heads} heads for a width of {dim}")
    layers = llama.layers(source, prefix)
    source.check_settings(settings, num_hidden_layers=layers, hidden_size=dim, intermediate_size=ffn_dim)
    return TowerConfig(
        dim=dim,
        layers=layers,
        heads=heads,
        ffn_dim=ffn_dim,
        norm_eps=source.number(settings, "layer_norm_eps", 1e-5),
    )


CLIP = Format(
    "CLIP",
    "metric",
    (
        "vision_model.embeddings.class_embedding",
        "text_model.embeddings.token_embedding.weight",
        "visual_projection.weight",
    ),
    _configure,
    _rules,
    skip=("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"),  # 0, 1, 2, ...
    tokenizer=True,
)

FAMILY = Family("clip", (CLIP,), ("metric",), lambda parts: bundle.MetricConfig(parts["metric"]))
