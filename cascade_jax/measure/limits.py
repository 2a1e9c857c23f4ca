"""What this machine gives at most: its memory's speed, its products of matrices, and how much memory was in use."""

import sys

import jax
import jax.numpy as jnp

from cascade_jax.measure.clock import seconds

try:
    import resource
except ImportError:  # Windows
    resource = None


def bandwidth(size: int = 2**28) -> float:
    """The memory's speed in bytes per second: the best of reading, and of copying, an array of `size` bytes."""
    x = jnp.ones((256, size // 4 // 256), jnp.float32)
    reads = seconds(jax.jit(lambda x: jnp.sum(x, axis=1)), x, repeats=8, best=True)
    copies = seconds(jax.jit(lambda x: x + 1), x, repeats=8, best=True)
    return max(size / reads, 2 * size / copies)


def matmul_rate(dtype, size: int | None = None) -> float:
    """Operations per second of a product of two square matrices, summed in float32; the best of several runs."""
    size = size or (1024 if jax.default_backend() == "cpu" else 8192)
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    return 2 * size**3 / seconds(product, x, repeats=8, best=True)


def peak_memory() -> float | None:
    """Most bytes that were in use at once: on the device, or by the process where the device is the CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    if resource is None:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most if sys.platform == "darwin" else 1024 * most)
