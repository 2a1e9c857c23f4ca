"""A list of prompts, drawn by processes that share a folder."""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from small import write_bundle

from cascade_jax import cli, platforms
from cascade_jax.evaluation import jobs
from cascade_jax.evaluation.networks import judge as quality

ROOT = pathlib.Path(cli.__file__).parents[1]
PROMPTS = ["a red ball on gravel", "a blue cone on grass", "a green cube on sand", "a white ball on brick"] * 3


class Certain(quality.Referee):
    """Finds a quarter of every prompt."""

    def fidelity(self, images, prompts):
        return np.full(len(images), 0.25)

    shapes = fidelity


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a list of twelve prompts, and a place for compiled programs."""
    folder = tmp_path_factory.mktemp("job")
    write_bundle(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def flags(place, out) -> list[str]:
    return [
        "generate-list", str(place / "prompts.txt"), "--out", str(out), "--model", str(place / "model"),
        "--method", "ar",
        "--batch", "1", "--seed", "3", "--dtype", "float32",
    ]  # fmt: skip


@pytest.fixture
def cache(place, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(place / "xla"))


@pytest.fixture(scope="module")
def alone(place):
    """What one process draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(place / "xla"))
        patch.setattr(quality, "load_referee", lambda folder: Certain(None))
        assert cli.main([*flags(place, place / "alone"), "--evaluate"]) == 0
    assert json.loads((place / "alone" / jobs.REPORT).read_text())["fidelity"] == 0.25
    return place / "alone"


def pictures(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.mark.usefixtures("cache")
def test_what_is_missing_is_drawn_again_and_nothing_else(place, alone, capsys):
    before = pictures(alone)
    assert len(before) == len(PROMPTS)
    kept = {path.name: path.stat().st_mtime_ns for path in alone.glob("*.png")}
    (alone / "000004.json").unlink()
    (alone / "000007.json").unlink()
    assert cli.main(flags(place, alone)) == 0
    assert "2 pictures drawn" in capsys.readouterr().out
    assert pictures(alone) == before
    again = {path.name for path in alone.glob("*.png") if path.stat().st_mtime_ns != kept[path.name]}
    assert again == {"000004.png", "000007.png"}
    report = json.loads((alone / jobs.REPORT).read_text())
    assert report["pictures"] == 12 and report["target_steps"] == 15


@pytest.mark.usefixtures("cache")
def test_another_job_does_not_go_into_the_same_folder(place, alone, capsys):
    assert cli.main([*flags(place, alone), "--seed", "4"]) == 2
    assert "holds pictures of another job (other seed): give another --out" in capsys.readouterr().err


@pytest.mark.usefixtures("cache")
def test_a_machine_that_draws_with_another_type_does_not_go_on(place, alone, capsys, monkeypatch):
    monkeypatch.setitem(platforms.DEFAULTS, "cpu", dataclasses.replace(platforms.DEFAULTS["cpu"], decoding="bfloat16"))
    assert cli.main(flags(place, alone)[:-2]) == 2
    assert "holds pictures of another job (other dtype): give another --out" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_two_processes_draw_what_one_draws_without_overlap_or_loss(killed, place, alone, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = tmp_path / "both"
    setting = os.environ | {
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(place / "xla"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }  # fmt: skip

    def start(process):
        own = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(process)]
        command = [sys.executable, "-m", "cascade_jax", *flags(place, out), *own]
        return subprocess.Popen(command, env=setting, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    first, second = start(0), start(1)
    if killed:
        while not (out / "000001.json").exists():
            assert second.poll() is None, second.stderr.read()
            time.sleep(0.02)
        second.send_signal(signal.SIGKILL)
        second.wait()
        second = start(1)
    said = [process.communicate(timeout=300) for process in (second, first)][::-1]
    assert second.returncode == 0, said
    assert (first.returncode, second.returncode) == (0, 0), said
    assert pictures(out) == pictures(alone)
    report = json.loads((out / jobs.REPORT).read_text())
    assert report["pictures"] == 12
    assert report["by_process"] == {"0": 6, "1": 6}
    drawn = [int(text.split(":")[1].split()[0]) for text, _ in said]
    assert drawn[0] == 6
    assert drawn[1] == 6 or (killed and drawn[1] < 6)


BAD = {
    "no file": (["nowhere.txt"], "there is no prompts file nowhere.txt"),
    "half a place": (["{prompts}", "--coordinator", "localhost:1"], "--coordinator, --processes and --process go"),
    "process": (["{prompts}", "--coordinator", "x:1", "--processes", "2", "--process", "2"], "between 0 and 1, not 2"),
    "mesh": (["{prompts}", "--mesh", "data=0"], "a mesh is given as data=2,model=4, not 'data=0'"),
    "batch": (["{prompts}", "--batch", "0"], "batch must be at least 1"),
}


@pytest.mark.parametrize(("argv", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(argv, message, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [str(place / "prompts.txt") if word == "{prompts}" else word for word in argv]
    assert cli.main(["generate-list", *argv, "--out", "out", "--model", str(place / "model")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_waiting_ends_when_nobody_draws(tmp_path):
    with pytest.raises(ValueError, match="3 of 3 pictures are missing and nobody draws them"):
        jobs.wait(tmp_path, 3, patience=0.0, say=lambda text: None)
