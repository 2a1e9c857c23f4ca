"""The command that evaluates methods on captions: eval."""

import contextlib
import dataclasses
import pathlib
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, arg

from cascade_jax.cli import console
from cascade_jax.cli.scale import (
    Processes,
    at_least_one,
    check_seed,
    chosen_method,
    parse_settings,
    sampling_of,
    sampling_settings,
)
from cascade_jax.evaluation import metrics

_METHODS = ("ar", "eagle", "lantern", "lantern++", "gsd", "cascade")
_ALONE = Processes()


class _Given:
    """What pictures are measured with; a field for every flag that a metric names."""

    def check(self) -> None:
        """Raises a ValueError unless the flags fit together."""
        metrics.check(vars(self))

    def opened(self, bundle, folder: pathlib.Path | None = None, progress=None) -> list[metrics.Gauge]:
        """The gauges that were asked for and that suit the model; says on stderr what stays unknown.

        Args:
          folder: where statistics of a reference are kept; None for nowhere.
          progress: called with (what is being done, done so far, how much there is).

        Raises:
          ValueError: if what a flag names is unusable.
        """
        return metrics.opened(metrics.Order(bundle, vars(self), folder, progress, console.say))


Metrics = dataclasses.make_dataclass(
    "Metrics",
    [
        (
            flag.name,
            Annotated[flag.kind | None, arg(metavar=flag.metavar, help=flag.help, help_behavior_hint=flag.hint)],
            None,
        )
        for flag in metrics.flags()
    ],
    bases=(_Given,),
    frozen=True,
)
USUAL = Metrics()


@dataclasses.dataclass(frozen=True)
class Eval:
    """Draw captions by several methods and measure speed and quality; started again, it goes on where it stopped."""

    model: Annotated[str, arg(metavar="MODEL")] = "scenes"
    """scenes, or the folder of a converted model"""
    methods: Annotated[tuple[str, ...], arg(metavar="METHOD...")] = _METHODS
    """methods, also with settings and a name: loose=cascade:tau_pos=0.7,budget=0.9"""
    captions: Annotated[pathlib.Path | None, arg(metavar="FILE", help_behavior_hint="(default: random scenes)")] = None
    """MS-COCO's .json, PartiPrompts' .tsv, .jsonl with a text a line, or a text file with a caption a line"""
    count: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all of the file's, or 64)")] = None
    """captions, from the first on"""
    timed: Annotated[int, arg(metavar="N")] = 4
    """captions that are drawn one at a time as well, the methods in turns, to measure times"""
    batch: Annotated[int, arg(metavar="N")] = 16
    """pictures drawn at once"""
    seed: Annotated[int, arg(metavar="N")] = 0
    """of random scenes and pictures: picture i depends on its caption, i and this alone"""
    sampling: Annotated[tuple[str, ...], arg(metavar="NAME=VALUE...", help_behavior_hint="(default: the model's)")] = ()
    """temperature, top_k, top_p, guidance"""
    out: Annotated[pathlib.Path, arg(metavar="DIR")] = pathlib.Path("evaluation")
    """the run folder: pictures and records of every method, report.json, report.md, report.html"""
    metrics: OmitArgPrefixes[Metrics] = USUAL
    mesh: Annotated[str | None, arg(metavar="data=D,model=M", help_behavior_hint="(default: one device)")] = None
    """divide a process's pictures over D and the model over M of its devices"""
    shared: OmitArgPrefixes[Processes] = _ALONE

    def run(self, command: str) -> None:
        with console.bad_input():
            self._check()
            from cascade_jax import files, pipeline
            from cascade_jax import mesh as meshes
            from cascade_jax import methods as by_name
            from cascade_jax.text import captions

            wanted = parse_methods(self.methods)
            for name, _ in wanted.values():
                by_name.check_name(name)
            settings = parse_settings(self.sampling)
            sizes = self.mesh and meshes.parse(self.mesh)
            files.check_folder(self.out)
            pipeline.folder(self.model)
            given = None if self.captions is None else captions.read(self.captions, self.count)
        with console.bad_input():
            own, processes = self.shared.join()
        console.set_up()
        with console.bad_input():
            mesh = {"mesh": meshes.make(**sizes), "batch": self.batch} if sizes else {}
            bundle = pipeline.load(self.model, **mesh)
            if given is None:
                if bundle.config.text != "scenes":
                    raise ValueError("this model has no captions of its own: give --captions FILE")
                given = captions.read("scenes", self.count or 64, self.seed)
            captions.check(bundle, given, self.captions)
            settings = sampling_settings(bundle, settings)
            sampling = sampling_of(settings)
            chosen = {label: _method(bundle, name, own_settings) for label, (name, own_settings) in wanted.items()}
        # of processes that share a folder the first owns it
        with console.bad_input(), contextlib.nullcontext() if own else files.owned(self.out):
            self._evaluate(bundle, chosen, given, own, processes, settings, sampling, command)

    def _evaluate(self, bundle, chosen, given, own, processes, settings, sampling, command) -> None:
        from cascade_jax.evaluation import figures, jobs, report, run, tables
        from cascade_jax.evaluation.metrics.metric import cautions

        texts = [caption.text for caption in given]
        with console.CompileClock() as compiling, console.bar("") as progress:
            say = lambda what, done, total: progress(done, total, what)
            gauges = [] if own else self.metrics.opened(bundle, self.out, say)
            drawn = run.draw(
                bundle, chosen, given, self.out, seed=self.seed, batch=self.batch, timed=self.timed, sampling=sampling,
                part=(own, processes), progress=say,
            )  # fmt: skip
            print(f"process {own} of {processes}: {drawn} pictures drawn")
            if own:
                return
            with cautions() as careful:
                for label in chosen:
                    jobs.wait(self.out / label, len(texts), self.shared.patience, console.say)
                measured = run.measure(chosen, given, self.out, timed=self.timed, gauges=gauges, progress=say)
        found = report.build(
            figures.summarise(measured), texts, timed=min(self.timed, len(texts)), model=self.model, tree=None,
            seed=self.seed, sampling=settings, command=command, cautions=careful,
        )  # fmt: skip
        found |= {"compile_seconds": compiling.seconds, "categories": figures.by_category(measured, given)}
        report.write(self.out, found, measured, given)
        console.show(tables.terminal(found))
        for text in careful:
            console.say(text)
        print(f"written to {self.out}: report.json, report.md, report.html, and pictures and records of every method")

    def _check(self) -> None:
        for name in ("count", "batch"):
            at_least_one(name, getattr(self, name))
        if self.timed < 0:
            raise ValueError(f"timed must be at least 0, not {self.timed}")
        check_seed(self.seed)
        self.shared.check()
        self.metrics.check()


def parse_methods(texts: tuple[str, ...]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Names and settings of methods by label, of texts such as "cascade" or "loose=cascade:tau_pos=0.7,budget=0.9".

    Raises:
      ValueError: if two have the same label, or settings are not NAME=VALUE.
    """
    wanted: dict[str, tuple[str, dict[str, Any]]] = {}
    for text in texts:
        head, _, settings = text.partition(":")
        label, _, name = head.rpartition("=")
        label = label or name
        if label in wanted:
            raise ValueError(f"two methods are called {label}: give one another name, as in other={text}")
        wanted[label] = name, parse_settings(tuple(settings.split(",")) if settings else ())
    if not wanted:
        raise ValueError("there are no methods")
    return wanted


def _method(bundle, name: str, settings: dict[str, Any]):
    settings = dict(settings)
    tree = settings.pop("tree", None)
    return chosen_method(bundle, name, None if tree is None else str(tree), settings)
