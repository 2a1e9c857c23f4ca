"""Small random checkpoints in exactly the layouts that are published: tensors by name.

A tensor's numbers depend on its name and shape alone, so that the reference outputs under tests/golden, which come from
the public code with these very weights loaded (`strict=True`), need no weights beside them.
"""

import json
import pathlib
import zlib

import numpy as np

DIM, LAYERS, HEADS, FFN = 128, 2, 2, 512
CODES, CAPTION, SLOTS, CLASSES, TOKENS = 64, 24, 6, 5, 16

Tensors = dict[str, np.ndarray]


def tensor(name: str, *shape: int) -> np.ndarray:
    """Random numbers that keep the size of what passes through; around one for the weights of norms."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) == 1:
        around = 1.0 if name.endswith("weight") else 0.0
        return (around + 0.2 * rng.standard_normal(shape)).astype(np.float32)
    embedding = any(word in name for word in ("embed", "shared"))
    size = np.prod(shape[1:]) if not embedding else 1
    return (rng.standard_normal(shape) * size**-0.5).astype(np.float32)


def _made(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    return {name: tensor(name, *shape) for name, shape in shapes.items()}


def llamagen(*, classes: bool = False) -> Tensors:
    """FoundationVision's own layout, as in t2i_XL_stage1_256.pt and c2i_B_256.pt."""
    shapes = {
        "tok_embeddings.weight": (CODES, DIM),
        "norm.weight": (DIM,),
        "output.weight": (CODES, DIM),
        **_conditions("cls_embedding", classes),
    }
    for i in range(LAYERS):
        shapes |= {
            f"layers.{i}.attention.wqkv.weight": (3 * DIM, DIM),
            f"layers.{i}.attention.wo.weight": (DIM, DIM),
            f"layers.{i}.feed_forward.w1.weight": (FFN, DIM),
            f"layers.{i}.feed_forward.w3.weight": (FFN, DIM),
            f"layers.{i}.feed_forward.w2.weight": (DIM, FFN),
            f"layers.{i}.attention_norm.weight": (DIM,),
            f"layers.{i}.ffn_norm.weight": (DIM,),
        }
    return _made(shapes)


def _conditions(prefix: str, classes: bool) -> dict[str, tuple[int, ...]]:
    if classes:
        return {f"{prefix}.embedding_table.weight": (CLASSES + 1, DIM)}
    return {
        f"{prefix}.uncond_embedding": (SLOTS, CAPTION),
        f"{prefix}.cap_proj.fc1.weight": (DIM, CAPTION),
        f"{prefix}.cap_proj.fc2.weight": (DIM, DIM),
    }


def llamagen_hf() -> Tensors:
    """The layout of jadohu/LlamaGen-T2I's model.safetensors."""
    shapes = {
        "model.embed_tokens.weight": (CODES, DIM),
        "model.norm.weight": (DIM,),
        "lm_head.weight": (CODES, DIM),
        **_conditions("model.cls_embedding", False),
    }
    for i in range(LAYERS):
        shapes |= _llama_layer(f"model.layers.{i}") | {f"model.layers.{i}.input_layernorm.weight": (DIM,)}
    return _made(shapes)


def _llama_layer(layer: str) -> dict[str, tuple[int, ...]]:
    return {
        **{f"{layer}.self_attn.{x}_proj.weight": (DIM, DIM) for x in "qkvo"},
        f"{layer}.mlp.gate_proj.weight": (FFN, DIM),
        f"{layer}.mlp.up_proj.weight": (FFN, DIM),
        f"{layer}.mlp.down_proj.weight": (DIM, FFN),
        f"{layer}.post_attention_layernorm.weight": (DIM,),
    }


LLAMAGEN_HF_SETTINGS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "input_type": "t2i",
    "block_size": TOKENS,
    "cls_token_num": SLOTS,
    "caption_dim": CAPTION,
    "num_classes": 1000,
    "class_dropout_p": 0.1,
    "token_dropout_p": 0.1,
    "hidden_size": DIM,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "rms_norm_eps": 1e-5,
    "rope_base": 10000,
    "pretraining_tp": 1,
    "vocab_size": CODES,
}


def drafter() -> Tensors:
    """The layout of jadohu/llamagen_drafter's pytorch_model.bin: one layer, without an input norm."""
    return _made(
        {
            "embed_tokens.weight": (CODES, DIM),
            "fc.weight": (DIM, 2 * DIM),
            "fc.bias": (DIM,),
            **_llama_layer("layers.0"),
        }
    )


DRAFTER_SETTINGS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "input_type": "t2i",
    "hidden_act": "silu",
    "hidden_size": DIM,
    "intermediate_size": FFN,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "pretraining_tp": 1,
    "vocab_size": CODES,
}

DRAFTED = 24  # tokens that the EAGLE-3 drafter can draw


def eagle3() -> Tensors:
    """The layout of EAGLE-3's published drafters: no token embedding, a head for part of the vocabulary."""
    layer = "midlayer"
    tensors = _made(
        {
            "fc.weight": (DIM, 3 * DIM),
            f"{layer}.self_attn.q_proj.weight": (DIM, 2 * DIM),
            f"{layer}.self_attn.k_proj.weight": (DIM // 2, 2 * DIM),
            f"{layer}.self_attn.v_proj.weight": (DIM // 2, 2 * DIM),
            f"{layer}.self_attn.o_proj.weight": (DIM, DIM),
            f"{layer}.mlp.gate_proj.weight": (FFN, DIM),
            f"{layer}.mlp.up_proj.weight": (FFN, DIM),
            f"{layer}.mlp.down_proj.weight": (DIM, FFN),
            f"{layer}.hidden_norm.weight": (DIM,),
            f"{layer}.input_layernorm.weight": (DIM,),
            f"{layer}.post_attention_layernorm.weight": (DIM,),
            "norm.weight": (DIM,),
            "lm_head.weight": (DRAFTED, DIM),
        }
    )
    drawn = np.sort(np.random.default_rng(3).permutation(CODES)[:DRAFTED])
    t2d = np.zeros(CODES, bool)
    t2d[drawn] = True
    return {**tensors, "d2t": drawn - np.arange(DRAFTED), "t2d": t2d}


EAGLE3_SETTINGS = {
    **DRAFTER_SETTINGS,
    "num_key_value_heads": HEADS // 2,
    "draft_vocab_size": DRAFTED,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
}

CHANNELS, LATENT = 32, 64


def vq(multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)) -> Tensors:
    """The layout of vq_ds16_t2i.pt; with multipliers 1 2 2 4, of vq_ds8_c2i.pt."""
    shapes: dict[str, tuple[int, ...]] = {
        "quantize.embedding.weight": (CODES, 8),
        "quantize.codebook_used": (65536,),
        "quant_conv.weight": (8, LATENT, 1, 1),
        "quant_conv.bias": (8,),
        "post_quant_conv.weight": (LATENT, 8, 1, 1),
        "post_quant_conv.bias": (LATENT,),
    }

    def conv(name, inputs, outputs, size):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs, size, size), (outputs,)

    def norm(name, width):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

    def resnet(name, inputs, outputs):
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs, 3)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    widths = [CHANNELS * m for m in multipliers]
    for side, levels, blocks in (("encoder", widths, 2), ("decoder", widths[::-1], 3)):
        first = CHANNELS if side == "encoder" else levels[0]
        conv(f"{side}.conv_in", *((3, first) if side == "encoder" else (LATENT, first)), 3)
        width = first
        for i, out in enumerate(levels):
            for j in range(blocks):
                resnet(f"{side}.conv_blocks.{i}.res.{j}", width, out)
                width = out
                if out == widths[-1] and i == (len(levels) - 1 if side == "encoder" else 0):
                    attention(f"{side}.conv_blocks.{i}.attn.{j}", out)
            if i < len(levels) - 1:
                conv(f"{side}.conv_blocks.{i}.{'downsample' if side == 'encoder' else 'upsample'}.conv", out, out, 3)
        resnet(f"{side}.mid.0", widths[-1], widths[-1])
        attention(f"{side}.mid.1", widths[-1])
        resnet(f"{side}.mid.2", widths[-1], widths[-1])
        norm(f"{side}.norm_out", levels[-1])
        conv(f"{side}.conv_out", levels[-1], LATENT if side == "encoder" else 3, 3)
    return _made(shapes)


WORDS = ("a", "red", "ball", "on", "gravel", "cat", ",", ".")


def t5() -> Tensors:
    """The layout of google/flan-t5-xl, with the beginning of its decoder."""
    shapes = {"shared.weight": (4 + len(WORDS), CAPTION), "lm_head.weight": (4 + len(WORDS), CAPTION)}
    for side in ("encoder", "decoder"):
        shapes[f"{side}.final_layer_norm.weight"] = (CAPTION,)
        for i in range(2):
            block = f"{side}.block.{i}.layer"
            shapes |= {f"{block}.0.SelfAttention.{x}.weight": (32, CAPTION) for x in "qkv"}
            shapes |= {
                f"{block}.0.SelfAttention.o.weight": (CAPTION, 32),
                f"{block}.0.layer_norm.weight": (CAPTION,),
                f"{block}.1.DenseReluDense.wi_0.weight": (40, CAPTION),
                f"{block}.1.DenseReluDense.wi_1.weight": (40, CAPTION),
                f"{block}.1.DenseReluDense.wo.weight": (CAPTION, 40),
                f"{block}.1.layer_norm.weight": (CAPTION,),
            }
        shapes[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 4)
    return _made(shapes)


T5_SETTINGS = {"model_type": "t5", "d_model": CAPTION, "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6}


def write_tokenizer(file: pathlib.Path) -> None:
    """A tokenizer.json like T5's, that knows WORDS."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -5.0)] + [(f"▁{w}", -2.0) for w in WORDS]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(file))


def write_pickle(file: str | pathlib.Path, tensors: Tensors, nest: str | None = None, **beside) -> pathlib.Path:
    """A PyTorch file; under `nest`, with other entries beside, as training scripts write them."""
    import torch

    file = pathlib.Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: torch.from_numpy(value) for name, value in tensors.items()}
    torch.save({nest: weights, **beside} if nest else weights, file)
    return file


def write_folder(
    folder: str | pathlib.Path, tensors: Tensors, settings: dict, *, shards: int = 1, pickled: bool = False
) -> pathlib.Path:
    """A folder as the Hugging Face hub has it."""
    from safetensors.numpy import save_file

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    if pickled:
        write_pickle(folder / "pytorch_model.bin", tensors)
        return folder
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    where = {name: names[i % shards] for i, name in enumerate(tensors)}
    for shard in names:
        save_file({n: t for n, t in tensors.items() if where[n] == shard}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def vqgan(
    *,
    channels: int,
    multipliers: tuple[int, ...],
    blocks: int,
    latent: int,
    codes: int,
    width: int,
    attention: bool = False,
    modulated: bool = False,
) -> Tensors:
    """The layout of Chameleon's vqgan.ckpt, without what it was trained against: taming-transformers' names.

    With `attention` the lowest resolution has some, and with `modulated` the decoder's norms read the codes, as in
    MoVQGAN's movqgan_270M.ckpt.
    """
    shapes: dict[str, tuple[int, ...]] = {"quantize.embedding.weight": (codes, width)}

    def conv(name, inputs, outputs, size):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs, size, size), (outputs,)

    def norm(name, of):
        own = name
        if modulated and name.startswith("decoder"):
            own = f"{name}.norm_layer"
            conv(f"{name}.conv_y", width, of, 1)
            conv(f"{name}.conv_b", width, of, 1)
        shapes[f"{own}.weight"], shapes[f"{own}.bias"] = (of,), (of,)

    def resnet(name, inputs, outputs):
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs, 3)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attend(name, of):
        norm(f"{name}.norm", of)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", of, of, 1)

    def middle(side, of):
        resnet(f"{side}.mid.block_1", of, of)
        attend(f"{side}.mid.attn_1", of)
        resnet(f"{side}.mid.block_2", of, of)

    widths = [channels * m for m in multipliers]
    conv("quant_conv", latent, width, 1)
    conv("post_quant_conv", width, latent, 1)
    for side, first, last in (("encoder", 3, latent), ("decoder", latent, 3)):
        levels = list(enumerate(widths)) if side == "encoder" else list(enumerate(widths))[::-1]
        inner = channels if side == "encoder" else widths[-1]
        conv(f"{side}.conv_in", first, inner, 3)
        middle(side, widths[-1])
        for step, (i, out) in enumerate(levels):
            name = f"{side}.down.{i}" if side == "encoder" else f"{side}.up.{i}"
            for j in range(blocks + (side == "decoder")):
                resnet(f"{name}.block.{j}", inner, out)
                inner = out
                if attention and i == len(widths) - 1:
                    attend(f"{name}.attn.{j}", out)
            if step < len(levels) - 1:
                conv(f"{name}.{'downsample' if side == 'encoder' else 'upsample'}.conv", out, out, 3)
        norm(f"{side}.norm_out", inner)
        conv(f"{side}.conv_out", inner, last, 3)
    return _made(shapes)


def movqgan() -> Tensors:
    """The layout of movqgan_270M.ckpt, of which tests/golden/movqgan.npz has outputs."""
    sizes = dict(channels=32, multipliers=(1, 2), blocks=1, latent=4, codes=CODES, width=4)
    return vqgan(**sizes, attention=True, modulated=True)


def chameleon_drafter(
    *, dim: int, heads: int, kv_heads: int, ffn: int, vocab: int | None, qk_norm: bool = True
) -> Tensors:
    """The layout of jadohu/anole_drafter's pytorch_model.bin: one layer of the target's kind, with its input norm."""
    layer, head = "layers.0", dim // heads
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (dim, 2 * dim), "fc.bias": (dim,)}
    if vocab is not None:
        shapes["embed_tokens.weight"] = (vocab, dim)
    for x, of in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        shapes[f"{layer}.self_attn.{x}_proj.weight"] = (of * head, dim)
        if qk_norm and x != "v":
            shapes[f"{layer}.self_attn.{x}_norm.weight"] = shapes[f"{layer}.self_attn.{x}_norm.bias"] = (of, head)
    shapes |= {
        f"{layer}.self_attn.o_proj.weight": (dim, dim),
        f"{layer}.mlp.gate_proj.weight": (ffn, dim),
        f"{layer}.mlp.up_proj.weight": (ffn, dim),
        f"{layer}.mlp.down_proj.weight": (dim, ffn),
        f"{layer}.input_layernorm.weight": (dim,),
        f"{layer}.post_attention_layernorm.weight": (dim,),
    }
    return _made(shapes)


CHAMELEON_DRAFTER_SETTINGS = {
    "architectures": ["ChameleonForConditionalGeneration"],
    "model_type": "chameleon",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
JANUS_DRAFTER_SETTINGS = {"num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-6}


def inception(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """The layout of pt_inception-2015-12-05-6726825d.pth, whose `shapes` are in golden/inception.npz. The kernels are
    large enough that features still depend on the picture."""

    def made(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if not shape:
            return np.zeros((), np.int64)  # batches that were counted
        values = tensor(name, *shape)
        if name.endswith("running_var"):
            return np.exp(values)
        return np.float32(1.5) * values if len(shape) == 4 else values

    return {name: made(name, tuple(shape)) for name, shape in shapes.items()}


def cosmos() -> Tensors:
    """The layout of Cosmos' DV8x16x16, one residual block a level; tests/golden/cosmos.npz has outputs of it."""
    channels, multipliers, width = 8, (2, 4, 4), 6
    found: dict[str, tuple[int, ...]] = {}

    def conv(name: str, outputs: int, inputs: int, *kernel: int):
        found[f"{name}.conv3d.weight"] = outputs, inputs, *(kernel or (1, 1, 1))
        found[f"{name}.conv3d.bias"] = (outputs,)

    def pair(name: str, outputs: int, inputs: int):
        conv(f"{name}.0", outputs, inputs, 1, 3, 3)
        conv(f"{name}.1", outputs, outputs, 3, 1, 1)

    def norm(name: str, size: int):
        found[f"{name}.norm.weight"] = found[f"{name}.norm.bias"] = (size,)

    def block(name: str, outputs: int, inputs: int):
        for i, size in ((1, inputs), (2, outputs)):
            norm(f"{name}.norm{i}", size)
            pair(f"{name}.conv{i}", outputs, size)
        if outputs != inputs:
            conv(f"{name}.nin_shortcut", outputs, inputs)

    widths, bands = [channels * m for m in multipliers], 3 * 4**3
    last = len(widths) - 1
    pair("encoder.conv_in", channels, bands)
    pair("decoder.conv_in", widths[-1], width)
    for side in ("encoder", "decoder"):
        for i in (1, 2):
            block(f"{side}.mid.block_{i}", widths[-1], widths[-1])
        for i in (0, 1):
            norm(f"{side}.mid.attn_1.{i}.norm", widths[-1])
            for own in ("q", "k", "v", "proj_out"):
                conv(f"{side}.mid.attn_1.{i}.{own}", widths[-1], widths[-1])
    for i, (inputs, outputs) in enumerate(zip([channels, *widths], widths)):
        block(f"encoder.down.{i}.block.0", outputs, inputs)
        above = widths[min(i + 1, last)]
        for j in (0, 1):
            block(f"decoder.up.{i}.block.{j}", outputs, above if j == 0 else outputs)
        kernels = (1, 3, 3), (3, 1, 1), (1, 1, 1)
        for j, (one, other) in enumerate(zip(kernels, (kernels[1], kernels[0], kernels[2]))):
            if i < last:
                conv(f"encoder.down.{i}.downsample.conv{j + 1}", outputs, outputs, *one)
            if i > 0:
                conv(f"decoder.up.{i}.upsample.conv{j + 1}", outputs, outputs, *other)
    norm("encoder.norm_out", widths[-1])
    norm("decoder.norm_out", widths[0])
    pair("encoder.conv_out", width, widths[-1])
    pair("decoder.conv_out", bands, widths[0])
    conv("quant_conv", 6, width)
    conv("post_quant_conv", width, 6)
    return _made(found)
