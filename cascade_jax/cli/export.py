"""Commands for programs in a file: export, run-exported."""

import dataclasses
import pathlib
import time
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from cascade_jax import interrupts, methods
from cascade_jax.cli import console, flags
from cascade_jax.cli.command import Command


@dataclasses.dataclass(frozen=True)
class Export(Command):
    """One file for several platforms."""

    out: Annotated[pathlib.Path, arg(metavar="FILE")]
    """the file to write"""
    method: flags.Method = methods.CASCADE
    platforms: flags.commas() = ("cpu", "cuda", "rocm", "tpu")
    """platforms that the file shall run on"""
    batch: Annotated[int | None, flags.hint("N", "(default: any)")] = None
    """pictures drawn at once"""
    slots: flags.Count = 96
    """most text tokens of a prompt, with models that read text themselves"""
    model: OmitArgPrefixes[flags.Model] = flags.Model()
    settings: Annotated[OmitArgPrefixes[flags.Settings], arg(name="method")] = flags.Settings()

    def check(self):
        flags.at_least(1, batch=self.batch, slots=self.slots)
        methods.check_name(self.method)
        self.model.check()
        from cascade_jax import files
        from cascade_jax.export import programs

        files.check_file(self.out)
        return programs.check_platforms(list(self.platforms))

    def load(self, platforms):
        bundle = self.model.load()
        return bundle, self.settings.method(bundle, self.method), platforms

    def run(self, loaded, line) -> None:
        from cascade_jax import pipeline
        from cascade_jax.export import artifact, programs

        bundle, method, platforms = loaded
        with console.bad_input():
            lowered = programs.lower(bundle, method, platforms=platforms, batch=self.batch, slots=self.slots)
            interrupts.check()
            artifact.write(self.out, bundle, method, lowered, pipeline.folder(self.model.name))
        size = self.out.stat().st_size / 1e6
        print(f"exported: {self.out}, {size:.1f} MB, {method.name} for {', '.join(platforms)}")

    def kept(self) -> str:
        return "nothing was written"


@dataclasses.dataclass(frozen=True)
class RunExported(Command):
    """Needs nothing but the file."""

    file: Annotated[Positional[pathlib.Path], arg(metavar="FILE")]
    """what export wrote"""
    prompts: Annotated[Positional[tuple[str, ...]], flags.hint("PROMPT...")] = ()
    """what to draw, a sentence in quotes each"""
    seed: flags.Seed = 0
    """picture i of a run depends on its prompt, i and this alone"""
    out: Annotated[pathlib.Path | None, flags.hint("PATH")] = None
    """a .png file for one picture, or a folder, as of generate"""

    def check(self):
        if not self.prompts:
            raise ValueError("there is no prompt: give one behind the file")
        flags.check_seed(self.seed)
        from cascade_jax import pictures

        return pictures.destinations(self.prompts, self.out)

    def load(self, paths):
        from cascade_jax.export.artifact import Artifact

        opened = Artifact(self.file)
        encoded = opened.encode(self.prompts)
        opened.prompts(encoded)
        for name in ("generate", "pictures"):
            opened.program(name)
        return opened, encoded, paths

    def run(self, loaded, line) -> None:
        from cascade_jax import pictures

        opened, encoded, paths = loaded
        begin = time.perf_counter()
        drawn = opened.generate(encoded, self.seed)
        seconds = time.perf_counter() - begin
        for number, path in enumerate(paths):
            interrupts.check()
            pictures.write(path, drawn.images[number], Description=self.prompts[number])
            print(f"{path}  {drawn.stats.steps[number]} steps, alpha {drawn.stats.alpha[number]:.2f}")
        console.say(f"{seconds:.1f} s with compilation")

    def kept(self) -> str:
        return "pictures that were finished are kept"
