"""Tables: which tensors of a checkpoint make which parameter of a module.

A format's table is a list of rules, read from top to bottom, e.g.

    Rule("norm.weight", "norm.scale")
    Rule("layers.{}.attention.wo.weight", "blocks.{}.attention.out.kernel", linear)
    Rule(("layers.{}.feed_forward.w1.weight", "layers.{}.feed_forward.w3.weight"),
         "blocks.{}.ffn.gate_up.kernel", stacked)

`{}` stands for a number, `**` for any part of a dotted name; what they match in the parameter's path is put into the
tensors' names, in order. The first rule whose path matches a parameter makes it.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from checkpoints_convert.sources import Source
from checkpoints_convert.tensors import ConvertError, Tensor, listed

Transform = Callable[..., np.ndarray]


def as_is(tensor: np.ndarray) -> np.ndarray:
    return tensor


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one kind of parameter is made.

    Attributes:
      sources: name pattern of the tensor, or of several.
      path: pattern of the parameter's dotted path in the module.
      transform: from the tensors, in order, to the parameter. See `transforms`.
    """

    sources: str | tuple[str, ...]
    path: str
    transform: Transform = as_is

    @property
    def names(self) -> tuple[str, ...]:
        return (self.sources,) if isinstance(self.sources, str) else self.sources


@dataclasses.dataclass(frozen=True)
class Step:
    """How one parameter is made: `transform` of the tensors called `names`."""

    names: tuple[str, ...]
    transform: Transform


def plan(
    rules: Sequence[Rule], parameters: Mapping[str, tuple[int, ...]], source: Source, skip: Iterable[str] = ()
) -> dict[str, Step]:
    """Finds the tensors of every parameter, without reading any.

    Args:
      rules: the format's table.
      parameters: shapes by dotted path: all of the module's.
      source: the checkpoint.
      skip: patterns of tensors that the module has no use for.

    Returns:
      A step for every parameter.

    Raises:
      ConvertError: one for everything that is missing, left over, misshapen or no parameter.
    """
    steps, missing, misshapen = {}, [], []
    for path, shape in parameters.items():
        step = _step(rules, path)
        if step is None:
            raise LookupError(f"the table has no rule for {path}")
        steps[path] = step
        lost = [name for name in step.names if name not in source.tensors]
        missing += lost
        if not lost:
            found = tuple(source.tensors[name].shape for name in step.names)
            try:
                made = transformed_shape(step.transform, found)
            except (ArithmeticError, IndexError, TypeError, ValueError):  # it has not even as many axes
                made = None
            if made != shape:
                misshapen.append(
                    f"{' + '.join(step.names)} {' + '.join(map(_shape, found))} for {path} {_shape(shape)}"
                )
    used = {name: None for step in steps.values() for name in step.names}
    unfit = [f"{name} {tensor.fault}" for name in used if (tensor := source.tensors.get(name)) and tensor.fault]
    patterns = [_regex(pattern) for pattern in skip]
    left = [n for n in source.tensors if n not in used and not any(p.fullmatch(n) for p in patterns)]
    faults = [
        f"{len(items)} {what}: {listed(items)}"
        for what, items in (("missing", missing), ("left over", left), ("misshapen", misshapen))
        if items
    ]
    faults += [f"{len(unfit)} no weights: {listed(unfit)}"] if unfit else []
    if faults:
        raise ConvertError(f"{source.path} does not fit: {'; '.join(faults)}")
    return steps


def make(step: Step, tensors: Mapping[str, Tensor]) -> np.ndarray:
    """Reads and transforms: the parameter."""
    return step.transform(*(tensors[name].read() for name in step.names))


@functools.cache
def transformed_shape(transform: Transform, shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """The shape of a transform's result. Raises whatever NumPy raises where it does not take tensors of these
    shapes."""
    # One byte each, repeated: all but stacking transforms take no memory.
    return transform(*(np.broadcast_to(np.int8(0), shape) for shape in shapes)).shape


def present(pattern: str, names: Iterable[str]) -> bool:
    """Whether one of the names matches."""
    return any(_regex(pattern).fullmatch(name) for name in names)


def _step(rules: Sequence[Rule], path: str) -> Step | None:
    for rule in rules:
        if match := _regex(rule.path).fullmatch(path):
            return Step(tuple(_filled(name, match.groups()) for name in rule.names), rule.transform)
    return None


@functools.cache
def _regex(pattern: str) -> re.Pattern:
    return re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)").replace(r"\*\*", "(.+)"))


def _filled(pattern: str, values: Sequence[str]) -> str:
    values = iter(values)
    return re.sub(r"\{\}|\*\*", lambda _: next(values), pattern)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
