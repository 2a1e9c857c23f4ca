"""Small random models of `transformers`, saved as the hub has them, and the same models as our modules.

Sizes are the smallest that the code takes: its group norms have 32 groups.
"""

import base64
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import published
import torch
import transformers
from flax import nnx

from cascade_jax import bundle, decode
from cascade_jax import cache as kv
from cascade_jax.acceptance import strict
from cascade_jax.cache import Context
from cascade_jax.drafters.eagle import Eagle1, EagleConfig
from cascade_jax.tree import Tree
from checkpoints_convert.convert import planned
from checkpoints_convert.formats import Format, Known
from checkpoints_convert.sources import open_source
from checkpoints_convert.table import make

CODES = 64
NAMES = ["<s>", "<pad>", "</s>", "<unk>"]


def code_name(code: int) -> str:
    return "IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z"


def chameleon_vocabulary() -> dict[str, int]:
    """128 tokens; the codes' ids are in no order, as in the published one."""
    order = np.random.default_rng(1).permutation(CODES)
    marks = ["<eoss>", "<racm3:break>", "<reserved08706>", "<image>", "<reserved08799>"]
    sizes = [f"<reserved{8800 + i:05d}>" for i in range(5)]
    names = NAMES + [code_name(code) for code in order] + marks + sizes
    return {name: i for i, name in enumerate(names + [chr(ord("!") + i) for i in range(128 - len(names))])}


def janus_vocabulary() -> dict[str, int]:
    """96 tokens."""
    marks = [
        "<unk>",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜▁pad▁｜>",
        "<begin_of_image>",
        "<image_placeholder>",
    ]
    return {name: i for i, name in enumerate(marks + [chr(ord("!") + i) for i in range(96 - len(marks))])}


VQ = {"base_channels": 32, "channel_multiplier": [1, 1, 1, 1, 1], "num_res_blocks": 1, "latent_channels": 32}


def chameleon(seed: int = 0, **changes) -> transformers.ChameleonForConditionalGeneration:
    config = transformers.ChameleonConfig(
        **{
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vq_config": {"embed_dim": 8, "num_embeddings": CODES, "resolution": 64, **VQ},
            "vocabulary_map": chameleon_vocabulary(),
            **changes,
        }
    )
    return _random(transformers.ChameleonForConditionalGeneration(config), seed)


def janus(seed: int = 0) -> transformers.JanusForConditionalGeneration:
    text = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        rms_norm_eps=1e-6,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    # the size of the SigLIP side is that of the pictures to be drawn: 16 codes
    vision = transformers.JanusVisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=64,
        num_image_tokens=16,
        patch_size=16,
        projection_dim=32,
        depth=2,
    )
    vq = transformers.JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=CODES,
        num_patches=4,
        projection_dim=32,
        image_token_embed_dim=32,
        num_hidden_layers=2,
        **VQ,
    )
    config = transformers.JanusConfig(text_config=text, vision_config=vision, vq_config=vq, image_token_id=5)
    model = _random(transformers.JanusForConditionalGeneration(config), seed)
    codebook = model.model.vqmodel.quantize.embedding.weight.data
    codebook /= codebook.norm(
        dim=-1, keepdim=True
    )  # transformers normalises codes when it decodes, not when it encodes
    model.generation_config.generation_kwargs = {"boi_token_id": 4}
    model.generation_config.bos_token_id, model.generation_config.pad_token_id = 1, 3
    return model


EMU3_VQ = {
    "codebook_size": CODES, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1,
    "attn_resolutions": [1], "hidden_size": 32, "num_attention_heads": 1,
}  # fmt: skip


def ibq() -> dict[str, np.ndarray]:
    """Emu3.5's picture tokenizer: VQGAN's tensors."""
    sizes = dict(channels=32, multipliers=(1,) * 5, blocks=1, latent=32, codes=CODES, width=8)
    return published.vqgan(**sizes, attention=True)


def emu3_vq(seed: int = 0) -> transformers.Emu3VQVAE:
    """Emu3's tokenizer of pictures and films; two levels, with statistics of its batch norms that matter."""
    return _with_statistics(_random(transformers.Emu3VQVAE(transformers.Emu3VQVAEConfig(**EMU3_VQ)), seed), seed)


def _with_statistics(model, seed: int):
    rng = np.random.default_rng(seed)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.data = torch.tensor(0.5 + rng.random(buffer.shape), dtype=torch.float32)
    return model


def emu3(vocabulary: dict[str, int], seed: int = 0) -> transformers.Emu3ForConditionalGeneration:
    text = {
        "vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip
    config = transformers.Emu3Config(text_config=text, vq_config=EMU3_VQ, vocabulary_map=vocabulary)
    return _with_statistics(_random(transformers.Emu3ForConditionalGeneration(config), seed), seed)


def emu3_5(vocabulary: dict[str, int], seed: int = 0) -> transformers.Qwen3ForCausalLM:
    """Emu3.5's architecture, tensors and their names are Qwen3's."""
    config = transformers.Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
    )
    return _random(transformers.Qwen3ForCausalLM(config), seed)


def write_tiktoken(folder: pathlib.Path, longer: tuple[bytes, ...] = (b"th", b"the", b" t", b" the")) -> pathlib.Path:
    """Emu3's text tokenizer: a word for every byte, numbered as in the published one, longer ones, and the codes."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    words = [*(bytes([i]) for i in (*seen, *(i for i in range(256) if i not in seen))), *longer]
    folder.mkdir(parents=True, exist_ok=True)
    lines = (f"{base64.b64encode(word).decode()} {number}" for number, word in enumerate(words))
    (folder / "emu3.tiktoken").write_text("\n".join(lines) + "\n")
    marks = ("<|image token|>", "<|image start|>", "<|image end|>")
    names = (*marks, *(f"<|visual token {code:06d}|>" for code in range(CODES)))
    (folder / "emu3_vision_tokens.txt").write_text("\n".join(names) + "\n")
    return folder / "emu3.tiktoken"


def emu3_vq_original(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Emu3's tokenizer under its authors' names, of a Hugging Face model's tensors: the names are those of
    `Emu3VisionVQModel` in github.com/baaivision/Emu3, and attention is made of convolutions."""
    names = {
        "vqmodel.": "",
        "down_block.": "",
        "up_block.": "",
        "middle_block.attn_norm": "mid.attn_1.norm",
        "middle_block": "mid",
        **{f"attn_norms.{i}": f"attn.{i}.norm" for i in range(3)},
        "q_proj": "q",
        "k_proj": "k",
        "v_proj": "v",
        "out_proj": "proj_out",
    }
    renamed = {}
    for name, value in weights.items():
        if not name.startswith("vqmodel."):
            continue
        linear = "_proj.weight" in name
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = value[:, :, None, None] if linear else value
    return renamed


def clip(end: int, seed: int = 0) -> transformers.CLIPModel:
    """50 tokens, of which 48 starts and 49 ends a caption of at most 10; `end` is what the settings call the latter."""
    text = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 10, "bos_token_id": 48, "eos_token_id": end, "pad_token_id": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 5, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    model = _random(transformers.CLIPModel(config), seed)
    model.logit_scale.data = torch.tensor(4.6052)
    return model


def _random(model, seed: int):
    """Weights large enough that every token and position matters, norms away from one and biases from zero."""
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if "norm" in name:
            values = (1.0 if name.endswith("weight") else 0.0) + 0.2 * rng.standard_normal(shape)
        elif len(shape) == 1:
            values = 0.1 * rng.standard_normal(shape)
        else:
            fan = 1 if "embed" in name else np.prod(shape[1:])
            values = rng.standard_normal(shape) * fan**-0.5
        parameter.data = torch.tensor(values, dtype=torch.float32)
    return model.eval()


def save(
    model, directory: pathlib.Path, vocabulary: dict[str, int] | None = None, shards: str = "50GB"
) -> pathlib.Path:
    """A folder as the hub has it; with a vocabulary, a tokenizer too."""
    model.save_pretrained(directory, max_shard_size=shards)
    if vocabulary is not None:
        write_tokenizer(directory / "tokenizer.json", vocabulary)
    return directory


def write_tokenizer(file: pathlib.Path, vocabulary: dict[str, int]) -> pathlib.Path:
    """A byte-level BPE tokenizer without merges, in whose vocabulary single characters are words."""
    file.parent.mkdir(parents=True, exist_ok=True)
    added = [
        {
            "id": i,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for name, i in vocabulary.items()
        if name.startswith("<") and len(name) > 1
    ]
    settings = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "unk_token": "<unk>", "vocab": vocabulary, "merges": []},
    }
    file.write_text(json.dumps(settings))
    return file


def module(layout: Format, path: pathlib.Path, known: Known | None = None, dtype=jnp.float32):
    """A published part as our module, by its table."""
    part = planned(layout, open_source(path), known or Known({}))
    kinds = dict(bundle.KINDS[layout.part].values())
    graph, state = nnx.split(nnx.eval_shape(lambda: kinds[type(part.config)](part.config, rngs=nnx.Rngs(0))))
    tree: dict = {}
    for dotted, step in part.steps.items():
        array = make(step, part.source.tensors)
        *folders, name = (int(k) if k.isdigit() else k for k in dotted.split("."))
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = jnp.asarray(array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array)
    nnx.replace_by_pure_dict(state, tree)
    return nnx.merge(graph, state)


def prefix(target, prompts, guided: bool, drafter=None) -> decode.Prefix:
    """What stands before the first token."""
    (graph, state), (own, weights) = nnx.split(target), nnx.split(drafter) if drafter else (None, None)
    return bundle.prefix(graph, own, guided, (state, weights), target.config.stack(prompts))


def drafter(target) -> Eagle1:
    """Random, but guessing that the feature changes little, so that part of its drafts is accepted."""
    config, rng = EagleConfig(target.config.block), np.random.default_rng(5)
    module = nnx.eval_shape(lambda: Eagle1(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(module)
    normal = lambda x: rng.normal(0, 0.3 * x.shape[0] ** -0.5, x.shape) if x.ndim > 1 else np.ones(x.shape)
    state = jax.tree.map(lambda x: jnp.asarray(normal(x), jnp.float32), state)
    kernel, dim = np.array(state["fc"]["kernel"][...]), config.block.dim
    kernel[dim:] += np.eye(dim)
    state["fc"]["kernel"][...] = jnp.asarray(kernel)
    return nnx.merge(graph, state)


def drawn(target, prompts, tree: Tree, sampling) -> decode.DecodeState:
    """Strict decoding to the last token, with `drafter` if the tree has drafts."""
    own = drafter(target) if tree.depth else None
    (graph, state), (own_graph, weights) = nnx.split(target), nnx.split(own) if own else (None, None)
    program = decode.Program(graph, own_graph, tree, target.config.length, target.config.layout)
    keys = jax.random.split(jax.random.key(0), len(prompts))
    start = prefix(target, prompts, sampling.guidance is not None, own)
    params = {"target": state, "drafter": weights}
    return decode.generate_jit(program, params, start, keys, strict(), sampling.checked())


def through_vq(vq, pixels, codes):
    """A picture tokenizer's latents and codes of `pixels` [B, H, W, 3], and its pictures of `codes` int [B, h, w]."""
    return _through_vq(*nnx.split(vq), pixels, codes)


@functools.partial(jax.jit, static_argnums=0)
def _through_vq(graph, state, pixels, codes):
    vq = nnx.merge(graph, state)
    return vq.latents(pixels), vq.encode_codes(pixels), vq.decode(vq.codebook()[codes])


def scored(target, prefix: decode.Prefix, tokens) -> tuple[jax.Array, jax.Array]:
    """Features and logits of tokens int [R, T], teacher-forced."""
    return _scored(*nnx.split(target), prefix, jnp.asarray(tokens))


@functools.partial(jax.jit, static_argnums=0)
def _scored(graph, state, prefix, tokens):
    target = nnx.merge(graph, state)
    features = decode.at_tokens(decode.teacher_forced(target, prefix, tokens), prefix, tokens.shape[1])
    return features, target.logits(features)


def fed_through_cache(target, prefix: decode.Prefix, tokens, tree: Tree, nodes):
    """A target's features of tokens int [R, T] fed one by one, [R, T + 1, d], the first of them the prefix's last; and,
    after all of them, of a tree's `nodes` int [R, N] in one pass, [R, N, d]."""
    graph, state = nnx.split(target)
    last, cache = _read(graph, state, prefix, tokens.shape[1])
    seen, length = [last], np.asarray(prefix.length)
    for t in range(tokens.shape[1]):
        one = np.zeros(1, int), np.eye(1, dtype=bool)
        features, cache = _new(graph, state, tokens[:, t : t + 1], *one, cache, length)
        length = length + 1
        seen.append(features)
    topology = tree.topology
    features, _ = _new(graph, state, nodes, topology.depths, topology.ancestors, cache, length)
    return np.concatenate(seen, axis=1), features


@functools.partial(jax.jit, static_argnums=(0, 3))
def _read(graph, state, prefix, room):
    target, (rows, slots) = nnx.merge(graph, state), prefix.embeddings.shape[:2]
    positions = jnp.broadcast_to(jnp.arange(slots), (rows, slots))
    context = Context(target.rope(positions), kv.bias(kv.causal(slots))[None, None])
    features, cache = target(prefix.embeddings, context)
    last = jnp.take_along_axis(features, (prefix.length - 1)[:, None, None], axis=1)
    return last, kv.write(kv.room(cache, slots + room), cache, jnp.zeros(rows, jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def _new(graph, state, tokens, depths, ancestors, cache, length):
    target = nnx.merge(graph, state)
    seen = kv.filled(kv.slots(cache), length)
    context = Context(target.rope(length[:, None] + depths), kv.bias(ancestors)[None, None], (seen,))
    features, fresh = target(target.embed(tokens), context, (cache,))
    return features, kv.write(cache, fresh, length)
