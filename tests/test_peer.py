"""The script that holds PyTorch against this project times two implementations of the same function."""

import functools
import importlib.util
import json
import pathlib

import jax
import pytest
import tiny_bundles

from cascade_jax.models.transformer import output_major

SCRIPT = pathlib.Path(__file__).parents[1] / "scripts" / "peer.py"


@pytest.fixture(scope="module")
def peer():
    spec = importlib.util.spec_from_file_location("peer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", tiny_bundles.TARGETS)
def test_both_sides_give_the_same_features(family, peer):
    """Float32, through one layer and the last norm."""
    assert peer.difference(tiny_bundles.bundle(family)) < 1e-4


def test_kernels_that_lie_output_major_are_copied_too(peer):
    """As they do in float32 on a CPU from a million numbers on."""
    model = tiny_bundles.bundle("janus")
    kernel = lambda path, x: output_major(x) if x.ndim > 1 and "kernel" in jax.tree_util.keystr(path) else x
    model.params["target"] = jax.tree_util.tree_map_with_path(kernel, model.params["target"])
    assert peer.difference(model) < 1e-4


@pytest.mark.slow
def test_the_script_runs_and_leaves_its_report(peer, monkeypatch, tmp_path):
    monkeypatch.setitem(peer.shapes.SHAPES, "janus-pro-7b", tiny_bundles.JANUS)
    flags = ["--shapes", "janus-pro-7b", "--dtype", "float32", "--steps", "1", "--repeats", "1", "--eager"]
    assert peer.main([*flags, "--out", str(tmp_path / "peer")]) == 0
    result = json.loads((tmp_path / "peer" / "peer.json").read_text())
    assert result["seconds"].keys() == {"cascade_jax", "eager"}
    assert "took\nturns; medians" in (tmp_path / "peer" / "peer.md").read_text()


def test_a_step_of_both_sides_is_timed_and_reported(peer, monkeypatch):
    """By a clock that ticks with every pass of the network: a step is one pass."""
    passes, forward = [0], peer.transformers.LlamaForCausalLM.forward

    @functools.wraps(forward)
    def counted(*arguments, **settings):
        passes[0] += 1
        return forward(*arguments, **settings)

    monkeypatch.setattr(peer.transformers.LlamaForCausalLM, "forward", counted)
    monkeypatch.setattr(peer.time, "perf_counter", lambda: passes[0])
    monkeypatch.setattr(peer.parts, "step_times", lambda *_, **__: [0.5])
    result = peer.compare(tiny_bundles.bundle("janus"), "tiny", steps=2, repeats=1, compiled=False)
    assert result["seconds"] == {"cascade_jax": 0.5, "eager": 1.0}
    assert result["ratios"] == {"eager": 2.0}
    assert "| eager | 1000.00 ms | 2.00x |" in peer.markdown(result, "peer")


def test_sides_that_differ_are_not_timed(peer, monkeypatch):
    monkeypatch.setattr(peer, "difference", lambda model: 0.5)
    with pytest.raises(ValueError, match=r"do not compute the same: features differ by 0\.5"):
        peer.compare(tiny_bundles.bundle("janus"), "tiny", steps=1, repeats=1)
