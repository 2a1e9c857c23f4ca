"""The notebooks run from top to bottom, and what is stored of them is what a reader should see."""

import json
import pathlib
import re

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def cells(file: pathlib.Path) -> list[dict]:
    """The code cells of a notebook as it is stored."""
    return [cell for cell in json.loads(file.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def texts(cell: dict) -> list[str]:
    """Everything that a cell's outputs say in words."""
    said = [output["text"] for output in cell["outputs"] if "text" in output]
    said += [output["data"]["text/plain"] for output in cell["outputs"] if "text/plain" in output.get("data", {})]
    return ["".join(text) for text in said]


def test_there_are_eight():
    assert [file.stem.split("_")[0] for file in NOTEBOOKS] == list("12345678")


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_stored_notebook_was_run_from_top_to_bottom_without_noise(file):
    counts, outputs = [], []
    for cell in cells(file):
        counts.append(cell["execution_count"])
        outputs += cell["outputs"]
        assert not any(re.search(r"(?<![\w:/.])/\w+/\w", text) for text in texts(cell))
    assert counts == list(range(1, len(counts) + 1))
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} <= {"stdout"}
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_links_of_a_notebook_lead_somewhere(file):
    prose = json.loads(file.read_text(encoding="utf-8"))["cells"]
    prose = "".join("".join(cell["source"]) for cell in prose if cell["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        assert target.startswith("https://") or (file.parent / target).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(file, tmp_path, monkeypatch):
    """In a process of its own, in the folder where it lies."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    notebook = nbformat.read(file, as_version=4)
    where = {"metadata": {"path": str(file.parent)}}
    nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=where).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output["text"]
