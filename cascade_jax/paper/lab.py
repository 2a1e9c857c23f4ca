"""What the paper's tables and figures are measured with, and how: rows of methods, drawn into one run folder.

    lab = Lab(bundle, captions, pathlib.Path("paper"))
    write(lab, table_1(lab), command)

Tables and figures share what they have in common (see `evaluation.run`), and whatever was stopped goes on where it was.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cascade_jax import methods as by_name
from cascade_jax.bundle import Bundle, default_sampling
from cascade_jax.evaluation import run
from cascade_jax.evaluation.metrics import Gauge
from cascade_jax.methods import AR, CASCADE, Method
from cascade_jax.paper import numbers as paper
from cascade_jax.paper.numbers import Numbers
from cascade_jax.sampling import Sampling
from cascade_jax.text.captions import Caption

RUN = "run"  # the run folder, in the folder of the results
RUN_MARK = "#"  # "ours#2" is the second drafter that was trained as "ours"
OFF = 2.0  # a threshold that no cosine reaches
RULE = {"ledger": "nominal", "mass": "current", "budget": paper.BUDGET}  # the paper's


@dataclasses.dataclass(frozen=True)
class Lab:
    """What tables and figures are measured with.

    Attributes:
      bundle: the model.
      captions: of the pictures.
      folder: receives the results.
      drafters: the same model with other drafters, by name; "NAME#1", "NAME#2" ... are trained alike.
      methods: what table 1 compares, by label; none for the paper's.
      thresholds: of cascade, in place of a table's own: "tau_pos", "tau_seq", "budget".
      parti: whether the captions are PartiPrompts, to hold against the paper's numbers for these.
      weights: digests of the parameters by name of the drafter, "" for the model's own, see `weighed`; "" alone is
        needed for what has no drafters.
      seed, batch, timed, sampling, gauges, progress: as of `run.evaluate`.
    """

    bundle: Bundle
    captions: Sequence[Caption]
    folder: pathlib.Path
    drafters: Mapping[str, Bundle] = dataclasses.field(default_factory=dict)
    methods: Mapping[str, Method] = dataclasses.field(default_factory=dict)
    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    parti: bool = False
    seed: int = 0
    batch: int = by_name.BATCH
    timed: int = 4
    sampling: Sampling | None = None
    gauges: Sequence[Gauge] = ()
    weights: Mapping[str, Mapping[str, str | None]] = dataclasses.field(default_factory=dict)
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

    @property
    def checked_sampling(self) -> Sampling:
        """The sampling settings that hold."""
        return (default_sampling(self.bundle.config) if self.sampling is None else self.sampling).checked()

    def method(self, name: str) -> Method:
        """A method with the model's own settings under the lab's thresholds."""
        return by_name.method(name, self.bundle, **(self.thresholds if name == CASCADE else {}))

    def published(self) -> dict[str, float]:
        """The paper's thresholds for the model that this one is held against."""
        pos, seq = paper.THRESHOLDS[self.model or paper.LLAMAGEN]
        return {"tau_pos": pos, "tau_seq": seq}


@dataclasses.dataclass(frozen=True)
class Row:
    """A method under a title, on a drafter ("" for the model's own), and the paper's numbers for it.

    Rows of one `group` differ in the run that their drafter is from, and in nothing else; "" is a group of its own.
    The `label` is the row's name in the run folder; "" for that of the method and its drafter, see `label_of`.
    """

    title: str
    method: Method
    drafter: str = ""
    paper: Numbers | None = None
    group: str = ""
    label: str = ""


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


def weighed(bundle: Bundle, drafters: Mapping[str, Bundle]) -> dict[str, dict[str, str | None]]:
    """Digests of a model's parameters with its own drafter ("") and with others, as `Lab.weights`; takes a while."""
    own = run.weights_of(bundle)
    return {"": own} | {
        name: own | {"drafter": run.digest(other.params["drafter"])} for name, other in drafters.items()
    }


def label_of(row: Row) -> str:
    """The row's name in the run folder: the same for whatever draws the same pictures."""
    if row.label:
        return row.label
    settings = row.method.settings
    name = row.method.name
    if name == CASCADE:
        taus = ("off" if settings[tau] > 1 else f"{settings[tau]:g}" for tau in ("tau_pos", "tau_seq"))
        words = [name, *taus, f"{settings['budget']:g}", settings["ledger"]]
        words += ["next"] * (settings["mass"] == "next")
        name = "-".join(
            [*words, f"window{settings['window']}x{settings['candidates']}"] if settings["window"] else words
        )
    return f"{row.drafter.replace(RUN_MARK, '-')}-{name}" if row.drafter and name != AR else name


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
            bundle, {AR: by_name.method(AR, bundle), **own}, lab.captions, lab.folder / RUN, seed=lab.seed,
            batch=lab.batch, timed=lab.timed if timed is None else timed, sampling=lab.sampling,
            weights=lab.weights.get(drafter), gauges=lab.gauges, progress=lab.progress,
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
