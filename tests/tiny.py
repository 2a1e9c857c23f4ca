"""Small random models and the ways in which the engine's tests run them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cascade_jax import decode
from cascade_jax.acceptance import strict
from cascade_jax.drafters.eagle import Eagle1, EagleConfig
from cascade_jax.drafters.eagle3 import Eagle3
from cascade_jax.models.llamagen import LlamaGen, LlamaGenConfig
from cascade_jax.sampling import Layout, Sampling, guide
from cascade_jax.tree import DynamicTree, Tree

# Without optimisation: these programs take longer to compile than to run.
FAST = {"xla_backend_optimization_level": 0}
generate = jax.jit(decode.generate, static_argnums=0, compiler_options=FAST)
prefill = jax.jit(decode.prefill, static_argnums=0, compiler_options=FAST)
run = jax.jit(decode.run, static_argnums=0, donate_argnums=2, compiler_options=FAST)


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A random target and a random drafter, with fixed prompts and keys for them."""

    target: LlamaGen
    drafter: Eagle1 | Eagle3

    @property
    def length(self) -> int:
        return self.target.config.image_tokens

    def program(self, tree: Tree | DynamicTree, layout: Layout | None = None) -> decode.Program:
        drafter = nnx.graphdef(self.drafter) if tree.depth else None
        taps = self.drafter.config.taps if tree.depth else ()
        return decode.Program(nnx.graphdef(self.target), drafter, tree, self.length, layout, taps)

    def params(self, tree: Tree | DynamicTree, dtype=jnp.float32):
        states = {"target": nnx.state(self.target), "drafter": nnx.state(self.drafter) if tree.depth else None}
        return jax.tree.map(lambda x: x.astype(dtype), states)

    def prefix(self, batch: int, guided: bool = True, dtype=jnp.float32) -> decode.Prefix:
        """The first `batch` of a fixed list of prompts."""
        c = self.target.config
        prompts = jax.random.normal(jax.random.key(5), (16, c.condition_tokens, c.caption_dim))[:batch]
        x = self.target.condition(prompts)
        if guided:
            x = jnp.concatenate([x, self.target.unconditional(batch)])
        drafter = jnp.broadcast_to(self.target.embed(jnp.zeros((), jnp.int32)), x.shape)
        return decode.Prefix(x.astype(dtype), drafter.astype(dtype), jnp.full(len(x), x.shape[1], jnp.int32))

    def keys(self, batch: int) -> jax.Array:
        return jax.random.split(jax.random.key(7), 16)[:batch]

    def generate(
        self, tree, sampling: Sampling, rule=None, batch=8, prefix=None, keys=None, layout=None, dtype=jnp.float32
    ) -> decode.DecodeState:
        """From prefix to the last token; the fixed prompts and keys unless others are given."""
        prefix = self.prefix(batch, sampling.guidance is not None, dtype) if prefix is None else prefix
        keys = self.keys(batch) if keys is None else keys
        rule = strict() if rule is None else rule
        return generate(self.program(tree, layout), self.params(tree, dtype), prefix, keys, rule, sampling.checked())

    def start(self, tree, sampling: Sampling, batch=8, prefix=None, keys=None, dtype=jnp.float32) -> decode.DecodeState:
        """The state after the prefill."""
        prefix = self.prefix(batch, sampling.guidance is not None, dtype) if prefix is None else prefix
        keys = self.keys(batch) if keys is None else keys
        return prefill(self.program(tree), self.params(tree, dtype), prefix, keys, sampling.checked())

    def run(self, tree, state: decode.DecodeState, sampling: Sampling, limit: int, rule=None) -> decode.DecodeState:
        """`limit` more steps, or fewer if they complete all rows; `state` is given away."""
        rule = strict() if rule is None else rule
        return run(self.program(tree), self.params(tree), state, rule, sampling.checked(), jnp.int32(limit))

    def features(self, prefix: decode.Prefix, tokens: jax.Array) -> jax.Array:
        """Features [R, P + T - 1, d] over the prefix and tokens int [B, T], in one plain causal pass."""
        return _features(nnx.graphdef(self.target), nnx.state(self.target), prefix, tokens)

    def logits(self, prefix: decode.Prefix, tokens: jax.Array, guidance: float | None) -> jax.Array:
        """Guided logits [B, T, V] of the tokens, from that pass."""
        features = decode.at_tokens(self.features(prefix, tokens), prefix, tokens.shape[1])
        logits = self.target.logits(features)
        return guide(logits.reshape(-1, *tokens.shape, logits.shape[-1]), guidance)


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def _features(graph, state, prefix, tokens):
    rows = jnp.concatenate([tokens] * (len(prefix.length) // len(tokens)))
    return decode.teacher_forced(nnx.merge(graph, state), prefix, rows)


def make(config: LlamaGenConfig, seed: int, contrast: float) -> Tiny:
    """Random weights, large enough that every token, prompt and position matters to what comes next."""
    target = LlamaGen(config, rngs=nnx.Rngs(seed))
    block = dataclasses.replace(config.block, input_norm=False)
    drafter = Eagle1(
        EagleConfig(block, grid=config.grid, condition_slots=config.condition_tokens - 1), rngs=nnx.Rngs(seed + 1)
    )
    rng = np.random.default_rng(seed)
    for model in (target, drafter):
        state = nnx.state(model)
        for _, leaf in nnx.to_flat_state(state):
            if leaf.ndim > 1:
                leaf[...] = jnp.asarray(rng.normal(0, leaf.shape[0] ** -0.5, leaf.shape), jnp.float32)
        nnx.update(model, state)
    target.head.kernel[...] *= contrast
    # the drafter guesses that the feature changes little, so that part of its drafts is accepted
    drafter.fc.kernel[...] += jnp.concatenate([jnp.zeros((config.dim, config.dim)), jnp.eye(config.dim)])
    return Tiny(target, drafter)
