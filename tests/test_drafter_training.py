"""From a model to data to a drafter in the model, on a model of the smallest useful size."""

import dataclasses
import json
import re
import shutil
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from PIL import Image

from cascade_jax import acceptance, bundle, cli, pictures, trees
from cascade_jax.drafters.eagle import Eagle1, EagleConfig
from cascade_jax.models import families
from cascade_jax.models.prompt import Prompt
from cascade_jax.models.transformer import Linear
from cascade_jax.pipeline import load
from cascade_jax.sampling import Layout, Sampling
from cascade_jax.text import captioned
from cascade_jax.training import checkpoints, data, distill, drafter, log, run
from cascade_jax.training.batches import Batches
from cascade_jax.training.data import Data, DataError
from cascade_jax.training.drafter import Objective, Schedule

PROMPTS = ["a red ball on gravel", "a blue cone", "a green cube on the left"]
SAMPLING = Sampling(guidance=2.0)
OBJECTIVE = Objective(guidance=2.0, soft=1.0, noise=0.0)
FAST = Schedule(rate=3e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # a small tree: what is drawn in evaluations is compiled for every kind of drafter
    return small.write_bundle(tmp_path_factory.mktemp("model") / "small", drafter=False, cascade={"tree": "chain:2"})


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


def draw(model, folder, **changes):
    settings = dict(count=10, batch=4, seed=0, sampling=SAMPLING, features=(), name="small") | changes
    return distill.draw(model, folder, PROMPTS, **settings)


@pytest.fixture(scope="module")
def rows(model, tmp_path_factory):
    return draw(model, tmp_path_factory.mktemp("data") / "drawn")


@pytest.fixture
def copy(rows, tmp_path):
    """The data again, to be damaged."""
    return shutil.copytree(rows.folder, tmp_path / "copy")


# Data.


def test_rows_are_pictures_of_their_prompts_and_numbers(rows):
    tokens, captions, prompts = rows.rows(range(10))
    assert tokens.shape == (10, 16)
    assert tokens.dtype == np.int32
    assert tokens.max() < 64
    assert len(np.unique(tokens, axis=0)) == 10
    assert captions == [PROMPTS[i % 3] for i in range(10)]
    np.testing.assert_array_equal(prompts[0].features, prompts[3].features)
    assert rows.features([9], rows.kept_slots).shape == (1, 2, rows.kept_slots, 32)


def test_a_lost_shard_is_made_again_with_the_same_bits_by_any_part(model, rows, copy):
    before = {path.name for path in copy.iterdir()}
    for path in copy.glob("00001-*"):
        path.unlink()
    with pytest.raises(DataError, match=r"lacks 1 of 3 shards \(1\): run distill again"):
        Data(copy)
    assert draw(model, copy, part=(0, 2)) is None
    assert draw(model, copy, part=(1, 2)).count == 10
    assert {path.name for path in copy.iterdir()} == before


def test_other_settings_are_refused_by_name(model, copy):
    with pytest.raises(ValueError, match=r"data with other settings \(seed: 0 there, 1 now\)"):
        draw(model, copy, seed=1)


def test_a_changed_shard_is_found(rows, copy):
    path = next(copy.glob("00002-*.npz"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged: delete it and run distill again"):
        Data(copy).rows([9])


def test_data_of_another_model_are_refused(rows):
    with pytest.raises(DataError, match="was made by another model"):
        Data(rows.folder, "0" * 64)


def test_a_fingerprint_does_not_depend_on_the_type_that_a_model_is_loaded_as(folder, model):
    half = bundle.load(folder, jnp.bfloat16)
    digest = data.fingerprint(model.params["target"])
    assert data.fingerprint(half.params["target"]) == digest
    other = jax.tree.map(lambda x: x, half.params["target"])
    other["norm"]["scale"][...] = other["norm"]["scale"][...] * 2
    assert data.fingerprint(other) != digest


def test_prompts_come_back_as_they_were(tmp_path):
    rng = np.random.default_rng(0)
    features = [
        Prompt(features=rng.normal(size=(3, 4)).astype(jnp.bfloat16), mask=np.arange(3) < 2 + i) for i in (0, 1)
    ]
    texts = [Prompt(ids=np.array([5, 6, 7])), Prompt(ids=np.array([8, 0, 9, 9]), mask=np.array([1, 0, 1, 1], bool))]
    classes = [Prompt(ids=np.int32(3)), Prompt(ids=np.int32(4))]
    about = {"format": data.FORMAT, "target": "", "model": "", "count": 2, "shard": 2, "features": None}
    for name, prompts in (("features", features), ("texts", texts), ("classes", classes)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.json").write_text(json.dumps(about))
        data.write_shard(tmp_path / name, 0, np.array([[1], [70_000]]), ["", "b"], prompts)
        tokens, captions, found = Data(tmp_path / name).rows([1, 0])
        np.testing.assert_array_equal(tokens, [[70_000], [1]])
        assert captions == ["b", ""]
        for prompt, expected in zip(found, prompts[::-1]):
            if name == "texts":
                ids = expected.ids if expected.mask is None else expected.ids[expected.mask]
                np.testing.assert_array_equal(prompt.ids[prompt.mask], ids)
            else:
                jax.tree.map(np.testing.assert_array_equal, prompt, expected)
                assert jax.tree.leaves(prompt)[0].dtype == jax.tree.leaves(expected)[0].dtype


# Real pictures.


def picture(path, seed):
    Image.fromarray(np.random.default_rng(seed).integers(256, size=(20, 12, 3), dtype=np.uint8)).save(path)


def test_captioned_pictures_become_rows_of_codes(model, tmp_path):
    for i, caption in enumerate(PROMPTS[:2]):
        picture(tmp_path / f"{i}.png", i)
        (tmp_path / f"{i}.txt").write_text(caption + "\n")
    made = distill.encode(model, tmp_path / "data", tmp_path, batch=2)
    tokens, captions, _ = made.rows([0, 1])
    assert captions == PROMPTS[:2]
    images = np.stack([pictures.read(tmp_path / f"{i}.png", 8, 8) for i in (0, 1)])
    codes = model.merged("vq").encode_codes(images.astype(np.float32) / 127.5 - 1)
    np.testing.assert_array_equal(tokens, np.asarray(codes).reshape(2, 16))
    listing = [{"file_name": f"{i}.png", "text": PROMPTS[i]} for i in (1, 0)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, listing)))
    assert [caption.text for _, caption in captioned.read(tmp_path)] == PROMPTS[1::-1]


def test_pictures_without_captions_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures with captions"):
        captioned.read(tmp_path)
    picture(tmp_path / "a.png", 0)
    with pytest.raises(ValueError, match=r"a\.png has no caption: put it into a\.txt beside it"):
        captioned.read(tmp_path)
    (tmp_path / "a.txt").write_text(" ")
    with pytest.raises(ValueError, match=r"a\.png has an empty caption"):
        captioned.read(tmp_path)
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"cannot read the picture .*b\.png"):
        pictures.read(tmp_path / "b.png", 8, 8)


def test_a_failed_distill_leaves_nothing_in_the_way_of_its_correction(model, tmp_path):
    here, out = tmp_path / "pictures", tmp_path / "data"
    here.mkdir()
    for i, caption in enumerate(["\ufeffa red ball\r\n", "a blue elephant"]):
        picture(here / f"{i}.png", i)
        (here / f"{i}.txt").write_text(caption, encoding="utf-8", newline="")
    encode = lambda: distill.encode(model, out, here, batch=2)
    with pytest.raises(ValueError, match=r"1\.txt, 'a blue elephant': unknown word elephant"):
        encode()
    (here / "1.txt").write_text("a blue cone")
    whole = (here / "1.png").read_bytes()
    (here / "1.png").write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"cannot read the picture .*1\.png"):
        encode()
    (here / "1.png").write_bytes(whole)
    listing = here / "metadata.jsonl"
    for line, message in (
        ('{"file_name": "1.png"}', r"metadata\.jsonl, line 3: it is not"),
        ("{", r"metadata\.jsonl, line 3: it is not"),
        ('{"file_name": "2.png", "text": "a cone"}', r"metadata\.jsonl, line 3: .*2\.png is not there"),
        ('{"file_name": "1.png", "text": "a dog"}', r"metadata\.jsonl, line 3, 'a dog': unknown word dog"),
    ):
        listing.write_text('{"file_name": "0.png", "text": "a red ball"}\n\n' + line, encoding="utf-8-sig")
        with pytest.raises(ValueError, match=message):
            encode()
    listing.unlink()
    assert not out.exists()
    assert encode().rows([0, 1])[1] == ["a red ball", "a blue cone"]


def test_codes_stand_between_what_a_layout_forces():
    layout = Layout((-1, -1, 8, -1, -1, 8, 9), free_tokens=8)
    got = distill.tokens_of(np.array([[1, 2, 3, 4], [5, 6, 7, 0]]), layout)
    np.testing.assert_array_equal(got, [[1, 2, 8, 3, 4, 8, 9], [5, 6, 8, 7, 0, 8, 9]])


# Batches.


def test_an_epoch_has_every_row_once_and_none_that_is_held_out(model, rows):
    batches = Batches(rows, model.config.target, rows=8, batch=4, seed=3, objective=OBJECTIVE, taps=())
    everything = rows.rows(range(10))[0]
    number_of = lambda tokens: [int(np.flatnonzero((everything == row).all(1))[0]) for row in tokens]
    epochs = [[n for step in (2 * e, 2 * e + 1) for n in number_of(batches(step)["tokens"])] for e in range(3)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    first = batches(0)
    np.testing.assert_array_equal(first["features"], rows.features(number_of(first["tokens"]), rows.kept_slots))


def test_a_tenth_of_the_samples_is_unconditional(model, rows):
    batches = Batches(rows, model.config.target, rows=8, batch=8, seed=3, objective=Objective(), taps=(1, 2, 2))
    assert "features" not in batches(0)  # other layers were kept
    share = np.mean([batches(step)["unconditional"] for step in range(200)])
    assert share == pytest.approx(0.1, abs=0.025)  # 3.3 standard deviations of 1,600 samples


def test_processes_share_a_batch(model, rows, monkeypatch):
    batches = Batches(rows, model.config.target, rows=10, batch=4, seed=3, objective=OBJECTIVE, taps=())
    whole = batches(1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    parts = []
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        parts.append(batches(1))
    jax.tree.map(lambda all, *some: np.testing.assert_array_equal(all, np.concatenate(some)), whole, *parts)


# Runs.

METHODS = {"naive": (acceptance.strict(), trees.chain(1))}


def fit(model, rows, folder, **changes):
    settings = dict(objective=OBJECTIVE, schedule=FAST, batch=4, steps=16, methods=METHODS, save_every=6, evaluated=2)
    return run.train(model, rows, folder, **settings | changes)


@pytest.fixture(scope="module")
def finished(model, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, *fit(model, rows, folder)


def test_a_run_learns_and_leaves_its_record(finished, model):
    folder, config, params = finished
    record, evaluation = log.read(folder / "log.csv"), log.read(folder / "evaluation.csv")
    assert record["loss"][-1] < record["loss"][0]
    assert {"soft", "hard", "feature", "acceptance", "top1", "top2", "top3", "tokens_per_second"} < record.keys()
    assert list(evaluation["step"]) == list(range(2, 17, 2))
    assert list((folder / "events" / "log").iterdir())
    assert (folder / "loss.png").stat().st_size > 1000
    best = evaluation["step"][np.argmax(evaluation["alpha"])]
    assert max(int(path.name) for path in (folder / "best").iterdir()) == best
    found, kept, _ = run.trained(folder)
    assert found == config == drafter.sizes("eagle1", model.config.target)
    jax.tree.map(np.testing.assert_array_equal, kept, params)


def test_an_interrupted_run_ends_with_the_same_bits(model, rows, finished, tmp_path, monkeypatch):
    make = Batches.__call__

    def until_eleven(self, step):
        if step == 11:
            raise KeyboardInterrupt
        return make(self, step)

    monkeypatch.setattr(Batches, "__call__", until_eleven)
    with pytest.raises(KeyboardInterrupt):
        fit(model, rows, tmp_path)
    monkeypatch.undo()
    _, best = fit(model, rows, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, best, finished[2])
    last = [checkpoints.restore(folder, best) for folder in (finished[0], tmp_path)]
    jax.tree.map(np.testing.assert_array_equal, *last)
    for name in ("loss", "soft"):
        records = [log.read(folder / "log.csv")[name][-1] for folder in (finished[0], tmp_path)]
        assert records[0] == records[1]


def test_other_settings_of_a_run_are_refused_by_name(model, rows, finished):
    with pytest.raises(ValueError, match=r"a run with other settings \(tau_seq: 0.5 there, 0.7 now\)"):
        fit(model, rows, finished[0], objective=Objective(guidance=2.0, soft=1.0, noise=0.0, tau_seq=0.7))
    with pytest.raises(ValueError, match=r"a run with other settings \(drafter: eagle1 there, eagle3 now"):
        fit(model, rows, finished[0], kind="eagle3")


def test_a_trained_drafter_is_merged_into_its_model_alone(model, folder, finished, tmp_path):
    run.merge(folder, finished[0], tmp_path / "merged", dtype=jnp.float32)
    merged = load(tmp_path / "merged")
    assert merged.config.drafter == finished[1]
    assert merged.config.origin["drafter"]["recipe"] == "cascade-jax train"
    jax.tree.map(np.testing.assert_array_equal, merged.params["drafter"], finished[2])
    jax.tree.map(np.testing.assert_array_equal, merged.params["target"], model.params["target"])
    assert bundle.read_config(folder).drafter is None
    params = {**merged.params, "target": jax.tree.map(lambda x: 2 * x, merged.params["target"])}
    bundle.save(tmp_path / "other", merged.config, params)
    with pytest.raises(ValueError, match="was trained for another target"):
        run.merge(tmp_path / "other", finished[0])


@dataclasses.dataclass(frozen=True)
class OnePassConfig(EagleConfig):
    """Sizes of `OnePass`."""


class OnePass(Eagle1):
    """A drafter that nobody knows: it looks two tokens ahead in one pass."""

    standard: ClassVar[dict] = {"unroll": 2, "noise": 0.0}

    def __init__(self, config, *, rngs):
        super().__init__(config, rngs=rngs)
        self.further = Linear(config.block.dim, config.block.dim, rngs=rngs)

    def ahead(self, embeddings, features, steps, remat=False, anchors=None):
        (first,) = super().ahead(embeddings, features, 1, remat)
        return [first, self.further(first)][:steps]


def test_a_new_kind_of_drafter_is_trained_and_merged_by_its_line_in_the_registry(
    model, folder, rows, tmp_path, monkeypatch
):
    monkeypatch.setitem(families.KINDS["drafter"], "onepass", families.Kind(OnePassConfig, OnePass))
    assert "onepass" in drafter.kinds()
    config, params = run.train(model, rows, tmp_path / "run", kind="onepass", batch=4, steps=2, held_out=0.0)
    assert type(config) is OnePassConfig
    assert np.abs(params["further"]["kernel"][...] - drafter.start(config, 0)[1]["further"]["kernel"][...]).max() > 0
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert (settings["drafter"], settings["unroll"]) == ("onepass", 2)
    run.merge(folder, tmp_path / "run", tmp_path / "merged", dtype=jnp.float32)
    merged = load(tmp_path / "merged")
    assert merged.config.drafter == config
    jax.tree.map(np.testing.assert_array_equal, merged.params["drafter"], params)


# The command line.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_the_commands_lead_from_a_model_to_one_with_an_eagle3_drafter(folder, tmp_path, capsys):
    here = str(tmp_path / "data")
    assert cli.main(["distill", "--model", str(folder), "--count", "4", "--batch", "4", "--out", here]) == 0
    assert "distilled" in capsys.readouterr().out
    out = str(tmp_path / "run")
    train = ["train", "--model", str(folder), "--data", here, "--drafter", "eagle3", "--out", out, "--batch", "2"]
    train += ["--steps", "2", "--unroll", "2", "--guided", "--convergence-weight", "2", "--evaluated", "1"]
    assert cli.main(train) == 0, capsys.readouterr().err
    (alone,) = re.findall(r"alpha on 1 held-out prompts, this drafter: (.*)", capsys.readouterr().out)
    assert cli.main(["info", f"{out}/model", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["drafter"]["kind"] == "eagle3"
    assert found["drafter"]["taps"] == [1, 1, 2]
    assert cli.main([*train, "--rate", "1e-3"]) == 2
    assert "rate: 0.0001 there, 0.001 now" in capsys.readouterr().err
    shutil.copytree(folder, tmp_path / "mine")
    assert cli.main(["merge", str(tmp_path / "mine"), "--drafter", out]) == 0
    assert load(tmp_path / "mine").program(trees.chain(1)).taps == (1, 1, 2)
    train[train.index("--model") + 1] = str(tmp_path / "mine")
    capsys.readouterr()
    assert cli.main(train) == 0, capsys.readouterr().err
    assert re.findall(r"alpha on 1 held-out prompts, .*: (.*)", capsys.readouterr().out) == [alone, alone]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "--count", "0"], "count must be at least 1, not 0"),
        (["distill", "--part", "3/2"], "part is K/N"),
        (["distill", "--features", "all"], "unknown drafter 'all'; known: eagle1, eagle3, parallel, hydra"),
        (["distill", "--prompts", "nowhere.txt"], "there is no prompts file"),
        (["distill", "--prompts", "a", "--images", "b"], "not both"),
        (["train", "--data", "nowhere", "--held-out", "1"], "a share below 1"),
        (["train", "--data", "nowhere", "--batch", "0"], "batch must be at least 1"),
        (["train", "--data", "nowhere", "--process", "0"], "go together"),
        (["train", "--data", "nowhere", "--model", "nowhere"], "there is no model"),
    ],
)
@pytest.mark.usefixtures("cache")
def test_wrong_input_is_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]


@pytest.mark.usefixtures("cache")
def test_wrong_data_and_drafters_are_one_line_and_status_2(folder, rows, tmp_path, capsys):
    train = ["train", "--model", str(folder), "--out", str(tmp_path / "run"), "--data"]
    other = small.write_bundle(tmp_path / "other", drafter=False)
    params = bundle.load(other).params
    params["target"]["norm"]["scale"][...] *= 2
    bundle.save(other, bundle.read_config(other), params)
    for arguments, message in (
        ([*train, str(tmp_path)], "holds no training data: make some with cascade-jax distill"),
        (
            [*train, str(rows.folder), "--drafter", "eagle2"],
            "unknown drafter 'eagle2'; known: eagle1, eagle3, parallel, hydra",
        ),
        (
            [*train, str(rows.folder), "--batch", "3", "--accumulate", "2"],
            "does not divide among 1 devices and 2 parts",
        ),
        ([*train, str(rows.folder), "--batch", "12"], "a batch of 12 does not fit into 9 rows"),
        ([*train, str(rows.folder), "--unroll", "16"], "unroll must be below 16, the tokens of a picture, not 16"),
        ([*train, str(rows.folder), "--model", str(other)], "was made by another model"),
    ):
        assert cli.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert not (tmp_path / "run").exists()
