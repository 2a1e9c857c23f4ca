"""What differs between kinds of machines, in one place, and what memory they have. Everything here can be overridden.

Caches have one layout everywhere, see `cache.KV`: one head's keys together is nine times faster on CPU and what matrix
units like elsewhere.
"""

import contextlib
import contextvars
import os
import pathlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from cascade_jax import mesh


@dataclass(frozen=True)
class Defaults:
    """A platform's defaults.

    Attributes:
      dtype: of weights that are trained, and of activations; products are summed in float32 everywhere.
      decoding: of weights that are drawn with. (`--dtype`)
      tree: the draft tree of methods that have none of their own, until `tune-tree` has found a better one. (`--tree`)
      window: drafts of the target's own, of methods that draft these. (`--window`)
      output_major: from how many numbers on a float32 kernel lies output-major (`models.transformer.OutputMajor`).
      cache: the narrowest type of caches, whatever the weights have.
    """

    dtype: str
    decoding: str
    tree: str
    window: int
    output_major: float = float("inf")
    cache: str = "bfloat16"


# Of CPUs that multiply bfloat16, by who made them: those that were at hand. With two to fifty rows and matrices that no
# cache holds, AMD's cores take 0.7 to 0.9 of float32's time in bfloat16, and float32 is no faster turned around. They
# take rows by eights: a window of 11 and the token before it, twice for guidance, fill three.
_WITH_BFLOAT16 = {"AuthenticAMD": {"decoding": "bfloat16", "output_major": float("inf"), "window": 11}}


def _processor(text: str) -> dict:
    """What differs on a processor that Linux's /proc/cpuinfo, `text`, tells of."""
    found = dict(re.findall(r"^(vendor_id|flags)\s*: (.*)$", text, re.MULTILINE))
    return _WITH_BFLOAT16.get(found.get("vendor_id"), {}) if "avx512_bf16" in found.get("flags", "").split() else {}


def _cpuinfo() -> str:
    path = pathlib.Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


# On other processors that were tried XLA's CPU backend converts bfloat16 weights to float32 in every product, and
# multiplies kernels of a million numbers and more with up to 64 rows 1.3 to 2 times sooner when they lie output-major;
# small ones not. It always converts a whole bfloat16 cache when a step reads or writes it: two fifths of a step of
# LlamaGen-XL. Rows of large products are filled up to 16, which a window of 7 and the token before it, twice, are.
_CPU = Defaults("float32", "float32", "0 1 00 01 000", 7, output_major=2**20, cache="float32")

DEFAULTS = {
    "cpu": replace(_CPU, **_processor(_cpuinfo())),
    "gpu": Defaults("bfloat16", "bfloat16", "eagle25", 32),
    "tpu": Defaults("bfloat16", "bfloat16", "eagle25", 32),
}


def defaults() -> Defaults:
    """Those of the platform that JAX runs on, or lowers for; a GPU's for one that is not known here."""
    return DEFAULTS.get(_lowered.get() or jax.default_backend(), DEFAULTS["gpu"])


_lowered = contextvars.ContextVar("lowered", default=None)


@contextlib.contextmanager
def lowering(platform: str):
    """Programs traced in here are lowered for a platform, not the one JAX runs on, and `defaults` are its own."""
    token = _lowered.set(platform)
    try:
        yield
    finally:
        _lowered.reset(token)


def cache_dtype(dtype):
    """The type of a cache of keys and values that are computed in `dtype`."""
    if _portable.get():  # for all of them alike
        return jnp.dtype(dtype)
    return jnp.promote_types(dtype, defaults().cache)


_portable = contextvars.ContextVar("portable", default=False)


@contextlib.contextmanager
def portable():
    """Programs traced in here consist of operations that every platform has, whatever platform they are lowered for."""
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


def kernels() -> bool:
    """Whether a program may hold kernels of ours: not a portable one, nor one divided over devices, for XLA cannot."""
    return not _portable.get() and mesh.shards() == 1


def by_lowering(general: Callable, gpu: Callable) -> Callable:
    """A function that is `gpu` in programs lowered for CUDA or ROCm, and `general` in all others.

    The platform is that of the program, not of the process: a program can be compiled for a machine that is not there.
    Both give the same but for rounding. `gpu` also takes `interpret`, with which it runs anywhere, for tests.
    """

    def chosen(*args):
        if not kernels():
            return general(*args)
        return jax.lax.platform_dependent(*args, cuda=gpu, rocm=gpu, default=general)

    return chosen


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
