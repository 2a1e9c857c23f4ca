"""CLIP (Radford et al. 2021, arXiv 2103.00020): pictures and captions as vectors of one space.

Two pre-norm transformers with quick GELU. The vision tower reads square patches behind a class token, whose last state
stands for the picture; the text tower is causal, and the state at the end-of-text token stands for the caption.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cascade_jax.cache import bias, causal
from cascade_jax.models.transformer import Linear, matmul

# Of the pictures that every published CLIP was trained on, per channel, for values in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """Sizes of one transformer."""

    dim: int
    layers: int
    heads: int
    ffn_dim: int
    norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Sizes of both towers; the defaults are ViT-B/32's.

    Attributes:
      projection: width of the common space.
      image_size, patch_size: sides of pictures and patches, in pixels.
      vocab_size: of the text tokenizer.
      positions: the most tokens of a caption, its start and its end among them.
      end_token: the end-of-text token; the first one of a caption counts.
    """

    vision: TowerConfig = TowerConfig(768, 12, 12, 3072)
    text: TowerConfig = TowerConfig(512, 12, 8, 2048)
    projection: int = 512
    image_size: int = 224
    patch_size: int = 32
    vocab_size: int = 49408
    positions: int = 77
    end_token: int = 49407

    @property
    def patches(self) -> int:
        """Patches of a picture."""
        return (self.image_size // self.patch_size) ** 2


class LayerNorm(nnx.Module):
    """Layer normalisation in float32, scaled and shifted in the input's dtype."""

    def __init__(self, dim: int, eps: float):
        self.scale, self.bias, self.eps = nnx.Param(jnp.ones(dim)), nnx.Param(jnp.zeros(dim)), eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.scale[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), with biases everywhere."""

    def __init__(self, config: TowerConfig, rngs: nnx.Rngs):
        dim = config.dim
        self.heads = config.heads
        self.attention_norm = LayerNorm(dim, config.norm_eps)
        self.qkv = Linear(dim, 3, dim, use_bias=True, rngs=rngs)
        self.out = Linear(dim, dim, use_bias=True, rngs=rngs)
        self.ffn_norm = LayerNorm(dim, config.norm_eps)
        self.up = Linear(dim, config.ffn_dim, use_bias=True, rngs=rngs)
        self.down = Linear(config.ffn_dim, dim, use_bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, mask_bias: jax.Array | None) -> jax.Array:
        batch, length, dim = x.shape
        qkv = self.qkv(self.attention_norm(x)).reshape(batch, length, 3, self.heads, -1)
        q, k, v = (qkv[:, :, i] for i in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        scores = scores if mask_bias is None else scores + mask_bias
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v, preferred_element_type=jnp.float32).astype(x.dtype)
        x = x + self.out(mixed.reshape(batch, length, dim))
        return x + self.down(quick_gelu(self.up(self.ffn_norm(x))))


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x), which is nearly GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


class Vision(nnx.Module):
    """Pictures [B, size, size, 3], normalised, to states of the class token [B, dim]."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        own, patch = config.vision, config.patch_size
        self.patch_size, self.image_size = patch, config.image_size
        self.patch = nnx.Param(jax.random.normal(rngs.params(), (patch, patch, 3, own.dim)) * 0.02)
        self.class_token = nnx.Param(jax.random.normal(rngs.params(), (own.dim,)) * 0.02)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (1 + config.patches, own.dim)) * 0.02)
        self.norm_in = LayerNorm(own.dim, own.norm_eps)
        self.blocks = nnx.List([Block(own, rngs) for _ in range(own.layers)])
        self.norm = LayerNorm(own.dim, own.norm_eps)

    def __call__(self, images: jax.Array) -> jax.Array:
        size, p, dim = self.image_size, self.patch_size, self.class_token.shape[-1]
        if images.shape[1:] != (size, size, 3):
            raise ValueError(f"pictures must be [B, {size}, {size}, 3], not {images.shape}")
        x = images.astype(self.patch.dtype).reshape(len(images), size // p, p, size // p, p, 3)
        x = x.swapaxes(2, 3).reshape(len(images), -1, p * p * 3)
        x = matmul(x, self.patch[...].reshape(-1, dim))
        first = jnp.broadcast_to(self.class_token[...], (len(images), 1, dim))
        x = self.norm_in(jnp.concatenate([first, x], axis=1) + self.positions[...])
        for block in self.blocks:
            x = block(x, None)
        return self.norm(x[:, 0])


class Text(nnx.Module):
    """Token ids [B, n] to states at the end token [B, dim]."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        own = config.text
        self.end_token = config.end_token
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, own.dim)) * 0.02)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (config.positions, own.dim)) * 0.01)
        self.blocks = nnx.List([Block(own, rngs) for _ in range(own.layers)])
        self.norm = LayerNorm(own.dim, own.norm_eps)

    def __call__(self, ids: jax.Array) -> jax.Array:
        length = ids.shape[1]
        if length > len(self.positions[...]):
            raise ValueError(f"a caption has at most {len(self.positions[...])} tokens, not {length}")
        x = self.embedding[...][ids] + self.positions[...][:length]
        # whatever follows the end token is padding, and nothing before it sees it
        mask_bias = bias(causal(length))[None, None]
        for block in self.blocks:
            x = block(x, mask_bias)
        end = jnp.argmax(ids == self.end_token, axis=1)
        return self.norm(x[jnp.arange(len(ids)), end])


class CLIP(nnx.Module):
    """Both towers, their projections, and the scale of similarities."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vision, self.text = Vision(config, rngs), Text(config, rngs)
        self.vision_projection = Linear(config.vision.dim, config.projection, rngs=rngs)
        self.text_projection = Linear(config.text.dim, config.projection, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(np.log(1 / 0.07), jnp.float32))

    def image_features(self, images: jax.Array) -> jax.Array:
        """Vectors [B, projection] of pictures [B, size, size, 3] as `normalise` gives them; not unit vectors.

        Raises:
          ValueError: for pictures of another size.
        """
        return self.vision_projection(self.vision(images))

    def text_features(self, ids: jax.Array) -> jax.Array:
        """Vectors [B, projection] of captions, int [B, n]; each holds an end token, what follows is not read.

        Raises:
          ValueError: for more tokens than there are positions.
        """
        return self.text_projection(self.text(ids))

    def cosines(self, images: jax.Array, ids: jax.Array) -> jax.Array:
        """Cosines [B] of pictures [B, size, size, 3] and their own captions, int [B, n]."""
        return jnp.sum(_unit(self.image_features(images)) * _unit(self.text_features(ids)), axis=-1)

    def __call__(self, images: jax.Array, ids: jax.Array) -> jax.Array:
        """Similarities [B, C] of pictures [B, size, size, 3] and captions int [C, n]: cosines, scaled as in training.

        The CLIP score of Hessel et al. (2021, arXiv 2104.08718) is 2.5 max(cosine, 0) of a picture and its own caption.
        """
        pictures, captions = _unit(self.image_features(images)), _unit(self.text_features(ids))
        return jnp.exp(self.logit_scale[...].astype(jnp.float32)) * pictures @ captions.T


def normalise(images: jax.Array) -> jax.Array:
    """Pictures [..., 3] in [0, 1] as the vision tower takes them."""
    return (images - jnp.asarray(MEAN)) / jnp.asarray(STD)


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
