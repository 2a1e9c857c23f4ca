import json
import os
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from small import write_bundle

from cascade_jax import bundle as bundles
from cascade_jax import cli, methods, pipeline, trees
from cascade_jax.cli.flags import Settings
from cascade_jax.evaluation import figures, run, sweep
from cascade_jax.evaluation.metrics.metric import FewPictures, interval
from cascade_jax.evaluation.networks import judge as quality
from cascade_jax.evaluation.networks.moments import Moments, Statistics, frechet, statistics
from cascade_jax.measure import limits, parts
from cascade_jax.models.judge import Judge
from cascade_jax.pipeline import Report
from cascade_jax.scenes import captions, data, judge

LOAD_REFEREE = quality.load_referee
KEYS = {
    "seconds_per_image", "speedup", "alpha", "tokens_per_step", "target_steps", "nominal", "coupled", "divergence",
    "fidelity",
}  # fmt: skip


class Darkness(quality.Referee):
    """Judges that are quick to come by: pictures by how dark they are."""

    def fidelity(self, images, prompts):
        assert len(images) == len(prompts)
        return 1 - images.mean(axis=(1, 2, 3)) / 255

    shapes = fidelity

    def moments(self, images, names):
        return Moments.of(images.mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_bundle(tmp_path_factory.mktemp("models") / "small"))


@pytest.fixture(scope="module")
def bundle(model):
    return pipeline.load(model)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, model, bundle):
    load = pipeline.load
    monkeypatch.setattr(pipeline, "load", lambda name, *a, **k: bundle if name == model else load(name, *a, **k))
    monkeypatch.setattr(quality, "load_referee", lambda folder: Darkness(None, Statistics(np.zeros(3), np.eye(3))))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_compare_reports_every_method_next_to_ar(model, capsys):
    os.mkdir("out")
    with open("out/mine.txt", "w") as file:
        file.write("stays")
    with open("prompts.txt", "w") as file:
        file.write("a red ball\n\n  a blue cone on sand  \n")
    flags = ["--methods", "cascade", "--tree", "chain:1", "--prompts", "prompts.txt", "--quality", "3", "--out", "out"]
    assert cli.main(["compare", "--model", model, *flags]) == 0
    assert sorted(os.listdir("out")) == ["grid.png", "mine.txt", "report.json", "report.md"]

    with open("out/report.json") as file:
        report = json.load(file)
    assert {"model", "device", "tree", "count", "methods"} <= set(report)
    assert (report["model"], report["tree"], report["count"], report["pictures"]) == (model, "chain:1", 2, 3)
    assert report["prompts"] == ["a red ball", "a blue cone on sand"]
    assert list(report["methods"]) == ["ar", "cascade"]
    assert all(set(figures) >= KEYS for figures in report["methods"].values())
    ar, cascade = report["methods"].values()
    assert (ar["speedup"], ar["alpha"], ar["target_steps"], ar["divergence"]) == (1, 0, 15, 0)
    assert cascade["target_steps"] < 15
    assert cascade["speedup"] == pytest.approx(ar["seconds_per_image"] / cascade["seconds_per_image"])
    assert cascade["tokens_per_step"] == pytest.approx(cascade["alpha"] + 1)
    assert cascade["step_speedup"] == pytest.approx(cascade["alpha"] + 1)  # all 15 tokens come from steps
    assert cascade["settings"]["budget"] == 0.5
    low, high = cascade["intervals"]["alpha"]
    assert low <= cascade["alpha"] <= high
    assert 0 < cascade["fidelity"] < 1
    assert cascade["frechet"] > 0

    with open("out/report.md") as file:
        text = file.read()
    assert f"cascade-jax compare --model {model}" in text
    assert "| cascade | chain:1 |" in text
    with Image.open("out/grid.png") as grid:
        assert grid.width > 2 * 128
        assert grid.height > 2 * 128
    assert "cascade" in capsys.readouterr().out


def test_captions_do_not_depend_on_how_many_are_asked_for():
    assert data.random_captions(5, 1)[:3] == data.random_captions(3, 1)
    assert data.random_captions(3, 1) != data.random_captions(3, 2)
    assert not set(data.random_captions(20, 1)) & set(data.random_captions(20, 1, training=True))


def test_acceptance_figures_are_per_step_not_per_picture():
    zero = np.zeros(2)
    stats = Report(
        steps=np.array([10, 30]), accepted=np.array([20, 0]), alpha=np.array([2.0, 0.0]), tokens_per_step=zero,
        nominal=np.array([0.4, 0.0]), coupled=zero, divergence=np.array([0.0, 0.2]),
    )  # fmt: skip
    found = figures.acceptance_figures(stats)
    assert found["alpha"] == pytest.approx(20 / 40)
    assert found["target_steps"] == 20
    assert found["nominal"] == pytest.approx(0.4 * 10 / 40)
    assert found["divergence"] == pytest.approx(0.2 * 30 / 40)


def test_frechet_distance_of_gaussians_with_commuting_covariances_has_a_closed_form():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    a, b, mean = rng.uniform(0.1, 2, 5), rng.uniform(0.1, 2, 5), rng.normal(size=5)
    expected = np.sum(mean**2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    one, other = Statistics(mean, basis * a @ basis.T), Statistics(np.zeros(5), basis * b @ basis.T)
    assert frechet(one, other) == pytest.approx(expected)
    assert frechet(one, one) == pytest.approx(0, abs=1e-9)


def test_a_packed_judge_and_its_reference_are_found_in_their_folder(tmp_path):
    network = Judge(judge.CONFIG, rngs=nnx.Rngs(0))
    images = np.random.default_rng(0).integers(0, 256, (4, 128, 128, 3), np.uint8)
    found = statistics(Moments.of(judge.features(network, images)))
    with bundles.written(tmp_path / "judge") as writer:
        writer.put("metric", nnx.state(network), np.float32)
        writer.finish(bundles.MetricConfig(judge.CONFIG))
    np.savez(tmp_path / "judge" / quality.REFERENCE, mean=found.mean, covariance=found.covariance)
    referee = LOAD_REFEREE(tmp_path / "judge")
    with pytest.warns(FewPictures, match="only 4 pictures, fewer than the judge's 128 .* the Fréchet distance means n"):
        distance = referee.distance(referee.moments(images, range(4)))
    assert distance == pytest.approx(0, abs=1e-6 * np.trace(found.covariance))
    assert referee.distance(referee.moments(images[:1], [0])) is None
    prompts = ["a red ball"] * 4
    expected = judge.fidelity(judge.read(network, images), [captions.parse(prompt) for prompt in prompts])
    np.testing.assert_array_equal(referee.fidelity(images, prompts), expected)


def test_a_damaged_judge_gives_no_number():
    graph, state = nnx.split(Judge(judge.CONFIG, rngs=nnx.Rngs(0)))
    broken = nnx.merge(graph, jax.tree.map(lambda x: x * np.nan, state))
    referee = quality.Referee(broken, Statistics(np.zeros(128), np.eye(128)))
    images = np.zeros((2, 128, 128, 3), np.uint8)
    with pytest.raises(ValueError, match="what the judge reads in the picture of a red ball is not finite"):
        referee.fidelity(images, ["a red ball", "a blue cone"])
    with pytest.raises(ValueError, match=r"the judge's feature of 000\.png is not finite"):
        referee.moments(images, ["000.png", "001.png"])


def test_a_bootstrap_interval_narrows_like_the_standard_error():
    values = np.random.default_rng(0).normal(size=400)
    low, high = interval(lambda rows: float(np.mean(values[rows])), 400)
    assert low < values.mean() < high
    # two standard errors each side; the tolerance covers the resampling noise of the two quantiles
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)


def _point(method, fidelity, frechet, speedup):
    return {"method": method, "fidelity": fidelity, "frechet": frechet, "speedup": speedup}


def test_the_choice_is_the_fastest_cascade_that_keeps_ars_quality():
    base = _point("ar", 0.95, 10.0, 1.0)
    good = _point("cascade", 0.931, 10.9, 2.0)
    others = [
        _point("cascade", 0.929, 9.0, 3.0),  # unfaithful
        _point("cascade", 0.95, 11.1, 3.0),  # far from renders
        _point("cascade", 0.96, 9.0, 1.9),  # slower
        _point("eagle", 0.95, 10.0, 2.5),  # no cascade
    ]
    assert sweep.choose([base, *others, good]) is good
    assert sweep.choose([base, *others[:2]]) is None
    assert sweep.choose([_point("ar", None, None, 1.0), good]) is None


def test_sweep_draws_the_trade_off_names_a_choice_and_goes_on_where_it_stopped(model, capsys, monkeypatch):
    flags = ["--trees", "chain:1", "--tau-pos", "0.5", "1.1", "--tau-seq", "0.5", "--budget", "0.5"]
    flags += ["--ledger", "nominal", "--references", "ar", "--count", "1", "--timed", "1"]
    assert cli.main(["scenes", "sweep", "--model", model, *flags]) == 0
    assert sorted(os.listdir("sweep")) == ["points.jsonl", "sweep.json", "sweep.md", "sweep.png"]
    with open("sweep/sweep.json") as file:
        result = json.load(file)
    assert [point["method"] for point in result["points"]] == ["ar", "cascade", "cascade"]
    assert [point["settings"].get("tau_pos") for point in result["points"]] == [None, 0.5, 1.1]
    ar, loose, tight = result["points"]
    assert ar["speedup"] == ar["step_speedup"] == 1
    assert loose["step_seconds"] == tight["step_seconds"] > 0
    assert loose["nominal"] >= tight["nominal"]
    assert loose["step_speedup"] == pytest.approx(ar["target_steps"] / loose["target_steps"])
    out = capsys.readouterr().out
    assert "cascade-jax scenes sweep" in out
    assert "0.5 0.5 0.5 nominal" in out

    lines = pathlib.Path("sweep/points.jsonl").read_text().splitlines(keepends=True)
    pathlib.Path("sweep/points.jsonl").write_text("".join(lines[:2]))
    measured, measure = [], sweep._measure
    monkeypatch.setattr(sweep, "_measure", lambda *given: measured.append(given[1].settings) or measure(*given))
    assert cli.main(["scenes", "sweep", "--model", model, *flags]) == 0
    assert [settings["tau_pos"] for settings in measured] == [1.1]
    assert cli.main(["scenes", "sweep", "--model", model, *flags, "--seed", "1"]) == 0
    assert len(measured) == 4
    with open("sweep/sweep.json") as file:
        other = json.load(file)
    assert other["seed"] == 1
    assert cli.main(["scenes", "sweep", "--model", model, *flags, "--temperature", "0.5"]) == 0
    assert len(measured) == 7
    with open("sweep/sweep.json") as file:
        assert json.load(file)["sampling"]["temperature"] == 0.5


def test_a_choice_is_printed_as_config_json_holds_it():
    line = sweep.config_line({"settings": {"tau_pos": 0.9, "ledger": "coupled"}, "tree": "chain:4"})
    assert json.loads(f"{{{line}}}") == {"cascade": {"tau_pos": 0.9, "ledger": "coupled", "tree": "chain:4"}}


def test_bench_measures_parts_loop_memory_and_batches(model, monkeypatch, capsys):
    monkeypatch.setattr(parts, "SIZES", (trees.ROOT, trees.chain(1)))
    monkeypatch.setattr(limits.bandwidth, "__defaults__", (2**22,))
    monkeypatch.setattr(limits.matmul_rate, "__defaults__", (64,))
    flags = ["--tree", "chain:1", "--batch", "1", "--steps", "4", "--repeats", "1", "--alpha", "1"]
    assert cli.main(["bench", "--model", model, *flags]) == 0
    with open("bench/bench.json") as file:
        result = json.load(file)
    assert result["weights"] == run.weights_of(pipeline.load(model))
    assert set(result["parts"]) == {"draft", "target", "verify", "commit"}
    assert result["sum"] == pytest.approx(sum(result["parts"].values()))
    assert result["overhead"] == pytest.approx(result["loop"] / result["sum"] - 1)
    assert [row["nodes"] for row in result["target_pass"]] == [1, 2]
    assert result["ar"]["ratio"] == pytest.approx(result["ar"]["step"] / result["ar"]["read"])
    assert result["report"]["ar_share"] == pytest.approx(1 / result["ar"]["ratio"])
    assert {"bandwidth", "matmul", "verify_share", "peak_memory", "compile_seconds"} <= set(result["report"])
    around = result["prefill"] + result["report"]["pixels"]
    assert result["projection"]["ar"] == pytest.approx(around + 15 * result["ar"]["step"])
    assert result["projection"]["seconds"] == pytest.approx(around + 7.5 * result["loop"])  # two tokens a step
    (row,) = result["batches"]
    assert row["batch"] == 1
    assert all(row[name]["pictures_per_second"] > 0 for name in ("ar", "cascade"))
    with open("bench/bench.md") as file:
        assert "| batch | ar step |" in file.read()
    assert "sum of the parts" in capsys.readouterr().out


def test_settings_go_to_the_methods_that_take_them(bundle):
    wanted = {name: (name, {}) for name in ("ar", "gsd", "cascade")}
    wanted |= {"loose": ("cascade", {"budget": 0.9}), "alone": ("cascade", {"window": 2, "candidates": 1})}
    chosen = Settings(tree="chain:2", budget=0.1, group=3).methods(bundle, wanted)
    assert {label: own.tree for label, own in chosen.items()} == {
        "ar": trees.ROOT, **dict.fromkeys(["gsd", "cascade", "loose"], trees.chain(2)), "alone": trees.window(2, 1)
    }  # fmt: skip
    assert [own.settings.get("budget") for own in chosen.values()] == [None, None, 0.1, 0.9, 0.1]
    assert chosen["gsd"].settings == {"group": 3}
    own = ("tau_pos", "tau_seq", "budget", "ledger", "mass")
    assert methods.takes("cascade") == ("window", "guess", "candidates", *own)
