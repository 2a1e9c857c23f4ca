"""A part's parameters as arrays by path, as orbax stores them, and how they lie where they are used."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cascade_jax import platforms
from cascade_jax.models.transformer import output_major

Path = tuple[str, ...]
_LEAST = 2**12  # numbers of an array that is worth being kept as int8
SCALE = "-scale"  # behind the name of what an int8 array is multiplied by


def flat(tree: Any, path: Path = ()) -> dict[Path, Any]:
    """The leaves of nested dictionaries by path."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {p: leaf for key, value in tree.items() for p, leaf in flat(value, (*path, key)).items()}


def nested(leaves: dict[Path, Any]) -> Any:
    """The inverse of `flat`."""
    tree: dict[str, Any] = {}
    for (*folders, name), leaf in leaves.items():
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = leaf
    return tree


def plain(part) -> Any:
    """An NNX state as nested dictionaries with string keys; other trees as they are."""
    if not isinstance(part, nnx.State):
        return part

    def named(tree):
        return {str(k): named(v) for k, v in tree.items()} if isinstance(tree, dict) else tree

    return named(nnx.to_pure_dict(part))


def restored_keys(tree):
    """The inverse of `plain`'s renaming: list positions are integers again."""
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdigit() else k: restored_keys(v) for k, v in tree.items()}


def cast(stored, wanted):
    """The type that an array of the type `stored` gets where floating-point ones get `wanted`."""
    return wanted if jnp.issubdtype(stored, jnp.floating) else stored


def on_disk(path: Path, array: jax.Array, dtype) -> dict[Path, jax.Array]:
    """An array as it is written where floating-point ones become `dtype`, by path.

    With int8 a large kernel or table becomes whole numbers and what every column of the kernel or row of the table is
    multiplied by, float32; vectors and what is small become bfloat16.
    """
    if jnp.dtype(dtype) != jnp.int8:
        return {path: array.astype(cast(array.dtype, dtype))}
    if not path or array.ndim < 2 or array.size < _LEAST or not jnp.issubdtype(array.dtype, jnp.floating):
        return {path: array.astype(cast(array.dtype, jnp.bfloat16))}
    array = jnp.asarray(array, jnp.float32)
    scale = jnp.max(jnp.abs(array), axis=0 if path[-1] == "kernel" else -1, keepdims=True) / 127
    whole = jnp.round(array / jnp.where(scale > 0, scale, 1.0))
    return {path: whole.astype(jnp.int8), (*path[:-1], path[-1] + SCALE): scale}


def multiplied(arrays: dict[Path, jax.Array], dtype) -> dict[Path, jax.Array]:
    """Arrays by path, of which int8 ones, see `on_disk`, become `dtype`."""
    found = {path: x for path, x in arrays.items() if not (path and path[-1].endswith(SCALE))}
    for path, x in found.items():
        if x.dtype == jnp.int8:
            found[path] = _product(x, arrays[(*path[:-1], path[-1] + SCALE)], jnp.dtype(dtype))
    return found


@jax.jit(static_argnums=2)
def _product(whole: jax.Array, scale: jax.Array, dtype) -> jax.Array:
    return (whole * scale).astype(dtype)


def stored_as(path: Path, stored, wanted):
    """The type that an array of the type `stored` is read as where floating-point ones get `wanted`."""
    return jnp.dtype(jnp.float32) if path[-1].endswith(SCALE) else cast(stored, wanted)


def here() -> jax.sharding.Sharding:
    """One device of this process. Orbax would look for the one that wrote, which only the first of processes has."""
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def not_finite(arrays: dict[Path, jax.Array]) -> list[str]:
    """The dotted paths of floating-point arrays that hold NaNs or infinities, found where the arrays lie."""
    floating = {path: x for path, x in sorted(arrays.items()) if jnp.issubdtype(x.dtype, jnp.floating)}
    at_hand = jax.default_backend() == "cpu" and jax.process_count() == 1
    if at_hand and all(x.dtype == jnp.float32 for x in floating.values()):  # NumPy is as fast, and compiles nothing
        finite = [np.isfinite(np.asarray(x)).all() for x in floating.values()]
    else:
        finite = np.asarray(_finite(list(floating.values())))
    return [".".join(path) for path, good in zip(floating, finite) if not good]


@jax.jit
def _finite(arrays: list[jax.Array]) -> jax.Array:
    """Whether each array is finite, bool [n], in one program."""
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in arrays])


def lay_out(arrays: dict[Path, Any]) -> None:
    """Lets arrays, by path, lie as decoding likes them on this platform: one by one, so that no model is held twice."""
    for path, x in arrays.items():
        if path[0] in ("target", "drafter") and path[-1] == "kernel":
            arrays[path] = laid_out(x)


def laid_out(kernel: jax.Array) -> Any:
    """A kernel of a target's or drafter's product, as decoding likes it to lie on this platform."""
    large = kernel.size >= platforms.defaults().output_major and kernel.dtype == jnp.float32
    return output_major(kernel) if large else kernel
