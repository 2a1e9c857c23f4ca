"""Commands for the embedded model: scenes sweep, scenes train, scenes pack."""

import dataclasses
import importlib.util
import pathlib
from types import SimpleNamespace
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from cascade_jax import methods
from cascade_jax.cli import console, flags
from cascade_jax.cli.command import Command


@dataclasses.dataclass(frozen=True)
class Sweep(Command):
    """A point of the grid is drawn once; the command goes on where it stopped."""

    trees: flags.commas(metavar="TREE,...") = ("eagle25",)
    """draft trees"""
    tau_pos: flags.commas(float, "X,...") = (0.6, 0.75, 0.85, 0.95)
    """thresholds between siblings"""
    tau_seq: flags.commas(float, "X,...") = (0.5, 0.7, 0.9)
    """thresholds between a token and its children"""
    budget: flags.commas(float, "X,...") = (0.1, 0.25, 0.5)
    """budgets"""
    ledger: flags.commas(metavar="nominal,coupled") = ("nominal", "coupled")
    """ledgers"""
    mass: flags.commas(metavar="current,next") = ("current",)
    """where the mass of children is read"""
    references: flags.commas() = tuple(name for name in methods.compared() if name != methods.CASCADE)
    """methods to hold the cascades against"""
    count: flags.Count = 64
    """pictures a point"""
    timed: flags.Count = 3
    """pictures to time each program's steps with, at batch 1; 0 counts steps alone"""
    seed: flags.Seed = 0
    """of the captions and the pictures"""
    out: flags.Out = pathlib.Path("sweep")
    """receives sweep.json, sweep.md, sweep.png, and points.jsonl as they are finished; goes on where it stopped"""
    model: OmitArgPrefixes[flags.Model] = flags.Model()
    sampling: OmitArgPrefixes[flags.Draws] = flags.Draws()
    metrics: OmitArgPrefixes[flags.Metrics] = flags.Metrics()

    def check(self):
        flags.at_least(1, count=self.count)
        flags.at_least(0, timed=self.timed)
        flags.check_seed(self.seed)
        self.metrics.check()
        self.model.check()
        from cascade_jax import files

        files.check_folder(self.out)
        return flags.names([methods.AR, *(name for name in self.references if name != methods.CASCADE)])

    def owns(self) -> pathlib.Path:
        return self.out

    def load(self, references):
        from cascade_jax.evaluation import sweep

        bundle = self.model.load()
        points = sweep.grid(
            bundle, trees=self.trees, tau_pos=self.tau_pos, tau_seq=self.tau_seq, budgets=self.budget,
            ledgers=self.ledger, masses=self.mass,
        )  # fmt: skip
        flags.drawable(bundle, methods.CASCADE, {})
        return SimpleNamespace(
            bundle=bundle, points=points, prompts=flags.texts(bundle, None, None, self.count, self.seed),
            references=[flags.drawable(bundle, name, {}) for name in references],
            gauges=self.metrics.opened(bundle), sampling=self.sampling.of(bundle)[1],
        )  # fmt: skip

    def run(self, loaded, line) -> None:
        from cascade_jax.evaluation import sweep

        progress = lambda point, done, total: console.step(f"{done}/{total}  {sweep.words(point)}")
        with console.bad_input():
            result = sweep.sweep(
                loaded.bundle, loaded.points, loaded.references, loaded.prompts, gauges=loaded.gauges, seed=self.seed,
                timed=self.timed, sampling=loaded.sampling, memory=self.out / "points.jsonl", progress=progress,
            )  # fmt: skip
        sweep.write(self.out, result, line)
        print(sweep.markdown(result, line))
        if result["chosen"]:
            print(sweep.config_line(result["chosen"]))

    def kept(self) -> str:
        return f"{self.out} keeps every finished point; the same command goes on there"


@dataclasses.dataclass(frozen=True)
class Train(Command):
    """A run that stopped goes on from its last checkpoint."""

    part: Annotated[Positional[str], arg(metavar="tokenizer|target|drafter|judge")]
    """which part"""
    edition: Annotated[str, arg(metavar="scenes|scenes-small")] = "scenes"
    """target: which of the embedded models' sizes"""
    out: flags.Out = pathlib.Path("runs")
    """the folder of all runs, each in a folder of the part's name; a run that stopped goes on"""
    steps: Annotated[int | None, flags.hint("N", "(default: the recipe's)")] = None
    """training steps"""
    batch: Annotated[int | None, flags.hint("N", "(default: the recipe's)")] = None
    """pictures in a step"""
    seed: flags.Seed = 0
    """of everything random"""
    sequences: flags.Count = 1024
    """drafter: pictures that the target draws for it to learn from"""

    def check(self):
        if self.part not in _PARTS:
            raise ValueError(f"unknown part {self.part!r}; known: {', '.join(_PARTS)}")
        flags.at_least(1, steps=self.steps, batch=self.batch, sequences=self.sequences)
        flags.check_seed(self.seed)
        from cascade_jax import files, pipeline

        flags.one_of("edition", self.edition, tuple(pipeline.EMBEDDED))
        files.check_folder(self.out / self.part)
        if importlib.util.find_spec("skimage") is None:
            raise ValueError("training renders scenes, which needs scikit-image: pip install 'cascade_jax[scenes]'")

    def run(self, loaded, line) -> None:
        given = {"seed": self.seed, "steps": self.steps, "batch": self.batch}
        settings = {name: value for name, value in given.items() if value is not None}
        with console.bad_input():  # a run with other settings, or a part that must be trained first
            _PARTS[self.part](self.out, settings, self)
        print(f"trained: {self.out / self.part}")

    def kept(self) -> str:
        return f"the same command goes on in {self.out / self.part}"


@dataclasses.dataclass(frozen=True)
class Pack(Command):
    """The judge is packed beside the model."""

    runs: Positional[flags.Out] = pathlib.Path("runs")
    """the folder of all runs"""
    out: flags.Out = pathlib.Path("scenes")
    """receives the model; the judge is put beside it"""
    int8: bool = False
    """half the size: matrices in eight bits a number, with a scale for every column"""

    def check(self):
        from cascade_jax import files

        if not self.runs.is_dir():
            raise ValueError(f"there is no folder {self.runs}: train the parts first (cascade-jax scenes train)")
        files.check_folder(self.out)

    def owns(self) -> pathlib.Path:
        return self.out

    def run(self, loaded, line) -> None:
        from cascade_jax.recipes import pack

        with console.bad_input():
            pack.pack(self.runs, self.out, dtype="int8" if self.int8 else "bfloat16")
        print(f"packed: {self.out}")


def _tokenizer(runs: pathlib.Path, settings: dict[str, Any], command: Train) -> None:
    from cascade_jax.recipes import tokenizer

    tokenizer.train_tokenizer(runs / "tokenizer", **settings)


def _target(runs: pathlib.Path, settings: dict[str, Any], command: Train) -> None:
    from cascade_jax.recipes import target, tokenizer

    edition = target.EDITIONS[command.edition]
    target.train_target(runs / "target", tokenizer.load_tokenizer(runs / "tokenizer"), edition, **settings)


def _drafter(runs: pathlib.Path, settings: dict[str, Any], command: Train) -> None:
    from cascade_jax.bundle import default_sampling
    from cascade_jax.recipes import drafter, pack

    bundle = pack.from_runs(runs, drafter=False)
    rows = drafter.distill(
        bundle, runs / "distilled", count=command.sequences, batch=32, seed=command.seed,
        sampling=default_sampling(bundle.config), say=console.step,
    )  # fmt: skip
    drafter.train_drafter(runs / "drafter", bundle, rows, **settings)


def _judge(runs: pathlib.Path, settings: dict[str, Any], command: Train) -> None:
    from cascade_jax.evaluation.networks import judge as quality
    from cascade_jax.recipes import judge, tokenizer

    judge.train_judge(runs / "judge", tokenizer=tokenizer.load_tokenizer(runs / "tokenizer"), **settings)
    quality.write_reference(runs / "judge")


_PARTS = {"tokenizer": _tokenizer, "target": _target, "drafter": _drafter, "judge": _judge}
