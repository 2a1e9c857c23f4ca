"""cascade-jax eval: from captions to a report."""

import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image
from small import write_bundle

from cascade_jax import cli, eval_commands, pipeline
from cascade_jax.evaluation import clip_score, fid, quality


class Darkness(quality.Referee):
    """Judges pictures by how dark they are."""

    def fidelity(self, images, prompts):
        return 1 - images.mean(axis=(1, 2, 3)) / 255

    def frechet(self, images):
        return float(images.std())


class Length:
    """In place of CLIP: scores captions by their length and pictures by their brightness."""

    digest = "length"

    def scores(self, images, texts, progress=None):
        return np.array([image.mean() / 1000 + len(text) / 1000 for image, text in zip(images, texts, strict=True)])


def colours(images):
    """In place of Inception."""
    return images.astype(np.float32).mean(axis=(1, 2))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_bundle(tmp_path_factory.mktemp("models") / "small"))


@pytest.fixture(scope="module")
def bundle(model):
    return pipeline.load(model)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, model, bundle):
    """An empty folder to work in, a model that is loaded once, a judge and networks that are quick to come by."""
    load = pipeline.load
    monkeypatch.setattr(pipeline, "load", lambda name, dtype=None: bundle if name == model else load(name, dtype))
    monkeypatch.setattr(quality, "load_referee", lambda folder: Darkness(None, np.zeros(1), np.eye(1)))
    monkeypatch.setattr(clip_score, "load", lambda folder: Length())
    monkeypatch.setattr(fid, "load", lambda folder: fid.Network(colours, "colours"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


CAPTIONS = [("a red ball on gravel", "near"), ("a blue cone", "far"), ("a green cube on sand", "far")]


def test_eval_writes_pictures_records_metrics_and_reports_and_goes_on(model, here, capsys):
    lines = [json.dumps({"text": text, "category": kind}) for text, kind in CAPTIONS]
    pathlib.Path("captions.jsonl").write_text("\n".join(lines))
    pathlib.Path("real").mkdir()
    for number in range(3):
        image = np.random.default_rng(number).integers(0, 256, (9 + number, 12, 3), np.uint8)
        Image.fromarray(image).save(f"real/{number}.png")
    flags = ["--model", model, "--captions", "captions.jsonl", "--timed", "1", "--batch", "1", "--out", "run"]
    flags += [
        "--methods",
        "ar",
        *(f"{name}=cascade:tree=full:2x1,tau_pos=-1,budget={x}" for name, x in (("loose", 0.9), ("tight", 0))),
    ]
    flags += ["--sampling", "guidance=1.5", "--clip", "c", "--inception", "i", "--reference", "real", "--square", "8"]
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
    assert loose["alpha"] > report["methods"]["tight"]["alpha"]
    assert report["methods"]["ar"]["target_steps"] == 15
    assert (report["pictures"], report["count"], report["sampling"]["guidance"]) == (3, 1, 1.5)
    assert len(report["cautions"]) == 2
    assert report["compile_seconds"] > 0
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
    "twice": (["--methods", "ar", "ar"], "two methods are called ar: give one another name, as in other=ar"),
    "setting": (["--methods", "eagle:budget=1"], "eagle does not take budget"),
    "no setting": (["--methods", "cascade:budget"], "settings are NAME=VALUE, not 'budget'"),
    "sampling": (["--sampling", "heat=2"], "unknown sampling settings: heat"),
    "captions": (["--captions", "none.tsv"], "there is no captions file none.tsv"),
    "reference": (["--inception", "i"], "FID needs both --inception and --reference"),
    "square": (["--square", "8"], "--square is about the pictures of --reference"),
    "label": (["--methods", "../x=ar"], "a label names a folder"),
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
    assert cli.main(["eval", "--model", model, "--captions", "captions.txt"]) == 2
    assert "prompt 2, 'a red zebra': unknown word zebra" in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == ["captions.txt"]


def test_methods_are_read_with_labels_and_settings():
    assert eval_commands.parse_methods(("ar", "loose=cascade:tau_pos=0.7,ledger=coupled", "gsd:group=9")) == {
        "ar": ("ar", {}),
        "loose": ("cascade", {"tau_pos": 0.7, "ledger": "coupled"}),
        "gsd": ("gsd", {"group": 9}),
    }
