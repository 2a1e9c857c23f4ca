"""Flags that commands share: the same thing has the same flag everywhere, and lists are separated by commas."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from cascade_jax import methods
from cascade_jax.cli import console
from cascade_jax.evaluation import metrics
from cascade_jax.tree import NAMED, name_of

_METHODS = "(default: the method's)"
_MODELS = "(default: the model's)"
NO_CAPTIONS = "this model has no captions of its own: give --prompts FILE, with one prompt a line"

Out = Annotated[pathlib.Path, arg(metavar="DIR")]
Seed = Annotated[int, arg(metavar="N")]
Count = Annotated[int, arg(metavar="N")]
Json = Annotated[bool, arg(help_behavior_hint="")]
_KNOWN = f"one of {', '.join(methods.METHODS)}"
Method = Annotated[str, arg(metavar="METHOD", help=_KNOWN)]
_USUAL = f"(default: {methods.CASCADE}; {methods.SCD} for a model without a drafter)"
AnyMethod = Annotated[str | None, arg(metavar="METHOD", help=_KNOWN, help_behavior_hint=_USUAL)]
MOST_SEED = 2**32 - 1


def check_method(name: str | None) -> None:
    """Raises a ValueError that lists the methods unless it is one of them, or none is named."""
    if name is not None:
        methods.check_name(name)


def method_of(bundle, name: str | None) -> str:
    """The method that is named, or the model's usual one; it is said if that is not the paper's."""
    if name is None and (name := methods.usual(bundle)) != methods.CASCADE:
        console.say(f"this model has no drafter: drawn by {name}, which needs none; --method names another")
    return name


def hint(metavar: str, default: str = ""):
    """An argument that says in words what is done without it."""
    return arg(metavar=metavar, help_behavior_hint=default)


def commas(kind: type = str, metavar: str = "A,B,C", default: str | None = None) -> Any:
    """The type of a list that is separated by commas; `default` says in words what is done without it."""

    def read(texts: list[str]) -> tuple:
        parts = [part.strip() for part in texts[0].split(",") if part.strip()]
        try:
            return tuple(kind(part) for part in parts)
        except ValueError as error:
            raise ValueError(f"takes {'whole ' if kind is int else ''}numbers and commas, not {texts[0]!r}") from error

    spec = PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda found: isinstance(found, tuple),
        str_from_instance=lambda found: [",".join(map(str, found))],
    )
    if default is None:
        return Annotated[tuple[kind, ...], spec]
    return Annotated[tuple[kind, ...], spec, arg(help_behavior_hint=default)]


@dataclasses.dataclass(frozen=True)
class Model:
    """Which model."""

    name: Annotated[str, arg(name="model", metavar="MODEL")] = "scenes"
    """scenes, scenes-small, or the folder of a converted model, or hf://OWNER/NAME, which is downloaded"""
    dtype: Annotated[str | None, hint("float32|bfloat16", "(default: what the machine multiplies)")] = None
    """of the weights"""

    def check(self) -> None:
        """Raises a ValueError unless there is such a model, and the flags make sense."""
        from cascade_jax import pipeline

        one_of("dtype", self.dtype, (None, "float32", "bfloat16"))
        pipeline.folder(self.name)

    def load(self, batch: int = 1):
        """The model, with room for so many pictures at once."""
        from cascade_jax import pipeline

        return pipeline.load(self.name, self.dtype, batch=batch)


@dataclasses.dataclass(frozen=True)
class Spread(Model):
    """Which model, and over which devices it is spread."""

    mesh: Annotated[str | None, hint("data=D,model=M", "(default: one device)")] = None
    """divide prompts over D and the model over M devices"""

    def check(self) -> None:
        from cascade_jax import mesh

        super().check()
        if self.mesh is not None:
            mesh.parse(self.mesh)

    def load(self, batch: int = 1):
        from cascade_jax import mesh, pipeline

        devices = None if self.mesh is None else mesh.make(**mesh.parse(self.mesh))
        return pipeline.load(self.name, self.dtype, mesh=devices, batch=batch)


class _Given:
    """Settings of methods; what is not set is the method's default, in which the model may have a say."""

    def given(self) -> dict[str, Any]:
        """What is set."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def method(self, bundle, name: str):
        """A method with these settings, which the model can draw by."""
        return drawable(bundle, name, self.given())

    def methods(self, bundle, wanted: Mapping[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
        """Methods by label, of names and their own settings; what is set here goes to those that take it, the tree to
        those that can have another."""
        given, found = self.given(), {}
        for setting in given.keys() - {"tree"}:
            if not any(setting in methods.takes(name) for name, _ in wanted.values()):
                raise ValueError(f"none of {', '.join(wanted)} takes {setting}")
        for label, (name, own) in wanted.items():
            free = not methods.METHODS[name].bound and not own.get("window")
            fitting = {k: v for k, v in given.items() if k in methods.takes(name) or (k == "tree" and free)}
            found[label] = drawable(bundle, name, fitting | own)
        return found


def made(name: str, base: type, fields: dict[str, tuple[type, str, str, str]]) -> type:
    """A group of flags that registries name: of each its type, metavar, help, and what is done without it in words."""
    flags = []
    for flag, (kind, metavar, about, default) in fields.items():
        words = arg(metavar=metavar, help=about, help_behavior_hint=default)
        flags.append((flag, Annotated[kind | None, words], None))
    group = dataclasses.make_dataclass(name, flags, bases=(base,), frozen=True)
    group.__doc__ = base.__doc__
    return group


def _settings() -> dict[str, tuple[type, str, str, str]]:
    """Trees, and the settings of all registered methods."""
    named = ", ".join((*NAMED, "chain:DEPTH", "full:WIDTHxDEPTH"))
    tree = f'draft tree: {named}, or paths such as "0 1 00 01"; default leaves out what tune-tree found'
    fields = {"tree": (str, "TREE", tree, _METHODS)}
    for setting, takers in methods.settings_of().items():
        metavar = "|".join(setting.choices) or {int: "N", float: "X"}.get(setting.kind, "TEXT")
        fields[setting.name] = setting.kind, metavar, f"{', '.join(takers)}: {setting.about}", _METHODS
    return fields


Settings = made("Settings", _Given, _settings())


@dataclasses.dataclass(frozen=True)
class Draws:
    """How tokens are drawn; what is not set is the model's default."""

    temperature: Annotated[float | None, hint("X", _MODELS)] = None
    """divides the logits; 0 takes the likeliest token"""
    top_k: Annotated[int | None, hint("N", _MODELS)] = None
    """draw from the N likeliest tokens"""
    top_p: Annotated[float | None, hint("X", _MODELS)] = None
    """draw from the likeliest tokens that make up this probability"""
    guidance: Annotated[float | None, hint("X", _MODELS)] = None
    """classifier-free guidance scale; 1 draws without, at half the work"""

    def of(self, bundle) -> tuple[dict[str, Any], Any]:
        """The model's settings under these, as they are reported and as they are drawn by."""
        from cascade_jax.sampling import Sampling

        settings = bundle.config.sampling | {name: value for name, value in vars(self).items() if value is not None}
        if settings.get("guidance") == 1:
            settings["guidance"] = None
        known = [field.name for field in dataclasses.fields(Sampling)]
        if unknown := [name for name in settings if name not in known]:
            raise ValueError(f"the model's config.json has unknown sampling settings: {', '.join(unknown)}")
        return settings, Sampling(**settings).checked()


class _Measured:
    """What pictures are measured with."""

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


Metrics = made(
    "Metrics",
    _Measured,
    {flag.name: (flag.kind, flag.metavar, flag.help, flag.hint) for flag in metrics.flags()},
)


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which of the processes that share a piece of work this is."""

    distributed: bool = False
    """meet the other processes that the cluster started"""
    coordinator: Annotated[str | None, hint("HOST:PORT")] = None
    """instead, meet at process 0 on this host; needs --processes and --process"""
    processes: Annotated[int | None, hint("N")] = None
    """how many there are"""
    process: Annotated[int | None, hint("N")] = None
    """which of them this is, from 0"""

    def check(self) -> None:
        """Raises a ValueError unless the flags fit together."""
        place = self.coordinator, self.processes, self.process
        if any(x is None for x in place) and any(x is not None for x in place):
            raise ValueError("--coordinator, --processes and --process go together")
        if self.processes is not None and not 0 <= self.process < self.processes:
            raise ValueError(f"process must be between 0 and {self.processes - 1}, not {self.process}")

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return not (self.distributed or self.coordinator)

    def owned(self, folder: pathlib.Path) -> pathlib.Path | None:
        """A folder that processes share: the first owns it. Those of a cluster learn too late which is the first."""
        return None if self.distributed or self.process else folder

    def join(self, recoverable: bool = True) -> tuple[int, int]:
        """Meets the others: this process's number, and how many there are; (0, 1) where there are no others.

        Args:
          recoverable: whether one may die and come back while the others go on.
        """
        from cascade_jax.evaluation import jobs

        if self.alone:
            return 0, 1
        return jobs.join(self.coordinator, self.processes, self.process, recoverable)


@dataclasses.dataclass(frozen=True)
class Waiting(Processes):
    """Which of the processes that share a piece of work this is; the first waits for the others."""

    patience: Annotated[float, arg(metavar="SECONDS")] = 600.0
    """how long process 0 waits for a further picture of the others"""


def drawable(bundle, name: str, settings: dict[str, Any]):
    """A method by name, which the model can draw by."""
    takes = methods.takes(name)
    if bundle.neighbours is None and not bundle.config.of_scenes and "neighbours" in takes:
        console.say("making the table of neighbours; cascade-jax neighbours MODEL stores it with the model")
    method = methods.method(name, bundle, **settings)
    method.program(bundle)
    if method.tuned:
        tree = name_of(method.tree)
        console.say(f"{name} drafts on {tree}, which tune-tree found for this machine (--tree default leaves it out)")
    return method


def captions(bundle, given, file: pathlib.Path | None, count: int, seed: int) -> list:
    """Captions that the model can read: those `given`, of `file`; or of `count` random scenes, if they are None."""
    from cascade_jax.text import captions as reader

    if given is None:
        if not bundle.config.of_scenes:
            raise ValueError(NO_CAPTIONS)
        return reader.read("scenes", count, seed)
    reader.check(bundle, given, file)
    return given


def texts(bundle, given, file: pathlib.Path | None, count: int, seed: int) -> list[str]:
    """`count` texts of `captions`, those of a file over and over."""
    found = captions(bundle, given, file, count, seed)
    return [found[i % len(found)].text for i in range(count)]


def names(chosen: Sequence[str]) -> list[str]:
    """Names of methods, each once; raises a ValueError for an unknown one."""
    for name in chosen:
        methods.check_name(name)
    return list(dict.fromkeys(chosen))


def at_least(low: int, **values: int | None) -> None:
    """Raises a ValueError that names the first value below `low`; None is none."""
    for name, value in values.items():
        if value is not None and value < low:
            raise ValueError(f"{name} must be at least {low}, not {value}")


def check_seed(seed: int) -> None:
    """Raises a ValueError unless `seed` is one."""
    if not 0 <= seed <= MOST_SEED:
        raise ValueError(f"seed must be between 0 and {MOST_SEED}, not {seed}")


def one_of(name: str, value: str | None, known: Sequence[str | None]) -> None:
    """Raises a ValueError unless the value is known."""
    if value not in known:
        raise ValueError(f"{name} must be {' or '.join(x for x in known if x is not None)}, not {value!r}")
