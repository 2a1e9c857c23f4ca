"""The command `plan`: what drawing would cost on a machine that is not at hand."""

import contextlib
import dataclasses
import os
import pathlib
import re
from typing import Annotated

from tyro.conf import OmitArgPrefixes, arg

from cascade_jax.cli import console
from cascade_jax.cli.scale import check_dtype

_DEVICES = "(default: the device's)"


@dataclasses.dataclass(frozen=True)
class Assumed:
    """What the model of time assumes of a device."""

    launch: Annotated[float | None, arg(metavar="US", help_behavior_hint=_DEVICES)] = None
    """microseconds that every kernel costs beside its work"""
    bandwidth: Annotated[float | None, arg(metavar="GB/S", help_behavior_hint=_DEVICES)] = None
    """of its memory, in gigabytes a second"""
    matmul: Annotated[float | None, arg(metavar="TFLOPS", help_behavior_hint=_DEVICES)] = None
    """products in bfloat16, in 10^12 operations a second"""
    link: Annotated[float | None, arg(metavar="GB/S", help_behavior_hint=_DEVICES)] = None
    """to other devices, in gigabytes a second"""
    exchange: Annotated[float | None, arg(metavar="US", help_behavior_hint=_DEVICES)] = None
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
class Plan:
    """Compile for devices that are not there: does it fit, kernels and bytes, and the modelled time of a picture."""

    device: Annotated[str, arg(metavar="A,B,C")]
    """h100, h200, a100, b200, v5e, v5p, v6e; with a topology as v5e:2x2 or h100:8"""
    model: Annotated[str, arg(metavar="MODEL")] = "scenes"
    """scenes, or the folder of a converted model"""
    shapes: Annotated[str | None, arg(metavar="A,B,C", help_behavior_hint="")] = None
    """instead of a model, published sizes: llamagen-xl, llamagen-7b, lumina-mgpt-7b, janus-pro-7b"""
    method: Annotated[str, arg(metavar="A,B,C")] = "ar,cascade"
    """methods; speedups are against ar"""
    batch: Annotated[str, arg(metavar="N,N,...")] = "1"
    """pictures drawn at once"""
    mesh: Annotated[str | None, arg(metavar="data=D,model=M", help_behavior_hint="(default: one device)")] = None
    """divide prompts over D and the model over M devices"""
    alpha: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """accepted drafts a step, for the time of a picture and the speedup"""
    dtype: Annotated[str, arg(metavar="float32|bfloat16")] = "bfloat16"
    """of the weights"""
    programs: Annotated[str, arg(metavar="A,B,C")] = "prefill,step,loop,pixels"
    """what to compile; step alone is quickest"""
    json: bool = False
    """print the plans as JSON, and nothing else"""
    out: Annotated[pathlib.Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """receives a page and a JSON file for every model and device, and README.md with all that is there"""
    assumed: OmitArgPrefixes[Assumed] = Assumed()

    def run(self, command: str) -> None:
        with console.bad_input():
            check_dtype(self.dtype)
            self.assumed.check()
            if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", self.batch):
                raise ValueError(f"batch is a list of sizes such as 1,8, not {self.batch!r}")
            if self.alpha is not None and not 0 <= self.alpha < float("inf"):
                raise ValueError(f"alpha must be at least 0, not {self.alpha}")
            from cascade_jax import files
            from cascade_jax import mesh as meshes
            from cascade_jax.measure.plan import PROGRAMS, describe

            for name in self.programs.split(","):
                if name not in PROGRAMS:
                    raise ValueError(f"unknown program {name!r}; known: {', '.join(PROGRAMS)}")
            sizes = self.mesh and meshes.parse(self.mesh)
            devices = [
                describe(name, sizes["data"] * sizes["model"] if sizes else 1) for name in self.device.split(",")
            ]
            if self.out is not None:
                files.check_folder(self.out)
            with compile_only():
                bundles = self._bundles()
        with compile_only():
            plans = [self._plan(name, bundle, device, sizes) for name, bundle in bundles.items() for device in devices]
        self._report(plans, command)

    def _bundles(self) -> dict:
        """Models by name, shapes in place of parameters."""
        from cascade_jax import bundle as bundles
        from cascade_jax import pipeline
        from cascade_jax.measure import shapes

        if self.shapes is not None:
            return {name: bundles.abstract(shapes.config_of(name), self.dtype) for name in self.shapes.split(",")}
        config = bundles.read_config(pipeline.folder(self.model))
        return {self.model: bundles.abstract(config, self.dtype)}

    def _plan(self, name: str, bundle, device, sizes):
        from cascade_jax.measure.plan import PROGRAMS, plan

        with console.bad_input():
            return plan(
                bundle, device, list(dict.fromkeys(self.method.split(","))), name=name, mesh=sizes, alpha=self.alpha,
                batches=[int(size) for size in dict.fromkeys(self.batch.split(","))],
                roofline=self.assumed.over(device.roofline), progress=console.say,
                programs=[program for program in PROGRAMS if program in self.programs.split(",")],
            )  # fmt: skip

    def _report(self, plans: list, command: str) -> None:
        import json

        from cascade_jax.measure.plan import report

        if self.out is not None:
            report.write(self.out, plans, command)
        if self.json:
            print(json.dumps([plan.json() for plan in plans], indent=2, ensure_ascii=False))
        else:
            for plan in plans:
                print(f"\n{report.title(plan)}\n{report.assumptions(plan).replace('**', '')}\n")
                console.show(*report.tables(plan))
        if self.out is not None and not self.json:
            print(f"written to {self.out}: {', '.join(f'{report.page(plan)}.md' for plan in plans)}")
        lines = [f"{report.title(plan)}: {line}" for plan in plans for line in report.misfits(plan)]
        if lines:
            cases = sum(len(plan.cases) for plan in plans)
            what = "; ".join(lines)
            raise console.BadInput(
                f"{len(lines)} of {cases} do not fit: {what}; try a smaller batch, or --mesh with more model="
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
