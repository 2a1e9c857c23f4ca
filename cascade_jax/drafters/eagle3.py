"""EAGLE-3's drafter (Li et al. 2025, arXiv 2503.01840): one decoder layer over token embeddings and fused features.

Instead of the target's last feature it reads three of its layers (a low, a middle and a high one), joined by `fuse`.
Its layer attends over [norm(embedding); norm(feature)], twice the model's width, it has a final norm and a head of its
own, and that head may draw from a part of the vocabulary only.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from cascade_jax.cache import Context, Segment
from cascade_jax.drafters.eagle import rope
from cascade_jax.drafters.pairs import PairDrafter
from cascade_jax.models.transformer import Attention, BlockConfig, FeedForward, Linear, RMSNorm


@dataclass(frozen=True)
class Eagle3Config:
    """Sizes of an EAGLE-3 drafter.

    Attributes:
      block: the layer's sizes; `dim` is the model's width, of which attention reads twice as much.
      draft_vocab: tokens that the head can draw.
      vocab_size: tokens of the target.
      target_dim: width of the target's features, three of which are fused.
      taps: behind how many of the target's blocks these are read; `layers_read` gives the published drafters'.
      grid: codes per side of the picture for LlamaGen's two-dimensional rotary embedding; None for the usual one.
      condition_slots: slots before the first image token's pair, with `grid` only.
      own_embedding: whether the drafter has its own token embedding; else it uses the target's.
    """

    block: BlockConfig
    draft_vocab: int
    vocab_size: int
    target_dim: int
    taps: tuple[int, int, int]
    grid: int | None = None
    condition_slots: int = 0
    rope_base: float = 10000.0
    own_embedding: bool = False

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return 1

    @classmethod
    def for_target(cls, target, ahead: int) -> "Eagle3Config":
        """A new drafter's sizes for a target of these sizes: one of its blocks, however far it is to look ahead."""
        del ahead
        block, codes = replace(target.block, qk_norm=False, qk_rms=False), target.codebook_size
        taps = layers_read(target.layers)
        return cls(block, codes, codes, target.dim, taps, rope_base=target.rope_base, **target.picture_places)


def layers_read(layers: int) -> tuple[int, int, int]:
    """Behind how many blocks of a target the public code reads it: 2, half of them, all but 3. Small targets, which
    have no such blocks, are read behind the first, the middle and the last."""
    return (2, layers // 2, layers - 3) if layers >= 6 else (1, (layers + 1) // 2, layers)


class Eagle3(PairDrafter):
    """The drafter."""

    standard: ClassVar[dict] = {"soft": 1.0, "hard": 0.0, "feature": 0.0, "unroll": 7, "noise": 0.0}

    def __init__(self, config: Eagle3Config, *, rngs: nnx.Rngs):
        block = config.block
        self.config = config
        if config.own_embedding:
            self.embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, block.dim)) * 0.02)
        self.fc = Linear(3 * config.target_dim, block.dim, rngs=rngs)
        self.embedding_norm = RMSNorm(block.dim, block.norm_eps)
        self.feature_norm = RMSNorm(block.dim, block.norm_eps)
        self.attention = Attention(block, rngs, inputs=2 * block.dim)
        self.ffn_norm = RMSNorm(block.dim, block.norm_eps)
        self.ffn = FeedForward(block, rngs)
        self.norm = RMSNorm(block.dim, block.norm_eps)
        self.head = Linear(block.dim, config.draft_vocab, rngs=rngs)
        if config.draft_vocab != config.vocab_size:  # EAGLE's d2t: draft j is token j + offsets[j]
            self.offsets = nnx.Param(jnp.zeros(config.draft_vocab, jnp.int32))

    def embed(self, tokens: jax.Array, target: nnx.Module) -> jax.Array:
        """Tokens int [...] to the embeddings [..., d] that this drafter takes in."""
        return self.embedding[...][tokens] if self.config.own_embedding else target.embed(tokens)

    def fuse(self, features: jax.Array) -> jax.Array:
        """Three of the target's features side by side, [..., 3 target_dim], to one [..., d]."""
        return self.fc(features)

    def rope(self, positions: jax.Array) -> jax.Array:
        """Rotary cosines and sines [..., D/2, 2] of slots int [...]."""
        return rope(self.config, positions)

    def __call__(
        self, embeddings: jax.Array, features: jax.Array, context: Context, past: tuple[Segment, ...] = ()
    ) -> tuple[jax.Array, Segment]:
        """Pairs [R, S, d] and fused features, or own estimates, [R, S, d] to estimates and new keys and values."""
        x = jnp.concatenate([self.embedding_norm(embeddings.astype(features.dtype)), self.feature_norm(features)], -1)
        mixed, fresh = self.attention(x, context, tuple(segment[0] for segment in past))
        x = features + mixed
        return x + self.ffn(self.ffn_norm(x)), (fresh,)

    def logits(self, hidden: jax.Array, target: nnx.Module) -> jax.Array:
        """Estimates [..., d] to float32 logits [..., vocab_size]; -inf for tokens that the head cannot draw."""
        del target
        drawn = self.head(self.norm(hidden)).astype(jnp.float32)
        if self.config.draft_vocab == self.config.vocab_size:
            return drawn
        tokens = jnp.arange(self.config.draft_vocab) + self.offsets[...]
        logits = jnp.full((*hidden.shape[:-1], self.config.vocab_size), -jnp.inf)
        return logits.at[..., tokens].set(drawn)

    def linear_head(self, target: nnx.Module) -> bool:
        """Whether `logits` is a linear map of the estimates: the norm before it is none."""
        del target
        return False
