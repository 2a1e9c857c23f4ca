"""Trees that were found for a machine lie in the user's cache, never in a model, and can be left out."""

import json

import jax
import pytest
from small import write_bundle

from cascade_jax import bundle as bundles
from cascade_jax import methods, pipeline, trees, tuned


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cascade_jax" / "trees"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("models") / "small")


def listing(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_found_tree_becomes_the_methods_and_the_model_stays_as_it_is(model, cache):
    before, device = listing(model), jax.local_devices()[0].device_kind
    place = tuned.store(model, device, "cascade", {"tree": "chain:2"})
    assert place.parent == cache
    assert listing(model) == before
    loaded = pipeline.load(model)
    found = methods.method("cascade", loaded)
    assert (found.tree, found.tuned) == (trees.chain(2), True)
    own = methods.method("cascade", loaded, tree=methods.DEFAULT)
    assert (own.tree, own.tuned) == (trees.EAGLE_25, False)
    for other in (methods.method("eagle", loaded), methods.method("cascade", loaded, tree="chain:4")):
        assert not other.tuned
    tuned.store(model, device, "eagle", {"tree": "chain:3"})
    assert methods.method("cascade", pipeline.load(model)).tree == trees.chain(2)


def test_a_tree_of_another_kind_of_device_is_not_used(model):
    tuned.store(model, "an abacus", "cascade", {"tree": "chain:2"})
    assert not methods.method("cascade", pipeline.load(model)).tuned


def test_a_model_is_known_wherever_it_lies_and_one_that_was_written_again_is_another(model, tmp_path):
    tuned.store(model, "cpu", "cascade", {"tree": "chain:2"})
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in listing(model).items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    assert tuned.digest(copy) == tuned.digest(model)
    assert tuned.read(copy) == {"cpu": {"cascade": {"tree": "chain:2"}}}
    again = write_bundle(tmp_path / "again", drafter=False)
    assert tuned.read(again) == {}


def test_what_was_found_is_listed_and_removed(model, tmp_path):
    other = write_bundle(tmp_path / "other", cascade={"budget": 0.25})
    tuned.store(model, "cpu", "cascade", {"tree": "chain:2"})
    tuned.store(model, "cpu", "eagle", {"tree": "0 1"})
    tuned.store(other, "gpu", "gsd", {"tree": "chain:3"})
    entries = tuned.listed()
    assert {(entry.model, entry.device, entry.method, entry.tree) for entry in entries} == {
        (str(model), "cpu", "cascade", "chain:2"),
        (str(model), "cpu", "eagle", "0 1"),
        (str(other), "gpu", "gsd", "chain:3"),
    }
    assert tuned.remove(tuned.digest(model)[:8]) == 1
    assert [entry.method for entry in tuned.listed()] == ["gsd"]
    assert tuned.remove("no such") == 0
    assert tuned.remove() == 1
    assert tuned.listed() == []


@pytest.mark.parametrize("content", ['{"cpu": 5}', '{"model": "x", "found": {"cpu": {"eagle": 5}}}', "half"])
def test_a_damaged_file_is_named(content, model):
    place = tuned.store(model, "cpu", "eagle", {"tree": "chain:2"})
    place.write_text(content)
    for read in (lambda: pipeline.load(model), tuned.listed):
        with pytest.raises(ValueError, match=rf"{place.name} is damaged \(remove it, or run cascade-jax tune-tree"):
            read()


def test_what_older_versions_left_in_a_model_is_not_read(tmp_path):
    model = write_bundle(tmp_path / "old")
    (model / "trees.json").write_text(
        json.dumps({jax.local_devices()[0].device_kind: {"cascade": {"tree": "chain:2"}}})
    )
    assert bundles.load(model).trees == {}
