"""Decoding with an EAGLE-3 drafter, which reads three of the target's layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import FAST, Tiny

from cascade_jax import cache as kv
from cascade_jax import decode, passes
from cascade_jax import tree as trees
from cascade_jax.cache import Context
from cascade_jax.drafters.eagle3 import Eagle3, Eagle3Config, layers_read
from cascade_jax.models.transformer import Attention, BlockConfig, run_blocks
from cascade_jax.sampling import Sampling, guide
from cascade_jax.tree import DynamicTree

SMALL, DYNAMIC = trees.parse("0 1 00 01 10 000"), DynamicTree(top_k=4, rounds=2, drafts=12)
SAMPLED = Sampling(temperature=1.0, top_k=20, guidance=2.0)
GREEDY = SAMPLED.replace(temperature=0.0)


@pytest.fixture(scope="module")
def tiny3(tiny) -> Tiny:
    """The tiny target under an EAGLE-3 drafter that guesses that the feature changes little."""
    target = tiny.target.config
    config = Eagle3Config(
        target.block, 40, 40, target.dim, taps=(1, 1, 2), grid=target.grid, condition_slots=target.condition_tokens - 1
    )
    drafter = Eagle3(config, rngs=nnx.Rngs(9))
    drafter.fc.kernel[...] = jnp.concatenate([jnp.zeros((64, 32)), jnp.eye(32)])
    drafter.head.kernel[...] = tiny.target.head.kernel[...]
    return dataclasses.replace(tiny, drafter=drafter)


@pytest.mark.parametrize("tree", [SMALL, DYNAMIC], ids=str)
def test_strict_greedy_decoding_is_the_autoregressive_sequence(tiny, tiny3, tree):
    expected, got = tiny.generate(trees.ROOT, GREEDY), tiny3.generate(tree, GREEDY)
    np.testing.assert_array_equal(got.tokens[:, :16], expected.tokens[:, :16])
    assert np.sum(got.stats.accepted) > 0


def test_what_the_drafter_will_read_are_the_layers_of_a_plain_pass_over_the_output(tiny3):
    """Also after steps that accepted drafts: rows of the tree's nodes, and the prefill's, end where they belong."""
    prefix = tiny3.prefix(4)
    state = tiny3.start(SMALL, SAMPLED, prefix=prefix, keys=tiny3.keys(4))
    assert state.drafter.features.shape == (8, 4, 3 * 32)
    state = tiny3.run(SMALL, state, SAMPLED, limit=3)
    graph, weights = nnx.split(tiny3.target)
    plain = jax.jit(
        lambda w, prefix, tokens: decode.teacher_forced(nnx.merge(graph, w), prefix, tokens, (1, 1, 2)),
        compiler_options=FAST,
    )
    whole = plain(weights, prefix, jnp.concatenate([state.tokens[:, :16]] * 2))
    features, read = passes.split(whole, (1, 1, 2))
    np.testing.assert_allclose(tiny3.target.norm(read[..., 64:]), features, atol=1e-5)
    first = prefix.length[0] - 1
    for row in range(8):
        pending, count = int(state.drafter.pending[row % 4]), int(state.count[row % 4])
        expected = read[row, first + count - pending : first + count]
        np.testing.assert_allclose(state.drafter.features[row, :pending], expected, atol=2e-4)
    assert np.sum(state.stats.accepted) > 0


def test_a_target_without_taps_gives_its_features_alone(tiny):
    x = jnp.ones((1, 3, 32))
    context = Context(tiny.target.rope(jnp.arange(3)[None]), kv.bias(kv.causal(3))[None, None])
    features, _ = tiny.target(x, context)
    tapped, _ = tiny.target(x, context, taps=(2, 1))
    np.testing.assert_array_equal(tapped[..., :32], features)
    blocks, _ = run_blocks(tiny.target.blocks, x, context)
    np.testing.assert_array_equal(tapped[..., 32:64], blocks)
    assert passes.split(features, ()) == (features, features)


def test_the_layers_are_those_of_the_public_code():
    # eagle/model/modeling_llama_kv.py: the inputs of layers 2, n // 2 and n - 3
    assert layers_read(32) == (2, 16, 29)
    assert layers_read(36) == (2, 18, 33)
    assert layers_read(2) == (1, 1, 2)


def test_a_segment_without_a_mask_is_seen_position_by_position():
    config = BlockConfig(dim=16, heads=4, kv_heads=2, head_dim=8, ffn_dim=16)
    attention = Attention(config, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x, y, z = jnp.asarray(rng.normal(size=(3, 2, 5, 16)), jnp.float32)
    turns = jnp.asarray(rng.normal(size=(2, 5, 4, 2)), jnp.float32)
    causal, own = kv.bias(kv.causal(5))[None, None], kv.bias(np.eye(5, dtype=bool))[None, None]
    _, first = attention(x, Context(turns, causal), ())
    _, second = attention(y, Context(turns, None, (causal,)), (first,))
    got, _ = attention(z, Context(turns, None, (causal, None)), (first, second))
    expected, _ = attention(z, Context(turns, own, (causal, own)), (first, second))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    other, _ = attention(z, Context(turns, None, (causal,)), (first,))
    assert np.abs(other - expected).max() > 1e-3


def test_guidance_leaves_out_what_the_drafters_head_cannot_draw():
    logits = jnp.array([[1.0, -jnp.inf, 0.5], [0.0, -jnp.inf, 2.0]])
    np.testing.assert_allclose(guide(logits, 3.0), [3.0, -np.inf, -2.5])
