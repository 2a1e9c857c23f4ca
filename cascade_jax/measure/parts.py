"""The parts of a step, each jitted apart, and the loop around them.

Parts run one after the other on the very states that the loop goes through, so that their sum and the loop's time are
of the same steps with the same random numbers.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cascade_jax import decode, pipeline
from cascade_jax.bundle import Bundle
from cascade_jax.draft import Draft
from cascade_jax.measure import clock
from cascade_jax.methods import Method
from cascade_jax.sampling import Sampling
from cascade_jax.tree import EAGLE_25, LANTERNPP_57, ROOT, Tree, chain

SIZES = (ROOT, chain(5), chain(9), EAGLE_25, LANTERNPP_57)  # 1, 6, 10, 26 and 58 nodes
PARTS = ("draft", "target", "verify", "commit")


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _propose(program, params, memory, state, sampling):
    return decode.propose(program, params, state.replace(drafter=memory), sampling)


_target_pass = jax.jit(decode.target_pass, static_argnums=0)
_decide = jax.jit(decode.decide, static_argnums=0)
_commit = jax.jit(decode.commit, static_argnums=0, donate_argnums=(2, 4))


def parts(bundle: Bundle, method: Method, prompts, sampling: Sampling, steps: int, repeats: int) -> dict[str, Any]:
    """Medians over `repeats` runs of at most `steps` steps: {"prefill", "parts": {part: time}, "sum", "loop",
    "overhead": loop / sum - 1}, times in seconds, those of parts and of the loop per step."""
    bundle, program = method.on(bundle), method.program(bundle)
    params = bundle.decoding_params(program)

    def play(_):
        times, taken = _loop(bundle, method, prompts, sampling, steps)
        return times | _apart(program, params, _start(bundle, method, prompts, sampling), method, sampling, taken)

    found = [own[""] for _, own in clock.take_turns({"": play}, range(repeats))]
    medians = {name: float(np.median([own[name] for own in found])) for name in found[0]}
    sums = np.array([sum(own[part] for part in PARTS) for own in found])
    return {
        "prefill": medians["prefill"],
        "parts": {part: medians[part] for part in PARTS},
        "sum": float(np.median(sums)),
        "loop": medians["step"],
        "overhead": float(np.median(np.array([own["step"] for own in found]) / sums) - 1),
    }


def _apart(program, params, state, method, sampling, steps: int) -> dict[str, float]:
    """Seconds per step of every part, of so many steps."""
    spent = dict.fromkeys(PARTS, 0.0)

    def clocked(part, function, *args):
        elapsed, out = clock.timed(function, *args)
        spent[part] += elapsed / steps
        return out

    for _ in range(steps):
        memory, state = state.drafter, state.replace(drafter=None)
        drafted, memory = clocked("draft", _propose, program, params, memory, state, sampling)
        features, fresh = clocked("target", _target_pass, program, params, state, drafted)
        decided = clocked("verify", _decide, program, params, state, drafted, features, method.rule, sampling)
        verdict, _, laws = decided
        state = clocked("commit", _commit, program, params, state, drafted, memory, features, fresh, verdict, laws)
    return spent


def target_passes(
    bundle: Bundle, prompts, sampling: Sampling, repeats: int, trees: Sequence[Tree] | None = None
) -> list[float]:
    """Seconds of one pass of the target over the nodes of each tree, those of `SIZES` unless others are given; medians,
    of passes in turns."""

    def player(tree):
        program = bundle.program(tree)
        state = _start(bundle, Method("", None, tree), prompts, sampling)
        drafted = Draft(jnp.zeros((len(prompts), tree.num_nodes), jnp.int32), None, None)
        state, params = state.replace(drafter=None), bundle.decoding_params(program)
        return lambda _: clock.timed(_target_pass, program, params, state, drafted)[0]

    trees = SIZES if trees is None else trees
    players = {tree: player(tree) for tree in trees}
    found = [own for _, own in clock.take_turns(players, range(repeats))]
    return [float(np.median([own[tree] for own in found])) for tree in trees]


def loops(
    bundle: Bundle, methods: Sequence[Method], prompts, sampling: Sampling, steps: int, repeats: int
) -> list[dict[str, float]]:
    """Seconds of the prefill and of a step of each method's loop, {"prefill", "step"}: medians of `repeats` runs of at
    most `steps` steps, in turns; compilation is excluded."""
    players = {
        number: lambda _, method=method: _loop(bundle, method, prompts, sampling, steps)[0]
        for number, method in enumerate(methods)
    }
    found = [own for _, own in clock.take_turns(players, range(repeats))]
    return [
        {name: float(np.median([own[number][name] for own in found])) for name in ("prefill", "step")}
        for number in players
    ]


def step_times(bundle: Bundle, methods: Sequence[Method], prompts, sampling: Sampling, steps: int, repeats: int):
    """The steps of `loops` alone."""
    return [times["step"] for times in loops(bundle, methods, prompts, sampling, steps, repeats)]


def _loop(bundle, method, prompts, sampling, steps) -> tuple[dict[str, float], int]:
    """Seconds of a prefill and of a step of the loop behind it, and how many steps it took."""
    bundle, program = method.on(bundle), method.program(bundle)
    params = bundle.decoding_params(program)
    prefill, state = clock.timed(_start, bundle, method, prompts, sampling)
    spent, state = clock.timed(decode.run_jit, program, params, state, method.rule, sampling, steps)
    taken = max(int(np.max(state.stats.steps)), 1)
    return {"prefill": prefill, "step": spent / taken}, taken


def _start(bundle, method, prompts, sampling) -> decode.DecodeState:
    model, program = method.on(bundle), method.program(bundle)
    return jax.block_until_ready(pipeline.start(model, program, prompts, jax.random.key(0), sampling))
