"""The tree that tune-tree builds is the best that its measurements allow."""

import itertools
import json
import types

import numpy as np
import pytest
from small import write_bundle

import cascade_jax as cj
from cascade_jax import cli, methods, pipeline, trees, tuned
from cascade_jax.cli import flags
from cascade_jax.measure import parts, tune
from cascade_jax.tree import name_of, named

TABLE = np.array([[0.5, 0.2, 0.1], [0.4, 0.3, 0.1]])


def every_tree(size: int, width: int, depth: int):
    """All trees of at most `size` drafts within the limits, by growing them one draft at a time."""
    frontier = {frozenset()}
    while frontier:
        yield from (trees.Tree.from_choices(paths) for paths in frontier if paths)
        grown = set()
        for paths in frontier:
            for parent in [(), *paths]:
                rank = sum(1 for path in paths if path[:-1] == parent)
                if len(paths) < size and rank < width and len(parent) < depth:
                    grown.add(paths | {(*parent, rank)})
        frontier = grown


@pytest.mark.parametrize("costs", [(1.0, 0.0, 0.0), (1.0, 0.1, 0.0), (1.0, 0.02, 0.3), (0.1, 0.3, 0.3)])
def test_no_tree_within_the_limits_has_a_better_rate(costs):
    costs = np.array(costs)
    found = tune.best_tree(TABLE, costs, most_drafts=5, most_depth=3)
    rate = lambda tree: tune.expected_tokens(TABLE, tree) / tune.time_of(costs, tree)
    assert rate(found) == pytest.approx(max(map(rate, every_tree(5, 3, 3))))


def test_trees_of_every_size_are_measured_though_prediction_favours_small_ones():
    costs = np.array([1.0, 10.0, 1.0])  # a node costs more than it can yield
    assert tune.best_tree(TABLE, costs, 24, 3).num_nodes == 2
    found = tune.finalists(TABLE, costs, most_drafts=24, most_depth=3)
    assert found[-1] == trees.EAGLE_25
    assert len(set(found)) == len(found)
    sizes = [tree.num_nodes - 1 for tree in found[:-1]]
    for least, most in ((1, 2), (3, 4), (5, 8), (9, 16)):
        assert sum(least <= size <= most for size in sizes) == 1


def test_expected_tokens_are_the_mean_of_simulated_walks():
    """Binomial error over 20,000 walks of a tree that yields 2.1 tokens: 0.01."""
    tree = trees.parse("0 1 2 00 01 10 000 001")
    rng, total = np.random.default_rng(0), 0
    for _ in range(20000):
        node = 0
        while True:
            children = [n for n in range(1, tree.num_nodes) if tree.parents[n] == node]
            table = TABLE[min(tree.depths[node], 1), : len(children)]
            place = int(np.searchsorted(np.cumsum(table), rng.random(), side="right"))
            total += 1
            if place >= len(children):
                break
            node = children[place]
    assert total / 20000 == pytest.approx(tune.expected_tokens(TABLE, tree), abs=0.04)


def test_paths_are_counted_where_their_parents_were_accepted():
    comb = tune.comb(3, 2)
    assert comb.paths[1:] == ((0,), (1,), (2,), (0, 0), (0, 1), (0, 2))
    hits, visits = np.zeros((2, 3)), np.zeros(2)
    tune.count(comb, np.array([[0, -1, -1], [0, 2, -1], [0, 1, -1], [0, 1, 5]]), hits, visits)
    np.testing.assert_array_equal(hits, [[2, 1, 0], [0, 1, 0]])
    np.testing.assert_array_equal(visits, [4, 2])
    shares = tune.chances(hits, visits)
    assert (np.diff(shares, axis=1) <= 0).all() and shares.sum(axis=1).max() <= 1


def test_times_are_fitted_and_never_negative():
    costs = np.array([2e-3, 1e-4, 5e-4])
    seconds = [tune.time_of(costs, tree) for tree in tune.TIMED]
    np.testing.assert_allclose(tune.fit_time(tune.TIMED, seconds), costs, rtol=1e-6)
    free = [1e-3 - 1e-6 * tree.num_nodes for tree in tune.TIMED]
    assert (tune.fit_time(tune.TIMED, free) >= 0).all()


def test_the_tree_that_is_measured_fastest_is_taken_whatever_was_predicted(monkeypatch):
    """The prediction, by which drafts cost next to nothing, favours the largest tree."""
    stats = types.SimpleNamespace(accepted=np.array([5]), steps=np.array([10]))
    monkeypatch.setattr(tune, "acceptance", lambda *_: TABLE)
    monkeypatch.setattr(tune, "fit_time", lambda *_: np.array([1.0, 1e-3, 1e-3]))
    monkeypatch.setattr(parts, "step_times", lambda _, tried, *__: [9.0 - (own.tree.num_nodes == 3) for own in tried])
    monkeypatch.setattr(pipeline, "generate", lambda *_, **__: types.SimpleNamespace(stats=stats))
    model = cj.load("scenes-small")
    found = tune.tune(model, "eagle", [], most_drafts=8, most_depth=3)
    assert named(found["tree"]).num_nodes == 3
    rates = [row["measured"]["tokens_per_second"] for row in found["trees"]]
    assert rates == sorted(rates, reverse=True)
    predicted = [row["predicted"]["tokens_per_second"] for row in found["trees"]]
    assert predicted[0] < max(predicted)


@pytest.mark.slow
def test_the_command_stores_a_tree_that_becomes_the_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "WIDTH", 2)
    monkeypatch.setattr(tune.comb, "__defaults__", (2, 2))
    monkeypatch.setattr(tune, "EAGLE_25", trees.chain(2))
    monkeypatch.setattr(tune.tune, "__kwdefaults__", tune.tune.__kwdefaults__ | {"timed": (trees.chain(1),)})
    stats = types.SimpleNamespace(accepted=np.array([5]), steps=np.array([10]))
    monkeypatch.setattr(pipeline, "generate", lambda *_, **__: types.SimpleNamespace(stats=stats))
    monkeypatch.setattr(parts, "step_times", lambda _, tried, *__: [1.0 + 0.1 * own.tree.num_nodes for own in tried])
    model = str(write_bundle(tmp_path / "model"))
    argv = ["--method", "eagle", "--count", "2", "--most-drafts", "2", "--most-depth", "2"]
    assert cli.main(["tune-tree", "--model", model, *argv]) == 0
    out = capsys.readouterr().out
    assert "predicted tokens/s" in out
    (place,) = (tmp_path / "cache" / "cascade_jax" / "trees").iterdir()
    assert f"stored: {place}" in out
    stored = json.loads(place.read_text())["found"]
    ((device, own),) = stored.items()
    assert own["eagle"]["device"] == device
    loaded = pipeline.load(model)
    assert name_of(methods.method("eagle", loaded).tree) == own["eagle"]["tree"]
    assert methods.method("gsd", loaded).tree == trees.EAGLE_25
    assert methods.method("eagle", loaded, tree="chain:4").tree == trees.chain(4)
    flags.drawable(loaded, "eagle", {})
    assert f"eagle drafts on {own['eagle']['tree']}, which tune-tree found for this machine" in capsys.readouterr().err


def test_the_command_lists_and_forgets(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = write_bundle(tmp_path / "model")
    tuned.store(model, "abacus", "eagle", {"tree": "chain:3"})
    assert cli.main(["tune-tree", "--list"]) == 0
    assert capsys.readouterr().out == f"{tuned.digest(model)}  eagle on abacus: chain:3  ({model})\n"
    assert cli.main(["tune-tree", "--remove", "zzz"]) == 2
    assert "no model's digest starts with 'zzz': tune-tree --list shows them" in capsys.readouterr().err
    assert cli.main(["tune-tree", "--remove", "all"]) == 0
    assert capsys.readouterr().out == "forgotten: what was found for 1 model\n"
    assert tuned.listed() == []


BAD = {
    "ar": (["--method", "ar"], "tune-tree takes a method that drafts on a static tree, not ar"),
    "count": (["--count", "0"], "count must be at least 1"),
    "depth": (["--most-depth", "0"], "most_depth must be at least 1"),
    "model": (["--model", "nowhere"], "no model 'nowhere'"),
}


@pytest.mark.parametrize(("flags", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(flags, message, capsys):
    assert cli.main(["tune-tree", *flags]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


def test_all_small_trees_are_enumerated():
    """One draft, two in two ways, three in five: Catalan's numbers, where limits do not matter."""
    sizes = sorted(tree.num_nodes - 1 for tree in every_tree(3, 3, 3))
    assert [len(list(own)) for _, own in itertools.groupby(sizes)] == [1, 2, 5]
