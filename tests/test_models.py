import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx
from tiny import FAST, make

from cascade_jax import cache as kv
from cascade_jax import decode
from cascade_jax import tree as trees
from cascade_jax.cache import Context
from cascade_jax.drafters.eagle import Eagle1, EagleConfig
from cascade_jax.models import llamagen, transformer
from cascade_jax.models.llamagen import LlamaGen, LlamaGenConfig
from cascade_jax.models.transformer import BlockConfig

# Two float32 layers against double precision.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


# The decoder block as textbooks have it, one head at a time, in double precision.


def rms_norm(x, norm):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps) * np.asarray(norm.scale[...], np.float64)


def rotate(x, table, style):
    """Pairs of a head's entries [R, S, D] as complex numbers, turned by the angles in `table` [R, S, D/2, 2]."""
    turn = table[..., 0] + 1j * table[..., 1]
    if style == "interleaved":
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def block(module, config, x, table, seen):
    weights = lambda linear: np.asarray(linear.kernel[...], np.float64)
    qkv, groups = weights(module.attention.qkv), config.heads // config.kv_heads
    h = rms_norm(x, module.attention_norm) if config.input_norm else x
    heads = []
    for head in range(config.heads):
        shared = head // groups
        query = rotate(h @ qkv[:, shared, head % groups], table, config.rope)
        key = rotate(h @ qkv[:, shared, groups], table, config.rope)
        scores = np.where(seen, query @ key.swapaxes(1, 2) / np.sqrt(config.head_dim), -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(scores / scores.sum(-1, keepdims=True) @ (h @ qkv[:, shared, groups + 1]))
    x = x + np.concatenate(heads, axis=-1) @ weights(module.attention.out)
    h, gate_up = rms_norm(x, module.ffn_norm), weights(module.ffn.gate_up)
    gate = h @ gate_up[:, 0]
    return x + gate / (1 + np.exp(-gate)) * (h @ gate_up[:, 1]) @ weights(module.ffn.down)


def features(target, x, seen):
    """The target's features of embeddings [R, S, d] that stand in the slots 0 ... S - 1."""
    x = np.asarray(x, np.float64)
    table = np.broadcast_to(
        target.config.rope_table[: x.shape[1]], (*x.shape[:2], target.config.block.head_dim // 2, 2)
    )
    for module in target.blocks:
        x = block(module, target.config.block, x, table, seen)
    return rms_norm(x, target.norm)


@pytest.mark.parametrize(
    "config",
    [
        BlockConfig(24, 4, 4, 6, 40),
        BlockConfig(24, 4, 2, 6, 40, rope="half"),
        BlockConfig(24, 6, 1, 8, 40, norm_eps=1e-2, input_norm=False),
    ],
    ids=str,
)
def test_the_block_is_the_textbooks(config):
    module = transformer.Block(config, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for leaf in jax.tree.leaves(nnx.state(module), is_leaf=lambda x: isinstance(x, nnx.Variable)):
        leaf[...] = jnp.asarray(rng.normal(1 if leaf.ndim == 1 else 0, 0.3, leaf.shape), jnp.float32)
    graph, state = nnx.split(module)
    x, seen = rng.normal(size=(2, 7, 24)), np.tril(np.ones((7, 7), bool))
    table = transformer.rope_1d(jnp.arange(7) + jnp.array([[0], [11]]), config.head_dim, 100.0)
    run = jax.jit(lambda s, x, context: nnx.merge(graph, s)(x, context)[0], compiler_options=FAST)
    got = run(state, jnp.asarray(x, jnp.float32), Context(table, kv.bias(seen)[None, None]))
    np.testing.assert_allclose(got, block(module, config, x, np.asarray(table), seen), **CLOSE)


def test_the_target_is_the_textbooks_transformer_over_prefix_and_codes(tiny):
    prefix, tokens = tiny.prefix(2), jnp.asarray(np.random.default_rng(1).integers(0, 40, (2, 16)))
    holes = np.zeros((4, 5), bool)
    holes[0, :2] = holes[3, 1] = True
    embedded = np.concatenate([prefix.embeddings, np.tile(tiny.target.embed(tokens[:, :-1]), (2, 1, 1))], axis=1)
    causal = np.tril(np.ones((20, 20), bool))
    got = tiny.features(prefix, tokens)
    np.testing.assert_allclose(got, features(tiny.target, embedded, causal), **CLOSE)
    seen = causal & ~np.pad(holes, ((0, 0), (0, 15)))[:, None] | np.eye(20, dtype=bool)
    masked = tiny.features(prefix.replace(holes=jnp.asarray(holes)), tokens)
    np.testing.assert_allclose(masked, features(tiny.target, embedded, seen), **CLOSE)
    logits = np.asarray(got[:2, 4:], np.float64) @ np.asarray(tiny.target.head.kernel[...], np.float64)
    np.testing.assert_allclose(tiny.logits(prefix, tokens, 1.0), logits, **CLOSE)


def test_teacher_forcing_places_codes_behind_prefixes_of_any_length(tiny):
    prefix, tokens = tiny.prefix(1), jnp.arange(16)[None]
    ragged = prefix.replace(length=jnp.array([3, 4], jnp.int32))
    together = decode.at_tokens(tiny.features(ragged, tokens), ragged, 16)
    for row, length in ((0, 3), (1, 4)):
        x = np.concatenate([prefix.embeddings[row : row + 1, :length], tiny.target.embed(tokens[:, :-1])], axis=1)
        alone = features(tiny.target, x, np.tril(np.ones((length + 15,) * 2, bool)))
        np.testing.assert_allclose(together[row], alone[0, length - 1 :], **CLOSE)


def test_every_path_of_a_tree_pass_over_a_cache_is_a_plain_pass_over_that_sequence(tiny):
    """Rows of different counts, holes in the cache, garbage behind its end, query heads that share key heads."""
    rng, tree = np.random.default_rng(2), trees.parse("0 1 00 01 10 000")
    lengths, size, capacity = np.array([9, 6, 5]), 9, 14
    holes = np.zeros((3, 4), bool)
    holes[0, :2] = holes[2, 3] = True
    x = rng.normal(size=(3, size, 32)).astype(np.float32)
    nodes = rng.normal(size=(3, tree.num_nodes, 32)).astype(np.float32)
    graph, state = nnx.split(tiny.target)

    @jax.jit
    def two_passes(state, x, nodes, lengths, holes):
        target = nnx.merge(graph, state)
        seen = kv.causal(size)[None] & ~jnp.pad(holes, ((0, 0), (0, size - 4)))[:, None] | jnp.eye(size, dtype=bool)
        slots = jnp.broadcast_to(jnp.arange(size), (3, size))
        _, fresh = target(x, Context(target.rope(slots), kv.bias(seen)[:, None]))
        room = jax.tree.map(lambda a: a + 7.0, kv.room(fresh, capacity))
        cache = kv.write(room, fresh, jnp.zeros(3, jnp.int32))
        slots = lengths[:, None] + tree.topology.depths
        context = Context(
            target.rope(slots),
            kv.bias(tree.topology.ancestors)[None, None],
            (kv.filled(capacity, lengths, holes),),
        )
        features, fresh = target(nodes, context, (cache,))
        # the same node again, after its path was committed to the cache
        path = jnp.broadcast_to(jnp.array([0, 1, 3]), (3, 3))
        cache = kv.write(cache, kv.take(fresh, path), lengths)
        last = Context(
            target.rope(lengths[:, None] + 3),
            jnp.zeros((1, 1, 1, 1)),
            (kv.filled(capacity, lengths + 3, holes),),
        )
        return features, target(nodes[:, 6:], last, (cache,))[0]

    got, committed = two_passes(state, x, nodes, jnp.asarray(lengths), jnp.asarray(holes))
    for row, length in enumerate(lengths):
        for node in range(tree.num_nodes):
            path = np.flatnonzero(tree.topology.ancestors[node])
            sequence = np.concatenate([x[row, :length], nodes[row, path]])[None]
            seen = np.tril(np.ones((len(sequence[0]),) * 2, bool))
            seen = seen & ~np.pad(holes[row], (0, len(seen) - 4)) | np.eye(len(seen), dtype=bool)
            plain = features(tiny.target, sequence, seen)[0, -1]
            np.testing.assert_allclose(got[row, node], plain, **CLOSE)
            if node == 6:
                np.testing.assert_allclose(committed[row, 0], plain, **CLOSE)


def test_llamagens_rotary_table_turns_half_of_a_head_by_row_and_half_by_column():
    table = transformer.rope_2d(grid=3, head_dim=8, condition_slots=2, base=100.0)
    assert table.shape == (2 + 9, 4, 2)
    assert np.all(table[:2] == 0)
    for row in range(3):
        for column in range(3):
            angles = np.array([row * 1.0, row * 100.0**-0.5, column * 1.0, column * 100.0**-0.5])
            slot = table[2 + 3 * row + column]
            np.testing.assert_allclose(slot, np.stack([np.cos(angles), np.sin(angles)], -1), atol=1e-6)


def test_condition_slots_with_places_turn_like_codes_there():
    config = dataclasses.replace(small.TARGET, condition_tokens=2, condition_places=((1, 3), (2.5, 0)))
    plain = dataclasses.replace(config, condition_places=None).rope_table
    np.testing.assert_array_equal(config.rope_table[2:], plain[2:])
    np.testing.assert_allclose(config.rope_table[0], plain[2 + 4 + 3])
    assert np.all(plain[:2] == 0) and config.rope_table[1, 0, 0] == np.float32(np.cos(2.5))
    assert LlamaGenConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    with pytest.raises(ValueError, match="3 condition slots have 2 places"):
        dataclasses.replace(config, condition_tokens=3)


@pytest.mark.parametrize("style", ["interleaved", "half"])
def test_rotary_products_depend_on_distance_alone(style):
    query, key = np.random.default_rng(3).normal(size=(2, 1, 1, 1, 8))
    at = lambda x, position: transformer.rotate(
        jnp.asarray(x, jnp.float32), transformer.rope_1d(jnp.array([[position]]), 8, 50.0), style
    )
    product = lambda i, j: float(jnp.sum(at(query, i) * at(key, j)))
    assert product(5, 2) == pytest.approx(product(13, 10), abs=1e-5)
    assert product(5, 2) != pytest.approx(product(5, 3), abs=1e-2)
    np.testing.assert_allclose(at(query, 0), query, atol=1e-6)


def test_slots_past_the_end_of_the_picture_have_finite_angles(tiny):
    table = tiny.target.rope(jnp.array([4, 5, 20, 21, 500]))
    assert np.all(table[0] == 0)
    np.testing.assert_array_equal(table[1, :, 0], 1)
    np.testing.assert_array_equal(table[3:], table[2:3].repeat(2, axis=0))


def test_a_drafters_pair_has_its_tokens_angle_one_slot_earlier(tiny):
    slots = jnp.arange(5, 21)
    np.testing.assert_array_equal(tiny.drafter.rope(slots - 1), tiny.target.rope(slots))
    usual = Eagle1(EagleConfig(BlockConfig(8, 2, 2, 4, 8)), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(usual.rope(slots), transformer.rope_1d(slots, 4, 10000.0))


def test_the_drafter_joins_token_and_feature_and_runs_one_block(tiny):
    drafter, config = tiny.drafter, tiny.drafter.config.block
    embeddings, known = np.random.default_rng(4).normal(size=(2, 3, 6, 32)).astype(np.float32)
    table = drafter.rope(jnp.broadcast_to(jnp.arange(3, 9), (3, 6)))
    graph, state = nnx.split(drafter)
    run = jax.jit(lambda s, e, f, context: nnx.merge(graph, s)(e, f, context)[0], compiler_options=FAST)
    got = run(state, embeddings, known, Context(table, kv.bias(kv.causal(6))[None, None]))
    x = np.concatenate([embeddings, known], -1) @ np.asarray(drafter.fc.kernel[...]) + np.asarray(drafter.fc.bias[...])
    plain = block(drafter.blocks[0], config, x, np.asarray(table), np.tril(np.ones((6, 6), bool)))
    assert not config.input_norm
    np.testing.assert_allclose(got, plain, **CLOSE)
    np.testing.assert_array_equal(drafter.logits(got, tiny.target), tiny.target.logits(got))


def test_classes_and_captions_become_conditions(tiny):
    config = LlamaGenConfig(8, 1, 2, image_tokens=4, vocab_size=5, condition_tokens=1, classes=3, ffn_multiple=8)
    classes = LlamaGen(config, rngs=nnx.Rngs(0))
    labels = np.asarray(classes.label[...])
    np.testing.assert_array_equal(classes.condition(jnp.array([2, 0])), labels[[2, 0]][:, None])
    np.testing.assert_array_equal(classes.unconditional(2), labels[[3, 3]][:, None])
    caption = np.random.default_rng(5).normal(size=(2, 5, 8)).astype(np.float32)
    embedder = tiny.target.caption
    hidden = np.asarray(caption @ embedder.fc1.kernel[...], np.float64)
    hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    np.testing.assert_allclose(tiny.target.condition(caption), hidden @ np.asarray(embedder.fc2.kernel[...]), **CLOSE)
    np.testing.assert_array_equal(
        tiny.target.unconditional(2)[1], tiny.target.condition(embedder.unconditional[...][None])[0]
    )


@pytest.mark.parametrize(
    ("size", "classes", "millions"),
    # https://github.com/FoundationVision/LlamaGen: parameters of the published models
    [("B", 1000, 111), ("L", 1000, 343), ("XL", 1000, 775), ("XXL", 1000, 1411), ("3B", 1000, 3072), ("XL", None, 775)],
)
def test_presets_have_the_published_numbers_of_parameters(size, classes, millions):
    config = llamagen.preset(size, classes=classes)
    state = nnx.state(nnx.eval_shape(lambda: LlamaGen(config, rngs=nnx.Rngs(0))))
    count = sum(x.size for x in jax.tree.leaves(state))
    assert count == pytest.approx(millions * 1e6, rel=0.02)
    assert config.block.ffn_dim % 256 == 0
    assert config.condition_tokens == (120 if classes is None else 1)


def test_impossible_configurations_are_refused():
    with pytest.raises(ValueError, match="image_tokens must be a square number, not 15"):
        LlamaGenConfig(8, 1, 2, image_tokens=15)
    with pytest.raises(ValueError, match="dim 9 is not a multiple of heads 2"):
        LlamaGenConfig(9, 1, 2)
    with pytest.raises(ValueError, match="unknown LlamaGen size 'M'; known: B, L"):
        llamagen.preset("M")


def test_bfloat16_stays_bfloat16_and_logits_are_float32(tiny):
    prefix, tokens = tiny.prefix(2), jnp.zeros((2, 16), jnp.int32)
    graph, state = nnx.split(tiny.target)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (state, prefix.embeddings))

    @jax.jit
    def run(state, embeddings):
        target = nnx.merge(graph, state)
        found = decode.teacher_forced(target, prefix.replace(embeddings=embeddings), jnp.concatenate([tokens] * 2))
        return found, target.logits(found)

    found, logits = run(*half)
    assert found.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    # bfloat16 keeps 8 bits; its errors add up over two layers of features of size 1
    np.testing.assert_allclose(found.astype(jnp.float32), tiny.features(prefix, tokens), atol=0.15)


def test_a_random_model_reacts_to_tokens_prompt_and_position():
    """So that tests which compare outputs compare something."""
    model = make(LlamaGenConfig(16, 1, 2, 4, 7, condition_tokens=2, caption_dim=4, ffn_multiple=8), 0, 1.0)
    prefix, tokens = model.prefix(2), jnp.array([[1, 1, 1, 1], [1, 2, 1, 1]])
    logits = np.asarray(model.logits(jax.tree.map(lambda x: x[jnp.array([0, 0, 2, 2])], prefix), tokens, 1.0))
    np.testing.assert_array_equal(logits[0, :2], logits[1, :2])
    assert np.abs(logits[0, 2:] - logits[1, 2:]).max(-1).min() > 0.05
    assert np.abs(logits[0, 1] - logits[0, 3]).max() > 0.05
    assert np.abs(np.asarray(model.logits(prefix, tokens, 1.0))[1, 0] - logits[0, 0]).max() > 0.05
