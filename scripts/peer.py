"""The same random weights in PyTorch and here: seconds of a token-by-token step, on whatever device is present.

    python scripts/peer.py --shapes janus-pro-7b --out docs/peer

In PyTorch the decoder is transformers' Llama, for Lumina-mGPT's shapes with Chameleon's attention, which is what
Janus-Pro and Lumina-mGPT run on. It draws with `generate` from both guidance branches as two rows, eager and under
`torch.compile` with a static cache. It does not combine the branches, which is work that it is spared and we are not.
Both sides are timed in turns, so that whatever else the machine does hits both alike.
Before anything is timed both sides must give the same features for the same embeddings, in float32, on the first two
layers. Needs torch and transformers.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers.models.chameleon.modeling_chameleon import ChameleonAttention

from cascade_jax import cache as kv
from cascade_jax import files, methods, platforms
from cascade_jax.bundle import Bundle, default_sampling
from cascade_jax.cache import Context
from cascade_jax.measure import parts, shapes
from cascade_jax.measure.clock import machine, take_turns
from cascade_jax.models.transformer import rope_1d, run_blocks

PREFIX = 32  # prompt tokens
TOLERANCE = 1e-3  # of features in float32, whose root mean square is 1


def torch_model(model: Bundle, layers: int | None = None, dtype=torch.float32, device: str = "cpu"):
    """The target's first blocks and its last norm as a transformers Llama; embedding and head are random."""
    target, block = model.config.target, model.config.target.block
    layers = target.layers if layers is None else layers
    settings = {
        "vocab_size": model.config.vq.codebook_size, "hidden_size": block.dim, "intermediate_size": block.ffn_dim,
        "num_hidden_layers": layers, "num_attention_heads": block.heads, "num_key_value_heads": block.kv_heads,
        "rms_norm_eps": block.norm_eps, "max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": None,
        "pad_token_id": 0,
    }  # fmt: skip
    with torch.device(device):
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).to(dtype)
        if block.qk_norm:
            own = transformers.ChameleonConfig(**settings)
            own._attn_implementation = made.config._attn_implementation
            for number, layer in enumerate(made.model.layers):
                layer.self_attn = ChameleonAttention(own, number).to(dtype)
    module = model.merged("target")
    for ours, layer in zip(module.blocks, made.model.layers):
        _copy_block(ours, layer, block)
    _copy(_array(module.norm.scale), made.model.norm.weight)
    return made.eval()


def _copy_block(ours, layer, block) -> None:
    qkv = _array(ours.attention.qkv.kernel)
    query, key, value = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
    if block.rope == "interleaved":  # transformers turns the halves of a head, not neighbours
        order = np.concatenate([np.arange(0, block.head_dim, 2), np.arange(1, block.head_dim, 2)])
        query, key = query[..., order], key[..., order]
    attention, gate_up = layer.self_attn, _array(ours.ffn.gate_up.kernel)
    for part, own in ((query, attention.q_proj), (key, attention.k_proj), (value, attention.v_proj)):
        _copy(part.reshape(block.dim, -1).T, own.weight)
    _copy(_array(ours.attention.out.kernel).T, attention.o_proj.weight)
    if block.qk_norm:
        for norm, own in ((ours.attention.query_norm, attention.q_norm), (ours.attention.key_norm, attention.k_norm)):
            _copy(_array(norm.scale), own.weight)
            _copy(_array(norm.bias), own.bias)
    _copy(gate_up[:, 0].T, layer.mlp.gate_proj.weight)
    _copy(gate_up[:, 1].T, layer.mlp.up_proj.weight)
    _copy(_array(ours.ffn.down.kernel).T, layer.mlp.down_proj.weight)
    _copy(_array(ours.attention_norm.scale), layer.input_layernorm.weight)
    _copy(_array(ours.ffn_norm.scale), layer.post_attention_layernorm.weight)


def _array(param) -> np.ndarray:
    """A parameter's value, however it lies: large kernels may lie output-major."""
    return np.asarray(param[...], np.float32)


def _copy(array: np.ndarray, parameter: torch.nn.Parameter) -> None:
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.array(array, np.float32)))


def difference(model: Bundle, layers: int = 2) -> float:
    """The largest difference between both sides' features of random embeddings [2, 8, d], through the first layers."""
    block, layers = model.config.target.block, min(layers, model.config.target.layers)
    embeddings = np.random.default_rng(0).normal(size=(2, 8, block.dim)).astype(np.float32)
    module = model.merged("target")
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8))
    context = Context(rope_1d(positions, block.head_dim, 10000.0), kv.bias(kv.causal(8))[None, None])
    with jax.default_matmul_precision("highest"):
        single = jax.tree.map(lambda x: x.astype(jnp.float32), list(module.blocks)[:layers])
        ours = module.norm(run_blocks(single, jnp.asarray(embeddings), context)[0])
    with torch.no_grad():
        theirs = torch_model(model, layers).model(inputs_embeds=torch.from_numpy(embeddings)).last_hidden_state
    return float(np.max(np.abs(np.asarray(ours, np.float32) - theirs.numpy())))


def torch_clock(made, steps: int, compiled: bool) -> Callable[[int], float]:
    """A function that times `generate`: seconds for one further token of two rows."""
    device = next(made.parameters()).device
    ids = torch.randint(0, made.config.vocab_size, (2, PREFIX), device=device)
    settings = {"do_sample": True, "top_k": min(2000, made.config.vocab_size), "use_cache": True}
    forward = made.forward
    if compiled:
        forward = torch.compile(forward, mode="reduce-overhead" if device.type == "cuda" else None)
        settings["cache_implementation"] = "static"

    def seconds(tokens: int) -> float:
        made.forward = forward
        begin = time.perf_counter()
        with torch.no_grad():
            made.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, **settings
            )
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    return lambda turn: (seconds(2 + steps) - seconds(2)) / steps


def compare(model: Bundle, name: str, steps: int, repeats: int, compiled: bool = True) -> dict:
    """Seconds of a step on both sides, which take turns, and how many times longer PyTorch's takes.

    Raises:
      ValueError: if the two sides do not compute the same.
    """
    if (apart := difference(model)) > TOLERANCE:
        raise ValueError(f"the two sides do not compute the same: features differ by {apart:.2g}")
    dtype = str(jax.tree.leaves(model.params["target"])[0].dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # ROCm's name for its devices too
    method, sampling = methods.method("ar", model), default_sampling(model.config).checked()
    prompts = shapes.blank(model, 1)
    made = torch_model(model, dtype=getattr(torch, dtype), device=device)
    players = {
        "cascade_jax": lambda turn: parts.step_times(model, [method], prompts, sampling, steps, repeats=1)[0],
        "eager": torch_clock(made, steps, compiled=False),
    }
    if compiled:
        players["torch.compile"] = torch_clock(made, steps, compiled=True)
    turns = [found for _, found in take_turns(players, range(repeats))]
    times = {kind: [found[kind] for found in turns] for kind in players}
    seconds = {kind: float(np.median(own)) for kind, own in times.items()}
    return {
        "shapes": name,
        "dtype": dtype,
        "machine": machine() | {"torch": torch.__version__, "transformers": transformers.__version__},
        "torch_device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "difference": apart,
        "seconds": seconds,
        "times": times,
        "ratios": {kind: own / seconds["cascade_jax"] for kind, own in seconds.items() if kind != "cascade_jax"},
    }


def markdown(result: dict, command: str) -> str:
    """The result as a table."""
    versions = {**result["machine"]["versions"], "torch": result["machine"]["torch"]}
    versions["transformers"] = result["machine"]["transformers"]
    lines = [f"# {result['shapes']}: a token-by-token step here and in PyTorch", "", f"    {command}", ""]
    lines += [
        f"{result['dtype']}, on {result['machine']['device']}; PyTorch on {result['torch_device']}. Both sides took"
    ]
    lines += ["turns; medians.", ""]
    lines += ["| | time of a step | against cascade_jax |", "|---|---:|---:|"]
    for kind, seconds in result["seconds"].items():
        against = f"{seconds / result['seconds']['cascade_jax']:.2f}x"
        lines.append(f"| {kind} | {1e3 * seconds:.2f} ms | {against} |")
    return "\n".join([*lines, "", ", ".join(f"{name} {version}" for name, version in versions.items())]) + "\n"


def parser() -> argparse.ArgumentParser:
    """The script's flags."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--shapes", default="llamagen-xl", choices=list(shapes.SHAPES))
    made.add_argument("--dtype", default=platforms.defaults().decoding, choices=["float32", "bfloat16"])
    made.add_argument("--layers", type=int, help="fewer layers than published, to try things out")
    made.add_argument("--eager", action="store_true", help="leave torch.compile out")
    made.add_argument("--steps", type=int, default=32)
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--out", type=pathlib.Path, default=pathlib.Path("peer"))
    return made


def main(argv: list[str]) -> int:
    """Exit status 0, or 2 for what cannot be done."""
    given = parser().parse_args(argv)
    try:
        files.check_folder(given.out)
        model = shapes.random_bundle(given.shapes, given.dtype, layers=given.layers)
        result = compare(model, given.shapes, given.steps, given.repeats, compiled=not given.eager)
    except ValueError as error:
        print(f"peer.py: {error}", file=sys.stderr)
        return 2
    text = markdown(result, f"python scripts/peer.py {' '.join(argv)}")
    with files.published(given.out) as temporary:
        (temporary / "peer.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (temporary / "peer.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
