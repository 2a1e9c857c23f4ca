import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import assert_law
from tiny import generate, run

import cascade_jax as cj
from cascade_jax import decode, platforms
from cascade_jax import tree as trees
from cascade_jax.pipeline import picture_keys
from cascade_jax.sampling import Layout, Sampling
from cascade_jax.tree import DynamicTree

SMALL, DYNAMIC = trees.parse("0 1 00 01 10 000"), DynamicTree(top_k=4, rounds=2, drafts=12)
SAMPLED = Sampling(temperature=1.0, top_k=20, guidance=2.0)
GREEDY = SAMPLED.replace(temperature=0.0)


@pytest.fixture(scope="module")
def sampled(tiny):
    """A batch of 8 on the small static tree."""
    return tiny.generate(SMALL, SAMPLED)


@pytest.fixture(scope="module")
def autoregressive(tiny):
    """The same batch, token by token, without randomness."""
    return tiny.generate(trees.ROOT, GREEDY)


def tokens(state, row=slice(None)):
    return np.asarray(state.tokens)[row, :16]


def assert_complete(state, length=16):
    """All tokens are there, none was counted twice, and what overshoots the end was dropped."""
    np.testing.assert_array_equal(state.count, length)
    np.testing.assert_array_equal(state.stats.steps + state.stats.accepted, length - 1)


def rows(prefix, chosen):
    """The prefix of some sequences, of both branches."""
    batch = len(prefix.length) // 2
    index = np.concatenate([np.array(chosen), batch + np.array(chosen)])
    return jax.tree.map(lambda x: x[index], prefix)


# The output's law.


@pytest.mark.parametrize(
    "tree",
    [
        trees.ROOT,
        trees.parse("0 1 2 00 01 10"),
        pytest.param(DynamicTree(top_k=3, rounds=1, drafts=7), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_strict_decoding_has_the_law_of_the_target_over_several_steps(tiniest, tree):
    steps = assert_law(tiniest, tree)
    if tree.depth:  # outputs of one, two and three steps all count
        assert np.bincount(steps, minlength=4)[1:].min() > 0.01 * len(steps)


# Greedy decoding.


def test_autoregressive_greedy_decoding_takes_the_argmax_of_a_plain_forward_pass(tiny, autoregressive):
    logits = tiny.logits(tiny.prefix(8), jnp.asarray(tokens(autoregressive)), 2.0)
    np.testing.assert_array_equal(tokens(autoregressive), jnp.argmax(logits, axis=-1))
    assert len(np.unique(tokens(autoregressive), axis=0)) > 4  # prompts matter
    assert_complete(autoregressive)


@pytest.mark.parametrize(
    "tree",
    [
        pytest.param(SMALL, marks=pytest.mark.slow),
        trees.chain(3),
        pytest.param(trees.full(3, 2), marks=pytest.mark.slow),
        trees.EAGLE_25,
        DYNAMIC,
    ],
    ids=str,
)
def test_strict_greedy_decoding_is_the_autoregressive_sequence_on_any_tree(tiny, autoregressive, tree):
    state = tiny.generate(tree, GREEDY)
    np.testing.assert_array_equal(tokens(state), tokens(autoregressive))
    assert_complete(state)
    assert np.sum(state.stats.accepted) > 0  # or else the tree was idle


# A row is its own.


def test_a_row_is_the_same_alone_and_in_a_batch(tiny, sampled):
    for row in (0, 5):
        alone = tiny.generate(SMALL, SAMPLED, prefix=rows(tiny.prefix(8), [row]), keys=tiny.keys(8)[row : row + 1])
        np.testing.assert_array_equal(tokens(alone, 0), tokens(sampled, row))
        assert alone.stats.steps[0] == sampled.stats.steps[row]


def test_a_row_does_not_depend_on_its_neighbours(tiny, sampled):
    order = [7, 2, 11, 12, 13, 14, 15, 9]
    other = tiny.generate(SMALL, SAMPLED, prefix=rows(tiny.prefix(16), order), keys=tiny.keys(16)[np.array(order)])
    np.testing.assert_array_equal(tokens(other)[:2], tokens(sampled)[[7, 2]])
    chex.assert_trees_all_close(
        *(jax.tree.map(lambda x: x[i], s.stats) for s, i in ((other, 0), (sampled, 7))), atol=1e-5
    )
    assert not np.array_equal(tokens(other)[2:], tokens(sampled)[2:])


def test_the_key_decides(tiny, sampled):
    again = tiny.generate(SMALL, SAMPLED)
    chex.assert_trees_all_equal(again.tokens, sampled.tokens)
    same_prompt = tiny.generate(SMALL, SAMPLED, prefix=rows(tiny.prefix(8), [0] * 8))
    assert len(np.unique(tokens(same_prompt), axis=0)) == 8


def test_running_in_chunks_is_running_at_once(tiny, sampled):
    prefix, keys = tiny.prefix(8), tiny.keys(8)
    state = tiny.start(SMALL, SAMPLED, prefix=prefix, keys=keys)
    counts = [np.array(state.count)]
    while np.any(counts[-1] < 16):
        state = tiny.run(SMALL, state, SAMPLED, limit=2)
        counts.append(np.array(state.count))
    assert len(counts) > 3
    assert all(np.all((before < after) | (after == 16)) for before, after in itertools.pairwise(counts))
    np.testing.assert_array_equal(tokens(state), tokens(sampled))
    chex.assert_trees_all_close(state.stats, sampled.stats, atol=1e-5)
    finished = jax.tree.map(np.array, (state.tokens, state.stats))
    state = tiny.run(SMALL, state, SAMPLED, limit=2)
    chex.assert_trees_all_equal((state.tokens, state.stats), finished)
    # giving the state away takes nothing from whoever holds the prefix and the keys
    assert not any(x.is_deleted() for x in jax.tree.leaves((prefix, keys)))


# Prefixes of different lengths, with filler behind and holes inside.


def garbage(prefix, where):
    """The prefix with random embeddings at some of its slots, bool [R, P]."""
    noise = 3 * jax.random.normal(jax.random.key(9), prefix.embeddings.shape)
    fill = lambda x: jnp.where(jnp.asarray(where)[..., None], noise, x)
    return prefix.replace(embeddings=fill(prefix.embeddings), drafter_embeddings=fill(prefix.drafter_embeddings))


def cut(prefix, length):
    return prefix.replace(
        embeddings=prefix.embeddings[:, :length],
        drafter_embeddings=prefix.drafter_embeddings[:, :length],
        length=jnp.full_like(prefix.length, length),
    )


def test_rows_with_shorter_prefixes_give_the_tokens_that_they_give_alone(tiny):
    whole, keys, lengths = tiny.prefix(3), tiny.keys(3), np.array([5, 3, 5, 5, 3, 4])  # row 2's branches differ
    ragged = garbage(whole.replace(length=jnp.asarray(lengths, jnp.int32)), np.arange(5) >= lengths[:, None])
    for settings in (SAMPLED, GREEDY):
        together = tiny.generate(SMALL, settings, prefix=ragged, keys=keys)
        assert_complete(together)
        for row, length in ((0, 5), (1, 3)):
            alone = tiny.generate(SMALL, settings, prefix=cut(rows(whole, [row]), length), keys=keys[row : row + 1])
            np.testing.assert_array_equal(tokens(together, row), tokens(alone, 0))
            assert together.stats.steps[row] == alone.stats.steps[0]
    conditional, unconditional = (
        tiny.logits(cut(jax.tree.map(lambda x: x[i : i + 1], whole), length), together.tokens[2:, :16], None)
        for i, length in ((2, 5), (5, 4))
    )
    guided = unconditional + 2.0 * (conditional - unconditional)
    np.testing.assert_array_equal(tokens(together, 2), jnp.argmax(guided, axis=-1)[0])


def test_holes_in_a_prefix_are_seen_by_nobody(tiny):
    holes = np.zeros((16, 5), bool)
    holes[:8, :2] = holes[3, 3] = True  # the unconditional branch has none
    prefix = tiny.prefix(8).replace(holes=jnp.asarray(holes))
    seen = tiny.generate(trees.ROOT, GREEDY, prefix=prefix)
    np.testing.assert_array_equal(
        tokens(tiny.generate(trees.ROOT, GREEDY, prefix=garbage(prefix, holes))), tokens(seen)
    )
    assert not np.array_equal(tokens(seen), tokens(tiny.generate(trees.ROOT, GREEDY)))
    np.testing.assert_array_equal(tokens(tiny.generate(SMALL, GREEDY, prefix=prefix)), tokens(seen))


# Layouts.


@pytest.mark.parametrize("tree", [trees.ROOT, SMALL, DYNAMIC], ids=str)
def test_the_output_obeys_its_layout_and_forced_tokens_are_always_accepted(tiny, tree):
    forced = (-1, -1, -1, 39, -1, -1, -1, 38, *range(30, 38))
    layout = Layout(forced, free_tokens=30)
    for settings in (SAMPLED, SAMPLED.replace(temperature=3.0), GREEDY):
        state = tiny.generate(tree, settings, layout=layout)
        assert_complete(state)
        free = np.array(forced) < 0
        np.testing.assert_array_equal(tokens(state)[:, ~free], np.broadcast_to(np.array(forced)[~free], (8, 10)))
        assert np.all(tokens(state)[:, free] < 30)
        if tree.depth:
            # at most 7 steps to the last 8 tokens, each of which takes in as many as the tree is deep and one more
            assert np.all(state.stats.steps <= 7 + 8 / (tree.depth + 1))


# Compilation and transfers.


def test_new_prompts_seeds_and_thresholds_compile_nothing(tiny, sampled):
    def go(tau, budget, settings=SAMPLED, **inputs):
        state = tiny.generate(SMALL, settings, cj.cascade(tau, tau, budget, ledger="coupled"), **inputs)
        assert_complete(state)
        assert np.all(state.stats.coupled <= budget * state.stats.steps + 1e-5)
        return state

    before = generate._cache_size()
    chex.assert_trees_all_equal(tokens(go(1.01, 0.5)), tokens(sampled))  # tau > 1 is strict
    chex.assert_trees_all_equal(tokens(go(-1.0, 0.0)), tokens(sampled))  # and so is budget 0
    relaxed = go(-1.0, 0.5)
    assert np.sum(relaxed.stats.accepted) > np.sum(sampled.stats.accepted)
    assert np.sum(relaxed.stats.diverged) > 0
    go(0.3, 0.2, SAMPLED.replace(temperature=0.7, top_k=5, guidance=4.0))
    go(0.3, 0.2, prefix=rows(tiny.prefix(16), range(8, 16)), keys=tiny.keys(16)[8:])
    go(0.3, 0.2, GREEDY)
    assert generate._cache_size() == before + 1


def test_nothing_returns_to_the_host_between_prefill_and_last_token(tiny, sampled):
    state, settings, limit = tiny.start(SMALL, SAMPLED), SAMPLED.checked(), jnp.int32(100)
    program, params, rule = tiny.program(SMALL), tiny.params(SMALL), cj.strict()
    jax.block_until_ready((state, params))
    with jax.transfer_guard("disallow"):
        state = run(program, params, state, rule, settings, limit)
    np.testing.assert_array_equal(tokens(state), tokens(sampled))


@pytest.mark.parametrize("tree", [trees.ROOT, SMALL], ids=str)
def test_a_step_writes_its_caches_in_place(tiny, tree):
    state, settings = tiny.start(tree, SAMPLED), SAMPLED.checked()
    arguments = tiny.program(tree), tiny.params(tree), state, cj.strict(), settings, jnp.int32(9)
    compiled = decode.run_jit.lower(*arguments).compile().as_text()
    shapes = {x.shape for x in jax.tree.leaves((state.cache, state.drafter.cache if state.drafter else ()))}
    for shape in shapes:
        array = f"f32[{','.join(map(str, shape))}]"
        assert f"{array}{{3,2,1,0}} parameter" in compiled
        assert not [line for line in compiled.splitlines() if f"= {array}" in line and " copy(" in line]


def test_a_key_for_every_picture_is_as_good_as_one_for_all(tiny):
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(4))
    np.testing.assert_array_equal(
        jax.random.key_data(picture_keys(jax.random.key(3), np.arange(4))), jax.random.key_data(keys)
    )


def test_the_jitted_functions_are_the_ones_that_were_tested():
    for jitted, plain in (
        (decode.generate_jit, decode.generate),
        (decode.prefill_jit, decode.prefill),
        (decode.run_jit, decode.run),
        (decode.step_jit, decode.step),
    ):
        assert jitted.__wrapped__ is plain


def test_caches_are_of_the_type_that_suits_the_platform_of_the_program():
    """XLA's CPU backend converts bfloat16 caches as a whole."""
    with platforms.lowering("cuda"):
        assert platforms.cache_dtype(jnp.bfloat16) == jnp.bfloat16
    with platforms.lowering("cpu"):
        assert platforms.cache_dtype(jnp.bfloat16) == jnp.float32
        with platforms.portable():
            assert platforms.cache_dtype(jnp.bfloat16) == jnp.bfloat16
    assert platforms.cache_dtype(jnp.float32) == jnp.float32


def test_bfloat16_parameters_decode(tiny):
    state = tiny.generate(SMALL, SAMPLED, dtype=jnp.bfloat16)
    assert_complete(state)
    cache = platforms.cache_dtype(jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves((state.cache, state.drafter.cache))} == {cache}
    assert np.all((tokens(state) >= 0) & (tokens(state) < 40))
    # the first token's distribution moves by bfloat16's rounding of features and weights alone
    full, half = (
        tiny.start(SMALL, SAMPLED, dtype=dtype).drafter.features[:, 0].astype(jnp.float32)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    np.testing.assert_allclose(half, full, atol=0.1)
