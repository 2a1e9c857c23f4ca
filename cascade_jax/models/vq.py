"""LlamaGen's image tokenizer: a convolutional auto-encoder with a vector-quantised bottleneck.

Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation" (2024), section 3.1; the
architecture is VQGAN's (Esser et al., 2021) with a small, l2-normalised codebook. Janus-Pro took it over. Chameleon's
is the same network with a wider codebook, not normalised, and attention in the middle alone; Emu3.5's is larger, and
chooses codes by inner product. Sub-modules bear the names of LlamaGen's published checkpoints. Pictures are
`[B, H, W, C]` with values in [-1, 1].
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """Shape of a tokenizer. One code stands for a square of `downsampling` x `downsampling` pixels.

    Attributes:
      codebook_size: number of codes, n.
      codebook_dim: width of a code vector, d.
      channels: width of the first level; level i has `channels * channel_multipliers[i]`.
      channel_multipliers: one per level, finest first; each level but the last halves the resolution.
      res_blocks: residual blocks per level of the encoder; the decoder has one more.
      z_channels: width between the convolutional networks and the bottleneck.
      norm_groups: groups of every group normalisation.
      l2_norm: whether latents and codes are compared, and passed on, as unit vectors.
      commitment: beta, the weight of the commitment loss.
      attention: whether the lowest resolution's residual blocks are followed by attention; the middle always has one.
      by_product: whether a latent takes the code with which it has the largest inner product (IBQ, arXiv 2412.02692)
        rather than the nearest.
    """

    codebook_size: int = 16384
    codebook_dim: int = 8
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    z_channels: int = 256
    norm_groups: int = 32
    l2_norm: bool = True
    commitment: float = 0.25
    attention: bool = True
    by_product: bool = False

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.channel_multipliers) - 1)


DS16 = VQConfig()
DS8 = VQConfig(channel_multipliers=(1, 2, 2, 4))
CHAMELEON = VQConfig(codebook_size=8192, codebook_dim=256, l2_norm=False, attention=False)
JANUS = DS16
# The public code has its architecture, and its paper 455 million parameters; widths and blocks that make so many.
IBQ = VQConfig(131072, 256, 256, (1, 1, 2, 2, 4), 4, 256, l2_norm=False, by_product=True)


class Quantized(NamedTuple):
    """What the bottleneck makes of latents.

    Attributes:
      vectors: float [B, h, w, d], the chosen codes; gradients pass straight through to the latents.
      codes: int32 [B, h, w].
      codebook_loss: float [], pulls codes towards their latents.
      commitment_loss: float [], pulls latents towards their codes; already weighted by beta.
    """

    vectors: Array
    codes: Array
    codebook_loss: Array
    commitment_loss: Array


def conv(inputs: int, outputs: int, kernel: int, *, dtype, rngs, strides: int = 1, padding: Any = "SAME") -> nnx.Conv:
    # Accumulating in float32 keeps a bfloat16 model's activations and normalisations in float32.
    return nnx.Conv(
        inputs,
        outputs,
        (kernel, kernel),
        strides=strides,
        padding=padding,
        dtype=dtype,
        preferred_element_type=jnp.float32,
        rngs=rngs,
    )


def _unit(x: Array) -> Array:
    # The square is clamped, not the norm, so that the gradient at zero is finite.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


class GroupNorm(nnx.Module):
    """Group normalisation over all positions, in float32.

    The statistics are taken per channel and then joined per group, which keeps the channels innermost: on a CPU this
    makes the whole network about twice as fast as `nnx.GroupNorm`.
    """

    epsilon = 1e-6

    def __init__(self, channels: int, config: VQConfig, *, rngs: nnx.Rngs):
        del rngs
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.groups = config.norm_groups

    def __call__(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        channels = x.shape[-1]

        def moment(values: Array) -> Array:
            groups = jnp.mean(values, axis=(1, 2)).reshape(x.shape[0], self.groups, -1).mean(axis=-1)
            return jnp.repeat(groups, channels // self.groups, axis=-1)[:, None, None, :]

        mean = moment(x)
        variance = jnp.maximum(moment(x * x) - mean * mean, 0)
        scale = self.scale[...] * jax.lax.rsqrt(variance + self.epsilon)
        return x * scale + (self.bias[...] - mean * scale)


class ResnetBlock(nnx.Module):
    """Two convolutions beside the identity. Its norms, of the kind `norm`, are given `read` as well."""

    def __init__(self, inputs: int, outputs: int, config: VQConfig, *, dtype, rngs: nnx.Rngs, norm: type = GroupNorm):
        self.norm1 = norm(inputs, config, rngs=rngs)
        self.conv1 = conv(inputs, outputs, 3, dtype=dtype, rngs=rngs)
        self.norm2 = norm(outputs, config, rngs=rngs)
        self.conv2 = conv(outputs, outputs, 3, dtype=dtype, rngs=rngs)
        if inputs != outputs:
            self.nin_shortcut = conv(inputs, outputs, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, *read: Array) -> Array:
        h = self.conv1(nnx.silu(self.norm1(x, *read)))
        h = self.conv2(nnx.silu(self.norm2(h, *read)))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return x + h


class AttnBlock(nnx.Module):
    """Single-head self-attention over all positions of a feature map; norm and `read` as of `ResnetBlock`."""

    def __init__(self, channels: int, config: VQConfig, *, dtype, rngs: nnx.Rngs, norm: type = GroupNorm):
        self.norm = norm(channels, config, rngs=rngs)
        self.q = conv(channels, channels, 1, dtype=dtype, rngs=rngs)
        self.k = conv(channels, channels, 1, dtype=dtype, rngs=rngs)
        self.v = conv(channels, channels, 1, dtype=dtype, rngs=rngs)
        self.proj_out = conv(channels, channels, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, *read: Array) -> Array:
        h = self.norm(x, *read)
        q, k, v = (f(h).reshape(x.shape[0], -1, x.shape[-1]) for f in (self.q, self.k, self.v))
        weights = jax.nn.softmax(jnp.einsum("bic,bjc->bij", q, k) * x.shape[-1] ** -0.5, axis=-1)
        return x + self.proj_out(jnp.einsum("bij,bjc->bic", weights, v).reshape(x.shape))


class Downsample(nnx.Module):
    """Halves the resolution; pads on the right and below only, as the published models do."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, 3, strides=2, padding=((0, 1), (0, 1)), dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles the resolution by repetition and a convolution."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


class Level(nnx.Module):
    """Residual blocks of one resolution, each followed by attention if asked for."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool, config: VQConfig, **common):
        widths = (inputs, *[outputs] * blocks)
        self.res = nnx.List([ResnetBlock(a, b, config, **common) for a, b in zip(widths, widths[1:])])
        count = blocks if attention else 0
        self.attn = nnx.List([AttnBlock(outputs, config, **common) for _ in range(count)])

    def __call__(self, x: Array, *read: Array) -> Array:
        for i, block in enumerate(self.res):
            x = block(x, *read)
            if self.attn:
                x = self.attn[i](x, *read)
        return x


def _middle(channels: int, config: VQConfig, **common) -> nnx.List:
    return nnx.List(
        [
            ResnetBlock(channels, channels, config, **common),
            AttnBlock(channels, config, **common),
            ResnetBlock(channels, channels, config, **common),
        ]
    )


class Encoder(nnx.Module):
    """float [B, H, W, 3] -> float [B, h, w, z_channels]."""

    def __init__(self, config: VQConfig, *, dtype, rngs: nnx.Rngs):
        widths = [config.channels * m for m in (1, *config.channel_multipliers)]
        last = len(config.channel_multipliers) - 1
        self.conv_in = conv(3, config.channels, 3, dtype=dtype, rngs=rngs)
        levels = []
        for i, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
            level = Level(
                inputs, outputs, config.res_blocks, config.attention and i == last, config, dtype=dtype, rngs=rngs
            )
            if i < last:
                level.downsample = Downsample(outputs, dtype=dtype, rngs=rngs)
            levels.append(level)
        self.conv_blocks = nnx.List(levels)
        self.mid = _middle(widths[-1], config, dtype=dtype, rngs=rngs)
        self.norm_out = GroupNorm(widths[-1], config, rngs=rngs)
        self.conv_out = conv(widths[-1], config.z_channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        h = self.conv_in(x)
        for level in self.conv_blocks:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        for block in self.mid:
            h = block(h)
        return self.conv_out(nnx.silu(self.norm_out(h)))


class Decoder(nnx.Module):
    """float [B, h, w, z_channels] -> float [B, H, W, 3]; norm and `read` as of `ResnetBlock`."""

    def __init__(self, config: VQConfig, *, dtype, rngs: nnx.Rngs, norm: type = GroupNorm):
        common = {"dtype": dtype, "rngs": rngs, "norm": norm}
        outputs = [config.channels * m for m in reversed(config.channel_multipliers)]
        widths = (outputs[0], *outputs)
        last = len(outputs) - 1
        self.conv_in = conv(config.z_channels, widths[0], 3, dtype=dtype, rngs=rngs)
        self.mid = _middle(widths[0], config, **common)
        levels = []
        for i, (inputs, width) in enumerate(zip(widths, widths[1:])):
            level = Level(inputs, width, config.res_blocks + 1, config.attention and i == 0, config, **common)
            if i < last:
                level.upsample = Upsample(width, dtype=dtype, rngs=rngs)
            levels.append(level)
        self.conv_blocks = nnx.List(levels)
        self.norm_out = norm(widths[-1], config, rngs=rngs)
        self.conv_out = conv(widths[-1], 3, 3, dtype=dtype, rngs=rngs)

    def __call__(self, z: Array, *read: Array) -> Array:
        h = self.conv_in(z)
        for block in self.mid:
            h = block(h, *read)
        for level in self.conv_blocks:
            h = level(h, *read)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(nnx.silu(self.norm_out(h, *read)))


class VectorQuantizer(nnx.Module):
    """Replaces each latent by its nearest code, or by that of the largest product with it."""

    def __init__(self, config: VQConfig, *, rngs: nnx.Rngs):
        n, d = config.codebook_size, config.codebook_dim
        embedding = jax.random.uniform(rngs.params(), (n, d), minval=-1 / n, maxval=1 / n)
        self.embedding = nnx.Param(_unit(embedding) if config.l2_norm else embedding)
        self.l2_norm, self.by_product = config.l2_norm, config.by_product
        self.commitment = config.commitment

    def normalise(self, latents: Array) -> Array:
        """Latents or code vectors as they are compared and passed on: float [..., d]."""
        latents = latents.astype(jnp.float32)
        return _unit(latents) if self.l2_norm else latents

    def codebook(self) -> Array:
        return self.normalise(self.embedding[...])

    def __call__(self, latents: Array) -> Quantized:
        """Quantises float [B, h, w, d]; a tie goes to the smallest code."""
        z = self.normalise(latents)
        codebook = self.codebook()
        lengths = 0 if self.by_product else jnp.sum(codebook * codebook, axis=-1)
        distances = lengths - 2 * jnp.einsum("...d,nd->...n", z, codebook)
        codes = jnp.argmin(distances, axis=-1).astype(jnp.int32)
        chosen = codebook[codes]
        fixed = jax.lax.stop_gradient
        return Quantized(
            vectors=z + fixed(chosen - z),
            codes=codes,
            codebook_loss=jnp.mean((chosen - fixed(z)) ** 2),
            commitment_loss=self.commitment * jnp.mean((fixed(chosen) - z) ** 2),
        )


class VQModel(nnx.Module):
    """The tokenizer: pictures to codes and back.

    Args:
      config: the shape.
      dtype: type of the convolutions' inputs and weights; None keeps the parameters' own. Normalisation, attention, the
        look-up and all results are float32 in any case.
      rngs: source of the initial parameters.
    """

    def __init__(self, config: VQConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)
        self.quantize = VectorQuantizer(config, rngs=rngs)
        self.quant_conv = conv(config.z_channels, config.codebook_dim, 1, dtype=dtype, rngs=rngs)
        self.post_quant_conv = conv(config.codebook_dim, config.z_channels, 1, dtype=dtype, rngs=rngs)

    def latents(self, images: Array) -> Array:
        """Latents before quantisation: float [B, H, W, 3] in [-1, 1] -> float [B, h, w, d]."""
        return self.quant_conv(self.encoder(images))

    def encode(self, images: Array) -> Quantized:
        """Quantises float [B, H, W, 3] in [-1, 1]; H and W are multiples of `config.downsampling`."""
        return self.quantize(self.latents(images))

    def encode_codes(self, images: Array) -> Array:
        """Codes int32 [B, h, w] of float [B, H, W, 3] in [-1, 1]."""
        return self.encode(images).codes

    def decode(self, vectors: Array) -> Array:
        """Pictures float [B, H, W, 3] from code vectors float [B, h, w, d]. Not clipped: see `decode_codes`."""
        return self.decoder(self.post_quant_conv(vectors))

    def decode_codes(self, codes: Array) -> Array:
        """Pictures float [B, H, W, 3] in [-1, 1] from codes int [B, h, w]."""
        return jnp.clip(self.decode(self.codebook()[codes]), -1, 1)

    def codebook(self) -> Array:
        """Code vectors as used at look-up (unit vectors under `l2_norm`): float [n, d]."""
        return self.quantize.codebook()

    def raw_codebook(self) -> Array:
        """Code vectors as they are stored: float [n, d]."""
        return self.quantize.embedding[...]


def to_float(images: Array) -> Array:
    """uint8 pictures as float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(images: Array) -> Array:
    """Float pictures in [-1, 1] as uint8, rounded to nearest and clipped."""
    return jnp.round(jnp.clip(images * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)
