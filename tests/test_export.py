"""Programs lowered for all platforms on a machine that has one, and run from a file."""

import json
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_bundles
from PIL import Image
from small import write_bundle

from cascade_jax import bundle, cli, methods, pipeline, trees
from cascade_jax.bundle import Config
from cascade_jax.drafters.eagle import EagleConfig
from cascade_jax.export import artifact
from cascade_jax.export import programs as export
from cascade_jax.export.artifact import Artifact, ArtifactError
from cascade_jax.models import chameleon, janus, llamagen
from cascade_jax.models.vq import DS16

PROMPT = "a red ball on gravel"
TREE = "0 1 00"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_bundle(tmp_path_factory.mktemp("models") / "small"))


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    """For batches of any size."""
    path, loaded = tmp_path_factory.mktemp("artifacts") / "small.cascade", pipeline.load(model)
    method = methods.method("cascade", loaded, tree=TREE)
    artifact.write(path, loaded, method, export.lower(loaded, method, programs=("generate", "pictures")), path.parent)
    return path


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cascade", "pac"])
def test_an_artifact_draws_what_the_model_draws(name, model, file, tmp_path):
    loaded = pipeline.load(model)
    method = methods.method(name, loaded, **({"tree": TREE} if name == "cascade" else {"window": 3}))
    if name != "cascade":
        file = tmp_path / "other.cascade"
        artifact.write(file, loaded, method, export.lower(loaded, method, programs=("generate", "pictures")), tmp_path)
    prompts = [PROMPT, "a blue cone on grass"]
    want = methods.draw_numbers(loaded, method, prompts, range(2), seed=3)
    opened = Artifact(file)
    assert opened.meta["platforms"] == ["cpu", "cuda", "rocm", "tpu"]
    drawn = opened.generate(prompts, seed=3)
    np.testing.assert_array_equal(drawn.tokens, want.tokens)
    np.testing.assert_array_equal(drawn.images, want.images)
    np.testing.assert_array_equal(drawn.stats.steps, want.stats.steps)


def test_one_file_draws_batches_of_any_size_whole_and_step_by_step(model, capsys):
    """What the command draws as a batch of two, and what one of them needs alone."""
    flags = ["--model", model, "--method", "ar", "--out", "ar.cascade"]
    assert cli.main(["export", *flags, "--platforms", "cpu,tpu"]) == 0
    assert "ar for cpu, tpu" in capsys.readouterr().out
    prompts = ["a blue cone on grass", PROMPT]
    assert cli.main(["run-exported", "ar.cascade", *prompts, "--seed", "5", "--out", "two"]) == 0
    assert [line.split("  ")[1] for line in capsys.readouterr().out.splitlines()] == ["15 steps, alpha 0.00"] * 2
    opened = Artifact(pathlib.Path("ar.cascade"))
    assert opened.meta["batch"] is None
    drawn = opened.generate(prompts, seed=5)
    np.testing.assert_array_equal(np.asarray(Image.open("two/a-red-ball-on-gravel-1.png")), drawn.images[1])
    read, rule, sampling = (opened.arrays[name] for name in ("parameters", "rule", "sampling"))
    second = opened.prompts(opened.encode(prompts[1:]))
    state = opened.program("start")(read, second, jnp.uint32(5), jnp.ones(1, jnp.int32), sampling)
    while int(state["count"][0]) < 16:
        state = opened.program("step")(read, state, rule, sampling)
    np.testing.assert_array_equal(state["tokens"][0, :16], drawn.tokens[1])


@pytest.mark.slow
def test_a_model_that_reads_text_tokens_takes_shorter_prompts(tmp_path):
    made = tiny_bundles.bundle("chameleon")
    method, prompts = methods.method("ar", made), tiny_bundles.prompts("chameleon", 2)
    lowered = export.lower(made, method, batch=2, slots=40, programs=("generate", "pictures"))
    artifact.write(tmp_path / "x", made, method, lowered, tmp_path)
    opened = Artifact(tmp_path / "x")
    want = pipeline.generate(made, prompts, jax.random.key(0), method.rule, method.tree)
    np.testing.assert_array_equal(opened.generate(prompts, seed=0).tokens, want.tokens)
    with pytest.raises(ArtifactError, match="draws 2 pictures at once, not 1"):
        opened.generate(prompts[:1], seed=0)
    with pytest.raises(ArtifactError, match=r"a prompt has 53 tokens and .* takes 40: export it with more --slots"):
        opened.generate([bundle.Prompt(ids=np.full(50, 7))] * 2, seed=0)


LARGE = {
    "llamagen": llamagen.preset("7B"),
    "chameleon": chameleon.preset("lumina-mgpt-7b-768"),
    "janus": janus.preset("7B"),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", LARGE)
def test_7b_models_lower_for_every_platform_by_shape_alone(family):
    target = LARGE[family]
    config = Config(family, target, EagleConfig(target.block), DS16, sampling={"top_k": 2000, "guidance": 3.0})
    model = bundle.abstract(config, jnp.bfloat16)
    method = methods.Method("eagle", methods.acceptance.strict(), trees.parse("0 1"))
    lowered = export.lower(model, method, batch=1, programs=("generate",))
    (program,) = lowered.programs.values()
    assert program.platforms == export.PLATFORMS
    assert sum(leaf.size for leaf in lowered.arrays["parameters"].values()) > 6e9
    assert "callback" not in program.mlir_module()


def test_a_kernel_that_one_platform_has_is_refused():
    """Calls of the host are refused by `jax.export` already."""
    solved = jax.export.export(jax.jit(jnp.linalg.cholesky), platforms=["cpu"])
    with pytest.raises(ArtifactError, match=r"needs what not every platform has: lapack"):
        export.check_portable(solved(jax.ShapeDtypeStruct((2, 2), jnp.float32)))


def altered(file, tmp_path, **changes):
    """A copy with another meta.json."""
    copy = tmp_path / "altered.cascade"
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, json.dumps(json.loads(content) | changes) if name == "meta.json" else content)
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 0}, "has the format 0 and this version reads 1: export it again"),
        ({"platforms": ["tpu"]}, "is for tpu and this machine has cpu: export it with --platforms tpu,cpu"),
    ],
)
def test_another_version_or_platform_is_one_line(changes, message, file, tmp_path, capsys):
    assert cli.main(["run-exported", str(altered(file, tmp_path, **changes)), PROMPT]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


def test_a_program_that_this_jax_cannot_read_is_one_line(file, tmp_path, capsys):
    copy = tmp_path / "newer.cascade"
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"\x00" * 64 if name == "programs/generate" else old.read(name))
    assert cli.main(["run-exported", str(copy), PROMPT]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "cannot read: export it again" in err


BAD = {
    "platform": (["export", "--platforms", "cpu,npu", "--out", "x"], "unknown platform 'npu'; known: cpu, cuda"),
    "no out": (["export", "--platforms", "cpu", "--out", "/proc/x/y"], "cannot write to /proc/x"),
    "batch": (["export", "--batch", "0", "--out", "x"], "batch must be at least 1"),
    "another's setting": (["export", "--group", "9", "--out", "x"], "cascade does not take group"),
    "no artifact": (["run-exported", "nowhere", PROMPT], "there is no artifact nowhere"),
    "no zip": (["run-exported", __file__, PROMPT], "is damaged, or no artifact"),
}


@pytest.mark.parametrize(("argv", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(argv, message, model, capsys, tmp_path):
    argv = [*argv, "--model", model] if argv[0] == "export" else argv
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert list((tmp_path / "here").iterdir()) == []
