"""Fixtures that the engine's tests share."""

import dataclasses
import gc
import logging
import os

# On a busy machine eight devices' threads may wait long for each other; XLA gives up after 40 seconds by default.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_collective_call_terminate_timeout_seconds=1200"

import jax
import pytest
from tiny import Tiny, make

from cascade_jax import platforms
from cascade_jax.models.llamagen import LlamaGenConfig

# On a GPU, float32 products round to TF32 unless told otherwise, which no tolerance here allows for.
jax.config.update("jax_default_matmul_precision", "highest")
# Whatever fits this machine: tolerances are float32's, and the paper's tree has all that trees have.
USUAL = {"decoding": "float32", "tree": "eagle25", "window": 32}
platforms.DEFAULTS["cpu"] = dataclasses.replace(platforms.DEFAULTS["cpu"], **USUAL)
# Most programs here take longer to compile than to run.
jax.config.update("jax_disable_most_optimizations", True)
# Programs being traced are millions of small objects, which are searched for garbage all the time otherwise.
gc.set_threshold(100_000, 20, 100)
# What reading a damaged model leaves behind is told of whenever it is collected, with a traceback, for which Python
# parses source. In the middle of other parsing, as tyro's, Python 3.11 takes that for an error of its own.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


@pytest.fixture
def collected():
    """What a test leaves is collected at its end."""
    yield
    gc.collect()


def pytest_sessionfinish():
    gc.freeze()  # or else pytest would search all that is left several times


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """16 tokens of 40, guided by 5 condition slots; query heads share key heads."""
    return make(
        LlamaGenConfig(
            dim=32,
            layers=2,
            heads=4,
            kv_heads=2,
            image_tokens=16,
            vocab_size=40,
            condition_tokens=5,
            caption_dim=8,
            ffn_multiple=16,
        ),
        seed=0,
        contrast=1.5,
    )


@pytest.fixture(scope="session")
def tiniest() -> Tiny:
    """4 tokens of 5: all 625 outputs can be enumerated."""
    return make(
        LlamaGenConfig(
            dim=8,
            layers=1,
            heads=1,
            image_tokens=4,
            vocab_size=5,
            condition_tokens=2,
            caption_dim=4,
            ffn_multiple=8,
        ),
        seed=3,
        contrast=1.0,
    )
