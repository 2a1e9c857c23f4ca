"""Cosmos' discrete video tokenizer DV8x16x16 (NVIDIA, arXiv 2501.03575; github.com/NVIDIA/Cosmos-Tokenizer), for single
pictures.

A causal auto-encoder over wavelets with finite scalar quantisation (Mentzer et al. 2023, arXiv 2309.15505): a code is a
number whose digits are the levels of a latent's channels. It is made for films, and pads them with their first frame. A
picture is a film of one frame, so every frame that a convolution over time sees is the same, attention over time has
nothing to choose from, and all that is left are convolutions in space: the converter makes them.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cascade_jax.models.vq import (
    AttnBlock,
    Downsample,
    GroupNorm,
    Level,
    Quantized,
    ResnetBlock,
    VQConfig,
    VQModel,
    conv,
)

Array = jax.Array

_HAAR = np.array([[1, 1], [1, -1]], np.float32)  # sum and difference of neighbours


@dataclass(frozen=True)
class CosmosConfig(VQConfig):
    """Shape of a tokenizer; defaults are the published ones.

    Attributes:
      levels: values that each channel of a code vector can take; code i has the digits of i, the first is the lowest.
      patch: side of the squares that wavelets make channels of, a power of two.

    Raises:
      ValueError: if the levels do not make the codes, or the patch is no power of two.
    """

    codebook_size: int = 64000
    codebook_dim: int = 6
    channel_multipliers: tuple[int, ...] = (2, 4, 4)
    z_channels: int = 16
    norm_groups: int = 1
    l2_norm: bool = False
    attention: bool = False
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    patch: int = 4

    def __post_init__(self):
        if len(self.levels) != self.codebook_dim or np.prod(self.levels) != self.codebook_size:
            raise ValueError(
                f"levels {self.levels} make {np.prod(self.levels)} codes of {len(self.levels)} channels, not "
                f"{self.codebook_size} of {self.codebook_dim}"
            )
        if self.patch < 1 or self.patch & (self.patch - 1):
            raise ValueError(f"patch must be a power of two, not {self.patch}")

    @property
    def downsampling(self) -> int:
        return self.patch * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def bands(self) -> int:
        """Channels of a patch: of a film of cubes of pixels."""
        return 3 * self.patch**3


DV8X16X16 = CosmosConfig()


def to_bands(images: Array, patch: int) -> Array:
    """Haar wavelets of pictures [B, H, W, 3], standing still in time: [B, H/patch, W/patch, 3 patch**3].

    Every halving makes eight channels of one: low and high in time, within these in height, within these in width.
    """
    while patch > 1:
        batch, height, width, channels = images.shape
        squares = images.reshape(batch, height // 2, 2, width // 2, 2, channels)
        bands = jnp.einsum("bhiwjc,yi,xj->bhwyxc", squares, _HAAR, _HAAR) / 4
        low = bands.reshape(batch, height // 2, width // 2, 4 * channels)
        images, patch = jnp.concatenate([low, jnp.zeros_like(low)], axis=-1), patch // 2
    return images


def from_bands(bands: Array, patch: int) -> Array:
    """The inverse of `to_bands`, whatever moves in time: of `patch` frames the last, which is the picture."""
    while patch > 1:
        batch, height, width, channels = bands.shape
        parts = bands.reshape(batch, height, width, 2, 2, 2, channels // 8)
        last = parts[:, :, :, 0] - parts[:, :, :, 1]
        squares = jnp.einsum("bhwyxc,yi,xj->bhiwjc", last, _HAAR, _HAAR)
        bands, patch = squares.reshape(batch, 2 * height, 2 * width, channels // 8), patch // 2
    return bands


class Pointwise(nnx.Module):
    """A linear map of normalised features beside the identity: attention over the only frame."""

    def __init__(self, channels: int, config: CosmosConfig, *, dtype, rngs: nnx.Rngs):
        self.norm = GroupNorm(channels, config, rngs=rngs)
        self.out = conv(channels, channels, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return x + self.out(self.norm(x))


class Upsample(nnx.Module):
    """Doubles the resolution by repetition and a convolution, behind a linear map where time is doubled as well."""

    def __init__(self, channels: int, timed: bool, *, dtype, rngs: nnx.Rngs):
        self.time = conv(channels, channels, 1, dtype=dtype, rngs=rngs) if timed else None
        self.conv = conv(channels, channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = x if self.time is None else self.time(x)
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


def _middle(channels: int, config: CosmosConfig, **common) -> nnx.List:
    return nnx.List(
        [
            ResnetBlock(channels, channels, config, **common),
            AttnBlock(channels, config, **common),
            Pointwise(channels, config, **common),
            ResnetBlock(channels, channels, config, **common),
        ]
    )


class Encoder(nnx.Module):
    """float [B, H, W, 3] -> float [B, h, w, z_channels]."""

    def __init__(self, config: CosmosConfig, **common):
        widths = [config.channels * m for m in (1, *config.channel_multipliers)]
        self.patch = config.patch
        self.conv_in = conv(config.bands, widths[0], 3, **common)
        self.conv_blocks = nnx.List([])
        for i, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
            level = Level(inputs, outputs, config.res_blocks, False, config, **common)
            if i < len(widths) - 2:
                level.downsample = Downsample(outputs, **common)
            self.conv_blocks.append(level)
        self.mid = _middle(widths[-1], config, **common)
        self.norm_out = GroupNorm(widths[-1], config, rngs=common["rngs"])
        self.conv_out = conv(widths[-1], config.z_channels, 3, **common)

    def __call__(self, images: Array) -> Array:
        h = self.conv_in(to_bands(images, self.patch))
        for level in self.conv_blocks:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        for block in self.mid:
            h = block(h)
        return self.conv_out(nnx.silu(self.norm_out(h)))


class Decoder(nnx.Module):
    """float [B, h, w, z_channels] -> float [B, H, W, 3]."""

    def __init__(self, config: CosmosConfig, **common):
        outputs = [config.channels * m for m in reversed(config.channel_multipliers)]
        widths = (outputs[0], *outputs)
        self.patch = config.patch
        self.conv_in = conv(config.z_channels, widths[0], 3, **common)
        self.mid = _middle(widths[0], config, **common)
        self.conv_blocks = nnx.List([])
        for i, (inputs, width) in enumerate(zip(widths, widths[1:])):
            level = Level(inputs, width, config.res_blocks + 1, False, config, **common)
            if i < len(outputs) - 1:
                level.upsample = Upsample(width, i == 1, **common)  # time is doubled once, at the second level
            self.conv_blocks.append(level)
        self.norm_out = GroupNorm(widths[-1], config, rngs=common["rngs"])
        self.conv_out = conv(widths[-1], config.bands, 3, **common)

    def __call__(self, z: Array) -> Array:
        h = self.conv_in(z)
        for block in self.mid:
            h = block(h)
        for level in self.conv_blocks:
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return from_bands(self.conv_out(nnx.silu(self.norm_out(h))), self.patch)


class ScalarQuantizer(nnx.Module):
    """Rounds every channel of a latent to one of its levels; there is nothing to learn."""

    def __init__(self, config: CosmosConfig):
        self.levels = config.levels

    @property
    def _places(self) -> np.ndarray:
        """What a step of each channel adds to the code."""
        return np.cumprod([1, *self.levels[:-1]])

    def codebook(self) -> Array:
        """Code vectors float [n, d], between -1 and 1."""
        levels = np.array(self.levels)
        digits = jnp.arange(levels.prod())[:, None] // self._places % levels
        return (digits - levels // 2) / (levels // 2).astype(np.float32)

    def __call__(self, latents: Array) -> Quantized:
        """Quantises float [B, h, w, d]."""
        levels = np.array(self.levels)
        reach, offset = (levels - 1) * np.float32(1.001) / 2, np.where(levels % 2, 0, np.float32(0.5))
        bounded = jnp.tanh(latents.astype(jnp.float32) + np.arctanh(offset / reach)) * reach - offset
        rounded = jnp.round(bounded)
        codes = jnp.sum((rounded.astype(jnp.int32) + levels // 2) * self._places, axis=-1, dtype=jnp.int32)
        vectors = (bounded + jax.lax.stop_gradient(rounded - bounded)) / (levels // 2)
        return Quantized(vectors, codes, jnp.zeros(()), jnp.zeros(()))


class Cosmos(VQModel):
    """The tokenizer: pictures to codes and back. Arguments as of `VQModel`."""

    def __init__(self, config: CosmosConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        self.config = config
        common = {"dtype": dtype, "rngs": rngs}
        self.encoder, self.decoder = Encoder(config, **common), Decoder(config, **common)
        self.quantize = ScalarQuantizer(config)
        self.quant_conv = conv(config.z_channels, config.codebook_dim, 1, **common)
        self.post_quant_conv = conv(config.codebook_dim, config.z_channels, 1, **common)

    def raw_codebook(self) -> Array:
        """Code vectors: float [n, d]."""
        return self.codebook()
