"""Step times on the device at hand beside the plan's model of them, the launch cost that fits, and a step's profile.

    python scripts/on_device.py --out results                 one GPU; some five minutes
    python scripts/on_device.py --out results --tiny          tiny shapes, on any machine, to try it out

`scripts/on_device.sh` runs this after the tests that need a GPU. Weights are random, so that hardly a draft is
accepted: a step costs the same. Methods take turns, so that whatever else the machine does hits all alike. What has
been measured is written after every model, for the case that time runs out.
"""

import argparse
import dataclasses
import json
import pathlib
import shutil
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cascade_jax import decode, files, methods, pipeline
from cascade_jax.bundle import Bundle, default_sampling
from cascade_jax.measure import bench, kernels, limits, shapes
from cascade_jax.measure.clock import machine, take_turns
from cascade_jax.measure.devices import DEVICES, Roofline
from cascade_jax.measure.plan import model
from cascade_jax.models.llamagen import LlamaGenConfig

TINY = LlamaGenConfig(
    dim=64, layers=2, heads=2, image_tokens=64, vocab_size=512, condition_tokens=5, caption_dim=8, ffn_multiple=32
)
NAMES = ("ar", "cascade")


@dataclasses.dataclass(frozen=True)
class Ready:
    """A compiled loop, with what it takes to run it from the same state again and again."""

    run: Any
    params: Any
    start: Any
    method: methods.Method
    sampling: Any
    text: str
    compile_seconds: float


def prepare(bundle: Bundle, name: str, batch: int, steps: int) -> Ready:
    """Compiles the loop of a method for the device at hand."""
    method, sampling = methods.method(name, bundle), default_sampling(bundle.config).checked()
    program = method.program(bundle)
    params, prompts = bundle.decoding_params(program), shapes.blank(bundle, batch)
    start = lambda: jax.block_until_ready(pipeline.start(bundle, program, prompts, jax.random.key(0), sampling))
    begin = time.perf_counter()
    lowered = decode.run_jit.lower(program, params, start(), method.rule, sampling, jnp.int32(steps))
    compiled = lowered.compile()
    seconds = time.perf_counter() - begin
    return Ready(compiled, params, start, method, sampling, compiled.as_text(), seconds)


def step_seconds(ready: Ready, steps: int) -> float:
    """Of a step: the mean of a run of the loop."""
    state = ready.start()
    begin = time.perf_counter()
    state = jax.block_until_ready(ready.run(ready.params, state, ready.method.rule, ready.sampling, jnp.int32(steps)))
    return (time.perf_counter() - begin) / max(int(np.max(state.stats.steps)), 1)


def needed_bytes(bundle: Bundle, ready: Ready) -> int:
    """What a step must read once: the weights that it multiplies with, and the cache as far as it is filled."""
    weights = bench.weight_bytes(bundle)
    if ready.method.tree.depth:
        weights += sum(x.nbytes for x in jax.tree.leaves(bundle.params["drafter"]))
    state, block = ready.start(), bundle.config.target.block
    filled = int(np.sum(state.length)) * 2 * block.kv_heads * block.head_dim * bundle.config.target.layers
    return weights + filled * jnp.dtype(jax.tree.leaves(bundle.params["target"])[0].dtype).itemsize


def measure(
    ready: dict[str, Ready], bundle: Bundle, name: str, batch: int, roofline: Roofline, steps: int, repeats: int
) -> list[dict[str, Any]]:
    """A row for each method: its step's time, measured and modelled."""
    players = {method: lambda turn, own=own: step_seconds(own, steps) for method, own in ready.items()}
    turns = [found for _, found in take_turns(players, range(repeats))]
    rows = []
    for method, own in ready.items():
        cost = model.cost(kernels.body(own.text, "cuda"), roofline, beside=False)
        times, needed = [found[method] for found in turns], needed_bytes(bundle, own)
        seconds = float(np.median(times))
        rows.append({
            "model": name, "method": method, "batch": batch, "seconds": seconds, "times": times,
            "kernels": cost.kernels, "bytes": cost.bytes, "work": cost.work, "modelled": cost.seconds,
            "needed_bytes": needed, "share_of_bandwidth": needed / roofline.bandwidth / seconds,
            "compile_seconds": own.compile_seconds,
        })  # fmt: skip
    return rows


def fit(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The launch cost, and a factor on the work, that bring the model closest to what was measured, relatively."""
    seconds = np.array([row["seconds"] for row in rows])
    columns = np.array([[row["kernels"], row["work"]] for row in rows]) / seconds[:, None]
    launch, factor = np.linalg.lstsq(columns, np.ones(len(rows)), rcond=None)[0]
    alone = float(np.mean((seconds - [row["work"] for row in rows]) / [row["kernels"] for row in rows]))
    off = columns @ [launch, factor] - 1
    return {
        "launch": float(launch),
        "work_factor": float(factor),
        "launch_alone": alone,
        "worst": float(np.abs(off).max()),
    }


def profile(ready: Ready, steps: int, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Runs a few steps under the profiler, keeps its file, and returns the kernels that took most time together."""
    step_seconds(ready, steps)
    with tempfile.TemporaryDirectory() as place:
        state = ready.start()
        with jax.profiler.trace(place):
            jax.block_until_ready(ready.run(ready.params, state, ready.method.rule, ready.sampling, jnp.int32(steps)))
        (file,) = pathlib.Path(place).rglob("*.xplane.pb")
        shutil.copyfile(file, folder / "step.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(folder / "step.xplane.pb"))
    totals: dict[str, list[float]] = {}
    for plane in data.planes:
        if "/device:" in plane.name or (jax.default_backend() == "cpu" and "CPU" in plane.name):
            streams = [line for line in plane.lines if line.name.startswith("Stream")]
            for line in streams or plane.lines:  # beside its streams a GPU has lines that sum them up
                for event in line.events:
                    own = totals.setdefault(event.name, [0, 0.0])
                    own[0], own[1] = own[0] + 1, own[1] + event.duration_ns * 1e-9
    ordered = sorted(totals.items(), key=lambda item: -item[1][1])[:40]
    return [{"kernel": name, "count": count, "seconds": seconds} for name, (count, seconds) in ordered]


def roofline() -> Roofline:
    """That of the device at hand: of the table where it is known, with the bandwidth that can be measured."""
    kind, measured = jax.local_devices()[0].device_kind.lower(), limits.bandwidth()
    known = next((device.roofline for name, device in DEVICES.items() if name in kind), None)
    if known is not None:
        return known
    return Roofline(measured, limits.matmul_rate("bfloat16"), launch=2e-6, link=measured, exchange=1e-5)


def markdown(result: dict[str, Any]) -> str:
    """Everything as tables."""
    used, device = result["roofline"], result["machine"]["device"]
    lines = [f"# Steps on {device}, measured and modelled", "", f"    {result['command']}", ""]
    lines += [
        f"Bandwidth by the table {used['bandwidth'] / 1e9:,.0f} GB/s, measured {result['bandwidth'] / 1e9:,.0f} GB/s."
    ]
    if result["fit"]:
        f = result["fit"]
        lines += [
            f"Fitted: {1e6 * f['launch']:.2f} µs a kernel and {f['work_factor']:.2f} times the modelled work, off by "
            f"at most {100 * f['worst']:.0f} %. With the work as it is, {1e6 * f['launch_alone']:.2f} µs a kernel."
        ]
    head = ("model", "method", "batch", "step", "modelled", "kernels", "bytes", "share of the bandwidth")
    lines += ["", f"| {' | '.join(head)} |", "|---|---|---:|---:|---:|---:|---:|---:|"]
    for r in result["rows"]:
        figures = f"{1e3 * r['seconds']:.3f} ms", f"{1e3 * r['modelled']:.3f} ms", f"{r['kernels']:,}"
        figures += f"{r['bytes'] / 1e9:.2f} GB", f"{100 * r['share_of_bandwidth']:.0f} %"
        lines.append(f"| {' | '.join((r['model'], r['method'], str(r['batch']), *figures))} |")
    if result["profile"]:
        lines += ["", f"## Profile of {result['profiled']}", "", "| kernel | count | together |", "|---|---:|---:|"]
        lines += [f"| `{p['kernel'][:90]}` | {p['count']} | {1e6 * p['seconds']:.0f} µs |" for p in result["profile"]]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The script's flags."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--out", type=pathlib.Path, required=True)
    made.add_argument("--tiny", action="store_true", help="tiny shapes, to try it out on any machine")
    made.add_argument("--shapes", default="llamagen-xl,janus-pro-7b")
    made.add_argument("--batch", default="1,8")
    made.add_argument("--steps", type=int, default=48)
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--seconds", type=float, default=300, help="start nothing new after so many")
    return made


def main(argv: list[str]) -> int:
    """Exit status 0, or 1 if time ran out before everything was measured."""
    begin, given = time.perf_counter(), parser().parse_args(argv)
    names, steps, repeats = given.shapes.split(","), given.steps, given.repeats
    if given.tiny:
        shapes.SHAPES["tiny"] = TINY
        names, steps, repeats = ["tiny"], 4, 1
    given.out.mkdir(parents=True, exist_ok=True)
    used = roofline()
    result = {
        "command": f"python scripts/on_device.py {' '.join(argv)}", "machine": machine(),
        "bandwidth": limits.bandwidth(), "roofline": dataclasses.asdict(used), "rows": [], "fit": None,
        "profiled": None, "profile": [], "left_out": [],
    }  # fmt: skip
    for name in names:
        bundle = shapes.random_bundle(name, "float32" if given.tiny else "bfloat16")
        for batch in map(int, given.batch.split(",")):
            if time.perf_counter() - begin > given.seconds:
                result["left_out"].append(f"{name}, batch {batch}")
                continue
            ready = {method: prepare(bundle, method, batch, steps) for method in NAMES}
            result["rows"] += measure(ready, bundle, name, batch, used, steps, repeats)
            if len(result["rows"]) > 2:
                result["fit"] = fit(result["rows"])
            if result["profiled"] is None:
                result["profiled"] = f"3 steps of cascade, {name}, batch {batch}"
                result["profile"] = profile(ready["cascade"], 3, given.out)
            with files.published(given.out) as temporary:
                (temporary / "steps.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                (temporary / "steps.md").write_text(markdown(result), encoding="utf-8")
            print(f"{time.perf_counter() - begin:.0f} s: {name}, batch {batch}", file=sys.stderr, flush=True)
        del bundle
    print(markdown(result))
    return 1 if result["left_out"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
