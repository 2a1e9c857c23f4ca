"""Jacobi self-speculation: the target's law over several steps, with a window of its own guesses."""

import dataclasses
import itertools

import chains
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_bundles

import cascade_jax as cj
from cascade_jax import bundle as bundles
from cascade_jax import methods, pipeline, trees
from cascade_jax.drafters import jacobi
from cascade_jax.drafters.jacobi import Jacobi
from cascade_jax.sampling import Layout, Sampling

SCENE = Layout((-1, -1, 3, -1, -1, 3), free_tokens=3)  # two rows of two, with a mark behind each
CASES = {
    "sjd": (Jacobi(), trees.chain(2), Sampling(), None),
    "scd": (Jacobi("repeat", coupled=True), trees.chain(3), Sampling(temperature=0.8, top_k=2), SCENE),
    "scd free": (Jacobi(coupled=True), trees.chain(3), Sampling(), None),
    "pac": (Jacobi("above", True, 2), trees.window(2, 3), Sampling(temperature=0.7), None),
    "pac marked": (Jacobi("above", True, 3), trees.window(3, 2), Sampling(), SCENE),
}
TARGET = chains.Chain(3, seed=1)
LENGTH = 6


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_window_keeps_the_targets_law_over_many_steps(name):
    drafter, tree, settings, layout = CASES[name]
    counts, sums = chains.outputs(TARGET, drafter, tree, LENGTH, 1_000_000, cj.strict(), settings, layout)
    assert chains.pvalue(counts, chains.law(TARGET, LENGTH, settings, layout)) > 1e-3
    np.testing.assert_array_equal(sums.steps + sums.accepted, LENGTH - 1)
    assert np.mean(sums.steps >= 3) > 0.01  # so that drafts were redrawn, and more than once


class Stale(Jacobi):
    """A window that keeps the old law of a draft that stays, as public code does."""

    def observe(self, target, memory, outcome):
        new = super().observe(target, memory, outcome)
        size = memory.laws.shape[1]
        slots = jnp.arange(size) + outcome.accepted[:, None] + 1
        places = outcome.position[:, None] + slots
        stayed = jnp.take_along_axis(memory.tokens, places, axis=1) == jnp.take_along_axis(new.tokens, places, axis=1)
        old = jnp.take_along_axis(memory.laws, jnp.minimum(slots, size - 1)[..., None], axis=1)
        return new.replace(laws=jnp.where((stayed & (slots < size))[..., None], old, new.laws))


def test_a_law_that_is_not_renewed_shows():
    counts, _ = chains.outputs(TARGET, Stale(coupled=True), trees.chain(3), LENGTH, 200_000, cj.strict(), Sampling())
    assert chains.pvalue(counts, chains.law(TARGET, LENGTH, Sampling())) < 1e-9


# The same by enumeration: every random decision of a window of two, over a whole picture, with its probability.


def given(vocab, seed):
    """Laws of the next token after every output, {output: [V]}."""
    rng = np.random.default_rng(seed)
    return {past: rng.dirichlet(np.ones(vocab)) for t in range(6) for past in itertools.product(range(vocab), repeat=t)}


def drawn(law):
    return [(token, chance) for token, chance in enumerate(law) if chance > 0]


def renewed(coupled, token, old, new):
    """A draft of law `old` that is redrawn from `new`: its next tokens and their probabilities."""
    if not coupled or token is None:
        return drawn(new)
    stay = min(1.0, new[token] / old[token])
    left = np.maximum(new - old, 0)
    outcomes = [(token, stay)]
    if stay < 1:
        outcomes += [(other, (1 - stay) * chance) for other, chance in drawn(left / left.sum())]
    return outcomes


def enumerated(q, vocab, length, size, coupled, stale=False):
    """The law of all outputs {output: probability} of self-speculation with a window of `size` uniform guesses."""
    uniform, law = np.full(vocab, 1 / vocab), {}

    def finish(output, chance):
        output = output[:length]
        law[output] = law.get(output, 0.0) + chance

    def guess(output, window, chance):
        if len(output) >= length:
            return finish(output, chance)
        if len(window) == size:
            return verify(output, window, chance, 0)
        for token, own in drawn(uniform):
            guess(output, (*window, (token, uniform)), chance * own)

    def verify(output, window, chance, i):
        """Decides the window's draft i; those before it are accepted."""
        drafts = tuple(token for token, _ in window)
        laws = [q[(*output, *drafts[:j])[:5]] for j in range(size + 1)]
        if i == size:
            for bonus, own in drawn(laws[size]):
                redraw((*output, *drafts, bonus), window, laws, size + 1, (), chance * own)
            return
        token, p = window[i]
        accept = min(1.0, laws[i][token] / p[token])
        if accept > 0:
            verify(output, window, chance * accept, i + 1)
        if accept < 1:
            left = np.maximum(laws[i] - p, 0)
            for bonus, own in drawn(left / left.sum()):
                reached = (*output, *drafts[:i], bonus)
                redraw(reached, window, laws, i + 1, (), chance * (1 - accept) * own)

    def redraw(output, window, laws, i, made, chance):
        if len(output) >= length:
            return finish(output, chance)
        if i > size:
            return guess(output, made, chance)
        old_token, old = window[i] if i < size else (None, None)
        for token, own in renewed(coupled, old_token, old, laws[i]):
            kept = old if stale and token == old_token else laws[i]
            redraw(output, window, laws, i + 1, (*made, (token, kept)), chance * own)

    for first, chance in drawn(q[()]):
        guess((first,), (), chance)
    return law


def test_a_window_has_the_targets_law_to_the_last_digit():
    q = given(2, seed=4)
    target = {
        output: np.prod([q[output[:t]][output[t]] for t in range(5)])
        for output in itertools.product(range(2), repeat=5)
    }
    for coupled in (False, True):
        law = enumerated(q, 2, 5, 2, coupled)
        assert law.keys() == target.keys()
        np.testing.assert_allclose([law[output] for output in target], list(target.values()), rtol=1e-12)
    stale = enumerated(q, 2, 5, 2, coupled=True, stale=True)
    assert max(abs(stale[output] - target[output]) for output in target) > 1e-3


# What a window drafts.


def test_guesses_repeat_the_last_code_and_the_row_above():
    layout = Layout((-1, -1, -1, 4) * 3 + (5,), free_tokens=4)  # three rows of three
    tokens = jnp.array([[0, 1, 2, 4, 3, 1, 0, 0, 0, 0, 0, 0, 0, 0]])
    memory = jacobi.Window(tokens, jnp.zeros((1, 5, 6)), jnp.array([0]))
    places, last = jnp.arange(6, 11)[None], jnp.array([5])
    laws = {
        guess: np.asarray(Jacobi(guess, row=4)._guesses(memory, places, last, layout))[0] for guess in jacobi.GUESSES
    }
    uniform, mark = [0.25] * 4 + [0, 0], [0] * 4 + [1, 0]
    one = lambda token: np.eye(6)[token]
    np.testing.assert_allclose(laws["uniform"], [uniform, mark, uniform, uniform, uniform])
    np.testing.assert_allclose(laws["repeat"], [one(1), mark, one(1), one(1), one(1)])
    np.testing.assert_allclose(laws["above"], [one(2), mark, one(3), one(1), one(2)])
    start = np.asarray(Jacobi("above", row=4)._guesses(memory, jnp.arange(1, 6)[None], jnp.array([0]), layout))[0]
    np.testing.assert_allclose(start, [uniform, uniform, mark, one(0), uniform])  # the first row has none above it


def test_candidates_are_drawn_without_replacement_after_the_windows_draft():
    law = jnp.array([0.5, 0.2, 0.0, 0.3])
    drawn = jax.vmap(lambda key: jacobi._others(key, law, 0, 3))(jax.random.split(jax.random.key(0), 20_000))
    np.testing.assert_array_equal(np.sort(drawn, axis=1), [[-1, 1, 3]] * len(drawn))
    assert np.mean(drawn[:, 0] == 3) == pytest.approx(0.6, abs=0.02)  # five standard errors


def test_only_windows_are_drafted():
    for tree in (trees.full(2, 2), trees.EAGLE_25, trees.DynamicTree(2, 1, 4), trees.parse("0 1 10")):
        with pytest.raises(ValueError, match="a chain with further candidates"):
            jacobi._check(tree)
    for tree in (trees.chain(1), trees.chain(7), trees.window(1, 3), trees.window(4, 2)):
        jacobi._check(tree)
        assert trees.named(trees.name_of(tree)) == tree


# Pictures that are the very same.

EXACTLY = {
    "window": (Jacobi("repeat", coupled=True), trees.chain(3), Sampling(temperature=0.8), SCENE),
    "candidates": (Jacobi(), trees.window(2, 2), Sampling(top_k=2), None),
}


@pytest.mark.parametrize("name", ["window", pytest.param("candidates", marks=pytest.mark.slow)])
def test_noise_by_position_draws_the_targets_law_and_the_same_outputs_by_any_window(name):
    drafter, tree, settings, layout = EXACTLY[name]
    one = chains.outputs(TARGET, None, trees.ROOT, LENGTH, 50_000, cj.strict(), settings, layout, noise="gumbel")
    assert chains.pvalue(one[0], chains.law(TARGET, LENGTH, settings, layout)) > 1e-3
    counts, sums = chains.outputs(TARGET, drafter, tree, LENGTH, 50_000, cj.exact(), settings, layout, noise="gumbel")
    np.testing.assert_array_equal(counts, one[0])  # of every output as many: pictures are the same one by one
    assert sums.steps.sum() < one[1].steps.sum()
    assert sums.diverged.sum() == sums.nominal.sum() == 0


BAD = {
    "window 0": (lambda bundle: methods.method("sjd", bundle, window=0), "window must be between 1 and 16"),
    "window 17": (lambda bundle: methods.method("pac", bundle, window=17), "tokens of a picture, not 17"),
    "candidates": (lambda bundle: methods.method("pac", bundle, candidates=0), "candidates of at least 1"),
    "guess": (lambda bundle: methods.method("scd", bundle, guess="last"), "one of uniform, repeat, above, not 'last'"),
    "tree": (lambda bundle: methods.method("sjd", bundle, tree="chain:2"), "takes no tree"),
    "both": (lambda bundle: methods.method("exact", bundle, tree="chain:2", window=2), "takes no tree besides"),
    "no window": (lambda bundle: methods.method("cascade", bundle, candidates=2), "candidates want a window"),
    "relaxed": (lambda bundle: draw(bundle, rule=cj.grouped(2), noise="gumbel"), "a relaxed rule would not"),
    "bounded": (lambda bundle: draw(bundle, rule=cj.bounded(cj.exact(), 0.1), noise="gumbel"), "use exact"),
    "fresh": (lambda bundle: draw(bundle, rule=cj.exact(), noise="fresh"), "the noise is fresh"),
    "noise": (lambda bundle: draw(bundle, rule=cj.strict(), noise="perlin"), "one of fresh, gumbel, not 'perlin'"),
    "takes": (lambda bundle: methods.method("lantern", bundle, noise="gumbel"), "lantern does not take noise"),
}


def draw(bundle, **given):
    return cj.generate(bundle, tiny_bundles.prompts("llamagen", 1), jax.random.key(0), **given)


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_one_clear_line(name):
    use, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        use(tiny_bundles.bundle("llamagen"))
    assert "\n" not in str(error.value)


def test_the_methods_of_a_model_without_a_drafter():
    made = tiny_bundles.bundle("llamagen")
    alone = dataclasses.replace(
        made, config=dataclasses.replace(made.config, drafter=None), params=made.params | {"drafter": None}
    )
    for name in ("sjd", "scd", "pac", "gsd-jacobi", "cascade", "entropy-aware", "exact"):
        chosen = methods.method(name, alone, **({"group": 2} if name == "gsd-jacobi" else {}))
        program = chosen.program(alone)
        assert program.tree == trees.window(16, 4 if name in ("pac", "cascade") else 1)
        assert not jax.tree.leaves(chosen.on(alone).decoding_params(program)["drafter"])
    model, program = pipeline._prepared(alone, None, None, None, None, "walk", None)
    assert program.tree == trees.window(16, 1) and isinstance(model.drafter, Jacobi) and model.drafter.coupled
    assert methods.method("exact", made).drafter is None
    assert methods.method("cascade", made).drafter is None
    for refused in (lambda: methods.method("eagle", alone).program(alone), lambda: draw(alone, rule=cj.grouped(2))):
        with pytest.raises(bundles.BundleError, match="needs none, as sjd"):
            refused()


def test_cascade_judges_a_window_as_it_judges_a_drafters_tree():
    made, prompts = tiny_bundles.bundle("llamagen"), tiny_bundles.prompts("llamagen", 8)
    drawn = lambda name, **settings: methods.draw_numbers(
        made, methods.method(name, made, window=6, candidates=3, **settings), prompts, range(8), seed=0
    )
    off, pac = drawn("cascade", tau_pos=2.0, tau_seq=2.0), drawn("pac")
    np.testing.assert_array_equal(off.tokens, pac.tokens)  # with nothing to relax, the very same
    siblings, children = drawn("cascade", tau_pos=-1.0, tau_seq=2.0), drawn("cascade", tau_pos=2.0, tau_seq=-1.0)
    assert siblings.stats.nominal.sum() > 0 and children.stats.nominal.sum() > 0
    bounded = drawn("cascade", tau_pos=-1.0, tau_seq=-1.0, ledger="coupled", budget=0.1)
    assert 0 < bounded.stats.coupled.max() <= 0.1 + 1e-6
