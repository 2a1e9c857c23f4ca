"""What a run folder says: a report in Markdown and in HTML, with tables, curves and grids of pictures."""

import html
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from cascade_jax import pictures
from cascade_jax.evaluation import compare, files, jobs
from cascade_jax.evaluation.compare import Measured
from cascade_jax.text.captions import Caption

RECORDS = "records.jsonl"
PICTURES_SHOWN = 24  # rows of the HTML report's grid

_QUALITY = (
    ("fidelity", "fidelity"),
    ("clip", "CLIP cosine"),
    ("frechet", "Fréchet distance to renders"),
    ("fid", "FID"),
    ("divergence", "divergence"),
)


def by_category(measured: dict[str, Measured], captions: Sequence[Caption]) -> dict[str, dict[str, dict[str, float]]]:
    """Figures of every category of captions and every method; empty where captions have none.

    Returns:
      {category: {label: {"pictures", "alpha", and of what is known "fidelity", "clip"}}}, categories by name.
    """
    found = {}
    for category in sorted({caption.category for caption in captions if caption.category}):
        rows = np.array([row for row, caption in enumerate(captions) if caption.category == category])
        found[category] = {}
        for label, own in measured.items():
            steps = np.maximum(np.sum(own.stats.steps[rows]), 1)
            figures = {"pictures": len(rows), "alpha": float(np.sum(own.stats.accepted[rows]) / steps)}
            known = {"fidelity": own.fidelity, "clip": own.clip}
            figures |= {name: float(np.mean(x[rows])) for name, x in known.items() if x is not None}
            found[category][label] = figures
    return found


def figure(report: dict[str, Any]):
    """What is known of quality over speed, as a matplotlib figure; variants of a method are joined by a line."""
    from matplotlib.figure import Figure  # slow to import

    methods = report["methods"]
    speed, title = "speedup", "speedup over AR"
    if any(figures["speedup"] is None for figures in methods.values()):
        speed, title = "target_steps", "target steps per picture"
    panels = [panel for panel in _QUALITY if all(figures[panel[0]] is not None for figures in methods.values())]
    page = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
    names = list(dict.fromkeys(figures["method"] for figures in methods.values()))
    for axes, (key, what) in zip(np.atleast_1d(page.subplots(1, len(panels))), panels):
        for number, name in enumerate(names):
            own = sorted((f for f in methods.values() if f["method"] == name), key=lambda f: f[speed])
            x, y = np.array([f[speed] for f in own]), np.array([f[key] for f in own])
            errors = {"xerr": _spread(own, speed, x), "yerr": _spread(own, key, y)}
            axes.errorbar(x, y, **errors, marker="o", markersize=4, linewidth=1, capsize=2, color=f"C{number % 10}")
        for label, figures in methods.items():
            axes.annotate(label, (figures[speed], figures[key]), (5, 4), textcoords="offset points", fontsize=8)
        axes.set(xlabel=title, ylabel=what)
        axes.spines[["top", "right"]].set_visible(False)
    return page


def _spread(methods: Sequence[dict[str, Any]], key: str, values: np.ndarray) -> np.ndarray | None:
    """Distances [2, n] to the ends of the intervals; None where there are none."""
    if not all(key in figures["intervals"] for figures in methods):
        return None
    ends = np.array([figures["intervals"][key] for figures in methods]).T
    return np.abs(ends - values)


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [compare.markdown(report), "![Quality over speed](curves.png)", "", "![Pictures](grid.png)", ""]
    if report["compile_seconds"] is not None:
        lines.append(
            f"Compilation, which no time includes, took {report['compile_seconds']:.1f} s in the run that wrote this."
        )
    lines += [f"**Careful:** {text}." for text in report["cautions"]]
    for title, head, body in _category_tables(report):
        lines += ["", f"## {title}", "", *compare.markdown_table(head, body)]
    return "\n".join(lines) + "\n"


def page(report: dict[str, Any], captions: Sequence[Caption]) -> str:
    """The report as HTML, to be opened in the run folder, whose pictures it shows."""
    head, *rows = compare.rows(report)
    text = html.escape
    methods, about = compare.notes(report)
    sections = [
        f"<h1>{text(report['model'])}: methods compared</h1>",
        f"<pre>{text(report['command'])}</pre>",
        _table(head, rows),
        *(f"<p class='careful'>{text(caution)}.</p>" for caution in report["cautions"]),
        *(f"<p><b>{text(name)}</b>{text(note)}</p>" for name, note in methods.items()),
        *(f"<p>{text(note)}</p>" for note in about),
        "<p><img src='curves.png' alt='quality over speed'></p>",
        *(f"<h2>{text(title)}</h2>{_table(titles, cells)}" for title, titles, cells in _category_tables(report)),
        "<h2>Pictures</h2>",
    ]
    labels = list(report["methods"])
    shown = []
    for caption in captions[:PICTURES_SHOWN]:
        name = f"{caption.number:06d}.png"
        cells = [f"<td><img loading='lazy' src='{text(label)}/{name}' alt='{text(label)}'></td>" for label in labels]
        shown.append(f"<tr><th>{text(caption.text)}</th>{''.join(cells)}</tr>")
    titles = "".join(f"<th>{text(label)}</th>" for label in labels)
    sections.append(f"<table class='pictures'><tr><th></th>{titles}</tr>{''.join(shown)}</table>")
    if len(captions) > PICTURES_SHOWN:
        sections.append(f"<p>The first {PICTURES_SHOWN} of {len(captions)}; all lie in the methods' folders.</p>")
    body = "\n".join(sections)
    title = text(f"{report['model']}: methods compared")
    return f"<!doctype html>\n<html lang='en'><meta charset='utf-8'><title>{title}</title>{_STYLE}\n{body}\n</html>\n"


def write(
    folder: pathlib.Path, report: dict[str, Any], measured: dict[str, Measured], captions: Sequence[Caption]
) -> None:
    """Writes report.json, report.md, report.html, curves.png and grid.png, all or none, and records.jsonl per method.

    Args:
      report: as of `compare.build`, and "compile_seconds", "cautions" and "categories" (see `by_category`).
    """
    for label in measured:
        rows = [json.dumps(record, ensure_ascii=False) for record in jobs.records(folder / label, len(captions))]
        with files.whole(folder / label / RECORDS) as temporary:
            temporary.write_text("\n".join(rows) + "\n", encoding="utf-8")
    first = [caption.number for caption in captions[: compare.GRID_ROWS]]
    shown = {label: [pictures.read(folder / label / f"{number:06d}.png") for number in first] for label in measured}
    texts = [caption.text for caption in captions]
    with files.published(folder) as temporary:
        stored = json.dumps(report, indent=2, ensure_ascii=False)
        (temporary / "report.json").write_text(stored + "\n", encoding="utf-8")
        (temporary / "report.md").write_text(markdown(report), encoding="utf-8")
        (temporary / "report.html").write_text(page(report, captions), encoding="utf-8")
        figure(report).savefig(temporary / "curves.png", dpi=130)
        compare.picture_grid(shown, report, texts).save(temporary / "grid.png")


def _category_tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of a table by category, if there are categories."""
    if not report["categories"]:
        return []
    keys = list(next(iter(next(iter(report["categories"].values())).values())))
    rows = [
        [category, label, *(f"{figures[key]:.4g}" for key in keys)]
        for category, methods in report["categories"].items()
        for label, figures in methods.items()
    ]
    return [("By category", ["category", "method", *keys], rows)]


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    def cells(row, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    return f"<table>{cells(head, 'th')}{''.join(cells(row, 'td') for row in body)}</table>"


_STYLE = """<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #191a1e }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top }
td:nth-child(-n+2), th:nth-child(-n+2), .pictures th { text-align: left; font-weight: normal }
th { font-weight: 600 }
.pictures img { width: 10rem; image-rendering: auto } .pictures th { max-width: 14rem }
.careful { border-left: 4px solid #c60; padding-left: .8rem }
img { max-width: 100% }
</style>"""
