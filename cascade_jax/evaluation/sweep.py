"""The trade-off between speed and quality over CASCADE's thresholds, budgets, ledgers and trees (the paper's figure 4).

Thresholds are traced, so every tree compiles once per ledger, however fine the grid. All points draw the same prompts
with the same keys. Steps are counted on batches; what a step costs is timed apart, at batch 1, once for every tree and
ledger, in turns. Points are kept as they are finished, so a sweep that was stopped goes on with the next.
"""

import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cascade_jax import files, interrupts
from cascade_jax import methods as by_name
from cascade_jax.bundle import Bundle, default_sampling
from cascade_jax.evaluation import curves, figures, metrics, run, tables
from cascade_jax.evaluation.metrics import Album, Gauge, Measured, Metric
from cascade_jax.evaluation.metrics.distribution import DIVERGENCE
from cascade_jax.evaluation.metrics.metric import PICTURES
from cascade_jax.evaluation.metrics.speed import SPEEDUP
from cascade_jax.evaluation.metrics.steps import FEWER_STEPS, TARGET_STEPS
from cascade_jax.measure import clock
from cascade_jax.methods import AR, CASCADE, Method
from cascade_jax.sampling import Sampling
from cascade_jax.tree import name_of


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
        by_name.method(CASCADE, bundle, tree=tree, tau_pos=pos, tau_seq=seq, budget=budget, ledger=ledger, mass=mass)
        for tree, ledger, mass, pos, seq, budget in itertools.product(trees, ledgers, masses, tau_pos, tau_seq, budgets)
    ]


def sweep(
    bundle: Bundle,
    points: Sequence[Method],
    references: Sequence[Method],
    prompts: Sequence[str],
    *,
    gauges: Sequence[Gauge],
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
      gauges: of metrics that look at pictures; without any quality stays unknown, and nothing is chosen.
      timed: pictures to time a step with; 0 takes every step to cost the same.
      memory: a file that keeps finished points, a line each. What it holds of this model, these prompts and this
        method, seed and sampling is not measured again.
      progress: called with a finished point, how many are finished, and how many there are.

    Returns:
      {"machine", "pictures", "seed", "sampling", "points": [...], "chosen"}: each point its figures as of
      `figures.summarise`, of which `step_speedup` has fewer target steps than "ar" and `speedup` the same weighted with
      what a step of its program takes at batch 1, its `step_seconds`; `chosen` as `choose` does.
    """
    sampling = (default_sampling(bundle.config) if sampling is None else sampling).checked()
    methods = [*references, *points]
    known = {} if memory is None else _recalled(memory)
    what = None if memory is None else _digest(bundle, prompts, seed, sampling, gauges)
    measured = []
    for method in interrupts.safely(methods):
        key = json.dumps([what, method.name, name_of(method.tree), method.settings])
        if key not in known:
            known[key] = _measure(bundle, method, prompts, seed, sampling, gauges)
            if memory is not None:
                _remember(memory, key, known[key])
        measured.append(known[key])
        if progress is not None:
            progress(measured[-1], len(measured), len(methods))
    costs = _step_seconds(bundle, methods, prompts[:timed], seed, sampling)
    (base,) = (point for point in measured if point["method"] == AR)
    (base_cost,) = (cost for (name, *_), cost in costs.items() if name == AR)
    for method, point in zip(methods, measured):
        cost = costs[_program(method)]
        point[FEWER_STEPS.name] = base[TARGET_STEPS.name] / point[TARGET_STEPS.name]
        point["step_seconds"] = cost
        point[SPEEDUP.name] = point[FEWER_STEPS.name] * (base_cost / cost if cost else 1.0)
    knobs = {name: None if knob is None else float(knob) for name, knob in vars(sampling).items()}
    result = {"machine": clock.machine(), "pictures": len(prompts), "seed": seed, "sampling": knobs, "points": measured}
    return {**result, "chosen": choose(measured)}


def choose(points: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest cascade that keeps AR's quality by every metric that has a bar; None if there is none, or quality was
    not measured."""
    (base,) = (point for point in points if point["method"] == AR)
    barred = [metric for metric in metrics.METRICS if metric.bar is not None and base.get(metric.name) is not None]
    if not barred:
        return None
    good = lambda point: all(metric.keeps(point.get(metric.name), base[metric.name]) for metric in barred)
    fit = [point for point in points if point["method"] == CASCADE and good(point)]
    return max(fit, key=lambda point: point[SPEEDUP.name], default=None)


def config_line(point: dict[str, Any]) -> str:
    """A point as the model's config.json wants it."""
    return f'"{CASCADE}": {json.dumps({**point["settings"], "tree": point["tree"]})}'


def _measure(bundle, method, prompts, seed, sampling, gauges) -> dict[str, Any]:
    batches = [batch for _, batch in by_name.draw_all(bundle, method, prompts, seed, sampling)]
    drawn = jax.tree.map(lambda *parts: np.concatenate(parts), *batches)
    album = Album.of(drawn.images, prompts)
    values = {gauge.name: gauge.measure(album, None) for gauge in gauges}
    return figures.summarise({"": Measured(method, np.zeros(0), drawn.stats, values)})[""]


def _digest(bundle: Bundle, prompts: Sequence[str], seed: int, sampling: Sampling, gauges: Sequence[Gauge]) -> str:
    """What a point's figures depend on besides its method."""
    knobs = [None if knob is None else float(knob) for knob in vars(sampling).values()]
    what = [run.weights_of(bundle), run.dtype_of(bundle), list(prompts), seed, knobs, [gauge.name for gauge in gauges]]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


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
    return method.name, name_of(method.tree), method.settings.get("ledger"), method.settings.get("mass")


def _step_seconds(bundle, methods, prompts, seed, sampling) -> dict[tuple, float | None]:
    """Seconds per target step at batch 1, pictures' other costs included, for every program; None without prompts."""
    if not prompts:
        return dict.fromkeys(map(_program, methods))

    def player(method):
        def play(number):
            (prompt,) = bundle.encode([prompts[number]])
            seconds, drawn = clock.timed(by_name.draw_one, bundle, method, prompt, seed, number, sampling)
            return seconds / int(drawn.stats.steps[0])

        return play

    players = {_program(method): player(method) for method in methods}
    taken = [found for _, found in clock.take_turns(players, range(len(prompts)))]
    return {kind: float(np.median([found[kind] for found in taken])) for kind in players}


def label(point: dict[str, Any]) -> str:
    """A point in a few words."""
    s = point["settings"]
    if point["method"] != CASCADE:
        return point["method"]
    words = [f"{s['tau_pos']:g}", f"{s['tau_seq']:g}", f"{s['budget']:g}", s["ledger"]]
    return " ".join([*words, "next mass"] if s["mass"] == "next" else words)


def words(point: dict[str, Any]) -> str:
    """A finished point, and what was found of it so far, in a line."""
    shown = [metric for metric in tables.known({"": point}) if metric.interval or metric.axis]
    found = ", ".join(f"{metric.name} {metric.form.format(point[metric.name])}" for metric in shown)
    return f"{label(point)} on {point['tree']}: {found}"


def markdown(result: dict[str, Any], command: str) -> str:
    """The sweep as Markdown, fastest first."""
    points, chosen = sorted(result["points"], key=lambda point: -point[SPEEDUP.name]), result["chosen"]
    head, *body = tables.rows(dict(enumerate(points)))
    head[0] = "method (tau_pos, tau_seq, budget, ledger)"
    for point, cells in zip(points, body):
        cells[0] = f"**{label(point)}**" if point is chosen else label(point)
    within = " and ".join(metric.within for metric in metrics.METRICS if metric.within)
    return "\n".join(
        [
            "# Speed against quality",
            "",
            f"    {command}",
            "",
            *tables.markdown_table(head, body),
            "",
            f"{result['pictures']} pictures a point, seed {result['seed']}, on {result['machine']['device']}. Speedup "
            "is the ratio of target steps times the ratio of what a step takes at batch 1.",
            "",
            f"Fastest with {within}: "
            + (f"`{config_line(chosen)}`" if chosen else "none (or quality was not measured)."),
            "",
        ]
    )


def figure(result: dict[str, Any], *, joined: Sequence[Sequence[dict[str, Any]]] = (), speed: str = FEWER_STEPS.name):
    """Quality over speed, as a matplotlib figure.

    Args:
      joined: points to be joined by a line each, with their thresholds beside them.
      speed: "step_speedup", the reduction of target steps, or "speedup".
    """
    points = result["points"]
    (base,) = (point for point in points if point["method"] == AR)
    panels = [metric for metric in curves.quality(points) if metric.kind == PICTURES] or [DIVERGENCE]
    page, columns = curves.panelled(panels, 6.2, 4.6)
    words = {FEWER_STEPS.name: "times fewer target steps than AR", SPEEDUP.name: "speedup over AR"}
    for axes, metric in zip(columns, panels):
        key = metric.name
        _bars(axes, points, speed, metric)
        _scatter(axes, points, joined, speed, key)
        if result["chosen"]:
            spot = result["chosen"][speed], result["chosen"][key]
            axes.scatter(*spot, marker="*", s=190, facecolors="none", edgecolors="red", label="chosen")
        if metric.bar is not None:
            axes.axhline(metric.bar(base[key]), color="grey", linewidth=0.8, linestyle="--")
        axes.set(xlabel=words[speed], ylabel=metric.axis)
        curves.widen(axes)
    columns[0].legend(fontsize=8)
    return page


def _bars(axes, points, speed: str, metric: Metric) -> None:
    """Intervals of the quality, where it has any."""
    y = np.array([point[metric.name] for point in points])
    ends = curves.spread(points, metric, y)
    if ends is not None:
        x = [point[speed] for point in points]
        axes.errorbar(x, y, yerr=ends, fmt="none", ecolor="grey", elinewidth=0.6, alpha=0.6)


def _scatter(axes, points, joined, speed: str, key: str) -> None:
    """Cascades by tree and ledger, other methods by name, and lines through what is joined."""
    cascades = [point for point in points if point["method"] == CASCADE]
    kinds = sorted({_kind(point) for point in cascades})
    for number, kind in enumerate(kinds):
        own = [point for point in cascades if _kind(point) == kind]
        name = f"cascade, {kind[0] if len(kind[0]) < 20 else 'own tree'}, {kind[1]}"
        style = {"s": 18, "alpha": 0.75, "color": f"C{number % 10}", "label": name, "linewidths": 0}
        axes.scatter([p[speed] for p in own], [p[key] for p in own], **style)
    for point in points:
        if point["method"] != CASCADE:
            axes.scatter(point[speed], point[key], marker="D", s=28, color="black")
            axes.annotate(point["method"], (point[speed], point[key]), (5, 4), textcoords="offset points")
    for own in joined:
        colour = f"C{kinds.index(_kind(own[0])) % 10}"
        axes.plot([p[speed] for p in own], [p[key] for p in own], color=colour, linewidth=1)
        words: dict[int, list[Any]] = {}  # of points that lie upon each other, one below the other
        height = np.ptp([p[key] for p in points]) / 30 or 1
        for p in own:
            spot, texts = words.setdefault(round(p[key] / height), [(p[speed], p[key]), []])
            texts.append(f"{p['settings']['tau_pos']:g}, {p['settings']['tau_seq']:g}")
        for spot, texts in words.values():
            style = {"textcoords": "offset points", "fontsize": 6, "color": "grey", "va": "center"}
            axes.annotate("\n".join(texts), spot, (6, 0), **style)


def _kind(point: dict[str, Any]) -> tuple[str, str]:
    return point["tree"], point["settings"]["ledger"]


def write(folder: pathlib.Path, result: dict[str, Any], command: str) -> None:
    """Writes sweep.json, sweep.md and sweep.png, all or none."""
    with files.published(folder) as temporary:
        files.write_json(temporary / "sweep.json", {"command": command, **result})
        (temporary / "sweep.md").write_text(markdown(result, command), encoding="utf-8")
        figure(result).savefig(temporary / "sweep.png", dpi=130)
