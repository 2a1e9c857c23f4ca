"""A small run of `loop.fit` for tests over devices and processes: python parallel.py FOLDER KINDS [PROCESS PORT].

Kinds: "one" device, all devices ("mesh"), or all devices with the gradient in two parts ("parts").
"""

import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cascade_jax.training import loop

ROWS, STEPS = 32, 12


def loss(params, batch, key, frozen):
    """A regression in which each row has noise of its own, by its number."""
    noise = jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(key, row), (4,)))(batch["row"])
    error = jnp.tanh(batch["x"] @ params["w"]) - frozen["y"] - 0.1 * noise
    return jnp.mean(error**2), {"worst": jnp.mean(jnp.abs(error))}


def batch(step):
    """This process's rows."""
    x = np.random.default_rng(step).standard_normal((ROWS, 8), np.float32)
    made = {"x": x, "row": np.arange(ROWS, dtype=np.int32)}
    return jax.tree.map(lambda rows: np.array_split(rows, jax.process_count())[jax.process_index()], made)


def run(folder, kind, steps=STEPS):
    params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
    return loop.fit(
        loss, params, optax.adam(1e-2), batch, steps=steps, folder=folder, save_every=4, log_every=1,
        frozen={"y": jnp.linspace(0.0, 1.0, 4)}, mesh=None if kind == "one" else loop.data_mesh(),
        accumulate=2 if kind == "parts" else 1,
    )  # fmt: skip


if __name__ == "__main__":
    folder, kinds, *process = sys.argv[1:]
    if process:
        jax.distributed.initialize(f"localhost:{process[1]}", 2, int(process[0]))
        assert jax.device_count() == 2 * jax.local_device_count()
    for kind in kinds.split(","):
        params = run(pathlib.Path(folder) / kind, kind)
        if jax.process_index() == 0:
            np.savez(pathlib.Path(folder) / f"{kind}.npz", **jax.tree.map(np.asarray, params))
    if process:
        os._exit(0)
