"""The script that holds PyTorch against this project times two implementations of the same function."""

import importlib.util
import pathlib

import pytest
import tiny_bundles

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


def test_steps_of_both_sides_are_timed_and_reported(peer, monkeypatch):
    monkeypatch.setattr(peer.parts, "step_times", lambda *_: [0.5])
    result = peer.compare(tiny_bundles.bundle("janus"), "tiny", steps=2, repeats=1, compiled=False)
    assert result["seconds"]["eager"] > 0
    assert result["ratios"]["eager"] == pytest.approx(result["seconds"]["eager"] / 0.5)
    assert "| eager |" in peer.markdown(result, "peer")


def test_sides_that_differ_are_not_timed(peer, monkeypatch):
    monkeypatch.setattr(peer, "difference", lambda model: 0.5)
    with pytest.raises(ValueError, match=r"do not compute the same: features differ by 0\.5"):
        peer.compare(tiny_bundles.bundle("janus"), "tiny", steps=1, repeats=1)
