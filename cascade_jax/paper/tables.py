"""The paper's tables with any model: which methods stand in them, beside the paper's own numbers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from cascade_jax import methods as by_name
from cascade_jax.drafters.eagle3 import Eagle3Config
from cascade_jax.evaluation.metrics.speed import SPEEDUP
from cascade_jax.evaluation.metrics.steps import ALPHA, FEWER_STEPS
from cascade_jax.methods import AR, CASCADE, EAGLE, GSD, LANTERN_PP
from cascade_jax.paper import numbers as paper
from cascade_jax.paper.lab import OFF, RULE, RUN_MARK, Lab, Result, Row, measure, over_runs

STANDARD, OURS = "standard", "ours"  # table 2's drafters; unless one has that name, the model's own is the standard one


def table_1(lab: Lab) -> Result:
    """All methods that the paper compares, or those of the lab: speed, acceptance and quality."""
    known = paper.TABLE_1.get((lab.model, lab.dataset), {})
    if lab.methods:
        rows = [Row(label, method, paper=known.get(label), label=label) for label, method in lab.methods.items()]
        return _table_1(lab, rows)
    names = list(by_name.compared())
    rows = [Row(name, lab.method(name), paper=known.get(name)) for name in names]
    place, published = names.index(CASCADE), by_name.method(CASCADE, lab.bundle, **lab.published(), **RULE)
    if published.settings != rows[place].method.settings and not lab.thresholds:
        rows[place] = dataclasses.replace(rows[place], title=f"{CASCADE}, the model's thresholds", paper=None)
        rows.insert(place + 1, Row(f"{CASCADE}, the paper's thresholds", published, paper=known.get(CASCADE)))
    return _table_1(lab, rows)


def _table_1(lab: Lab, rows: Sequence[Row]) -> Result:
    title = "Table 1: comparison of methods"
    return _tabled(lab, "table1", title, rows, f"table 1, {lab.model}, {lab.dataset}")


def table_2(lab: Lab) -> Result:
    """Methods on the standard drafter and on others, such as the paper's own (`OURS`)."""
    _need_drafters(lab, f"{OURS}=DIR for one trained with --convergence-weight 2")
    own = {} if STANDARD in map(_kind, lab.drafters) else {STANDARD: ""}
    drafters = own | {name: name for name in lab.drafters}
    taus = dict(zip(("tau_pos", "tau_seq"), paper.TABLE_2_THRESHOLDS)) | RULE | dict(lab.thresholds)
    rows = [Row(AR, lab.method(AR))]
    for name in (EAGLE, LANTERN_PP, GSD, CASCADE):
        for title, drafter in drafters.items():
            own = taus if name == CASCADE else {}
            chosen = by_name.method(name, lab.drafters.get(drafter, lab.bundle), **own)
            known = paper.TABLE_2.get((name, _kind(title))) if lab.model == paper.LLAMAGEN and not lab.parti else None
            rows.append(Row(f"{name}, {title}", chosen, drafter, known, f"{name}, {_kind(title)}"))
    return _tabled(lab, "table2", "Table 2: comparison of drafters", rows, f"table 2, {paper.LLAMAGEN}, {paper.COCO}")


def table_3a(lab: Lab) -> Result:
    """Methods on other drafters; beside EAGLE-3 drafters stand the paper's numbers."""
    _need_drafters(lab, "eagle3=DIR for one trained with --drafter eagle3")
    alike = list(by_name.compared())
    rows = [Row(AR, lab.method(AR))]
    for drafter, bundle in lab.drafters.items():
        third = isinstance(bundle.config.drafter, Eagle3Config) and lab.model == paper.LLAMAGEN
        for name in alike[1:]:
            own = {}
            if name == CASCADE:
                own = lab.published() | {"tau_pos": paper.TABLE_3A_TAU_POS} | RULE | dict(lab.thresholds)
            title, group = f"{name}, {drafter}", f"{name}, {_kind(drafter)}"
            if len(lab.drafters) == 1:
                title = group = name
            known = paper.TABLE_3A.get(name) if third else None
            rows.append(Row(title, by_name.method(name, bundle, **own), drafter, known, group))
    title = "Table 3 (a): performance with other drafters"
    return _tabled(lab, "table3a", title, rows, f"table 3 (a), EAGLE-3 drafter, {paper.LLAMAGEN}, {paper.PARTI}")


def table_3b(lab: Lab) -> Result:
    """I and C alone and together, under both ledgers, and with the mass of C read at both places."""
    taus = {name: lab.method(CASCADE).settings[name] for name in ("tau_pos", "tau_seq")}
    budget = lab.thresholds.get("budget", paper.BUDGET)
    known = paper.TABLE_3B[lab.dataset] if lab.model == paper.LLAMAGEN else {}
    rows = [Row(AR, lab.method(AR)), Row(EAGLE, lab.method(EAGLE))]
    for ledger, mass, kinds in (
        ("nominal", "current", ("i", "c", "i+c")),
        ("coupled", "current", ("i", "c", "i+c")),
        ("nominal", "next", ("c", "i+c")),
    ):
        for kind in kinds:
            own = taus | {"i": {"tau_seq": OFF}, "c": {"tau_pos": OFF}, "i+c": {}}[kind]
            chosen = by_name.method(CASCADE, lab.bundle, **own, budget=budget, ledger=ledger, mass=mass)
            plain = (ledger, mass) == ("nominal", "current")
            what = "" if plain else f", {ledger} ledger" if mass == "current" else ", mass after the candidate"
            rows.append(Row(kind.upper() + what, chosen, paper=known.get(kind) if plain else None))
    title = "Table 3 (b): interchangeability and convergence, alone and together"
    return _tabled(lab, "table3b", title, rows, f"table 3 (b), {paper.LLAMAGEN}, {lab.dataset}")


def orders(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences that hold the order of the rows against the paper's, from the least to the most, by speed and alpha."""
    known = [row for row in rows if row["paper"] is not None]
    sentences = []
    for title, key, other in (
        (SPEEDUP.column, SPEEDUP.name, SPEEDUP.name),
        ("fewer target steps", FEWER_STEPS.name, SPEEDUP.name),
        (ALPHA.column, ALPHA.name, ALPHA.name),
    ):
        if len(known) < 2 or any(row["figures"][key] is None for row in known):
            continue
        here = _ranking([(row["title"], row["figures"][key]) for row in known])
        there = _ranking([(row["title"], row["paper"][other]) for row in known])
        sentences.append(f"By {title}, here: {here}. The paper's order by {other}: {there}.")
    return sentences


def _tabled(lab: Lab, name: str, title: str, rows: Sequence[Row], source: str) -> Result:
    measured = measure(lab, rows)
    merged = over_runs(measured)
    notes = orders(merged)
    if any(row.paper is not None for row in rows):
        notes.append(f"The paper's numbers: {source}, with its weights and on its hardware.")
    content = {"source": source} | ({"over_runs": merged} if len(merged) < len(measured) else {})
    return Result(name, title, content, measured, notes)


def _kind(drafter: str) -> str:
    """What drafters that were trained alike have in common in their names."""
    return drafter.partition(RUN_MARK)[0]


def _need_drafters(lab: Lab, example: str) -> None:
    if not lab.drafters:
        raise ValueError(f"this table compares drafters: give others with --drafters, {example}")


def _ranking(values: Sequence[tuple[str, float]]) -> str:
    """Names from the least value to the most, equal ones joined by "="."""
    text, last = "", None
    for name, value in sorted(values, key=lambda pair: pair[1]):
        text += name if last is None else f" {'=' if value == last else '<'} {name}"
        last = value
    return text
