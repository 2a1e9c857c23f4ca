"""Commands that train drafters: distill, train."""

import contextlib
import dataclasses
import pathlib
import re
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, arg

from cascade_jax.cli import console

_KIND = "(default: the drafter's)"


def _hint(metavar: str, hint: str = _KIND):
    return arg(metavar=metavar, help_behavior_hint=hint)


@dataclasses.dataclass(frozen=True)
class Distill:
    """Make training data for a drafter: pictures that the model draws, or captioned ones that it encodes."""

    model: Annotated[str, arg(metavar="MODEL")] = "scenes"
    """scenes, or the folder of a converted model"""
    prompts: Annotated[pathlib.Path | None, _hint("FILE", "")] = None
    """a text file with a prompt a line (default: captions of random scenes, for scenes)"""
    images: Annotated[pathlib.Path | None, _hint("DIR", "")] = None
    """instead of drawing, encode a folder's pictures: NAME.txt beside NAME.png, or metadata.jsonl: file_name, text"""
    count: Annotated[int | None, _hint("N", "(default: all of the file's or folder's)")] = None
    """pictures; a file that has fewer prompts is gone through again"""
    out: Annotated[pathlib.Path, arg(metavar="DIR")] = pathlib.Path("data")
    """receives the data; what is there already is not made again"""
    batch: Annotated[int, arg(metavar="N")] = 32
    """pictures drawn at once"""
    seed: Annotated[int, arg(metavar="N")] = 0
    """picture i depends on its prompt, i and this alone"""
    features: Annotated[str, arg(metavar="none|eagle1|eagle3")] = "none"
    """keep the target's features for this drafter, instead of computing them again in training"""
    part: Annotated[str, arg(metavar="K/N")] = "1/1"
    """make the K-th of N parts, for N processes that work on the same folder"""

    def run(self, command: str) -> None:
        with console.bad_input():
            _at_least(1, count=self.count, batch=self.batch)
            part = _part(self.part)
            if self.prompts is not None and self.images is not None:
                raise ValueError("give --prompts or --images, not both")
            if self.features not in ("none", "eagle1", "eagle3"):
                raise ValueError(f"features are kept for none, eagle1 or eagle3, not {self.features!r}")
            from cascade_jax.evaluation import files
            from cascade_jax.text import captions

            given = None if self.prompts is None else captions.read(self.prompts)
            files.check_folder(self.out)
        console.set_up()
        from cascade_jax.training import distill
        from cascade_jax.training.drafter import sizes

        with console.bad_input():
            from cascade_jax import bundle, pipeline

            model = pipeline.load(self.model)
            taps = None if self.features == "none" else sizes(self.features, model.config.target).taps
            settings: dict[str, Any] = dict(batch=self.batch, features=taps, part=part, name=self.model)
            if self.images is not None:
                made = distill.encode(model, self.out, self.images, count=self.count, say=console.say, **settings)
            else:
                prompts, count = self._prompts(model, given)
                made = distill.draw(
                    model, self.out, prompts, count=count, seed=self.seed, say=console.say,
                    sampling=bundle.default_sampling(model.config), **settings,
                )  # fmt: skip
        print(f"distilled: {self.out}" + ("" if made is not None else ", other parts are still missing"))

    def _prompts(self, model, given) -> tuple[list[str], int]:
        from cascade_jax.scenes import data
        from cascade_jax.text import captions

        if given is None:
            if model.config.text != "scenes":
                raise ValueError("this model has no captions of its own: give --prompts FILE, with one prompt a line")
            if self.count is None:
                raise ValueError("say how many pictures: --count N")
            return data.random_captions(self.count, self.seed, training=True), self.count
        captions.check(model, given, self.prompts)
        return [caption.text for caption in given], self.count or len(given)


@dataclasses.dataclass(frozen=True)
class Loss:
    """What the drafter learns; what is not set is the kind of drafter's standard."""

    convergence_weight: Annotated[float, arg(metavar="X")] = 1.0
    """weight of positions where the target's features converge, the paper's c = 2; 1 is the standard drafter"""
    tau_seq: Annotated[float | None, _hint("X", "(default: the model's)")] = None
    """least cosine of consecutive features that converge"""
    guided: bool = False
    """compare the guided distributions of both branches, at the model's guidance"""
    soft: Annotated[float | None, _hint("X")] = None
    """weight of the cross-entropy with the target's distribution"""
    hard: Annotated[float | None, _hint("X")] = None
    """weight of the cross-entropy with the drawn token"""
    feature: Annotated[float | None, _hint("X")] = None
    """weight of SmoothL1 between estimated and true features"""
    unroll: Annotated[int | None, _hint("N")] = None
    """steps of training-time test; 1 for none"""
    noise: Annotated[float | None, _hint("X")] = None
    """width of the noise on features"""
    remat: bool = False
    """compute activations again in the backward pass instead of keeping them"""
    dtype: Annotated[str | None, _hint("float32|bfloat16", "(default: float32 on CPU)")] = None
    """of the activations; parameters are float32"""

    def objective(self, kind: str, model):
        """The kind's standard under these."""
        import jax

        from cascade_jax.training.drafter import standard

        given = {
            name: getattr(self, name) for name in ("soft", "hard", "feature", "unroll", "noise", "dtype", "tau_seq")
        }
        given = {name: value for name, value in given.items() if value is not None}
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
class Processes:
    """Several processes, each with its own devices."""

    coordinator: Annotated[str | None, _hint("HOST:PORT", "")] = None
    """where process 0 is found"""
    processes: Annotated[int | None, _hint("N", "")] = None
    """how many there are"""
    process: Annotated[int | None, _hint("N", "")] = None
    """which this one is, from 0"""

    def join(self) -> None:
        given = [self.coordinator, self.processes, self.process]
        if given == [None] * 3:
            return
        if None in given:
            raise ValueError("--coordinator, --processes and --process go together")
        if not 0 <= self.process < self.processes:
            raise ValueError(f"process must be between 0 and {self.processes - 1}, not {self.process}")
        import jax

        jax.distributed.initialize(self.coordinator, self.processes, self.process)


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a drafter for a model on data that `distill` made; a run that stopped goes on."""

    data: Annotated[pathlib.Path, arg(metavar="DIR")]
    """what `distill` made with this model"""
    model: Annotated[str, arg(metavar="MODEL")] = "scenes"
    """scenes, or the folder of a converted model"""
    drafter: Annotated[str, arg(metavar="eagle1|eagle3")] = "eagle1"
    """which kind"""
    out: Annotated[pathlib.Path, arg(metavar="DIR")] = pathlib.Path("drafter")
    """receives the run, and in DIR/model the model with the best drafter in it"""
    batch: Annotated[int, arg(metavar="N")] = 8
    """rows of a step, over all devices"""
    accumulate: Annotated[int, arg(metavar="N")] = 1
    """parts in which a step's gradient is computed"""
    steps: Annotated[int | None, _hint("N", "(default: by epochs)")] = None
    """training steps"""
    epochs: Annotated[int, arg(metavar="N")] = 20
    """how often the data are gone through"""
    seed: Annotated[int, arg(metavar="N")] = 0
    """of everything random"""
    held_out: Annotated[float, arg(metavar="X")] = 0.05
    """share of the data that is evaluated on instead"""
    evaluate_every: Annotated[int, arg(metavar="N")] = 1
    """epochs between evaluations"""
    evaluated: Annotated[int, arg(metavar="N")] = 8
    """held-out prompts to draw in an evaluation; 0 for no evaluation"""
    save_every: Annotated[int, arg(metavar="N")] = 250
    """steps between checkpoints"""
    loss: OmitArgPrefixes[Loss] = Loss()
    optimiser: OmitArgPrefixes[Optimiser] = Optimiser()
    processes: OmitArgPrefixes[Processes] = Processes()

    def run(self, command: str) -> None:
        with console.bad_input():
            _at_least(1, batch=self.batch, accumulate=self.accumulate, steps=self.steps, epochs=self.epochs)
            _at_least(1, evaluate_every=self.evaluate_every, save_every=self.save_every)
            _at_least(0, evaluated=self.evaluated)
            if not 0 <= self.held_out < 1:
                raise ValueError(f"held_out is a share below 1, not {self.held_out}")
            from cascade_jax.evaluation import files

            files.check_folder(self.out)
        console.set_up()
        with console.bad_input():
            self.processes.join()
            import jax

            from cascade_jax import bundle, pipeline
            from cascade_jax.training import run
            from cascade_jax.training.data import Data, fingerprint
            from cascade_jax.training.drafter import sizes
            from cascade_jax.training.loop import data_mesh

            schedule = self.optimiser.schedule()
            model = bundle.load(pipeline.folder(self.model))
            # Prompts come encoded; a text encoder can be larger than the rest.
            model = dataclasses.replace(model, params={**model.params, "text": None})
            sizes(self.drafter, model.config.target)
            objective = self.loss.objective(self.drafter, model)
            rows = Data(self.data, fingerprint(model.params["target"]))
            methods = _methods(model) if self.evaluated and self.held_out else None
        with console.bad_input(), _finite():
            config, params = run.train(
                model, rows, self.out, kind=self.drafter, objective=objective, schedule=schedule, batch=self.batch,
                steps=self.steps, epochs=self.epochs, seed=self.seed, held_out=self.held_out,
                methods=methods, evaluate_every=self.evaluate_every,
                evaluated=self.evaluated, accumulate=self.accumulate, save_every=self.save_every,
                mesh=data_mesh() if jax.device_count() > 1 else None,
            )  # fmt: skip
            if methods and jax.process_index() == 0:
                prompts = run.held_out_prompts(rows, self.held_out, self.evaluated)
                found = {
                    "this drafter": run.alphas(run.with_drafter(model, config), methods, prompts, self.seed, params)
                }
                if model.config.drafter is not None:
                    own = model.params["drafter"]
                    found["the model's own"] = run.alphas(model, methods, prompts, self.seed, own)
                for name, figures in found.items():
                    print(f"alpha on {len(prompts)} held-out prompts, {name}: ", end="")
                    print(f"{figures['alpha']:.2f} naive, {figures['alpha_cascade']:.2f} by CASCADE")
            if jax.process_count() == 1:
                run.merge(pipeline.folder(self.model), self.out, self.out / "model")
                print(f"trained: {self.out}, in a model: {self.out / 'model'}")
            elif jax.process_index() == 0:
                print(f"trained: {self.out}; cascade-jax merge MODEL --drafter {self.out} puts it into a model")


def _methods(model) -> dict[str, Any]:
    """The paper's naive decoding and CASCADE, one program: thresholds above 1 are strict."""
    from cascade_jax import methods, rules

    cascade = methods.method("cascade", model)
    kinds = {name: cascade.settings[name] for name in ("ledger", "mass")}
    strict = rules.cascade(tau_pos=1.01, tau_seq=1.01, budget=0.0, **kinds)
    return {"naive": (strict, cascade.tree), "cascade": (cascade.rule, cascade.tree)}


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


def _at_least(low: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < low:
            raise ValueError(f"{name} must be at least {low}, not {value}")
