"""Commands that draw: generate, generate-list."""

import dataclasses
import json
import pathlib
import time
from types import SimpleNamespace
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from cascade_jax import methods
from cascade_jax.cli import console, flags
from cascade_jax.cli.command import Command
from cascade_jax.tree import name_of


@dataclasses.dataclass(frozen=True)
class Generate(Command):
    """Every picture of a run depends on its prompt, its number and the seed alone."""

    prompts: Annotated[Positional[tuple[str, ...]], flags.hint("PROMPT...")] = ()
    """what to draw, a sentence in quotes each; scenes knows things like "a red ball on gravel\""""
    method: flags.AnyMethod = None
    count: flags.Count = 1
    """pictures for each prompt"""
    seed: flags.Seed = 0
    """picture i of a run depends on its prompt, i and this alone"""
    out: Annotated[pathlib.Path | None, flags.hint("PATH")] = None
    """a .png file for one picture, or a folder (default: PROMPT.png here for one, the folder pictures for several)"""
    json: flags.Json = False
    """print statistics as JSON, and nothing else"""
    model: OmitArgPrefixes[flags.Spread] = flags.Spread()
    settings: Annotated[OmitArgPrefixes[flags.Settings], arg(name="method")] = flags.Settings()
    sampling: OmitArgPrefixes[flags.Draws] = flags.Draws()

    def check(self):
        flags.at_least(1, count=self.count)
        flags.check_seed(self.seed)
        if not self.prompts:
            raise ValueError('there is no prompt: try cascade-jax generate "a red ball on gravel"')
        if not all(prompt.strip() for prompt in self.prompts):
            raise ValueError("a prompt is empty")
        flags.check_method(self.method)
        self.model.check()
        from cascade_jax.pictures import destinations

        prompts = [prompt for prompt in self.prompts for _ in range(self.count)]
        return prompts, destinations(prompts, self.out)

    def load(self, checked):
        prompts, paths = checked
        bundle = self.model.load(batch=min(len(prompts), methods.BATCH))
        encoded = [prompt for prompt in bundle.encode(self.prompts) for _ in range(self.count)]
        settings, sampling = self.sampling.of(bundle)
        method = self.settings.method(bundle, flags.method_of(bundle, self.method))
        return SimpleNamespace(
            bundle=bundle, method=method, prompts=prompts, encoded=encoded, paths=paths, settings=settings,
            sampling=sampling,
        )  # fmt: skip

    def run(self, loaded, line) -> None:
        with console.CompileClock() as compiling, console.bar("drawing") as progress:
            pictures, seconds = self._draw(loaded, compiling, progress)
        method = loaded.method
        if self.json:
            report = {"model": self.model.name, "method": method.name, "tree": name_of(method.tree)}
            report |= {"settings": method.settings, "sampling": loaded.settings}
            report |= {"seconds": seconds, "compile_seconds": compiling.seconds, "pictures": pictures}
            print(json.dumps(report, indent=2, ensure_ascii=False))
            return
        on = f" on {name_of(method.tree)}" if method.tree.depth else ""
        for p in pictures:
            print(f"{p['file']}  {p['steps']} steps, alpha {p['alpha']:.2f}, {p['seconds']:.2f} s, {method.name}{on}")
        if compiling.fresh > 1:
            kept = compiling.stored()
            found = f"; the next run finds the programs in {kept}" if kept else ""
            console.say(f"compiling took {compiling.seconds:.0f} s{found}")

    def _draw(self, loaded, compiling, progress) -> tuple[list[dict], float]:
        """Draws and writes all pictures: what is known of each, and the seconds without compilation."""
        from cascade_jax.pictures import write

        pictures, seconds, method = [], 0.0, loaded.method
        begin, compiled = time.perf_counter(), 0.0
        for indices, drawn in methods.draw_all(
            loaded.bundle, method, loaded.encoded, self.seed, loaded.sampling, progress
        ):
            spent = time.perf_counter() - begin - (compiling.seconds - compiled)
            seconds += spent
            for row, i in enumerate(indices):
                note = {"Description": loaded.prompts[i], "Comment": f"{method.name}, seed {self.seed}, picture {i}"}
                write(loaded.paths[i], drawn.images[row], **note)
                figures = {name: getattr(drawn.stats, name)[row].item() for name in vars(drawn.stats)}
                place = {"prompt": loaded.prompts[i], "seed": self.seed, "number": i, "file": str(loaded.paths[i])}
                pictures.append({**place, **figures, "seconds": spent / len(indices)})
            begin, compiled = time.perf_counter(), compiling.seconds
        return pictures, seconds

    def kept(self) -> str:
        return "pictures that were finished are kept; the same command draws them all again"


@dataclasses.dataclass(frozen=True)
class GenerateList(Command):
    """Any number of processes share the list; a picture that is there is not drawn again."""

    prompts: Annotated[Positional[pathlib.Path], arg(metavar="FILE")]
    """a text file with a prompt a line"""
    out: flags.Out
    """receives NUMBER.png and NUMBER.json, and report.json at the end; all processes must see it"""
    method: flags.AnyMethod = None
    batch: flags.Count = 16
    """pictures that a process draws at once"""
    seed: flags.Seed = 0
    """picture i depends on its prompt, i and this alone"""
    evaluate: flags.Json = False
    """of scenes: let the package's judge read how far pictures follow their prompts"""
    model: OmitArgPrefixes[flags.Spread] = flags.Spread()
    settings: Annotated[OmitArgPrefixes[flags.Settings], arg(name="method")] = flags.Settings()
    sampling: OmitArgPrefixes[flags.Draws] = flags.Draws()
    processes: OmitArgPrefixes[flags.Waiting] = flags.Waiting()

    def check(self):
        flags.at_least(1, batch=self.batch)
        flags.check_seed(self.seed)
        flags.check_method(self.method)
        self.processes.check()
        self.model.check()
        from cascade_jax import bundle, files, pipeline
        from cascade_jax.text import captions

        files.check_folder(self.out)
        if self.evaluate and not bundle.read_config(pipeline.folder(self.model.name)).of_scenes:
            raise ValueError("--evaluate is for scenes, whose prompts a judge can read")
        return captions.read(self.prompts)

    def owns(self) -> pathlib.Path | None:
        return self.processes.owned(self.out)

    def load(self, given):
        from cascade_jax.evaluation import jobs, run

        place = self.processes.join()
        bundle = self.model.load(batch=self.batch)
        method = self.settings.method(bundle, flags.method_of(bundle, self.method))
        texts = [caption.text for caption in flags.captions(bundle, given, self.prompts, len(given), self.seed)]
        settings, sampling = self.sampling.of(bundle)
        job = {"model": self.model.name, "method": method.name, "tree": name_of(method.tree)}
        job |= {"settings": method.settings, "sampling": settings, "seed": self.seed, "dtype": run.dtype_of(bundle)}
        gauges = flags.Metrics().opened(bundle) if self.evaluate else []
        jobs.settle(self.out, {**job, "prompts": texts})
        return SimpleNamespace(
            bundle=bundle, method=method, texts=texts, sampling=sampling, job=job, gauges=gauges, place=place
        )

    def run(self, loaded, line) -> None:
        from cascade_jax.evaluation import jobs

        (own, processes), texts = loaded.place, loaded.texts
        numbers, done = jobs.missing(self.out, range(own, len(texts), processes)), 0
        with console.bar("drawing") as progress:
            for count in jobs.draw(
                loaded.bundle, loaded.method, texts, numbers, self.out, seed=self.seed, batch=self.batch,
                sampling=loaded.sampling,
            ):  # fmt: skip
                done += count
                progress(done, len(numbers))
        print(f"process {own} of {processes}: {done} pictures drawn")
        if own == 0:
            with console.bad_input():
                jobs.wait(self.out, len(texts), self.processes.patience, console.say)
                jobs.report(self.out, texts, loaded.job, loaded.gauges)
            print(f"written to {self.out}: {len(texts)} pictures, report.json")

    def kept(self) -> str:
        return f"{self.out} keeps every finished picture; the same command goes on there"
