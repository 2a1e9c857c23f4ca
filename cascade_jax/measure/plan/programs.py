"""The programs of a picture, compiled from shapes alone for devices that need not be there."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from cascade_jax import bundle as bundles
from cascade_jax import decode, pipeline, sharding
from cascade_jax.bundle import Bundle, default_sampling
from cascade_jax.measure.devices import Device
from cascade_jax.mesh import DATA, MODEL
from cascade_jax.methods import Method
from cascade_jax.sampling import Sampling
from cascade_jax.tree import ROOT

PROGRAMS = ("prefill", "step", "loop", "pixels")


@dataclass(frozen=True)
class Compiled:
    """A compiled program; on a mesh, one device's part of it.

    Attributes:
      text: its scheduled HLO.
      seconds: that lowering and compiling took here.
      arguments: bytes of what goes in, parameters among it.
      outputs: bytes of what comes out and does not take an argument's place.
      temporaries: bytes that it needs beside these while it runs.
      code: bytes of the program itself, where it lies in the device's memory.
    """

    text: str
    seconds: float
    arguments: int
    outputs: int
    temporaries: int
    code: int


class Compiler:
    """Compiles a model's programs for one device, or for a mesh of devices."""

    def __init__(self, bundle: Bundle, device: Device, sizes: dict[str, int] | None = None):
        """`bundle` has shapes for parameters; `sizes` are those of a mesh, see `mesh.parse`.

        Raises:
          DeviceError: if nothing compiles for the device.
          ValueError: if the mesh does not divide the model.
        """
        devices = device.compile_only()
        self.bundle, self.device, self.mesh = bundle, device, None
        self._pictures: dict[int, Compiled] = {}
        self._one = devices[0]
        self._whole: jax.sharding.Sharding = SingleDeviceSharding(self._one)
        if sizes is not None:
            sharding.check(bundle.config, sizes[MODEL])
            grid = np.array(devices[: sizes[DATA] * sizes[MODEL]]).reshape(sizes[DATA], sizes[MODEL])
            self.mesh = Mesh(grid, (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))
            self._whole = NamedSharding(self.mesh, PartitionSpec())
        self.weights = {part: self._placed(part, tree) for part, tree in bundle.params.items() if tree is not None}

    def programs(self, method: Method, batch: int) -> dict[str, Callable[[], Compiled]]:
        """What compiles each of PROGRAMS, for a batch drawn with `method`; on a mesh the step is the loop's body."""
        sampling = default_sampling(self.bundle.config).checked()
        bundle, program = method.on(self.bundle), method.program(self.bundle)
        params = {"target": self.weights["target"], "drafter": None}
        if program.drafter is not None:  # one without parameters is not among the weights
            params["drafter"] = self.weights["drafter"] if method.drafter is None else bundle.params["drafter"]
        rule, settings = self._there(method.rule), self._there(sampling)
        if self.mesh is not None:
            return self._on_mesh(program, params, rule, settings, sampling.guidance is not None, batch)
        start = functools.partial(_start, program, sampling.guidance is not None)
        given = params, self._there(self._prompts(batch)), self._there(_keys(batch)), settings
        state = self._there(jax.eval_shape(start, *given))
        return {
            "prefill": lambda: self._compile(jax.jit(start), *given),
            "step": lambda: self._compile(_step, program, params, state, rule, settings),
            "loop": lambda: self._compile(decode.run_jit, program, params, state, rule, settings),
            **self._pixels_of(batch),
        }

    def prompt_slots(self) -> int:
        """Slots of the prefix that programs are compiled for."""
        program = self.bundle.program(ROOT)
        prefix = functools.partial(_prefix, program, False)
        params = {"target": self.weights["target"], "drafter": None}
        return jax.eval_shape(prefix, params, self._prompts(1)).embeddings.shape[1]

    def _on_mesh(self, program, params, rule, sampling, guided: bool, batch: int) -> dict[str, Callable[[], Compiled]]:
        prefix = jax.eval_shape(functools.partial(_prefix, program, guided), params, self._prompts(batch))
        apart = lambda x: jax.ShapeDtypeStruct((x.shape[0] // batch, batch, *x.shape[1:]), x.dtype)
        prefix = self._there(jax.tree.map(apart, prefix), PartitionSpec(None, DATA))
        given = program, params, prefix, self._there(_keys(batch), PartitionSpec(DATA)), sampling

        @functools.cache
        def prefilled():
            return self._traced(sharding.prefill_jit, *given)

        def loop():
            state = jax.eval_shape(functools.partial(sharding.prefill_jit, program), *given[1:])
            lying = prefilled()[0].output_shardings
            placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, lying)
            return self._compile(sharding.run_jit, program, params, placed, rule, sampling, None)

        def within(function):
            def compile_on_mesh():
                with jax.set_mesh(self.mesh):
                    return function()

            return compile_on_mesh

        return {"prefill": within(lambda: _measured(*prefilled())), "loop": within(loop), **self._pixels_of(batch)}

    def _pixels_of(self, batch: int) -> dict[str, Callable[[], Compiled]]:
        return {} if self.bundle.config.vq is None else {"pixels": functools.partial(self._pixels, batch)}

    def _pixels(self, batch: int) -> Compiled:
        """The picture decoder, which is the same for all methods."""
        if batch in self._pictures:
            return self._pictures[batch]
        tokens = jax.ShapeDtypeStruct((batch, self.bundle.length), jnp.int32)
        codes = jax.eval_shape(self.bundle.config.target.codes, tokens)
        on_one = lambda tree: jax.tree.map(lambda x: _on(x, SingleDeviceSharding(self._one)), tree)  # on a mesh, too
        pictures = jax.jit(bundles.pictures, static_argnums=0)
        given = self.bundle.graph("vq"), on_one(self.bundle.params["vq"]), on_one(codes)
        self._pictures[batch] = self._compile(pictures, *given)
        return self._pictures[batch]

    def _compile(self, jitted, *arguments) -> Compiled:
        return _measured(*self._traced(jitted, *arguments))

    def _traced(self, jitted, *arguments):
        begin = time.perf_counter()
        compiled = jitted.trace(*arguments).lower(lowering_platforms=(self.device.platform,)).compile()
        return compiled, time.perf_counter() - begin

    def _prompts(self, batch: int) -> Any:
        """Stacked prompts without meaning, as shapes."""
        target = self.bundle.config.target
        return jax.tree.map(_shape, target.stack([target.blank()] * batch))

    def _there(self, tree, spec: PartitionSpec | None = None) -> Any:
        place = self._whole if spec is None else NamedSharding(self.mesh, spec)
        return jax.tree.map(lambda x: _on(x, place), tree)

    def _placed(self, part: str, tree) -> Any:
        if self.mesh is None:
            return self._there(tree)
        place = sharding.placement(self.mesh)

        def leaf(path, x):
            name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")  # NNX's last step
            return _on(x, place(f"{part}.{name}", x.shape))

        return jax.tree_util.tree_map_with_path(leaf, tree)


_step = jax.jit(decode.step, static_argnums=0, donate_argnums=2)


def _prefix(program, guided: bool, params, prompts) -> decode.Prefix:
    states = params["target"], params["drafter"]
    return bundles.prefix(program.target, program.drafter, guided, states, prompts)


def _start(program, guided: bool, params, prompts, keys, sampling: Sampling) -> decode.DecodeState:
    return decode.prefill(program, params, _prefix(program, guided, params, prompts), keys, sampling)


def _keys(batch: int) -> Any:
    return jax.eval_shape(lambda: pipeline.picture_keys(jax.random.key(0), jnp.arange(batch)))


def _shape(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(x), x.dtype if hasattr(x, "dtype") else jnp.result_type(x))


def _on(x, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return _shape(x).update(sharding=place)


def _measured(compiled, seconds: float) -> Compiled:
    memory = compiled.memory_analysis()
    return Compiled(
        text=compiled.as_text(),
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
    )
