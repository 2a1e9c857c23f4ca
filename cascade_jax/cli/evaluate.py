"""Commands that hold methods against each other: compare, eval."""

import dataclasses
import pathlib
from types import SimpleNamespace
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, arg

from cascade_jax import methods as by_name
from cascade_jax.cli import console, flags
from cascade_jax.cli.command import Command


@dataclasses.dataclass(frozen=True)
class Compare(Command):
    """The methods take turns on the same prompts."""

    methods: flags.commas(metavar="METHOD,...") = by_name.compared()
    """methods, also with settings and a name: loose=cascade:tau_pos=0.7,budget=0.9; ar is always among them"""
    prompts: Annotated[pathlib.Path | None, flags.hint("FILE", "(default: random scenes)")] = None
    """a text file with a prompt a line"""
    count: Annotated[int | None, flags.hint("N", "(default: all of the file's, or 8)")] = None
    """prompts, each of which is drawn and timed alone; a file that has fewer is gone through again"""
    quality: Annotated[int | None, flags.hint("N", "(default: count)")] = None
    """pictures a method to judge quality on; those beyond the timed ones are drawn in batches"""
    seed: flags.Seed = 0
    """of the captions and the pictures"""
    out: flags.Out = pathlib.Path("comparison")
    """receives report.json, report.md and grid.png"""
    model: OmitArgPrefixes[flags.Model] = flags.Model()
    settings: Annotated[OmitArgPrefixes[flags.Settings], arg(name="method")] = flags.Settings()
    sampling: OmitArgPrefixes[flags.Draws] = flags.Draws()
    metrics: OmitArgPrefixes[flags.Metrics] = flags.Metrics()

    def check(self):
        flags.at_least(1, count=self.count, quality=self.quality)
        flags.check_seed(self.seed)
        wanted = parse_methods(self.methods)
        wanted = {by_name.AR: wanted.pop(by_name.AR, (by_name.AR, {})), **wanted}
        self.metrics.check()
        self.model.check()
        from cascade_jax import files
        from cascade_jax.text import captions

        files.check_folder(self.out)
        return wanted, None if self.prompts is None else captions.read(self.prompts)

    def owns(self) -> pathlib.Path:
        return self.out

    def load(self, checked):
        wanted, given = checked
        bundle = self.model.load()
        count = self.count or (8 if given is None else len(given))
        prompts = flags.texts(bundle, given, self.prompts, max(count, self.quality or 0), self.seed)
        settings, sampling = self.sampling.of(bundle)
        chosen = self.settings.methods(bundle, wanted)
        return SimpleNamespace(
            bundle=bundle, methods=chosen, prompts=prompts, count=count, settings=settings, sampling=sampling
        )

    def run(self, loaded, line) -> None:
        from cascade_jax.evaluation import compare, tables

        about = {"model": self.model.name, "tree": self.settings.tree, "sampling": loaded.settings, "command": line}
        with console.bad_input(), console.bar("") as progress:
            say = lambda what, done, total: progress(done, total, what)
            report = compare.compare(
                loaded.bundle, loaded.methods, loaded.prompts, self.out, timed=loaded.count, sampling=loaded.sampling,
                seed=self.seed, gauges=self.metrics.opened(loaded.bundle, None, say), progress=say, about=about,
            )  # fmt: skip
        console.show(tables.terminal(report))
        for text in report["cautions"]:
            console.say(text)
        print(f"written to {self.out}: report.json, report.md, grid.png")

    def kept(self) -> str:
        return f"{self.out} keeps every finished picture; the same command goes on there"


@dataclasses.dataclass(frozen=True)
class Eval(Command):
    """Any number of processes share the run folder; a picture that is there is not drawn again."""

    methods: flags.commas(metavar="METHOD,...") = by_name.compared()
    """methods, also with settings and a name: ar,loose=cascade:tau_pos=0.7,budget=0.9"""
    prompts: Annotated[pathlib.Path | None, flags.hint("FILE", "(default: random scenes)")] = None
    """MS-COCO's .json, PartiPrompts' .tsv, .jsonl with a text a line, or a text file with a prompt a line"""
    count: Annotated[int | None, flags.hint("N", "(default: all of the file's, or 64)")] = None
    """prompts, from the first on"""
    timed: flags.Count = 4
    """prompts that are drawn one at a time as well, the methods in turns, to measure times"""
    batch: flags.Count = 16
    """pictures drawn at once"""
    traces: flags.Count = 0
    """prompts, from the first on, whose pictures get a page each that shows their steps; the report links there"""
    seed: flags.Seed = 0
    """of random scenes and pictures: picture i depends on its prompt, i and this alone"""
    out: flags.Out = pathlib.Path("evaluation")
    """the run folder: pictures and records of every method, report.json, report.md, report.html"""
    model: OmitArgPrefixes[flags.Spread] = flags.Spread()
    sampling: OmitArgPrefixes[flags.Draws] = flags.Draws()
    metrics: OmitArgPrefixes[flags.Metrics] = flags.Metrics()
    processes: OmitArgPrefixes[flags.Waiting] = flags.Waiting()

    def check(self):
        flags.at_least(1, count=self.count, batch=self.batch)
        flags.at_least(0, timed=self.timed, traces=self.traces)
        if self.traces and self.model.mesh:
            raise ValueError("traces are made on one device: leave out --traces or --mesh")
        flags.check_seed(self.seed)
        self.processes.check()
        self.metrics.check()
        wanted = parse_methods(self.methods)
        self.model.check()
        from cascade_jax import files
        from cascade_jax.text import captions

        files.check_folder(self.out)
        return wanted, None if self.prompts is None else captions.read(self.prompts, self.count)

    def owns(self) -> pathlib.Path | None:
        return self.processes.owned(self.out)

    def load(self, checked):
        wanted, given = checked
        place = self.processes.join()
        bundle = self.model.load(batch=self.batch)
        captions = flags.captions(bundle, given, self.prompts, self.count or 64, self.seed)
        settings, sampling = self.sampling.of(bundle)
        chosen = {label: flags.drawable(bundle, name, own) for label, (name, own) in wanted.items()}
        return SimpleNamespace(
            bundle=bundle, methods=chosen, captions=captions, settings=settings, sampling=sampling, place=place
        )

    def run(self, loaded, line) -> None:
        from cascade_jax.evaluation import figures, report, run, tables

        captions = loaded.captions
        with console.CompileClock() as compiling, console.bar("") as progress, console.bad_input():
            measured, careful = self._measure(loaded, lambda what, done, total: progress(done, total, what))
            if measured is None:
                return
            self._trace(loaded, line, lambda what, done, total: progress(done, total, what))
        texts = [caption.text for caption in captions]
        found = report.build(
            figures.summarise(measured), texts, timed=min(self.timed, len(texts)), model=self.model.name, tree=None,
            seed=self.seed, sampling=loaded.settings, command=line, weights=run.weights_of(loaded.bundle),
            cautions=careful,
        )  # fmt: skip
        found |= {"compile_seconds": compiling.seconds, "categories": figures.by_category(measured, captions)}
        report.write(self.out, found, measured, captions)
        console.show(tables.terminal(found))
        for text in careful:
            console.say(text)
        print(f"written to {self.out}: report.json, report.md, report.html, and pictures and records of every method")

    def _measure(self, loaded, say) -> tuple[dict | None, list[str]]:
        """Draws this process's pictures; the first one's measures of all, and what to be careful about."""
        from cascade_jax.evaluation import jobs, run
        from cascade_jax.evaluation.metrics.metric import cautions

        own, processes = loaded.place
        gauges = [] if own else self.metrics.opened(loaded.bundle, self.out, say)
        drawn = run.draw(
            loaded.bundle, loaded.methods, loaded.captions, self.out, seed=self.seed, batch=self.batch,
            timed=self.timed, sampling=loaded.sampling, part=loaded.place, progress=say,
        )  # fmt: skip
        print(f"process {own} of {processes}: {drawn} pictures drawn")
        if own:
            return None, []
        with cautions() as careful:
            for label in loaded.methods:
                jobs.wait(self.out / label, len(loaded.captions), self.processes.patience, console.say)
            measured = run.measure(
                loaded.methods, loaded.captions, self.out, timed=self.timed, gauges=gauges, progress=say
            )
        return measured, careful

    def _trace(self, loaded, line: str, say) -> None:
        """Writes the pages of single pictures that are not there."""
        from cascade_jax import pictures
        from cascade_jax.evaluation import report
        from cascade_jax.paper.viewer import document

        plain = next((label for label, method in loaded.methods.items() if not method.tree.depth), None)
        for number, caption in enumerate(loaded.captions[: self.traces]):
            for label, method in loaded.methods.items():
                path = self.out / report.TRACES / report.trace_of(number, label)
                if path.exists():
                    continue
                about = document.About(
                    caption.text, method, self.model.name, self.seed, number, sampling=loaded.settings, command=line
                )
                beside = method.tree.depth > 0
                if beside and plain is not None:
                    beside = pictures.read(self.out / plain / f"{number:06d}.png")
                document.drawn(loaded.bundle, about, path, None, loaded.sampling, beside, say)

    def kept(self) -> str:
        return f"{self.out} keeps every finished picture; the same command goes on there"


def parse_methods(parts: tuple[str, ...]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Names and settings of methods by label, of parts such as "cascade" or "loose=cascade:tau_pos=0.7", "budget=0.9".

    Raises:
      ValueError: if a name or setting is unknown, two methods have the same label, or a value makes no sense.
    """
    wanted: dict[str, tuple[str, dict[str, Any]]] = {}
    last, known = None, {setting.name: setting for setting in by_name.settings_of()}
    for part in parts:
        setting, equals, value = part.partition("=")
        if not (equals and last and (setting == "tree" or setting in known)):
            head, colon, first = part.partition(":")
            label, _, name = head.rpartition("=")
            last = label or name
            by_name.check_name(name)
            if last in wanted:
                raise ValueError(f"two methods are called {last}: give one another name, as in other={part}")
            wanted[last] = name, {}
            if not colon:
                continue
            setting, equals, value = first.partition("=")
        if not (setting and equals and value):
            raise ValueError(f"settings are NAME=VALUE, not {part!r}")
        wanted[last][1][setting] = _value(known.get(setting), setting, value)
    if not wanted:
        raise ValueError("there are no methods")
    return wanted


def _value(setting: by_name.Setting | None, name: str, text: str) -> Any:
    """A setting's value from text; what no method takes stays text, and is refused where the method is made."""
    try:
        return text if setting is None else setting.kind(text)
    except ValueError:
        raise ValueError(f"{name} takes a number, not {text!r}") from None
