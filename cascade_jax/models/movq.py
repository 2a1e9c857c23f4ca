"""MoVQ (Zheng et al., "MoVQ: Modulating Quantized Vectors for High-Fidelity Image Generation", 2022): a VQGAN whose
decoder is told the codes at every norm.

Lumina-mGPT 2.0 draws in MoVQGAN's codes (github.com/ai-forever/MoVQGAN). Emu3's tokenizer (arXiv 2409.18869) is that
network for films: between it and the bottleneck stand convolutions over time. A picture is a film of four equal frames,
of which the first is kept, and for those the temporal convolutions are convolutions in space: frames before the first
are zero, equal frames meet the sum of their kernels. So they stand here, made by the converter.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cascade_jax.models.vq import Decoder, Encoder, GroupNorm, VectorQuantizer, VQConfig, VQModel, conv

Array = jax.Array


@dataclass(frozen=True)
class MoVQConfig(VQConfig):
    """Shape of a tokenizer; defaults are those of MoVQGAN-270M.

    Attributes:
      temporal: whether Emu3's convolutions over time stand beside the bottleneck.

    Raises:
      ValueError: if they would have to change the latents' width.
    """

    codebook_dim: int = 4
    channels: int = 256
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    z_channels: int = 4
    l2_norm: bool = False
    temporal: bool = False

    def __post_init__(self):
        if self.temporal and self.z_channels != self.codebook_dim:
            raise ValueError(f"Emu3's codes and latents have one width, not {self.codebook_dim} and {self.z_channels}")


MOVQGAN = MoVQConfig()
EMU3 = MoVQConfig(codebook_size=32768, temporal=True)


class SpatialNorm(nnx.Module):
    """Group normalisation whose scale and shift are linear in the code vectors at the same place."""

    def __init__(self, channels: int, config: VQConfig, *, rngs: nnx.Rngs):
        self.norm_layer = GroupNorm(channels, config, rngs=rngs)
        self.conv_y = conv(config.codebook_dim, channels, 1, dtype=None, rngs=rngs)
        self.conv_b = conv(config.codebook_dim, channels, 1, dtype=None, rngs=rngs)

    def __call__(self, x: Array, codes: Array) -> Array:
        """Normalises `x` [B, H, W, C] by code vectors [B, h, w, d]; H is a multiple of h, W the same of w."""
        times = x.shape[1] // codes.shape[1]
        # a map of single places commutes with their repetition, and has less to do before it
        scale, shift = (jnp.repeat(jnp.repeat(f(codes), times, 1), times, 2) for f in (self.conv_y, self.conv_b))
        return self.norm_layer(x) * scale + shift


class Affine(nnx.Module):
    """A scale and a shift for every channel: a batch normalisation with the statistics of its training."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Array) -> Array:
        return x.astype(jnp.float32) * self.scale[...] + self.bias[...]


class TemporalBlock(nnx.Module):
    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.norm1, self.norm2 = Affine(channels), Affine(channels)
        self.conv1 = conv(channels, channels, 3, dtype=dtype, rngs=rngs)
        self.conv2 = conv(channels, channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        h = self.conv1(nnx.silu(self.norm1(x)))
        return x + self.conv2(nnx.silu(self.norm2(h)))


class Temporal(nnx.Module):
    """Emu3's layers over time, for a picture: [B, h, w, z_channels] to the same.

    Of four frames the encoder's first convolution makes two, which lie side by side in the channels, the second one.
    The decoder makes two and four of one, of which the first is kept.
    """

    def __init__(self, config: MoVQConfig, frames: int, *, dtype, rngs: nnx.Rngs):
        width = config.z_channels
        widths = (width, frames * width, width)
        self.time_conv = nnx.List([conv(a, b, 3, dtype=dtype, rngs=rngs) for a, b in zip(widths, widths[1:])])
        self.time_res_stack = nnx.List([TemporalBlock(width, dtype=dtype, rngs=rngs) for _ in range(config.res_blocks)])

    def convolve(self, x: Array) -> Array:
        for layer in self.time_conv:
            x = nnx.silu(layer(x))
        return x

    def refine(self, x: Array) -> Array:
        for block in self.time_res_stack:
            x = block(x)
        return x


class MoVQ(VQModel):
    """The tokenizer: pictures to codes and back. Arguments as of `VQModel`."""

    def __init__(self, config: MoVQConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        self.config = config
        common = {"dtype": dtype, "rngs": rngs}
        self.encoder = Encoder(config, **common)
        self.decoder = Decoder(config, norm=SpatialNorm, **common)
        self.quantize = VectorQuantizer(config, rngs=rngs)
        self.quant_conv = conv(config.z_channels, config.codebook_dim, 1, **common)
        self.post_quant_conv = conv(config.codebook_dim, config.z_channels, 1, **common)
        self.encoder_time = Temporal(config, 2, **common) if config.temporal else None
        self.decoder_time = Temporal(config, 1, **common) if config.temporal else None

    def latents(self, images: Array) -> Array:
        """Latents before quantisation: float [B, H, W, 3] in [-1, 1] -> float [B, h, w, d]."""
        h = self.encoder(images)
        if self.encoder_time is not None:
            h = self.encoder_time.refine(self.encoder_time.convolve(h))
        return self.quant_conv(h)

    def decode(self, vectors: Array) -> Array:
        """Pictures float [B, H, W, 3] from code vectors float [B, h, w, d]. Not clipped: see `decode_codes`."""
        z = self.post_quant_conv(vectors)
        if self.decoder_time is not None:
            z, vectors = (self.decoder_time.convolve(self.decoder_time.refine(x)) for x in (z, vectors))
        return self.decoder(z, vectors)
