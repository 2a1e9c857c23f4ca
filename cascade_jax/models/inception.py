"""Inception-v3 (Szegedy et al. 2015, arXiv 1512.00567) as the Fréchet Inception Distance uses it (Heusel et al. 2017).

That is TensorFlow's network of 2015-12-05 in the variant of `pytorch-fid`: average pooling leaves padding out of the
mean, and the last block has max pooling in its place. Sub-modules bear the names of `pytorch-fid`'s weights; every
batch normalisation, of fixed statistics, is part of the convolution before it. Everything is float32 at full precision,
for distances of different machines are to be compared.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class InceptionConfig:
    """Settings of the network.

    Attributes:
      size: pixels a side to which pictures are resized; at least 75.
    """

    size: int = 299


class Conv(NamedTuple):
    """A convolution, normalised and rectified; of stride one it keeps the size, else there is no padding."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


# A chain of convolutions; the last may be a fork of several, whose outputs stand side by side.
Chain = tuple[Conv | tuple[Conv, ...], ...]

_THREE, _FIVE, _ROW, _COLUMN = (3, 3), (5, 5), (1, 7), (7, 1)


def _block_a(pooled: int) -> tuple[Chain, ...]:
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, _FIVE)),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, _THREE), Conv("branch3x3dbl_3", 96, _THREE)),
        (Conv("branch_pool", pooled),),
    )


_BLOCK_B: tuple[Chain, ...] = (
    (Conv("branch3x3", 384, _THREE, 2),),
    (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, _THREE), Conv("branch3x3dbl_3", 96, _THREE, 2)),
    (),
)


def _block_c(inner: int) -> tuple[Chain, ...]:
    return (
        (Conv("branch1x1", 192),),
        (Conv("branch7x7_1", inner), Conv("branch7x7_2", inner, _ROW), Conv("branch7x7_3", 192, _COLUMN)),
        (
            Conv("branch7x7dbl_1", inner),
            Conv("branch7x7dbl_2", inner, _COLUMN),
            Conv("branch7x7dbl_3", inner, _ROW),
            Conv("branch7x7dbl_4", inner, _COLUMN),
            Conv("branch7x7dbl_5", 192, _ROW),
        ),
        (Conv("branch_pool", 192),),
    )


_BLOCK_D: tuple[Chain, ...] = (
    (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, _THREE, 2)),
    (
        Conv("branch7x7x3_1", 192),
        Conv("branch7x7x3_2", 192, _ROW),
        Conv("branch7x7x3_3", 192, _COLUMN),
        Conv("branch7x7x3_4", 192, _THREE, 2),
    ),
    (),
)


def _fork(name: str) -> tuple[Conv, ...]:
    return Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1))


_BLOCK_E: tuple[Chain, ...] = (
    (Conv("branch1x1", 320),),
    (Conv("branch3x3_1", 384), _fork("branch3x3_2")),
    (Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, _THREE), _fork("branch3x3dbl_3")),
    (Conv("branch_pool", 192),),
)


def _average(x: jax.Array) -> jax.Array:
    return nnx.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False)


def _largest(x: jax.Array) -> jax.Array:
    return nnx.max_pool(x, (3, 3), strides=(1, 1), padding="SAME")


def _halved(x: jax.Array) -> jax.Array:
    return nnx.max_pool(x, (3, 3), strides=(2, 2))


# The chains of every block, and the pooling before the last of them.
_BLOCKS = {
    "Mixed_5b": (_block_a(32), _average),
    "Mixed_5c": (_block_a(64), _average),
    "Mixed_5d": (_block_a(64), _average),
    "Mixed_6a": (_BLOCK_B, _halved),
    "Mixed_6b": (_block_c(128), _average),
    "Mixed_6c": (_block_c(160), _average),
    "Mixed_6d": (_block_c(160), _average),
    "Mixed_6e": (_block_c(192), _average),
    "Mixed_7a": (_BLOCK_D, _halved),
    "Mixed_7b": (_BLOCK_E, _average),
    "Mixed_7c": (_BLOCK_E, _largest),
}


class Rectified(nnx.Module):
    """A `Conv` with its normalisation folded in: float32 [B, H, W, inputs] -> [B, h, w, width]."""

    def __init__(self, inputs: int, spec: Conv, padding: str | None = None):
        # zeros, since nobody trains it: random numbers would take most of the time of loading
        self.kernel = nnx.Param(jnp.zeros((*spec.kernel, inputs, spec.width)))
        self.bias = nnx.Param(jnp.zeros(spec.width))
        self.stride, self.padding = spec.stride, padding or ("SAME" if spec.stride == 1 else "VALID")

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        return jax.nn.relu(x + self.bias[...].astype(x.dtype))


class Mixed(nnx.Module):
    """An inception block: chains side by side, the last behind `pool`."""

    def __init__(self, inputs: int, chains: tuple[Chain, ...], pool: Callable[[jax.Array], jax.Array]):
        self.chains, self.pool, self.width = chains, pool, 0
        for chain in chains:
            width = inputs
            for step in map(_steps, chain):
                for spec in step:
                    setattr(self, spec.name, Rectified(width, spec))
                width = sum(spec.width for spec in step)
            self.width += width

    def __call__(self, x: jax.Array) -> jax.Array:
        outputs = []
        for i, chain in enumerate(self.chains):
            h = self.pool(x) if i == len(self.chains) - 1 else x
            for step in map(_steps, chain):
                h = jnp.concatenate([getattr(self, spec.name)(h) for spec in step], axis=-1)
            outputs.append(h)
        return jnp.concatenate(outputs, axis=-1)


def _steps(step: Conv | tuple[Conv, ...]) -> tuple[Conv, ...]:
    return (step,) if isinstance(step, Conv) else step


class Inception(nnx.Module):
    """Pictures to features."""

    def __init__(self, config: InceptionConfig, *, rngs: nnx.Rngs):
        del rngs
        self.config = config
        self.Conv2d_1a_3x3 = Rectified(3, Conv("", 32, _THREE, 2), "VALID")
        self.Conv2d_2a_3x3 = Rectified(32, Conv("", 32, _THREE), "VALID")
        self.Conv2d_2b_3x3 = Rectified(32, Conv("", 64, _THREE))
        self.Conv2d_3b_1x1 = Rectified(64, Conv("", 80), "VALID")
        self.Conv2d_4a_3x3 = Rectified(80, Conv("", 192, _THREE), "VALID")
        width = 192
        for name, (chains, pool) in _BLOCKS.items():
            block = Mixed(width, chains, pool)
            setattr(self, name, block)
            width = block.width

    def __call__(self, images: jax.Array) -> jax.Array:
        """Features float32 [B, 2048] of pictures [B, H, W, 3] with values in [0, 1], of any size."""
        x = prepared(images.astype(jnp.float32), self.config.size)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halved(x)))
        x = _halved(x)
        for name in _BLOCKS:
            x = getattr(self, name)(x)
        return jnp.mean(x, axis=(1, 2))


def prepared(images: jax.Array, size: int) -> jax.Array:
    """Pictures [B, H, W, 3] in [0, 1] as the convolutions take them: `size` pixels a side, in [-1, 1]."""
    return 2 * resize(images, size) - 1


def resize(images: jax.Array, size: int) -> jax.Array:
    """Pictures [B, H, W, C] at size x size pixels: bilinear, pixels as squares, without smoothing before, as torch's
    `interpolate(mode="bilinear", align_corners=False)`."""
    shape = (len(images), size, size, images.shape[-1])
    return jax.image.resize(images, shape, "linear", antialias=False)
