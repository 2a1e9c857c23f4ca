"""The training loop of every recipe: resumable, logged and seeded.

    params = fit(loss_fn, params, optax.adam(1e-3), batch_fn, steps=1000, folder="run", settings={"batch": 8})

Everything that happens in a step is a function of the parameters and the step number: the batch is `batch_fn(step)`
and the key `fold_in(key(seed), step)`. So a checkpoint of (step, params, optimizer state) is all there is to resume
from, and a run that was killed and started again ends with the very same bits as one that was not.
"""

import collections
import concurrent.futures
import csv
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from rich import progress

PyTree = Any


def fit(
    loss_fn: Callable[[PyTree, PyTree, jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    params: PyTree,
    optimizer: optax.GradientTransformation,
    batch_fn: Callable[[int], PyTree],
    *,
    steps: int,
    folder: str | pathlib.Path,
    seed: int = 0,
    save_every: int = 500,
    log_every: int = 20,
    title: str = "training",
    settings: dict[str, Any] | None = None,
    revise: Callable[[int, PyTree], PyTree] | None = None,
    revise_every: int = 200,
    prefetch: int = 3,
) -> PyTree:
    """Trains `params` for `steps` steps in all, going on from the newest checkpoint in `folder` if there is one.

    Args:
      loss_fn: (params, batch, key) -> (loss [], metrics, a dict of scalars); jitted and differentiated here.
      params: initial parameters; only their structure, shapes and types matter when resuming. The arrays stay valid.
      optimizer: clipping and schedules belong into it.
      batch_fn: step -> pytree of arrays; a function of the step number alone. Runs in a background thread.
      steps: number of steps of the whole run.
      folder: receives `settings.json`, `log.csv` (a line per `log_every` steps, metrics averaged) and `checkpoints/`.
      seed: of the keys handed to `loss_fn`.
      save_every: steps between checkpoints, of which two are kept. The last step is always saved.
      log_every: steps between lines of the log; losses are examined at these steps and before each checkpoint.
      title: label of the progress bar.
      settings: whatever else determines the run; anything that JSON can hold.
      revise: (step, params) -> params, applied before each step that is a positive multiple of `revise_every`: a
        deterministic change outside of gradient descent, such as reviving dead codes.
      revise_every: see `revise`.
      prefetch: batches made ahead of time.

    Returns:
      The parameters after the last step.

    Raises:
      ValueError: if `folder` holds a run with other settings; the message shows the difference.
      FloatingPointError: if a loss is not finite; the message names the step. The last checkpoint is kept.
    """
    folder = pathlib.Path(folder).absolute()
    _settle(folder, {**(settings or {}), "steps": steps, "seed": seed})
    # The step donates its arguments; the copy keeps the caller's arrays alive.
    params = jax.tree.map(jnp.array, params)
    opt_state = optimizer.init(params)

    @jax.jit(donate_argnums=(0, 1))
    def update(params, opt_state, batch, step):
        key = jax.random.fold_in(jax.random.key(seed), step)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, {"loss": loss, **metrics}

    with _checkpoints(folder) as manager:
        start = manager.latest_step() or 0
        if start:
            params, opt_state = _restore(manager, start, params, opt_state)
        log = _Log(folder / "log.csv", start)
        pending = []
        with _bar() as bar, concurrent.futures.ThreadPoolExecutor(1) as pool:
            task = bar.add_task(title, total=steps, completed=start, loss="")
            for step, batch in _prefetched(pool, batch_fn, start, steps, prefetch):
                if revise is not None and step and step % revise_every == 0:
                    params = revise(step, params)
                params, opt_state, metrics = update(params, opt_state, batch, step)
                pending.append(metrics)
                done = step + 1
                save = done % save_every == 0 or done == steps
                if save or done % log_every == 0:
                    rows, pending = jax.device_get(pending), []
                    _examine(rows, done, folder, manager.latest_step())
                    line = log.write(done, rows)
                    bar.update(task, completed=done, loss=f"loss {line['loss']:.4f}")
                    if not bar.console.is_terminal:
                        remaining = (steps - done) / line["rate"] / 60
                        text = "  ".join(f"{name} {value:.4g}" for name, value in line.items() if name != "step")
                        bar.console.print(f"{title} {done}/{steps}  {text}  {remaining:.1f} min left", soft_wrap=True)
                if save:
                    manager.save(done, args=_items(ocp.args.StandardSave, params, {"opt_state": opt_state}))
    return params


def restore(folder: str | pathlib.Path, params: PyTree) -> PyTree:
    """The newest parameters of a run; `params` (arrays or `jax.ShapeDtypeStruct`) gives their structure.

    Raises:
      FileNotFoundError: if `folder` holds no checkpoint.
    """
    folder = pathlib.Path(folder).absolute()
    if (folder / "checkpoints").is_dir():
        with _checkpoints(folder) as manager:
            if manager.latest_step() is not None:
                like = ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, params))
                return manager.restore(manager.latest_step(), args=ocp.args.Composite(params=like))["params"]
    raise FileNotFoundError(f"{folder} holds no checkpoint: train first")


def _checkpoints(folder: pathlib.Path) -> ocp.CheckpointManager:
    # Saving is synchronous because the arrays are donated to the next step.
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder / "checkpoints", options=options)


def _items(kind, params, rest):
    # Two items, so that parameters can be read without knowing the optimizer.
    return ocp.args.Composite(params=kind(params), rest=kind(rest))


def _restore(manager, step, params, opt_state):
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, {"opt_state": opt_state}))
    saved = manager.restore(step, args=_items(ocp.args.StandardRestore, *like))
    return saved["params"], saved["rest"]["opt_state"]


def _settle(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a new run; compares them with those of an old one."""
    settings = json.loads(json.dumps(settings))
    path = folder / "settings.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=2) + "\n")
        return
    old = json.loads(path.read_text())
    if old != settings:
        names = [name for name in {**old, **settings} if old.get(name) != settings.get(name)]
        changes = "; ".join(f"{name}: {old.get(name)} there, {settings.get(name)} now" for name in names)
        raise ValueError(f"{folder} holds a run with other settings ({changes}): keep them or choose another folder")


def _prefetched(pool, batch_fn, start: int, steps: int, ahead: int) -> Iterator[tuple[int, PyTree]]:
    queue = collections.deque()
    try:
        for step in range(start, steps):
            while len(queue) <= ahead and step + len(queue) < steps:
                queue.append(pool.submit(batch_fn, step + len(queue)))
            yield step, queue.popleft().result()
    finally:
        for future in queue:
            future.cancel()


def _examine(rows: list[dict[str, np.ndarray]], done: int, folder: pathlib.Path, saved: int | None) -> None:
    for step, row in enumerate(rows, done - len(rows)):
        if not np.isfinite(row["loss"]):
            kept = f"the checkpoint after {saved} steps is kept" if saved else "there is no checkpoint yet"
            raise FloatingPointError(f"the loss is {row['loss']} in step {step} ({folder}); {kept}")


class _Log:
    """`log.csv`: one line per interval. Lines past the checkpoint that a run resumes from are dropped."""

    def __init__(self, path: pathlib.Path, start: int):
        self._path = path
        self._time = time.monotonic()
        if path.exists():
            header, *lines = path.read_text().splitlines()
            kept = [line for line in lines if int(line.split(",")[0]) <= start]
            path.write_text("\n".join([header, *kept]) + "\n")

    def write(self, step: int, rows: list[dict[str, np.ndarray]]) -> dict[str, float]:
        now = time.monotonic()
        line = {"step": step} | {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        line["rate"] = len(rows) / (now - self._time)
        self._time = now
        new = not self._path.exists()
        with self._path.open("a", newline="") as file:
            writer = csv.DictWriter(file, line.keys())
            if new:
                writer.writeheader()
            writer.writerow(line)
        return line


def _bar() -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[loss]}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
