"""The command that looks inside: trace."""

import dataclasses
import pathlib
from types import SimpleNamespace
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from cascade_jax import methods
from cascade_jax.cli import console, flags
from cascade_jax.cli.command import Command


@dataclasses.dataclass(frozen=True)
class Trace(Command):
    """The page holds all it shows and asks for nothing else; any browser opens it."""

    prompt: Annotated[Positional[str], flags.hint("PROMPT")] = ""
    """what to draw, a sentence in quotes: the picture that generate draws from it alone"""
    method: flags.Method = methods.CASCADE
    seed: flags.Seed = 0
    """the picture depends on the prompt and this alone"""
    out: Annotated[pathlib.Path, arg(metavar="FILE")] = pathlib.Path("trace.html")
    """the page, a file that ends in .html"""
    alone: flags.Json = False
    """leave out the picture drawn token by token beside it, which takes as long as --method ar"""
    model: OmitArgPrefixes[flags.Model] = flags.Model()
    settings: Annotated[OmitArgPrefixes[flags.Settings], arg(name="method")] = flags.Settings()
    sampling: OmitArgPrefixes[flags.Draws] = flags.Draws()

    def check(self):
        flags.check_seed(self.seed)
        if not self.prompt.strip():
            raise ValueError('there is no prompt: try cascade-jax trace "a red ball on gravel"')
        methods.check_name(self.method)
        if self.out.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"a trace is a page: --out ends in .html, not {self.out}")
        self.model.check()
        from cascade_jax import files

        files.check_file(self.out)

    def load(self, checked):
        bundle = self.model.load()
        (prompt,) = bundle.encode([self.prompt])
        settings, sampling = self.sampling.of(bundle)
        method = self.settings.method(bundle, self.method)
        return SimpleNamespace(bundle=bundle, method=method, prompt=prompt, settings=settings, sampling=sampling)

    def run(self, loaded, line) -> None:
        from cascade_jax.paper.viewer import document

        about = document.About(
            self.prompt, loaded.method, self.model.name, self.seed, sampling=loaded.settings, command=line
        )
        with console.bar("") as progress, console.bad_input():
            seen = document.drawn(
                loaded.bundle, about, self.out, loaded.prompt, loaded.sampling, beside=not self.alone,
                progress=lambda what, done, total: progress(done, total, what),
            )  # fmt: skip
        steps, tokens = len(seen), len(seen.output)
        print(f"{self.out}: {steps} steps for {tokens} tokens, alpha {(tokens - 1 - steps) / max(steps, 1):.2f}")

    def kept(self) -> str:
        return f"{self.out} was not written"
