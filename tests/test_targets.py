"""A target of one's own, two functions over a cache, goes through the loop that draws by all others."""

import dataclasses
import functools
import pathlib
import re
from typing import Protocol

import chains
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_bundles
from flax import nnx, struct

import cascade_jax as cj
from cascade_jax import cache as kv
from cascade_jax import decode, mesh, targets, trees
from cascade_jax.cache import Context
from cascade_jax.draft import Draft
from cascade_jax.drafters.eagle import Eagle1, EagleConfig
from cascade_jax.drafters.jacobi import Jacobi
from cascade_jax.models.transformer import BlockConfig
from cascade_jax.sampling import Layout, Sampling

VOCAB = 3
CHAIN = chains.Chain(VOCAB, seed=1)
LOOKS = []  # of `forward`, when a program is traced
TABLES = {"table": CHAIN.table[...], "habit": CHAIN.habit[...]}


def forward(params, cache, tokens, positions, mask):
    """`chains.Chain`: logits by the last token, and by how often each has come, which the cache counts."""
    LOOKS.append(tokens.shape)
    here = jax.nn.one_hot(tokens, len(params["table"]))
    seen = cache["seen"] + mask.astype(jnp.float32) @ here
    logits = here @ params["table"] + seen @ params["habit"]
    return logits, jnp.concatenate([here, seen], axis=-1), here


def commit(cache, fresh, path, length):
    kept = jnp.where((path >= 0)[:, None], fresh[path], 0.0)
    return {"seen": cache["seen"] + jnp.sum(kept, axis=0), "length": length + jnp.sum(path >= 0)}


def empty(slots):
    return {"seen": jnp.zeros(VOCAB), "length": jnp.int32(0)}


def head(params, features):
    return features @ jnp.concatenate([params["table"], params["habit"]])


def embed(params, tokens):
    return jax.nn.one_hot(tokens, 2 * VOCAB)


TARGET = cj.Target(TABLES, forward, commit, empty, embed=embed, head=head)


def drawn_law(length, count, **settings):
    """How often each output came, [V] * length."""
    tokens = cj.generate(TARGET, np.zeros((count, 1), int), jax.random.key(0), length=length, **settings).tokens
    return np.bincount(tokens @ VOCAB ** np.arange(length)[::-1], minlength=VOCAB**length)


CASES = {
    "several candidates": dict(tree=trees.window(2, 2)),
    "afresh": dict(tree=trees.chain(3), drafter=Jacobi("repeat")),
    "from the leaves": dict(tree=trees.chain(2), verifier="traversal"),
    "warped": dict(tree=trees.window(3, 2), sampling=Sampling(temperature=0.8, top_k=2)),
    "token by token": dict(tree=trees.ROOT),
}


@pytest.mark.parametrize(
    "name", [name if name == "several candidates" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_the_output_has_the_targets_law(name):
    """All 81 outputs of 4 tokens."""
    counts = drawn_law(4, 20_000, **CASES[name])
    law = chains.law(CHAIN, 4, CASES[name].get("sampling", Sampling()))
    assert chains.pvalue(counts, law) > 1e-3


@pytest.mark.slow
def test_a_module_and_the_same_target_made_of_functions_draw_the_same():
    """Under the same keys, by self-speculation: there is one loop."""
    tree, drafter, keys = trees.window(3, 2), Jacobi(coupled=True), jax.random.split(jax.random.key(1), 16)
    program = decode.Program(nnx.graphdef(CHAIN), nnx.graphdef(drafter), tree, length=12)
    params = {"target": nnx.state(CHAIN), "drafter": nnx.state(drafter)}
    x = jnp.broadcast_to(CHAIN.embed(jnp.int32(0)), (16, 1, 2 * VOCAB))
    prefix = decode.Prefix(x, x, jnp.ones(16, jnp.int32))
    state = decode.generate_jit(program, params, prefix, keys, cj.strict(), Sampling().checked())
    drawn = cj.generate(TARGET, np.zeros((16, 1), int), keys, tree=tree, length=12)
    np.testing.assert_array_equal(drawn.tokens, state.tokens[:, :12])
    np.testing.assert_array_equal(drawn.stats.steps, state.stats.steps)
    assert drawn.images is None and drawn.texts is None


def test_drawing_again_compiles_nothing():
    """Other parameters, keys, prefixes and settings are data; functions are looked at when a program is traced."""
    first = dataclasses.replace(TARGET, length=5)
    cj.generate(first, [[0], [1]], 0)
    before = len(LOOKS)
    cj.generate(first, [[2, 1, 1], [0]], 1)
    assert len(LOOKS) == before
    again = dataclasses.replace(first, params=jax.tree.map(lambda x: 2 * x, TABLES))
    cj.generate(again, [[0], [0]], 0, sampling=Sampling(temperature=0.5))
    assert LOOKS[before:] == [(2,)]  # what is new is looked at once, at two tokens, by shapes alone


# Whatever draws, draws from it.


@struct.dataclass
class Root:
    """What the next tree is behind.

    Attributes:
      token: int [B].
    """

    token: jax.Array = mesh.by_sequence()


class Sorted(nnx.Module):
    """A drafter of one's own, without parameters: on any tree, siblings are the tokens from 0 on."""

    memory, taps, reads_laws = Root, (), False

    def start(self, target, tree, prefix, features, first, slots, layout=None):
        return Root(first)

    def propose(self, target, tree, memory, keys, sampling, position, layout=None, noise=None):
        ranks = jnp.array([0] + [path[-1] for path in tree.paths[1:]])
        tokens = jnp.broadcast_to(ranks, (len(memory.token), len(ranks))).at[:, 0].set(memory.token)
        return Draft(tokens, None, None), memory

    def observe(self, target, memory, outcome):
        last = jnp.maximum(outcome.kept - 1, 0)[:, None]
        return Root(jnp.take_along_axis(outcome.emitted, last, axis=1)[:, 0])


def eagle():
    """An EAGLE-1 drafter of random weights for the chain, in its own embedding of the tokens."""
    return Eagle1(EagleConfig(BlockConfig(2 * VOCAB, 1, 1, 6, 8, input_norm=False)), rngs=nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drafter", "tree"),
    [
        (None, trees.window(4, 2)),
        (Sorted(), trees.full(2, 2)),
        (eagle(), trees.parse("0 1 00 01")),
        (eagle(), trees.DynamicTree(top_k=2, rounds=1, drafts=4)),
    ],
    ids=["its own guesses", "a drafter of one's own", "EAGLE", "EAGLE, dynamic"],
)
def test_any_drafter_draws_the_picture_of_token_by_token_decoding(drafter, tree):
    prefixes, draw = [[0], [1, 2, 2, 0]], functools.partial(cj.generate, TARGET, length=10, rule=cj.exact())
    drawn = draw(prefixes, 3, tree=tree, drafter=drafter)
    np.testing.assert_array_equal(drawn.tokens, draw(prefixes, 3, tree=trees.ROOT).tokens)
    assert drawn.stats.accepted.sum() > 0


@pytest.mark.slow
def test_relaxed_rules_compare_its_features():
    """Features that are the tokens themselves: children that repeat their parent's token count as converging."""
    draw = functools.partial(cj.generate, TARGET, np.zeros((64, 1), int), 0, length=10, tree=trees.window(3, 2))
    relaxed = draw(rule=cj.cascade(tau_pos=0.5, tau_seq=0.5, budget=0.9))
    assert relaxed.stats.nominal.sum() > 0
    assert draw(rule=cj.cascade(tau_pos=1.1, tau_seq=1.1, budget=0.9)).stats.nominal.sum() == 0
    assert draw(rule=cj.grouped(2)).stats.divergence.sum() > 0


@pytest.mark.slow
def test_a_row_depends_on_its_own_prefix_and_key_alone():
    keys = jax.random.split(jax.random.key(0), 2)
    prefixes = [[1, 2], [2] * 40]  # the last is a longer prefill
    together = cj.generate(TARGET, prefixes, keys, length=9, tree=trees.window(3, 2)).tokens
    for row, prefix in enumerate(prefixes):
        alone = cj.generate(TARGET, prefix, keys[row : row + 1], length=9, tree=trees.window(3, 2)).tokens
        np.testing.assert_array_equal(alone[0], together[row])


# A built-in family as functions.

FAMILY = "classes"
CODES = tiny_bundles.VARIANTS[FAMILY].vocab_size  # prefix tokens from here on are class labels


def as_functions(bundle):
    """A class-conditional LlamaGen, with the engine's own cache of keys and values as the opaque one."""
    graph, config = bundle.graph("target"), bundle.config.target

    def taken_in(module, tokens):
        codes, labels = jnp.clip(tokens, 0, CODES - 1), jnp.clip(tokens - CODES, 0, config.classes)
        return jnp.where((tokens < CODES)[..., None], module.embed(codes), module.label[...][labels])

    def forward(params, cache, tokens, positions, mask):
        module, filled = nnx.merge(graph, params), positions[:1]
        bias = kv.bias(mask)[None, None], (kv.filled(kv.slots(cache), filled),)
        context = Context(module.rope(positions[None]), *bias, (kv.Filled(filled),))
        features, fresh = module(taken_in(module, tokens)[None], context, (cache,))
        return module.logits(features)[0], features[0], fresh

    def commit(cache, fresh, path, length):
        return kv.write(cache, fresh, length[None], nodes=jnp.maximum(path, 0)[None])

    def room(slots):
        block = config.block
        shape = 1, block.kv_heads, slots, block.head_dim
        layer = kv.KV(jnp.zeros((*shape[:2], shape[3], slots)), jnp.zeros(shape))
        return (layer,) * config.layers

    embed = lambda params, tokens: taken_in(nnx.merge(graph, params), tokens)
    head = lambda params, features: nnx.merge(graph, params).logits(features)
    return cj.Target(bundle.params["target"], forward, commit, room, embed=embed, head=head, pictures=bundle)


class Unlabelled:
    def unconditional(self, prefix):
        return [CODES + tiny_bundles.VARIANTS[FAMILY].classes]


@pytest.mark.slow
@pytest.mark.parametrize(("drafter", "guidance"), [("EAGLE", 2.0), ("itself", None)])
def test_a_family_as_functions_draws_the_familys_pictures(drafter, guidance):
    bundle = tiny_bundles.bundle(FAMILY)
    own = dataclasses.replace(as_functions(bundle), guidance=Unlabelled(), length=bundle.length)
    drafter, tree = (
        (bundle.merged("drafter"), trees.parse("0 1 00")) if drafter == "EAGLE" else (None, trees.window(4, 2))
    )
    settings = dict(sampling=Sampling(temperature=0.9, top_k=20, guidance=guidance), tree=tree, rule=cj.exact())
    prompts = tiny_bundles.prompts(FAMILY, 2)
    want = cj.generate(bundle, prompts, 0, drafter=None if drafter else Jacobi(coupled=True), **settings)
    got = cj.generate(own, [[CODES + int(prompt.ids)] for prompt in prompts], 0, drafter=drafter, **settings)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.images, want.images)
    np.testing.assert_array_equal(got.stats.steps, want.stats.steps)


# Capabilities.


class Letters:
    def encode(self, text):
        return ["abc".index(letter) for letter in text]

    def decode(self, tokens):
        return "".join("abc"[token] for token in tokens)


class Empty:
    def unconditional(self, prefix):
        return [0]


def test_texts_are_read_and_written():
    target = dataclasses.replace(TARGET, text=Letters(), length=5)
    drawn = cj.generate(target, ["ab", "c"], 0)
    assert [list(text) for text in drawn.texts] == [["abc"[token] for token in row] for row in drawn.tokens]
    np.testing.assert_array_equal(drawn.tokens, cj.generate(TARGET, [[0, 1], [2]], 0, length=5).tokens)
    assert [list(row) for row in target.encode("ab")] == [[0, 1]]


@pytest.mark.slow
def test_a_layout_forces_tokens_and_guidance_joins_branches():
    layout = Layout((-1, 3, -1, 0), free_tokens=2)
    target = dataclasses.replace(TARGET, layout=layout, guidance=Empty(), length=4)
    for tree in (trees.ROOT, trees.window(2, 2)):
        tokens = cj.generate(target, np.full((64, 1), 2), 0, tree=tree, sampling=Sampling(guidance=1.5)).tokens
        assert set(tokens[:, 1]) == {3} and set(tokens[:, 3]) == {0}
        assert set(tokens[:, [0, 2]].ravel()) == {0, 1}


@pytest.mark.slow
def test_guidance_has_the_law_of_the_guided_logits():
    """Branches that read different prefixes, of different lengths."""
    target = dataclasses.replace(TARGET, guidance=Empty())
    settings = dict(length=1, sampling=Sampling(guidance=1.5), tree=trees.ROOT)
    counts = np.bincount(
        cj.generate(target, [[1, 2, 1]] * 20_000, jax.random.key(0), **settings).tokens[:, 0], minlength=3
    )
    logits = [
        np.asarray(TABLES["table"])[x[-1]] + np.bincount(x, minlength=3) @ np.asarray(TABLES["habit"])
        for x in ([1, 2, 1], [0])
    ]
    guided = logits[1] + 1.5 * (logits[0] - logits[1])
    assert chains.pvalue(counts, np.exp(guided) / np.exp(guided).sum()) > 1e-3


@pytest.mark.slow
def test_the_page_on_targets_says_what_is_so():
    page = pathlib.Path(__file__).parents[1] / "docs" / "targets.md"
    running = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S):
        exec(compile(block, page.name, "exec"), running)
    for name in re.findall(r"^\| `\w+` \| `(\w+)` \|", page.read_text(encoding="utf-8"), flags=re.M):
        assert issubclass(getattr(targets, name), Protocol)


# What is wrong is said once, before anything is compiled, with both shapes.


def wrong(forward=forward, commit=commit, error=ValueError, **given):
    with pytest.raises(error) as caught:
        cj.generate(cj.Target(TABLES, forward, commit, empty), [0], 0, **({"length": 4} | given))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_wrong_shapes_are_told_with_the_right_ones():
    def returning(change):
        return lambda *given: change(*forward(*given))

    assert wrong(returning(lambda logits, *rest: (logits[:1], *rest))) == (
        "forward returned logits of shape (1, 3) for 2 tokens, and (2, V) is needed"
    )
    assert wrong(returning(lambda logits, features, fresh: (logits, features[0], fresh))) == (
        "forward returned features of shape (6,) for 2 tokens, and (2, h) is needed"
    )
    assert "(logits, features, fresh), not 2 things" in wrong(returning(lambda *made: made[:2]), error=TypeError)
    assert wrong(lambda params, *_: params["table"], error=TypeError).startswith("forward returns (logits")

    def taken(change):
        return lambda *given: change(commit(*given))

    assert wrong(commit=taken(lambda cache: cache["seen"])).startswith(
        "commit returned a cache of structure PyTreeDef(*)"
    )
    assert wrong(commit=taken(lambda cache: cache | {"seen": cache["seen"][None]})) == (
        "commit returned cache['seen'] as float32(1, 3), and was given float32(3,)"
    )
    assert wrong(commit=taken(lambda cache: cache | {"length": cache["length"] + 0.5})) == (
        "commit returned cache['length'] as float32(), and was given int32()"
    )


def test_what_holds_for_two_tokens_alone_is_found_where_the_prefix_is_read():
    fixed = lambda *given: (forward(*given)[0][:2], *forward(*given)[1:])
    assert wrong(fixed) == "forward returned logits of shape (2, 3) for 32 tokens, and (32, 3) is needed"


def test_what_a_target_lacks_is_named():
    lacking = cj.Target(TABLES, forward, commit, empty, length=4)
    for error, said, given in [
        (ValueError, "length says how many tokens", dict(length=0)),
        (ValueError, "has no guidance", dict(sampling=Sampling(guidance=2.0))),
        (TypeError, "borrows the target's embed", dict(drafter=eagle())),
        (ValueError, "drafts a window", dict(tree=trees.EAGLE_25)),
        (ValueError, "gumbel noise draws", dict(rule=cj.grouped(2), noise="gumbel")),
    ]:
        with pytest.raises(error, match=said):
            cj.generate(lacking, [0], 0, **given)
    for error, said, prefix in [
        (TypeError, "reads no text", "ab"),
        (ValueError, "there is no prefix", []),
        (ValueError, "at least one token", [[0], []]),
        (ValueError, "not float64", [0.5]),
    ]:
        with pytest.raises(error, match=said):
            cj.generate(lacking, prefix, 0)
    with pytest.raises(TypeError, match="scored by its own forward"):
        cj.score(lacking, [[0]], [[1]])
    with pytest.raises(TypeError, match="lacks one of decode, encode"):
        dataclasses.replace(lacking, text=Empty())


def test_a_picture_has_the_length_of_its_model():
    bundle = tiny_bundles.bundle(FAMILY)
    with pytest.raises(ValueError, match="has 16 tokens, not 8"):
        cj.generate(bundle, tiny_bundles.prompts(FAMILY, 1), 0, length=8)
