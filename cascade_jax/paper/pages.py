"""Results as files: Markdown beside the paper's numbers, JSON, and pictures."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from cascade_jax import files
from cascade_jax.evaluation import tables
from cascade_jax.evaluation.metrics import by_name
from cascade_jax.evaluation.metrics.speed import SPEEDUP
from cascade_jax.measure.clock import machine
from cascade_jax.paper.lab import Lab, Result, over_runs
from cascade_jax.paper.numbers import FORMS


def markdown(lab: Lab, result: Result, command: str) -> str:
    """A result as Markdown."""
    lines = [f"# {result.title}", "", f"    {command}", ""]
    if result.rows:
        merged = over_runs(result.rows)
        lines += [*_markdown_table(merged), ""]
        if len(merged) < len(result.rows):
            runs = max(row["runs"] for row in merged)
            lines += [f"Means over drafters of {runs} runs, ± their standard deviation. Every run:", ""]
            lines += [*_markdown_table(result.rows), ""]
    lines += [f"![{result.title}]({name})\n" for name in result.pages]
    lines += [f"{note}\n" for note in result.notes]
    count, timed, device = len(lab.captions), "", machine()["device"]
    if any(row["figures"][SPEEDUP.name] is not None for row in result.rows):
        timed = f" Times are medians over {min(lab.timed, count)} of them at batch 1, the methods in turns."
    lines.append(f"Measured on {device}: {count} pictures{' a row' if result.rows else ''}, seed {lab.seed}.{timed}")
    return "\n".join(lines) + "\n"


def _markdown_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    head, *body = tables.rows({row["title"]: row["figures"] for row in rows})
    known = [row["paper"] or {} for row in rows]
    for name, form in FORMS.items():
        if any(own.get(name) is not None for own in known):
            head.append(f"paper: {by_name(name).column}")
            for cells, own in zip(body, known):
                cells.append("–" if own.get(name) is None else form.format(own[name]))
    return tables.markdown_table(head, body)


def write(lab: Lab, result: Result, command: str) -> list[str]:
    """Writes a result's Markdown, JSON and pictures, all or none; returns the names of the files."""
    content = {"what": result.name, "title": result.title, "command": command, "machine": machine(), **job_of(lab)}
    content |= {**result.content, "rows": list(result.rows), "notes": list(result.notes)}
    with files.published(lab.folder) as temporary:
        files.write_json(temporary / f"{result.name}.json", content)
        (temporary / f"{result.name}.md").write_text(markdown(lab, result, command), encoding="utf-8")
        for name, page in result.pages.items():
            if hasattr(page, "savefig"):
                page.savefig(temporary / name, dpi=130)
            else:
                page.save(temporary / name)
        return sorted(path.name for path in temporary.iterdir())


def job_of(lab: Lab) -> dict[str, Any]:
    """What a result depends on besides its kind, as JSON holds it."""
    sampling = {name: None if x is None else float(x) for name, x in vars(lab.checked_sampling).items()}
    return {
        "weights": {name or "own": dict(own) for name, own in lab.weights.items()},
        "count": len(lab.captions),
        "seed": lab.seed,
        "sampling": sampling,
        "job": {
            "captions": hashlib.sha256("\n".join(lab.texts).encode()).hexdigest()[:16],
            "timed": lab.timed,
            "thresholds": dict(lab.thresholds),
            "metrics": [gauge.name for gauge in lab.gauges],
        }
        | ({"methods": {label: own.name for label, own in lab.methods.items()}} if lab.methods else {}),
    }


def made(lab: Lab, name: str) -> bool:
    """Whether the result of that name lies in the lab's folder already, made of the same on this machine."""
    place = lab.folder / f"{name}.json"
    try:
        there = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    alike = all(there.get(key) == value for key, value in job_of(lab).items())
    return alike and there.get("machine", {}).get("device") == machine()["device"]
