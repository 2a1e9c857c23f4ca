"""What a run folder says: a report in JSON, Markdown and HTML, with tables, curves and grids of pictures."""

import html
import json
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from cascade_jax import files, pictures
from cascade_jax.evaluation import curves, jobs, tables
from cascade_jax.evaluation.grid import grid
from cascade_jax.evaluation.metrics import Measured
from cascade_jax.evaluation.metrics.speed import SPEEDUP
from cascade_jax.evaluation.metrics.steps import ALPHA
from cascade_jax.measure.clock import machine
from cascade_jax.text.captions import Caption

RECORDS, TRACES = "records.jsonl", "traces"
GRID_ROWS = 6
PICTURES_SHOWN = 24  # rows of the HTML report's grid


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
    weights: Mapping[str, str | None],
    cautions: Sequence[str] = (),
) -> dict[str, Any]:
    """The whole report, as report.json holds it.

    Args:
      figures: as of `figures.summarise`.
      prompts: of all pictures.
      timed: how many of them were drawn with a clock.
      tree: the one tree that all methods that draft do so on; None if each has its own.
      weights: digests of the model's parameters, see `run.weights_of`.
      cautions: sentences, without a full stop, that whoever reads the figures must know.
    """
    about = machine()
    return {
        "model": model,
        "weights": dict(weights),
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
        "cautions": list(cautions),
    }


def picture_grid(shown: Mapping[str, Sequence[np.ndarray]], report: dict[str, Any], prompts: Sequence[str]):
    """The first pictures of every method, with alpha and speedup under its name."""
    count = min(GRID_ROWS, len(prompts))
    columns = [(name, _caption(figures)) for name, figures in report["methods"].items()]
    rows = [[own[row] for own in shown.values()] for row in range(count)]
    return grid(rows, prompts[:count], columns)


def first_pictures(folder: pathlib.Path, labels: Sequence[str], count: int) -> dict[str, list[np.ndarray]]:
    """The pictures of a run folder that a grid shows, of each method."""
    numbers = range(min(GRID_ROWS, count))
    return {label: [pictures.read(folder / label / f"{number:06d}.png") for number in numbers] for label in labels}


def _caption(figures: dict[str, Any]) -> str:
    if figures["tree"] == "root":
        return "token by token"
    faster = "" if figures[SPEEDUP.name] is None else f", {figures[SPEEDUP.name]:.1f}x"
    return f"alpha {figures[ALPHA.name]:.2f}{faster}"


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [tables.markdown(report), "![Quality over speed](curves.png)", "", "![Pictures](grid.png)", ""]
    if report["compile_seconds"] is not None:
        lines.append(
            f"Compilation, which no time includes, took {report['compile_seconds']:.1f} s in the run that wrote this."
        )
    for title, head, body in _category_tables(report):
        lines += ["", f"## {title}", "", *tables.markdown_table(head, body)]
    return "\n".join(lines) + "\n"


def trace_of(number: int, label: str) -> str:
    """The name of the page, in the run folder's `TRACES`, that shows how a method drew a picture step by step."""
    return f"{number:06d}-{label}.html"


def page(report: dict[str, Any], captions: Sequence[Caption], traced: Collection[str] = ()) -> str:
    """The report as HTML, to be opened in the run folder, whose pictures it shows.

    Args:
      traced: names of the pages of single pictures that there are, see `trace_of`; pictures link to them.
    """
    head, *rows = tables.rows(report["methods"])
    text = html.escape
    methods, about = tables.notes(report)
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
        cells = []
        for label in labels:
            own = trace_of(caption.number, label)
            link = f"<br><a href='{TRACES}/{text(own)}'>step by step</a>" if own in traced else ""
            cells.append(f"<td><img loading='lazy' src='{text(label)}/{name}' alt='{text(label)}'>{link}</td>")
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
      report: as of `build`, and "compile_seconds" and "categories" (see `figures.by_category`).
    """
    texts = [caption.text for caption in captions]
    for label, own in measured.items():
        values = {name: found for name, found in own.values.items() if isinstance(found, np.ndarray)}
        with files.whole(folder / label / RECORDS) as temporary, open(temporary, "w", encoding="utf-8") as stream:
            for number, record in enumerate(jobs.records(folder / label, len(captions))):
                row = record | {name: float(found[number]) for name, found in values.items()}
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    shown = first_pictures(folder, list(measured), len(captions))
    traced = {path.name for path in (folder / TRACES).glob("*.html")}
    with files.published(folder) as temporary:
        files.write_json(temporary / "report.json", report)
        (temporary / "report.md").write_text(markdown(report), encoding="utf-8")
        (temporary / "report.html").write_text(page(report, captions, traced), encoding="utf-8")
        curves.figure(report["methods"]).savefig(temporary / "curves.png", dpi=130)
        picture_grid(shown, report, texts).save(temporary / "grid.png")


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
