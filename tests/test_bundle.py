"""A model directory: what it holds, what it says when it is damaged, and that those written before still load."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small
from flax import nnx

import cascade_jax as cj
from cascade_jax import bundle, cli, methods, pipeline, sharding
from cascade_jax.bundle import arrays as by_path
from cascade_jax.bundle.arrays import flat, nested, plain
from cascade_jax.models import families
from cascade_jax.models.llamagen import LlamaGen, LlamaGenConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.write_bundle(tmp_path_factory.mktemp("bundle") / "model")


@pytest.fixture
def copy(folder, tmp_path):
    """The bundle again, to be damaged."""
    return pathlib.Path(shutil.copytree(folder, tmp_path / "copy"))


def leaves(model: bundle.Bundle) -> dict[str, np.ndarray]:
    trees = {part: plain(tree) for part, tree in model.params.items() if tree is not None}
    return {".".join(path): np.asarray(x) for path, x in flat(trees).items()}


def rewritten(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Puts these arrays, by dotted path, in place of a bundle's."""
    shutil.rmtree(folder / "params")
    writer = bundle.Writer(folder)
    for name, array in arrays.items():
        part, _, path = name.partition(".")
        writer.add(part, path, array)
    writer.finish(bundle.read_config(folder))


def test_a_model_is_a_few_files(folder):
    """Plain ones, that say nothing of the machine that wrote them."""
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert len(written) <= 6  # the parameters of such a model are one file, or two where writing took long
    assert not any(str(folder.parent).encode() in path.read_bytes() for path in written)


def test_what_comes_with_the_package_is_small_pieces():
    scenes = pathlib.Path(cj.__file__).parent / "scenes"
    places = [*pipeline.EMBEDDED.values(), scenes / "judge_weights"]
    sizes = [path.stat().st_size for place in places for path in place.rglob("*") if path.is_file()]
    assert len(sizes) <= 40
    assert max(sizes) <= 16 << 20 and sum(sizes) <= 50 << 20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_lie_as_int8_are_near_those_that_were_written(folder, tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(by_path, "_LEAST", 256)
    model = bundle.load(folder, jnp.float32)
    bundle.save(tmp_path / "model", model.config, model.params, jnp.int8, shard=1 << 13)
    kinds = {str(leaf.dtype) for leaf in bundle.stored(tmp_path / "model").values()}
    assert kinds == {"int8", "bfloat16"}
    assert bundle.stored(tmp_path / "model").keys() == bundle.stored(folder).keys()
    old, new = leaves(model), leaves(bundle.load(tmp_path / "model", jnp.dtype(dtype)))
    assert {str(x.dtype) for x in new.values()} == {dtype}
    for name, x in old.items():
        largest = np.abs(x).max(0 if name.endswith("kernel") else -1, keepdims=True) if x.ndim > 1 else np.abs(x)
        assert np.all(np.abs(new[name].astype(np.float32) - x) <= largest * (1 / 254 + 2**-7)), name
    again = pipeline.load(tmp_path / "model", dtype, mesh=cj.mesh.make(data=1, model=1))
    assert all(np.array_equal(x, new[name]) for name, x in leaves(again).items())
    needed = sharding.needed(model.config, bundle.stored(tmp_path / "model"), dtype, data=1, model=1, batch=1)
    assert needed == sharding.needed(model.config, bundle.stored(folder), dtype, data=1, model=1, batch=1)


def test_bundles_written_before_still_load(folder, copy):
    """Orbax's own many files, a checkpoint a part, as up to version 0.1; or one checkpoint right in params/."""
    new = bundle.load(folder)
    trees = {part: plain(tree) for part, tree in new.params.items()}
    for places in ({part: str(number) for number, part in enumerate(trees)}, None):
        shutil.rmtree(copy / "params")
        with ocp.StandardCheckpointer() as checkpointer:
            if places is None:
                checkpointer.save(copy / "params", trees)
            else:
                for part, place in places.items():
                    checkpointer.save(copy / "params" / place, {part: trees[part]})
        old = leaves(bundle.load(copy))
        assert old.keys() == leaves(new).keys()
        assert all(np.array_equal(old[name], x) for name, x in leaves(new).items())


def test_a_large_model_is_written_piece_by_piece(folder, tmp_path):
    model, limit = bundle.load(folder), 1 << 14
    writer = bundle.Writer(tmp_path / "model", shard=limit)
    for part, tree in model.params.items():
        writer.put(part, tree, jnp.float32)
    writer.finish(model.config)
    found = bundle.contents(tmp_path / "model")
    assert len(found) > 3
    for arrays in found.values():
        sizes = [int(np.prod(x.shape)) * x.dtype.itemsize for x in arrays.values()]
        assert sum(sizes) <= limit or len(sizes) == 1
    again = leaves(bundle.load(tmp_path / "model"))
    assert all(np.array_equal(again[name], x) for name, x in leaves(model).items())


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_are_named_and_draw_nothing(copy, value, dtype):
    arrays = leaves(bundle.load(copy))
    name = "target.blocks.1.ffn.down.kernel"
    arrays[name] = arrays[name].copy()
    arrays[name][3, 2] = value
    rewritten(copy, arrays)
    with pytest.raises(cj.BundleError, match=f"{name} holds NaNs or infinities") as caught:
        cj.load(copy, dtype)
    assert str(copy) in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_line_refuses_weights_that_are_not_finite_in_one_line(copy, capsys):
    arrays = leaves(bundle.load(copy))
    for name in ("drafter.fc.kernel", "vq.post_quant.bias", "text"):
        if name in arrays:
            arrays[name] = np.full_like(arrays[name], np.nan)
    rewritten(copy, arrays)
    assert cli.main(["generate", "a red ball on gravel", "--model", str(copy)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "drafter.fc.kernel and" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("format"), "names no format"),
        (lambda c: c.update(format=99), "another format"),
        (lambda c: c.update(family="unheard-of"), "unknown model family 'unheard-of'; this version knows: llamagen"),
        (lambda c: c["drafter"].update(kind="eagle9"), "unknown drafter 'eagle9'; this version knows: eagle1"),
        (lambda c: c["target"].update(heads="two"), "target.heads is 'two', and int is needed"),
        (lambda c: c["target"].update(heads=True), "target.heads is True"),
        (lambda c: c["target"].update(heads=0), "target: integer modulo by zero|target: .*zero"),
        (lambda c: c["target"].update(heads=3), "dim 32 is not a multiple of heads 3"),
        (lambda c: c["target"].update(arms=3), "target.arms is unknown"),
        (lambda c: c["target"].pop("dim"), "target lacks dim"),
        (lambda c: c["drafter"]["block"].update(dim=None), "drafter.block.dim is None"),
        (lambda c: c["vq"].update(channel_multipliers=[1, "x"]), "vq.channel_multipliers is"),
        (lambda c: c.update(target=None), "lacks target"),
        (lambda c: c.update(target=[1]), "a dictionary of sizes is needed"),
        (lambda c: c.pop("vq"), "lacks vq"),
        (lambda c: c["vq"].update(codebook_size=32), "draws 64 codes and its picture tokenizer has 32"),
        (lambda c: c["sampling"].update(temperature=-1), "sampling: temperature must be at least 0"),
        (lambda c: c["sampling"].update(heat=1), "sampling: .*heat"),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_told_by_what_is_wrong(copy, change, message):
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(cj.BundleError, match=message) as caught:
        bundle.read_config(copy)
    assert str(copy) in str(caught.value)


def test_a_config_comes_back_from_json_as_it_was(folder):
    config = bundle.read_config(folder)
    again = bundle.from_json(json.loads(json.dumps(bundle.to_json(config))))
    assert again == config and hash(again.target) == hash(config.target)


def test_an_unknown_way_to_read_prompts_is_told(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"text": "runes"}))
    with pytest.raises(cj.BundleError, match="unknown text 'runes'; this version knows: scenes, t5"):
        cj.load(copy)


@pytest.mark.parametrize("name", ["config.json", "_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "d/*"])
def test_files_that_are_cut_off_or_others_are_told_as_damage(folder, tmp_path, name, collected):
    """Of what only describes the checkpoint nothing else depends on."""
    for number, content in enumerate((lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"[]", lambda b: b[::-1])):
        copy = pathlib.Path(shutil.copytree(folder, tmp_path / str(number)))
        file = min(copy.glob(name if name == "config.json" else f"params/0/{name}"))
        file.write_bytes(content(file.read_bytes()))
        try:
            bundle.load(copy)
        except cj.BundleError as error:
            assert str(copy) in str(error) and "\n" not in str(error)
        else:
            assert name == "_CHECKPOINT_METADATA"


def test_a_bug_while_reading_is_not_called_damage(folder, monkeypatch):
    def broken(*arguments):
        raise TypeError("a bug")

    monkeypatch.setattr(bundle.store, "flat", broken)
    with pytest.raises(TypeError, match="a bug"):
        bundle.load(folder)


def test_a_bundle_is_not_changed_after_it_was_made(folder):
    model = bundle.load(folder)
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.mesh = None
    assert dataclasses.replace(model, read=len).read is len and model.read is None


@dataclasses.dataclass(frozen=True)
class Mine(LlamaGenConfig):
    """A researcher's own configuration."""


class MyModel(LlamaGen):
    """A researcher's own module."""


@pytest.fixture
def clean(monkeypatch):
    """The registry without what a test adds."""
    monkeypatch.setattr(families, "KINDS", {part: dict(kinds) for part, kinds in families.KINDS.items()})


def test_an_unknown_configuration_says_what_is_registered(folder):
    config = dataclasses.replace(bundle.read_config(folder), target=Mine(**vars(small.TARGET)))
    with pytest.raises(TypeError, match=r"Mine is no registered target; registered are llamagen \(LlamaGenConfig\)"):
        bundle.Bundle(config, {}).graph("target")


@pytest.mark.usefixtures("clean")
def test_a_registered_family_is_written_loaded_and_drawn_from(folder, tmp_path):
    for _ in range(2):  # as a notebook's cell that runs twice
        cj.register("mine", Mine, MyModel)
    model = cj.load(folder)
    config = dataclasses.replace(model.config, family="mine", target=Mine(**vars(small.TARGET)))
    bundle.save(tmp_path / "mine", config, bundle.load(folder).params)
    mine = cj.load(tmp_path / "mine")
    assert isinstance(mine.merged("target"), MyModel)
    drawn = [cj.generate(m, ["a red ball on gravel"], jax.random.key(0), tree=cj.trees.chain(2)) for m in (model, mine)]
    np.testing.assert_array_equal(drawn[0].tokens, drawn[1].tokens)


def test_a_model_without_a_picture_tokenizer_draws_tokens(folder, tmp_path):
    whole = cj.load(folder)
    config = dataclasses.replace(whole.config, vq=None)
    bundle.save(tmp_path / "plain", config, bundle.load(folder).params | {"vq": None})
    plainer = cj.load(tmp_path / "plain")
    for drafter in (plainer.config.drafter, object()):  # asks for no part that is not there
        sharding.check(dataclasses.replace(plainer.config, drafter=drafter), 2)
    drawn = [
        cj.generate(m, ["a red ball on gravel"], jax.random.key(0), tree=cj.trees.chain(2)) for m in (whole, plainer)
    ]
    np.testing.assert_array_equal(drawn[0].tokens, drawn[1].tokens)
    assert drawn[1].images is None
    with pytest.raises(bundle.BundleError, match="has no picture tokenizer: it draws tokens"):
        plainer.merged("vq")
    with pytest.raises(bundle.BundleError, match="has no picture tokenizer: draw its tokens"):
        methods.draw_one(plainer, methods.method("ar", plainer), "a red ball on gravel", 0, 0)


@pytest.mark.usefixtures("clean")
def test_what_cannot_be_registered_is_refused_by_name():
    @dataclasses.dataclass(frozen=True)
    class Bare:
        dim: int = 8

    class Loose:
        pass

    with pytest.raises(TypeError, match=r"Bare is no target's: it lacks .*codebook_size.*length"):
        cj.register("bare", Bare, LlamaGen)
    with pytest.raises(TypeError, match=r"Linear is no target's: it lacks .*embed.*logits"):
        cj.register("mine", Mine, nnx.Linear)
    with pytest.raises(TypeError, match="Loose must be a frozen dataclass"):
        cj.register("loose", Loose, LlamaGen)
    with pytest.raises(ValueError, match="there is a target 'llamagen' already"):
        cj.register("llamagen", Mine, MyModel)
    with pytest.raises(ValueError, match="registered already, as target 'llamagen'"):
        cj.register("other", LlamaGenConfig, LlamaGen)
    with pytest.raises(ValueError, match="unknown part 'mind'"):
        cj.register("mine", Mine, MyModel, "mind")


@pytest.mark.parametrize(("config", "module"), families.KINDS["target"].values())
def test_every_target_answers_what_is_asked_of_one(config, module):
    """As `register` would ask: nothing is told apart by its class."""
    for cls, protocol in ((config, families.TargetConfig), (module, families.Target)):
        names = {*protocol.__annotations__, *(name for name in vars(protocol) if not name.startswith("_"))}
        fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
        assert all(name in fields or hasattr(cls, name) for name in names)


def test_nested_and_flat_are_inverse():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert nested(flat(tree)) == tree
