"""T5's encoder (Raffel et al. 2020, arXiv 1910.10683) in the variant of FLAN-T5 and T5 v1.1: gated GELU, no biases.

Positions enter as a learned bias per head and bucket of distance, shared by all layers. Queries are not scaled.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cascade_jax.cache import bias
from cascade_jax.models.transformer import Linear, RMSNorm


@dataclass(frozen=True)
class T5Config:
    """Sizes of the encoder; the defaults are FLAN-T5-XL's.

    Attributes:
      buckets: of distances, half of them for each direction; distances from `max_distance` on share the last.
    """

    dim: int = 2048
    layers: int = 24
    heads: int = 32
    head_dim: int = 64
    ffn_dim: int = 5120
    vocab_size: int = 32128
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6


class T5Block(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), both without biases."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        inner = config.heads * config.head_dim
        self.config = config
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.qkv = Linear(config.dim, 3, inner, rngs=rngs)
        self.out = Linear(inner, config.dim, rngs=rngs)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.gate_up = Linear(config.dim, 2, config.ffn_dim, rngs=rngs)
        self.down = Linear(config.ffn_dim, config.dim, rngs=rngs)

    def __call__(self, x: jax.Array, position_bias: jax.Array) -> jax.Array:
        batch, length, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).reshape(batch, length, 3, self.config.heads, self.config.head_dim)
        q, k, v = (qkv[:, :, i] for i in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) + position_bias
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v, preferred_element_type=jnp.float32).astype(x.dtype)
        x = x + self.out(mixed.reshape(batch, length, -1))
        hidden = self.gate_up(self.ffn_norm(x))
        return x + self.down(jax.nn.gelu(hidden[..., 0, :], approximate=True) * hidden[..., 1, :])


class T5Encoder(nnx.Module):
    """Token ids to features."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, config.dim)))
        self.relative_bias = nnx.Param(jax.random.normal(rngs.params(), (config.buckets, config.heads)) * 0.02)
        self.blocks = nnx.List([T5Block(config, rngs) for _ in range(config.layers)])
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Ids int [B, n] to features [B, n, dim].

        Args:
          mask: bool [B, n], false at padding, which nobody attends to.
        """
        buckets = distance_buckets(ids.shape[1], self.config.buckets, self.config.max_distance)
        position_bias = self.relative_bias[...].astype(jnp.float32)[buckets].transpose(2, 0, 1)[None]
        position_bias = position_bias + bias(mask)[:, None, None, :]
        x = self.embedding[...][ids]
        for block in self.blocks:
            x = block(x, position_bias)
        return self.norm(x)


def distance_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of every pair of positions, int [length, length]: exact for near keys, logarithmic for far ones."""
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    scale = np.float32(math.log(max_distance / exact))
    far = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / scale * np.float32(half - exact)
    far = np.minimum(exact + far.astype(np.int32), half - 1)
    return np.where(offset > 0, half, 0) + np.where(distance < exact, distance, far)
