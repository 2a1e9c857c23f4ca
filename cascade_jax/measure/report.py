"""What `bench` measured, for a terminal, as Markdown and as JSON."""

import pathlib
from typing import Any

from rich.table import Table

from cascade_jax import files
from cascade_jax.methods import AR


def _pairs(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The result's single figures, named, as text."""
    ms = lambda seconds: f"{1e3 * seconds:.2f} ms"
    ar = result[AR]
    return [
        ("prefill", ms(result["prefill"])),
        *((part, ms(seconds)) for part, seconds in result["parts"].items()),
        ("sum of the parts", ms(result["sum"])),
        ("a step of the loop", f"{ms(result['loop'])} ({100 * result['overhead']:+.1f} %)"),
        *(
            (f"target, {row['nodes']} node{'s' * (row['nodes'] > 1)}", f"{ms(row['seconds'])} ({row['ratio']:.2f}x)")
            for row in result["target_pass"]
        ),
        ("AR step", ms(ar["step"])),
        (
            f"reading {ar['weight_bytes'] / 1e6:.0f} MB of weights at {ar['bandwidth'] / 1e9:.1f} GB/s",
            f"{ms(ar['read'])} (an AR step takes {ar['ratio']:.1f}x)",
        ),
        *_report_pairs(result["report"]),
        *_projection_pairs(result["method"], result["projection"]),
    ]


def _report_pairs(report: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = [
        ("memory bandwidth", f"{report['bandwidth'] / 1e9:.1f} GB/s"),
        ("products of matrices", f"{report['matmul'] / 1e12:.2f} T operations/s"),
        ("share of the bandwidth's limit, AR step", f"{100 * report['ar_share']:.0f} %"),
        ("the same, verifying the tree", f"{100 * report['verify_share']:.0f} %"),
        ("pixels of a picture", f"{1e3 * report['pixels']:.2f} ms"),
    ]
    if report["peak_memory"] is not None:
        pairs.append(("most memory in use", f"{report['peak_memory'] / 1e9:.2f} GB"))
    if "compile_seconds" in report:
        pairs.append(("compiling, or reading compiled programs", f"{report['compile_seconds']:.1f} s"))
    return pairs


def _projection_pairs(method: str, projected: dict[str, float] | None) -> list[tuple[str, str]]:
    if projected is None:
        return []
    given = f"projection for a given alpha of {projected['alpha']:g}, not a measurement"
    return [
        ("projected picture, AR", f"{projected[AR]:.2f} s"),
        (f"projected picture, {method}", f"{projected['seconds']:.2f} s ({projected['speedup']:.2f}x; {given})"),
    ]


def _batch_rows(result: dict[str, Any]) -> list[list[str]]:
    """A head, then step times and pictures per second by batch."""
    names = (AR, result["method"])
    table = [["batch", *(f"{name} {what}" for name in names for what in ("step", "pictures/s", "against batch 1"))]]
    first = next((row for row in result["batches"] if "skipped" not in row), None)
    for row in result["batches"]:
        if "skipped" in row:
            table.append([str(row["batch"]), row["skipped"], *[""] * 5])
            continue
        cells = [str(row["batch"])]
        for name in names:
            rate = row[name]["pictures_per_second"]
            against = "–" if rate is None else f"{rate / first[name]['pictures_per_second']:.2f}x"
            cells += [f"{1e3 * row[name]['step']:.2f} ms", "–" if rate is None else f"{rate:.3g}", against]
        table.append(cells)
    return table


def tables(result: dict[str, Any]) -> list[Table]:
    """The result for a terminal."""
    title = f"{result['model']}, {result['dtype']}, {result['tree']}, on {result['machine']['device']}"
    parts = Table("", "", title=title)
    for pair in _pairs(result):
        parts.add_row(*pair)
    head, *body = _batch_rows(result)
    batches = Table(*head)
    for row in body:
        batches.add_row(*row)
    return [parts, batches]


def markdown(result: dict[str, Any], command: str) -> str:
    """The result as Markdown."""
    head, *body = _batch_rows(result)
    lines = [f"# {result['model']}: where the time goes", "", f"    {command}", ""]
    lines += [f"{result['dtype']}, tree {result['tree']}, on {result['machine']['device']}; batch 1 unless said.", ""]
    lines += ["| part | time |", "|---|---:|", *(f"| {name} | {figure} |" for name, figure in _pairs(result)), ""]
    lines += [f"| {' | '.join(row)} |" for row in (head, ["---:"] * len(head), *body)]
    return "\n".join(lines) + "\n"


def write(folder: pathlib.Path, result: dict[str, Any], command: str) -> None:
    """Writes bench.json and bench.md, both or none."""
    with files.published(folder) as temporary:
        files.write_json(temporary / "bench.json", {"command": command, **result})
        (temporary / "bench.md").write_text(markdown(result, command), encoding="utf-8")
