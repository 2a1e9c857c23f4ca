"""MoVQ tokenizers: MoVQGAN's `movqgan_270M.ckpt`, and Emu3's as its authors publish it and in the Hugging Face layout.

Emu3's is made for films. What its convolutions over time do to a picture, which is four equal frames of which the first
is kept, are convolutions in space (`cascade_jax.models.movq`): their kernels are made here. Kernels are [out, in,
frames, height, width]; frames before the first are zero.
"""

from collections.abc import Callable, Sequence

import numpy as np

from cascade_jax.models.movq import MoVQConfig
from checkpoints_convert import vqgan
from checkpoints_convert.formats import Format, Known
from checkpoints_convert.sources import Source
from checkpoints_convert.table import Rule
from checkpoints_convert.tensors import ConvertError
from checkpoints_convert.transforms import conv

_EPSILON = 1e-5  # of PyTorch's batch normalisation
_HALVINGS = 2  # of the number of frames: four of them are one


def only_frame(weight: np.ndarray) -> np.ndarray:
    """A kernel over frames where there is one: its last -> [height, width, in, out]."""
    return conv(weight[:, :, -1])


def four_frames(weight: np.ndarray) -> np.ndarray:
    """A kernel of four frames, two at a step, over four equal ones -> [height, width, in, 2 out]: what it makes of the
    first two, and of all."""
    parts = weight[:, :, 2:].sum(axis=2, dtype=np.float32), weight.sum(axis=2, dtype=np.float32)
    return conv(np.concatenate(parts))


def two_frames(weight: np.ndarray) -> np.ndarray:
    """A kernel of four frames over two, which lie side by side in the channels -> [height, width, 2 in, out]."""
    return conv(np.concatenate([weight[:, :, 2], weight[:, :, 3]], axis=1))


def twice(bias: np.ndarray) -> np.ndarray:
    return np.tile(bias, 2)


def norm_scale(weight: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Batch normalisation with fixed statistics is a scale, this, and a shift."""
    return weight / np.sqrt(variance.astype(np.float32) + _EPSILON)


def norm_shift(bias: np.ndarray, weight: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """The shift that goes with `norm_scale`."""
    return bias - mean * norm_scale(weight, variance)


def pointwise(weight: np.ndarray) -> np.ndarray:
    """A linear map [out, in] as a convolution [1, 1, in, out]."""
    return weight.T[None, None]


def _temporal(prefix: str) -> Sequence[Rule]:
    """Emu3's layers over time, and the convolutions around the bottleneck, which are over time as well."""
    first = f"{prefix}encoder.time_conv.0.conv.conv"
    rules = [
        Rule(f"{first}.weight", "encoder_time.time_conv.0.kernel", four_frames),
        Rule(f"{first}.bias", "encoder_time.time_conv.0.bias", twice),
        Rule(f"{prefix}encoder.time_conv.1.conv.conv.weight", "encoder_time.time_conv.1.kernel", two_frames),
    ]
    for theirs, ours in (
        ("{}oder.time_conv.{{}}.conv.conv", "{}oder_time.time_conv.{{}}"),
        ("{}oder.time_res_stack.{{}}.conv1.conv", "{}oder_time.time_res_stack.{{}}.conv1"),
        ("{}oder.time_res_stack.{{}}.conv2.conv", "{}oder_time.time_res_stack.{{}}.conv2"),
    ):
        for side in ("enc", "dec"):
            name, path = prefix + theirs.format(side), ours.format(side)
            rules += [Rule(f"{name}.weight", f"{path}.kernel", only_frame), Rule(f"{name}.bias", f"{path}.bias")]
    for side in ("encoder", "decoder"):
        for norm in ("norm1", "norm2"):
            name, path = f"{prefix}{side}.time_res_stack.{{}}.{norm}", f"{side}_time.time_res_stack.{{}}.{norm}"
            scale = f"{name}.weight", f"{name}.running_var"
            shift = f"{name}.bias", f"{name}.weight", f"{name}.running_mean", f"{name}.running_var"
            rules += [Rule(scale, f"{path}.scale", norm_scale), Rule(shift, f"{path}.bias", norm_shift)]
    for name in ("quant_conv", "post_quant_conv"):
        rules += [Rule(f"{prefix}{name}.conv.weight", f"{name}.kernel", only_frame)]
        rules += [Rule(f"{prefix}{name}.conv.bias", f"{name}.bias")]
    return rules


def _original(config: MoVQConfig) -> Sequence[Rule]:
    return (*_temporal(""), *vqgan.taming_names(config, finest_first=True))


def _hugging_face(config: MoVQConfig) -> Sequence[Rule]:
    """Its attention is made of linear maps, with the norm beside it, and its levels have a module to themselves."""
    prefix, rules = "vqmodel.", list(_temporal("vqmodel."))
    for i in range(levels := len(config.channel_multipliers)):
        for side, theirs in (("encoder", f"down_block.down.{i}"), ("decoder", f"up_block.up.{levels - 1 - i}")):
            name, path = f"{prefix}{side}.{theirs}", f"{side}.conv_blocks.{i}"
            rules += _attention(f"{name}.attn.{{}}", f"{name}.attn_norms.{{}}", f"{path}.attn.{{}}")
            rules += vqgan.leaves(f"{name}.block.**", f"{path}.res.**")
            rules += vqgan.leaves(f"{name}.**", f"{path}.**")
    for side in ("encoder", "decoder"):
        name = f"{prefix}{side}.middle_block"
        rules += _attention(f"{name}.attn_1", f"{name}.attn_norm", f"{side}.mid.1")
        for i, block in ((0, "block_1"), (2, "block_2")):
            rules += vqgan.leaves(f"{name}.{block}.**", f"{side}.mid.{i}.**")
    rules += [Rule(f"{prefix}quantize.embedding.weight", "quantize.embedding")]
    return (*rules, *vqgan.leaves(f"{prefix}**", "**"))


def _attention(theirs: str, norm: str, ours: str) -> list[Rule]:
    rules = []
    for own, name in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("proj_out", "out_proj")):
        rules += [Rule(f"{theirs}.{name}.weight", f"{ours}.{own}.kernel", pointwise)]
        rules += [Rule(f"{theirs}.{name}.bias", f"{ours}.{own}.bias")]
    plain = Rule(f"{norm}.weight", f"{ours}.norm.scale"), Rule(f"{norm}.bias", f"{ours}.norm.bias")
    return [*rules, *plain, *vqgan.leaves(f"{norm}.**", f"{ours}.norm.**")]


def _configure(source: Source, known: Known) -> MoVQConfig:
    del known
    return vqgan.configure(source, "", down="down", block="block", kind=MoVQConfig)


def _configure_emu3(prefix: str, down: str) -> Callable[[Source, Known], MoVQConfig]:
    def configure(source: Source, known: Known) -> MoVQConfig:
        del known
        for side in ("encoder", "decoder"):
            count = sum(name.startswith(f"{prefix}{side}.time_conv.") for name in source.tensors) // 2
            if count != _HALVINGS:
                raise ConvertError(
                    f"{source.path} halves the number of frames {count} times in its {side}, and Emu3's does it twice"
                )
        return vqgan.configure(source, prefix, down=down, block="block", kind=MoVQConfig, temporal=True)

    return configure


MOVQGAN = Format(
    "MoVQGAN",
    "vq",
    ("quantize.embedding.weight", "encoder.down.{}.block.{}.conv1.weight", "decoder.norm_out.norm_layer.weight"),
    _configure,
    lambda config: vqgan.taming_names(config, finest_first=True),
    skip=("loss.**", "ema_**"),  # what it was trained against; averages, which the public code does not use either
)
EMU3 = Format(
    "Emu3's vision tokenizer",
    "vq",
    ("quantize.embedding.weight", "encoder.time_conv.{}.conv.conv.weight", "decoder.norm_out.norm_layer.weight"),
    _configure_emu3("", "down"),
    _original,
    skip=("**.num_batches_tracked",),  # statistics of training
)
EMU3_HUGGING_FACE = Format(
    "Emu3's vision tokenizer, Hugging Face layout",
    "vq",
    ("vqmodel.quantize.embedding.weight", "vqmodel.encoder.time_conv.{}.conv.conv.weight"),
    _configure_emu3("vqmodel.", "down_block.down"),
    _hugging_face,
    skip=("**.num_batches_tracked", "text_model.**"),  # as above; the other part
)
