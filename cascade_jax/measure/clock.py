"""A fair clock: methods that are held against each other take turns, A B C, A B C; and the machine they ran on."""

import importlib.metadata
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from cascade_jax import interrupts

T = TypeVar("T")


def take_turns(
    players: Mapping[str, Callable[[int], T]],
    turns: Sequence[int],
    say: Callable[[str, int], None] = lambda what, done: None,
) -> Iterator[tuple[int, dict[str, T]]]:
    """Lets everybody play every turn, so that whatever else the machine does hits all of them alike.

    Before the first turn everybody plays it once for nothing: that compiles.

    Args:
      players: what each does in the turn of a number; it returns what was measured, see `timed`.
      say: called with (what comes next, 0), and with (what was done, 1) after each of a turn's parts.

    Yields:
      (number, {player: what it returned}) for every turn.
    """
    if not turns:
        return
    for name, play in players.items():
        say(f"compiling {name}", 0)
        play(turns[0])
    for number in turns:
        found = {}
        for name, play in players.items():
            interrupts.check()
            say(f"timing {name}", 0)
            found[name] = play(number)
            say(f"timing {name}", 1)
        yield number, found


def timed(function: Callable[..., T], *args: Any) -> tuple[float, T]:
    """Seconds that a call takes until its arrays are there, and what it returns."""
    begin = time.perf_counter()
    out = jax.block_until_ready(function(*args))
    return time.perf_counter() - begin, out


def seconds(function: Callable[..., Any], *args: Any, repeats: int, best: bool = False) -> float:
    """The median time of a call, or the best, after one that is not counted."""
    turns = take_turns({"": lambda _: timed(function, *args)[0]}, range(repeats))
    times = [found[""] for _, found in turns]
    return float(min(times) if best else np.median(times))


def machine() -> dict[str, Any]:
    """What figures were measured on, and with which versions."""
    device = jax.devices()[0]
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = f"{model}, {cores} cores"
    return {
        "device": cpu if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "cpu": cpu,
        "system": platform.platform(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    }
