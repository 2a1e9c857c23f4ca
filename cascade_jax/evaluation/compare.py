"""Several methods on the same prompts: speed, acceptance and quality side by side.

Pictures are timed one at a time, after one that compiles, and the methods take turns prompt by prompt (A B C, A B C),
so that whatever else the machine does hits all of them alike. Quality may be judged on more pictures, which are drawn
in batches.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from rich.table import Table

from cascade_jax import methods as by_name
from cascade_jax.bundle import Bundle, default_sampling
from cascade_jax.evaluation import files
from cascade_jax.evaluation.grid import grid
from cascade_jax.evaluation.metrics.judge import Referee, interval
from cascade_jax.methods import Method
from cascade_jax.pipeline import Generated, Report
from cascade_jax.sampling import Sampling

GRID_ROWS = 6


@dataclasses.dataclass
class Trial:
    """What one method drew.

    Attributes:
      method: the method.
      seconds: [timed], for each of the first pictures, drawn one at a time: from the encoded prompt to the pixels.
      stats: per picture, [B].
      images: uint8 [B, H, W, 3].
    """

    method: Method
    seconds: np.ndarray
    stats: Report
    images: np.ndarray


def run(
    bundle: Bundle,
    methods: Sequence[Method],
    prompts: Sequence[str],
    *,
    timed: int,
    seed: int = 0,
    sampling: Sampling | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Trial]:
    """Draws a picture for every prompt with every method.

    Args:
      timed: how many of the prompts are drawn one at a time, with a clock; the others are drawn in batches.
      seed: picture i depends on its prompt, the seed and i alone.
      sampling: None for the model's own settings.
      progress: called with (what is being done, pictures drawn, pictures in all).
    """
    sampling = (default_sampling(bundle.config) if sampling is None else sampling).checked()
    done, total = 0, len(methods) * len(prompts)

    def report(what, pictures=0):
        nonlocal done
        done += pictures
        if progress is not None:
            progress(what, done, total)

    def one(method, number):
        (prompt,) = bundle.encode([prompts[number]])
        begin = time.perf_counter()
        drawn = by_name.draw_one(bundle, method, prompt, seed, number, sampling)
        return time.perf_counter() - begin, drawn

    for method in methods:
        report(f"compiling {method.name}")
        one(method, 0)
    seconds: dict[str, list[float]] = {method.name: [] for method in methods}
    drawn: dict[str, list[Generated]] = {method.name: [] for method in methods}
    for number in range(timed):
        for method in methods:
            report(f"timing {method.name}")
            elapsed, picture = one(method, number)
            seconds[method.name].append(elapsed)
            drawn[method.name].append(picture)
            report(f"timing {method.name}", 1)
    for method in methods:
        report(f"drawing with {method.name}")
        for _, batch in by_name.draw_all(bundle, method, prompts[timed:], seed, sampling, first=timed):
            drawn[method.name].append(batch)
            report(f"drawing with {method.name}", len(batch.images))

    def trial(method):
        whole = jax.tree.map(lambda *parts: np.concatenate(parts), *drawn[method.name])
        return Trial(method, np.array(seconds[method.name]), whole.stats, whole.images)

    return {method.name: trial(method) for method in methods}


def acceptance_figures(stats: Report) -> dict[str, float]:
    """The figures of pictures' `Report`: per step over all their steps, target steps per picture, and the mass that the
    rule added, accumulated over a picture ("tvd_per_image") and per token of the output (the paper's section 5.1)."""
    steps = np.maximum(np.sum(stats.steps), 1)
    alpha = float(np.sum(stats.accepted) / steps)
    per_step = {name: float(np.sum(getattr(stats, name) * stats.steps) / steps) for name in _PER_STEP}
    added = np.sum(stats.nominal * stats.steps)
    tokens = np.sum(stats.steps + stats.accepted + 1)  # the first token of a picture comes from the prefill
    return {
        "alpha": alpha,
        "tokens_per_step": alpha + 1,
        "target_steps": float(np.mean(stats.steps)),
        **per_step,
        "tvd_per_image": float(added / len(stats.steps)),
        "tvd_per_token": float(added / tokens),
    }


_PER_STEP = ("nominal", "coupled", "divergence")


@dataclasses.dataclass
class Measured:
    """What is known of the pictures that one method drew.

    Attributes:
      method: the method.
      seconds: [timed], of pictures drawn one at a time; every method's are of the same prompts.
      stats: per picture, [B].
      fidelity: [B], see `quality.Referee`; None where unknown, as all that follows.
      frechet: distance to renders.
      clip: [B], see `clip_score`.
      fid: distance to a reference, see `fid`.
    """

    method: Method
    seconds: np.ndarray
    stats: Report
    fidelity: np.ndarray | None = None
    frechet: float | None = None
    clip: np.ndarray | None = None
    fid: float | None = None


def judged(trials: dict[str, Trial], prompts: Sequence[str], referee: Referee | None) -> dict[str, Measured]:
    """What the referee finds in pictures, beside how they were drawn."""
    if referee is None:
        return {name: Measured(trial.method, trial.seconds, trial.stats) for name, trial in trials.items()}
    return {
        name: Measured(
            trial.method,
            trial.seconds,
            trial.stats,
            referee.fidelity(trial.images, prompts),
            referee.frechet(trial.images),
        )
        for name, trial in trials.items()
    }


def summarise(measured: dict[str, Measured]) -> dict[str, dict[str, Any]]:
    """Every method's figures, as a report holds them; None for what is unknown.

    Speedups are those over the first "ar" among the methods: ratios of median times, or of mean numbers of target
    steps. 95 % intervals resample the timed prompts for times, of both methods alike, and pictures for all else.
    """
    base = next((own for own in measured.values() if own.method.name == "ar"), None)
    return {name: _figures(own, base) for name, own in measured.items()}


def _figures(own: Measured, base: Measured | None) -> dict[str, Any]:
    def seconds(rows):
        return float(np.median(own.seconds[rows]))

    def speedup(rows):
        return float(np.median(base.seconds[rows])) / seconds(rows)

    def alpha(rows):
        return float(np.sum(own.stats.accepted[rows]) / np.maximum(np.sum(own.stats.steps[rows]), 1))

    def mean(values):
        return lambda rows: float(np.mean(values[rows]))

    timed, pictures = len(own.seconds), len(own.stats.steps)
    clocked = {} if not timed else {"seconds_per_image": seconds}
    if timed and base is not None:
        clocked["speedup"] = speedup
    means = {name: getattr(own, name) for name in ("fidelity", "clip")}
    counted = {"alpha": alpha} | {name: mean(values) for name, values in means.items() if values is not None}
    known = {name: figure(slice(None)) for name, figure in (clocked | counted).items()}
    steps = acceptance_figures(own.stats)
    return {
        "method": own.method.name,
        "seconds_per_image": None,
        "speedup": None,
        **steps,
        "step_speedup": None if base is None else float(np.mean(base.stats.steps)) / steps["target_steps"],
        **dict.fromkeys(means),
        **known,
        "frechet": own.frechet,
        "fid": own.fid,
        "tree": by_name.tree_name(own.method.tree),
        "settings": own.method.settings,
        "intervals": {name: interval(figure, timed) for name, figure in clocked.items()}
        | {name: interval(figure, pictures) for name, figure in counted.items()},
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on, and with which versions."""
    device = jax.devices()[0]
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = f"{model}, {cores} cores"
    return {
        "device": cpu if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "cpu": cpu,
        "system": platform.platform(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    }


def build(
    figures: dict[str, dict[str, Any]],
    prompts: Sequence[str],
    *,
    timed: int,
    model: str,
    tree: str | None,
    seed: int,
    sampling: dict[str, float],
    command: str,
) -> dict[str, Any]:
    """The whole report, as report.json holds it.

    Args:
      figures: as of `summarise`.
      prompts: of all pictures.
      timed: how many of them were drawn with a clock.
      tree: the one tree that all methods but "ar" draft on; None if each has its own.
    """
    about = machine()
    return {
        "model": model,
        "device": about["device"],
        "tree": tree or "each method's own",
        "count": timed,
        "pictures": len(prompts),
        "seed": seed,
        "sampling": sampling,
        "command": command,
        "machine": about,
        "methods": figures,
        "prompts": list(prompts[:timed]),
    }


_COLUMNS = (
    ("seconds per picture", "seconds_per_image", "{:.3g}"),
    ("speedup", "speedup", "{:.2f}x"),
    ("target steps", "target_steps", "{:.1f}"),
    ("fewer steps", "step_speedup", "{:.2f}x"),
    ("alpha", "alpha", "{:.2f}"),
    ("nominal", "nominal", "{:.3f}"),
    ("coupled", "coupled", "{:.3f}"),
    ("divergence", "divergence", "{:.3f}"),
    ("fidelity", "fidelity", "{:.3f}"),
    ("Fréchet", "frechet", "{:.2f}"),
    ("FID", "fid", "{:.2f}"),
    ("CLIP", "clip", "{:.4f}"),
)


_MEANINGS = {
    "fidelity": "Fidelity is the share of a prompt's attributes that the judge reads in its picture; the Fréchet "
    "distance is that of its features to renders, and depends on the number of pictures.",
    "fid": "FID is the Fréchet distance of Inception-v3's features to those of the reference, and depends on the "
    "number of pictures too.",
    "clip": "CLIP is the mean cosine of a picture and its caption.",
}


def rows(report: dict[str, Any]) -> list[list[str]]:
    """The report's table as text: a head, then a row for every method, with the `spread` that figures may have."""
    methods = report["methods"]
    shown = [column for column in _COLUMNS if any(figures.get(column[1]) is not None for figures in methods.values())]
    table = [["method", "tree", *(title for title, _, _ in shown)]]
    for name, figures in methods.items():
        table.append([name, _short(figures["tree"]), *(_cell(figures, key, form) for _, key, form in shown)])
    return table


def _cell(figures: dict[str, Any], key: str, form: str) -> str:
    if figures.get(key) is None:
        return "–"
    spread = figures.get("spread", {}).get(key)
    return form.format(figures[key]) + (f" ± {form.format(spread)}" if spread is not None else "")


def table(report: dict[str, Any]) -> Table:
    """The report's table for a terminal."""
    head, *body = rows(report)
    drawn = Table(title=f"{report['model']} on {report['device']}, {report['count']} prompts")
    for column, title in enumerate(head):
        drawn.add_column(title, justify="left" if column < 2 else "right")
    for row in body:
        drawn.add_row(*row)
    return drawn


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines of Markdown; its first two columns are words, the others numbers."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *body)]
    return [lines[0], "|---|---" + "|---:" * (len(head) - 2) + "|", *lines[1:]]


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    head, *body = rows(report)
    methods, about = notes(report)
    lines = [
        f"# {report['model']}: methods compared",
        "",
        f"    {report['command']}",
        "",
        *markdown_table(head, body),
        "",
        *(f"- **{name}**{text}" for name, text in methods.items()),
    ]
    for paragraph in about:
        lines += ["", paragraph]
    return "\n".join(lines) + "\n"


def notes(report: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """What stands below a report's table: settings and intervals of every method, and paragraphs on what was measured
    and what the columns mean."""
    methods = {}
    for name, figures in report["methods"].items():
        spans = [f"{key} {low:.3g} to {high:.3g}" for key, (low, high) in figures["intervals"].items()]
        settings = ", ".join(f"{key} {value}" for key, value in figures["settings"].items())
        methods[name] = f"{f' ({settings})' if settings else ''}, 95 % intervals: {'; '.join(spans)}"
        if figures["tvd_per_image"]:
            added = f"{figures['tvd_per_image']:.3g} per picture, {figures['tvd_per_token']:.2g} per token"
            methods[name] += f". Mass added in all: {added}"
    versions = ", ".join(f"{name} {version}" for name, version in report["machine"]["versions"].items())
    sampling = ", ".join(f"{name} {value}" for name, value in report["sampling"].items() if value is not None)
    times = (
        f" Times are medians over {report['count']} prompts at batch 1, from the encoded prompt to the pixels; "
        "compilation and a first run are excluded, and the methods take turns prompt by prompt. All other figures are"
    )
    measured = (
        f"Measured on {report['device']} ({versions}); {sampling}; seed {report['seed']}."
        f"{times if report['count'] else ' Figures are'} over {report['pictures']} pictures a method."
    )
    meanings = [
        "Alpha is the mean number of accepted drafts per step. Nominal is the probability mass that the rule added per "
        "step, coupled the probability per step of parting from the strict decoder under the same random numbers, "
        "divergence the share of steps that did.",
        *(
            text
            for key, text in _MEANINGS.items()
            if any(own.get(key) is not None for own in report["methods"].values())
        ),
    ]
    return methods, [measured, " ".join(meanings)]


def picture_grid(pictures: dict[str, Sequence[np.ndarray]], report: dict[str, Any], prompts: Sequence[str]):
    """The first pictures of every method, with alpha and speedup under its name."""
    count = min(GRID_ROWS, len(prompts))
    columns = [(name, _caption(figures)) for name, figures in report["methods"].items()]
    rows = [[own[row] for own in pictures.values()] for row in range(count)]
    return grid(rows, prompts[:count], columns)


def _caption(figures: dict[str, Any]) -> str:
    if figures["tree"] == "root":
        return "token by token"
    faster = "" if figures["speedup"] is None else f", {figures['speedup']:.1f}x"
    return f"alpha {figures['alpha']:.2f}{faster}"


def write(folder: pathlib.Path, trials: dict[str, Trial], report: dict[str, Any], prompts: Sequence[str]) -> None:
    """Writes report.json, report.md and grid.png, all or none."""
    with files.published(folder) as temporary:
        stored = json.dumps(report, indent=2, ensure_ascii=False)
        (temporary / "report.json").write_text(stored + "\n", encoding="utf-8")
        (temporary / "report.md").write_text(markdown(report), encoding="utf-8")
        pictures = {name: trial.images for name, trial in trials.items()}
        picture_grid(pictures, report, prompts).save(temporary / "grid.png")


def _short(text: str, most: int = 24) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
