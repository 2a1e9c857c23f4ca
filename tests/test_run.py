"""The run folder: what was stopped goes on, and nothing else changes."""

import json

import numpy as np
import pytest
from small import write_bundle

from cascade_jax import acceptance, methods, pipeline
from cascade_jax.evaluation import compare, jobs, quality, run
from cascade_jax.evaluation.captions import Caption
from cascade_jax.methods import Method
from cascade_jax.sampling import Sampling

CAPTIONS = [
    Caption("a red ball on gravel", 0, "near"),
    Caption("a blue cone on grass", 1, "near"),
    Caption("a green cube on sand", 2, "far"),
    Caption("a white ball on brick", 3, "far"),
    Caption("a yellow cone", 4, "far"),
]
OPTIONS = dict(seed=3, batch=1, timed=2)


class Darkness(quality.Referee):
    """Judges pictures by how dark they are, and the distance to renders by how much they vary."""

    def fidelity(self, images, prompts):
        assert len(images) == len(prompts)
        return 1 - images.mean(axis=(1, 2, 3)) / 255

    def frechet(self, images):
        return float(images.std())


REFEREE = Darkness(None)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return pipeline.load(write_bundle(tmp_path_factory.mktemp("models") / "small"))


@pytest.fixture(scope="module")
def wanted(bundle):
    loose = methods.method("cascade", bundle, tree="full:2x1", tau_pos=-1, budget=0.9)
    return {"ar": methods.method("ar", bundle), "loose": loose}


@pytest.fixture(scope="module")
def whole(bundle, wanted, tmp_path_factory):
    """A run that nothing interrupted: its folder and its figures."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run.evaluate(bundle, wanted, CAPTIONS, folder, referee=REFEREE, **OPTIONS)


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
        run.evaluate(bundle, wanted, CAPTIONS, tmp_path, referee=REFEREE, progress=cut, **OPTIONS)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/0*")}
    assert (len(before) > 0) == (after > 1)
    assert drawn(tmp_path) != drawn(folder)
    figures = run.evaluate(bundle, wanted, CAPTIONS, tmp_path, referee=REFEREE, **OPTIONS)
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
    assert figures["loose"]["fidelity"] == pytest.approx(np.mean([record["fidelity"] for record in loose]))
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


def test_methods_are_added_but_never_changed(bundle, wanted, whole):
    folder, figures = whole
    before = drawn(folder)
    again = dict(referee=REFEREE, **OPTIONS)
    for changed, named in (
        (dict(captions=CAPTIONS[:4]), "captions"),
        (dict(seed=4), "seed"),
        (dict(sampling=Sampling(temperature=1.0, top_k=40, guidance=3.0)), "sampling"),
        (dict(referee=None), "judged"),
    ):
        given = {"captions": CAPTIONS, **again, **changed}
        with pytest.raises(ValueError, match=rf"holds pictures of another job \(other {named}\)"):
            run.evaluate(bundle, wanted, given.pop("captions"), folder, **given)
    other = methods.method("cascade", bundle, tree="full:2x1", tau_pos=-1, budget=0.8)
    with pytest.raises(ValueError, match=r"loose holds pictures of another job \(other settings, rule\)"):
        run.evaluate(bundle, {"loose": other}, CAPTIONS, folder, **again)
    own_rule = Method("mine", acceptance.cascade(0.9, 0.9, 0.3), wanted["loose"].tree)
    same_name = Method("mine", acceptance.cascade(0.9, 0.9, 0.301), wanted["loose"].tree)
    found = run.evaluate(bundle, {"mine": own_rule}, CAPTIONS, folder, **{**again, "timed": 0})
    assert (found["mine"]["speedup"], found["mine"]["step_speedup"]) == (None, None)
    with pytest.raises(ValueError, match=r"mine holds pictures of another job \(other rule\)"):
        run.evaluate(bundle, {"mine": same_name}, CAPTIONS, folder, **again)
    assert drawn(folder) == before
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


def test_processes_share_the_pictures_and_the_first_takes_the_turns(bundle, wanted, whole, tmp_path):
    own = {"ar": wanted["ar"]}
    options = dict(seed=3, batch=1, timed=1, judged=REFEREE)
    assert run.draw(bundle, own, CAPTIONS, tmp_path, part=(1, 2), **options) == 2
    assert not run.turns_of(tmp_path, ["ar"]).exists()
    assert run.draw(bundle, own, CAPTIONS, tmp_path, part=(0, 2), **options) == 3
    pictures = {name: content for name, content in drawn(whole[0]).items() if name.startswith("ar/0")}
    assert {name: content for name, content in drawn(tmp_path).items() if name.startswith("ar/0")} == pictures
    measured = run.measure(own, CAPTIONS, tmp_path, timed=1, referee=REFEREE)
    assert len(measured["ar"].seconds) == 1
    assert timeless(compare.summarise(measured))["ar"] == timeless(whole[1])["ar"]
