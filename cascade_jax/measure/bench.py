"""Where the time goes: each part of a step, the loop around them, the memory's limit, and batches.

Parts are jitted apart and run one after the other on the very states that the loop goes through, so that their sum and
the loop's time are of the same steps with the same random numbers.
"""

import dataclasses
import functools
import json
import pathlib
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from cascade_jax import decode, files, pipeline, platforms
from cascade_jax import methods as by_name
from cascade_jax.bundle import Bundle, Config, Prompt, abstract, default_sampling, laid_out
from cascade_jax.draft import Draft
from cascade_jax.drafters.eagle import EagleConfig
from cascade_jax.measure.clock import machine
from cascade_jax.methods import AR, Method
from cascade_jax.models import chameleon, janus, llamagen
from cascade_jax.models.vq import DS16
from cascade_jax.sampling import Sampling
from cascade_jax.tree import EAGLE_25, LANTERNPP_57, ROOT, Tree, chain

try:
    import resource
except ImportError:  # Windows
    resource = None

SIZES = (ROOT, chain(5), chain(9), EAGLE_25, LANTERNPP_57)  # 1, 6, 10, 26 and 58 nodes
SHAPES = {
    "llamagen-xl": ("llamagen", llamagen.preset("XL", image_tokens=1024)),
    "llamagen-7b": ("llamagen", llamagen.preset("7B", image_tokens=1024)),
    "lumina-mgpt-7b": ("chameleon", chameleon.preset("lumina-mgpt-7b-768")),
    "janus-pro-7b": ("janus", janus.preset("7B")),
}
PARTS = ("draft", "target", "verify", "commit")


def config_of(shapes: str) -> Config:
    """A configuration of published sizes with a drafter.

    Raises:
      ValueError: for unknown names.
    """
    if shapes not in SHAPES:
        raise ValueError(f"unknown shapes {shapes!r}; known: {', '.join(SHAPES)}")
    family, target = SHAPES[shapes]
    drafter = EagleConfig(dataclasses.replace(target.block, input_norm=False), **target.picture_places)
    sampling = {"temperature": 1.0, "top_k": 2000, "guidance": 3.0}
    return Config(
        family, target, drafter, dataclasses.replace(DS16, codebook_size=target.codebook_size), sampling=sampling
    )


def random_bundle(shapes: str, dtype=None, layers: int | None = None) -> Bundle:
    """A model with random weights of published sizes, for measuring alone; its drafter is EAGLE-1's.

    Args:
      layers: of the target; None for as many as are published.

    Raises:
      ValueError: for other names, or if there is not enough memory.
    """
    config = config_of(shapes)
    if layers is not None:
        config = dataclasses.replace(config, target=dataclasses.replace(config.target, layers=layers))
    dtype = platforms.defaults().dtype if dtype is None else dtype
    shapes_of = abstract(config, dtype).params
    skeleton = {part: shapes_of[part] for part in ("target", "drafter", "vq")}
    needed = _bytes(skeleton, dtype)
    if needed > 0.8 * platforms.free_memory():
        free = platforms.free_memory() / 1e9
        raise ValueError(f"{shapes} needs {needed / 1e9:.1f} GB, and {free:.1f} GB are free: try --dtype bfloat16")

    @functools.partial(jax.jit, static_argnums=0)
    def fill(shape, key):
        return 0.02 * jax.random.normal(key, shape, dtype)

    def leaf(path, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.arange(x.size, dtype=x.dtype)
        if "scale" in jax.tree_util.keystr(path):
            return jnp.ones(x.shape, dtype)
        filled = fill(x.shape, jax.random.key(zlib.crc32(jax.tree_util.keystr(path).encode())))
        product = "kernel" in jax.tree_util.keystr(path) and "vq" not in jax.tree_util.keystr(path[:1])
        return laid_out(filled) if product else filled

    return Bundle(config, {"text": None, **jax.tree_util.tree_map_with_path(leaf, skeleton)})


def bench(
    bundle: Bundle,
    method: Method,
    prompts: Sequence[str | Prompt],
    *,
    name: str,
    batches: Sequence[int] = (1, 2, 4, 8, 16),
    steps: int = 16,
    repeats: int = 5,
    whole: bool = True,
    alpha: float | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Measures a model.

    Args:
      method: the speculative method; its tree is static.
      prompts: as many as the largest batch.
      steps: steps to time the loop and its parts with.
      repeats: how often everything is timed; medians are reported.
      whole: draw whole pictures for the batches. Otherwise, as random weights ask for, AR's rate is reckoned from the
        time of its steps and the speculative method's is left out.
      alpha: accepted drafts per step to project whole pictures with, as random weights, which accept next to nothing,
        ask for; None for no projection.

    Returns:
      All times in seconds: {"model", "machine", "dtype", "tree", "prefill", "parts": {part: time}, "sum", "loop",
      "overhead": loop / sum - 1, "target_pass": [{"nodes", "seconds", "ratio"}], "vq", "ar": {"step", "weight_bytes",
      "bandwidth" (bytes/s), "read", "ratio"}, "report": {"bandwidth", "matmul" (operations/s), "ar_share",
      "verify_share" (of the bandwidth's limit), "pixels", "peak_memory" (bytes)}, "projection", "batches": [{"batch",
      METHOD: {"step", "pictures_per_second"}}]}.
    """
    sampling = default_sampling(bundle.config).checked()
    check_tree(method)
    progress("the parts of a step")
    result = {
        "model": name,
        "machine": machine(),
        "dtype": str(jax.tree.leaves(bundle.params["target"])[0].dtype),
        "method": method.name,
        "tree": by_name.tree_name(method.tree),
        **_parts(bundle, method, prompts[:1], sampling, steps, repeats),
    }
    progress("the target by tree size")
    result["target_pass"] = _target_passes(bundle, prompts[:1], sampling, repeats)
    progress("the memory's limit")
    strict = by_name.method(AR, bundle)
    step = _loop(bundle, strict, prompts[:1], sampling, steps, repeats)["step"]
    weights, speed = _weight_bytes(bundle), bandwidth()
    read = weights / speed
    result[AR] = {"step": step, "weight_bytes": weights, "bandwidth": speed, "read": read, "ratio": step / read}
    progress("products of matrices")
    verified = _seconds_of_target(bundle, method.tree, prompts[:1], sampling, repeats)
    pixels = _seconds(bundle.images, jnp.zeros((1, bundle.length), jnp.int32), repeats=min(repeats, 3))
    result["report"] = {
        "bandwidth": speed,
        "matmul": matmul_rate(result["dtype"]),
        "ar_share": read / step,
        "verify_share": read / verified,
        "pixels": pixels,
        "peak_memory": peak_memory(),
    }
    result["projection"] = None if alpha is None else projection(result, bundle.length, alpha)
    result["batches"] = []
    for batch in batches:
        progress(f"batch {batch}")
        if (needed := _cache_bytes(bundle, batch)) > 0.5 * platforms.free_memory():
            result["batches"].append({"batch": batch, "skipped": f"its caches need {needed / 1e9:.1f} GB"})
            continue
        row = {"batch": batch}
        for chosen in (strict, method):
            row[chosen.name] = _rate(bundle, chosen, prompts[:batch], sampling, steps, repeats, whole)
        result["batches"].append(row)
    return result


def check_tree(method: Method) -> None:
    """Raises a ValueError unless the method drafts on a static tree."""
    if not isinstance(method.tree, Tree) or not method.tree.depth:
        raise ValueError(f"bench takes a method with a static draft tree, not {method.name}: give another, or --tree")


def blank(bundle: Bundle, count: int) -> list[Prompt]:
    """Encoded prompts without meaning."""
    return [bundle.config.target.blank()] * count


def bandwidth(size: int = 2**28) -> float:
    """The memory's speed in bytes per second: the best of reading, and of copying, an array of `size` bytes."""
    x = jnp.ones((256, size // 4 // 256), jnp.float32)
    reads = _seconds(jax.jit(lambda x: jnp.sum(x, axis=1)), x, repeats=8, best=True)
    copies = _seconds(jax.jit(lambda x: x + 1), x, repeats=8, best=True)
    return max(size / reads, 2 * size / copies)


def matmul_rate(dtype, size: int | None = None) -> float:
    """Operations per second of a product of two square matrices, summed in float32; the best of several runs."""
    size = size or (1024 if jax.default_backend() == "cpu" else 8192)
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    return 2 * size**3 / _seconds(product, x, repeats=8, best=True)


def peak_memory() -> float | None:
    """Most bytes that were in use at once: on the device, or by the process where the device is the CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    if resource is None:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most if sys.platform == "darwin" else 1024 * most)


def projection(result: dict[str, Any], length: int, alpha: float) -> dict[str, float]:
    """Seconds of a picture of `length` tokens from measured costs and an acceptance that was not measured here.

    A picture is a prefill, which yields the first token, steps that yield `alpha` + 1 tokens each, and pixels.
    """
    around = result["prefill"] + result["report"]["pixels"]
    ar = around + (length - 1) * result[AR]["step"]
    drawn = around + (length - 1) / (alpha + 1) * result["loop"]
    return {"alpha": alpha, AR: ar, "seconds": drawn, "speedup": ar / drawn}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _propose(program, params, memory, state, sampling):
    return decode.propose(program, params, state.replace(drafter=memory), sampling)


_target_pass = jax.jit(decode.target_pass, static_argnums=0)
_decide = jax.jit(decode.decide, static_argnums=0)
_commit = jax.jit(decode.commit, static_argnums=0, donate_argnums=(2, 4))


def _parts(bundle, method, prompts, sampling, steps, repeats) -> dict[str, Any]:
    program = bundle.program(method.tree)
    params = bundle.decoding_params(program)
    times: dict[str, list[float]] = {part: [] for part in PARTS}
    prefills, loops = [], []
    for repeat in range(repeats + 1):  # the first compiles and is dropped
        begin = time.perf_counter()
        state = _start(bundle, method, prompts, sampling)
        prefill = time.perf_counter() - begin
        seconds, taken = _timed_loop(program, params, state, method.rule, sampling, steps)
        state = _start(bundle, method, prompts, sampling)
        spent = dict.fromkeys(PARTS, 0.0)

        def clocked(part, function, *args, spent=spent):
            begin = time.perf_counter()
            out = jax.block_until_ready(function(*args))
            spent[part] += time.perf_counter() - begin
            return out

        for _ in range(taken):
            memory, state = state.drafter, state.replace(drafter=None)
            drafted, memory = clocked("draft", _propose, program, params, memory, state, sampling)
            features, fresh = clocked("target", _target_pass, program, params, state, drafted)
            decided = clocked("verify", _decide, program, params, state, drafted, features, method.rule, sampling)
            verdict, _, laws = decided
            state = clocked("commit", _commit, program, params, state, drafted, memory, features, fresh, verdict, laws)
        if repeat:
            prefills.append(prefill)
            loops.append(seconds / taken)
            for part in PARTS:
                times[part].append(spent[part] / taken)
    parts = {part: float(np.median(seconds)) for part, seconds in times.items()}
    sums = np.sum(list(times.values()), axis=0)
    return {
        "prefill": float(np.median(prefills)),
        "parts": parts,
        "sum": float(np.median(sums)),
        "loop": float(np.median(loops)),
        "overhead": float(np.median(np.array(loops) / sums) - 1),
    }


def _target_passes(bundle, prompts, sampling, repeats) -> list[dict[str, float]]:
    rows = []
    for tree in SIZES:
        seconds = _seconds_of_target(bundle, tree, prompts, sampling, 4 * repeats)
        rows.append({"nodes": tree.num_nodes, "seconds": seconds})
    return [row | {"ratio": row["seconds"] / rows[0]["seconds"]} for row in rows]


def _seconds_of_target(bundle, tree, prompts, sampling, repeats) -> float:
    """Of one pass of the target over the nodes of `tree`."""
    program = bundle.program(tree)
    state = _start(bundle, Method("", None, tree), prompts, sampling)
    drafted = Draft(jnp.zeros((len(prompts), tree.num_nodes), jnp.int32), None, None)
    state, params = state.replace(drafter=None), bundle.decoding_params(program)
    return _seconds(functools.partial(_target_pass, program), params, state, drafted, repeats=repeats)


def step_times(
    bundle: Bundle, methods: Sequence[Method], prompts, sampling: Sampling, steps: int, repeats: int
) -> list[float]:
    """Seconds of a step of each method's loop: medians of `repeats` runs of at most `steps` steps.

    Compilation is excluded. The methods take turns, so that whatever else the machine does hits all of them alike.
    """
    return [times["step"] for times in _loops(bundle, methods, prompts, sampling, steps, repeats)]


def _loop(bundle, method, prompts, sampling, steps, repeats) -> dict[str, float]:
    return _loops(bundle, [method], prompts, sampling, steps, repeats)[0]


def _loops(bundle, methods, prompts, sampling, steps, repeats) -> list[dict[str, float]]:
    """Medians of the prefill and of a step of the loop, for each method."""
    prefills, loops = np.zeros((repeats + 1, len(methods))), np.zeros((repeats + 1, len(methods)))
    for turn in range(repeats + 1):
        for number, method in enumerate(methods):
            program = bundle.program(method.tree)
            params = bundle.decoding_params(program)
            begin = time.perf_counter()
            state = _start(bundle, method, prompts, sampling)
            prefills[turn, number] = time.perf_counter() - begin
            seconds, taken = _timed_loop(program, params, state, method.rule, sampling, steps)
            loops[turn, number] = seconds / taken
    medians = zip(np.median(prefills[1:], axis=0), np.median(loops[1:], axis=0))
    return [{"prefill": float(prefill), "step": float(step)} for prefill, step in medians]


def _rate(bundle, method, prompts, sampling, steps, repeats, whole) -> dict[str, float]:
    times = _loop(bundle, method, prompts, sampling, steps, repeats)
    if whole:
        encoded, key = bundle.encode(prompts), jax.random.key(0)
        draw = functools.partial(pipeline.generate, bundle, encoded, key, method.rule, method.tree, sampling)
        return {"step": times["step"], "pictures_per_second": len(prompts) / _seconds(draw, repeats=min(repeats, 3))}
    if method.tree.depth:
        return {"step": times["step"], "pictures_per_second": None}
    pixels = _seconds(bundle.images, jnp.zeros((len(prompts), bundle.length), jnp.int32), repeats=2)
    total = times["prefill"] + (bundle.length - 1) * times["step"] + pixels
    return {"step": times["step"], "pictures_per_second": len(prompts) / total}


def _start(bundle, method, prompts, sampling) -> decode.DecodeState:
    return jax.block_until_ready(pipeline.start(bundle, prompts, jax.random.key(0), method.tree, sampling))


def _timed_loop(program, params, state, rule, sampling, steps) -> tuple[float, int]:
    begin = time.perf_counter()
    state = jax.block_until_ready(decode.run_jit(program, params, state, rule, sampling, steps))
    return time.perf_counter() - begin, max(int(np.max(state.stats.steps)), 1)


def _seconds(function, *args, repeats: int, best: bool = False) -> float:
    """Median time of a call, or the best, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - begin)
    return float(min(times[1:]) if best else np.median(times[1:]))


def _weight_bytes(bundle) -> int:
    """Bytes of the target's weights that a step reads: all but embeddings and the caption's network."""
    skipped = ("embedding", "caption", "label")
    leaves = jax.tree_util.tree_leaves_with_path(bundle.params["target"])
    return sum(x.nbytes for path, x in leaves if not any(name in jax.tree_util.keystr(path) for name in skipped))


def _cache_bytes(bundle, batch: int) -> int:
    """Bytes of the target's keys and values for a guided batch."""
    block = bundle.config.target.block
    prefix = bundle.prefix(blank(bundle, 1), guided=True)
    slots = prefix.embeddings.shape[1] + bundle.length + 64
    size = jax.tree.leaves(bundle.params["target"])[0].dtype.itemsize
    return 2 * batch * bundle.config.target.layers * 2 * block.kv_heads * block.head_dim * slots * size


def _bytes(tree, dtype) -> int:
    return sum(x.size for x in jax.tree.leaves(tree)) * jnp.dtype(dtype).itemsize


def _pairs(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The result's single figures, named, as text."""
    ms = lambda seconds: f"{1e3 * seconds:.2f} ms"
    ar = result[AR]
    return [
        ("prefill", ms(result["prefill"])),
        *((part, ms(seconds)) for part, seconds in result["parts"].items()),
        ("sum of the parts", ms(result["sum"])),
        ("a step of the loop", f"{ms(result['loop'])} ({100 * result['overhead']:+.1f} %)"),
        *(
            (f"target, {row['nodes']} node{'s' * (row['nodes'] > 1)}", f"{ms(row['seconds'])} ({row['ratio']:.2f}x)")
            for row in result["target_pass"]
        ),
        ("AR step", ms(ar["step"])),
        (
            f"reading {ar['weight_bytes'] / 1e6:.0f} MB of weights at {ar['bandwidth'] / 1e9:.1f} GB/s",
            f"{ms(ar['read'])} (an AR step takes {ar['ratio']:.1f}x)",
        ),
        *_report_pairs(result["report"]),
        *_projection_pairs(result["method"], result["projection"]),
    ]


def _report_pairs(report: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = [
        ("memory bandwidth", f"{report['bandwidth'] / 1e9:.1f} GB/s"),
        ("products of matrices", f"{report['matmul'] / 1e12:.2f} T operations/s"),
        ("share of the bandwidth's limit, AR step", f"{100 * report['ar_share']:.0f} %"),
        ("the same, verifying the tree", f"{100 * report['verify_share']:.0f} %"),
        ("pixels of a picture", f"{1e3 * report['pixels']:.2f} ms"),
    ]
    if report["peak_memory"] is not None:
        pairs.append(("most memory in use", f"{report['peak_memory'] / 1e9:.2f} GB"))
    if "compile_seconds" in report:
        pairs.append(("compiling, or reading compiled programs", f"{report['compile_seconds']:.1f} s"))
    return pairs


def _projection_pairs(method: str, projected: dict[str, float] | None) -> list[tuple[str, str]]:
    if projected is None:
        return []
    given = f"projection for a given alpha of {projected['alpha']:g}, not a measurement"
    return [
        ("projected picture, AR", f"{projected['ar']:.2f} s"),
        (f"projected picture, {method}", f"{projected['seconds']:.2f} s ({projected['speedup']:.2f}x; {given})"),
    ]


def _batch_rows(result: dict[str, Any]) -> list[list[str]]:
    """A head, then step times and pictures per second by batch."""
    names = (AR, result["method"])
    table = [["batch", *(f"{name} {what}" for name in names for what in ("step", "pictures/s", "against batch 1"))]]
    first = next((row for row in result["batches"] if "skipped" not in row), None)
    for row in result["batches"]:
        if "skipped" in row:
            table.append([str(row["batch"]), row["skipped"], *[""] * 5])
            continue
        cells = [str(row["batch"])]
        for name in names:
            rate = row[name]["pictures_per_second"]
            against = "–" if rate is None else f"{rate / first[name]['pictures_per_second']:.2f}x"
            cells += [f"{1e3 * row[name]['step']:.2f} ms", "–" if rate is None else f"{rate:.3g}", against]
        table.append(cells)
    return table


def tables(result: dict[str, Any]) -> list[Table]:
    """The result for a terminal."""
    title = f"{result['model']}, {result['dtype']}, {result['tree']}, on {result['machine']['device']}"
    parts = Table("", "", title=title)
    for pair in _pairs(result):
        parts.add_row(*pair)
    head, *body = _batch_rows(result)
    batches = Table(*head)
    for row in body:
        batches.add_row(*row)
    return [parts, batches]


def markdown(result: dict[str, Any], command: str) -> str:
    """The result as Markdown."""
    head, *body = _batch_rows(result)
    lines = [f"# {result['model']}: where the time goes", "", f"    {command}", ""]
    lines += [f"{result['dtype']}, tree {result['tree']}, on {result['machine']['device']}; batch 1 unless said.", ""]
    lines += ["| part | time |", "|---|---:|", *(f"| {name} | {figure} |" for name, figure in _pairs(result)), ""]
    lines += [f"| {' | '.join(row)} |" for row in (head, ["---:"] * len(head), *body)]
    return "\n".join(lines) + "\n"


def write(folder: pathlib.Path, result: dict[str, Any], command: str) -> None:
    """Writes bench.json and bench.md, both or none."""
    with files.published(folder) as temporary:
        stored = json.dumps({"command": command, **result}, indent=2)
        (temporary / "bench.json").write_text(stored + "\n", encoding="utf-8")
        (temporary / "bench.md").write_text(markdown(result, command), encoding="utf-8")
