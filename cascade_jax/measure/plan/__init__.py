"""What drawing would cost on a machine that is not at hand: compiled for it, counted, and put into a model of time.

    made = plan(abstract(config, "bfloat16"), describe("h100"), ["ar", "cascade"], batches=[1], alpha=3.8)
    made.cases[1].step.kernels

Kernels, bytes and memory are the compiler's; times are a model's (see `plan.model`) until they are measured.
"""

import contextlib
import dataclasses
import importlib.metadata
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from cascade_jax import methods as by_name
from cascade_jax import platforms
from cascade_jax.bundle import Bundle
from cascade_jax.measure import kernels as reading
from cascade_jax.measure.devices import Device, DeviceError, Roofline, describe
from cascade_jax.measure.kernels import OTHER, PHASES
from cascade_jax.measure.plan import model
from cascade_jax.measure.plan.model import Collective, Copies, Cost, Dear
from cascade_jax.measure.plan.programs import PROGRAMS, Compiled, Compiler
from cascade_jax.methods import Method
from cascade_jax.tree import name_of

__all__ = ["OTHER", "PHASES", "PROGRAMS", "Case", "DeviceError", "Plan", "ProgramPlan", "describe", "plan"]


@dataclass(frozen=True)
class ProgramPlan:
    """One program; on a mesh, one device's part of it.

    Attributes:
      compile_seconds: on this machine.
      arguments: bytes, as `outputs`, `temporaries` and `code`: see `programs.Compiled`.
      phases: costs by phase; of a loop, those of a turn, as all that follows.
      dearest: where the time goes.
    """

    compile_seconds: float
    arguments: int
    outputs: int
    temporaries: int
    code: int
    phases: dict[str, Cost]
    collectives: list[Collective]
    copies: Copies
    dearest: list[Dear]

    @property
    def total(self) -> Cost:
        """The costs of all phases."""
        return model.total(self.phases.values())


@dataclass(frozen=True)
class Picture:
    """A batch of pictures, modelled: seconds of its prefill, its steps and its pixels, and of all that were compiled.

    Steps are turns of the loop, where that was compiled: alone, a step may copy what the loop writes in place.

    Attributes:
      tokens_per_step: as given.
      speedup: token-by-token decoding's seconds over these; None where that was not planned.
    """

    prefill: float
    steps: float
    pixels: float | None
    seconds: float
    tokens_per_step: float
    speedup: float | None


@dataclass(frozen=True)
class Case:
    """A method at a batch size.

    Attributes:
      method: its label.
      weights: bytes of the parameters on a device that it draws with: no drafter's if it needs none.
      needed: bytes on a device when most is in use: all of these parameters, and the largest of the programs.
      fits: whether the device has as many.
      problem: what the compiler said of a program that it could not fit; None for nothing.
      programs: those that were compiled.
      picture: None where the tokens of a step are not given, or a program is missing.
    """

    method: str
    tree: str
    batch: int
    weights: int
    needed: int
    fits: bool
    problem: str | None
    programs: dict[str, ProgramPlan]
    picture: Picture | None = None

    @property
    def step(self) -> Cost | None:
        """The cost of a step: of the program of that name, or of a turn of the loop."""
        return self._total("step", "loop")

    @property
    def turn(self) -> Cost | None:
        """The cost of a turn of the loop, or of a step alone."""
        return self._total("loop", "step")

    def _total(self, *names: str) -> Cost | None:
        return next((self.programs[name].total for name in names if name in self.programs), None)


@dataclass(frozen=True)
class Plan:
    """Plans of a model on a device.

    Attributes:
      name: the model's.
      mesh: its sizes; None for one device.
      weights: bytes of parameters on one device, by part.
      prompt: slots of the prefix that was planned with.
      alpha: accepted drafts a step that pictures are reckoned with; None for none.
      versions: of what compiled.
    """

    name: str
    dtype: str
    device: Device
    mesh: dict[str, int] | None
    roofline: Roofline
    weights: dict[str, int]
    prompt: int
    length: int
    alpha: float | None
    versions: dict[str, str]
    cases: list[Case]

    def json(self) -> dict[str, Any]:
        """As plain data, with the totals."""
        made = dataclasses.asdict(self)
        for case, plain in zip(self.cases, made["cases"]):
            plain["step"] = case.step and dataclasses.asdict(case.step)
            for name, program in case.programs.items():
                plain["programs"][name]["total"] = dataclasses.asdict(program.total)
        return made


def plan(
    bundle: Bundle,
    device: Device,
    methods: Sequence[str | Method] | Mapping[str, Method],
    *,
    batches: Sequence[int] = (1,),
    mesh: dict[str, int] | None = None,
    alpha: float | None = None,
    roofline: Roofline | None = None,
    programs: Sequence[str] = PROGRAMS,
    name: str = "",
    progress: Callable[[str], None] = lambda what: None,
) -> Plan:
    """Plans a model on a device.

    Args:
      bundle: shapes in place of parameters, see `bundle.abstract`.
      methods: by name, or made; or made ones by label.
      batches: pictures drawn at once, on the whole mesh.
      mesh: sizes as of `mesh.parse`; `device` must have as many.
      alpha: accepted drafts a step, for the pictures' times of all methods but "ar".
      roofline: in place of the device's own.
      programs: which of PROGRAMS to compile; on a mesh prefill and loop are what there is.

    Raises:
      DeviceError: if nothing compiles for the device.
      ValueError: for unknown methods, and if the mesh does not divide the model or the batch.
    """
    roofline = device.roofline if roofline is None else roofline
    rows = 1 if mesh is None else mesh["data"]
    for batch in batches:
        if batch % rows:
            raise ValueError(f"a batch of {batch} cannot be divided over data={rows}")
    with platforms.lowering(device.platform):
        if not isinstance(methods, Mapping):
            chosen = [made_for(bundle, method) if isinstance(method, str) else method for method in methods]
            methods = {method.name: method for method in chosen}
        compiler = Compiler(bundle, device, mesh)
        weights = {part: _bytes_on_one(tree) for part, tree in compiler.weights.items()}
        cases = [
            _case(compiler, label, method, batch, weights, roofline, programs, progress)
            for batch in batches
            for label, method in methods.items()
        ]
        prompt = compiler.prompt_slots()
    cases = [_with_picture(case, cases, bundle.length, alpha) for case in cases]
    return Plan(
        name=name,
        dtype=str(jax.tree.leaves(bundle.params["target"])[0].dtype),
        device=device,
        mesh=mesh,
        roofline=roofline,
        weights=weights,
        prompt=prompt,
        length=bundle.length,
        alpha=alpha,
        versions=_versions(device),
        cases=cases,
    )


def made_for(bundle: Bundle, name: str, **settings) -> Method:
    """A method for a bundle of shapes, as of `methods.method`: LANTERN's table, which only its size matters of, is
    empty."""
    by_name.check_name(name)
    if "neighbours" in by_name.takes(name) and bundle.neighbours is None:
        codes = bundle.config.target.codebook_size
        bundle = dataclasses.replace(bundle, neighbours=np.zeros((codes, min(1000, codes - 1)), np.int32))
    return by_name.method(name, bundle, **settings)


def _case(compiler: Compiler, label: str, method: Method, batch: int, weights, roofline, programs, progress) -> Case:
    available, made, problem = compiler.programs(method, batch), {}, None
    drafted = method.tree.depth and method.drafter is None
    weights = weights if drafted else {part: size for part, size in weights.items() if part != "drafter"}
    needed = sum(weights.values())
    for name in programs:
        if name not in available:
            continue
        progress(f"{compiler.device.name}: {name} of {label}, batch {batch}")
        try:
            compiled = available[name]()
        except jax.errors.JaxRuntimeError as error:
            problem = problem or _too_large(name, error)
            continue
        made[name] = _program(compiled, name, compiler.device, roofline)
        taken = ("vq",) if name == "pixels" else ("target", "drafter")
        others = sum(size for part, size in weights.items() if part not in taken)
        needed = max(needed, others + compiled.arguments + compiled.outputs + compiled.temporaries + compiled.code)
    fits = problem is None and needed <= compiler.device.memory
    return Case(label, name_of(method.tree), batch, sum(weights.values()), needed, fits, problem, made)


def _too_large(name: str, error: Exception) -> str:
    """What a compiler says of a program that the device has no room for.

    Raises:
      The error, if it is another.
    """
    said = str(error)
    if "RESOURCE_EXHAUSTED" not in said:
        raise error
    found = re.search(r"Ran out of memory.*?(?=\. HLO module|\.\s|\n|$)", said)
    return f"{name} does not compile: {found[0] if found else said.splitlines()[0]}"


def _program(compiled: Compiled, name: str, device: Device, roofline: Roofline) -> ProgramPlan:
    read = reading.body if name == "loop" else reading.kernels
    kernels = read(compiled.text, device.platform)
    if name in ("prefill", "pixels"):
        kernels = [dataclasses.replace(kernel, phase=name) for kernel in kernels]
    return ProgramPlan(
        compile_seconds=compiled.seconds,
        arguments=compiled.arguments,
        outputs=compiled.outputs,
        temporaries=compiled.temporaries,
        code=compiled.code,
        phases=model.by_phase(kernels, roofline, beside=device.platform == "tpu"),
        collectives=model.collectives(kernels),
        copies=model.copies(kernels),
        dearest=model.dearest(kernels, roofline),
    )


def _with_picture(case: Case, cases: Sequence[Case], length: int, alpha: float | None) -> Case:
    seconds = _picture(case, length, alpha)
    if seconds is None:
        return case
    strict = next((other for other in cases if other.method == by_name.AR and other.batch == case.batch), None)
    against = strict and _picture(strict, length, alpha)
    speedup = against.seconds / seconds.seconds if against else None
    return dataclasses.replace(case, picture=dataclasses.replace(seconds, speedup=speedup))


def _picture(case: Case, length: int, alpha: float | None) -> Picture | None:
    """A prefill, which yields the first token, steps for the others, and pixels."""
    if "prefill" not in case.programs or case.turn is None or (case.method != by_name.AR and alpha is None):
        return None
    tokens = 1.0 if case.method == by_name.AR else alpha + 1
    prefill, steps = case.programs["prefill"].total.seconds, (length - 1) / tokens * case.turn.seconds
    pixels = case.programs["pixels"].total.seconds if "pixels" in case.programs else None
    return Picture(prefill, steps, pixels, prefill + steps + (pixels or 0.0), tokens, None)


def _bytes_on_one(tree) -> int:
    """Bytes of parameters on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _versions(device: Device) -> dict[str, str]:
    compilers = {"tpu": "libtpu", "cuda": "jax-cuda13-plugin", "rocm": "jax-rocm7-plugin"}
    packages = ("jax", "jaxlib", compilers[device.platform])
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
