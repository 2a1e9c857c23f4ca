"""Kernels that lie output-major: a layout alone, wherever a model goes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx

import cascade_jax as cj
from cascade_jax import bundle, methods, platforms
from cascade_jax.export import programs as export
from cascade_jax.measure import shapes
from cascade_jax.models.transformer import OutputMajor, matmul, output_major, straight, to_logits
from cascade_jax.training.data import fingerprint

TREE = cj.Tree.from_choices([[0], [1], [0, 0]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.write_bundle(tmp_path_factory.mktemp("model") / "small")


def turn_from(size, monkeypatch):
    """Lets kernels of so many numbers lie output-major, whatever platform this is."""
    own = dataclasses.replace(platforms.DEFAULTS["cpu"], output_major=size)
    monkeypatch.setitem(platforms.DEFAULTS, jax.default_backend(), own)


@pytest.fixture
def large(monkeypatch):
    turn_from(1, monkeypatch)


def kernels(model):
    leaves = jax.tree.leaves(model.params, is_leaf=lambda leaf: isinstance(leaf, OutputMajor))
    return [leaf for leaf in leaves if isinstance(leaf, OutputMajor)]


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 33])
def test_a_product_is_the_same_however_its_kernel_lies(rows):
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.normal(size=(rows, 24)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(24, 3, 5)), jnp.float32)
    turned = output_major(kernel)
    assert (turned.shape, turned.rows.shape, turned.dtype) == ((24, 3, 5), (15, 24), kernel.dtype)
    np.testing.assert_array_equal(np.asarray(turned), kernel)
    np.testing.assert_array_equal(straight(turned), kernel)
    np.testing.assert_allclose(matmul(x, turned), np.einsum("mn,nab->mab", x, kernel), rtol=1e-5, atol=1e-5)
    batched = matmul(x[None], turned)
    assert batched.shape == (1, rows, 3, 5)
    np.testing.assert_allclose(to_logits(x, turned), to_logits(x, kernel.reshape(24, 15)), rtol=1e-5, atol=1e-5)
    half = matmul(x.astype(jnp.bfloat16), turned)
    assert half.dtype == jnp.bfloat16
    gradient = jax.grad(lambda x: matmul(x, turned).sum())(x)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: matmul(x, kernel).sum())(x), rtol=1e-5, atol=1e-5)


def test_a_part_of_such_a_kernel_is_not_read_by_mistake():
    with pytest.raises(TypeError, match="straight"):
        output_major(jnp.ones((4, 4)))[0]


def test_large_kernels_of_a_model_lie_so_and_small_ones_do_not(folder, monkeypatch):
    assert not kernels(cj.load(folder))
    turn_from(small.TARGET.dim * 2 * small.TARGET.block.ffn_dim, monkeypatch)
    model = cj.load(folder)
    assert {kernel.shape for kernel in kernels(model)} == {(32, 2, small.TARGET.block.ffn_dim)}
    assert not kernels(cj.load(folder, jnp.bfloat16))  # which XLA converts first
    assert not kernels(bundle.load(folder))  # to train, to convert


@pytest.mark.slow
@pytest.mark.usefixtures("large")
def test_a_model_draws_the_same_however_its_kernels_lie(folder):
    prompts = ["a red ball on gravel", "a small blue cube on the left, on grass"]
    turned = cj.load(folder)
    plain = dataclasses.replace(bundle.load(folder), read=turned.read)
    # two layers of query-key-value, output, gate-up and down; the caption's network; the head; the drafter's own
    assert len(kernels(turned)) > 10 and not kernels(plain)
    outs = [cj.generate(m, prompts, jax.random.key(1), rule=cj.cascade(0.5, 0.3), tree=TREE) for m in (plain, turned)]
    np.testing.assert_array_equal(outs[0].tokens, outs[1].tokens)
    np.testing.assert_array_equal(outs[0].images, outs[1].images)
    scores = [cj.score(m, prompts, outs[0].tokens).logits for m in (plain, turned)]
    np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("large")
def test_a_model_is_kept_and_exported_straight(folder, tmp_path):
    turned = cj.load(folder)
    plain = dataclasses.replace(bundle.load(folder), read=turned.read)
    assert fingerprint(turned.params["target"]) == fingerprint(plain.params["target"])
    bundle.save(tmp_path / "copy", turned.config, turned.params, jnp.float32)
    again = bundle.load(tmp_path / "copy")
    states = [nnx.to_pure_dict(model.params["target"]) for model in (again, turned)]
    jax.tree.map(np.testing.assert_array_equal, states[0], straight(states[1]))
    method = methods.method("cascade", turned, tree="0 00")
    lowered = export.lower(turned, method, platforms=["cpu"], batch=1, programs=("step",))
    assert "optimization_barrier" not in lowered.programs["step"].mlir_module()


@pytest.mark.usefixtures("large")
def test_random_weights_lie_as_loaded_ones_do(monkeypatch):
    config = dataclasses.replace(
        shapes.config_of("llamagen-xl"), target=small.TARGET, drafter=small.DRAFTER, vq=small.VQ
    )
    monkeypatch.setattr(shapes, "config_of", lambda name: config)
    made = shapes.random_bundle("small")
    assert kernels(made)
    assert not kernels(dataclasses.replace(made, params={"vq": made.params["vq"]}))


CPUINFO = "processor\t: {}\nvendor_id\t: {}\nflags\t\t: fpu avx2 {}\n\n"


@pytest.mark.parametrize(
    "vendor, flag, decoding, turns",
    [
        ("AuthenticAMD", "avx512_bf16", "bfloat16", ()),
        ("GenuineIntel", "avx512_bf16", "float32", ("float32",)),  # none was at hand
        ("AuthenticAMD", "avx512f", "float32", ("float32",)),
        ("GenuineIntel", "avx512f", "float32", ("float32",)),
        (None, None, "float32", ("float32",)),  # no Linux
    ],
)
def test_what_weights_are_and_how_they_lie_follows_the_processor(vendor, flag, decoding, turns, monkeypatch):
    text = "".join(CPUINFO.format(core, vendor, flag) for core in range(2)) if vendor else ""
    own = dataclasses.replace(platforms._CPU, **platforms._processor(text))
    assert own.decoding == decoding and own.dtype == "float32"
    monkeypatch.setitem(platforms.DEFAULTS, jax.default_backend(), own)
    for dtype in ("float32", "bfloat16"):
        large, small_one = jnp.zeros((2**10, 2**10), dtype), jnp.zeros((2**10, 2**9), dtype)
        assert isinstance(bundle.laid_out(large), OutputMajor) == (dtype in turns)
        assert not isinstance(bundle.laid_out(small_one), OutputMajor)


def test_what_a_processor_decodes_with_is_what_a_model_is_loaded_as(folder, monkeypatch):
    own = dataclasses.replace(platforms.DEFAULTS["cpu"], decoding="bfloat16")
    monkeypatch.setitem(platforms.DEFAULTS, jax.default_backend(), own)
    kind = lambda model: {str(leaf.dtype) for leaf in jax.tree.leaves(model.params["target"])}
    assert kind(cj.load(folder)) == {"bfloat16"}
    assert kind(cj.load(folder, "float32")) == kind(bundle.load(folder)) == {"float32"}
