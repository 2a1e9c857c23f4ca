"""The run folder: what was stopped goes on, and nothing else changes; cascade-jax eval, from captions to a report."""

import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
import pytest
from PIL import Image
from small import write_bundle

from cascade_jax import cli, files, methods, pipeline, rules
from cascade_jax.cli import evaluate
from cascade_jax.evaluation import figures as made
from cascade_jax.evaluation import jobs, metrics, run
from cascade_jax.evaluation.networks import clip as clip_score
from cascade_jax.evaluation.networks import inception
from cascade_jax.evaluation.networks import judge as quality
from cascade_jax.methods import Method
from cascade_jax.sampling import Sampling
from cascade_jax.text.captions import Caption

CAPTIONS = [
    Caption("a red ball on gravel", 0, "near"),
    Caption("a blue cone on grass", 1, "near"),
    Caption("a green cube on sand", 2, "far"),
    Caption("a white ball on brick", 3, "far"),
    Caption("a yellow cone", 4, "far"),
]
OPTIONS = dict(seed=3, batch=1, timed=2)


def darkness(album, progress):
    """In place of the judge's fidelity: how dark pictures are."""
    return np.array([1 - image.mean() / 255 for image in album.images()])


def variety(album, progress):
    """In place of the distance to renders: how much pictures vary."""
    return float(np.stack([*album.images()]).std())


RENDERS = quality.Statistics(np.zeros(3), np.eye(3))
GAUGES = [metrics.Gauge("fidelity", darkness), metrics.Gauge("frechet", variety)]


class Referee(quality.Referee):
    """A judge that is quick to come by."""

    def fidelity(self, images, prompts):
        assert len(images) == len(prompts)
        return 1 - images.mean(axis=(1, 2, 3)) / 255

    shapes = fidelity

    def moments(self, images, names):
        return quality.Moments.of(images.mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_bundle(tmp_path_factory.mktemp("models") / "small"))


@pytest.fixture(scope="module")
def bundle(model):
    return pipeline.load(model)


@pytest.fixture(scope="module")
def wanted(bundle):
    loose = methods.method("cascade", bundle, tree="full:2x1", tau_pos=-1, budget=0.9)
    return {"ar": methods.method("ar", bundle), "loose": loose}


@pytest.fixture(scope="module")
def whole(bundle, wanted, tmp_path_factory):
    """A run that nothing interrupted: its folder and its figures."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run.evaluate(bundle, wanted, CAPTIONS, folder, gauges=GAUGES, **OPTIONS)


def drawn(folder) -> dict[str, bytes]:
    """Pictures, records and settings; the times that turns took are in other folders."""
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in sorted(folder.glob("[al]*/*"))}


def timeless(figures):
    clocks = {"seconds_per_image", "speedup"}
    return {
        label: {
            **{key: value for key, value in own.items() if key not in clocks},
            "intervals": {key: value for key, value in own["intervals"].items() if key not in clocks},
        }
        for label, own in figures.items()
    }


@pytest.mark.parametrize("after", [1, 4, 7])
def test_a_run_that_was_cut_and_goes_on_is_the_uninterrupted_one(after, bundle, wanted, whole, tmp_path):
    folder, expected = whole

    def cut(what, done, total):
        assert total == 4 + 10  # two turns of two methods, and five pictures of each
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.evaluate(bundle, wanted, CAPTIONS, tmp_path, gauges=GAUGES, progress=cut, **OPTIONS)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/0*")}
    assert (len(before) > 0) == (after > 1)
    assert drawn(tmp_path) != drawn(folder)
    figures = run.evaluate(bundle, wanted, CAPTIONS, tmp_path, gauges=GAUGES, **OPTIONS)
    assert drawn(tmp_path) == drawn(folder)
    assert timeless(figures) == timeless(expected)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_figures_are_those_of_records_and_turns(whole, wanted):
    folder, figures = whole
    turns = jobs.records(run.turns_of(folder, ["loose", "ar"]), 2)
    times = {label: np.median([turn["seconds"][label] for turn in turns]) for label in wanted}
    loose = jobs.records(folder / "loose", 5)
    assert figures["ar"]["target_steps"] == 15
    assert (figures["ar"]["speedup"], figures["ar"]["step_speedup"]) == (1, 1)
    assert figures["loose"]["speedup"] == pytest.approx(times["ar"] / times["loose"])
    steps = sum(record["steps"] for record in loose)
    assert figures["loose"]["alpha"] == pytest.approx(sum(record["accepted"] for record in loose) / steps)
    assert figures["loose"]["step_speedup"] == pytest.approx(15 * 5 / steps)
    added = sum(record["nominal"] * record["steps"] for record in loose)
    assert added > 0
    assert figures["loose"]["tvd_per_image"] == pytest.approx(added / 5)
    assert figures["loose"]["tvd_per_token"] == pytest.approx(added / 5 / 16)
    texts = [caption.text for caption in CAPTIONS]
    assert figures["loose"]["fidelity"] == pytest.approx(np.mean(darkness(jobs.album(folder / "loose", texts), None)))
    assert figures["loose"]["frechet"] > 0
    assert figures["loose"]["settings"]["budget"] == 0.9
    assert (figures["loose"]["clip"], figures["loose"]["fid"]) == (None, None)
    for key in ("alpha", "fidelity", "speedup", "seconds_per_image"):
        low, high = figures["loose"]["intervals"][key]
        assert low <= figures["loose"][key] <= high


def test_pictures_are_those_that_the_library_draws(bundle, wanted, whole):
    texts = [caption.text for caption in CAPTIONS]
    batches = methods.draw_all(bundle, wanted["loose"], texts, 3, batch=1)
    expected = np.concatenate([batch.stats.accepted for _, batch in batches])
    assert [record["accepted"] for record in jobs.records(whole[0] / "loose", 5)] == expected.tolist()


def test_captions_are_added_behind_those_there_are(bundle, wanted, whole, tmp_path):
    folder, figures = whole
    few = run.evaluate(bundle, wanted, CAPTIONS[:3], tmp_path, gauges=GAUGES, **OPTIONS)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("0*")}
    assert timeless(run.evaluate(bundle, wanted, CAPTIONS, tmp_path, gauges=GAUGES, **OPTIONS)) == timeless(figures)
    assert drawn(tmp_path) == drawn(folder)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    again = run.evaluate(bundle, wanted, CAPTIONS[:3], tmp_path, gauges=GAUGES, **OPTIONS)
    assert timeless(again) == timeless(few) != timeless(figures)
    assert drawn(tmp_path) == drawn(folder)


def test_methods_are_added_but_never_changed(bundle, wanted, whole):
    folder, figures = whole
    before = drawn(folder)
    again = dict(gauges=GAUGES, **OPTIONS)
    for changed, named in (
        (dict(captions=CAPTIONS[1:]), "captions"),
        (dict(seed=4), "seed"),
        (dict(sampling=Sampling(temperature=1.0, top_k=40, guidance=3.0)), "sampling"),
    ):
        given = {"captions": CAPTIONS, **again, **changed}
        with pytest.raises(ValueError, match=rf"holds pictures of another job \(other {named}\)"):
            run.evaluate(bundle, wanted, given.pop("captions"), folder, **given)
    half = dataclasses.replace(bundle, params=jax.tree.map(lambda x: x.astype("bfloat16"), bundle.params))
    with pytest.raises(ValueError, match=r"holds pictures of another job \(other dtype\)"):
        run.evaluate(half, wanted, CAPTIONS, folder, **again)
    other = methods.method("cascade", bundle, tree="full:2x1", tau_pos=-1, budget=0.8)
    with pytest.raises(ValueError, match=r"loose holds pictures of another job \(other settings, rule\)"):
        run.evaluate(bundle, {"loose": other}, CAPTIONS, folder, **again)
    own_rule = Method("mine", rules.cascade(0.9, 0.9, 0.3), wanted["loose"].tree)
    same_name = Method("mine", rules.cascade(0.9, 0.9, 0.301), wanted["loose"].tree)
    found = run.evaluate(bundle, {"mine": own_rule}, CAPTIONS, folder, **{**again, "timed": 0})
    assert (found["mine"]["speedup"], found["mine"]["step_speedup"]) == (None, None)
    with pytest.raises(ValueError, match=r"mine holds pictures of another job \(other rule\)"):
        run.evaluate(bundle, {"mine": same_name}, CAPTIONS, folder, **again)
    assert drawn(folder) == before

    place = run.turns_of(folder, ["ar", "loose"]) / "000001.json"  # the times of another machine are taken again
    turn = json.loads(place.read_text())
    place.write_text(json.dumps(turn | {"device": "an abacus", "seconds": {"ar": 1e6, "loose": 1e6}}))
    assert run.evaluate(bundle, wanted, CAPTIONS, folder, **again)["loose"]["seconds_per_image"] < 1e5
    assert json.loads(place.read_text())["device"] == turn["device"]
    assert timeless(run.evaluate(bundle, wanted, CAPTIONS, folder, **again)) == timeless(figures)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (
            {"format": run.FORMAT + 1},
            r"written by another version or another command \(its format is 2, this version's 1",
        ),
        ({"prompts": []}, r"its format is None"),
        ("half", "job.json is damaged"),
    ],
)
def test_a_folder_of_another_version_is_refused_and_stays_as_it_is(job, message, bundle, wanted, tmp_path):
    (tmp_path / "job.json").write_text(json.dumps(job)[:-1] if job == "half" else json.dumps(job))
    with pytest.raises(ValueError, match=message):
        run.evaluate(bundle, wanted, CAPTIONS, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["job.json"]


@pytest.mark.parametrize(
    ("labels", "captions", "message"),
    [
        (["../up"], CAPTIONS, "a label names a folder"),
        (["turns-x"], CAPTIONS, "a label names a folder"),
        ([], CAPTIONS, "there are no methods"),
        (["ar"], [], "there are no captions"),
        (["ar"], ["a ball", " "], "caption 1 is empty"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(labels, captions, message, bundle, wanted, tmp_path):
    with pytest.raises(ValueError, match=message):
        run.evaluate(bundle, dict.fromkeys(labels, wanted["ar"]), captions, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_somebody_works_in_is_left_alone(bundle, wanted, tmp_path):
    with files.owned(tmp_path / "run"), pytest.raises(files.InUse, match="run is in use by process"):
        run.evaluate(bundle, wanted, CAPTIONS, tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_pictures_must_be_there_to_be_measured(wanted, tmp_path):
    with pytest.raises(ValueError, match=r"ar lacks 5 of 5 records, 000000.json first: draw again"):
        run.measure({"ar": wanted["ar"]}, CAPTIONS, tmp_path, timed=0)
    with pytest.raises(ValueError, match=r"turns-.* lacks 2 of 2 records"):
        run.measure({"ar": wanted["ar"]}, CAPTIONS, tmp_path, timed=2)


def test_processes_share_the_pictures_and_the_first_takes_the_turns(bundle, wanted, whole, tmp_path):
    own = {"ar": wanted["ar"]}
    options = dict(seed=3, batch=1, timed=1)
    assert run.draw(bundle, own, CAPTIONS, tmp_path, part=(1, 2), **options) == 2
    assert not run.turns_of(tmp_path, ["ar"]).exists()
    assert run.draw(bundle, own, CAPTIONS, tmp_path, part=(0, 2), **options) == 3
    pictures = {name: content for name, content in drawn(whole[0]).items() if name.startswith("ar/0")}
    assert {name: content for name, content in drawn(tmp_path).items() if name.startswith("ar/0")} == pictures
    measured = run.measure(own, CAPTIONS, tmp_path, timed=1, gauges=GAUGES)
    assert len(measured["ar"].seconds) == 1
    assert timeless(made.summarise(measured))["ar"] == timeless(whole[1])["ar"]


class Length:
    """In place of CLIP: scores captions by their length and pictures by their brightness."""

    digest = "length"

    def scores(self, images, texts, progress=None):
        return np.array([image.mean() / 1000 + len(text) / 1000 for image, text in zip(images, texts, strict=True)])


def colours(images):
    """In place of Inception."""
    return images.astype(np.float32).mean(axis=(1, 2))


@pytest.fixture
def here(tmp_path, monkeypatch, model, bundle):
    """An empty folder to work in, a model that is loaded once, a judge and networks that are quick to come by."""
    load = pipeline.load
    monkeypatch.setattr(pipeline, "load", lambda name, *a, **k: bundle if name == model else load(name, *a, **k))
    monkeypatch.setattr(quality, "load_referee", lambda folder: Referee(None, RENDERS))
    monkeypatch.setattr(clip_score, "load", lambda folder: Length())
    monkeypatch.setattr(inception, "load", lambda folder: inception.Network(colours, "colours"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


LINES = [("a red ball on gravel", "near"), ("a blue cone", "far"), ("a green cube on sand", "far")]


def test_eval_writes_pictures_records_metrics_and_reports_and_goes_on(model, here, capsys):
    lines = [json.dumps({"text": text, "category": kind}) for text, kind in LINES]
    pathlib.Path("captions.jsonl").write_text("\n".join(lines))
    pathlib.Path("real").mkdir()
    for number in range(3):
        image = np.random.default_rng(number).integers(0, 256, (9 + number, 12, 3), np.uint8)
        Image.fromarray(image).save(f"real/{number}.png")
    flags = ["--model", model, "--prompts", "captions.jsonl", "--timed", "1", "--batch", "1", "--out", "run"]
    own = (f"{name}=cascade:tree=full:2x1,tau_pos=-1,budget={x}" for name, x in (("loose", 0.9), ("tight", 0)))
    flags += ["--methods", ",".join(["ar", *own])]
    flags += ["--guidance", "1.5", "--clip", "c", "--inception", "i", "--reference", "real", "--square", "8"]
    assert cli.main(["eval", *flags]) == 0
    out, err = capsys.readouterr()
    assert "9 pictures drawn" in out
    assert "only 3 pictures of the reference" in err

    folder = pathlib.Path("run")
    report = json.loads((folder / "report.json").read_text())
    assert list(report["methods"]) == ["ar", "loose", "tight"]
    loose = report["methods"]["loose"]
    assert {"speedup", "alpha", "fidelity", "frechet", "fid", "clip", "tvd_per_image"} <= loose.keys()
    assert loose["fid"] > 0
    assert loose["settings"]["budget"] == 0.9
    assert loose["nominal"] > report["methods"]["tight"]["nominal"] == 0
    assert report["methods"]["ar"]["target_steps"] == 15
    assert (report["pictures"], report["count"], report["sampling"]["guidance"]) == (3, 1, 1.5)
    assert len(report["cautions"]) == 2
    assert "compile_seconds" in report
    records = [json.loads(line) for line in (folder / "loose" / "records.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["a red ball on gravel", "a blue cone", "a green cube on sand"]
    assert loose["fidelity"] == pytest.approx(np.mean([record["fidelity"] for record in records]))
    pixels = [np.asarray(Image.open(folder / "loose" / f"{number:06d}.png")) for number in range(3)]
    expected = [image.mean() / 1000 + len(record["prompt"]) / 1000 for image, record in zip(pixels, records)]
    assert loose["clip"] == pytest.approx(np.mean(expected))
    far = report["categories"]["far"]["loose"]
    assert far["pictures"] == 2
    assert far["clip"] == pytest.approx(np.mean(expected[1:]))

    text = (folder / "report.md").read_text()
    assert "| loose | 0 1 |" in text
    assert "| far | loose | 2 |" in text
    assert "**Careful:** there are only 3 pictures" in text
    page = (folder / "report.html").read_text()
    for source in re.findall(r"src='([^']*)'", page):
        assert (folder / source).is_file()
    assert page.count("<img") == 1 + 3 * 3
    for name in ("curves.png", "grid.png"):
        assert Image.open(folder / name).width > 300

    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*/0*")}
    (folder / "tight" / "000001.json").unlink()
    assert cli.main(["eval", *flags]) == 0
    assert "1 pictures drawn" in capsys.readouterr().out
    changed = {str(path) for path, time in kept.items() if path.stat().st_mtime_ns != time}
    assert changed == {"run/tight/000001.png", "run/tight/000001.json"}
    again = json.loads((folder / "report.json").read_text())
    assert again["methods"] == report["methods"]

    assert cli.main(["eval", *flags, "--seed", "1"]) == 2
    assert "holds pictures of another job (other seed)" in capsys.readouterr().err


BAD = {
    "count": (["--count", "0"], "count must be at least 1"),
    "timed": (["--timed", "-1"], "timed must be at least 0"),
    "no method": (["--methods", "warp"], "unknown method 'warp'"),
    "twice": (["--methods", "ar,ar"], "two methods are called ar: give one another name, as in other=ar"),
    "setting": (["--methods", "eagle:budget=1"], "eagle does not take budget"),
    "no number": (["--methods", "cascade:budget=high"], "budget takes a number, not 'high'"),
    "no setting": (["--methods", "cascade:budget"], "settings are NAME=VALUE, not 'cascade:budget'"),
    "captions": (["--prompts", "none.tsv"], "there is no prompts file none.tsv"),
    "reference": (["--inception", "i"], "FID needs both --inception and --reference"),
    "square": (["--square", "8"], "--square is about the pictures of --reference"),
    "label": (["--methods", "../x=ar"], "a label names a folder"),
    "number": (["--guidance", "high"], "--guidance takes a number, not 'high'"),
    "mesh": (["--mesh", "data=x"], "a mesh is given as"),
    "process": (["--process", "1"], "--coordinator, --processes and --process go together"),
}


@pytest.mark.parametrize(("argv", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_leaves_nothing(argv, message, model, here, capsys):
    assert cli.main(["eval", "--model", model, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert list(here.iterdir()) == []


def test_a_caption_that_cannot_be_read_is_named(model, here, capsys):
    pathlib.Path("captions.txt").write_text("a red ball\na red zebra\n")
    assert cli.main(["eval", "--model", model, "--prompts", "captions.txt"]) == 2
    assert "captions.txt, line 2, 'a red zebra': unknown word zebra" in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == ["captions.txt"]


def test_methods_are_read_with_labels_and_settings():
    parts = ("ar", "loose=cascade:tau_pos=0.7", "ledger=coupled", "gsd:group=9", "tree=chain:4", "plain=eagle")
    assert evaluate.parse_methods(parts) == {
        "ar": ("ar", {}),
        "loose": ("cascade", {"tau_pos": 0.7, "ledger": "coupled"}),
        "gsd": ("gsd", {"group": 9, "tree": "chain:4"}),
        "plain": ("eagle", {}),
    }
