"""The decoder block as Qwen2, Qwen3, Gemma and GLM have it, against `transformers`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from tiny import FAST

from cascade_jax import cache as kv
from cascade_jax.cache import Context
from cascade_jax.models.transformer import Block, BlockConfig, rope_1d, run_blocks
from checkpoints_convert import llama
from checkpoints_convert.table import as_is
from checkpoints_convert.transforms import one_more

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 7}
OURS = {"dim": 32, "heads": 4, "ffn_dim": 48, "norm_eps": 1e-6}
PAIRS = {"num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6}
WIDE = {**PAIRS, "num_key_value_heads": 1, "head_dim": 16}
VARIANTS = {
    "Qwen2": (
        transformers.Qwen2Config(**SIZES, **PAIRS),
        BlockConfig(**OURS, kv_heads=2, head_dim=8, rope="half", qkv_bias=True),
    ),
    "Qwen3": (
        transformers.Qwen3Config(**SIZES, **WIDE),
        BlockConfig(**OURS, kv_heads=1, head_dim=16, rope="half", qk_norm=True, qk_rms=True),
    ),
    "Gemma": (
        transformers.GemmaConfig(**SIZES, **WIDE),
        BlockConfig(**OURS, kv_heads=1, head_dim=16, rope="half", activation="gelu"),
    ),
    "GLM": (
        transformers.GlmConfig(**SIZES, **PAIRS, partial_rotary_factor=0.5, attention_bias=True, pad_token_id=0),
        BlockConfig(**OURS, kv_heads=2, head_dim=8, qkv_bias=True, rotary=0.5),
    ),
}


def random_layers(config) -> torch.nn.Module:
    """All of a model but its embedding and its last norm, in float64; weights that are none of a fresh model's."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").double().eval()
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name and config.model_type != "gemma" else 0.0
        parameter.data.normal_(centre, 0.3)
    model.norm = torch.nn.Identity()
    return model


@pytest.mark.parametrize("kin", VARIANTS)
def test_the_block_is_that_of_its_kin(kin):
    settings, config = VARIANTS[kin]
    reference, rng = random_layers(settings), np.random.default_rng(0)
    weights = {name: tensor.numpy().astype(np.float32) for name, tensor in reference.state_dict().items()}
    for name in [name for name in weights if "gate_up_proj" in name]:  # GLM's one matrix
        for half, kept in zip(("gate", "up"), np.split(weights.pop(name), 2)):
            weights[name.replace("gate_up", half)] = kept
    rules = {rule.path: rule for rule in llama.blocks("layers", config, one_more if kin == "Gemma" else as_is)}

    def made(path, shape):
        number, path = re.match(r"blocks\.(\d+)", path)[1], re.sub(r"\.\d+\.", ".{}.", path)
        value = rules[path].transform(*(weights[name.format(number)] for name in rules[path].names))
        assert value.shape == shape
        return jnp.asarray(value)

    blocks = nnx.eval_shape(lambda: nnx.Dict(blocks=nnx.List([Block(config, nnx.Rngs(0)) for _ in range(2)])))
    graph, state = nnx.split(blocks)
    dotted = lambda path: jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
    state = jax.tree_util.tree_map_with_path(lambda path, leaf: made(dotted(path), leaf.shape), state)
    x, positions = rng.normal(size=(2, 9, 32)), np.arange(9) + np.array([[0], [40]])
    with torch.no_grad():
        expected = reference(inputs_embeds=torch.tensor(x), position_ids=torch.tensor(positions)).last_hidden_state

    @jax.jit
    def run(state, x):
        rope = rope_1d(jnp.asarray(positions), config.head_dim, 10000.0, config.rotary)
        return run_blocks(nnx.merge(graph, state)["blocks"], x, Context(rope, kv.bias(kv.causal(9))[None, None]))[0]

    x = jnp.asarray(x, jnp.float32)
    got = run.lower(state, x).compile(FAST)(state, x)
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)  # two float32 layers against double precision


def test_variants_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="unknown activation 'relu'; known: silu, gelu"):
        BlockConfig(**OURS, kv_heads=2, head_dim=8, activation="relu")
    with pytest.raises(ValueError, match=r"a share of 0\.3 of a head of 8 is no number of rotary pairs"):
        BlockConfig(**OURS, kv_heads=2, head_dim=8, rotary=0.3)
