"""The paper's tables and figures with any model: what is drawn for each, and what it looks like beside the paper's own.

    lab = Lab(bundle, captions, pathlib.Path("paper"))
    write(lab, table_1(lab), command)

Methods draw into one run folder (see `run`), so that tables and figures share what they have in common, and whatever
was stopped goes on where it was.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cascade_jax import methods as by_name
from cascade_jax import pictures, pipeline
from cascade_jax.bundle import Bundle, default_sampling
from cascade_jax.drafters.eagle3 import Eagle3Config
from cascade_jax.evaluation import compare, files, run, sweep
from cascade_jax.evaluation.grid import grid
from cascade_jax.evaluation.metrics.clip import Scorer
from cascade_jax.evaluation.metrics.fid import Distance
from cascade_jax.evaluation.metrics.judge import Referee
from cascade_jax.methods import Method
from cascade_jax.paper import figures, traces
from cascade_jax.paper import numbers as paper
from cascade_jax.paper.confidence import Confidence, confidence
from cascade_jax.paper.numbers import Numbers
from cascade_jax.sampling import Sampling
from cascade_jax.text.captions import Caption

RUN = "run"  # the run folder, in the folder of the results
STANDARD, OURS = "standard", "ours"  # table 2's drafters; unless one has that name, the model's own is the standard one
RUN_MARK = "#"  # "ours#2" is the second drafter that was trained as "ours"
OFF = 2.0  # a threshold that no cosine reaches
SWEEP = {"tau_pos": (0.7, 0.8, 0.9, 0.95), "tau_seq": (0.5, 0.75, 0.9)}
BUDGETS = (0.0005, 0.001, 0.01, 0.1, 0.5)
_RULE = {"ledger": "nominal", "mass": "current", "budget": paper.BUDGET}  # the paper's


@dataclasses.dataclass(frozen=True)
class Lab:
    """What tables and figures are measured with.

    Attributes:
      bundle: the model.
      captions: of the pictures.
      folder: receives the results.
      drafters: the same model with other drafters, by name; "NAME#1", "NAME#2" ... are trained alike.
      thresholds: of cascade, in place of a table's own: "tau_pos", "tau_seq", "budget".
      parti: whether the captions are PartiPrompts, to hold against the paper's numbers for these.
      seed, batch, timed, sampling, referee, clip, fid, progress: as of `run.evaluate`.
    """

    bundle: Bundle
    captions: Sequence[Caption]
    folder: pathlib.Path
    drafters: Mapping[str, Bundle] = dataclasses.field(default_factory=dict)
    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    parti: bool = False
    seed: int = 0
    batch: int = by_name.BATCH
    timed: int = 4
    sampling: Sampling | None = None
    referee: Referee | None = None
    clip: Scorer | None = None
    fid: Distance | None = None
    progress: Callable[[str, int, int], None] | None = None

    @property
    def texts(self) -> list[str]:
        return [caption.text for caption in self.captions]

    @property
    def model(self) -> str | None:
        """Which of the paper's models this one is held against; None for none."""
        config = self.bundle.config
        return None if getattr(config.target, "style", "lumina") == "anole" else paper.FAMILIES.get(config.family)

    @property
    def dataset(self) -> str:
        return paper.PARTI if self.parti else paper.COCO


@dataclasses.dataclass(frozen=True)
class Row:
    """A method under a title, on a drafter ("" for the model's own), and the paper's numbers for it.

    Rows of one `group` differ in the run that their drafter is from, and in nothing else; "" is a group of its own.
    """

    title: str
    method: Method
    drafter: str = ""
    paper: Numbers | None = None
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Result:
    """A table or figure.

    Attributes:
      name: of its files.
      title: in words.
      content: what JSON holds.
      rows: what was measured: {"title", "group", "label", "drafter", "figures", "paper"} each; none for figures
        without methods.
      notes: sentences below the table.
      pages: pictures by the names of their files, of PIL or matplotlib.
    """

    name: str
    title: str
    content: dict[str, Any]
    rows: Sequence[dict[str, Any]] = ()
    notes: Sequence[str] = ()
    pages: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def table_1(lab: Lab) -> Result:
    """All methods: speed, acceptance and quality."""
    known = paper.TABLE_1.get((lab.model, lab.dataset), {})
    rows = [Row(name, _method(lab, name), paper=known.get(name)) for name in by_name.METHODS]
    published = by_name.method("cascade", lab.bundle, **_published(lab), **_RULE)
    if published.settings != rows[-1].method.settings and not lab.thresholds:
        rows[-1] = dataclasses.replace(rows[-1], title="cascade, the model's thresholds", paper=None)
        rows.append(Row("cascade, the paper's thresholds", published, paper=known.get("cascade")))
    title = "Table 1: comparison of methods"
    return _tabled(lab, "table1", title, rows, f"table 1, {lab.model}, {lab.dataset}")


def table_2(lab: Lab) -> Result:
    """Methods on the standard drafter and on others, such as the paper's own (`OURS`)."""
    _need_drafters(lab, f"{OURS}=DIR for one trained with --convergence-weight 2")
    own = {} if STANDARD in map(_kind, lab.drafters) else {STANDARD: ""}
    drafters = own | {name: name for name in lab.drafters}
    taus = dict(zip(("tau_pos", "tau_seq"), paper.TABLE_2_THRESHOLDS)) | _RULE | dict(lab.thresholds)
    rows = [Row("ar", _method(lab, "ar"))]
    for name in ("eagle", "lantern++", "gsd", "cascade"):
        for title, drafter in drafters.items():
            own = taus if name == "cascade" else {}
            chosen = by_name.method(name, lab.drafters.get(drafter, lab.bundle), **own)
            known = paper.TABLE_2.get((name, _kind(title))) if lab.model == paper.LLAMAGEN and not lab.parti else None
            rows.append(Row(f"{name}, {title}", chosen, drafter, known, f"{name}, {_kind(title)}"))
    return _tabled(lab, "table2", "Table 2: comparison of drafters", rows, f"table 2, {paper.LLAMAGEN}, {paper.COCO}")


def table_3a(lab: Lab) -> Result:
    """Methods on other drafters; beside EAGLE-3 drafters stand the paper's numbers."""
    _need_drafters(lab, "eagle3=DIR for one trained with --drafter eagle3")
    rows = [Row("ar", _method(lab, "ar"))]
    for drafter, bundle in lab.drafters.items():
        third = isinstance(bundle.config.drafter, Eagle3Config) and lab.model == paper.LLAMAGEN
        for name in by_name.METHODS[1:]:
            own = {}
            if name == "cascade":
                own = _published(lab) | {"tau_pos": paper.TABLE_3A_TAU_POS} | _RULE | dict(lab.thresholds)
            title, group = f"{name}, {drafter}", f"{name}, {_kind(drafter)}"
            if len(lab.drafters) == 1:
                title = group = name
            known = paper.TABLE_3A[name] if third else None
            rows.append(Row(title, by_name.method(name, bundle, **own), drafter, known, group))
    title = "Table 3 (a): performance with other drafters"
    return _tabled(lab, "table3a", title, rows, f"table 3 (a), EAGLE-3 drafter, {paper.LLAMAGEN}, {paper.PARTI}")


def table_3b(lab: Lab) -> Result:
    """I and C alone and together, under both ledgers, and with the mass of C read at both places."""
    taus = {name: _method(lab, "cascade").settings[name] for name in ("tau_pos", "tau_seq")}
    budget = lab.thresholds.get("budget", paper.BUDGET)
    known = paper.TABLE_3B[lab.dataset] if lab.model == paper.LLAMAGEN else {}
    rows = [Row("ar", _method(lab, "ar")), Row("eagle", _method(lab, "eagle"))]
    for ledger, mass, kinds in (
        ("nominal", "current", ("i", "c", "i+c")),
        ("coupled", "current", ("i", "c", "i+c")),
        ("nominal", "next", ("c", "i+c")),
    ):
        for kind in kinds:
            own = taus | {"i": {"tau_seq": OFF}, "c": {"tau_pos": OFF}, "i+c": {}}[kind]
            chosen = by_name.method("cascade", lab.bundle, **own, budget=budget, ledger=ledger, mass=mass)
            plain = (ledger, mass) == ("nominal", "current")
            what = "" if plain else f", {ledger} ledger" if mass == "current" else ", mass after the candidate"
            rows.append(Row(kind.upper() + what, chosen, paper=known.get(kind) if plain else None))
    title = "Table 3 (b): interchangeability and convergence, alone and together"
    return _tabled(lab, "table3b", title, rows, f"table 3 (b), {paper.LLAMAGEN}, {lab.dataset}")


def figure_4(lab: Lab) -> Result:
    """Speed against quality at the paper's thresholds, under both ledgers, and over a grid of others."""
    budget = lab.thresholds.get("budget", paper.BUDGET)
    pairs, tree = paper.FIGURE_4_THRESHOLDS, by_name.tree_name(_method(lab, "cascade").tree)
    rows = [Row("ar", _method(lab, "ar")), Row("eagle", _method(lab, "eagle"))]
    for ledger in ("nominal", "coupled"):
        for pair in pairs:
            ours = by_name.method(
                "cascade", lab.bundle, tau_pos=pair[0], tau_seq=pair[1], budget=budget, ledger=ledger, mass="current"
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
    pages = {"figure4-steps.png": sweep.figure(result, curves=curves)}
    if lab.timed:
        pages["figure4.png"] = sweep.figure(result, curves=curves, speed="speedup")
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
    rows = [Row("ar", _method(lab, "ar"))]
    for ledger in ("nominal", "coupled"):
        for budget in BUDGETS:
            chosen = by_name.method("cascade", lab.bundle, **taus, budget=budget, ledger=ledger, mass="current")
            rows.append(Row(f"{ledger} budget {budget:g}", chosen))
    measured = measure(lab, rows, timed=0)
    pages = {}
    for ledger in ("nominal", "coupled"):
        own = [row for row in measured if row["title"] == "ar" or row["title"].startswith(ledger)]
        own = [row | {"title": row["title"].removeprefix(f"{ledger} ")} for row in own]
        pages["figure13.png" if ledger == "nominal" else "figure13-coupled.png"] = _picture_grid(lab, own)
    values = ", ".join(f"{alpha:g} at {budget:g}" for budget, alpha in paper.FIGURE_13.items())
    notes = [f"The paper, for one picture of {paper.LLAMAGEN} at thresholds 0.8, 0.5: alpha {values}."]
    content = {"thresholds": taus, "paper": {str(budget): alpha for budget, alpha in paper.FIGURE_13.items()}}
    return Result("figure13", "Figure 13: growing budgets", content, measured, notes, pages)


def figure_14(lab: Lab) -> Result:
    """Pictures with I alone, C alone, and both."""
    budget = lab.thresholds.get("budget", paper.BUDGET)
    rows = [Row("ar", _method(lab, "ar"))]
    for pos, seq in paper.FIGURE_14_THRESHOLDS:
        on = {name: tau for name, tau in (("I", pos), ("C", seq)) if tau is not None}
        words = f"{'+'.join(on)} {', '.join(f'{tau:g}' for tau in on.values())}"
        taus = {"tau_pos": OFF if pos is None else pos, "tau_seq": OFF if seq is None else seq}
        chosen = by_name.method("cascade", lab.bundle, **taus, **(_RULE | {"budget": budget}))
        rows.append(Row(words, chosen))
    measured = measure(lab, rows, timed=0)
    pages = {"figure14.png": _picture_grid(lab, measured)}
    notes = ["I and C with their thresholds tau_pos and tau_seq."]
    return Result("figure14", "Figure 14: each relaxation alone, and both", {}, measured, notes, pages)


def figure_3(lab: Lab) -> Result:
    """Similarity of the target's features within rows of the picture."""
    images, features = _own_pictures(lab)
    rows = [traces.similarity_rows(own, _width(lab)) for own in features]
    pages = {"figure3.png": figures.draw_rows(images, rows)}
    content = {"pictures": [_likeness(*each) for each in zip(lab.texts, images, rows)]}
    return Result("figure3", "Figure 3: similarity of features within rows", content, pages=pages)


def figure_9(lab: Lab) -> Result:
    """Similarity of the target's features over the full sequence and within the last row; figure 10 is the same."""
    images, features = _own_pictures(lab)
    rows = [traces.similarity_rows(own, _width(lab)) for own in features]
    every = [traces.similarity(own) for own in features]
    pages = {"figure9.png": figures.draw_sequences(images, every, rows)}
    found = [_likeness(*each) for each in zip(lab.texts, images, rows)]
    for own, whole, last in zip(found, every, rows):
        own |= {"mean_cosine": float(_off_diagonal(whole[None]).mean())}
        own |= {"mean_cosine_last_row": float(_off_diagonal(last[-1:]).mean())}
    content = {"pictures": found}
    return Result("figure9", "Figure 9: similarity of features over the full sequence", content, pages=pages)


def figure_8(lab: Lab) -> Result:
    """How sure the target is of its tokens."""
    tokens, images = _token_by_token(lab)
    sampling, places = _sampling(lab), traces.places(lab.bundle)
    each = [confidence(lab.bundle, [text], own[None], sampling) for text, own in zip(lab.texts, tokens)]
    found = Confidence(*(np.concatenate([getattr(own, name) for own in each]) for name in ("entropy", "top1")))
    codes = lab.bundle.config.vq.codebook_size
    pages = {"figure8.png": figures.draw_confidence(found, images, places, codes)}
    quantiles = (0.05, 0.25, 0.5, 0.75, 0.95)
    content = {"codes": codes, "largest_entropy": float(np.log(codes)), "quantiles": quantiles}
    for name in ("entropy", "top1"):
        values = getattr(found, name)[:, places]
        own = {"mean": float(values.mean()), "quantiles": [float(x) for x in np.quantile(values, quantiles)]}
        content[name] = own | {"mean_by_row": [float(x) for x in values.mean(axis=(0, 2))]}
    return Result("figure8", "Figure 8: how sure the target is of its tokens", content, pages=pages)


WHAT = {
    "table1": table_1, "table2": table_2, "table3a": table_3a, "table3b": table_3b, "figure3": figure_3,
    "figure4": figure_4, "figure8": figure_8, "figure9": figure_9, "figure13": figure_13, "figure14": figure_14,
}  # fmt: skip
COUNTS = {"figure3": 2, "figure8": 16, "figure9": 1}  # pictures by default; of all others 64
WITH_DRAFTERS = ("table2", "table3a")
UNJUDGED = tuple(COUNTS)


def with_drafter(bundle: Bundle, other: Bundle) -> Bundle:
    """A model with the drafter of another.

    Raises:
      ValueError: if the other has none, or one for a target of other sizes.
    """
    if other.config.drafter is None:
        raise ValueError("a model that was given for its drafter has none")
    if other.config.target != bundle.config.target:
        raise ValueError("a model that was given for its drafter has another target")
    config = dataclasses.replace(bundle.config, drafter=other.config.drafter)
    params = bundle.params | {"drafter": other.params["drafter"]}
    return Bundle(config, params, bundle.read, bundle.neighbours, bundle.mesh, bundle.trees)


def label_of(row: Row) -> str:
    """The row's name in the run folder: the same for whatever draws the same pictures."""
    settings = row.method.settings
    name = row.method.name
    if name == "cascade":
        taus = ("off" if settings[tau] > 1 else f"{settings[tau]:g}" for tau in ("tau_pos", "tau_seq"))
        words = [name, *taus, f"{settings['budget']:g}", settings["ledger"]]
        name = "-".join([*words, "next"] if settings["mass"] == "next" else words)
    return f"{row.drafter.replace(RUN_MARK, '-')}-{name}" if row.drafter and name != "ar" else name


def measure(lab: Lab, rows: Sequence[Row], timed: int | None = None) -> list[dict[str, Any]]:
    """Draws and measures the rows, as `Result.rows`; every drafter's times are taken in turns with AR's.

    Args:
      timed: in place of the lab's.
    """
    found: dict[str, dict[str, Any]] = {}
    for drafter in dict.fromkeys(row.drafter for row in rows):
        bundle = lab.drafters.get(drafter, lab.bundle)
        own = {label_of(row): row.method for row in rows if row.drafter == drafter}
        measured = run.evaluate(
            bundle, {"ar": by_name.method("ar", bundle), **own}, lab.captions, lab.folder / RUN, seed=lab.seed,
            batch=lab.batch, timed=lab.timed if timed is None else timed, sampling=lab.sampling, referee=lab.referee,
            clip=lab.clip, fid=lab.fid, progress=lab.progress,
        )  # fmt: skip
        found = measured | found
    return [
        {
            "title": row.title,
            "group": row.group or row.title,
            "label": label_of(row),
            "drafter": row.drafter,
            "figures": found[label_of(row)],
            "paper": None if row.paper is None else row.paper._asdict(),
        }
        for row in rows
    ]


def over_runs(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measured rows, those of a group as one: `figures` are means over the runs, with their standard deviations as
    `spread`, of `runs` runs."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    merged = []
    for group, each in groups.items():
        figures = dict(each[0]["figures"])
        if len(each) > 1:
            runs = [row["figures"] for row in each]
            keys = [key for key, value in figures.items() if isinstance(value, float) and None not in
                    [run[key] for run in runs]]  # fmt: skip
            figures |= {key: float(np.mean([run[key] for run in runs])) for key in keys}
            figures["spread"] = {key: float(np.std([run[key] for run in runs], ddof=1)) for key in keys}
            figures["intervals"] = {}
        merged.append({**each[0], "title": group, "figures": figures, "runs": len(each)})
    return merged


def orders(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences that hold the order of the rows against the paper's, from the least to the most, by speed and alpha."""
    known = [row for row in rows if row["paper"] is not None]
    sentences = []
    for title, key, other in (
        ("speedup", "speedup", "speedup"),
        ("fewer target steps", "step_speedup", "speedup"),
        ("alpha", "alpha", "alpha"),
    ):
        if len(known) < 2 or any(row["figures"][key] is None for row in known):
            continue
        here = _ranking([(row["title"], row["figures"][key]) for row in known])
        there = _ranking([(row["title"], row["paper"][other]) for row in known])
        sentences.append(f"By {title}, here: {here}. The paper's order by {other}: {there}.")
    return sentences


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
    count, timed, device = len(lab.captions), "", compare.machine()["device"]
    if any(row["figures"]["speedup"] is not None for row in result.rows):
        timed = f" Times are medians over {min(lab.timed, count)} of them at batch 1, the methods in turns."
    lines.append(f"Measured on {device}: {count} pictures{' a row' if result.rows else ''}, seed {lab.seed}.{timed}")
    return "\n".join(lines) + "\n"


def _markdown_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    head, *body = compare.rows({"methods": {row["title"]: row["figures"] for row in rows}})
    known = [row["paper"] or {} for row in rows]
    for key, form in (("speedup", "{:.1f}x"), ("alpha", "{:.1f}"), ("fid", "{:.1f}"), ("clip", "{:.2f}")):
        if any(own.get(key) is not None for own in known):
            head.append(f"paper: {key if key in ('speedup', 'alpha') else key.upper()}")
            for cells, own in zip(body, known):
                cells.append("–" if own.get(key) is None else form.format(own[key]))
    return compare.markdown_table(head, body)


def write(lab: Lab, result: Result, command: str) -> list[str]:
    """Writes a result's Markdown, JSON and pictures, all or none; returns the names of the files."""
    with files.published(lab.folder) as temporary:
        sampling = {name: None if x is None else float(x) for name, x in vars(_sampling(lab)).items()}
        about = {"what": result.name, "title": result.title, "command": command, "machine": compare.machine()}
        about |= {"count": len(lab.captions), "seed": lab.seed, "sampling": sampling}
        content = {**about, **result.content, "rows": list(result.rows), "notes": list(result.notes)}
        stored = json.dumps(content, indent=2, ensure_ascii=False)
        (temporary / f"{result.name}.json").write_text(stored + "\n", encoding="utf-8")
        (temporary / f"{result.name}.md").write_text(markdown(lab, result, command), encoding="utf-8")
        for name, page in result.pages.items():
            if hasattr(page, "savefig"):
                page.savefig(temporary / name, dpi=130)
            else:
                page.save(temporary / name)
        return sorted(path.name for path in temporary.iterdir())


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


def _method(lab: Lab, name: str) -> Method:
    """A method with the model's own settings under the lab's thresholds."""
    return by_name.method(name, lab.bundle, **(lab.thresholds if name == "cascade" else {}))


def _published(lab: Lab) -> dict[str, float]:
    """The paper's thresholds for the model that this one is held against."""
    pos, seq = paper.THRESHOLDS[lab.model or paper.LLAMAGEN]
    return {"tau_pos": pos, "tau_seq": seq}


def _need_drafters(lab: Lab, example: str) -> None:
    if not lab.drafters:
        raise ValueError(f"this table compares drafters: give others with --drafters, {example}")


def _sampling(lab: Lab) -> Sampling:
    return (default_sampling(lab.bundle.config) if lab.sampling is None else lab.sampling).checked()


def _picture_grid(lab: Lab, rows: Sequence[dict[str, Any]]):
    """The first pictures of measured rows, side by side."""
    count = min(compare.GRID_ROWS, len(lab.captions))
    columns = [
        (row["title"], "token by token" if row["label"] == "ar" else f"alpha {row['figures']['alpha']:.2f}")
        for row in rows
    ]
    place = lab.folder / RUN
    shown = [[pictures.read(place / row["label"] / f"{i:06d}.png") for row in rows] for i in range(count)]
    return grid(shown, lab.texts[:count], columns)


def _token_by_token(lab: Lab) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int [B, L] and pictures uint8 [B, H, W, 3] that the target draws on its own."""
    progress = None
    if lab.progress is not None:
        progress = lambda done, total: lab.progress("drawing", done, total)
    ar = by_name.method("ar", lab.bundle)
    drawn = by_name.draw_all(lab.bundle, ar, lab.texts, lab.seed, _sampling(lab), progress, lab.batch)
    whole = jax.tree.map(lambda *parts: np.concatenate(parts), *(batch for _, batch in drawn))
    return whole.tokens, whole.images


def _own_pictures(lab: Lab) -> tuple[np.ndarray, list[np.ndarray]]:
    """Pictures that the target draws on its own, and its features [H W, h] at the codes of each, one at a time."""
    tokens, images = _token_by_token(lab)
    places = traces.places(lab.bundle).ravel()
    features = []
    for text, own in zip(lab.texts, tokens):
        scored = pipeline.score(lab.bundle, [text], own[None])
        features.append(np.asarray(scored.features[0].astype(np.float32))[places])
    return images, features


def _width(lab: Lab) -> int:
    return traces.places(lab.bundle).shape[1]


def _likeness(text: str, image: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    """How far the similarity of features within rows [H, W, W] goes with that of the colours that were drawn there."""
    height, width, _ = rows.shape
    side = image.shape[0] // height
    patches = image[: height * side, : width * side].reshape(height, side, width, side, 3)
    colours = patches.mean(axis=(1, 3))
    distance = np.linalg.norm(colours[:, :, None] - colours[:, None], axis=-1)
    cosine, apart = _off_diagonal(rows), _off_diagonal(distance)
    return {
        "prompt": text,
        "mean_cosine_within_rows": float(cosine.mean()),
        "mean_cosine_of_neighbours": float(rows[:, np.arange(width - 1), np.arange(1, width)].mean()),
        "correlation_with_colour_distance": float(np.corrcoef(cosine, apart)[0, 1]) if apart.std() > 0 else None,
    }


def _off_diagonal(matrices: np.ndarray) -> np.ndarray:
    """What stands above the diagonals of [M, n, n], flat."""
    return matrices[:, *np.triu_indices(matrices.shape[-1], 1)].ravel()


def _ranking(values: Sequence[tuple[str, float]]) -> str:
    """Names from the least value to the most, equal ones joined by "="."""
    text, last = "", None
    for name, value in sorted(values, key=lambda pair: pair[1]):
        text += name if last is None else f" {'=' if value == last else '<'} {name}"
        last = value
    return text
