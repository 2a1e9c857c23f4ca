"""The trade-off between speed and quality over CASCADE's thresholds, budgets, ledgers and trees (the paper's figure 4).

Thresholds are traced, so every tree compiles once per ledger, however fine the grid. All points draw the same prompts
with the same keys. Steps are counted on batches; what a step costs is timed apart, at batch 1, once for every tree and
ledger, in turns. Points are kept as they are finished, so a sweep that was stopped goes on with the next.
"""

import hashlib
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cascade_jax import methods as by_name
from cascade_jax.bundle import Bundle, default_sampling
from cascade_jax.evaluation import files
from cascade_jax.evaluation.compare import acceptance_figures, machine
from cascade_jax.evaluation.metrics.judge import Referee
from cascade_jax.methods import Method
from cascade_jax.sampling import Sampling
from cascade_jax.training.data import fingerprint

FIDELITY_LOSS = 0.02
FRECHET_GROWTH = 1.10


def grid(
    bundle: Bundle,
    *,
    trees: Sequence[str],
    tau_pos: Sequence[float],
    tau_seq: Sequence[float],
    budgets: Sequence[float],
    ledgers: Sequence[str],
    masses: Sequence[str] = ("current",),
) -> list[Method]:
    """A cascade for every combination, those that share a program next to each other.

    Raises:
      ValueError: if a value is out of range or a tree unknown.
    """
    return [
        by_name.method("cascade", bundle, tree=tree, tau_pos=pos, tau_seq=seq, budget=budget, ledger=ledger, mass=mass)
        for tree, ledger, mass, pos, seq, budget in itertools.product(trees, ledgers, masses, tau_pos, tau_seq, budgets)
    ]


def sweep(
    bundle: Bundle,
    points: Sequence[Method],
    references: Sequence[Method],
    prompts: Sequence[str],
    *,
    referee: Referee | None,
    seed: int = 0,
    timed: int = 3,
    sampling: Sampling | None = None,
    memory: pathlib.Path | None = None,
    progress: Callable[[dict[str, Any], int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures cascades and the methods that they are held against.

    Args:
      points: see `grid`.
      references: other methods; "ar" must be among them.
      prompts: one picture is drawn for each, at every point.
      referee: None leaves quality unknown and chooses nothing.
      timed: pictures to time a step with; 0 takes every step to cost the same.
      memory: a file that keeps finished points, a line each. What it holds of this model, these prompts and this
        method, seed and sampling is not measured again.
      progress: called with a finished point, how many are finished, and how many there are.

    Returns:
      {"machine", "pictures", "seed", "sampling", "points": [...], "chosen"}: each point its method, tree, settings,
      acceptance figures, `fidelity`, `frechet`, `step_speedup` (fewer target steps than "ar") and `speedup` (the same
      weighted with what a step of its program takes at batch 1); `chosen` as `choose` does.
    """
    sampling = (default_sampling(bundle.config) if sampling is None else sampling).checked()
    methods = [*references, *points]
    known = {} if memory is None else _recalled(memory)
    what = None if memory is None else _digest(bundle, prompts, seed, sampling, referee)
    measured = []
    for method in methods:
        key = json.dumps([what, method.name, by_name.tree_name(method.tree), method.settings])
        if key not in known:
            known[key] = _measure(bundle, method, prompts, seed, sampling, referee)
            if memory is not None:
                _remember(memory, key, known[key])
        measured.append(known[key])
        if progress is not None:
            progress(measured[-1], len(measured), len(methods))
    costs = _step_seconds(bundle, methods, prompts[:timed], seed, sampling)
    (base,) = (point for point in measured if point["method"] == "ar")
    (base_cost,) = (cost for (name, *_), cost in costs.items() if name == "ar")
    for method, point in zip(methods, measured):
        cost = costs[_program(method)]
        point["step_speedup"] = base["target_steps"] / point["target_steps"]
        point["step_seconds"] = cost
        point["speedup"] = point["step_speedup"] * (base_cost / cost if cost else 1.0)
    knobs = {name: None if knob is None else float(knob) for name, knob in vars(sampling).items()}
    result = {"machine": machine(), "pictures": len(prompts), "seed": seed, "sampling": knobs, "points": measured}
    return {**result, "chosen": choose(measured)}


def choose(points: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest cascade whose fidelity is within 0.02 of AR's and whose Fréchet distance is within 10 %; None if
    there is none, or quality was not measured."""
    (base,) = (point for point in points if point["method"] == "ar")
    if base["fidelity"] is None:
        return None

    def good(point):
        near = point["fidelity"] >= base["fidelity"] - FIDELITY_LOSS
        return near and (base["frechet"] is None or point["frechet"] <= FRECHET_GROWTH * base["frechet"])

    fit = [point for point in points if point["method"] == "cascade" and good(point)]
    return max(fit, key=lambda point: point["speedup"], default=None)


def config_line(point: dict[str, Any]) -> str:
    """A point as the model's config.json wants it."""
    return f'"cascade": {json.dumps({**point["settings"], "tree": point["tree"]})}'


def _measure(bundle, method, prompts, seed, sampling, referee) -> dict[str, Any]:
    batches = [batch for _, batch in by_name.draw_all(bundle, method, prompts, seed, sampling)]
    drawn = jax.tree.map(lambda *parts: np.concatenate(parts), *batches)
    return {
        "method": method.name,
        "tree": by_name.tree_name(method.tree),
        "settings": method.settings,
        **acceptance_figures(drawn.stats),
        "fidelity": None if referee is None else float(np.mean(referee.fidelity(drawn.images, prompts))),
        "frechet": None if referee is None else referee.frechet(drawn.images),
    }


def _digest(bundle: Bundle, prompts: Sequence[str], seed: int, sampling: Sampling, referee: Referee | None) -> str:
    """What a point's figures depend on besides its method."""
    models = [fingerprint(bundle.params[part]) for part in ("target", "drafter") if bundle.params[part] is not None]
    knobs = [None if knob is None else float(knob) for knob in vars(sampling).values()]
    return hashlib.sha256(json.dumps([models, list(prompts), seed, knobs, referee is not None]).encode()).hexdigest()


def _recalled(memory: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Finished points by key."""
    lines = memory.read_text(encoding="utf-8").splitlines() if memory.exists() else []
    return {line["key"]: line["point"] for line in map(json.loads, lines)}


def _remember(memory: pathlib.Path, key: str, point: dict[str, Any]) -> None:
    kept = {**_recalled(memory), key: point}
    with files.whole(memory) as temporary:
        lines = [json.dumps({"key": key, "point": point}) + "\n" for key, point in kept.items()]
        temporary.write_text("".join(lines), encoding="utf-8")


def _program(method: Method) -> tuple:
    """What methods have in common whose steps take equally long."""
    return method.name, by_name.tree_name(method.tree), method.settings.get("ledger"), method.settings.get("mass")


def _step_seconds(bundle, methods, prompts, seed, sampling) -> dict[tuple, float | None]:
    """Seconds per target step at batch 1, pictures' other costs included, for every program; None without prompts."""
    kinds = {_program(method): method for method in methods}
    taken: dict[tuple, list[float]] = {kind: [] for kind in kinds}
    if not prompts:
        return dict.fromkeys(kinds)
    for number in (0, *range(len(prompts))):  # the first round compiles and is dropped
        for kind, method in kinds.items():
            (prompt,) = bundle.encode([prompts[number]])
            begin = time.perf_counter()
            drawn = by_name.draw_one(bundle, method, prompt, seed, number, sampling)
            taken[kind].append((time.perf_counter() - begin) / int(drawn.stats.steps[0]))
    return {kind: float(np.median(seconds[1:])) for kind, seconds in taken.items()}


_COLUMNS = (
    ("speedup", "speedup", "{:.2f}"),
    ("fewer steps", "step_speedup", "{:.2f}"),
    ("alpha", "alpha", "{:.2f}"),
    ("nominal", "nominal", "{:.3f}"),
    ("coupled", "coupled", "{:.3f}"),
    ("divergence", "divergence", "{:.3f}"),
    ("fidelity", "fidelity", "{:.3f}"),
    ("Fréchet", "frechet", "{:.2f}"),
)


def label(point: dict[str, Any]) -> str:
    """A point in a few words."""
    s = point["settings"]
    if point["method"] != "cascade":
        return point["method"]
    words = [f"{s['tau_pos']:g}", f"{s['tau_seq']:g}", f"{s['budget']:g}", s["ledger"]]
    return " ".join([*words, "next mass"] if s["mass"] == "next" else words)


def markdown(result: dict[str, Any], command: str) -> str:
    """The sweep as Markdown, fastest first."""
    head = ["method (tau_pos, tau_seq, budget, ledger)", "tree", *(title for title, _, _ in _COLUMNS)]
    lines = ["# Speed against quality", "", f"    {command}", "", "| " + " | ".join(head) + " |"]
    lines.append("|---|---" + "|---:" * len(_COLUMNS) + "|")
    for point in sorted(result["points"], key=lambda point: -point["speedup"]):
        cells = ["–" if point[key] is None else form.format(point[key]) for _, key, form in _COLUMNS]
        name = f"**{label(point)}**" if point is result["chosen"] else label(point)
        lines.append("| " + " | ".join([name, point["tree"], *cells]) + " |")
    chosen = result["chosen"]
    lines += [
        "",
        f"{result['pictures']} pictures a point, seed {result['seed']}, on {result['machine']['device']}. Speedup is "
        "the ratio of target steps times the ratio of what a step takes at batch 1.",
        "",
        f"Fastest with fidelity within {FIDELITY_LOSS} of AR's and Fréchet distance within 10 %: "
        + (f"`{config_line(chosen)}`" if chosen else "none (or quality was not measured)."),
    ]
    return "\n".join(lines) + "\n"


def figure(result: dict[str, Any], *, curves: Sequence[Sequence[dict[str, Any]]] = (), speed: str = "step_speedup"):
    """Quality over speed, as a matplotlib figure.

    Args:
      curves: points to be joined by a line each, with their thresholds beside them.
      speed: "step_speedup", the reduction of target steps, or "speedup".
    """
    from matplotlib.figure import Figure  # slow to import

    points = result["points"]
    (base,) = (point for point in points if point["method"] == "ar")
    panels = [
        (key, title, bar)
        for key, title, bar in (
            ("fidelity", "fidelity", (base["fidelity"] or 0) - FIDELITY_LOSS),
            ("frechet", "Fréchet distance to renders", FRECHET_GROWTH * (base["frechet"] or 0)),
            ("fid", "FID", None),
        )
        if base.get(key) is not None
    ] or [("divergence", "divergence", None)]
    page = Figure(figsize=(6.2 * len(panels), 4.6), layout="constrained")
    cascades = [point for point in points if point["method"] == "cascade"]
    kinds = sorted({(point["tree"], point["settings"]["ledger"]) for point in cascades})
    for axes, (key, title, bar) in zip(np.atleast_1d(page.subplots(1, len(panels))), panels):
        for number, kind in enumerate(kinds):
            chosen = [point for point in cascades if (point["tree"], point["settings"]["ledger"]) == kind]
            xs, ys = [p[speed] for p in chosen], [p[key] for p in chosen]
            name = f"cascade, {kind[0] if len(kind[0]) < 20 else 'own tree'}, {kind[1]}"
            axes.scatter(xs, ys, s=18, alpha=0.75, color=f"C{number % 10}", label=name, linewidths=0)
        for point in points:
            if point["method"] != "cascade":
                axes.scatter(point[speed], point[key], marker="D", s=28, color="black")
                axes.annotate(point["method"], (point[speed], point[key]), (5, 4), textcoords="offset points")
        for own in curves:
            kind = own[0]["tree"], own[0]["settings"]["ledger"]
            axes.plot([p[speed] for p in own], [p[key] for p in own], color=f"C{kinds.index(kind) % 10}", linewidth=1)
            for p in own:
                taus = f"{p['settings']['tau_pos']:g}, {p['settings']['tau_seq']:g}"
                axes.annotate(taus, (p[speed], p[key]), (4, -9), textcoords="offset points", fontsize=6, color="grey")
        if result["chosen"]:
            spot = result["chosen"][speed], result["chosen"][key]
            axes.scatter(*spot, marker="*", s=190, facecolors="none", edgecolors="red", label="chosen")
        if bar is not None:
            axes.axhline(bar, color="grey", linewidth=0.8, linestyle="--")
        words = {"step_speedup": "times fewer target steps than AR", "speedup": "speedup over AR"}
        axes.set(xlabel=words[speed], ylabel=title)
        axes.spines[["top", "right"]].set_visible(False)
    page.axes[0].legend(fontsize=8)
    return page


def write(folder: pathlib.Path, result: dict[str, Any], command: str) -> None:
    """Writes sweep.json, sweep.md and sweep.png, all or none."""
    with files.published(folder) as temporary:
        stored = json.dumps({"command": command, **result}, indent=2, ensure_ascii=False)
        (temporary / "sweep.json").write_text(stored + "\n", encoding="utf-8")
        (temporary / "sweep.md").write_text(markdown(result, command), encoding="utf-8")
        figure(result).savefig(temporary / "sweep.png", dpi=130)
