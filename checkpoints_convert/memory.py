"""How much memory a conversion takes: `python -m checkpoints_convert.memory --gigabytes 4`.

Makes a checkpoint of that size with the shapes of a 7B model (a file of zeros, which takes no room on most disks),
converts it, and prints the most memory that the process held beside the pages of mapped files.
"""

import argparse
import json
import pathlib
import struct
import tempfile
import threading
import time

from cascade_jax import bundle
from cascade_jax.models.vq import DS16
from checkpoints_convert import convert, llamagen
from checkpoints_convert.table import Rule

DIM, FFN, VOCAB, HEADS = 4096, 11008, 16384, 32


def write_zeros(file: pathlib.Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> int:
    """A safetensors file of zeros; returns its size in bytes."""
    header, end, width = {}, 0, {"BF16": 2, "F32": 4}[dtype]
    for name, shape in shapes.items():
        size = width
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    return 8 + len(text) + end


def target_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Tensors of LlamaGen's Hugging Face layout in the sizes of its 7B model."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, DIM),
        "model.norm.weight": (DIM,),
        "lm_head.weight": (VOCAB, DIM),
        "model.cls_embedding.embedding_table.weight": (1001, DIM),
    }
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{x}_proj.weight": (DIM, DIM) for x in "qkvo"}
        shapes |= {f"{layer}.mlp.{x}_proj.weight": (FFN, DIM) for x in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (DIM, FFN)
        shapes |= {f"{layer}.{x}_layernorm.weight": (DIM,) for x in ("input", "post_attention")}
    return shapes


def vq_shapes() -> dict[str, tuple[int, ...]]:
    """Tensors of the published VQ."""
    parameters, found = bundle.shapes("vq", DS16), {}
    for path, shape in parameters.items():
        rule: Rule = next(r for r in llamagen.VQ.rules(DS16) if r.path == path or path.endswith(r.path[2:]))
        name = rule.names[0].replace("**", path.rpartition(".")[0])
        found[name] = shape[::-1][:2] + shape[:2] if len(shape) == 4 else shape
    return found


def held() -> int:
    """Bytes that this process holds beside the pages of mapped files (Linux)."""
    status = pathlib.Path("/proc/self/status").read_text()
    return sum(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--dtype", choices=("bf16", "fp32", "stored"), default="bf16")
    options = parser.parse_args()
    layers = max(1, round((options.gigabytes * 1e9 - 4 * VOCAB * DIM) / (2 * (4 * DIM * DIM + 3 * DIM * FFN))))
    with tempfile.TemporaryDirectory() as folder:
        home = pathlib.Path(folder)
        (home / "model").mkdir()
        size = write_zeros(home / "model" / "model.safetensors", target_shapes(layers))
        settings = {"block_size": 256, "num_attention_heads": HEADS}
        (home / "model" / "config.json").write_text(json.dumps(settings))
        write_zeros(home / "vq.safetensors", vq_shapes(), "F32")
        most, done, before = [held()], threading.Event(), held()

        def watch():
            while not done.wait(0.005):
                most[0] = max(most[0], held())

        watcher = threading.Thread(target=watch)
        watcher.start()
        begin = time.perf_counter()
        try:
            convert("llamagen", [home / "model", home / "vq.safetensors"], home / "out", dtype=options.dtype)
        finally:
            done.set()
            watcher.join()
        seconds = time.perf_counter() - begin
    print(
        f"{size / 1e9:.2f} GB in {seconds:.0f} s; at most {most[0] / 1e9:.2f} GB held, "
        f"{(most[0] - before) / 1e9:.2f} GB more than at the start"
    )


if __name__ == "__main__":
    main()
