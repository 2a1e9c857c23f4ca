"""The command `plan`: what drawing would cost on a machine that is not at hand."""

import contextlib
import dataclasses
import json
import os
import pathlib
from typing import Annotated

from tyro.conf import OmitArgPrefixes, arg

from cascade_jax import methods
from cascade_jax.cli import console, flags
from cascade_jax.cli.command import Command
from cascade_jax.cli.evaluate import parse_methods

_DEVICES = "(default: the device's)"


@dataclasses.dataclass(frozen=True)
class Assumed:
    """What the model of time assumes of a device."""

    launch: Annotated[float | None, flags.hint("US", _DEVICES)] = None
    """microseconds that every kernel costs beside its work"""
    bandwidth: Annotated[float | None, flags.hint("GB/S", _DEVICES)] = None
    """of its memory, in gigabytes a second"""
    matmul: Annotated[float | None, flags.hint("TFLOPS", _DEVICES)] = None
    """products in bfloat16, in 10^12 operations a second"""
    link: Annotated[float | None, flags.hint("GB/S", _DEVICES)] = None
    """to other devices, in gigabytes a second"""
    exchange: Annotated[float | None, flags.hint("US", _DEVICES)] = None
    """microseconds that every exchange with other devices costs beside its bytes"""

    def check(self) -> None:
        """Raises a ValueError for what no device has."""
        for name, value in vars(self).items():
            if value is not None and not (0 < value < 1e9 or (value == 0 and name in ("launch", "exchange"))):
                raise ValueError(f"{name} is out of range: {value:g}")

    def over(self, roofline):
        """A device's own figures under these."""
        units = {"launch": 1e-6, "bandwidth": 1e9, "matmul": 1e12, "link": 1e9, "exchange": 1e-6}
        given = {name: value * units[name] for name, value in vars(self).items() if value is not None}
        return dataclasses.replace(roofline, **given)


@dataclasses.dataclass(frozen=True)
class Plan(Command):
    """Parameters are shapes only, so nothing has to fit here."""

    device: flags.commas()
    """h100, h200, a100, b200, mi300x, v5e, v5p, v6e; with a topology as v5e:2x2 or h100:8"""
    model: Annotated[str, arg(metavar="MODEL")] = "scenes"
    """scenes, scenes-small, or the folder of a converted model"""
    shapes: flags.commas(default="") = ()
    """instead of a model, published sizes: llamagen-xl, llamagen-7b, lumina-mgpt-7b, janus-pro-7b,
    lumina-mgpt-2-7b, emu3-gen-8b, emu3.5-image-34b, simplear-0.5b, simplear-1.5b, liquid-7b"""
    method: flags.commas() = (methods.AR, methods.CASCADE)
    """methods, also with settings and a name: ar, wide=scd:window=32; speedups are against ar"""
    batch: flags.commas(int, "N,N,...") = (1,)
    """pictures drawn at once"""
    mesh: Annotated[str | None, flags.hint("data=D,model=M", "(default: one device)")] = None
    """divide prompts over D and the model over M devices"""
    alpha: Annotated[float | None, flags.hint("X")] = None
    """accepted drafts a step, for the time of a picture and the speedup"""
    dtype: Annotated[str, arg(metavar="float32|bfloat16")] = "bfloat16"
    """of the weights"""
    programs: flags.commas() = ("prefill", "step", "loop", "pixels")
    """what to compile; step alone is quickest"""
    json: flags.Json = False
    """print the plans as JSON, and nothing else"""
    out: Annotated[pathlib.Path | None, flags.hint("DIR")] = None
    """receives a page and a JSON file for every model and device, and README.md with all that is there"""
    assumed: Annotated[OmitArgPrefixes[Assumed], arg(name="assumption")] = Assumed()

    def check(self):
        flags.one_of("dtype", self.dtype, ("float32", "bfloat16"))
        self.assumed.check()
        flags.at_least(1, batch=min(self.batch, default=0))
        if self.alpha is not None and not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha must be at least 0, not {self.alpha}")
        parse_methods(self.method)
        from cascade_jax import files
        from cascade_jax import mesh as meshes
        from cascade_jax.measure.plan import PROGRAMS, describe

        for name in self.programs:
            if name not in PROGRAMS:
                raise ValueError(f"unknown program {name!r}; known: {', '.join(PROGRAMS)}")
        sizes = self.mesh and meshes.parse(self.mesh)
        devices = [describe(name, sizes["data"] * sizes["model"] if sizes else 1) for name in self.device]
        if self.out is not None:
            files.check_folder(self.out)
        return devices, sizes

    def owns(self) -> pathlib.Path | None:
        return self.out

    def load(self, checked):
        with compile_only():
            return self._bundles(), *checked

    def run(self, loaded, line) -> None:
        from cascade_jax.measure.plan import report

        bundles, devices, sizes = loaded
        plans = []
        for name, bundle in bundles.items():
            for device in devices:
                with compile_only():
                    plans.append(self._plan(name, bundle, device, sizes))
                if self.out is not None:
                    report.write(self.out, plans[-1:], line)
        self._report(plans)

    def _bundles(self) -> dict:
        """Models by name, shapes in place of parameters."""
        from cascade_jax import bundle as bundles
        from cascade_jax import pipeline
        from cascade_jax.measure import shapes

        if self.shapes:
            return {name: bundles.abstract(shapes.config_of(name), self.dtype) for name in self.shapes}
        config = bundles.read_config(pipeline.folder(self.model))
        return {self.model: bundles.abstract(config, self.dtype)}

    def _plan(self, name: str, bundle, device, sizes):
        from cascade_jax import platforms
        from cascade_jax.measure.plan import PROGRAMS, made_for, plan

        with console.bad_input(), platforms.lowering(device.platform):
            chosen = {
                label: made_for(bundle, own, **given) for label, (own, given) in parse_methods(self.method).items()
            }
            return plan(
                bundle, device, chosen, name=name, mesh=sizes, alpha=self.alpha,
                batches=list(dict.fromkeys(self.batch)), roofline=self.assumed.over(device.roofline),
                progress=console.step, programs=[program for program in PROGRAMS if program in self.programs],
            )  # fmt: skip

    def _report(self, plans: list) -> None:
        from cascade_jax.measure.plan import report

        if self.json:
            print(json.dumps([plan.json() for plan in plans], indent=2, ensure_ascii=False))
        else:
            for plan in plans:
                print(f"\n{report.title(plan)}\n{report.assumptions(plan).replace('**', '')}\n")
                console.show(*report.tables(plan))
        if self.out is not None and not self.json:
            print(f"written to {self.out}: {', '.join(f'{report.page(plan)}.md' for plan in plans)}")
        misfits = [f"{report.title(plan)}: {line}" for plan in plans for line in report.misfits(plan)]
        if misfits:
            cases = sum(len(plan.cases) for plan in plans)
            what = "; ".join(misfits)
            raise console.BadInput(
                f"{len(misfits)} of {cases} do not fit: {what}; try a smaller batch, or --mesh with more model="
            )


@contextlib.contextmanager
def compile_only():
    """Keeps JAX from looking for the devices that are planned for, and what is compiled in the block out of its cache.

    Has to come before JAX meets any device.
    """
    wanted = os.environ.get("JAX_PLATFORMS")
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    before = jax.config.jax_platforms, jax.config.jax_enable_compilation_cache
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_platforms", before[0])
        jax.config.update("jax_enable_compilation_cache", before[1])
        os.environ.pop("JAX_PLATFORMS")
        if wanted is not None:
            os.environ["JAX_PLATFORMS"] = wanted
