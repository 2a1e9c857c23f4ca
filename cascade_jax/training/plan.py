"""What a training step of a published model needs on each device: python -m cascade_jax.training.plan

Nothing is computed and nothing allocated: parameters are counted from their shapes (`jax.eval_shape`), activations from
the traced step. Each device holds the whole target and the whole drafter; rows are dealt out.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cascade_jax import bundle
from cascade_jax.models import chameleon, janus, llamagen
from cascade_jax.training.data import by_row
from cascade_jax.training.drafter import Graphs, Objective, drafter_loss, kinds, sizes, standard, start

MODELS = {  # with rows on each device
    "LlamaGen-XL, 512 pixels": (llamagen.preset("XL", image_tokens=1024), 4),
    "Janus-Pro-7B": (janus.preset("7B"), 1),
    "Lumina-mGPT-7B, 768 pixels": (chameleon.preset("lumina-mgpt-7b-768"), 1),
}

# Results that are never stored where one operation alone reads them: compilers fuse them into it.
_FUSED = {
    "add", "add_any", "sub", "mul", "div", "max", "min", "neg", "exp", "log", "log1p", "tanh", "logistic", "rsqrt",
    "sqrt", "integer_pow", "square", "sign", "abs", "select_n", "convert_element_type", "eq", "ne", "lt", "le", "gt",
    "ge", "and", "or", "not", "is_finite", "stop_gradient", "copy", "pow", "erf", "rem", "clamp", "transpose", "slice",
    "concatenate", "pad",
}  # fmt: skip
# Results that are another way to look at an operand.
_VIEWS = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "iota"}
TRACED = 6  # blocks of the target: it is frozen, so that a block's activations are gone when the next one runs


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes on each device.

    Attributes:
      target: the frozen target.
      drafter: the drafter's float32 parameters, two moments of Adam and the gradient.
      batch: tokens and prompts.
      activations: the most that is alive at once while the step runs.
    """

    target: int
    drafter: int
    batch: int
    activations: int

    @property
    def total(self) -> int:
        return self.target + self.drafter + self.batch + self.activations


def plan(config: Any, kind: str, objective: Objective, rows: int) -> Plan:
    """The plan of a step with so many rows on each device, for a target of these sizes in bfloat16."""
    traced = dataclasses.replace(config, layers=min(config.layers, TRACED))
    _, whole = _target(config)
    target_graph, target = _target(traced)
    drafter = sizes(kind, traced, objective.unroll)
    params = jax.eval_shape(lambda: start(drafter, 0)[1])
    graph = bundle.skeleton("drafter", drafter)[0]
    graphs = Graphs(target_graph, graph, drafter.taps, config.layout)
    batch = {
        "tokens": jax.ShapeDtypeStruct((rows, config.length), jnp.int32),
        "prompts": _prompts(config, rows),
        "row": jax.ShapeDtypeStruct((rows,), jnp.int32),
        "unconditional": jax.ShapeDtypeStruct((rows,), bool),
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = jax.value_and_grad(functools.partial(drafter_loss, graphs, objective), has_aux=True)
    activations = peak(jax.make_jaxpr(step)(params, batch, key, target).jaxpr)
    return Plan(_size(whole), 4 * _size(params), _size(batch), activations)


def _target(config: Any) -> tuple[nnx.GraphDef, nnx.State]:
    """A target's graph definition, and its parameters' shapes in bfloat16."""
    graph, state = bundle.skeleton("target", config)
    half = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)
    return graph, jax.tree.map(half, state)


def peak(jaxpr) -> int:
    """The most bytes that are alive at once while the equations run in order, their inputs not counted.

    Views take nothing, and neither do elementwise results that one equation alone reads.
    """
    uses: dict[Any, int] = {}
    for equation in jaxpr.eqns:
        for var in set(_variables(equation.invars)):
            uses[var] = uses.get(var, 0) + 1
    for var in set(_variables(jaxpr.outvars)):
        uses[var] = uses.get(var, 0) + 1
    roots: dict[Any, frozenset] = {}  # the stored results that a variable is made of
    for equation in jaxpr.eqns:
        name, outputs = equation.primitive.name, equation.outvars
        inputs = frozenset().union(*(roots.get(var, frozenset()) for var in _variables(equation.invars)))
        held = name in _VIEWS or (name in _FUSED and all(uses.get(var, 0) <= 1 for var in outputs))
        for var in outputs:
            roots[var] = inputs if held else frozenset([var])
    last: dict[Any, int] = {}
    for i, equation in enumerate(jaxpr.eqns):
        for var in _variables(equation.invars):
            last |= dict.fromkeys(roots.get(var, ()), i)
    for var in _variables(jaxpr.outvars):
        last |= dict.fromkeys(roots.get(var, ()), len(jaxpr.eqns))
    ends: dict[int, list] = {}
    for var, i in last.items():
        ends.setdefault(i, []).append(var)
    alive, most = 0, 0
    for i, equation in enumerate(jaxpr.eqns):
        made = [var for var in equation.outvars if var in last and var in roots[var]]
        own = sum(_bytes(var.aval) for var in made)
        inside = max((peak(inner) for inner in _inner(equation)), default=0)
        most = max(most, alive + max(own, inside))
        alive += own - sum(_bytes(var.aval) for var in ends.get(i, ()))
    return most


def _inner(equation):
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
        if hasattr(value, "jaxpr"):
            yield value.jaxpr
        elif hasattr(value, "eqns"):
            yield value


def _variables(atoms):
    return [atom for atom in atoms if not hasattr(atom, "val")]


def _bytes(aval) -> int:
    return int(np.prod(aval.shape)) * getattr(aval.dtype, "itemsize", 4)


def _size(tree: Any) -> int:
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _prompts(config: Any, rows: int) -> Any:
    """Shapes of prompts as long as usual ones, features in bfloat16 as data holds them."""

    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)

    return jax.tree.map(shape, by_row(config.stack([config.blank()] * rows)))


def table(models: dict[str, tuple[Any, int]] = MODELS) -> str:
    """The plans of all models and drafters, with and without rematerialisation, as Markdown."""
    lines = ["| model | drafter | rows a device | flags | target | drafter, Adam, gradient | activations | total |"]
    lines.append("|---|---|---:|---|---:|---:|---:|---:|")
    for name, (config, rows) in models.items():
        for kind in kinds():
            for remat in (False, True):
                settings = {"guidance": 3.0, "dtype": "bfloat16", "convergence_weight": 2.0, "remat": remat}
                found = plan(config, kind, dataclasses.replace(standard(kind), **settings), rows)
                sizes_of = (found.target, found.drafter, found.activations, found.total)
                flags = "--remat" if remat else ""
                figures = " | ".join(f"{size / 2**30:.1f} GiB" for size in sizes_of)
                lines.append(f"| {name} | {kind} | {rows} | {flags} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
