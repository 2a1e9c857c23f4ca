"""The paper's tables and figures: which methods they measure, what they hold them against, and what is written."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image
from small import write_bundle

from cascade_jax import cli, methods, pipeline, trees, tuned
from cascade_jax.cli.paper import parse_drafters
from cascade_jax.evaluation import run
from cascade_jax.evaluation.networks import judge as quality
from cascade_jax.paper import contents, pages, tables, tradeoffs
from cascade_jax.paper import lab as labs
from cascade_jax.paper import numbers as paper_numbers
from cascade_jax.paper.contents import CONTENTS, Entry
from cascade_jax.paper.lab import Lab
from cascade_jax.text import captions
from cascade_jax.tree import name_of

ALPHAS = {"ar": 0.0, "eagle": 1.0, "lantern": 1.5, "lantern++": 1.25, "gsd": 2.0, "cascade": 3.0, "scd": 1.75}


RENDERS = quality.Statistics(np.zeros(1), np.eye(1))


class Certain(quality.Referee):
    """Finds a quarter of every prompt, and every picture as far from renders."""

    def fidelity(self, images, prompts):
        return np.full(len(images), 0.25)

    shapes = fidelity

    def moments(self, images, names):
        return quality.Moments.of(np.arange(len(images))[:, None])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_bundle(tmp_path_factory.mktemp("models") / "small"))


@pytest.fixture(scope="module")
def bundle(model):
    return pipeline.load(model)


@pytest.fixture
def lab(bundle, tmp_path):
    return Lab(bundle, captions.read("scenes", 3), tmp_path / "out", timed=2)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Methods by label and the drafters they ran on, as measuring asks for them; figures are made up."""
    asked = {}

    def evaluate(bundle, wanted, texts, folder, *, timed, **_):
        found = {}
        for label, method in wanted.items():
            asked.setdefault(label, (method, bundle))
            place = pathlib.Path(folder) / label
            place.mkdir(parents=True, exist_ok=True)
            for number in range(len(texts)):
                Image.fromarray(np.full((8, 8, 3), 7 * number, np.uint8)).save(place / f"{number:06d}.png")
            alpha = ALPHAS[method.name] + method.settings.get("budget", 0)
            speed = None if timed == 0 else (alpha + 1) * 0.9
            found[label] = {
                "method": method.name, "tree": name_of(method.tree), "settings": method.settings,
                "seconds_per_image": None if timed == 0 else 2 / speed, "speedup": speed, "target_steps": 15.0,
                "step_speedup": alpha + 1, "alpha": alpha, "tokens_per_step": alpha + 1, "nominal": 0.0,
                "coupled": 0.0, "divergence": 0.1, "fidelity": 0.75, "frechet": None, "clip": None, "fid": None,
                "tvd_per_image": 0.0, "tvd_per_token": 0.0, "intervals": {},
            }  # fmt: skip
        return found

    monkeypatch.setattr(run, "evaluate", evaluate)
    return asked


def test_what_the_paper_prints_twice_is_the_same_here():
    table_1 = paper_numbers.TABLE_1
    for (name, drafter), row in paper_numbers.TABLE_2.items():
        if drafter == "standard" and name != "cascade":  # there with other thresholds
            assert row == table_1[paper_numbers.LLAMAGEN, paper_numbers.COCO][name]
    for dataset, kinds in paper_numbers.TABLE_3B.items():
        assert kinds["i+c"] == table_1[paper_numbers.LLAMAGEN, dataset]["cascade"]
    thresholds = paper_numbers.THRESHOLDS[paper_numbers.LLAMAGEN]
    row = table_1[paper_numbers.LLAMAGEN, paper_numbers.COCO]["cascade"]
    assert paper_numbers.FIGURE_4_POINTS[thresholds] == (row.speedup, row.fid)
    row = paper_numbers.TABLE_2["cascade", "standard"]
    assert paper_numbers.FIGURE_4_POINTS[paper_numbers.TABLE_2_THRESHOLDS] == (row.speedup, row.fid)
    # the abstract's 3.6x, and CASCADE is the fastest in every part of table 1
    assert max(row.speedup for row in paper_numbers.TABLE_2.values()) == 3.6
    for part in table_1.values():
        assert max(part, key=lambda name: part[name].speedup) == "cascade"
    tvd, tokens = paper_numbers.TVD[paper_numbers.LLAMAGEN]
    assert tvd / tokens == pytest.approx(0.001, abs=5e-4)


def test_table_1_holds_every_method_against_the_paper(lab, measured):
    result = tables.table_1(lab)
    assert [row["title"] for row in result.rows] == list(methods.compared())
    known = paper_numbers.TABLE_1[paper_numbers.LLAMAGEN, paper_numbers.COCO]
    assert [row["paper"] for row in result.rows] == [known[name]._asdict() for name in methods.compared()]
    text = pages.markdown(lab, result, "cascade-jax paper table1")
    assert "| cascade | eagle25 |" in text
    assert "3.3x | 3.8 | 40.4 | 0.29 |" in text
    assert "By alpha, here: ar < eagle < lantern++ < lantern < gsd < cascade." in text
    assert "The paper's order by alpha: ar < eagle < lantern < lantern++ < gsd < cascade." in text
    parti = tables.table_1(Lab(lab.bundle, lab.captions, lab.folder, parti=True))
    assert parti.rows[-1]["paper"]["speedup"] == 3.4
    assert "paper: FID" not in pages.markdown(lab, parti, "")


def test_table_1_takes_any_methods_of_the_registry(bundle, lab, measured):
    chosen = {
        "ar": methods.method("ar", bundle),
        "scd": methods.method("scd", bundle, window=3),
        "cascade": methods.method("cascade", bundle),
        "tight": methods.method("cascade", bundle, tau_pos=0.95),
    }
    own = dataclasses.replace(lab, methods=chosen)
    result = tables.table_1(own)
    assert [(row["title"], row["label"]) for row in result.rows] == [(label, label) for label in chosen]
    assert measured["scd"][0].tree == trees.chain(3)
    assert [row["title"] for row in result.rows if row["paper"]] == ["ar", "cascade"]
    pages.write(own, result, "cascade-jax paper table1 --methods ar,scd")
    assert pages.made(own, "table1") and not pages.made(lab, "table1")  # so that `paper all` makes the paper's


def test_a_model_with_thresholds_of_its_own_is_measured_with_the_papers_too(bundle, tmp_path, measured):
    config = dataclasses.replace(bundle.config, cascade={"tau_pos": 0.7, "ledger": "coupled"})
    own = dataclasses.replace(bundle, config=config)
    result = tables.table_1(Lab(own, captions.read("scenes", 1), tmp_path / "out"))
    ours, theirs = result.rows[-2:]
    assert ours["paper"] is None and theirs["paper"]["speedup"] == 3.3
    assert ours["label"] == "cascade-0.7-0.5-0.5-coupled"
    assert theirs["label"] == "cascade-0.85-0.5-0.5-nominal"
    given = tables.table_1(Lab(own, captions.read("scenes", 1), tmp_path / "out", thresholds={"budget": 0.1}))
    assert given.rows[-1]["label"] == "cascade-0.7-0.5-0.1-coupled"


def test_drafters_are_compared_method_by_method(lab, bundle, measured):
    other = labs.with_drafter(bundle, bundle)
    result = tables.table_2(Lab(bundle, lab.captions, lab.folder, {"ours": other}))
    assert [row["title"] for row in result.rows][:3] == ["ar", "eagle, standard", "eagle, ours"]
    by_title = {row["title"]: row for row in result.rows}
    assert by_title["gsd, ours"]["paper"] == paper_numbers.TABLE_2["gsd", "ours"]._asdict()
    method, ran_on = measured["ours-cascade-0.8-0.5-0.5-nominal"]
    assert ran_on is other
    assert (method.settings["tau_pos"], method.settings["ledger"]) == (0.8, "nominal")
    assert measured["gsd"][1] is bundle
    third = tables.table_3a(Lab(bundle, lab.captions, lab.folder, {"ours": other}))
    assert [row["title"] for row in third.rows] == list(methods.compared())
    assert {row["paper"] for row in third.rows} == {None}  # it is no EAGLE-3 drafter
    for table in (tables.table_2, tables.table_3a):
        with pytest.raises(ValueError, match="this table compares drafters: give others with --drafters"):
            table(lab)


def test_runs_of_one_name_are_told_with_their_mean_and_spread(lab, bundle, measured, monkeypatch):
    names = list(parse_drafters(("standard=a", "ours=b", "standard=c")))
    assert names == ["standard#1", "standard#2", "ours"]
    made_up = run.evaluate

    def evaluate(model, wanted, *rest, **knobs):
        found = made_up(model, wanted, *rest, **knobs)
        for label, figures in found.items():
            figures["alpha"] += 0.3 * label.startswith("standard-2")
        return found

    monkeypatch.setattr(run, "evaluate", evaluate)
    others = {name: labs.with_drafter(bundle, bundle) for name in names}
    own = Lab(bundle, lab.captions, lab.folder, others)
    result = tables.table_2(own)
    assert [row["title"] for row in result.rows][:4] == ["ar", "eagle, standard#1", "eagle, standard#2", "eagle, ours"]
    merged = {row["title"]: row for row in result.content["over_runs"]}
    assert list(merged)[:3] == ["ar", "eagle, standard", "eagle, ours"]
    standard = merged["gsd, standard"]
    assert standard["runs"] == 2 and merged["gsd, ours"]["runs"] == 1
    assert standard["figures"]["alpha"] == pytest.approx(ALPHAS["gsd"] + 0.15)
    assert standard["figures"]["spread"]["alpha"] == pytest.approx(0.3 / 2**0.5)
    assert standard["paper"] == paper_numbers.TABLE_2["gsd", "standard"]._asdict()
    text = pages.markdown(own, result, "")
    assert f"{ALPHAS['gsd'] + 0.15:.2f} ± 0.21" in text
    assert "| gsd, standard#2 |" in text and "Means over drafters of 2 runs" in text
    assert "gsd, ours < gsd, standard" in text  # the order is that of the means


def test_each_relaxation_is_switched_off_by_a_threshold_above_1(lab, measured):
    result = tables.table_3b(lab)
    labels = {row["title"]: row["label"] for row in result.rows}
    assert labels["I"] == "cascade-0.85-off-0.5-nominal"
    assert labels["C, coupled ledger"] == "cascade-off-0.5-0.5-coupled"
    assert labels["I+C, mass after the candidate"] == "cascade-0.85-0.5-0.5-nominal-next"
    assert len(set(labels.values())) == len(labels) == 10
    assert measured[labels["I"]][0].settings["tau_seq"] > 1
    held = {row["title"] for row in result.rows if row["paper"]}
    assert held == {"I", "C", "I+C"}


def test_the_trade_off_goes_through_the_papers_thresholds(lab, measured):
    result = tradeoffs.figure_4(lab)
    titles = [row["title"] for row in result.rows]
    assert titles[2:8] == [f"{pos:g}, {seq:g}, {ledger}" for ledger in ("nominal", "coupled")
                           for pos, seq in ((0.85, 0.625), (0.85, 0.5), (0.8, 0.5))]  # fmt: skip
    assert len(titles) == len(set(titles)) == 2 + 6 + 12 - 1  # a point of the grid is one of the paper's
    assert result.pages.keys() == {"figure4.png", "figure4-steps.png"}
    axes = result.pages["figure4.png"].axes[0]
    assert axes.get_xlabel() == "speedup over AR"
    assert len(axes.lines) >= 2


def test_budgets_grow_under_both_ledgers(lab, measured):
    result = tradeoffs.figure_13(lab)
    budgets = [row["figures"]["settings"].get("budget") for row in result.rows]
    assert budgets == [None, *tradeoffs.BUDGETS, *tradeoffs.BUDGETS]
    assert set(paper_numbers.FIGURE_13) <= set(tradeoffs.BUDGETS)
    assert result.pages.keys() == {"figure13.png", "figure13-coupled.png"}
    assert all(row["figures"]["speedup"] is None for row in result.rows)
    written = pages.write(lab, result, "cascade-jax paper figure13")
    assert written == ["figure13-coupled.png", "figure13.json", "figure13.md", "figure13.png"]
    stored = json.loads((lab.folder / "figure13.json").read_text())
    assert stored["paper"] == {"0.0005": 2.3, "0.001": 2.5, "0.5": 3.9}
    assert len(stored["rows"]) == 11
    assert "![Figure 13: growing budgets](figure13.png)" in (lab.folder / "figure13.md").read_text()


def test_pictures_of_each_relaxation_stand_side_by_side(lab, measured):
    result = tradeoffs.figure_14(lab)
    assert [row["title"] for row in result.rows] == ["ar", "I 0.9", "C 0.625", "I+C 0.9, 0.25"]
    page = result.pages["figure14.png"]
    assert page.width > 4 * 128 and page.height > 3 * 128


def test_papers_of_other_models_are_found_by_family(bundle):
    def held(family, target):
        config = type("Config", (), {"family": family, "target": target})
        return Lab(type("Bundle", (), {"config": config}), [], pathlib.Path()).model

    style = lambda name: type("Target", (), {"style": name})
    assert held("chameleon", style("lumina")) == paper_numbers.LUMINA
    assert held("chameleon", style("anole")) is None
    assert held("janus", None) == paper_numbers.JANUS
    assert Lab(bundle, [], pathlib.Path()).model == paper_numbers.LLAMAGEN


def test_a_drafter_of_another_target_is_refused(bundle):
    alone = dataclasses.replace(bundle, config=dataclasses.replace(bundle.config, drafter=None))
    with pytest.raises(ValueError, match="given for its drafter has none"):
        labs.with_drafter(bundle, alone)
    target = dataclasses.replace(bundle.config.target, layers=3)
    other = dataclasses.replace(bundle, config=dataclasses.replace(bundle.config, target=target))
    with pytest.raises(ValueError, match="given for its drafter has another target"):
        labs.with_drafter(bundle, other)


def command(model, what, *flags) -> list[str]:
    return ["paper", what, "--model", model, "--count", "2", "--out", "out", *flags]


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(quality, "load_referee", lambda folder: Certain(None, RENDERS))
    return tmp_path / "here"


@pytest.mark.parametrize(
    "what", ["figure3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("figure8", "figure9"))]
)
def test_figures_of_the_target_alone(what, model, here, capsys):
    assert cli.main(command(model, what, "--temperature", "0.5")) == 0
    assert f"written to out: {what}.json, {what}.md, {what}.png" in capsys.readouterr().out
    stored = json.loads((here / "out" / f"{what}.json").read_text())
    assert stored["sampling"]["temperature"] == 0.5
    with Image.open(here / "out" / f"{what}.png") as page:
        assert np.asarray(page.convert("RGB")).std() > 10
    if what == "figure8":
        assert 0 < stored["entropy"]["mean"] < stored["largest_entropy"] == pytest.approx(np.log(64))
        assert len(stored["top1"]["mean_by_row"]) == 4
    else:
        assert len(stored["pictures"]) == 2
        assert all(-1 <= own["mean_cosine_within_rows"] <= 1 for own in stored["pictures"])


@pytest.mark.slow
@pytest.mark.parametrize("what", ["table1", "table2", "table3a", "table3b", "figure4", "figure13", "figure14"])
def test_every_table_and_figure_is_made_and_not_drawn_again(what, model, here, monkeypatch, capsys):
    monkeypatch.setattr(tradeoffs, "SWEEP", {"tau_pos": (0.5,), "tau_seq": (0.5,)})
    small = dataclasses.replace(methods.METHODS["lantern"], tree=trees.DynamicTree(2, 1, 4))
    monkeypatch.setitem(methods.METHODS, "lantern", small)
    drafters = ["--drafters", f"ours={model}"] if CONTENTS[what].drafters else []
    assert cli.main(command(model, what, "--timed", "1", *drafters)) == 0
    first = json.loads((here / "out" / f"{what}.json").read_text())
    assert all(row["figures"]["alpha"] > 0 for row in first["rows"] if row["label"] != "ar")
    monkeypatch.setattr(methods, "draw_one", None)
    monkeypatch.setattr(methods, "draw_numbers", None)
    assert cli.main(command(model, what, "--timed", "1", *drafters)) == 0
    again = json.loads((here / "out" / f"{what}.json").read_text())
    assert again["rows"] == first["rows"]
    capsys.readouterr()


def test_a_tuned_tree_is_not_the_papers(tmp_path, here, monkeypatch, capsys):
    model = write_bundle(tmp_path / "tuned")
    device = jax.local_devices()[0].device_kind
    tuned.store(model, device, "cascade", {"tree": "chain:2"})
    assert methods.method("cascade", pipeline.load(model)).tree == trees.chain(2)
    measured = []

    def table(lab):
        measured.append(methods.method("cascade", lab.bundle).tree)
        raise ValueError("that will do")

    monkeypatch.setitem(CONTENTS, "table1", Entry(table))
    assert cli.main(command(str(model), "table1")) == 2
    assert measured == [trees.EAGLE_25]
    assert "that will do" in capsys.readouterr().err


def test_everything_is_made_once_and_again_where_something_changed(model, here, measured, monkeypatch, capsys):
    made = []

    def table(lab):
        made.append(lab.gauges)
        return tables.table_1(lab)

    wanted = {"table1": Entry(table), "table2": CONTENTS["table2"], "figure3": CONTENTS["figure3"]}
    monkeypatch.setattr(contents, "CONTENTS", wanted)
    argv = ["paper", "all", "--model", model, "--count", "3", "--out", "out"]
    assert cli.main(argv) == 0
    said = capsys.readouterr()
    assert "table2 compare drafters and are left out" in said.err
    assert "figure3.json" in said.out
    assert [gauge.name for gauge in made[0]] == ["fidelity", "shape_fidelity", "frechet"]
    stored = [json.loads((here / "out" / f"{name}.json").read_text()) for name in ("table1", "figure3")]
    weights = stored[0]["weights"]["own"]
    assert weights == stored[1]["weights"]["own"] == run.weights_of(pipeline.load(model))
    assert [own["count"] for own in stored] == [3, 2]  # figures of a few pictures stay so
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == "made already: out/table1.md\nmade already: out/figure3.md\n"
    assert len(made) == 1
    assert cli.main([*argv, "--budget", "0.25"]) == 0
    assert len(made) == 2


def test_a_method_that_the_paper_lacks_has_no_numbers_of_its(lab, bundle, measured, monkeypatch):
    monkeypatch.setattr(tables, "Eagle3Config", type(bundle.config.drafter))
    monkeypatch.delitem(paper_numbers.TABLE_3A, "gsd")
    rows = tables.table_3a(Lab(bundle, lab.captions, lab.folder, {"ours": labs.with_drafter(bundle, bundle)})).rows
    held = {row["title"]: row["paper"] is not None for row in rows}
    assert held.pop("ar") is held.pop("gsd") is False
    assert all(held.values())


BAD = {
    "what": (["table9"], "unknown table or figure 'table9'; known: table1, table2"),
    "no drafters": (["table3a"], "table3a compares drafters: give others with --drafters NAME=DIR"),
    "too many": (["table1", "--drafters", "ours=x"], "table1 takes no other drafters; table2 and table3a do"),
    "methods": (["figure3", "--methods", "ar"], "figure3 takes no other methods; table1 does"),
    "unknown method": (["table1", "--methods", "arr"], "unknown method 'arr'; known: ar, eagle"),
    "no name": (["table2", "--drafters", "x"], "drafters are NAME=DIR, not 'x'"),
    "no runs of one's own": (["table2", "--drafters", "x#1=y"], "drafters are NAME=DIR, not 'x#1=y'"),
    "no model": (["table2", "--drafters", "ours=nowhere"], "no model 'nowhere'"),
    "count": (["table1", "--count", "0"], "count must be at least 1"),
    "timed": (["table1", "--timed", "-1"], "timed must be at least 0, not -1"),
    "half of FID": (["table1", "--reference", "x"], "FID needs both --inception and --reference"),
    "square": (["table1", "--square", "9"], "--square is about the pictures of --reference"),
    "no captions": (["table1", "--prompts", "x.tsv"], "there is no prompts file x.tsv"),
    "sampling": (["figure8", "--temperature", "warm"], "--temperature takes a number, not 'warm'"),
    "threshold": (["table1", "--tau-pos", "-3", "--count", "1"], "tau_pos must be at least -1"),
}


@pytest.mark.parametrize(("argv", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(argv, message, model, here, capsys):
    assert cli.main(["paper", *argv, "--model", model]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
    assert list(here.iterdir()) == []
