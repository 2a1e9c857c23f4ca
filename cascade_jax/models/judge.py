"""A small convolutional network that reads attributes off pictures, as the judge of `scenes` does."""

from dataclasses import dataclass

import jax
from flax import nnx


@dataclass(frozen=True)
class JudgeConfig:
    """Sizes of a judge.

    Attributes:
      pixels: side of its pictures.
      features: width of the layer before the last.
      outputs: logits, of all attributes side by side.
      widths: channels between the convolutions.
      squeezed: channels of a cell of 16 x 16 pixels, which the layer that sees all cells reads.
    """

    pixels: int
    features: int
    outputs: int
    widths: tuple[int, ...] = (3, 16, 32, 64, 96, 96)
    squeezed: int = 32


class Judge(nnx.Module):
    """Strided convolutions to cells of 16 x 16 pixels, then a layer that sees them all."""

    def __init__(self, config: JudgeConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.convs = nnx.List(
            [
                nnx.Conv(a, b, (4, 4) if i == 0 else (3, 3), strides=2 if i < 4 else 1, rngs=rngs)
                for i, (a, b) in enumerate(zip(config.widths, config.widths[1:]))
            ]
        )
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for width in config.widths[1:]])
        self.squeeze = nnx.Conv(config.widths[-1], config.squeezed, (1, 1), rngs=rngs)
        self.join = nnx.Linear((config.pixels // 16) ** 2 * config.squeezed, config.features, rngs=rngs)
        self.heads = nnx.Linear(config.features, config.outputs, rngs=rngs)

    def features(self, images: jax.Array) -> jax.Array:
        """The layer before the last, float [B, features], of pictures [B, pixels, pixels, 3] in [-1, 1]."""
        h = images
        for conv, norm in zip(self.convs, self.norms):
            h = nnx.gelu(norm(conv(h)))
        h = self.squeeze(h)
        return nnx.gelu(self.join(h.reshape(len(h), -1)))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits [B, outputs] of pictures [B, pixels, pixels, 3] in [-1, 1]."""
        return self.heads(self.features(images))
