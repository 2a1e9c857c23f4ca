"""Cosmos' discrete video tokenizer as NVIDIA publishes it: `nvidia/Cosmos-1.0-Tokenizer-DV8x16x16`, TorchScript
archives of encoder, decoder and both (`autoencoder.jit`).

What its layers do to a film of one frame are convolutions in space (`cascade_jax.models.cosmos`), whose kernels are
made here. Theirs are [out, in, frames, height, width]. Every frame that they see is the same, so a kernel over time is
the sum over its frames, a linear map; one that follows a convolution, or is added to the identity, is part of it.
"""

from collections.abc import Callable, Sequence

import numpy as np

from cascade_jax.models.cosmos import DV8X16X16, CosmosConfig
from checkpoints_convert.formats import Format, Known
from checkpoints_convert.sources import Source
from checkpoints_convert.table import Rule
from checkpoints_convert.tensors import ConvertError

# Buffers of the wavelets and of the quantiser, which TorchScript keeps; attention's choice among one frame; and what
# goes unused where time is neither halved nor doubled.
_IDLE = (
    "**.wavelets", "**._arange", "**.patch_size_buffer", "quantizer.**", "inv_quant.**", "**.attn_1.1.q.**",
    "**.attn_1.1.k.**", "**.downsample.conv2.**", "**.upsample.conv1.**",
)  # fmt: skip


def _still(weight: np.ndarray) -> np.ndarray:
    """A kernel on frames that are all the same: [out, in, height, width], float32."""
    return weight.sum(axis=2, dtype=np.float32)


def _linear(weight: np.ndarray) -> np.ndarray:
    """A kernel over time alone: [out, in]."""
    return _still(weight)[:, :, 0, 0]


def _flax(kernel: np.ndarray) -> np.ndarray:
    """[out, in, height, width] -> [height, width, in, out]."""
    return kernel.transpose(2, 3, 1, 0)


def _beside_identity(matrix: np.ndarray) -> np.ndarray:
    return matrix + np.eye(len(matrix), dtype=np.float32)


def _behind(matrix: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """A linear map of what a kernel makes, as one kernel."""
    return np.tensordot(matrix, kernel, 1)


def alone(weight: np.ndarray) -> np.ndarray:
    """One convolution."""
    return _flax(_still(weight))


def pair(space: np.ndarray, time: np.ndarray) -> np.ndarray:
    """A convolution over space, then one over time."""
    return _flax(_behind(_linear(time), _still(space)))


def pair_bias(time: np.ndarray, space_bias: np.ndarray, time_bias: np.ndarray) -> np.ndarray:
    return _linear(time) @ space_bias.astype(np.float32) + time_bias


def _halved(space: np.ndarray) -> np.ndarray:
    """A convolution that halves the resolution, beside the mean of the squares that become one."""
    kernel = _still(space)
    kernel[:, :, :2, :2] += np.eye(len(kernel), dtype=np.float32)[:, :, None, None] / 4
    return kernel


def down(space: np.ndarray, last: np.ndarray) -> np.ndarray:
    return _flax(_behind(_linear(last), _halved(space)))


def down_timed(space: np.ndarray, time: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The same where time is halved: a convolution over it beside the mean of the frames that become one."""
    return _flax(_behind(_linear(last) @ _beside_identity(_linear(time)), _halved(space)))


def down_timed_bias(time: np.ndarray, last: np.ndarray, *biases: np.ndarray) -> np.ndarray:
    first, second, third = (bias.astype(np.float32) for bias in biases)
    return _linear(last) @ (_beside_identity(_linear(time)) @ first + second) + third


def up(space: np.ndarray, last: np.ndarray) -> np.ndarray:
    """A convolution beside the identity, then a linear map."""
    kernel = _still(space)
    kernel[:, :, 1, 1] = _beside_identity(kernel[:, :, 1, 1])
    return _flax(_behind(_linear(last), kernel))


def up_time(time: np.ndarray) -> np.ndarray:
    return _flax(_beside_identity(_linear(time))[:, :, None, None])


def _norm(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}.norm.weight", f"{ours}.scale"), Rule(f"{theirs}.norm.bias", f"{ours}.bias")]


def _alone(theirs: str, ours: str) -> list[Rule]:
    return [
        Rule(f"{theirs}.conv3d.weight", f"{ours}.kernel", alone),
        Rule(f"{theirs}.conv3d.bias", f"{ours}.bias"),
    ]


def _pair(first: str, second: str, ours: str) -> list[Rule]:
    weights, biases = ([f"{name}.conv3d.{kind}" for name in (first, second)] for kind in ("weight", "bias"))
    return [
        Rule(tuple(weights), f"{ours}.kernel", pair),
        Rule((weights[1], *biases), f"{ours}.bias", pair_bias),
    ]


def _block(theirs: str, ours: str) -> list[Rule]:
    rules = _alone(f"{theirs}.nin_shortcut", f"{ours}.nin_shortcut")
    for i in (1, 2):
        rules += _norm(f"{theirs}.norm{i}", f"{ours}.norm{i}")
        rules += _pair(f"{theirs}.conv{i}.0", f"{theirs}.conv{i}.1", f"{ours}.conv{i}")
    return rules


def _side(name: str) -> list[Rule]:
    """What encoder and decoder have in common."""
    middle, rules = f"{name}.mid", []
    for own in ("conv_in", "conv_out"):
        rules += _pair(f"{name}.{own}.0", f"{name}.{own}.1", f"{name}.{own}")
    rules += _block(f"{middle}.block_1", f"{middle}.0") + _block(f"{middle}.block_2", f"{middle}.3")
    for own in ("q", "k", "v", "proj_out"):
        rules += _alone(f"{middle}.attn_1.0.{own}", f"{middle}.1.{own}")
    for i in (0, 1):
        rules += _norm(f"{middle}.attn_1.{i}.norm", f"{middle}.{1 + i}.norm")
    rules += _pair(f"{middle}.attn_1.1.v", f"{middle}.attn_1.1.proj_out", f"{middle}.2.out")
    return rules + _norm(f"{name}.norm_out", f"{name}.norm_out")


def _rules(config: CosmosConfig) -> Sequence[Rule]:
    rules, count = [*_side("encoder"), *_side("decoder")], len(config.channel_multipliers)
    for i in range(count):
        rules += _block(f"encoder.down.{i}.block.{{}}", f"encoder.conv_blocks.{i}.res.{{}}")
        rules += _block(f"decoder.up.{count - 1 - i}.block.{{}}", f"decoder.conv_blocks.{i}.res.{{}}")
        ours, parts = f"encoder.conv_blocks.{i}.downsample.conv", f"encoder.down.{i}.downsample.conv"
        if i == 0:  # time is halved once, at the first level
            weights, biases = ([f"{parts}{n}.conv3d.{kind}" for n in (1, 2, 3)] for kind in ("weight", "bias"))
            rules += [Rule(tuple(weights), f"{ours}.kernel", down_timed)]
            rules += [Rule((*weights[1:], *biases), f"{ours}.bias", down_timed_bias)]
        else:
            rules += _with(f"{parts}1", f"{parts}3", ours, down)
        ours, parts = f"decoder.conv_blocks.{i}.upsample", f"decoder.up.{count - 1 - i}.upsample.conv"
        rules += [Rule(f"{parts}1.conv3d.weight", f"{ours}.time.kernel", up_time)]
        rules += [Rule(f"{parts}1.conv3d.bias", f"{ours}.time.bias")]
        rules += _with(f"{parts}2", f"{parts}3", f"{ours}.conv", up)
    return (*rules, *_alone("quant_conv", "quant_conv"), *_alone("post_quant_conv", "post_quant_conv"))


def _with(first: str, second: str, ours: str, kernel: Callable[..., np.ndarray]) -> list[Rule]:
    """A convolution of its own kind and the linear map behind it."""
    _, bias = _pair(first, second, ours)
    return [Rule((f"{first}.conv3d.weight", f"{second}.conv3d.weight"), f"{ours}.kernel", kernel), bias]


def _configure(source: Source, known: Known) -> CosmosConfig:
    del known
    channels, bands = source.shape("encoder.conv_in.0.conv3d.weight")[:2]
    block = "encoder.down.{}.block.{}.conv1.0.conv3d.weight"
    multipliers, blocks = [], 0
    while (name := block.format(len(multipliers), 0)) in source.tensors:
        multipliers.append(source.shape(name)[0] // channels)
    while block.format(0, blocks) in source.tensors:
        blocks += 1
    patch = round((bands / 3) ** (1 / 3))
    if 3 * patch**3 != bands:
        raise ConvertError(f"{source.path} reads {bands} channels of wavelets, which are no colours of cubes of pixels")
    stated = source.tensors.get("quantizer._levels")
    levels = DV8X16X16.levels if stated is None else tuple(map(int, stated.read()))
    return CosmosConfig(
        codebook_size=int(np.prod(levels)),
        codebook_dim=source.shape("quant_conv.conv3d.weight")[0],
        channels=channels,
        channel_multipliers=tuple(multipliers),
        res_blocks=blocks,
        z_channels=source.shape("encoder.conv_out.1.conv3d.weight")[0],
        levels=levels,
        patch=patch,
    )


DISCRETE_VIDEO = Format(
    "Cosmos' discrete video tokenizer",
    "vq",
    ("post_quant_conv.conv3d.weight", "decoder.up.{}.block.{}.conv1.0.conv3d.weight"),
    _configure,
    _rules,
    skip=_IDLE,
)
