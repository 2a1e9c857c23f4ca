"""What the analysis tells of a picture is what happened when it was drawn."""

import dataclasses
import io

import jax
import numpy as np
import pytest
import tiny_bundles
from PIL import Image

import cascade_jax as cj
from cascade_jax import pipeline, trees
from cascade_jax.bundle import abstract
from cascade_jax.paper import figures, traces
from cascade_jax.paper.viewer.contents import TURN, contents
from cascade_jax.paper.viewer.patches import Patches
from cascade_jax.tree import DynamicTree

TREE, RULE = trees.parse("0 1 2 00 01 10"), cj.cascade(0.3, 0.3, 0.4)
KEY = jax.random.key(5)
NONE = Patches(np.zeros((1, 2, 2, 3), np.uint8), np.zeros((16, 7), int))
BOTH = ["seen", pytest.param("dynamic", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def bundle():
    return tiny_bundles.bundle("llamagen")


@pytest.fixture(scope="module")
def prompts():
    return tiny_bundles.prompts("llamagen", 1)


@pytest.fixture(scope="module")
def seen(bundle, prompts):
    return traces.trace(bundle, prompts[0], KEY, RULE, TREE)


@pytest.fixture(scope="module")
def dynamic(bundle, prompts):
    return traces.trace(bundle, prompts[0], KEY, RULE, DynamicTree(3, 1, 6))


@pytest.fixture(scope="module")
def drawn(bundle, prompts):
    return cj.generate(bundle, prompts, KEY, RULE, TREE)


@pytest.fixture(scope="module")
def told(seen):
    return contents(seen, dataclasses.replace(NONE, index=np.zeros_like(seen.tokens)))


def test_a_trace_draws_the_picture_that_generate_draws(drawn, seen):
    np.testing.assert_array_equal(seen.output, drawn.tokens[0])
    np.testing.assert_array_equal(seen.image, drawn.images[0])
    assert len(seen) == drawn.stats.steps[0]
    for name, values in (("nominal", seen.nominal), ("coupled", seen.coupled), ("divergence", seen.diverged)):
        assert np.mean(values) == pytest.approx(getattr(drawn.stats, name)[0], abs=1e-6)


@pytest.mark.parametrize("name", BOTH)
def test_steps_emit_the_output(name, request):
    trace = request.getfixturevalue(name)
    output = [trace.output[0]]
    for step in range(len(trace)):
        assert trace.position[step] == len(output)
        assert trace.tokens[step, 0] == output[-1]
        path = trace.path[step][trace.path[step] > 0]
        output += [*trace.tokens[step, path], trace.next_token[step]]
    assert output[: len(trace.output)] == trace.output.tolist()


@pytest.mark.parametrize("name", BOTH)
def test_reasons_are_what_the_random_numbers_say(name, request):
    trace = request.getfixturevalue(name)
    visited = trace.reason != traces.NOT_VISITED
    accepted = trace.reason >= traces.STRICT
    np.testing.assert_array_equal(accepted, visited & (trace.uniform < trace.probability))
    np.testing.assert_array_equal(trace.reason == traces.STRICT, accepted & (trace.uniform < trace.strict))
    np.testing.assert_array_equal(np.sum(accepted, axis=1), trace.accepted)
    for step, path in enumerate(trace.path):
        assert set(np.flatnonzero(accepted[step])) == set(path[path > 0])
    # the ledger is a float32 sum of a step's few masses
    np.testing.assert_allclose(np.sum(trace.gained, axis=1), trace.nominal, atol=1e-6)
    differs = visited & ((trace.uniform < trace.probability) != (trace.uniform < trace.strict))
    np.testing.assert_array_equal(np.any(differs, axis=1), trace.diverged)


def test_both_kinds_of_relaxation_are_told_apart(bundle, prompts, seen):
    """With one threshold above 1 nothing is accepted for the other's reason."""
    assert {traces.STRICT, traces.FIRST, traces.SECOND} <= set(np.unique(seen.reason))
    for taus, absent in (((1.1, -1.0), traces.FIRST), ((-1.0, 1.1), traces.SECOND)):
        reasons = traces.trace(bundle, prompts[0], KEY, cj.cascade(*taus, 9.0), TREE).reason
        present = {traces.FIRST, traces.SECOND} - {absent}
        assert present <= set(np.unique(reasons))
        assert absent not in reasons


@pytest.mark.slow
def test_token_by_token_nothing_is_accepted(bundle, prompts):
    trace = traces.trace(bundle, prompts[0], KEY, cj.strict(), trees.ROOT)
    assert len(trace) == 15
    assert not trace.reason.any()
    np.testing.assert_array_equal(trace.output[1:], trace.next_token)
    assert traces.relaxation_map(trace).shape == (4, 4)
    assert traces.acceptance_by_depth_and_rank(trace)[0].size == 0


@pytest.mark.parametrize("name", BOTH)
def test_sets_are_those_of_the_equations(name, request):
    trace = request.getfixturevalue(name)
    found = 0
    for step in range(len(trace)):
        alike, converging = traces.sets(trace, step)
        tokens, parents, cosine = trace.tokens[step], trace.parents[step], trace.cosine[step]
        for a in range(len(tokens)):
            for b in range(len(tokens)):
                real = a > 0 and b > 0 and tokens[a] >= 0 and tokens[b] >= 0
                interchangeable = real and a != b and parents[a] == parents[b] and cosine[a, b] >= np.float32(0.3)
                assert alike[a, b] == interchangeable
                assert converging[a, b] == (real and parents[b] == a and cosine[a, b] >= np.float32(0.3))
        found += alike.any() + converging.any()
        assert not any(own.any() for own in traces.sets(trace, step, tau_pos=1.1, tau_seq=1.1))
    assert found


def test_thresholds_are_a_rules_or_must_be_given(seen):
    assert traces.thresholds(cj.cascade(0.5, 0.25, ledger="coupled")) == (0.5, 0.25)
    assert traces.thresholds(cj.bounded(cj.grouped(3), 0.1)) is None
    strict = dataclasses.replace(seen, rule=cj.strict())
    assert traces.sets(strict, 0, 0.3, 0.3)[0].shape == (7, 7)
    with pytest.raises(ValueError, match="this rule has no thresholds: give tau_pos and tau_seq"):
        traces.sets(strict, 0, tau_pos=0.3)


def test_acceptance_is_counted_by_depth_and_rank(seen):
    rates, examined = traces.acceptance_by_depth_and_rank([seen, seen])
    assert rates.shape == examined.shape == (2, 3)
    for depth in (1, 2):
        for rank in (0, 1, 2):
            turns = hits = 0
            for step in range(len(seen)):
                for node in range(1, TREE.num_nodes):
                    if TREE.depths[node] == depth and TREE.paths[node][-1] == rank:
                        turns += 2 * (seen.reason[step, node] >= traces.REJECTED)
                        hits += 2 * (seen.reason[step, node] >= traces.STRICT)
            assert examined[depth - 1, rank] == turns
            assert rates[depth - 1, rank] == pytest.approx(hits / turns) if turns else np.isnan(rates[depth - 1, rank])
    assert examined[0, 0] == 2 * len(seen)
    assert examined[1, 2] == 0


def test_the_map_of_relaxation_lies_where_the_tokens_do(seen):
    charges = {
        "relaxed": np.where(seen.reason >= traces.FIRST, 1.0, 0.0),
        "nominal": seen.gained,
        "coupled": np.abs(seen.probability - seen.strict),
    }
    for what, charge in charges.items():
        expected = np.zeros(16)
        for step in range(len(seen)):
            for node in range(1, TREE.num_nodes):
                place = seen.position[step] + TREE.depths[node] - 1
                if place < 16 and not np.isnan(seen.uniform[step, node]):
                    expected[place] += charge[step, node]
        found = traces.relaxation_map(seen, (2, 8), what=what)
        assert found.shape == (2, 8)
        np.testing.assert_allclose(found.ravel(), expected, atol=1e-6)
        assert 0 < found.sum() < 16
    np.testing.assert_array_equal(traces.relaxation_map(seen).ravel(), found.ravel())
    with pytest.raises(ValueError, match="what must be one of coupled, nominal, relaxed, not 'all'"):
        traces.relaxation_map(seen, what="all")


def test_a_pictures_codes_are_found_between_other_tokens():
    expected = np.arange(4)[:, None] * 5 + np.arange(4)
    for family, places in (("chameleon", expected), ("llamagen", np.arange(16).reshape(4, 4))):
        np.testing.assert_array_equal(traces.places(abstract(tiny_bundles.config(family))), places)


def test_similarity_is_the_cosine():
    features = np.random.default_rng(0).normal(size=(12, 5))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    # float32 products of five terms
    np.testing.assert_allclose(traces.similarity(features), unit @ unit.T, atol=1e-6)
    rows = traces.similarity_rows(features, 4)
    assert rows.shape == (3, 4, 4)
    np.testing.assert_allclose(rows[2], (unit @ unit.T)[8:, 8:], atol=1e-6)
    with pytest.raises(ValueError, match="12 features make no rows of 5"):
        traces.similarity_rows(features, 5)


def test_a_model_on_many_devices_makes_no_trace(bundle, prompts):
    divided = dataclasses.replace(bundle, mesh=object())
    with pytest.raises(ValueError, match="a trace is made on one device"):
        traces.trace(divided, prompts[0], KEY, RULE, TREE)


def rendered(figure) -> np.ndarray:
    file = io.BytesIO()
    figure.savefig(file, dpi=40)
    return np.asarray(Image.open(file).convert("RGB"))


def test_a_steps_tree_is_drawn_with_a_patch_for_every_draft(bundle, seen):
    step = int(np.argmax(seen.accepted))
    assert seen.accepted[step] > 1
    page = figures.draw_step(seen, step, bundle)
    tree = page.axes[1]
    in_picture = [seen.position[step] + depth - 1 < 16 for depth in TREE.depths]
    assert len(tree.images) == sum(in_picture)
    assert f"step {step + 1} of {len(seen)}" in page.axes[0].get_title()
    assert f"{seen.accepted[step]} drafts accepted" in tree.get_title()
    assert rendered(page).std() > 10
    with pytest.raises(ValueError, match="step must be between"):
        figures.draw_step(seen, len(seen), bundle)


def test_maps_and_similarities_are_drawn_next_to_pictures(bundle, prompts, seen):
    features = pipeline.score(bundle, prompts, seen.output[None]).features[0]
    rows = traces.similarity_rows(features, 4)
    assert len(figures.draw_rows([seen.image] * 2, [rows] * 2).axes) == 2 * 4 + 1
    assert len(figures.draw_sequences([seen.image], [traces.similarity(features)], [rows]).axes) == 3 + 1
    assert rendered(figures.draw_map(seen.image, traces.relaxation_map(seen), "coupled")).std() > 10


def turns(told, step):
    return [dict(zip(TURN, row)) for row in told["steps"][step]["turns"]]


def test_a_page_says_what_the_decoder_counted(drawn, seen, told):
    stats, length = drawn.stats, len(seen.output)
    assert told["output"] == drawn.tokens[0].tolist()
    assert len(told["steps"]) == stats.steps[0]
    kept = [min(len(step["path"]), length - step["position"] - 1) for step in told["steps"]]
    assert sum(kept) == stats.accepted[0]
    for name in ("nominal", "coupled"):
        # four figures are kept of a number
        assert np.mean([step[name] for step in told["steps"]]) == pytest.approx(getattr(stats, name)[0], rel=1e-3)
    # what lies beyond the picture's end is on no map
    charges = [
        abs(turn["probability"] - turn["strict"])
        for step, record in enumerate(told["steps"])
        for turn in turns(told, step)
        if record["position"] + seen.depths[step, turn["node"]] <= length
    ]
    assert sum(told["maps"]["coupled"]) == pytest.approx(sum(charges), rel=1e-3)
    assert np.mean([step["diverged"] for step in told["steps"]]) == pytest.approx(stats.divergence[0])
    assert told["rule"] == {
        **{name: pytest.approx(x) for name, x in (("tau_pos", 0.3), ("tau_seq", 0.3), ("budget", 0.4))},
        "ledger": "nominal",
    }


def test_turns_are_those_of_the_walk_and_their_numbers_decide(told):
    for step, record in enumerate(told["steps"]):
        accepted = [turn["node"] for turn in turns(told, step) if turn["uniform"] < turn["probability"]]
        assert sorted(accepted) == sorted(record["path"])
        spent = 0.0
        for turn in turns(told, step):
            assert turn["strict"] == pytest.approx(min(1, turn["target"] / turn["draft"]), rel=1e-3)
            spent = max(spent, turn["spent"] + turn["gained"])
        assert spent == pytest.approx(record["nominal"], rel=1e-3, abs=1e-6)


def test_masses_of_the_sets_add_up_to_what_the_rule_was_offered(seen, told):
    """Of C, what I holds already is in both lists and both sums."""
    found = {"interchangeable": 0, "convergent": 0}
    for step, record in enumerate(told["steps"]):
        alike, converging = traces.sets(seen, step)
        for turn in turns(told, step):
            for name, total, members in (("interchangeable", "first", alike), ("convergent", "second", converging)):
                assert [node for node, _ in turn[name]] == np.flatnonzero(members[turn["node"]]).tolist()
                assert sum(mass for _, mass in turn[name]) == pytest.approx(turn[total], rel=1e-3, abs=1e-6)
                found[name] += len(turn[name])
                own = record["tokens"][turn["node"]]
                assert all(mass == 0 for node, mass in turn[name] if record["tokens"][node] == own)
    assert all(found.values())


@pytest.mark.slow
def test_a_bounded_rule_is_watched_too(bundle, prompts):
    rule = cj.cascade(0.3, 0.3, 0.2, ledger="coupled")
    trace = traces.trace(bundle, prompts[0], KEY, rule, TREE)
    np.testing.assert_array_equal(trace.output, cj.generate(bundle, prompts, KEY, rule, TREE).tokens[0])
    assert trace.first.any()
    assert np.nanmax(trace.spent) <= 0.2 + 1e-6
    assert contents(trace, NONE)["rule"]["ledger"] == "coupled"
