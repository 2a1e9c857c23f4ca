"""Tables of methods and their figures, for a terminal and as Markdown, and what stands below them."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from cascade_jax.evaluation import metrics
from cascade_jax.evaluation.metrics import Metric
from cascade_jax.evaluation.metrics.distribution import ADDED_PER_IMAGE, ADDED_PER_TOKEN

Figures = Mapping[str, Any]  # of one method, as of `figures.summarise`


def known(methods: Mapping[str, Figures]) -> list[Metric]:
    """The metrics that at least one of the methods has a figure of."""
    return [metric for metric in metrics.METRICS if any(own.get(metric.name) is not None for own in methods.values())]


def rows(methods: Mapping[str, Figures]) -> list[list[str]]:
    """Methods as text: a head, then a row for every method, with the `spread` that figures may have."""
    shown = [metric for metric in known(methods) if metric.column]
    table = [["method", "tree", *(metric.column for metric in shown)]]
    for name, figures in methods.items():
        table.append([name, _short(figures["tree"]), *(_cell(figures, metric) for metric in shown)])
    return table


def _cell(figures: Figures, metric: Metric) -> str:
    if figures.get(metric.name) is None:
        return "–"
    spread = figures.get("spread", {}).get(metric.name)
    text = metric.form.format(figures[metric.name])
    return text + (f" ± {metric.form.format(spread)}" if spread is not None else "")


def terminal(report: Mapping[str, Any]) -> Table:
    """A report's table for a terminal."""
    head, *body = rows(report["methods"])
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


def markdown(report: Mapping[str, Any]) -> str:
    """A report as Markdown."""
    head, *body = rows(report["methods"])
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
    for paragraph in (*about, *(f"**Careful:** {text}." for text in report["cautions"])):
        lines += ["", paragraph]
    return "\n".join(lines) + "\n"


def notes(report: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """What stands below a report's table: settings and intervals of every method, and paragraphs on what was measured
    and what the columns mean."""
    methods = {}
    for name, figures in report["methods"].items():
        spans = [f"{key} {low:.3g} to {high:.3g}" for key, (low, high) in figures["intervals"].items()]
        settings = ", ".join(f"{key} {value}" for key, value in figures["settings"].items())
        methods[name] = f"{f' ({settings})' if settings else ''}, 95 % intervals: {'; '.join(spans)}"
        if figures[ADDED_PER_IMAGE.name]:
            added = f"{figures[ADDED_PER_IMAGE.name]:.3g} per picture, {figures[ADDED_PER_TOKEN.name]:.2g} per token"
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
    meanings = " ".join(metric.meaning for metric in known(report["methods"]) if metric.meaning)
    return methods, [measured, meanings]


def _short(text: str, most: int = 24) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
