"""Commands that train drafters: distill, train."""

import contextlib
import dataclasses
import pathlib
import re
from types import SimpleNamespace
from typing import Annotated

from tyro.conf import OmitArgPrefixes, arg

from cascade_jax.cli import console, flags
from cascade_jax.cli.command import Command

_KIND = "(default: the drafter's)"


@dataclasses.dataclass(frozen=True)
class Distill(Command):
    """What is there already is not made again."""

    prompts: Annotated[pathlib.Path | None, flags.hint("FILE", "(default: random scenes)")] = None
    """a text file with a prompt a line"""
    images: Annotated[pathlib.Path | None, flags.hint("DIR")] = None
    """instead of drawing, encode a folder's pictures: NAME.txt beside NAME.png, or metadata.jsonl: file_name, text"""
    count: Annotated[int | None, flags.hint("N", "(default: all of the file's or folder's)")] = None
    """pictures; a file that has fewer prompts is gone through again"""
    out: flags.Out = pathlib.Path("data")
    """receives the data; what is there already is not made again"""
    batch: flags.Count = 32
    """pictures drawn at once"""
    seed: flags.Seed = 0
    """picture i depends on its prompt, i and this alone"""
    features: Annotated[str | None, flags.hint("DRAFTER", "(default: none)")] = None
    """keep the target's features for this kind of drafter, instead of computing them again in training"""
    part: Annotated[str, arg(metavar="K/N")] = "1/1"
    """make the K-th of N parts, for N processes that work on the same folder"""
    model: OmitArgPrefixes[flags.Model] = flags.Model()
    sampling: OmitArgPrefixes[flags.Draws] = flags.Draws()

    def check(self):
        flags.at_least(1, count=self.count, batch=self.batch)
        flags.check_seed(self.seed)
        part = _part(self.part)
        if self.prompts is not None and self.images is not None:
            raise ValueError("give --prompts or --images, not both")
        self.model.check()
        from cascade_jax import files
        from cascade_jax.text import captions
        from cascade_jax.training import drafter

        if self.features not in (None, "none"):
            drafter.check(self.features)
        files.check_folder(self.out)
        return part, None if self.prompts is None else captions.read(self.prompts)

    def load(self, checked):
        from cascade_jax.training.drafter import sizes

        part, given = checked
        model = self.model.load()
        taps = None if self.features in (None, "none") else sizes(self.features, model.config.target).taps
        drawn = None if self.images is not None else (*self._prompts(model, given), self.sampling.of(model)[1])
        return model, {"features": taps, "part": part}, drawn

    def run(self, loaded, line) -> None:
        from cascade_jax.training import distill

        model, settings, drawn = loaded
        settings |= {"batch": self.batch, "name": self.model.name, "say": console.step}
        with console.bad_input():
            if drawn is None:
                made = distill.encode(model, self.out, self.images, count=self.count, **settings)
            else:
                prompts, count, sampling = drawn
                made = distill.draw(
                    model, self.out, prompts, count=count, seed=self.seed, sampling=sampling, **settings
                )
        print(f"distilled: {self.out}" + ("" if made is not None else ", other parts are still missing"))

    def _prompts(self, model, given) -> tuple[list[str], int]:
        from cascade_jax.scenes import data
        from cascade_jax.text import captions

        if given is None:
            if not model.config.of_scenes:
                raise ValueError(flags.NO_CAPTIONS)
            if self.count is None:
                raise ValueError("say how many pictures: --count N")
            return data.random_captions(self.count, self.seed, training=True), self.count
        captions.check(model, given, self.prompts)
        return [caption.text for caption in given], self.count or len(given)

    def kept(self) -> str:
        return f"{self.out} keeps every finished shard; the same command goes on there"


@dataclasses.dataclass(frozen=True)
class Loss:
    """What the drafter learns; what is not set is the kind of drafter's standard."""

    convergence_weight: Annotated[float, arg(metavar="X")] = 1.0
    """weight of positions where the target's features converge, the paper's c = 2; 1 is the standard drafter"""
    tau_seq: Annotated[float | None, flags.hint("X", "(default: the model's)")] = None
    """least cosine of consecutive features that converge"""
    guided: bool = False
    """compare the guided distributions of both branches, at the model's guidance"""
    soft: Annotated[float | None, flags.hint("X", _KIND)] = None
    """weight of the cross-entropy with the target's distribution"""
    hard: Annotated[float | None, flags.hint("X", _KIND)] = None
    """weight of the cross-entropy with the drawn token"""
    feature: Annotated[float | None, flags.hint("X", _KIND)] = None
    """weight of SmoothL1 between estimated and true features"""
    unroll: Annotated[int | None, flags.hint("N", _KIND)] = None
    """tokens that it guesses ahead: steps of training-time test, 1 for none; how deep a drafter in one pass drafts"""
    unroll_decay: Annotated[float | None, flags.hint("X", _KIND)] = None
    """each of these weighs that much of the one before"""
    anchors: Annotated[int | None, flags.hint("N", "(default: all)")] = None
    """positions of a picture from which it guesses further than the next token, others in every step"""
    noise: Annotated[float | None, flags.hint("X", _KIND)] = None
    """width of the noise on features"""
    remat: bool = False
    """compute activations again in the backward pass instead of keeping them"""
    dtype: Annotated[str | None, flags.hint("float32|bfloat16", "(default: float32 on CPU)")] = None
    """of the activations; parameters are float32"""

    def objective(self, kind: str, model):
        """The kind's standard under these."""
        import jax

        from cascade_jax.training.drafter import standard

        names = ("soft", "hard", "feature", "unroll", "unroll_decay", "anchors", "noise", "dtype", "tau_seq")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        given.setdefault("tau_seq", model.config.cascade.get("tau_seq", 0.5))
        given.setdefault("dtype", "float32" if jax.default_backend() == "cpu" else "bfloat16")
        if self.guided:
            given["guidance"] = model.config.sampling.get("guidance")
            if given["guidance"] is None:
                raise ValueError("this model draws without guidance: leave --guided out")
        own = {"convergence_weight": self.convergence_weight, "remat": self.remat}
        return dataclasses.replace(standard(kind), **own, **given)


@dataclasses.dataclass(frozen=True)
class Optimiser:
    """How the drafter learns: AdamW, warm-up, decay."""

    rate: Annotated[float, arg(metavar="X")] = 1e-4
    """highest learning rate"""
    warmup: Annotated[float, arg(metavar="X")] = 0.03
    """share of the steps in which it rises"""
    decay: Annotated[str, arg(metavar="linear|cosine")] = "linear"
    """how it falls"""
    clip: Annotated[float, arg(metavar="X")] = 0.5
    """bound on every entry of the gradient; 0 for none"""

    def schedule(self):
        from cascade_jax.training.drafter import Schedule

        return Schedule(self.rate, self.warmup, self.decay, self.clip or None)


@dataclasses.dataclass(frozen=True)
class Train(Command):
    """A run that stopped goes on from its last checkpoint, with the same bits."""

    data: flags.Out
    """what `distill` made with this model"""
    model: Annotated[str, arg(metavar="MODEL")] = "scenes"
    """scenes, scenes-small, or the folder of a converted model"""
    drafter: Annotated[str | None, flags.hint("KIND", "(default: EAGLE-1's)")] = None
    """which kind; what there is, a wrong one lists"""
    out: flags.Out = pathlib.Path("drafter")
    """receives the run, and in DIR/model the model with the best drafter in it"""
    batch: flags.Count = 8
    """rows of a step, over all devices"""
    accumulate: flags.Count = 1
    """parts in which a step's gradient is computed"""
    steps: Annotated[int | None, flags.hint("N", "(default: by epochs)")] = None
    """training steps"""
    epochs: flags.Count = 20
    """how often the data are gone through"""
    seed: flags.Seed = 0
    """of everything random"""
    held_out: Annotated[float, arg(metavar="X")] = 0.05
    """share of the data that is evaluated on instead"""
    evaluate_every: flags.Count = 1
    """epochs between evaluations"""
    evaluated: flags.Count = 8
    """held-out prompts to draw in an evaluation; 0 for no evaluation"""
    save_every: flags.Count = 250
    """steps between checkpoints"""
    loss: OmitArgPrefixes[Loss] = Loss()
    optimiser: OmitArgPrefixes[Optimiser] = Optimiser()
    processes: OmitArgPrefixes[flags.Processes] = flags.Processes()

    def check(self):
        flags.at_least(1, batch=self.batch, accumulate=self.accumulate, steps=self.steps, epochs=self.epochs)
        flags.at_least(1, evaluate_every=self.evaluate_every, save_every=self.save_every)
        flags.at_least(0, evaluated=self.evaluated)
        flags.check_seed(self.seed)
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is a share below 1, not {self.held_out}")
        self.processes.check()
        from cascade_jax import files, pipeline

        pipeline.folder(self.model)
        files.check_folder(self.out)

    def load(self, checked):
        self.processes.join(recoverable=False)
        from cascade_jax import bundle, pipeline
        from cascade_jax.training import run
        from cascade_jax.training.data import Data, fingerprint
        from cascade_jax.training.drafter import USUAL, check, sizes

        model = bundle.load(pipeline.folder(self.model))
        # Prompts come encoded; a text encoder can be larger than the rest.
        model = dataclasses.replace(model, params={**model.params, "text": None})
        kind = self.drafter or USUAL
        check(kind)
        objective = self.loss.objective(kind, model)
        methods = run.naive_and_cascade(model) if self.evaluated and self.held_out else {}
        made = run.with_drafter(model, sizes(kind, model.config.target, objective.unroll))
        for _, tree in methods.values():
            made.program(tree)
        return SimpleNamespace(
            model=model, kind=kind, schedule=self.optimiser.schedule(), objective=objective,
            rows=Data(self.data, fingerprint(model.params["target"])), methods=methods,
        )  # fmt: skip

    def run(self, loaded, line) -> None:
        import jax

        from cascade_jax import pipeline
        from cascade_jax.training import run
        from cascade_jax.training.loop import data_mesh

        with console.bad_input(), _finite():
            config, params = run.train(
                loaded.model, loaded.rows, self.out, kind=loaded.kind, objective=loaded.objective,
                schedule=loaded.schedule, batch=self.batch, steps=self.steps, epochs=self.epochs, seed=self.seed,
                held_out=self.held_out, methods=loaded.methods, evaluate_every=self.evaluate_every,
                evaluated=self.evaluated, accumulate=self.accumulate, save_every=self.save_every,
                mesh=data_mesh() if jax.device_count() > 1 else None,
            )  # fmt: skip
            if loaded.methods and jax.process_index() == 0:
                self._report(loaded, config, params)
            if jax.process_count() == 1:
                run.merge(pipeline.folder(self.model), self.out, self.out / "model")
                print(f"trained: {self.out}, in a model: {self.out / 'model'}")
            elif jax.process_index() == 0:
                print(f"trained: {self.out}; cascade-jax merge MODEL --drafter {self.out} puts it into a model")

    def _report(self, loaded, config, params) -> None:
        """Prints the acceptance of this drafter, and of the model's own."""
        from cascade_jax.training import run

        model, ways = loaded.model, loaded.methods
        prompts = run.held_out_prompts(loaded.rows, self.held_out, self.evaluated)
        found = {"this drafter": run.alphas(run.with_drafter(model, config), ways, prompts, self.seed, params)}
        if model.config.drafter is not None:
            found["the model's own"] = run.alphas(model, ways, prompts, self.seed, model.params["drafter"])
        for name, figures in found.items():
            print(f"alpha on {len(prompts)} held-out prompts, {name}: ", end="")
            print(f"{figures['alpha']:.2f} naive, {figures['alpha_cascade']:.2f} by CASCADE")

    def kept(self) -> str:
        return f"the same command goes on in {self.out}"


@contextlib.contextmanager
def _finite():
    try:
        yield
    except FloatingPointError as error:
        raise console.BadInput(f"{console.one_line(error)}; try a lower --rate") from error


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"part is K/N with K from 1 to N, such as 2/8, not {text!r}")
    return int(match[1]) - 1, int(match[2])
