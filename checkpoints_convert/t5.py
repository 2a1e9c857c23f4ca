"""FLAN-T5's encoder (`google/flan-t5-xl`), which reads LlamaGen's captions. The decoder is left out."""

from collections.abc import Sequence

from cascade_jax.models.t5 import T5Config
from checkpoints_convert import llama
from checkpoints_convert.formats import Format, Known, StandIn
from checkpoints_convert.sources import Source
from checkpoints_convert.table import Rule
from checkpoints_convert.tensors import ConvertError
from checkpoints_convert.transforms import linear, stacked

_BLOCK, _FIRST = "encoder.block.{}.layer", "encoder.block.0.layer"


def _rules(config: T5Config) -> Sequence[Rule]:
    del config
    return (
        Rule("shared.weight", "embedding"),
        Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_bias"),
        Rule(f"{_BLOCK}.0.layer_norm.weight", "blocks.{}.attention_norm.scale"),
        Rule(tuple(f"{_BLOCK}.0.SelfAttention.{x}.weight" for x in "qkv"), "blocks.{}.qkv.kernel", stacked),
        Rule(f"{_BLOCK}.0.SelfAttention.o.weight", "blocks.{}.out.kernel", linear),
        Rule(f"{_BLOCK}.1.layer_norm.weight", "blocks.{}.ffn_norm.scale"),
        Rule(tuple(f"{_BLOCK}.1.DenseReluDense.wi_{i}.weight" for i in "01"), "blocks.{}.gate_up.kernel", stacked),
        Rule(f"{_BLOCK}.1.DenseReluDense.wo.weight", "blocks.{}.down.kernel", linear),
        Rule("encoder.final_layer_norm.weight", "norm.scale"),
    )


def _configure(source: Source, known: Known) -> T5Config:
    del known
    settings = source.settings
    if settings.get("feed_forward_proj", "gated-gelu") != "gated-gelu":
        raise ConvertError(f"{source.path} is a T5 without gated GELU: FLAN-T5 or T5 v1.1 is needed")
    vocab, dim = source.shape("shared.weight")
    buckets, heads = source.shape(f"{_FIRST}.0.SelfAttention.relative_attention_bias.weight")
    layers, head_dim = (
        llama.layers(source, "encoder.block"),
        source.shape(f"{_FIRST}.0.SelfAttention.q.weight")[0] // heads,
    )
    ffn_dim = source.shape(f"{_FIRST}.1.DenseReluDense.wi_0.weight")[0]
    source.check_settings(settings, num_layers=layers, d_model=dim, num_heads=heads, d_kv=head_dim, d_ff=ffn_dim)
    return T5Config(
        dim=dim,
        layers=layers,
        heads=heads,
        head_dim=head_dim,
        ffn_dim=ffn_dim,
        vocab_size=vocab,
        buckets=buckets,
        max_distance=int(source.number(settings, "relative_attention_max_distance", 128)),
        norm_eps=source.number(settings, "layer_norm_epsilon", 1e-6),
    )


ENCODER = Format(
    "T5",
    "text",
    ("shared.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    _configure,
    _rules,
    skip=("decoder.**", "lm_head.weight", "encoder.embed_tokens.weight"),  # not run; a copy of `shared`
    tokenizer=True,
    # of one embedding under three names, files hold one
    stand_ins=(StandIn("shared.weight", ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")),),
)
