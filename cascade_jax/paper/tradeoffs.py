"""The paper's figures of what methods draw: speed against quality, growing budgets, each relaxation alone."""

from collections.abc import Sequence
from typing import Any

from cascade_jax import methods as by_name
from cascade_jax import pictures
from cascade_jax.evaluation import sweep
from cascade_jax.evaluation.grid import grid
from cascade_jax.evaluation.metrics.speed import SPEEDUP
from cascade_jax.evaluation.metrics.steps import ALPHA
from cascade_jax.evaluation.report import GRID_ROWS
from cascade_jax.methods import AR, CASCADE, EAGLE
from cascade_jax.paper import numbers as paper
from cascade_jax.paper.lab import OFF, RULE, RUN, Lab, Result, Row, label_of, measure
from cascade_jax.tree import name_of

SWEEP = {"tau_pos": (0.7, 0.8, 0.9, 0.95), "tau_seq": (0.5, 0.75, 0.9)}
BUDGETS = (0.0005, 0.001, 0.01, 0.1, 0.5)


def figure_4(lab: Lab) -> Result:
    """Speed against quality at the paper's thresholds, under both ledgers, and over a grid of others."""
    budget = lab.thresholds.get("budget", paper.BUDGET)
    pairs, tree = paper.FIGURE_4_THRESHOLDS, name_of(lab.method(CASCADE).tree)
    rows = [Row(AR, lab.method(AR)), Row(EAGLE, lab.method(EAGLE))]
    for ledger in ("nominal", "coupled"):
        for pair in pairs:
            ours = by_name.method(
                CASCADE, lab.bundle, tau_pos=pair[0], tau_seq=pair[1], budget=budget, ledger=ledger, mass="current"
            )
            rows.append(Row(f"{pair[0]:g}, {pair[1]:g}, {ledger}", ours))
    seen = {label_of(row) for row in rows}
    for other in sweep.grid(lab.bundle, trees=[tree], budgets=[budget], ledgers=["nominal"], **SWEEP):
        row = Row(f"{other.settings['tau_pos']:g}, {other.settings['tau_seq']:g}, nominal", other)
        if label_of(row) not in seen:
            rows.append(row)
    measured = measure(lab, rows)
    points = [row["figures"] for row in measured]
    curves = [points[2 + len(pairs) * i :][: len(pairs)] for i in range(2)]
    result = {"points": points, "chosen": sweep.choose(points) if lab.timed else None}
    pages = {"figure4-steps.png": sweep.figure(result, joined=curves)}
    if lab.timed:
        pages["figure4.png"] = sweep.figure(result, joined=curves, speed=SPEEDUP.name)
    notes = [
        "The figure joins the paper's thresholds by lines. The paper does not print its curve's points; those that its "
        "tables 1 and 2 have: "
        + "; ".join(
            f"thresholds {pos:g}, {seq:g}: {speedup:g}x, FID {fid:g}"
            for (pos, seq), (speedup, fid) in paper.FIGURE_4_POINTS.items()
        )
        + "."
    ]
    return Result("figure4", "Figure 4: speed against quality", {}, measured, notes, pages)


def figure_13(lab: Lab) -> Result:
    """The same pictures under growing budgets, under both ledgers."""
    taus = dict(zip(("tau_pos", "tau_seq"), paper.FIGURE_13_THRESHOLDS))
    taus |= {name: value for name, value in lab.thresholds.items() if name in taus}
    rows = [Row(AR, lab.method(AR))]
    for ledger in ("nominal", "coupled"):
        for budget in BUDGETS:
            chosen = by_name.method(CASCADE, lab.bundle, **taus, budget=budget, ledger=ledger, mass="current")
            rows.append(Row(f"{ledger} budget {budget:g}", chosen))
    measured = measure(lab, rows, timed=0)
    pages = {}
    for ledger in ("nominal", "coupled"):
        own = [row for row in measured if row["title"] == AR or row["title"].startswith(ledger)]
        own = [row | {"title": row["title"].removeprefix(f"{ledger} ")} for row in own]
        pages["figure13.png" if ledger == "nominal" else "figure13-coupled.png"] = _picture_grid(lab, own)
    values = ", ".join(f"{alpha:g} at {budget:g}" for budget, alpha in paper.FIGURE_13.items())
    notes = [f"The paper, for one picture of {paper.LLAMAGEN} at thresholds 0.8, 0.5: alpha {values}."]
    content = {"thresholds": taus, "paper": {str(budget): alpha for budget, alpha in paper.FIGURE_13.items()}}
    return Result("figure13", "Figure 13: growing budgets", content, measured, notes, pages)


def figure_14(lab: Lab) -> Result:
    """Pictures with I alone, C alone, and both."""
    budget = lab.thresholds.get("budget", paper.BUDGET)
    rows = [Row(AR, lab.method(AR))]
    for pos, seq in paper.FIGURE_14_THRESHOLDS:
        on = {name: tau for name, tau in (("I", pos), ("C", seq)) if tau is not None}
        words = f"{'+'.join(on)} {', '.join(f'{tau:g}' for tau in on.values())}"
        taus = {"tau_pos": OFF if pos is None else pos, "tau_seq": OFF if seq is None else seq}
        chosen = by_name.method(CASCADE, lab.bundle, **taus, **(RULE | {"budget": budget}))
        rows.append(Row(words, chosen))
    measured = measure(lab, rows, timed=0)
    pages = {"figure14.png": _picture_grid(lab, measured)}
    notes = ["I and C with their thresholds tau_pos and tau_seq."]
    return Result("figure14", "Figure 14: each relaxation alone, and both", {}, measured, notes, pages)


def _picture_grid(lab: Lab, rows: Sequence[dict[str, Any]]):
    """The first pictures of measured rows, side by side."""
    count = min(GRID_ROWS, len(lab.captions))
    columns = [
        (row["title"], "token by token" if row["label"] == AR else f"alpha {row['figures'][ALPHA.name]:.2f}")
        for row in rows
    ]
    place = lab.folder / RUN
    shown = [[pictures.read(place / row["label"] / f"{i:06d}.png") for row in rows] for i in range(count)]
    return grid(shown, lab.texts[:count], columns)
