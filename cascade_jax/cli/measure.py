"""Commands that measure speed: bench, tune-tree."""

import dataclasses
import pathlib
from types import SimpleNamespace
from typing import Annotated

from tyro.conf import OmitArgPrefixes, arg

from cascade_jax import methods
from cascade_jax.cli import console, flags
from cascade_jax.cli.command import Command


@dataclasses.dataclass(frozen=True)
class Bench(Command):
    """Of a model, or of random weights of a published model's sizes."""

    shapes: Annotated[str | None, flags.hint("SHAPES")] = None
    """instead of a model, random weights of published sizes: llamagen-xl, llamagen-7b, lumina-mgpt-7b, janus-pro-7b,
    lumina-mgpt-2-7b, emu3-gen-8b, emu3.5-image-34b"""
    alpha: Annotated[float | None, flags.hint("X")] = None
    """project the time of whole pictures for this many accepted drafts a step, which random weights do not reach"""
    batch: flags.commas(int, "N,N,...") = (1, 2, 4, 8, 16)
    """batch sizes"""
    method: flags.Method = methods.CASCADE
    steps: flags.Count = 16
    """steps to time"""
    repeats: flags.Count = 5
    """how often everything is timed"""
    out: flags.Out = pathlib.Path("bench")
    """receives bench.json and bench.md"""
    model: OmitArgPrefixes[flags.Model] = flags.Model()
    settings: Annotated[OmitArgPrefixes[flags.Settings], arg(name="method")] = flags.Settings()

    def check(self):
        flags.at_least(1, steps=self.steps, repeats=self.repeats, batch=min(self.batch, default=0))
        if self.alpha is not None and not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha must be at least 0, not {self.alpha}")
        methods.check_name(self.method)
        self.model.check()
        from cascade_jax import files

        files.check_folder(self.out)

    def owns(self) -> pathlib.Path:
        return self.out

    def load(self, checked):
        from cascade_jax.measure import bench, shapes
        from cascade_jax.scenes import data

        bundle = self.model.load() if self.shapes is None else shapes.random_bundle(self.shapes, self.model.dtype)
        if bundle.config.of_scenes:
            prompts = bundle.encode(data.random_captions(max(self.batch), 0))
        else:
            prompts = shapes.blank(bundle, max(self.batch))
        method = self.settings.method(bundle, self.method)
        bench.check_tree(method)
        return SimpleNamespace(bundle=bundle, prompts=prompts, method=method)

    def run(self, loaded, line) -> None:
        from cascade_jax.evaluation import run
        from cascade_jax.measure import bench, report

        with console.CompileClock() as compiling:
            result = bench.bench(
                loaded.bundle, loaded.method, loaded.prompts, name=self.shapes or self.model.name,
                batches=list(self.batch), steps=self.steps, repeats=self.repeats, whole=self.shapes is None,
                alpha=self.alpha, progress=console.step,
            )  # fmt: skip
        result["report"]["compile_seconds"] = compiling.seconds
        if self.shapes is None:
            result["weights"] = run.weights_of(loaded.bundle)
        report.write(self.out, result, line)
        console.show(*report.tables(result))
        print(f"written to {self.out}: bench.json, bench.md")

    def kept(self) -> str:
        return "nothing was written"


@dataclasses.dataclass(frozen=True)
class TuneTree(Command):
    """It lies in the user's cache, not in the model, and is used on this machine until it is removed."""

    method: flags.Method = methods.CASCADE
    prompts: Annotated[pathlib.Path | None, flags.hint("FILE", "(default: random scenes)")] = None
    """sample prompts, one a line"""
    count: flags.Count = 8
    """prompts to measure acceptance on"""
    most_drafts: flags.Count = 64
    """size of the largest tree"""
    most_depth: flags.Count = 8
    """depth of the deepest"""
    steps: flags.Count = 32
    """steps to time a tree with"""
    repeats: flags.Count = 5
    """how often"""
    seed: flags.Seed = 0
    """of the captions and the pictures"""
    listed: Annotated[bool, arg(name="list", help_behavior_hint="")] = False
    """instead, list what was found so far"""
    remove: Annotated[str | None, flags.hint("DIGEST|all")] = None
    """instead, forget what was found for a model, which --list shows by a digest"""
    model: OmitArgPrefixes[flags.Model] = flags.Model()

    def check(self):
        if self.listed or self.remove:
            return self._kept()
        for name in ("count", "most_drafts", "most_depth", "steps", "repeats"):
            flags.at_least(1, **{name: getattr(self, name)})
        methods.check_name(self.method)
        if not methods.tunable(self.method):
            raise ValueError(f"tune-tree takes a method that drafts on a static tree, not {self.method}")
        self.model.check()
        from cascade_jax import files, tuned
        from cascade_jax.text import captions

        files.check_folder(tuned.folder())
        return None if self.prompts is None else captions.read(self.prompts)

    def _kept(self):
        """What was found before, for the list; or how many models are forgotten."""
        from cascade_jax import tuned

        if not self.remove:
            return tuned.listed()
        removed = tuned.remove("" if self.remove == "all" else self.remove)
        if not removed:
            raise ValueError(f"no model's digest starts with {self.remove!r}: tune-tree --list shows them")
        return removed

    def load(self, given):
        if self.listed or self.remove:
            return given
        from cascade_jax.measure import tune

        bundle = self.model.load()
        count = self.count if given is None else min(self.count, len(given))
        texts = flags.texts(bundle, given, self.prompts, count, self.seed)
        flags.drawable(bundle, self.method, {"tree": tune.chain(1)})
        return bundle, bundle.encode(texts)

    def run(self, loaded, line) -> None:
        from cascade_jax import pipeline, tuned
        from cascade_jax.measure import tune

        if self.remove:
            print(f"forgotten: what was found for {loaded} model{'s' * (loaded > 1)}")
            return
        if self.listed:
            for entry in loaded:
                print(f"{entry.digest}  {entry.method} on {entry.device}: {entry.tree}  ({entry.model})")
            return
        bundle, prompts = loaded
        found = tune.tune(
            bundle, self.method, prompts, seed=self.seed, most_drafts=self.most_drafts, most_depth=self.most_depth,
            steps=self.steps, repeats=self.repeats, progress=console.step,
        )  # fmt: skip
        place = tuned.store(pipeline.folder(self.model.name), found["device"], self.method, found)
        console.show(tune.table(found))
        print(f"stored: {place}, for {self.method} on {found['device']}: {found['tree']}")

    def kept(self) -> str:
        return "nothing was stored"
