"""README's commands and its Python, run as they stand there but for numbers that only make them long."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FEWER = {"count": 2, "quality": 2, "steps": 2, "timed": 0}
TO_TRAIN_ON = 16  # pictures: a batch, and some to hold out
# Installing and testing are what CI does with README's own lines; notebooks, and plans, which take plugins that compile
# for other devices, have tests of their own; so have commands that time all there is.
ELSEWHERE = re.compile(r"^(pip install|pytest|jupyter|cascade-jax (plan|bench|tune-tree))\b")

pytestmark = pytest.mark.slow


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    """Lines of README's shell blocks, in their order, without what is run elsewhere."""
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    parts = [[part for part in line.split(" && ") if not ELSEWHERE.match(part)] for line in lines]
    return [" && ".join(own) for own in parts if own]


def shortened(line: str) -> str:
    def fewer(found: re.Match) -> str:
        name, number = found.groups()
        return f"--{name} {TO_TRAIN_ON if int(number) > 1000 else FEWER[name]}"

    return re.sub(rf"--({'|'.join(FEWER)}) (\d+)", fewer, line)


def test_its_commands_run(tmp_path):
    """One after the other in one folder, for some use what others made."""
    shim = tmp_path / "bin" / "cascade-jax"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cascade_jax "$@"\n')
    shim.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{shim.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    (tmp_path / "here").mkdir()
    assert len(commands()) > 15
    for line in commands():
        run = subprocess.run(
            ["bash", "-c", shortened(line)], cwd=tmp_path / "here", env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, f"{line}\n{run.stderr[-2000:]}"


def test_its_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    assert len(blocks("python")) >= 3
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
