"""Signals at random moments over the long commands: they end well, leave nothing half-written, and lose no result."""

import dataclasses
import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest
import small
from PIL import Image

from cascade_jax import cli, interrupts, pipeline

ROOT = pathlib.Path(cli.__file__).parents[2]
SIGNALS = 15  # for each command
PROMPTS = ["a red ball on gravel", "a blue cone on grass", "a green cube on sand", "a white ball on brick"] * 4

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A model, prompts, training data, and a place for compiled programs."""
    folder = tmp_path_factory.mktemp("signals")
    with pytest.MonkeyPatch.context() as patch:  # pictures as large as the judge reads them
        patch.setattr(small, "VQ", dataclasses.replace(small.VQ, channel_multipliers=(1,) * 6))
        small.write_bundle(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    made = start(folder, ["distill", "--model", "model", "--count", "16", "--out", "data"])
    assert made.wait() == 0, made.stderr.read()
    return folder


def start(place: pathlib.Path, argv: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(place / "xla")}
    command = [sys.executable, "-m", "cascade_jax", *argv]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=place, env=environment, stdout=pipe, stderr=pipe, text=True)


def listen(run: subprocess.Popen) -> None:
    """Waits until the first line of the package was reached: what Python does before that is its own."""
    status = pathlib.Path(f"/proc/{run.pid}/status")
    while run.poll() is None:
        caught = int(status.read_text().partition("SigCgt:")[2].split()[0], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.01)


def pictures(folder: pathlib.Path) -> dict[str, str]:
    """Digests of all pictures, each of which can be read."""
    found = {}
    for path in sorted(folder.rglob("*.png")):
        pixels = np.asarray(Image.open(path))
        found[str(path.relative_to(folder))] = hashlib.sha256(pixels.tobytes()).hexdigest()
    return found


def records(folder: pathlib.Path) -> dict[str, dict]:
    """All records, without times."""
    found = {str(path.relative_to(folder)): json.loads(path.read_text()) for path in folder.rglob("0*.json")}
    return {name: {k: v for k, v in own.items() if k != "seconds"} for name, own in found.items()}


def drawn(folder: pathlib.Path):
    own = {name: own for name, own in pictures(folder).items() if name not in ("grid.png", "curves.png")}  # tell times
    return own, records(folder)


def compared(folder: pathlib.Path):
    report = json.loads((folder / "report.json").read_text())["methods"]
    return {name: [own[key] for key in ("alpha", "target_steps", "nominal", "coupled")] for name, own in report.items()}


def swept(folder: pathlib.Path):
    lines = [json.loads(line) for line in (folder / "points.jsonl").read_text().splitlines()]
    return sorted(json.dumps({k: v for k, v in line.items() if "seconds" not in k}, sort_keys=True) for line in lines)


def trained(folder: pathlib.Path):
    import jax

    leaves = jax.tree.leaves(pipeline.load(folder / "model").params["drafter"])
    return [hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for leaf in leaves]


def distilled(folder: pathlib.Path):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.npz"))
    }


SEVERAL = "ar,eagle,cascade"
COMMANDS: dict[str, tuple[list[str], Callable[[pathlib.Path], object]]] = {
    "generate": (["generate", *PROMPTS[:4], "--count", "16", "--tree", "chain:2"], drawn),
    "generate-list": (["generate-list", "prompts.txt", "--batch", "1", "--tree", "chain:2"], drawn),
    "compare": (["compare", "--methods", SEVERAL, "--tree", "chain:2", "--count", "8"], compared),
    "eval": (["eval", "--methods", SEVERAL, "--prompts", "prompts.txt", "--batch", "1", "--timed", "2"], drawn),
    "sweep": (
        ["scenes", "sweep", "--trees", "chain:2", "--references", "eagle", "--count", "4", "--timed", "0"],
        swept,
    ),
    "distill": (["distill", "--count", "96", "--batch", "8"], distilled),
    "train": (["train", "--data", "data", "--steps", "400", "--batch", "4", "--evaluated", "0"], trained),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_signals_at_random_moments_lose_nothing(name, place):
    argv, result = COMMANDS[name]
    argv = [*argv, "--model", "model", "--out"]
    for out in ("compiled", "expected"):
        begin = time.monotonic()
        run = start(place, [*argv, f"{name}-{out}"])
        error = run.communicate()[1]
        assert run.returncode == 0, error
    seconds, expected = time.monotonic() - begin, result(place / f"{name}-expected")
    assert expected

    rng, folder, ends = random.Random(name), place / name, []
    for _ in range(SIGNALS):
        run, wait = start(place, [*argv, name]), rng.uniform(0.2, seconds)
        time.sleep(wait)
        listen(run)
        run.send_signal(rng.choice(interrupts.SIGNALS))
        out, error = run.communicate()
        told = f"{name} after {wait:.2f} of {seconds:.2f} s, status {run.returncode}:\n{error}"
        assert run.returncode in (0, interrupts.STATUS), told
        for word in ("Traceback", "ignored", "Fatal", "Error"):
            assert word not in error, told
        if run.returncode == interrupts.STATUS:
            assert "cascade-jax: interrupted" in error, told
        else:
            assert result(folder) == expected, told
        if folder.exists():
            pictures(folder)
            assert not list(folder.rglob(".*-unfinished-*")), told
        ends.append(run.returncode)
    run = start(place, [*argv, name])
    error = run.communicate()[1]
    assert run.returncode == 0, error
    assert result(folder) == expected
    assert interrupts.STATUS in ends


def test_the_second_signal_ends_a_command_at_once(place):
    run = start(place, ["generate", *PROMPTS, "--count", "4096", "--model", "model", "--out", "long"])
    time.sleep(2.5)
    listen(run)
    for _ in range(2):
        run.send_signal(signal.SIGINT)
        time.sleep(0.001)
    error = run.communicate(timeout=60)[1]  # all of its pictures would take many times as long
    assert run.returncode == interrupts.STATUS
    assert "Traceback" not in error
