"""Kernels give what the functions give that they stand for; interpreted here, for they are made for GPUs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cascade_jax as cj
from cascade_jax import cache as kv
from cascade_jax import mesh, platforms, sampling, trees
from cascade_jax.cache import KV
from cascade_jax.models import transformer
from cascade_jax.models.transformer import BlockConfig
from cascade_jax.sampling import Sampling
from cascade_jax.verify import remains, verify


@pytest.fixture
def interpreted(monkeypatch):
    """Calls a function as it runs anywhere, and as programs for GPUs have it."""

    def both(function, *args):
        general = function(*args)
        with monkeypatch.context() as patched:
            patched.setattr(platforms, "by_lowering", lambda _, gpu: functools.partial(gpu, interpret=True))
            return general, function(*args)

    return both


def noise(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


ATTENTION = {
    "a token": dict(new=1, groups=1, slots=(96,)),
    "a tree, and slots that fill no block": dict(new=26, groups=1, slots=(100,), style="half"),
    "grouped queries, their norms, three segments": dict(new=5, groups=2, slots=(64, 3, 1), style="half", normed=True),
    "norms of interleaved pairs, holes": dict(new=3, groups=4, slots=(32, 17), normed=True, holes=True),
    "a window, and more query heads than a program holds": dict(new=33, groups=6, slots=(40, 5), style="half"),
    "the same, not all of them full": dict(new=17, groups=6, slots=(40,), normed=True, rms=True),
    "root-mean-square norms, six queries a key": dict(
        new=3, groups=6, slots=(32,), style="half", normed=True, rms=True
    ),
}


@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION)
def test_attention(case, interpreted):
    new, groups, style, normed = case["new"], case["groups"], case.get("style", "interleaved"), case.get("normed")
    rows, heads, size = 2, 2, 32
    variant = dict(rope=style, qk_norm=bool(normed), qk_rms=case.get("rms", False))
    config = BlockConfig(64, heads * groups, heads, size, 64, **variant)
    qkv = noise(0, rows, new, heads, groups + 2, size)
    norms = None
    if normed:
        norms = tuple(noise(i, h, size) for i, h in enumerate([heads * groups, heads * groups, heads, heads], 10))
        norms = (norms[0], None, norms[2], None) if config.qk_rms else norms
    holes = jax.random.bernoulli(jax.random.key(3), 0.5, (rows, 9)) if case.get("holes") else None
    past, biases, within = [], [], [kv.Filled(jnp.array([case["slots"][0] // 2, case["slots"][0]]), holes)]
    for i, slots in enumerate(case["slots"]):
        past.append(KV(noise(20 + i, rows, heads, size, slots), noise(30 + i, rows, heads, slots, size)))
        seen = jax.random.bernoulli(jax.random.key(i), 0.6, (1, 1, new, slots))
        biases.append(kv.bias(seen) if i else kv.filled(slots, within[0].length, holes))
    biases.append(kv.bias(kv.causal(new))[None, None])
    rope = transformer.rope_1d(jnp.arange(rows * new).reshape(rows, new), size, 1e4)
    within += [None] * (len(past) - 1)
    general, kernel = interpreted(transformer.attend, config, qkv, rope, norms, tuple(past), tuple(biases), within)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6), general, kernel)


@pytest.mark.parametrize("vocabulary", [512, 300], ids="vocabulary {}".format)
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.7, 40), (1.0, 1), (0.0, 40)])
def test_warping_and_drawing(temperature, top_k, vocabulary, interpreted):
    """With tokens that are excluded, and with ties."""
    settings = Sampling(temperature, top_k).checked()
    logits = 3 * noise(1, 2, 3, vocabulary)
    logits = logits.at[0, 0, 5:90].set(-jnp.inf).at[1, 1, 3].set(-0.0).at[1, 2].set(jnp.round(logits[1, 2]))
    gumbel = jax.random.gumbel(jax.random.key(2), logits.shape)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    close(*interpreted(sampling.warp, logits, settings))
    (probs, tokens), (own_probs, own_tokens) = interpreted(sampling.propose, logits[:, :2], gumbel, 1, settings, 3)
    close(probs, own_probs)
    np.testing.assert_array_equal(tokens, own_tokens)
    (values, tokens), (own_values, own_tokens) = interpreted(sampling.likeliest_of, logits, settings, 5)
    close(values, own_values)
    np.testing.assert_array_equal(tokens, own_tokens)


@pytest.mark.parametrize("instead", [False, True], ids=["of the law", "of what is left"])
def test_drawing_by_the_same_random_numbers(instead, interpreted):
    keys, logits = jax.random.split(jax.random.key(5), 64), 3 * noise(4, 64, 300)
    left = jnp.maximum(noise(6, 64, 300), 0.0).at[::2].set(0.0) if instead else None
    tokens, own = interpreted(sampling.draw_warped, keys, logits, Sampling(1.0, 40).checked(), left)
    np.testing.assert_array_equal(tokens, own)
    assert len(set(np.asarray(tokens).tolist())) > 20


@pytest.mark.parametrize("point_masses", [False, True], ids=["drawn", "point masses"])
def test_what_remains_after_rejections(point_masses, interpreted):
    """With a token that is none, and one that the drafter cannot have drawn."""
    probs, draft = (jax.nn.softmax(2 * noise(seed, 3, 200)) for seed in (7, 8))
    draft = draft.at[1, 5].set(0.0)
    tokens = jnp.array([[3, 9, 4, -1], [5, 6, 7, 8], [-1, -1, -1, -1]])
    general, kernel = interpreted(remains, probs, None if point_masses else draft, tokens)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), general, kernel)
    assert float(jnp.abs(general[-1][0][2] - probs[2]).max()) == 0


def test_a_verdict(interpreted):
    """Loops written out, and what remains as a kernel, against loops."""
    tree = trees.parse("0 1 2 00 01 10 000")
    size, vocabulary = tree.num_nodes, 160
    laws, logits = jax.nn.softmax(noise(11, size, vocabulary)), noise(12, size, vocabulary)
    tokens = jax.random.randint(jax.random.key(13), (size,), 0, vocabulary)
    features, rule = noise(14, size, 8), cj.cascade(0.2, 0.2, budget=0.5)

    def verdicts(keys):
        return jax.jit(jax.vmap(lambda key: verify(key, tree, tokens, laws, logits, features, rule)))(keys)

    general, kernel = interpreted(verdicts, jax.random.split(jax.random.key(15), 256))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), general, kernel)
    assert np.mean(general.accepted) > 0 and np.mean(general.nominal) > 0


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("nodes", [None, [[0, 3, 7], [0, 2, 5]]], ids=["all", "a path"])
def test_appending_to_a_cache(nodes, layers, interpreted):
    def segment(slots, seed):
        return tuple(KV(noise(seed + i, 2, 2, 32, slots), noise(seed - i - 1, 2, 2, slots, 32)) for i in range(layers))

    nodes = None if nodes is None else jnp.array(nodes)
    general, kernel = interpreted(kv.write, segment(24, 50), segment(8, 70), jnp.array([5, 16]), None, nodes)
    jax.tree.map(np.testing.assert_array_equal, general, kernel)


def test_programs_for_gpus_alone_hold_kernels():
    """Whatever machine lowers them; and not where they are to run anywhere."""
    logits, settings = jnp.zeros((2, 300)), Sampling(1.0, 40).checked()

    def kernels(platform):
        traced = jax.jit(lambda *args: sampling.warp(*args)).trace(logits, settings)
        return len(re.findall("custom_call.*triton", traced.lower(lowering_platforms=(platform,)).as_text()))

    assert {platform: kernels(platform) for platform in ("cpu", "tpu", "cuda", "rocm")} == {
        "cpu": 0, "tpu": 0, "cuda": 1, "rocm": 1,
    }  # fmt: skip
    with platforms.portable():
        assert kernels("cuda") == 0
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1, 2), (mesh.DATA, mesh.MODEL))):
        assert not platforms.kernels()
