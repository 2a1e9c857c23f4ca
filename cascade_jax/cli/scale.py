"""Commands for this machine and others: generate-list, tune-tree, export, run-exported."""

import dataclasses
import pathlib
import time
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from cascade_jax.cli import console

Model = Annotated[str, arg(metavar="MODEL")]
File = Annotated[pathlib.Path, arg(metavar="FILE")]
Dtype = Annotated[str | None, arg(metavar="float32|bfloat16", help_behavior_hint="(default: float32 on CPU)")]


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which of the processes that share a piece of work this is."""

    distributed: bool = False
    """meet the other processes that the cluster started"""
    coordinator: Annotated[str | None, arg(metavar="HOST:PORT", help_behavior_hint="")] = None
    """instead, meet at process 0 on this host; needs --processes and --process"""
    processes: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """how many there are"""
    process: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """which of them this is, from 0"""
    patience: Annotated[float, arg(metavar="SECONDS")] = 600.0
    """how long process 0 waits for a further picture of the others"""

    def check(self) -> None:
        """Raises a ValueError unless the flags fit together."""
        place = self.coordinator, self.processes, self.process
        if any(x is None for x in place) and any(x is not None for x in place):
            raise ValueError("--coordinator, --processes and --process go together")
        if self.processes is not None and not 0 <= self.process < self.processes:
            raise ValueError(f"process must be between 0 and {self.processes - 1}, not {self.process}")

    def join(self) -> tuple[int, int]:
        """Meets the others: this process's number, and how many there are; (0, 1) where there are no others."""
        from cascade_jax.evaluation import jobs

        if not (self.distributed or self.coordinator):
            return 0, 1
        return jobs.join(self.coordinator, self.processes, self.process)


@dataclasses.dataclass(frozen=True)
class GenerateList:
    """Draw a file of prompts, on one process or many; started again, it goes on where it stopped."""

    prompts: Annotated[Positional[pathlib.Path], arg(metavar="FILE")]
    """a text file with a prompt a line"""
    out: Annotated[pathlib.Path, arg(metavar="DIR")]
    """receives NUMBER.png and NUMBER.json, and report.json at the end; all processes must see it"""
    model: Model = "scenes"
    """scenes, or the folder of a converted model"""
    method: Annotated[str, arg(metavar="METHOD")] = "cascade"
    """ar, eagle, lantern, lantern++, gsd or cascade"""
    tree: Annotated[str | None, arg(metavar="TREE", help_behavior_hint="(default: the method's)")] = None
    """draft tree, as of generate"""
    settings: Annotated[tuple[str, ...], arg(metavar="NAME=VALUE...", help_behavior_hint="")] = ()
    """settings of the method, such as tau_pos=0.9"""
    batch: Annotated[int, arg(metavar="N")] = 16
    """pictures that a process draws at once"""
    seed: Annotated[int, arg(metavar="N")] = 0
    """picture i depends on its prompt, i and this alone"""
    dtype: Dtype = None
    """of the weights"""
    mesh: Annotated[str | None, arg(metavar="data=D,model=M", help_behavior_hint="(default: one device)")] = None
    """divide a process's prompts over D and the model over M of its devices"""
    evaluate: bool = False
    """of scenes: let the package's judge read how far pictures follow their prompts"""
    shared: OmitArgPrefixes[Processes] = Processes()

    def run(self, command: str) -> None:
        with console.bad_input():
            at_least_one("batch", self.batch)
            check_seed(self.seed)
            self.shared.check()
            check_dtype(self.dtype)
            settings = parse_settings(self.settings)
            from cascade_jax import bundle as bundles
            from cascade_jax import mesh as meshes
            from cascade_jax import methods, pipeline
            from cascade_jax.bundle import default_sampling
            from cascade_jax.evaluation import files, jobs, metrics
            from cascade_jax.text import captions

            methods.check_name(self.method)
            sizes = self.mesh and meshes.parse(self.mesh)
            given = captions.read(self.prompts)
            texts = [caption.text for caption in given]
            files.check_folder(self.out)
            directory = pipeline.folder(self.model)
            if self.evaluate and bundles.read_config(directory).text != "scenes":
                raise ValueError("--evaluate is for scenes, whose prompts a judge can read")
        with console.bad_input():
            own, processes = self.shared.join()
        console.set_up()
        with console.bad_input():
            mesh = meshes.make(**sizes) if sizes else None
            bundle = pipeline.load(self.model, self.dtype, mesh=mesh, batch=self.batch)
            method = chosen_method(bundle, self.method, self.tree, settings)
            captions.check(bundle, given, self.prompts)
            job = {"model": self.model, "method": self.method, "tree": methods.tree_name(method.tree)}
            job |= {"settings": method.settings, "sampling": bundle.config.sampling, "seed": self.seed}
            job |= {"dtype": self.dtype}
            jobs.settle(self.out, {**job, "prompts": texts})
            gauges = metrics.opened(metrics.Order(bundle, say=console.say)) if self.evaluate else []
        numbers = jobs.missing(self.out, range(own, len(texts), processes))
        done, sampling = 0, default_sampling(bundle.config).checked()
        with console.bar("drawing") as progress:
            for count in jobs.draw(
                bundle, method, texts, numbers, self.out, seed=self.seed, batch=self.batch, sampling=sampling
            ):  # fmt: skip
                done += count
                progress(done, len(numbers))
        print(f"process {own} of {processes}: {done} pictures drawn")
        if own == 0:
            with console.bad_input():
                jobs.wait(self.out, len(texts), self.shared.patience, console.say)
                jobs.report(self.out, texts, job, gauges)
            print(f"written to {self.out}: {len(texts)} pictures, report.json")


@dataclasses.dataclass(frozen=True)
class TuneTree:
    """Find the draft tree with the most tokens per second on this machine; it is stored, and used from then on."""

    model: Model = "scenes"
    """scenes, or the folder of a converted model"""
    method: Annotated[str, arg(metavar="METHOD")] = "cascade"
    """eagle, lantern++, gsd or cascade"""
    dtype: Dtype = None
    """of the weights"""
    prompts: Annotated[pathlib.Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """sample prompts, one a line (default: captions of random scenes, for scenes)"""
    count: Annotated[int, arg(metavar="N")] = 8
    """prompts to measure acceptance on"""
    most_drafts: Annotated[int, arg(metavar="N")] = 64
    """size of the largest tree"""
    most_depth: Annotated[int, arg(metavar="N")] = 8
    """depth of the deepest"""
    steps: Annotated[int, arg(metavar="N")] = 32
    """steps to time a tree with"""
    repeats: Annotated[int, arg(metavar="N")] = 5
    """how often"""
    seed: Annotated[int, arg(metavar="N")] = 0
    """of the captions and the pictures"""

    def run(self, command: str) -> None:
        with console.bad_input():
            check_dtype(self.dtype)
            for name in ("count", "most_drafts", "most_depth", "steps", "repeats"):
                at_least_one(name, getattr(self, name))
            from cascade_jax import bundle, methods, pipeline
            from cascade_jax.evaluation import files
            from cascade_jax.measure import tune
            from cascade_jax.scenes import data
            from cascade_jax.text import captions

            methods.check_name(self.method)
            if self.method in ("ar", "lantern"):
                raise ValueError(f"tune-tree takes a method that drafts on a static tree, not {self.method}")
            given = None if self.prompts is None else captions.read(self.prompts)
            folder = pipeline.folder(self.model)
            files.check_file(folder / bundle.TREES)
        console.set_up()
        with console.bad_input():
            loaded = pipeline.load(self.model, self.dtype)
            if given is None and loaded.config.text != "scenes":
                raise ValueError("this model has no captions of its own: give --prompts FILE, with one prompt a line")
            texts = data.random_captions(self.count, self.seed)
            if given is not None:
                captions.check(loaded, given, self.prompts)
                texts = [caption.text for caption in given[: self.count]]
            prompts = loaded.encode(texts)
            methods.method(self.method, loaded)
            loaded.program(tune.EAGLE_25)
        found = tune.tune(
            loaded, self.method, prompts, seed=self.seed, most_drafts=self.most_drafts, most_depth=self.most_depth,
            steps=self.steps, repeats=self.repeats, progress=console.say,
        )  # fmt: skip
        bundle.save_tree(folder, found["device"], self.method, found)
        console.show(tune.table(found))
        print(f"stored: {folder / bundle.TREES}, for {self.method} on {found['device']}: {found['tree']}")


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a model's decoding programs, lowered for several platforms, into one file together with its weights."""

    out: File
    """the file to write"""
    model: Model = "scenes"
    """scenes, or the folder of a converted model"""
    platforms: Annotated[str, arg(metavar="A,B,C")] = "cpu,cuda,rocm,tpu"
    """platforms that the file shall run on"""
    method: Annotated[str, arg(metavar="METHOD")] = "cascade"
    """ar, eagle, lantern, lantern++, gsd or cascade"""
    tree: Annotated[str | None, arg(metavar="TREE", help_behavior_hint="(default: the method's)")] = None
    """draft tree, as of generate"""
    settings: Annotated[tuple[str, ...], arg(metavar="NAME=VALUE...", help_behavior_hint="")] = ()
    """settings of the method, such as tau_pos=0.9"""
    dtype: Dtype = None
    """of the weights"""
    batch: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: any)")] = None
    """pictures drawn at once"""
    slots: Annotated[int, arg(metavar="N")] = 96
    """most text tokens of a prompt, with models that read text themselves"""

    def run(self, command: str) -> None:
        with console.bad_input():
            check_dtype(self.dtype)
            for name in ("batch", "slots"):
                at_least_one(name, getattr(self, name))
            settings = parse_settings(self.settings)
            from cascade_jax import methods, pipeline
            from cascade_jax.evaluation import files
            from cascade_jax.export import artifact
            from cascade_jax.export import programs as export

            files.check_file(self.out)
            platforms = export.check_platforms(self.platforms.split(","))
            methods.check_name(self.method)
        console.set_up()
        with console.bad_input():
            bundle = pipeline.load(self.model, self.dtype)
            method = chosen_method(bundle, self.method, self.tree, settings)
        with console.bad_input(), console.terminable():
            lowered = export.lower(bundle, method, platforms=platforms, batch=self.batch, slots=self.slots)
            artifact.write(self.out, bundle, method, lowered, pipeline.folder(self.model))
        size = self.out.stat().st_size / 1e6
        print(f"exported: {self.out}, {size:.1f} MB, {method.name} for {', '.join(platforms)}")


@dataclasses.dataclass(frozen=True)
class RunExported:
    """Draw pictures with a file that export wrote."""

    file: Annotated[Positional[pathlib.Path], arg(metavar="FILE")]
    """what export wrote"""
    prompts: Annotated[Positional[tuple[str, ...]], arg(metavar="PROMPT...", help_behavior_hint="")] = ()
    """what to draw, a sentence in quotes each"""
    seed: Annotated[int, arg(metavar="N")] = 0
    """picture i of a run depends on its prompt, i and this alone"""
    out: Annotated[pathlib.Path | None, arg(metavar="PATH", help_behavior_hint="")] = None
    """a .png file for one picture, or a folder, as of generate"""

    def run(self, command: str) -> None:
        with console.bad_input():
            if not self.prompts:
                raise ValueError("there is no prompt: give one behind the file")
            check_seed(self.seed)
            from cascade_jax.evaluation import files
            from cascade_jax.export.artifact import Artifact

            paths = files.picture_paths(self.prompts, self.out)
        console.set_up()
        with console.bad_input():
            opened = Artifact(self.file)
            encoded = opened.encode(self.prompts)
            opened.prompts(encoded)
            for name in ("generate", "pictures"):
                opened.program(name)
        begin = time.perf_counter()
        drawn = opened.generate(encoded, self.seed)
        seconds = time.perf_counter() - begin
        for number, path in enumerate(paths):
            files.write_png(path, drawn.images[number], Description=self.prompts[number])
            print(f"{path}  {drawn.stats.steps[number]} steps, alpha {drawn.stats.alpha[number]:.2f}")
        console.say(f"{seconds:.1f} s with compilation")


def chosen_method(bundle, name: str, tree: str | None, settings: dict[str, Any]):
    """A method with a tree and settings that it takes, and that the model can draw by."""
    from cascade_jax import methods

    if unknown := settings.keys() - methods.takes(name):
        raise ValueError(f"{name} does not take {', '.join(sorted(unknown))}")
    method = methods.method(name, bundle, tree=tree, **settings)
    bundle.program(method.tree)
    return method


def sampling_settings(bundle, given: dict[str, Any]) -> dict[str, Any]:
    """The model's sampling settings under these; a guidance scale of 1 draws without guidance, at half the work."""
    settings = bundle.config.sampling | given
    return settings | {"guidance": None} if settings.get("guidance") == 1 else settings


def sampling_of(settings: dict[str, Any]):
    """Checked sampling settings; raises a ValueError for unknown ones, and for what is no number."""
    from cascade_jax.sampling import Sampling

    for name, value in settings.items():
        if isinstance(value, str):
            raise ValueError(f"{name} takes a number, not {value!r}")

    known = [field.name for field in dataclasses.fields(Sampling)]
    if unknown := [name for name in settings if name not in known]:
        raise ValueError(f"unknown sampling settings: {', '.join(unknown)} (there are {', '.join(known)})")
    return Sampling(**settings).checked()


def check_seed(seed: int) -> None:
    """Raises a ValueError unless `seed` is one."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be between 0 and {2**32 - 1}, not {seed}")


def at_least_one(name: str, value: int | None) -> None:
    """Raises a ValueError if `value` is below 1."""
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")


def check_dtype(dtype: str | None) -> None:
    """Raises a ValueError unless `dtype` is one that models run in, or None."""
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, not {dtype!r}")


def parse_settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Settings by name from "name=value"; a number where it looks like one."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise ValueError(f"settings are NAME=VALUE, not {pair!r}")
        settings[name] = value
        for kind in (float, int):  # the last that fits
            try:
                settings[name] = kind(value)
            except ValueError:
                break
    return settings
