"""The command line: `cascade-jax`, also `python -m cascade_jax`.

Every command is a dataclass whose fields are its arguments. It checks all of them before it starts to work; what is
wrong is said in one line, with exit status 2. Whatever takes time to import is imported where it is used.
"""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import shlex
import sys
import time
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg, subcommand

from cascade_jax import interrupts
from cascade_jax.cli import console
from cascade_jax.cli import training as train_commands
from cascade_jax.cli.bundles import Convert, Info, Merge, Neighbours
from cascade_jax.cli.evaluation import USUAL, Eval, Metrics
from cascade_jax.cli.paper import Paper
from cascade_jax.cli.plan import Plan
from cascade_jax.cli.scale import (
    Dtype,
    Export,
    GenerateList,
    RunExported,
    TuneTree,
    check_dtype,
    sampling_of,
    sampling_settings,
)

_UNSET = "(default: the method's)"
_MODELS = "(default: the model's)"


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Settings of the methods; each takes its own, and what is not set is the method's default."""

    tree: Annotated[str | None, arg(metavar="TREE", help_behavior_hint=_UNSET)] = None
    """draft tree: eagle25, lanternpp57, eagle2, chain:DEPTH, full:WIDTHxDEPTH, or paths such as "0 1 00 01\""""
    tau_pos: Annotated[float | None, arg(metavar="X", help_behavior_hint=_UNSET)] = None
    """cascade: least cosine of interchangeable siblings; above 1 switches this relaxation off"""
    tau_seq: Annotated[float | None, arg(metavar="X", help_behavior_hint=_UNSET)] = None
    """cascade: least cosine of a token and its converging children; above 1 switches this relaxation off"""
    budget: Annotated[float | None, arg(metavar="X", help_behavior_hint=_UNSET)] = None
    """cascade: the most that a step may charge to its ledger"""
    ledger: Annotated[str | None, arg(metavar="nominal|coupled", help_behavior_hint=_UNSET)] = None
    """cascade: charge added mass, as the paper does, or the probability of parting from the strict decoder"""
    mass: Annotated[str | None, arg(metavar="current|next", help_behavior_hint=_UNSET)] = None
    """cascade: where the mass of converging children is read"""
    delta: Annotated[float | None, arg(metavar="X", help_behavior_hint=_UNSET)] = None
    """lantern: bound on the mass of a token's neighbours"""
    lam: Annotated[float | None, arg(metavar="X", help_behavior_hint=_UNSET)] = None
    """lantern++: bound on the mass of a token and its neighbours, in terms of the token's own"""
    neighbours: Annotated[int | None, arg(metavar="N", help_behavior_hint=_UNSET)] = None
    """lantern, lantern++: number of neighbours"""
    group: Annotated[int | None, arg(metavar="N", help_behavior_hint=_UNSET)] = None
    """gsd: codes in a group"""

    def given(self) -> dict[str, Any]:
        """What is set."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Draws:
    """How tokens are drawn; what is not set is the model's default."""

    temperature: Annotated[float | None, arg(metavar="X", help_behavior_hint=_MODELS)] = None
    """divides the logits; 0 takes the likeliest token"""
    top_k: Annotated[int | None, arg(metavar="N", help_behavior_hint=_MODELS)] = None
    """draw from the N likeliest tokens"""
    top_p: Annotated[float | None, arg(metavar="X", help_behavior_hint=_MODELS)] = None
    """draw from the likeliest tokens that make up this probability"""
    guidance: Annotated[float | None, arg(metavar="X", help_behavior_hint=_MODELS)] = None
    """classifier-free guidance scale; 1 draws without, at half the work"""

    def settings(self, bundle) -> dict[str, Any]:
        """The model's settings under these."""
        return sampling_settings(bundle, {name: value for name, value in vars(self).items() if value is not None})


Model = Annotated[str, arg(metavar="MODEL")]
Out = Annotated[pathlib.Path, arg(metavar="DIR")]
Seed = Annotated[int, arg(metavar="N")]
Count = Annotated[int, arg(metavar="N")]


@dataclasses.dataclass(frozen=True)
class Generate:
    """Draw pictures from prompts."""

    prompts: Annotated[Positional[tuple[str, ...]], arg(metavar="PROMPT...", help_behavior_hint="")] = ()
    """what to draw, a sentence in quotes each; scenes knows things like "a red ball on gravel\""""
    model: Model = "scenes"
    """scenes, or the folder of a converted model"""
    method: Annotated[str, arg(metavar="METHOD")] = "cascade"
    """ar, eagle, lantern, lantern++, gsd or cascade"""
    count: Count = 1
    """pictures for each prompt"""
    seed: Seed = 0
    """picture i of a run depends on its prompt, i and this alone"""
    out: Annotated[pathlib.Path | None, arg(metavar="PATH", help_behavior_hint="")] = None
    """a .png file for one picture, or a folder (default: PROMPT.png here for one, the folder pictures for several)"""
    json: bool = False
    """print statistics as JSON, and nothing else"""
    dtype: Dtype = None
    """of the weights"""
    mesh: Annotated[str | None, arg(metavar="data=D,model=M", help_behavior_hint="(default: one device)")] = None
    """divide prompts over D and the model over M devices"""
    thresholds: OmitArgPrefixes[Thresholds] = Thresholds()
    draws: OmitArgPrefixes[Draws] = Draws()

    def run(self, command: str) -> None:
        with console.bad_input():
            _at_least(1, count=self.count)
            _check_seed(self.seed)
            check_dtype(self.dtype)
            if not self.prompts:
                raise ValueError('there is no prompt: try cascade-jax generate "a red ball on gravel"')
            if not all(prompt.strip() for prompt in self.prompts):
                raise ValueError("a prompt is empty")
            from cascade_jax import mesh as meshes
            from cascade_jax import methods
            from cascade_jax.evaluation import files

            sizes = self.mesh and meshes.parse(self.mesh)
            methods.check_name(self.method)
            prompts = [prompt for prompt in self.prompts for _ in range(self.count)]
            paths = files.picture_paths(prompts, self.out)
        console.set_up()
        with console.bad_input():
            mesh = meshes.make(**sizes) if sizes else None
            bundle = _load(self.model, self.dtype, mesh=mesh, batch=min(len(prompts), methods.BATCH))
            encoded = bundle.encode(self.prompts)
            settings = self.draws.settings(bundle)
            sampling = sampling_of(settings)
            _note_neighbours(bundle, [self.method])
            method = methods.method(self.method, bundle, **self.thresholds.given())
            bundle.program(method.tree)

        encoded = [prompt for prompt in encoded for _ in range(self.count)]
        pictures, seconds = [], 0.0
        with console.CompileClock() as compiling, console.bar("drawing") as progress:
            begin, compiled = time.perf_counter(), 0.0
            for indices, drawn in methods.draw_all(bundle, method, encoded, self.seed, sampling, progress):
                spent = time.perf_counter() - begin - (compiling.seconds - compiled)
                seconds += spent
                for row, i in enumerate(indices):
                    note = {"Description": prompts[i], "Comment": f"{method.name}, seed {self.seed}, picture {i}"}
                    files.write_png(paths[i], drawn.images[row], **note)
                    figures = {name: getattr(drawn.stats, name)[row].item() for name in vars(drawn.stats)}
                    picture = {"prompt": prompts[i], "seed": self.seed, "number": i, "file": str(paths[i])}
                    pictures.append({**picture, **figures, "seconds": spent / len(indices)})
                begin, compiled = time.perf_counter(), compiling.seconds
        if self.json:
            report = {"model": self.model, "method": method.name, "tree": methods.tree_name(method.tree)}
            report |= {"settings": method.settings, "sampling": settings}
            report |= {"seconds": seconds, "compile_seconds": compiling.seconds, "pictures": pictures}
            print(json.dumps(report, indent=2, ensure_ascii=False))
            return
        for p in pictures:
            print(f"{p['file']}  {p['steps']} steps, alpha {p['alpha']:.2f}, {p['seconds']:.2f} s")
        if compiling.fresh > 1:
            console.say(
                f"compiling took {compiling.seconds:.0f} s; the next run finds the programs in {console.cache_folder()}"
            )


@dataclasses.dataclass(frozen=True)
class Compare:
    """Draw the same prompts with several methods: table, report and a grid of pictures."""

    model: Model = "scenes"
    """scenes, or the folder of a converted model"""
    methods: Annotated[str, arg(metavar="A,B,C")] = "ar,eagle,lantern,lantern++,gsd,cascade"
    """methods; ar is always among them"""
    prompts: Annotated[pathlib.Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """a text file with a prompt a line (default: captions of random scenes, for scenes)"""
    count: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all of the file's, or 8)")] = None
    """prompts, each of which is drawn and timed alone; a file that has fewer is gone through again"""
    quality: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: count)")] = None
    """pictures a method to judge quality on; those beyond the timed ones are drawn in batches"""
    seed: Seed = 0
    """of the captions and the pictures"""
    out: Out = pathlib.Path("comparison")
    """receives report.json, report.md and grid.png"""
    metrics: OmitArgPrefixes[Metrics] = USUAL
    thresholds: OmitArgPrefixes[Thresholds] = Thresholds()
    draws: OmitArgPrefixes[Draws] = Draws()

    def run(self, command: str) -> None:
        with console.bad_input():
            _at_least(1, **{"count": self.count, "quality": self.quality})
            _check_seed(self.seed)
            from cascade_jax import files
            from cascade_jax.evaluation import compare, tables
            from cascade_jax.text import captions

            self.metrics.check()
            given = None if self.prompts is None else captions.read(self.prompts)
            names = _names(self.methods)
            files.check_folder(self.out)
        console.set_up()
        with console.bad_input():
            bundle = _load(self.model)
            count = self.count or (8 if given is None else len(given))
            if given is not None:
                captions.check(bundle, given, self.prompts)
            prompts = _prompts(bundle, given, max(count, self.quality or 0), self.seed)
            settings = self.draws.settings(bundle)
            sampling = sampling_of(settings)
            chosen = _methods(bundle, ["ar", *(name for name in names if name != "ar")], self.thresholds.given())
        with console.bad_input(), files.owned(self.out), console.bar("") as progress:
            say = _described(progress)
            report = compare.compare(
                bundle, chosen, prompts, self.out, timed=count, sampling=sampling, seed=self.seed,
                gauges=self.metrics.opened(bundle, None, say), progress=say,
                about={"model": self.model, "tree": self.thresholds.tree, "sampling": settings, "command": command},
            )  # fmt: skip
        console.show(tables.terminal(report))
        for text in report["cautions"]:
            console.say(text)
        print(f"written to {self.out}: report.json, report.md, grid.png")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Find the trade-off between speed and quality over cascade's thresholds: table and figure, and the best choice."""

    model: Model = "scenes"
    """scenes, or the folder of such a model"""
    trees: Annotated[tuple[str, ...], arg(metavar="TREE...")] = ("eagle25",)
    """draft trees"""
    tau_pos: Annotated[tuple[float, ...], arg(metavar="X...")] = (0.6, 0.75, 0.85, 0.95)
    """thresholds between siblings"""
    tau_seq: Annotated[tuple[float, ...], arg(metavar="X...")] = (0.5, 0.7, 0.9)
    """thresholds between a token and its children"""
    budget: Annotated[tuple[float, ...], arg(metavar="X...")] = (0.1, 0.25, 0.5)
    """budgets"""
    ledger: Annotated[tuple[str, ...], arg(metavar="LEDGER...")] = ("nominal", "coupled")
    """ledgers"""
    mass: Annotated[tuple[str, ...], arg(metavar="MASS...")] = ("current",)
    """where the mass of children is read: current, next"""
    references: Annotated[str, arg(metavar="A,B,C")] = "ar,eagle,lantern,lantern++,gsd"
    """methods to hold the cascades against"""
    count: Count = 64
    """pictures a point"""
    timed: Annotated[int, arg(metavar="N")] = 3
    """pictures to time each program's steps with, at batch 1; 0 counts steps alone"""
    seed: Seed = 0
    """of the captions and the pictures"""
    out: Out = pathlib.Path("sweep")
    """receives sweep.json, sweep.md, sweep.png, and points.jsonl as they are finished; goes on where it stopped"""
    metrics: OmitArgPrefixes[Metrics] = USUAL
    draws: OmitArgPrefixes[Draws] = Draws()

    def run(self, command: str) -> None:
        with console.bad_input():
            _at_least(1, count=self.count)
            _at_least(0, timed=self.timed)
            _check_seed(self.seed)
            from cascade_jax import files
            from cascade_jax.evaluation import sweep

            self.metrics.check()
            names = _names(self.references)
            files.check_folder(self.out)
        console.set_up()
        with console.bad_input():
            bundle = _load(self.model)
            prompts = _prompts(bundle, None, self.count, self.seed)
            points = sweep.grid(
                bundle, trees=self.trees, tau_pos=self.tau_pos, tau_seq=self.tau_seq, budgets=self.budget,
                ledgers=self.ledger, masses=self.mass,
            )  # fmt: skip
            references = _methods(bundle, ["ar", *(name for name in names if name not in ("ar", "cascade"))], {})
            _methods(bundle, ["cascade"], {})
            gauges = self.metrics.opened(bundle)
            sampling = sampling_of(self.draws.settings(bundle))
        progress = lambda point, done, total: console.say(f"{done}/{total}  {sweep.words(point)}")
        with console.bad_input(), files.owned(self.out):
            result = sweep.sweep(
                bundle, points, references, prompts, gauges=gauges, seed=self.seed, timed=self.timed,
                sampling=sampling, memory=self.out / "points.jsonl", progress=progress,
            )  # fmt: skip
            sweep.write(self.out, result, command)
        print(sweep.markdown(result, command))
        if result["chosen"]:
            print(sweep.config_line(result["chosen"]))


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a part of the embedded model: the tokenizer, then the target, then the drafter; and the judge."""

    part: Annotated[Positional[str], arg(metavar="tokenizer|target|drafter|judge")]
    """which part"""
    out: Out = pathlib.Path("runs")
    """the folder of all runs, each in a folder of the part's name; a run that stopped goes on"""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: the recipe's)")] = None
    """training steps"""
    batch: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: the recipe's)")] = None
    """pictures in a step"""
    seed: Seed = 0
    """of everything random"""
    sequences: Annotated[int, arg(metavar="N")] = 1024
    """drafter: pictures that the target draws for it to learn from"""

    def run(self, command: str) -> None:
        parts = {"tokenizer": _tokenizer, "target": _target, "drafter": _drafter, "judge": _judge}
        with console.bad_input():
            if self.part not in parts:
                raise ValueError(f"unknown part {self.part!r}; known: {', '.join(parts)}")
            _at_least(1, steps=self.steps, batch=self.batch, sequences=self.sequences)
            _check_seed(self.seed)
            from cascade_jax.evaluation import files

            files.check_folder(self.out)
            if not _installed("skimage"):
                raise ValueError("training renders scenes, which needs scikit-image: pip install 'cascade_jax[scenes]'")
        console.set_up()
        given = {"steps": self.steps, "batch": self.batch}
        settings = {name: value for name, value in given.items() if value is not None}
        with console.bad_input():  # a run with other settings, or a part that must be trained first
            parts[self.part](self.out, {"seed": self.seed, **settings}, self)
        print(f"trained: {self.out / self.part}")


@dataclasses.dataclass(frozen=True)
class Pack:
    """Put finished runs together as the model that `--model scenes` loads."""

    runs: Positional[Annotated[pathlib.Path, arg(metavar="DIR")]] = pathlib.Path("runs")
    """the folder of all runs"""
    out: Annotated[pathlib.Path | None, arg(metavar="DIR", help_behavior_hint="(default: the package's)")] = None
    """receives the model; the judge is put beside it"""

    def run(self, command: str) -> None:
        with console.bad_input():
            from cascade_jax.evaluation import files
            from cascade_jax.recipes import pack

            out = pack.WEIGHTS if self.out is None else self.out
            if not self.runs.is_dir():
                raise ValueError(f"there is no folder {self.runs}: train the parts first (cascade-jax scenes train)")
            files.check_folder(out)
            pack.pack(self.runs, out)
        print(f"packed: {out}")


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure where the time goes: parts of a step, the loop, the memory's limit, batches."""

    model: Model = "scenes"
    """scenes, or the folder of a converted model"""
    shapes: Annotated[str | None, arg(metavar="SHAPES", help_behavior_hint="")] = None
    """instead of a model, random weights of published sizes: llamagen-xl, llamagen-7b, lumina-mgpt-7b, janus-pro-7b"""
    alpha: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """project the time of whole pictures for this many accepted drafts a step, which random weights do not reach"""
    dtype: Dtype = None
    """of the weights"""
    batch: Annotated[str, arg(metavar="N,N,...")] = "1,2,4,8,16"
    """batch sizes"""
    method: Annotated[str, arg(metavar="METHOD")] = "cascade"
    """the speculative method"""
    steps: Annotated[int, arg(metavar="N")] = 16
    """steps to time"""
    repeats: Annotated[int, arg(metavar="N")] = 5
    """how often everything is timed"""
    out: Out = pathlib.Path("bench")
    """receives bench.json and bench.md"""
    thresholds: OmitArgPrefixes[Thresholds] = Thresholds()

    def run(self, command: str) -> None:
        with console.bad_input():
            _at_least(1, steps=self.steps, repeats=self.repeats)
            if not re.fullmatch(r"\d+(,\d+)*", self.batch):
                raise ValueError(f"batch is a list of sizes such as 1,2,4, not {self.batch!r}")
            batches = [int(size) for size in self.batch.split(",")]
            _at_least(1, batch=min(batches))
            check_dtype(self.dtype)
            if self.alpha is not None and not 0 <= self.alpha < float("inf"):
                raise ValueError(f"alpha must be at least 0, not {self.alpha}")
            from cascade_jax import methods
            from cascade_jax.evaluation import files
            from cascade_jax.measure import bench, report, shapes
            from cascade_jax.scenes import data

            methods.check_name(self.method)
            files.check_folder(self.out)
        console.set_up()
        with console.bad_input():
            if self.shapes is None:
                bundle = _load(self.model, self.dtype)
            else:
                bundle = shapes.random_bundle(self.shapes, self.dtype)
            if bundle.config.text == "scenes":
                prompts = bundle.encode(data.random_captions(max(batches), 0))
            else:
                prompts = shapes.blank(bundle, max(batches))
            method = methods.method(self.method, bundle, **self.thresholds.given())
            bundle.program(method.tree)
            bench.check_tree(method)
        with console.CompileClock() as compiling:
            result = bench.bench(
                bundle, method, prompts, name=self.shapes or self.model, batches=batches, steps=self.steps,
                repeats=self.repeats, whole=self.shapes is None, alpha=self.alpha, progress=console.say,
            )  # fmt: skip
        result["report"]["compile_seconds"] = compiling.seconds
        report.write(self.out, result, command)
        console.show(*report.tables(result))
        print(f"written to {self.out}: bench.json, bench.md")


def _scenes(
    command: Annotated[Sweep, subcommand("sweep")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Pack, subcommand("pack")],
):
    """Work on the embedded model: sweep, train, pack."""
    return command


_COMMANDS = {
    "generate": Generate, "compare": Compare, "bench": Bench, "convert": Convert, "info": Info, "merge": Merge,
    "neighbours": Neighbours, "distill": train_commands.Distill, "train": train_commands.Train, "export": Export,
    "run-exported": RunExported, "tune-tree": TuneTree, "generate-list": GenerateList, "eval": Eval, "paper": Paper,
    "plan": Plan, "scenes": _scenes,
}  # fmt: skip
_DESCRIPTION = "Draw pictures with CASCADE and its peers: speculative decoding of autoregressive image models."


def entry() -> int:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that lacks a letter is no reason to fail
    return main(sys.argv[1:])


def main(argv: list[str]) -> int:
    """Runs a command; returns the exit status: 0, 2 for what cannot be done, 130 when interrupted."""
    with interrupts.watch():
        return _main(argv)


def _main(argv: list[str]) -> int:
    try:
        command = _parse(argv)
        if command is not None:
            command.run(f"cascade-jax {shlex.join(argv)}")
        return 0
    except console.BadInput as error:
        console.say(f"cascade-jax: {error}")
        return 2
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        console.say(f"cascade-jax: {console.one_line(error)}")
        return 2
    except KeyboardInterrupt as interrupt:
        console.say(f"cascade-jax: interrupted{f'; {interrupt}' if str(interrupt) else ''}")
        return interrupts.STATUS


def _parse(argv: list[str]):
    """The command asked for; None if it was for help, which is printed."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.extras.subcommand_cli_from_dict(
                _COMMANDS,
                prog="cascade-jax",
                description=_DESCRIPTION,
                args=argv,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes, tyro.conf.DisallowNone),
            )
    except SystemExit as stop:
        if not stop.code:
            return None
        raise console.BadInput(console.usage_error(errors.getvalue())) from None


def _at_least(low: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < low:
            raise ValueError(f"{name} must be at least {low}, not {value}")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be between 0 and {2**32 - 1}, not {seed}")


def _names(text: str) -> list[str]:
    from cascade_jax import methods

    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        methods.check_name(name)
    return names


def _methods(bundle, names: list[str], given: dict[str, Any]) -> list:
    """Methods by name; every setting goes to those that take it, the tree to all but ar."""
    from cascade_jax import methods

    for setting in given:
        if setting != "tree" and not any(setting in methods.takes(name) for name in names):
            raise ValueError(f"none of {', '.join(names)} takes {setting}")
    chosen = []
    _note_neighbours(bundle, names)
    for name in names:
        own = {k: v for k, v in given.items() if k in methods.takes(name) or (k == "tree" and name != "ar")}
        chosen.append(methods.method(name, bundle, **own))
        bundle.program(chosen[-1].tree)
    return chosen


def _note_neighbours(bundle, names: list[str]) -> None:
    """Says what takes the time if a large table of neighbours must be made."""
    if bundle.neighbours is None and bundle.config.text != "scenes" and {"lantern", "lantern++"} & set(names):
        console.say("making LANTERN's table of neighbours; cascade-jax neighbours MODEL stores it with the model")


def _load(model: str, dtype: str | None = None, **mesh):
    from cascade_jax import pipeline

    try:
        return pipeline.load(model, dtype, **mesh)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the model {model} makes no sense: {type(error).__name__}: {error}") from error


def _prompts(bundle, given: list | None, count: int, seed: int) -> list[str]:
    """`count` readable prompts: the given ones over and over, or captions of random scenes."""
    from cascade_jax.scenes import data

    if given is None:
        if bundle.config.text != "scenes":
            raise ValueError("this model has no captions of its own: give --prompts FILE, with one prompt a line")
        return data.random_captions(count, seed)
    return [given[i % len(given)].text for i in range(count)]


def _described(progress):
    return lambda what, done, total: progress(done, total, what)


def _installed(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def _tokenizer(runs: pathlib.Path, settings: dict[str, Any], command: Train) -> None:
    from cascade_jax.recipes import tokenizer

    tokenizer.train_tokenizer(runs / "tokenizer", **settings)


def _target(runs: pathlib.Path, settings: dict[str, Any], command: Train) -> None:
    from cascade_jax.recipes import target, tokenizer

    target.train_target(runs / "target", tokenizer.load_tokenizer(runs / "tokenizer"), **settings)


def _drafter(runs: pathlib.Path, settings: dict[str, Any], command: Train) -> None:
    from cascade_jax.bundle import default_sampling
    from cascade_jax.recipes import drafter, pack

    bundle = pack.from_runs(runs, drafter=False)
    sampling = default_sampling(bundle.config)
    rows = drafter.distill(
        bundle,
        runs / "distilled",
        count=command.sequences,
        batch=32,
        seed=command.seed,
        sampling=sampling,
        say=console.say,
    )
    drafter.train_drafter(runs / "drafter", bundle, rows, **settings)


def _judge(runs: pathlib.Path, settings: dict[str, Any], command: Train) -> None:
    from cascade_jax.evaluation.networks import judge as quality
    from cascade_jax.recipes import judge, tokenizer

    judge.train_judge(runs / "judge", tokenizer=tokenizer.load_tokenizer(runs / "tokenizer"), **settings)
    quality.write_reference(runs / "judge")
