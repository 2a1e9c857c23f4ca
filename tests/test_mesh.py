"""Meshes that do not fit, and memory that does not suffice: told before anything is loaded, on any machine."""

import jax
import jax.numpy as jnp
import pytest
import small
import tiny_bundles

from cascade_jax import bundle, cli, mesh, pipeline, platforms, sharding
from cascade_jax.export import artifact
from cascade_jax.models.chameleon import preset


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(small.write_bundle(tmp_path_factory.mktemp("models") / "small"))


@pytest.fixture(autouse=True)
def nothing_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bundle, "load", None)


def refused(capsys, *argv: str) -> str:
    """The one line with which the command line ends."""
    assert cli.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


BAD_MESHES = {
    "words": ("2x4", "a mesh is given as data=2,model=4, not '2x4'"),
    "nothing": ("data=0", "a mesh is given as data=2,model=4, not 'data=0'"),
    "twice": ("data=2,data=2", "the mesh 'data=2,data=2' names an axis twice"),
    "devices": ("data=40,model=40", "a mesh of data=40,model=40 needs 1600 devices, and there are "),
}


@pytest.mark.parametrize("command", ["generate", "generate-list"])
@pytest.mark.parametrize(("text", "message"), BAD_MESHES.values(), ids=BAD_MESHES)
def test_bad_meshes_are_one_line(text, message, command, model, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red ball")
    what = "a red ball" if command == "generate" else "prompts.txt"
    assert message in refused(capsys, command, what, "--model", model, "--mesh", text, "--out", "pictures")


@pytest.fixture
def imagined(monkeypatch):
    """Meshes of as many devices as anybody asks for."""
    monkeypatch.setattr(mesh, "make", lambda **sizes: jax.sharding.AbstractMesh((*sizes.values(),), (*sizes,)))


@pytest.mark.usefixtures("imagined")
def test_a_mesh_that_does_not_divide_the_model_is_told_what_would(model, capsys):
    err = refused(capsys, "generate", "a red ball", "--model", model, "--mesh", "model=4")
    assert "a mesh with model=4 does not divide 2 key-value heads, feed-forward widths of 96 and 48 and 64 codes" in err
    assert err.endswith("model can be 1, 2\n")


@pytest.mark.usefixtures("imagined")
@pytest.mark.parametrize(("where", "each"), [([], ""), (["--mesh", "model=2"], " on each of 2 devices")])
def test_too_little_memory_is_told_with_its_numbers_before_loading(where, each, model, monkeypatch, capsys):
    monkeypatch.setattr(platforms, "free_memory", lambda: 1e5)
    err = refused(capsys, "generate", "a red ball", "--model", model, *where)
    assert f"too little memory: 0.0 GB for parameters and 0.0 GB for caches{each}, and 0.0 GB are free; try" in err


def test_a_picture_more_can_be_one_too_many(model, monkeypatch):
    """With room for the parameters and the caches of three pictures."""
    config, arrays = bundle.read_config(model), bundle.stored(model)
    three = sharding.needed(config, arrays, "float32", data=1, model=1, batch=3)
    monkeypatch.setattr(platforms, "free_memory", lambda: float(sum(three.values())))
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):  # it goes on to load
        pipeline.load(model, "float32", batch=3)
    with pytest.raises(ValueError, match="too little memory"):
        pipeline.load(model, "float32", batch=4)


def test_a_7b_model_is_estimated_by_its_shapes():
    """Lumina-mGPT in bfloat16 on four devices: 13 GB of blocks, and a cache of 32 layers, 2,496 slots and two rows."""
    config = bundle.Config("chameleon", preset("lumina-mgpt-7b-768"), None, tiny_bundles.VQ)
    arrays = {f"target.{name}": leaf for name, leaf in artifact.named(bundle.abstract(config).params["target"]).items()}
    with platforms.lowering("tpu"):
        needed = sharding.needed(config, arrays, jnp.bfloat16, data=1, model=4, batch=1)
    assert needed["parameters"] == pytest.approx((6.48e9 + 65536 * 4096 + 8192 * 4096) * 2 / 4, rel=0.01)
    assert needed["caches"] == 32 * 2 * 4096 * 2496 * 2 * 2 // 4
