"""Whole decoding programs lowered for several platforms at once, on a machine that need have none of them."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cascade_jax import bundle as bundles
from cascade_jax import decode, pipeline
from cascade_jax.bundle import Bundle, default_sampling
from cascade_jax.export.artifact import ArtifactError, Lowered, named
from cascade_jax.methods import Method
from cascade_jax.models.prompt import TokenRows
from cascade_jax.models.transformer import straight
from cascade_jax.platforms import portable
from cascade_jax.sampling import Sampling

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
SLOTS = 96  # of text tokens, with targets that read text themselves

# Custom calls that every XLA backend knows; `jax.export` itself accepts further ones that a single platform does.
_PORTABLE = {"mhlo.topk", "shape_assertion", "stablehlo.dynamic_top_k", "stablehlo.dynamic_reduce_window"}


def lower(
    model: Bundle,
    method: Method,
    *,
    platforms: Sequence[str] = PLATFORMS,
    batch: int | None = None,
    slots: int = SLOTS,
    sampling: Sampling | None = None,
    programs: Sequence[str] = ("generate", "start", "step", "pictures", "text"),
) -> Lowered:
    """Lowers a model's programs for all `platforms` at once, whatever machine this is.

    Args:
      model: its parameters may be shapes alone (`bundle.abstract`).
      batch: fixes the number of pictures drawn at once; None leaves it open.
      slots: prompts' text tokens, with targets that read text themselves; shorter prompts are filled up.
      sampling: None for the model's own settings. Which of them are None is part of the programs; values are not.
      programs: which of the programs to lower, those among them that the model has.

    Raises:
      ArtifactError: for an unknown platform.
    """
    check_platforms(platforms)
    sampling = (default_sampling(model.config) if sampling is None else sampling).checked()
    model, program = method.on(model), method.program(model)
    rows = jax.export.symbolic_shape("b")[0] if batch is None else batch
    read = straight(model.decoding_params(program))  # not as this platform likes it
    prompts, slots = _prompts(model, rows, slots)
    parts = {"states": read, "prompts": prompts, "rule": method.rule, "sampling": sampling}
    own = _Programs(program, {name: _filler(part) for name, part in parts.items()})
    states, prompts, rule, settings = (_shapes(part) for part in parts.values())
    seed, numbers = jax.ShapeDtypeStruct((), jnp.uint32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    given = states, prompts, seed, numbers

    def exported(function, *arguments):
        with portable():
            made = jax.export.export(jax.jit(function), platforms=tuple(platforms))(*arguments)
        check_portable(made)
        return made

    made = {}
    if "generate" in programs:
        made["generate"] = exported(own.generate, *given, rule, settings)
    if "start" in programs or "step" in programs:
        made["start"] = exported(own.opened, *given, settings)
    if "step" in programs:
        like = jax.eval_shape(own.start, *given, settings)
        stored = _shapes(like.replace(keys=jax.eval_shape(jax.random.key_data, like.keys)))
        made["step"] = exported(own.step(like), states, stored, rule, settings)
    if "pictures" in programs and model.config.vq is not None:
        tokens = jax.ShapeDtypeStruct((rows, program.length), jnp.int32)
        made["pictures"] = exported(_pictures(model), _shapes(model.params["vq"]), tokens)
    if "text" in programs and model.config.encoder is not None:
        ids = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("t"), model.config.target.condition_slots), jnp.int32)
        arguments = _shapes(model.params["text"]), ids, jax.ShapeDtypeStruct(ids.shape, bool)
        made["text"] = exported(_text(model), *arguments)
    constants = {"parameters": read, "pictures": model.params["vq"], "text": model.params["text"]}
    constants |= {"rule": method.rule, "sampling": sampling}
    return Lowered(made, {name: named(part) for name, part in constants.items()}, batch, slots)


@dataclasses.dataclass(frozen=True)
class _Programs:
    """Decoding over arrays by name; `fill` makes parameters, prompts, rule and sampling settings of them again."""

    program: decode.Program
    fill: dict[str, Callable[[dict[str, jax.Array]], Any]]

    def start(self, states, prompts, seed, numbers, sampling) -> decode.DecodeState:
        states, sampling = self.fill["states"](states), self.fill["sampling"](sampling)
        graphs, guided = (self.program.target, self.program.drafter), sampling.guidance is not None
        parameters = states["target"], states["drafter"]
        prefix = bundles.prefix(*graphs, guided, parameters, self.fill["prompts"](prompts))
        keys = pipeline.picture_keys(jax.random.key(seed), numbers)
        return decode.prefill(self.program, states, prefix, keys, sampling)

    def opened(self, *arguments) -> dict[str, jax.Array]:
        state = self.start(*arguments)
        return named(state.replace(keys=jax.random.key_data(state.keys)))

    def generate(self, states, prompts, seed, numbers, rule, sampling) -> dict[str, jax.Array]:
        state = self.start(states, prompts, seed, numbers, sampling)
        read = self.fill["states"](states), state, self.fill["rule"](rule), self.fill["sampling"](sampling)
        state = decode.run(self.program, *read)
        return {"tokens": state.tokens[:, : self.program.length], **named(state.stats)}

    def step(self, like: decode.DecodeState) -> Callable[..., dict[str, jax.Array]]:
        """A step of states like this one, whose keys are stored as numbers."""
        state_of = _filler(like)

        def step(states, state, rule, sampling):
            state = state_of(state | {"keys": jax.random.wrap_key_data(state["keys"])})
            read = self.fill["states"](states), state, self.fill["rule"](rule), self.fill["sampling"](sampling)
            state, _ = decode.step(self.program, *read)
            return named(state.replace(keys=jax.random.key_data(state.keys)))

        return step


def _prompts(model: Bundle, rows, slots: int) -> tuple[Any, int | None]:
    """Shapes of `rows` prompts; and `slots`, with targets that read text themselves, else None."""
    blank = model.config.target.blank()
    if model.config.encoder is not None:
        blank = blank.replace(mask=np.ones(len(blank.features), bool))
    blank = model.config.target.stack([blank])
    slots = slots if isinstance(blank, TokenRows) else None
    shape = lambda x: jax.ShapeDtypeStruct((len(x) * rows, *_room(x.shape[1:], slots)), x.dtype)
    return jax.tree.map(shape, blank), slots


def _pictures(model: Bundle) -> Callable[..., jax.Array]:
    state_of, graph, codes = _filler(model.params["vq"]), model.graph("vq"), model.config.target.codes
    return lambda state, tokens: bundles.pictures(graph, state_of(state), codes(tokens))


def _text(model: Bundle) -> Callable[..., jax.Array]:
    state_of, graph = _filler(model.params["text"]), model.graph("text")
    return lambda state, ids, mask: nnx.merge(graph, state_of(state))(ids, mask)


def check_platforms(names: Sequence[str]) -> tuple[str, ...]:
    """The platforms of these names.

    Raises:
      ArtifactError: if one is unknown.
    """
    for name in names:
        if name not in PLATFORMS:
            raise ArtifactError(f"unknown platform {name!r}; known: {', '.join(PLATFORMS)}")
    return tuple(dict.fromkeys(names))


def check_portable(program: jax.export.Exported) -> None:
    """Makes sure that a program consists of operations that every platform has.

    Raises:
      ArtifactError: if it calls the host or a kernel of one platform.
    """
    calls = set(re.findall(r'(?:custom_call @|call_target_name = ")([\w.$]+)', program.mlir_module()))
    if strangers := sorted(calls - _PORTABLE):
        raise ArtifactError(f"the program needs what not every platform has: {', '.join(strangers)}")


def _room(shape: tuple[int, ...], slots: int | None) -> tuple[int, ...]:
    return shape if slots is None or not shape else (slots,)


def _shapes(tree) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in named(tree).items()}


def _filler(tree) -> Callable[[dict[str, jax.Array]], Any]:
    """The inverse of `_named` for trees like this one."""
    names, structure = list(named(tree)), jax.tree.structure(tree)
    return lambda leaves: jax.tree.unflatten(structure, [leaves[name] for name in names])
