"""What differs between kinds of machines, in one place, and what memory they have. Everything here can be overridden.

Caches have the weights' type and one layout everywhere, see `cache.KV`: one head's keys together is nine times faster
on CPU and what matrix units like elsewhere.
"""

import os
import pathlib
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Defaults:
    """A platform's defaults.

    Attributes:
      dtype: of weights, activations and caches; products are summed in float32 everywhere. (`--dtype`)
      tree: the draft tree of methods that have none of their own, until `tune-tree` has found a better one. (`--tree`)
      output_major: from how many numbers on a float32 kernel lies output-major (`models.transformer.OutputMajor`).
    """

    dtype: str
    tree: str
    output_major: float = float("inf")


DEFAULTS = {
    # XLA's CPU backend converts bfloat16 weights to float32 in every product. Kernels of a million numbers and more are
    # multiplied with up to 64 rows 1.3 to 2 times sooner when they lie output-major; small ones are not.
    "cpu": Defaults("float32", "eagle25", output_major=2**20),
    "gpu": Defaults("bfloat16", "eagle25"),
    "tpu": Defaults("bfloat16", "eagle25"),
}


def defaults() -> Defaults:
    """Those of the platform that JAX runs on; a GPU's for one that is not known here."""
    return DEFAULTS.get(jax.default_backend(), DEFAULTS["gpu"])


def free_memory() -> float:
    """Bytes of free memory on the device of this process that has least; infinite where that cannot be told.

    Devices of the platform "cpu" share what the machine has.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("bytes_limit" in own for own in stats):
        return min(own["bytes_limit"] - own.get("bytes_in_use", 0) for own in stats)
    if jax.default_backend() != "cpu":  # the machine's own memory is no measure for a device that does not tell
        return float("inf")
    meminfo = pathlib.Path("/proc/meminfo")
    if meminfo.exists():
        lines = (line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        return float(next(lines).split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return float("inf")


def check_memory(parts: dict[str, int], devices: int = 1) -> None:
    """Makes sure that every device has room, before anything is allocated.

    Args:
      parts: bytes on one device, by what they are for.
      devices: how many devices need as much.

    Raises:
      ValueError: if it does not suffice; the message has the numbers.
    """
    needed, free = sum(parts.values()), free_memory()
    if jax.default_backend() == "cpu":
        needed *= devices
    if needed > free:
        what = " and ".join(f"{size / 1e9:.1f} GB for {name}" for name, size in parts.items())
        each = f" on each of {devices} devices" if devices > 1 else ""
        raise ValueError(
            f"too little memory: {what}{each}, and {free / 1e9:.1f} GB are free; try --dtype bfloat16, fewer pictures "
            "at once, or a mesh with more model="
        )
