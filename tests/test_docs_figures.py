"""Figures in the docs are of the weights in the package, and README's table is what `compare` wrote."""

import json
import pathlib
import re

import pytest

from cascade_jax import pipeline
from cascade_jax.evaluation import run

ROOT = pathlib.Path(__file__).parents[1]
# Of scenes-small, made before results told which weights they are of. What is made again leaves this list.
OLDER = {
    "bench/scenes.json",
    *(f"results/{name}.json" for name in ("figure13", "figure14", "methods")),
    # and of an earlier scenes-small
    *(f"results/{name}.json" for name in ("table2", "table3a")),
}


def measured() -> list[str]:
    """JSON files in docs that hold what was measured with a model; plans and benchmarks of random weights do not."""
    docs = ROOT / "docs"
    places = (path.relative_to(docs) for path in docs.rglob("*.json"))
    return sorted(str(path) for path in places if path.parts[0] in ("results", "comparison", "bench"))


@pytest.fixture(scope="module")
def embedded() -> list[dict]:
    return [run.weights_of(pipeline.load(name)) for name in pipeline.EMBEDDED]


@pytest.mark.parametrize("name", measured())
def test_figures_are_of_the_weights_in_the_package(name, embedded):
    content = json.loads((ROOT / "docs" / name).read_text())
    if "llamagen" in name:  # random weights of its sizes
        return
    weights = content.get("weights")
    assert (weights is None) == (name in OLDER)
    if weights:
        assert weights.get("own", weights) in embedded


def table() -> list[list[str]]:
    section = (ROOT / "README.md").read_text().partition("## What you will see")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split("|") for line in section.splitlines() if re.match(r"\| [a-z]", line)]
    return [[cell.strip() for cell in row] for row in rows if row[0].strip() != "method"]


def test_readmes_table_is_what_compare_wrote():
    report = json.loads((ROOT / "docs" / "comparison" / "report.json").read_text())
    assert [row[0] for row in table()] == list(report["methods"])
    assert f"    {report['command']}" in (ROOT / "docs" / "comparison" / "report.md").read_text()
    assert report["command"].split(" --out")[0] in (ROOT / "README.md").read_text()
    for name, _, seconds, speedup, fewer, alpha, divergence, fidelity, frechet in table():
        own = report["methods"][name]
        assert seconds == f"{own['seconds_per_image']:.2f}"
        assert speedup == f"{own['speedup']:.2f}x"
        assert fewer == f"{own['step_speedup']:.2f}x"
        assert float(alpha) == round(own["alpha"], 2)
        assert float(divergence) == round(own["divergence"], 3)
        assert fidelity == f"{own['fidelity']:.3f}"
        assert frechet == f"{own['frechet']:.0f}"
