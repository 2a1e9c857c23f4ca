"""Converted checkpoints compute what the public code computes.

Reference outputs lie in tests/golden and come from the public repositories (see the README there), run once on the
weights of `published`. Tolerance: 1e-4 on logits, features and pixels of order one, for float32 sums in another order.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from flax import nnx

import cascade_jax as cj
from cascade_jax import bundle, decode
from cascade_jax import cache as kv
from cascade_jax.cache import Context
from checkpoints_convert import convert, eagle, llamagen, sources, table
from checkpoints_convert.convert import planned
from checkpoints_convert.formats import Known

GOLDEN = pathlib.Path(__file__).parent / "golden"
FAST = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def golden():
    return {name: np.load(GOLDEN / f"{name}.npz") for name in ("llamagen", "lantern", "vq", "eagle3")}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Bundles by name, converted from files as they are published."""
    home = tmp_path_factory.mktemp("checkpoints")
    vq = published.write_pickle(home / "vq_ds16_t2i.pt", published.vq(), "model")
    sources = {
        "t2i": published.write_pickle(home / "t2i_XL_stage1_256.pt", published.llamagen(), "model", steps=1),
        "c2i": published.write_pickle(home / "c2i_B_256.pt", published.llamagen(classes=True), "state_dict"),
        "hf": published.write_folder(
            home / "LlamaGen-T2I", published.llamagen_hf(), published.LLAMAGEN_HF_SETTINGS, shards=2
        ),
    }
    drafter = published.write_folder(home / "drafter", published.drafter(), published.DRAFTER_SETTINGS, pickled=True)
    loaded = {}
    for name, source in sources.items():
        convert("llamagen", [source, vq, *([drafter] if name == "t2i" else [])], home / name, pixels=64)
        loaded[name] = cj.load(home / name)
    return loaded


def _prompts(golden, name):
    if name == "c2i":
        return [cj.Prompt(ids=jnp.int32(label)) for label in golden["llamagen"]["labels"]]
    given = golden["llamagen"]
    return [cj.Prompt(features=jnp.asarray(f), mask=jnp.asarray(m)) for f, m in zip(given["features"], given["mask"])]


def _expected(golden, name):
    source, prefix = (golden["lantern"], "hf") if name == "hf" else (golden["llamagen"], name)
    return source[f"{prefix}_logits"], source[f"{prefix}_features"]


def _rows(golden):
    return jnp.asarray(np.concatenate([golden["llamagen"]["tokens"]] * 2))


@pytest.mark.parametrize("name", ["t2i", "c2i", "hf"])
def test_both_branches_of_llamagen_agree_with_the_public_code(name, bundles, golden):
    prefix, tokens = bundles[name].prefix(_prompts(golden, name), guided=True), _rows(golden)
    graph, state = nnx.split(bundles[name].merged("target"))
    found_features, found_logits = _forced(graph, state, prefix, tokens)
    logits, features = _expected(golden, name)
    np.testing.assert_allclose(found_features, features, atol=1e-4)
    np.testing.assert_allclose(found_logits, logits, atol=1e-4)


def test_bfloat16_stays_within_its_rounding(bundles, golden):
    """bfloat16 keeps 8 bits, so the roundings of two layers leave logits off by some 2/2**8 of their own size; the
    worst of 4,096 such errors is several times as large. A wrong operation is off by the size itself."""
    graph, state = nnx.split(bundles["t2i"].merged("target"))
    rough = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)
    prefix, tokens = bundles["t2i"].prefix(_prompts(golden, "t2i"), guided=True), _rows(golden)
    prefix = prefix.replace(embeddings=prefix.embeddings.astype(jnp.bfloat16))
    logits = _expected(golden, "t2i")[0]
    error = np.abs(np.asarray(_forced(graph, rough, prefix, tokens)[1]) - logits) / logits.std()
    assert error.mean() < 3 / 2**8
    assert error.max() < 16 / 2**8


def test_a_class_conditional_model_reads_class_numbers(bundles):
    config = bundles["c2i"].config
    assert (config.text, config.target.classes, config.sampling["guidance"]) == ("class", published.CLASSES, 4.0)
    assert [int(prompt.ids) for prompt in bundles["c2i"].encode(["3", "0"])] == [3, 0]
    with pytest.raises(ValueError, match="0 to 4"):
        bundles["c2i"].encode(["a cat"])


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def _forced(graph, state, prefix, tokens):
    target = nnx.merge(graph, state)
    features = decode.at_tokens(decode.teacher_forced(target, prefix, tokens), prefix, tokens.shape[1])
    return features, target.logits(features)


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def _pass(graph, state, cache, lengths, depths, tokens, seen, holes):
    target = nnx.merge(graph, state)
    past = kv.filled(kv.slots(cache), lengths, holes)
    context = Context(target.rope(lengths[:, None] + depths), kv.bias(seen)[None, None], (past,))
    features, fresh = target(target.embed(tokens), context, (cache,))
    return target.logits(features), fresh


def _prefilled(bundle, prefix, room):
    program = bundle.program(cj.trees.ROOT)
    keys, sampling = jax.random.split(jax.random.key(0), 2), cj.Sampling(guidance=3.0).checked()
    state = decode.prefill_jit(program, bundle.decoding_params(program), prefix, keys, sampling)
    assert kv.slots(state.cache) >= prefix.embeddings.shape[1] + room
    return program.target, bundle.params["target"], state


@pytest.mark.parametrize("name", ["t2i", "c2i"])
def test_logits_agree_step_by_step_through_the_cache(name, bundles, golden):
    prefix, tokens = bundles[name].prefix(_prompts(golden, name), guided=True), _rows(golden)
    graph, params, state = _prefilled(bundles[name], prefix, tokens.shape[1])
    cache, lengths, expected = state.cache, state.length, _expected(golden, name)[0]
    for t in range(6):
        args = jnp.zeros((1, 1), int), tokens[:, t : t + 1], jnp.ones((1, 1), bool), prefix.holes
        logits, fresh = _pass(graph, params, cache, lengths, *args)
        np.testing.assert_allclose(logits[:, 0], expected[:, t + 1], atol=1e-4)
        cache, lengths = kv.write(cache, fresh, lengths), lengths + 1


def test_logits_agree_through_a_tree(bundles, golden):
    """The right tokens as one path of a tree, with wrong ones beside them."""
    prefix, tokens = bundles["t2i"].prefix(_prompts(golden, "t2i"), guided=True), _rows(golden)
    graph, params, state = _prefilled(bundles["t2i"], prefix, 8)
    tree = cj.Tree.from_choices([[0], [1], [0, 0], [1, 0], [1, 1], [1, 1, 0]])
    nodes = tree.topology
    path = [0, 2, 5, 6]  # second child of the root, its second child, and the child of that
    drafts = jnp.full((len(tokens), tree.num_nodes), 7).at[:, path].set(tokens[:, : len(path)])
    args = jnp.asarray(nodes.depths)[None], drafts, jnp.asarray(nodes.ancestors), prefix.holes
    logits, _ = _pass(graph, params, state.cache, state.length, *args)
    np.testing.assert_allclose(logits[:, path], _expected(golden, "t2i")[0][:, 1 : len(path) + 1], atol=1e-4)


def test_greedy_decoding_draws_the_public_codes_tokens_with_and_without_drafts(bundles, golden):
    settings = cj.Sampling(temperature=0.0, guidance=3.0)
    for tree in (cj.trees.ROOT, cj.trees.chain(2)):
        drawn = cj.generate(bundles["t2i"], _prompts(golden, "t2i"), jax.random.key(0), tree=tree, sampling=settings)
        np.testing.assert_array_equal(drawn.tokens, golden["llamagen"]["t2i_greedy"])
    assert drawn.images.shape == (2, 64, 64, 3)


def test_the_drafter_agrees_with_lanterns(bundles, golden):
    drafter = bundles["t2i"].merged("drafter")
    given, tokens = golden["llamagen"], np.concatenate([golden["llamagen"]["tokens"]] * 2)
    features = np.concatenate([given["t2i_prefix_features"], given["t2i_features"][:, 1:]], axis=1)
    slots = features.shape[1]
    ids = np.concatenate([np.zeros((len(tokens), published.SLOTS - 1), int), tokens], axis=1)
    context = Context(
        drafter.rope(jnp.broadcast_to(jnp.arange(slots), ids.shape)), kv.bias(kv.causal(slots))[None, None]
    )
    embeddings = drafter.embed(jnp.asarray(ids), bundles["t2i"].merged("target"))
    hidden, _ = jax.jit(lambda x, f: drafter(x, f, context))(embeddings, features)
    np.testing.assert_allclose(hidden, golden["lantern"]["drafter_hidden"], atol=1e-4)


def test_eagle3s_module_agrees_with_the_public_code(bundles, golden, tmp_path):
    folder = published.write_folder(tmp_path / "eagle3", published.eagle3(), published.EAGLE3_SETTINGS)
    part = planned(eagle.EAGLE3, sources.open_source(folder), Known({"target": bundles["t2i"].config.target}))
    drafter = _module(part)
    expected = golden["eagle3"]
    embeddings = published.tensor("embed_tokens.weight", published.CODES, published.DIM)[expected["ids"]]
    slots = embeddings.shape[1]
    positions = jnp.broadcast_to(jnp.arange(slots), embeddings.shape[:2])
    context = Context(drafter.rope(positions), kv.bias(kv.causal(slots))[None, None])

    def run(embeddings, features):
        hidden, _ = drafter(embeddings, drafter.fuse(features), context)
        return hidden, drafter.logits(hidden, None)

    hidden, logits = jax.jit(run)(embeddings, expected["features"])
    np.testing.assert_allclose(hidden, expected["hidden"], atol=1e-4)
    drawn = published.eagle3()["t2d"]
    np.testing.assert_allclose(logits[..., drawn], expected["logits"], atol=1e-4)
    assert np.all(np.asarray(logits)[..., ~drawn] == -np.inf)


def _module(part):
    """A planned part's parameters, in its module."""
    graph, state = bundle.skeleton(part.format.part, part.config)
    flat = {tuple(path.split(".")): jnp.asarray(table.make(s, part.source.tensors)) for path, s in part.steps.items()}
    nnx.replace_by_pure_dict(state, bundle.restored_keys(bundle.nested(flat)))
    return nnx.merge(graph, state)


@pytest.mark.parametrize(("name", "multipliers"), [("ds16", (1, 1, 2, 2, 4)), ("ds8", (1, 2, 2, 4))])
def test_the_vq_encodes_and_decodes_like_the_public_code(name, multipliers, tmp_path, golden):
    file = published.write_pickle(tmp_path / f"vq_{name}.pt", published.vq(multipliers), "model")
    part = planned(llamagen.VQ, sources.open_source(file), Known({}))
    graph, state = nnx.split(_module(part))
    size = part.config.downsampling
    images = np.random.default_rng(1).uniform(-1, 1, (2, 3 * size, 2 * size, 3)).astype(np.float32)
    expected = {key: golden["vq"][f"{name}_{key}"] for key in ("latents", "codes", "given", "decoded")}
    run = jax.jit(
        lambda state, images, codes: (
            (m := nnx.merge(graph, state)).latents(images),
            m.encode_codes(images),
            m.decode(m.codebook()[codes]),
        )
    )
    latents, codes, decoded = run(state, images, expected["given"])
    np.testing.assert_allclose(latents, expected["latents"], atol=1e-4)
    np.testing.assert_array_equal(codes, expected["codes"])
    np.testing.assert_allclose(decoded, expected["decoded"], atol=1e-4)


def test_captions_are_cleaned_as_in_training():
    from cascade_jax.text.t5 import clean

    for caption, cleaned in json.loads((GOLDEN / "captions.json").read_text()):
        assert clean(caption) == cleaned
