"""docs/extending.md does what it says: its blocks run, in order, as they stand."""

import pathlib
import re
import sys
import types

import pytest

from cascade_jax import methods
from cascade_jax.evaluation import metrics
from cascade_jax.models import families

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "extending.md"
REGISTRIES = ("cascade_jax/methods.py", "cascade_jax/evaluation/metrics/__init__.py", "cascade_jax/models/families.py")


@pytest.fixture
def registries(monkeypatch):
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    monkeypatch.setattr(metrics, "METRICS", metrics.METRICS)
    monkeypatch.setattr(families, "KINDS", {part: dict(kinds) for part, kinds in families.KINDS.items()})
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.slow
def test_each_addition_is_one_file_and_one_line_in_a_registry(registries, capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    running, files = {}, []
    for block in blocks:
        head = re.match(r"# (cascade_jax/\S+\.py)\n", block)
        if head and head[1] not in REGISTRIES:
            files.append(head[1])
            assert not (PAGE.parents[1] / head[1]).exists()
            module = types.ModuleType(head[1].removesuffix(".py").replace("/", "."))
            sys.modules[module.__name__] = module  # as if the file were there
            exec(compile(block, head[1], "exec"), vars(module))
        else:
            exec(compile(block, PAGE.name, "exec"), running)
    assert len(files) == len(set(files)) == 4
    alphas = re.findall(r"\[(\d\.\d+)\]", capsys.readouterr().out)
    assert all(float(alpha) >= 0 for alpha in alphas)
    assert len(alphas) >= 2
    assert isinstance(running["above"].drafter, running["RowAbove"])
