"""Where the time goes: each part of a step, the loop around them, the memory's limit, and batches."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cascade_jax import methods as by_name
from cascade_jax import pipeline, platforms, sharding
from cascade_jax.bundle import Bundle, Prompt, default_sampling
from cascade_jax.measure import parts
from cascade_jax.measure.clock import machine, seconds
from cascade_jax.measure.limits import bandwidth, matmul_rate, peak_memory
from cascade_jax.methods import AR, Method
from cascade_jax.tree import Tree, name_of


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
        "tree": name_of(method.tree),
        **parts.parts(bundle, method, prompts[:1], sampling, steps, repeats),
    }
    progress("the target by tree size")
    spent = parts.target_passes(bundle, prompts[:1], sampling, 4 * repeats)
    result["target_pass"] = [
        {"nodes": tree.num_nodes, "seconds": own, "ratio": own / spent[0]} for tree, own in zip(parts.SIZES, spent)
    ]
    progress("the memory's limit")
    strict = by_name.method(AR, bundle)
    step = parts.loops(bundle, [strict], prompts[:1], sampling, steps, repeats)[0]["step"]
    weights, speed = weight_bytes(bundle), bandwidth()
    read = weights / speed
    result[AR] = {"step": step, "weight_bytes": weights, "bandwidth": speed, "read": read, "ratio": step / read}
    progress("products of matrices")
    (verified,) = parts.target_passes(bundle, prompts[:1], sampling, repeats, [method.tree])
    pixels = seconds(bundle.images, jnp.zeros((1, bundle.length), jnp.int32), repeats=min(repeats, 3))
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
        needed = sharding.needed(bundle.config, {}, result["dtype"], data=1, model=1, batch=batch)["caches"]
        if needed > 0.5 * platforms.free_memory():
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


def projection(result: dict[str, Any], length: int, alpha: float) -> dict[str, float]:
    """Seconds of a picture of `length` tokens from measured costs and an acceptance that was not measured here.

    A picture is a prefill, which yields the first token, steps that yield `alpha` + 1 tokens each, and pixels.
    """
    around = result["prefill"] + result["report"]["pixels"]
    ar = around + (length - 1) * result[AR]["step"]
    drawn = around + (length - 1) / (alpha + 1) * result["loop"]
    return {"alpha": alpha, AR: ar, "seconds": drawn, "speedup": ar / drawn}


def _rate(bundle, method, prompts, sampling, steps, repeats, whole) -> dict[str, float]:
    (times,) = parts.loops(bundle, [method], prompts, sampling, steps, repeats)
    if whole:
        encoded, key = bundle.encode(prompts), jax.random.key(0)
        given = method.on(bundle), encoded, key, method.rule, method.tree, sampling
        draw = functools.partial(pipeline.generate, *given, **method.drawn)
        return {"step": times["step"], "pictures_per_second": len(prompts) / seconds(draw, repeats=min(repeats, 3))}
    if method.tree.depth:
        return {"step": times["step"], "pictures_per_second": None}
    pixels = seconds(bundle.images, jnp.zeros((len(prompts), bundle.length), jnp.int32), repeats=2)
    total = times["prefill"] + (bundle.length - 1) * times["step"] + pixels
    return {"step": times["step"], "pictures_per_second": len(prompts) / total}


def weight_bytes(bundle) -> int:
    """Bytes of the target's weights that a step reads: all but embeddings and the caption's network."""
    skipped = ("embedding", "caption", "label")
    leaves = jax.tree_util.tree_leaves_with_path(bundle.params["target"])
    return sum(x.nbytes for path, x in leaves if not any(name in jax.tree_util.keystr(path) for name in skipped))
