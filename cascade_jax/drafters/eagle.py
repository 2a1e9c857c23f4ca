"""EAGLE-1's drafter (Li et al. 2024, arXiv 2401.15077): one decoder layer that guesses the target's next feature.

It consumes pairs (embedding of token t + 1, target feature at t) and estimates the target's feature at t + 1, which the
target's own head turns into logits. Below the root of a draft tree its own estimate stands in for the target's feature.
A pair takes the slot of its feature, so the drafter's positions are one behind the target's: LlamaGen's drafter has 119
condition slots where the target has 120, and a token keeps its rotary angle.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from cascade_jax.cache import Context, Segment
from cascade_jax.drafters.pairs import PairDrafter
from cascade_jax.models.transformer import Block, BlockConfig, Linear, rope_1d, rope_2d, run_blocks


@dataclass(frozen=True)
class EagleConfig:
    """Sizes of an EAGLE-1 drafter.

    Attributes:
      block: the decoder layer's sizes; published LlamaGen drafters lack its input norm.
      grid: codes per side of the picture for LlamaGen's two-dimensional rotary embedding; None for the usual one.
      condition_slots: slots before the first image token's pair, with `grid` only.
      vocab_size: rows of the drafter's own token embedding; None if it uses the target's. Published drafters hold a
        table of their own, which need not be the target's: LANTERN's training script fills it from the target's head
        where it does not find the embedding.
      bare_first: whether the first of several layers lacks the input norm that the others have, as in EAGLE's code.
    """

    block: BlockConfig
    layers: int = 1
    grid: int | None = None
    condition_slots: int = 0
    rope_base: float = 10000.0
    vocab_size: int | None = None
    bare_first: bool = False

    @classmethod
    def for_target(cls, target, ahead: int) -> "EagleConfig":
        """A new drafter's sizes for a target of these sizes: one of its blocks, however far it is to look ahead."""
        del ahead
        block = replace(target.block, input_norm=False)
        return cls(block, rope_base=target.rope_base, **target.picture_places)

    @property
    def taps(self) -> tuple[int, ...]:
        """The target's features are all that it reads."""
        return ()


class Eagle1(PairDrafter):
    """The drafter. The head is the target's, and so is the token embedding unless it has its own."""

    standard: ClassVar[dict] = {}

    def __init__(self, config: EagleConfig, *, rngs: nnx.Rngs):
        self.config = config
        if config.vocab_size is not None:
            self.embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, config.block.dim)) * 0.02)
        self.fc = Linear(2 * config.block.dim, config.block.dim, use_bias=True, rngs=rngs)
        first = replace(config.block, input_norm=False) if config.bare_first else config.block
        self.blocks = nnx.List([Block(config.block if i else first, rngs) for i in range(config.layers)])

    def embed(self, tokens: jax.Array, target: nnx.Module) -> jax.Array:
        """Codes int [...] to the embeddings [..., d] that this drafter takes in."""
        if self.config.vocab_size is None:
            return target.embed(tokens)
        return self.embedding[...][target.table_row(tokens)]

    def fuse(self, features: jax.Array) -> jax.Array:
        """What the drafter reads of a target's pass: its features [..., d] as they are."""
        return features

    def rope(self, positions: jax.Array) -> jax.Array:
        """Rotary cosines and sines [..., D/2, 2] of slots int [...]."""
        return rope(self.config, positions)

    def __call__(
        self, embeddings: jax.Array, features: jax.Array, context: Context, past: tuple[Segment, ...] = ()
    ) -> tuple[jax.Array, Segment]:
        """Pairs [R, S, d] and [R, S, d] to feature estimates [R, S, d] and the new slots' keys and values."""
        return run_blocks(self.blocks, self.paired(embeddings, features), context, past)

    def paired(self, embeddings: jax.Array, features: jax.Array) -> jax.Array:
        """Pairs [R, S, d] and [R, S, d] as the blocks' input [R, S, d]."""
        return self.fc(jnp.concatenate([embeddings.astype(features.dtype), features], axis=-1))

    def logits(self, hidden: jax.Array, target: nnx.Module) -> jax.Array:
        """Feature estimates [..., d] to float32 logits [..., V] by the target's head."""
        return target.logits(hidden)

    def linear_head(self, target: nnx.Module) -> bool:
        """Whether `logits` is a linear map of the hidden states."""
        return target.linear_head


def rope(config, positions: jax.Array) -> jax.Array:
    """Rotary cosines and sines [..., D/2, 2] of a drafter's slots int [...], as its `grid` says."""
    head_dim = config.block.head_dim
    if config.grid is None:
        return rope_1d(positions, head_dim, config.rope_base, config.block.rotary)
    table = jnp.asarray(rope_2d(config.grid, head_dim, config.condition_slots, config.rope_base))
    return table[jnp.minimum(positions, len(table) - 1)]
