"""Plans as tables, for a terminal and as pages of a folder."""

import json
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from rich.table import Table

from cascade_jax import files
from cascade_jax.measure.kernels import OTHER, PHASES
from cascade_jax.measure.plan import Case, Plan
from cascade_jax.methods import AR

_INDEX = "README.md"


class Section(NamedTuple):
    """A table: its title, its head, and its rows; the first `words` columns are words, the others figures."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    words: int = 2


def sections(plan: Plan) -> list[Section]:
    """Everything that a plan says."""
    found = [_memory(plan), _steps(plan), _phases(plan), _programs(plan), _pictures(plan), _collectives(plan)]
    return [section for section in [*found, *_dearest(plan)] if section.rows]


def assumptions(plan: Plan) -> str:
    """What the plan is of, and what its times are made of."""
    r, versions = plan.roofline, ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    where = "one device"
    if plan.mesh is not None:
        where = f"a mesh of data={plan.mesh['data']}, model={plan.mesh['model']} (figures are of one of its devices)"
    exchange = ""
    if plan.mesh is not None:
        exchange = f", and for an exchange {_us(r.exchange)} and its bytes at {r.link / 1e9:,.0f} GB/s around a ring"
    return (
        f"{plan.dtype}, {where}, prompts of {plan.prompt} slots, {plan.length:,} tokens a picture. Compiled by "
        f"{versions}; nothing was run. Kernels, bytes and memory are the compiler's. **Times are a model's**: "
        f"{_us(r.launch)} for every kernel, the longer of its bytes at {r.bandwidth / 1e9:,.0f} GB/s and its products "
        f"at {r.matmul / 1e12:,.0f} T operations/s{exchange}."
    )


def title(plan: Plan) -> str:
    """A headline."""
    return f"{plan.name} on {plan.device.title}"


def tables(plan: Plan) -> Iterator[Table]:
    """For a terminal."""
    for section in sections(plan):
        table = Table(title=section.title, title_justify="left")
        for number, name in enumerate(section.head):
            table.add_column(name, justify="left" if number < section.words else "right", overflow="fold")
        for row in section.rows:
            table.add_row(*row)
        yield table


def markdown(plan: Plan, command: str) -> str:
    """A page."""
    lines = [f"# {title(plan)}", "", f"    {command}", "", assumptions(plan), ""]
    for section in sections(plan):
        lines += [f"## {section.title}", "", *_table(section.head, section.rows, section.words), ""]
    return "\n".join(lines)


def write(folder: pathlib.Path, plans: Iterable[Plan], command: str) -> None:
    """Writes a page and its figures for every plan, and an index of all that the folder has."""
    with files.published(folder) as temporary:
        for plan in plans:
            stem = page(plan)
            (temporary / f"{stem}.md").write_text(markdown(plan, command), encoding="utf-8")
            stored = json.dumps({"command": command, **plan.json()}, indent=1, ensure_ascii=False)
            (temporary / f"{stem}.json").write_text(stored + "\n", encoding="utf-8")
        there = {file.name: file for place in (folder, temporary) for file in sorted(place.glob("*.json"))}
        stored = {name: json.loads(there[name].read_text(encoding="utf-8")) for name in sorted(there)}
        (temporary / _INDEX).write_text(_index(stored), encoding="utf-8")


def page(plan: Plan) -> str:
    """The name of a plan's files, without an ending."""
    mesh = "" if plan.mesh is None else f"-data{plan.mesh['data']}-model{plan.mesh['model']}"
    return re.sub(r"[^\w.\-]+", "-", f"{pathlib.Path(plan.name).name}-{plan.device.name}{mesh}")


def misfits(plan: Plan) -> list[str]:
    """A line for every case that the device has no room for."""
    return [
        f"{case.method}, batch {case.batch}: "
        + (case.problem or f"{_gb(case.needed)} are needed on each device, which has {_gb(plan.device.memory)}")
        for case in plan.cases
        if not case.fits
    ]


def _memory(plan: Plan) -> Section:
    head = ("method", "batch", "needed", "of", "weights", "state", "temporaries", "fits")
    rows = []
    for case in plan.cases:
        most = max((p.temporaries for p in case.programs.values()), default=0)
        state = _gb(case.programs["prefill"].outputs) if "prefill" in case.programs else "–"
        fits = "yes" if case.fits else f"no: {case.problem}" if case.problem else "no"
        needed = f"over {_gb(case.needed)}" if case.problem else _gb(case.needed)
        figures = needed, _gb(plan.device.memory), _gb(case.weights), state, _gb(most)
        rows.append((case.method, str(case.batch), *figures, fits))
    return Section("Does it fit", head, rows)


def _steps(plan: Plan) -> Section:
    head = ("method", "batch", "tree", "kernels", "bytes", "over what goes in", "copies of 2 MB or more")
    head = (*head, "launches", "work", "exchanges", "step", "against ar")
    rows = []
    strict = {case.batch: case.step for case in plan.cases if case.method == AR}
    for case in plan.cases:
        if (step := case.step) is None:
            continue
        against = f"{step.seconds / strict[case.batch].seconds:.2f}x" if strict.get(case.batch) else "–"
        times = (_us(seconds) for seconds in (step.launch, step.work, step.exchange, step.seconds))
        program = case.programs.get("step") or case.programs["loop"]
        copies = f"{program.copies.count}, {_mb(program.copies.bytes)}" if program.copies.count else "none"
        figures = f"{step.kernels:,}", _mb(step.bytes), f"{step.bytes / program.arguments:.2f}", copies
        rows.append((*_case(case), case.tree, *figures, *times, against))
    return Section("A step, modelled", head, rows, 3)


def _phases(plan: Plan) -> Section:
    names = (*PHASES, OTHER)
    rows = []
    for case in plan.cases:
        program = case.programs.get("step") or case.programs.get("loop")
        if program is not None:
            costs = [program.phases.get(name) for name in names]
            rows.append(
                (
                    *_case(case),
                    *("–" if c is None else f"{c.kernels:,} / {_mb(c.bytes)} / {_us(c.seconds)}" for c in costs),
                )
            )
    return Section("Its parts: kernels / bytes / modelled time", ("method", "batch", *names), rows)


def _programs(plan: Plan) -> Section:
    head = ("method", "batch", "program", "compiled in", "arguments", "temporaries", "kernels", "bytes", "modelled")
    rows = []
    for case in plan.cases:
        for name, p in case.programs.items():
            label = "a turn of the loop" if name == "loop" else name
            figures = f"{p.compile_seconds:.0f} s", _gb(p.arguments), _gb(p.temporaries), f"{p.total.kernels:,}"
            rows.append((*_case(case), label, *figures, _mb(p.total.bytes), f"{1e3 * p.total.seconds:.2f} ms"))
    return Section("Programs", head, rows, 3)


def _pictures(plan: Plan) -> Section:
    head = ("method", "batch", "tokens a step", "prefill", "steps", "pixels", "all", "speedup")
    rows = []
    for case in plan.cases:
        if (p := case.picture) is not None:
            speedup = "–" if p.speedup is None else f"{p.speedup:.2f}x"
            times = ("–" if s is None else f"{1e3 * s:,.1f} ms" for s in (p.prefill, p.steps, p.pixels, p.seconds))
            rows.append((*_case(case), f"{p.tokens_per_step:.2f}", *times, speedup))
    given = "" if plan.alpha is None else f" for a given alpha of {plan.alpha:g}"
    return Section(f"A batch of pictures, modelled{given}", head, rows)


def _collectives(plan: Plan) -> Section:
    head = ("method", "batch", "program", "kind", "devices", "count", "bytes on a device")
    rows = []
    for case in plan.cases:
        for name, program in case.programs.items():
            for c in program.collectives:
                rows.append((*_case(case), name, c.kind, str(c.devices), f"{c.count:,}", _mb(c.bytes)))
    return Section("Exchanges between devices; of a loop, in a turn", head, rows, 4)


def _dearest(plan: Plan) -> Iterator[Section]:
    head = ("from", "phase", "kernel", "makes", "count", "bytes each", "all together")
    for case in plan.cases:
        program = case.programs.get("step") or case.programs.get("loop")
        if program is not None:
            rows = [
                (d.source or "–", d.phase, d.kind, d.shape, f"{d.count:,}", _mb(d.bytes), _us(d.seconds))
                for d in program.dearest
            ]
            yield Section(f"Where a step's time goes: {case.method}, batch {case.batch}", head, rows, 4)


def _index(stored: dict[str, dict[str, Any]]) -> str:
    lines = [
        "# Plans: what drawing would cost on machines that are not at hand",
        "",
        "Compiled, not run: kernels, bytes and memory are the compiler's, times a model's. Each page says what its",
        "times are made of, and has the command that made it. Pictures are for the alpha that is given, and without",
        "their pixels where a page has none.",
        "",
    ]
    head = ("model", "device", "mesh", "method", "batch", "memory", "kernels", "bytes", "step", "alpha", "picture")
    head = (*head, "speedup")
    rows = []
    for name, made in stored.items():
        link = f"[{made['name']}]({name.removesuffix('.json')}.md)"
        mesh = "–" if made["mesh"] is None else ", ".join(f"{axis}={n}" for axis, n in made["mesh"].items())
        for case in made["cases"]:
            step, picture = case["step"], case["picture"]
            memory = _gb(case["needed"]) + ("" if case["fits"] else " (does not fit)")
            costs = (f"{step['kernels']:,}", _mb(step["bytes"]), _us(step["seconds"])) if step else ("–",) * 3
            drawn = "–" if picture is None else f"{1e3 * picture['seconds']:,.0f} ms"
            faster = "–" if picture is None or picture["speedup"] is None else f"{picture['speedup']:.2f}x"
            words = link, made["device"]["name"], mesh, case["method"], str(case["batch"])
            alpha = "–" if picture is None or case["method"] == AR else f"{made['alpha']:g}"
            rows.append((*words, memory, *costs, alpha, drawn, faster))
    return "\n".join([*lines, *_table(head, rows, 5), ""])


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]], words: int) -> list[str]:
    rule = ["---" if number < words else "---:" for number in range(len(head))]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]


def _case(case: Case) -> tuple[str, str]:
    return case.method, str(case.batch)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.2f} GB"


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f} µs" if seconds < 1e-4 else f"{1e6 * seconds:,.0f} µs"
