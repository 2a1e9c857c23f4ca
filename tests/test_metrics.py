"""The registry of metrics: a metric is a file and a line, and tables, reports, flags and help are made of it."""

import ast
import dataclasses
import pathlib

import numpy as np
import pytest

import cascade_jax
from cascade_jax import cli, methods
from cascade_jax.evaluation import curves, figures, metrics, sweep, tables
from cascade_jax.evaluation.metrics import Album, Gauge, Measured, Metric, Order
from cascade_jax.evaluation.metrics.metric import PICTURES, Flag, mean_of, stacks
from cascade_jax.methods import Method
from cascade_jax.pipeline import Report
from cascade_jax.tree import ROOT, chain

ROOM = pathlib.Path(cascade_jax.__file__).parent
# Networks are kinds of bundles, and have names in that registry too.
ELSEWHERE = [ROOM / "evaluation" / "metrics", ROOM / "models", ROOM / "bundle"]


def brightness(order: Order) -> Gauge | None:
    if order.given.get("lamp") is None:
        return None
    return Gauge("brightness", lambda album, progress: np.array([image.mean() for image in album.images()]))


BRIGHTNESS = Metric(
    "brightness", PICTURES, mean_of("brightness"), "bright", "{:.1f}", "Brightness is the mean of all colours.",
    interval=True, axis="brightness", bar=lambda base: base - 1, within="brightness within 1",
    flags=(Flag("lamp", int, "N", "how bright the lamp is"),), open=brightness,
)  # fmt: skip


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, BRIGHTNESS))


def measured(tree, values, seconds=()) -> Measured:
    steps, zero = np.array([4, 6]), np.zeros(2)
    stats = Report(steps, np.array([2, 0]), zero, zero, zero, zero, zero)
    return Measured(Method("x", None, tree), np.array(seconds), stats, values)


def literals(path: pathlib.Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_no_metric_of_pictures_is_named_outside_of_the_registry():
    names = {metric.name for metric in metrics.METRICS if metric.kind == PICTURES}
    found = {}
    for path in ROOM.rglob("*.py"):
        if not any(place in path.parents for place in ELSEWHERE) and (named := literals(path) & names):
            found[str(path.relative_to(ROOM))] = named
    assert found == {}


def test_a_new_metric_is_in_tables_notes_figures_and_choices(registered):
    album = Album.of(np.stack([np.full((4, 4, 3), 7, np.uint8), np.full((4, 4, 3), 9, np.uint8)]), ["a", "b"])
    (gauge,) = metrics.opened(Order(unjudged(), {"lamp": 1}))
    values = {gauge.name: gauge.measure(album, None)}
    found = figures.summarise({"ar": measured(ROOT, {}), "x": measured(chain(2), values)})
    assert found["x"]["brightness"] == 8 and found["ar"]["brightness"] is None
    assert found["x"]["intervals"]["brightness"] == (7, 9)
    head, *rows = tables.rows(found)
    assert head[-1] == "bright"
    assert [row[-1] for row in rows] == ["–", "8.0"]
    assert [metric.name for metric in curves.quality([found["x"]])] == ["divergence", "brightness"]
    base = {"method": methods.AR, "speedup": 1.0, "brightness": 8.0}
    dark, bright = ({"method": methods.CASCADE, "speedup": 2.0, "brightness": x} for x in (6.9, 7.1))
    assert sweep.choose([base, dark]) is None
    assert sweep.choose([base, dark, bright]) is bright


def unjudged():
    """A model whose captions no judge can read."""
    return dataclasses.make_dataclass("Model", ["config"])(dataclasses.make_dataclass("Config", ["of_scenes"])(False))


def test_flags_and_help_are_the_registrys(capsys):
    assert cli.main(["eval", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for flag in metrics.flags():
        assert f"--{flag.name} " in told
        assert " ".join(flag.help.split()[:3]) in told
    with pytest.raises(ValueError, match="FID needs both --inception and --reference"):
        metrics.check({"inception": "x"})


def test_what_nobody_asked_for_is_not_opened():
    assert metrics.opened(Order(unjudged())) == []


def test_figures_are_over_the_first_method_that_draws_token_by_token():
    found = figures.summarise({"x": measured(chain(2), {}, [1.0, 2.0]), "token": measured(ROOT, {}, [3.0, 6.0])})
    assert found["x"]["speedup"] == 3 and found["token"]["speedup"] == 1
    assert found["x"]["intervals"]["speedup"] == (3, 3)  # the same captions are resampled for both
    assert figures.summarise({"x": measured(chain(2), {}, [1.0])})["x"]["speedup"] is None


def test_every_metric_has_a_name_of_its_own_and_a_place():
    names = [metric.name for metric in metrics.METRICS]
    assert len(set(names)) == len(names)
    assert all(metrics.by_name(metric.name) is metric for metric in metrics.METRICS)
    for metric in metrics.METRICS:
        assert (metric.open is not None) == (metric.kind == PICTURES)


def test_an_album_is_stacked_to_its_last_picture():
    album = Album.of(np.zeros((5, 2, 2, 3), np.uint8), ["a"] * 5)
    assert [len(batch) for batch in stacks(album.images(), 2)] == [2, 2, 1]


def test_curves_do_not_blow_up_differences_that_are_none():
    methods_ = {
        name: {"method": name, "speedup": x, "intervals": {}, "divergence": 0.5, "fidelity": y}
        for name, x, y in (("a", 1.0, 0.9500), ("b", 1.5, 0.9505))
    }
    for axes in curves.figure(methods_).axes:
        for low, high in (axes.get_xlim(), axes.get_ylim()):
            assert high - low >= curves.LEAST * max(abs(low), abs(high)) * 0.9
