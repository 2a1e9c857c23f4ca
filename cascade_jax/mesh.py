"""Many devices as one: a mesh of `data` x `model` devices, and where arrays lie on it.

Prompts are divided over `data`, and every network over `model`: heads, feed-forward width and vocabulary. JAX
partitions the programs; what the code says is where a few arrays lie. It says so to whatever mesh is in force
(`jax.set_mesh`), and without one all of this does nothing.
"""

import dataclasses
import re
from typing import Any

import jax
from flax import struct
from jax.sharding import AxisType, Mesh, PartitionSpec

DATA, MODEL = "data", "model"


def parse(text: str) -> dict[str, int]:
    """{"data": D, "model": M} from text such as "data=2,model=4"; what is not named is 1.

    Raises:
      ValueError: if it is anything else.
    """
    if not re.fullmatch(rf"({DATA}|{MODEL})=[1-9]\d{{0,5}}(,({DATA}|{MODEL})=[1-9]\d{{0,5}})?", text):
        raise ValueError(f"a mesh is given as data=2,model=4, not {text!r}")
    sizes = [pair.split("=") for pair in text.split(",")]
    if len({name for name, _ in sizes}) < len(sizes):
        raise ValueError(f"the mesh {text!r} names an axis twice")
    return {DATA: 1, MODEL: 1} | {name: int(size) for name, size in sizes}


def make(data: int = 1, model: int = 1) -> Mesh:
    """A mesh of this process's first data x model devices.

    Raises:
      ValueError: if there are fewer.
    """
    devices = jax.local_devices()
    if data * model > len(devices):
        raise ValueError(
            f"a mesh of data={data},model={model} needs {data * model} devices, and there are {len(devices)}"
        )
    kinds = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((data, model), (DATA, MODEL), kinds, devices=devices[: data * model])


def shards() -> int:
    """Over how many devices a network is divided by the mesh in force; 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get(MODEL, 1)


def divided(x: jax.Array, axis: int) -> jax.Array:
    """`x`, its `axis` over the devices of `model`, if that goes without a remainder."""
    if shards() == 1 or x.shape[axis] % shards():
        return x
    spec = [None] * x.ndim
    spec[axis] = MODEL
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def on_each(function, x: jax.Array, outputs: int):
    """`function` of every device's own part of `x`, which is divided along the last axis; so are its outputs.

    For what XLA would rather gather than divide.
    """
    spec = PartitionSpec(*[None] * (x.ndim - 1), MODEL)
    return jax.shard_map(function, in_specs=spec, out_specs=(spec,) * outputs, axis_names={MODEL}, check_vma=False)(x)


def anywhere(flag: jax.Array) -> jax.Array:
    """Whether `flag`, bool [], holds on any row of devices, for rows that take the same number of steps.

    They have to where a network is divided: XLA may turn what a row exchanges into one collective of all devices, and
    a row that takes part once more than another would wait for ever (on CPUs it does).
    """
    if shards() == 1 or DATA not in jax.sharding.get_abstract_mesh().manual_axes:
        return flag
    return jax.lax.pmax(flag.astype(jax.numpy.int32), DATA) > 0


def whole(x: jax.Array) -> jax.Array:
    """`x`, all of it on every device of `model`."""
    return x if shards() == 1 else jax.lax.with_sharding_constraint(x, PartitionSpec())


def by_row() -> Any:
    """A struct's field whose arrays have a row for every guidance branch of every sequence, [R, ...]."""
    return struct.field(metadata={"rows": True})


def by_sequence() -> Any:
    """A struct's field whose arrays have a row for every sequence, [B, ...]."""
    return struct.field(metadata={"rows": False})


def lies_by_row(field: dataclasses.Field) -> bool:
    """Whether a struct's field was marked by `by_row`."""
    return field.metadata.get("rows", False)
