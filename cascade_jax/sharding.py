"""A model on a mesh: where its parameters lie, whether it fits, and decoding divided over prompts.

Within a row of `model` devices the layout is Megatron's (Shoeybi et al. 2019, arXiv 1909.08053): a block's first
matrices are divided by columns and its second ones by rows, so that attention and feed-forward end in one all-reduce
each. A cache lies where its heads are. The head is divided over the vocabulary, and so are logits and what is made of
them.

Every row of devices over `data` runs the loop on prompts of its own. Rows exchange nothing but whether any of them has
work left, and that only if `model` divides them: see `mesh.anywhere`.
"""

import dataclasses
import math
import re
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cascade_jax import decode, platforms
from cascade_jax.acceptance import Rule
from cascade_jax.bundle import Bundle, Config, Placement
from cascade_jax.cache import capacity
from cascade_jax.decode import DecodeState, Prefix, Program
from cascade_jax.mesh import DATA, MODEL, lies_by_row
from cascade_jax.models.transformer import OutputMajor, straight
from cascade_jax.sampling import Sampling
from cascade_jax.tree import EAGLE_25

# Which axis of a parameter lies over `model`, by the end of its path; the first that matches holds.
_DIVIDED = (
    (r"attention\.qkv\.kernel", 1),
    (r"attention\.qkv\.bias", 0),
    (r"attention\.(query|key)_norm\.(scale|bias)", 0),
    (r"attention\.out\.kernel", 0),
    (r"ffn\.gate_up\.kernel", 2),
    (r"ffn\.down\.kernel", 0),
    (r"(caption|aligner)\.fc1\.kernel", 1),
    (r"(caption|aligner)\.fc1\.bias", 0),
    (r"(caption|aligner)\.fc2\.kernel", 0),
    (r"head(\.fc2)?\.kernel", 1),
    (r"head(\.fc2)?\.bias", 0),
    (r"head\.fc1\.kernel", 1),
    (r"head\.fc1\.bias", 0),
    (r"drafter\.fc\.kernel", 0),
    (r"(text_)?embedding", 1),
)


def placement(mesh: Mesh) -> Placement:
    """Where a bundle's parameters lie; what no rule names lies on every device."""

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        axis = next((axis for end, axis in _DIVIDED if re.search(rf"(^|\.){end}$", path)), None)
        spec: list[str | None] = [None] * len(shape)
        if path.split(".")[0] in ("target", "drafter") and axis is not None and not shape[axis] % mesh.shape[MODEL]:
            spec[axis] = MODEL
        return NamedSharding(mesh, PartitionSpec(*spec))

    return place


def check(config: Config, model: int) -> None:
    """Makes sure that a model can be divided over `model` devices.

    Raises:
      ValueError: if heads, feed-forward width or vocabulary leave a remainder; the message says what would not.
    """
    blocks = [own.block for own in (config.target, config.drafter) if hasattr(own, "block")]
    heads = math.gcd(*(block.kv_heads for block in blocks))
    sizes = math.gcd(heads, *(block.ffn_dim for block in blocks), config.target.codebook_size)
    if sizes % model:
        fitting = ", ".join(str(n) for n in range(1, sizes + 1) if sizes % n == 0)
        widths = " and ".join(str(block.ffn_dim) for block in blocks)
        raise ValueError(
            f"a mesh with model={model} does not divide {heads} key-value heads, feed-forward widths of {widths} and "
            f"{config.target.codebook_size} codes: model can be {fitting}"
        )


def needed(config: Config, arrays: dict[str, Any], dtype, *, data: int, model: int, batch: int) -> dict[str, int]:
    """Bytes on one device of a mesh: {"parameters", "caches"}, before anything is allocated.

    Args:
      arrays: shapes and types by dotted path, see `bundle.stored`.
      dtype: of the floating-point parameters.
      batch: pictures drawn at once, on the whole mesh, with guidance and the usual tree.
    """
    mesh = jax.sharding.AbstractMesh((data, model), (DATA, MODEL))
    place, parameters = placement(mesh), 0
    for path, leaf in arrays.items():
        floating = np.issubdtype(leaf.dtype, np.floating) or leaf.dtype in (jax.numpy.bfloat16, np.int8)
        size = np.dtype(dtype).itemsize if floating else leaf.dtype.itemsize
        parameters += math.prod(place(path, tuple(leaf.shape)).shard_shape(tuple(leaf.shape))) * size
    layers = [(own.block, own.layers) for own in (config.target, config.drafter) if hasattr(own, "block")]
    slots = capacity(config.target.condition_slots, config.target.length, EAGLE_25.depth)
    heads = sum(2 * block.kv_heads * block.head_dim * count for block, count in layers)
    rows = 2 * -(-batch // data)
    size = platforms.cache_dtype(dtype).itemsize
    return {"parameters": parameters, "caches": heads * slots * rows * size // model}


def put(model: Bundle, mesh: Mesh) -> Bundle:
    """A loaded bundle on a mesh."""
    place = placement(mesh)

    def moved(part, tree):
        def leaf(path, x):
            name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")  # NNX's last step
            return jax.device_put(straight(x), place(f"{part}.{name}", x.shape))

        return jax.tree_util.tree_map_with_path(leaf, tree, is_leaf=lambda x: isinstance(x, OutputMajor))

    params = {part: None if tree is None else moved(part, tree) for part, tree in model.params.items()}
    return Bundle(model.config, params, model.read, model.neighbours, mesh, model.trees)


def prefill(mesh: Mesh, program: Program, params, prefix: Prefix, keys: jax.Array, sampling: Sampling) -> DecodeState:
    """`decode.prefill` on a mesh. Rows of the state are apart by guidance branch, [G, B] where they are [R] otherwise.

    The batch must be a multiple of the mesh's `data`.
    """
    prefix = jax.tree.map(partial(_apart, batch=keys.shape[0]), prefix)
    with jax.set_mesh(mesh):
        return prefill_jit(program, params, prefix, keys, sampling)


def run(
    mesh: Mesh, program: Program, params, state: DecodeState, rule: Rule, sampling: Sampling, limit=None
) -> DecodeState:
    """`decode.run` on a mesh, on a state of `prefill`."""
    with jax.set_mesh(mesh):
        return run_jit(program, params, state, rule, sampling, limit)


@partial(jax.jit, static_argnums=0)
def prefill_jit(program: Program, params, prefix: Prefix, keys: jax.Array, sampling: Sampling) -> DecodeState:
    """What `prefill` compiles: within `jax.set_mesh`, and with the prefix's rows apart by guidance branch."""

    def local(params, prefix, keys, sampling):
        state = decode.prefill(program, params, jax.tree.map(_together, prefix), keys, sampling)
        return _mapped(state, partial(_apart, batch=keys.shape[0]))

    return _over_data(local, (None, _ROWS, _BATCH, None), _specs(program, params))(params, prefix, keys, sampling)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def run_jit(program: Program, params, state: DecodeState, rule: Rule, sampling: Sampling, limit) -> DecodeState:
    """What `run` compiles: within `jax.set_mesh`."""
    specs = _specs(program, params)

    def local(params, state, rule, sampling, limit):
        batch = state.count.shape[0]
        state = decode.run(program, params, _mapped(state, _together), rule, sampling, limit)
        return _mapped(state, partial(_apart, batch=batch))

    return _over_data(local, (None, specs, None, None, None), specs)(params, state, rule, sampling, limit)


_BATCH, _ROWS = PartitionSpec(DATA), PartitionSpec(None, DATA)


def _over_data(function, given: tuple, made: DecodeState):
    """`function` on every row of devices with its own part of what `given` and `made` say lies over `data`."""
    given = tuple(PartitionSpec() if spec is None else spec for spec in given)
    # Without the check of what varies: JAX cannot see that a loop that starts from constants soon varies.
    return jax.shard_map(function, in_specs=given, out_specs=made, axis_names={DATA}, check_vma=False)


def _specs(program: Program, params) -> DecodeState:
    """Where the fields of a state lie."""

    def lie(kind: type, **given):
        fields = {f.name: _ROWS if lies_by_row(f) else _BATCH for f in dataclasses.fields(kind)}
        return kind(**fields | given)

    memory = None
    if program.drafter is not None:
        memory = lie(nnx.merge(program.drafter, params["drafter"]).memory)
    return lie(DecodeState, drafter=memory)


def _mapped(state: DecodeState, function) -> DecodeState:
    """A state with `function` applied to what has a row for every guidance branch."""

    def mapped(part):
        rows = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if lies_by_row(f)}
        return part.replace(**jax.tree.map(function, rows))

    memory = None if state.drafter is None else mapped(state.drafter)
    return mapped(state).replace(drafter=memory)


def _apart(x: jax.Array, batch: int) -> jax.Array:
    """[R, ...] as [G, B, ...]."""
    return x.reshape(-1, batch, *x.shape[1:])


def _together(x: jax.Array) -> jax.Array:
    """[G, B, ...] as [R, ...]."""
    return x.reshape(-1, *x.shape[2:])
