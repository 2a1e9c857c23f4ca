"""Whole decoding programs lowered for several platforms at once, on a machine that need have none of them."""

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
    program, guided = model.program(method.tree), sampling.guidance is not None
    rows = jax.export.symbolic_shape("b")[0] if batch is None else batch
    blank = model.config.target.blank()
    if model.config.text == "t5":
        blank = blank.replace(mask=np.ones(len(blank.features), bool))
    blank = model.config.target.stack([blank])
    slots = slots if isinstance(blank, TokenRows) else None
    prompts = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(x) * rows, *_room(x.shape[1:], slots)), x.dtype), blank)
    read = straight(model.decoding_params(program))  # not as this platform likes it
    parts = {"states": read, "prompts": prompts, "rule": method.rule, "sampling": sampling}
    shapes = {name: _shapes(part) for name, part in parts.items()}
    seed, numbers = jax.ShapeDtypeStruct((), jnp.uint32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    fill = {name: _filler(part) for name, part in parts.items()}

    def start(states, prompts, seed, numbers, sampling):
        states = fill["states"](states)
        target = nnx.merge(program.target, states["target"])
        drafter = None if program.drafter is None else nnx.merge(program.drafter, states["drafter"])
        prefix = target.prefix(fill["prompts"](prompts), guided, drafter)
        keys = pipeline.picture_keys(jax.random.key(seed), numbers)
        return decode.prefill(program, states, prefix, keys, fill["sampling"](sampling))

    def opened(*arguments):
        state = start(*arguments)
        return named(state.replace(keys=jax.random.key_data(state.keys)))

    def generate(states, prompts, seed, numbers, rule, sampling):
        state = start(states, prompts, seed, numbers, sampling)
        read, rule, sampling = fill["states"](states), fill["rule"](rule), fill["sampling"](sampling)
        state = decode.run(program, read, state, rule, sampling)
        return {"tokens": state.tokens[:, : program.length], **named(state.stats)}

    def exported(function, *arguments):
        made = jax.export.export(jax.jit(function), platforms=tuple(platforms))(*arguments)
        check_portable(made)
        return made

    made = {}
    given = shapes["states"], shapes["prompts"], seed, numbers
    if "generate" in programs:
        made["generate"] = exported(generate, *given, shapes["rule"], shapes["sampling"])
    if "start" in programs or "step" in programs:
        made["start"] = exported(opened, *given, shapes["sampling"])
    if "step" in programs:
        like = jax.eval_shape(start, *given, shapes["sampling"])
        stored = _shapes(like.replace(keys=jax.eval_shape(jax.random.key_data, like.keys)))
        state_of = _filler(like)

        def step(states, state, rule, sampling):
            state = state_of(state | {"keys": jax.random.wrap_key_data(state["keys"])})
            read, rule, sampling = fill["states"](states), fill["rule"](rule), fill["sampling"](sampling)
            state, _ = decode.step(program, read, state, rule, sampling)
            return named(state.replace(keys=jax.random.key_data(state.keys)))

        made["step"] = exported(step, shapes["states"], stored, shapes["rule"], shapes["sampling"])
    if "pictures" in programs:
        vq, config = model.params["vq"], model.config.target
        state_of = _filler(vq)

        def pictures(state, tokens):
            return bundles.pictures(model.graph("vq"), state_of(state), config.codes(tokens))

        tokens = jax.ShapeDtypeStruct((rows, program.length), jnp.int32)
        made["pictures"] = exported(pictures, _shapes(vq), tokens)
    if "text" in programs and model.config.text == "t5":
        encoder = _filler(model.params["text"])
        ids = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("t"), model.config.target.condition_tokens), jnp.int32)
        made["text"] = exported(
            lambda state, ids, mask: nnx.merge(model.graph("text"), encoder(state))(ids, mask),
            _shapes(model.params["text"]), ids, jax.ShapeDtypeStruct(ids.shape, bool),
        )  # fmt: skip
    constants = {"parameters": read, "pictures": model.params["vq"], "text": model.params["text"]}
    constants |= {"rule": method.rule, "sampling": sampling}
    return Lowered(made, {name: named(part) for name, part in constants.items()}, batch, slots)


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
