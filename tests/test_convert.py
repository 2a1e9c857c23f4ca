"""The converter: what it makes of files, good and bad, and what the commands around it do."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

import cascade_jax as cj
from cascade_jax import bundle, cli
from cascade_jax.models import llamagen as model
from checkpoints_convert import ConvertError, convert, llamagen, sources, table, transforms
from checkpoints_convert.convert import planned
from checkpoints_convert.formats import Known

KNOWN = Known({}, pixels=64)


def _planned(path: pathlib.Path):
    return planned(llamagen.ORIGINAL, sources.open_source(path), KNOWN)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """Everything that is published for LlamaGen, small."""
    home = tmp_path_factory.mktemp("downloads")
    published.write_pickle(home / "t2i_XL_stage1_256.pt", published.llamagen(), "model", steps=3)
    published.write_pickle(home / "vq_ds16_t2i.pt", published.vq(), "model")
    published.write_folder(home / "llamagen_drafter", published.drafter(), published.DRAFTER_SETTINGS, pickled=True)
    published.write_folder(home / "flan-t5-xl", published.t5(), published.T5_SETTINGS, shards=2)
    published.write_tokenizer(home / "flan-t5-xl" / "tokenizer.json")
    return home


@pytest.fixture(scope="module")
def converted(downloads, tmp_path_factory):
    """README's command."""
    model = tmp_path_factory.mktemp("models") / "llamagen"
    files = [downloads / name for name in ("t2i_XL_stage1_256.pt", "vq_ds16_t2i.pt", "flan-t5-xl", "llamagen_drafter")]
    assert cli.main(["convert", "llamagen", *map(str, files), str(model), "--pixels", "64"]) == 0
    return model


@pytest.mark.slow
def test_a_prompt_becomes_a_picture_by_every_method(converted, capsys):
    tokens = {}
    for method, more in (("ar", []), ("eagle", ["--tree", "chain:2"]), ("cascade", ["--tree", "chain:2"])):
        argv = ["generate", "a red ball on gravel", "--model", str(converted), "--method", method, *more]
        assert cli.main([*argv, "--temperature", "0", "--json", "--out", f"{method}.png"]) == 0
        tokens[method] = pathlib.Path(f"{method}.png").read_bytes()
        report = json.loads(capsys.readouterr().out)
        assert report["sampling"] == {"temperature": 0.0, "top_k": 2000, "top_p": 1.0, "guidance": 3.0}
    loaded = cj.load(converted)
    settings = cj.Sampling(temperature=0.0, guidance=3.0)
    drawn = [
        cj.generate(loaded, ["a red ball on gravel"], jax.random.key(0), tree=tree, sampling=settings)
        for tree in (cj.trees.ROOT, cj.trees.chain(2))
    ]
    np.testing.assert_array_equal(drawn[0].tokens, drawn[1].tokens)
    np.testing.assert_array_equal(drawn[0].images, drawn[1].images)


def test_a_bundle_says_what_it_is_and_where_it_comes_from(converted, downloads, capsys):
    capsys.readouterr()
    assert cli.main(["info", str(converted), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["family"] == "llamagen"
    assert found["target"]["parameters"] == sum(x.size for x in published.llamagen().values())
    assert found["encoder"]["dtype"] == "float32"
    assert set(found["origin"]["files"]) == {
        "t2i_XL_stage1_256.pt", "vq_ds16_t2i.pt", "pytorch_model.bin",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    }  # fmt: skip
    assert found["origin"]["files"]["vq_ds16_t2i.pt"].startswith("sha256:")
    assert (converted / "text" / "tokenizer.json").is_file()
    assert cli.main(["info", str(converted)]) == 0
    assert "family  llamagen" in capsys.readouterr().out


def test_drafters_and_neighbours_are_added_to_a_bundle(converted, downloads, tmp_path, capsys):
    own = pathlib.Path(shutil.copytree(converted, tmp_path / "own"))
    changed = {**published.drafter(), "fc.bias": np.full(published.DIM, 0.5, np.float32)}
    folder = published.write_folder(tmp_path / "drafter", changed, published.DRAFTER_SETTINGS)
    before = bundle.stored(own)
    assert cli.main(["merge", str(own), "--drafter", str(folder)]) == 0
    assert cli.main(["neighbours", str(own), "--k", "5"]) == 0
    loaded = cj.load(own)
    assert bundle.stored(own).keys() == before.keys()
    np.testing.assert_array_equal(loaded.merged("drafter").fc.bias[...], np.full(published.DIM, 0.5, np.float32))
    codebook = np.asarray(loaded.merged("vq").raw_codebook())
    distances = ((codebook[:, None] - codebook) ** 2).sum(-1)
    np.fill_diagonal(distances, np.inf)
    np.testing.assert_array_equal(loaded.neighbours[:, 0], distances.argmin(-1))
    assert loaded.neighbours.shape == (published.CODES, 5)
    assert (own / "text" / "tokenizer.json").is_file()
    assert {p.name for p in tmp_path.iterdir()} - {"cache"} == {"drafter", "here", "own"}
    assert cli.main(["merge", str(own), "--drafter", str(downloads / "vq_ds16_t2i.pt")]) == 2
    assert "is no drafter for llamagen: it is a vq" in capsys.readouterr().err


def test_parameters_go_to_the_sharding_that_is_asked_for(converted):
    mesh = jax.make_mesh((1,), ("x",))
    seen = {}

    def placement(path, shape):
        seen[path] = shape
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    loaded = bundle.load(converted, jnp.bfloat16, placement)
    leaves = jax.tree.leaves(loaded.params["target"])
    assert all(leaf.sharding.mesh == mesh for leaf in leaves if isinstance(leaf, jax.Array))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    assert seen["target.embedding"] == (published.CODES, published.DIM)


SHARDED = """
import sys, jax
from cascade_jax import bundle
mesh = jax.make_mesh((4,), ("x",))
def placement(path, shape):
    axis = next((i for i, size in enumerate(shape) if size % 4 == 0), None)
    spec = [None] * len(shape)
    if axis is not None:
        spec[axis] = "x"
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
for leaf in jax.tree.leaves(bundle.load(sys.argv[1], placement=placement).params["target"]):
    local = leaf.addressable_shards[0].data.size
    assert len(leaf.addressable_shards) == 4 and local * (4 if any(n % 4 == 0 for n in leaf.shape) else 1) == leaf.size
print("sharded")
"""


def test_parameters_are_spread_over_the_devices_asked_for(converted):
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(
        [sys.executable, "-c", SHARDED, str(converted)], env={**os.environ, **devices}, capture_output=True, text=True
    )
    assert ran.stdout.strip() == "sharded", ran.stderr


def test_transforms_are_inverse_and_put_heads_where_attention_wants_them():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(8, 5)), rng.normal(size=(4, 5)), rng.normal(size=(4, 5))
    made = transforms.qkv(4, 2)(q, k, v)  # heads of 2, two query heads for each key head
    assert made.shape == (5, 2, 4, 2)
    np.testing.assert_array_equal(made[:, 1, 0], q[4:6].T)  # query head 2 belongs to key head 1
    np.testing.assert_array_equal(made[:, 1, 2], k[2:].T)
    np.testing.assert_array_equal(made[:, 0, 3], v[:2].T)
    np.testing.assert_array_equal(transforms.qkv(4, 2)(np.concatenate([q, k, v])), made)
    there = transforms.halves_to_pairs(2)(q)
    np.testing.assert_array_equal(there[:4], q[[0, 2, 1, 3]])
    np.testing.assert_array_equal(transforms.pairs_to_halves(2)(there), q)


def test_everything_that_does_not_fit_is_said_at_once(tmp_path):
    tensors = published.llamagen()
    del tensors["layers.1.ffn_norm.weight"]
    tensors["layers.0.ffn_norm.weight"] = np.ones(5, np.float32)
    tensors["adapter.weight"] = np.ones(5, np.float32)
    with pytest.raises(ConvertError) as error:
        _planned(published.write_pickle(tmp_path / "x.pt", tensors, "model"))
    for what in (
        "1 missing: layers.1.ffn_norm.weight", "1 left over: adapter.weight",
        "1 misshapen: layers.0.ffn_norm.weight 5 for blocks.0.ffn_norm.scale 128",
    ):  # fmt: skip
        assert what in str(error.value)


def test_every_rule_of_every_table_is_used():
    config = model.LlamaGenConfig(128, 1, 2)
    paths = bundle.shapes("target", config) | bundle.shapes("target", dataclasses.replace(config, classes=3))
    for layout in (llamagen.ORIGINAL, llamagen.HUGGING_FACE):
        for rule in layout.rules(config):
            assert any(table.present(rule.path, [path]) for path in paths), rule


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["convert", "llamagen"], "convert takes FAMILY SOURCE... DEST"),
        (["convert", "dalle", "a.pt", "out"], "there is no checkpoint a.pt"),
        (
            ["convert", "llamagen", "a.pt", "out", "--dtype", "int4"],
            "dtype must be float32 or bfloat16 or stored, not 'int4'",
        ),
        (["info", "nowhere"], "there is no model 'nowhere'"),
        (["merge", "nowhere", "--drafter", "x"], "nowhere is not a model"),
        (["neighbours", "nowhere"], "nowhere is not a model"),
        (["neighbours", "scenes"], "scenes is embedded in the package, which is not written to: copy it (cp -r "),
        (["merge", "scenes", "--drafter", "x"], "scenes is embedded in the package, which is not written to: copy it"),
    ],
)
def test_bad_commands_are_one_line(argv, message, capsys, empty_folder):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert list(empty_folder.iterdir()) == []


def test_the_weights_alone_decide_and_torch_is_asked_for_by_its_install_line(downloads, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["convert", "auto", str(downloads / "vq_ds16_t2i.pt"), "out"]) == 2
    assert "pip install 'cascade_jax[convert]'" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_leaves_nothing(downloads, monkeypatch, capsys, empty_folder):
    files = [str(downloads / "t2i_XL_stage1_256.pt"), str(downloads / "vq_ds16_t2i.pt")]
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert cli.main(["convert", "llamagen", *files, "out", "--pixels", "64"]) == 2
    assert "no room: the model needs" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(empty_folder)

    def full(self, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle.Writer, "_flush", full)
    assert cli.main(["convert", "llamagen", *files, "out", "--pixels", "64"]) == 2
    *notes, error = capsys.readouterr().err.splitlines()
    assert "is full" in error and all(note.startswith("warning: ") for note in notes)
    assert list(empty_folder.iterdir()) == []


def test_nans_are_warned_of_by_name_and_dtypes_are_kept(tmp_path, downloads):
    tensors = published.llamagen()
    tensors["norm.weight"][3] = np.nan
    said = []
    source = published.write_pickle(tmp_path / "x.pt", tensors, "model")
    vq = downloads / "vq_ds16_t2i.pt"
    convert("llamagen", [source, vq], tmp_path / "out", dtype="bf16", pixels=64, say=said.append)
    assert said[0] == f"warning: norm.weight of {source} contains NaNs"
    types = {path.split(".")[0]: leaf.dtype for path, leaf in bundle.stored(tmp_path / "out").items()}
    assert types == {"target": jnp.bfloat16, "vq": jnp.float32}


def test_the_command_line_warns_of_nans_in_one_line(tmp_path, downloads, capsys):
    tensors = published.llamagen() | {"norm.weight": np.full(published.DIM, np.nan, np.float32)}
    source = published.write_pickle(tmp_path / "t2i_XL_stage1_64.pt", tensors, "model")
    argv = ["convert", "llamagen", str(source), str(downloads / "vq_ds16_t2i.pt"), "out", "--pixels", "64"]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert out == "converted: out\n"
    assert [line for line in err.splitlines() if "NaN" in line] == [f"warning: norm.weight of {source} contains NaNs"]


# Forks share one start of the interpreter, so that many kills take seconds. Argument 1 is the command as JSON. Every
# line printed is the state after a kill: what there is, and whether it loads.
KILLS = """
import json, os, pathlib, shutil, signal, sys, time
import torch
from cascade_jax import bundle, cli
import checkpoints_convert

def fork(work):
    if (pid := os.fork()) == 0:
        os._exit(work() or 0)
    return pid

def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

argv, out = json.loads(sys.argv[1]), pathlib.Path("out")
convert = lambda: cli.main([*argv, str(out)])
begin = time.monotonic()
assert wait(fork(lambda: cli.main([*argv, "whole"]))) == 0
seconds = time.monotonic() - begin

def killed_at_a_rename():
    rename, count = pathlib.Path.rename, iter(range(9))
    def die(self, target):
        if next(count) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)
    pathlib.Path.rename = die
    return convert()

def report():
    print(json.dumps([out.exists(), not out.exists() or wait(fork(lambda: not bundle.load(out))) == 0]), flush=True)

for share in (0.5, 0.9):
    pid = fork(convert)
    time.sleep(share * seconds)
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    report()
shutil.rmtree(out, ignore_errors=True)
shutil.copytree("whole", out)
assert wait(fork(killed_at_a_rename)) == -signal.SIGKILL
report()
assert wait(fork(convert)) == 0
report()
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_nothing_or_a_whole_model_and_a_rerun_succeeds(tmp_path, empty_folder):
    """SIGKILL, at two moments of a conversion, and between the two renames that replace a model."""
    weights, vq = tmp_path / "c2i_B_256.pt", tmp_path / "vq_ds16_c2i.pt"
    published.write_pickle(weights, published.llamagen(classes=True), "model")
    published.write_pickle(vq, published.vq(), "model")
    argv = json.dumps(["convert", "llamagen", str(weights), str(vq)])
    own = {**os.environ, "PYTHONPATH": str(pathlib.Path(cj.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", KILLS, argv], capture_output=True, text=True, env=own)
    assert run.returncode == 0, run.stderr
    states = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("[")]
    assert all(loads for _, loads in states)
    assert [there for there, _ in states[2:]] == [False, True]  # killed between the renames there is nothing
    assert sorted(path.name for path in empty_folder.iterdir()) == ["out", "whole"]
    assert bundle.stored("out").keys() == bundle.stored("whole").keys()


def test_a_folder_that_is_no_model_is_not_replaced(tmp_path, downloads):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").touch()
    with pytest.raises(ConvertError, match="is there already and is no model"):
        convert("llamagen", [downloads / "vq_ds16_t2i.pt"], tmp_path / "thesis")


@pytest.mark.parametrize(
    ("size", "classes", "published_count"),
    [("B", 1000, "111M"), ("L", 1000, "343M"), ("XL", 1000, "775M"), ("XXL", 1000, "1.4B"), ("XXXL", 1000, "3.9B"),
     ("1B", None, "1.2B"), ("3B", None, "3.1B"), ("7B", None, "6.6B")],
)  # fmt: skip
def test_full_size_models_have_the_published_number_of_parameters(size, classes, published_count):
    """The counts in gpt.py's comments, which were taken without the caption embedder."""
    config = model.preset(size, classes=classes)
    small = dataclasses.replace(config, layers=1)  # tracing all layers would take most of the time
    shapes = bundle.shapes("target", small)
    count = {path: int(np.prod(shape)) for path, shape in shapes.items()}
    layer = sum(n for path, n in count.items() if path.startswith("blocks.0."))
    total = sum(n for path, n in count.items() if not path.startswith(("caption", "label")))
    total += layer * (config.layers - 1) + count.get("label", 0)
    shown = f"{total / 1e9:.1f}B" if total >= 1e9 else f"{total / 1e6:.0f}M"
    assert shown == published_count
