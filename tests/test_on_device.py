"""The script for machines with a GPU, tried with tiny shapes on whatever machine this is."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("on_device", ROOT / "scripts" / "on_device.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["on_device"] = module  # where its dataclass looks for itself
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shell():
    """Runs the shell script, with a folder for what it leaves."""

    def run(out: pathlib.Path, *flags: str) -> subprocess.CompletedProcess:
        env = os.environ | {"OUT": str(out), "PYTHON": sys.executable, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        command = ["bash", str(ROOT / "scripts" / "on_device.sh"), *flags]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    return run


def test_a_launch_cost_is_found_that_was_put_in(script):
    rng = np.random.default_rng(0)
    rows = [{"kernels": int(rng.integers(100, 2000)), "work": float(rng.uniform(1e-4, 5e-3))} for _ in range(6)]
    rows = [row | {"seconds": 1.7e-6 * row["kernels"] + 1.2 * row["work"]} for row in rows]
    found = script.fit(rows)
    assert found["launch"] == pytest.approx(1.7e-6)
    assert found["work_factor"] == pytest.approx(1.2)
    assert found["worst"] < 1e-9


def test_an_unknown_flag_is_refused(shell, tmp_path):
    done = shell(tmp_path / "out", "--foo")
    assert done.returncode == 2
    assert "--train and --tiny" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_steps_are_measured_modelled_and_profiled(shell, tmp_path):
    done = shell(tmp_path, "--tiny")
    assert done.returncode == 0, (tmp_path / "log.txt").read_text()
    result = json.loads((tmp_path / "steps.json").read_text())
    assert {(row["model"], row["method"], row["batch"]) for row in result["rows"]} == {
        ("tiny", method, batch) for method in ("ar", "cascade") for batch in (1, 8)
    }
    for row in result["rows"]:
        assert row["seconds"] > 0
        assert row["kernels"] > 20
        assert row["needed_bytes"] > 0
    assert result["fit"]["worst"] >= 0
    assert result["profile"]
    assert "| tiny | cascade | 8 |" in done.stdout
    assert {file.name for file in tmp_path.iterdir()} == {"log.txt", "steps.json", "steps.md", "step.xplane.pb"}


@pytest.mark.slow
def test_the_parts_of_scenes_are_trained_and_drawn_with(shell, tmp_path):
    done = shell(tmp_path, "--train", "--tiny")
    assert done.returncode == 0, (tmp_path / "log.txt").read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["methods"].keys() == {"ar", "eagle", "cascade"}
    assert (tmp_path / "model.tar.gz").stat().st_size > 1e6
