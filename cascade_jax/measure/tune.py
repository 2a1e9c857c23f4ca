"""The draft tree with the most tokens per second on this machine.

What a step yields and what it costs are measured apart, and the tree that is best by both is built:

1. *Acceptance* by depth and rank, on a comb: every node of its spine has `WIDTH` children, of which the first carries
   on. As in Sequoia (Chen et al. 2024, arXiv 2402.12374), a child's chance of being the accepted one is taken to depend
   on its place alone: on its rank and, here, its depth.
2. *Time* of a step, of trees of several sizes and depths. A node costs a row of the target's pass and a level costs a
   pass of the drafter, so a line in both is fitted.
3. A node is worth the product of the chances along its path, and a step yields 1 + the sum of its nodes' worths. With
   the best nodes first (Medusa's greedy construction, Cai et al. 2024, arXiv 2401.10774) every tree is the best of its
   size and depth, for no node is worth more than its parent or its elder sibling. The best ratio of yield to time is
   Sequoia's hardware-aware search.
4. A rule that looks at siblings, as CASCADE does, accepts less where there are few, so a small tree yields less than
   the comb promises. The best trees of several sizes are therefore drawn with and timed, in turns, and the one with the
   most tokens per second as measured is chosen.
"""

import dataclasses
import functools
import heapq
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cascade_jax import decode, interrupts, pipeline
from cascade_jax import methods as by_name
from cascade_jax.bundle import Bundle, Prompt, default_sampling
from cascade_jax.measure import parts
from cascade_jax.methods import Method
from cascade_jax.tree import EAGLE_25, Tree, chain, full, name_of

WIDTH, DEPTH = 8, 6
TIMED = (chain(1), chain(4), full(8, 1), full(2, 3), EAGLE_25, full(4, 3))  # 2, 5, 9, 15, 26 and 85 nodes
_PRIOR = 8  # visits that a level's neighbour above counts as


def comb(width: int = WIDTH, depth: int = DEPTH) -> Tree:
    """A spine of `depth` drafts whose nodes have `width` children each."""
    return Tree.from_choices([0] * level + [rank] for level in range(depth) for rank in range(width))


def levels(bundle: Bundle) -> float:
    """How deep a tree the model's drafter can fill."""
    return math.inf if bundle.drafted_levels is None else bundle.drafted_levels


def acceptance(bundle: Bundle, method: Method, prompts: Sequence[Prompt], seed: int = 0) -> np.ndarray:
    """How often the child of a rank is the accepted one, once its parent was accepted: [depth, width] on the comb.

    Args:
      method: its rule is used, its tree is not.
      prompts: drawn as one batch.
    """
    tree, sampling = comb(depth=min(DEPTH, levels(bundle))), default_sampling(bundle.config).checked()
    program = dataclasses.replace(method, tree=tree).program(bundle)
    params = bundle.decoding_params(program)
    state = pipeline.start(bundle, program, prompts, jax.random.key(seed), sampling)
    hits, visits = np.zeros((tree.depth, tree.width)), np.zeros(tree.depth)
    while np.any(going := np.asarray(state.count) < program.length):
        interrupts.check()
        state, paths = _step(program, params, state, method.rule, sampling)
        count(tree, np.asarray(paths)[going], hits, visits)
    return chances(hits, visits)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(program, params, state, rule, sampling):
    """`decode.step`, and the accepted paths int [B, D + 1]."""
    state, seen = decode.step(program, params, state, rule, sampling)
    return state, seen.verdict.path


def count(tree: Tree, paths: np.ndarray, hits: np.ndarray, visits: np.ndarray) -> None:
    """Adds accepted paths int [steps, D + 1] to counts: [D, W] of accepted children, [D] of nodes with children."""
    for path in paths:
        for level in range(tree.depth):
            if path[level] not in tree.inner:
                break
            visits[level] += 1
            if path[level + 1] > 0:
                hits[level, tree.paths[path[level + 1]][-1]] += 1


def chances(hits: np.ndarray, visits: np.ndarray) -> np.ndarray:
    """Shares [D, W] out of counts, the best rank first; deep levels, seldom visited, lean on the one above."""
    rows = [hits[0] / max(visits[0], 1)]
    for own, seen in zip(hits[1:], visits[1:]):
        rows.append((own + _PRIOR * rows[-1]) / (seen + _PRIOR))
    return np.array([np.sort(row)[::-1] for row in rows])


def grow(table: np.ndarray, size: int, depth: int) -> list[tuple[tuple[int, ...], float]]:
    """The `size` best drafts of a tree, best first, as (path, worth), given chances [D, W] by depth and rank."""
    width, chosen = table.shape[1], []
    heap = [(-table[0, 0], (0,))]
    while heap and len(chosen) < size:
        worth, path = heapq.heappop(heap)
        chosen.append((path, -worth))
        level, rank = min(len(path), len(table)) - 1, path[-1]
        if rank + 1 < width and table[level, rank] > 0:
            heapq.heappush(heap, (worth / table[level, rank] * table[level, rank + 1], (*path[:-1], rank + 1)))
        if len(path) < depth:
            heapq.heappush(heap, (worth * table[min(len(path), len(table) - 1), 0], (*path, 0)))
    return chosen


def expected_tokens(table: np.ndarray, tree: Tree) -> float:
    """Tokens that a step with `tree` yields."""
    worth = np.ones(tree.num_nodes)
    for node in range(1, tree.num_nodes):
        level, rank = tree.depths[node] - 1, tree.paths[node][-1]
        chance = table[min(level, len(table) - 1), rank] if rank < table.shape[1] else 0.0
        worth[node] = worth[tree.parents[node]] * chance
    return float(np.sum(worth))


def fit_time(trees: Sequence[Tree], seconds: Sequence[float]) -> np.ndarray:
    """(constant, per node, per level): least squares, relative to the times, with nothing below zero."""
    rows = np.array([(1.0, tree.num_nodes, tree.depth) for tree in trees]) / np.array(seconds)[:, None]
    kept = [0, 1, 2]
    while True:
        found = np.linalg.lstsq(rows[:, kept], np.ones(len(rows)), rcond=None)[0]
        if len(kept) == 1 or np.all(found >= 0):
            break
        del kept[int(np.argmin(found))]
    costs = np.zeros(3)
    costs[kept] = found
    return costs


def time_of(costs: np.ndarray, tree: Tree) -> float:
    """Seconds of a step with `tree`, by `fit_time`."""
    return float(costs @ (1.0, tree.num_nodes, tree.depth))


def best_tree(
    table: np.ndarray, costs: np.ndarray, most_drafts: int, most_depth: int, least_drafts: int = 1
) -> Tree | None:
    """The tree with the most expected tokens per second, of all that `grow` gives; None if none is of that size."""
    best, rate = None, 0.0
    for depth in range(1, most_depth + 1):
        paths, tokens, reached = [], 1.0, 0
        for path, worth in grow(table, most_drafts, depth):
            paths.append(path)
            tokens, reached = tokens + worth, max(reached, len(path))
            own = tokens / (costs @ (1.0, len(paths) + 1, reached))
            if len(paths) >= least_drafts and own > rate * (1 + 1e-9):
                best, rate = list(paths), own
    return None if best is None else Tree.from_choices(best)


def finalists(table: np.ndarray, costs: np.ndarray, most_drafts: int, most_depth: int) -> list[Tree]:
    """The trees worth measuring, by prediction: the best of 1 or 2 drafts, of 3 or 4, of 5 to 8, ...; the best chain;
    and EAGLE_25."""
    sizes = [2**power for power in range(1, 32) if 2**power < most_drafts] + [most_drafts]
    best = [
        best_tree(table, costs, most, most_depth, least + 1) for least, most in zip([0, *sizes], sizes, strict=False)
    ]
    rate = lambda tree: expected_tokens(table, tree) / time_of(costs, tree)
    found = [*best, max(map(chain, range(1, most_depth + 1)), key=rate), EAGLE_25]
    return list(dict.fromkeys(tree for tree in found if tree is not None))


def tune(
    bundle: Bundle,
    name: str,
    prompts: Sequence[Prompt],
    *,
    seed: int = 0,
    most_drafts: int = 64,
    most_depth: int = 8,
    steps: int = 32,
    repeats: int = 5,
    timed: Sequence[Tree] = TIMED,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Finds the best tree of a method for this machine at batch 1, and measures what it wins.

    Args:
      name: of the method; it drafts on static trees.
      prompts: sample prompts, drawn once on the comb and once with every finalist.
      steps: steps to time a tree with; `repeats` times, of which the median counts.

    Returns:
      {"device", "dtype", "method", "tree", "acceptance" [depth][rank], "seconds": {"constant", "node", "level"},
      "timed": [{"tree", "seconds"}], "trees": [{"tree", "predicted": FIGURES, "measured": FIGURES}]}, the trees by
      measured rate, the fastest first, with FIGURES = {"tokens_per_step", "seconds_per_step", "tokens_per_second"}.
    """
    method, sampling = by_name.method(name, bundle), default_sampling(bundle.config).checked()
    on = lambda tree: Method(name, method.rule, tree, method.settings)
    clock = lambda trees: parts.step_times(bundle, [on(tree) for tree in trees], prompts[:1], sampling, steps, repeats)
    progress(f"acceptance on {len(prompts)} pictures")
    table = acceptance(bundle, method, prompts, seed)
    most_depth, timed = min(most_depth, levels(bundle)), [tree for tree in timed if tree.depth <= levels(bundle)]
    progress(f"the time of a step with {len(timed)} trees")
    seconds = clock(timed)
    costs = fit_time(timed, seconds)
    trees = [tree for tree in finalists(table, costs, most_drafts, most_depth) if tree.depth <= levels(bundle)]
    progress(f"the time of a step with {len(trees)} finalists")
    spent = clock(trees)
    compared = []
    for tree, own in zip(trees, spent):
        progress(f"what {tree} yields")
        given = prompts, jax.random.key(seed + 1), method.rule, tree, sampling
        drawn = pipeline.generate(bundle, *given, **method.drawn)
        yielded = float(np.sum(drawn.stats.accepted) / np.maximum(np.sum(drawn.stats.steps), 1) + 1)
        predicted = _figures(expected_tokens(table, tree), time_of(costs, tree))
        compared.append({"tree": name_of(tree), "predicted": predicted, "measured": _figures(yielded, own)})
    compared.sort(key=lambda row: -row["measured"]["tokens_per_second"])
    return {
        "device": jax.local_devices()[0].device_kind,
        "dtype": str(jax.tree.leaves(bundle.params["target"])[0].dtype),
        "method": name,
        "tree": compared[0]["tree"],
        "acceptance": np.round(table, 4).tolist(),
        "seconds": dict(zip(("constant", "node", "level"), costs.tolist())),
        "timed": [{"tree": name_of(tree), "seconds": own} for tree, own in zip(timed, seconds)],
        "trees": compared,
    }


def _figures(tokens: float, seconds: float) -> dict[str, float]:
    return {"tokens_per_step": tokens, "seconds_per_step": seconds, "tokens_per_second": tokens / seconds}


def table(found: dict[str, Any]):
    """What `tune` found, for a terminal."""
    from rich.table import Table

    drawn = Table(title=f"{found['method']}, {found['dtype']}, on {found['device']}")
    columns = [f"{kind} {what}" for kind in ("predicted", "measured") for what in ("tokens/step", "step", "tokens/s")]
    for column in ("tree", *columns):
        drawn.add_column(column)
    for row in found["trees"]:
        cells = []
        for kind in ("predicted", "measured"):
            own = row[kind]
            cells += [f"{own['tokens_per_step']:.2f}", f"{1e3 * own['seconds_per_step']:.2f} ms"]
            cells.append(f"{own['tokens_per_second']:.1f}")
        drawn.add_row(row["tree"], *cells)
    return drawn
