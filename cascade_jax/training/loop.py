"""The training loop of every recipe: resumable, logged and seeded.

    params = fit(loss_fn, params, optax.adam(1e-3), batch_fn, steps=1000, folder="run", settings={"batch": 8})

Everything that happens in a step is a function of the parameters and the step number: the batch is `batch_fn(step)`
and the key `fold_in(key(seed), step)`. So a checkpoint of (step, params, optimizer state) is all there is to resume
from, and a run that was killed and started again ends with the very same bits as one that was not.

Over several devices a step is data parallel: parameters lie on all of them, rows of a batch are dealt out, gradients
averaged (`mesh`). Several processes run the same program, each with its own rows.
"""

import collections
import concurrent.futures
import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from rich import progress
from rich.console import Console

from cascade_jax.training.log import Log, plot
from cascade_jax.training.settings import settle

PyTree = Any
ROWS = "data"  # the mesh's axis


def data_mesh() -> Mesh:
    """All devices of all processes, in one row."""
    return jax.make_mesh((jax.device_count(),), (ROWS,))


def fit(
    loss_fn: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
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
    frozen: PyTree | None = None,
    accumulate: int = 1,
    mesh: Mesh | None = None,
    tokens_per_step: int | None = None,
    evaluate: Callable[[PyTree], dict[str, float]] | None = None,
    evaluate_every: int = 500,
    best: str = "alpha",
) -> PyTree:
    """Trains `params` for `steps` steps in all, going on from the newest checkpoint in `folder` if there is one.

    Args:
      loss_fn: (params, batch, key) -> (loss [], metrics, a dict of scalars); jitted and differentiated here. With
        `frozen`, which is then its fourth argument.
      params: initial parameters; only their structure, shapes and types matter when resuming. The arrays stay valid.
      optimizer: clipping and schedules belong into it.
      batch_fn: step -> pytree of arrays; a function of the step number alone. Runs in a background thread. With
        several processes it gives this process's rows.
      steps: number of steps of the whole run.
      folder: receives `settings.json`, `log.csv` (a line per `log_every` steps, metrics averaged), the same as
        TensorBoard `events/`, `checkpoints/`, and at the end a plot, `loss.png`.
      seed: of the keys handed to `loss_fn`.
      save_every: steps between checkpoints, of which two are kept. The last step is always saved.
      log_every: steps between lines of the log; losses are examined at these steps and before each checkpoint.
      title: label of the progress bar.
      settings: whatever else determines the run; anything that JSON can hold.
      revise: (step, params) -> params, applied before each step that is a positive multiple of `revise_every`: a
        deterministic change outside of gradient descent, such as reviving dead codes.
      revise_every: see `revise`.
      prefetch: batches made ahead of time.
      frozen: arrays that the loss reads and nobody changes.
      accumulate: parts in which a batch's gradient is computed, one after the other. Loss, metrics and gradient are
        means over them, so the loss must be a mean over rows; and its key is the same for all parts, so what is random
        in a row has to depend on something in the batch.
      mesh: devices to deal a batch's rows to, of one axis `ROWS`; the same holds as for `accumulate`. None for the
        default device. All leaves of a batch have the rows as their leading axis.
      tokens_per_step: for the log's tokens_per_second.
      evaluate: params -> figures, after every `evaluate_every` steps and the last one; they go to `evaluation.csv`.
      evaluate_every: see `evaluate`.
      best: the figure by which `best/` keeps the parameters of the best evaluation, see `restore`.

    Returns:
      The parameters after the last step.

    Raises:
      ValueError: if `folder` holds a run with other settings; the message shows the difference.
      FloatingPointError: if a loss or its gradient is not finite; the message names the step. The last checkpoint,
        which is finite, is kept.
    """
    folder, leads = pathlib.Path(folder).absolute(), jax.process_index() == 0
    if leads:
        settle(folder / "settings.json", {**(settings or {}), "steps": steps, "seed": seed})
    _together("settings")
    # The step donates its arguments; the copy keeps the caller's arrays alive.
    params = jax.tree.map(jnp.array, params)
    opt_state = optimizer.init(params)
    params, opt_state, frozen = (_everywhere(x, mesh) for x in (params, opt_state, frozen))
    fixed = () if frozen is None else (frozen,)
    gradient = _gradient(loss_fn, accumulate, mesh)

    @jax.jit(donate_argnums=(0, 1))
    def update(params, opt_state, batch, step, *fixed):
        key = jax.random.fold_in(jax.random.key(seed), step)
        (loss, metrics), grads = gradient(params, batch, key, *fixed)
        loss = jnp.where(jnp.isfinite(optax.global_norm(grads)), loss, jnp.nan)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, {"loss": loss, **metrics}

    with _checkpoints(folder) as manager, contextlib.ExitStack() as stack:
        start = manager.latest_step() or 0
        if start:
            params, opt_state = _restore(manager, start, params, opt_state)
        log, events = None, folder / "events"
        if leads:
            log = stack.enter_context(contextlib.closing(Log(folder / "log.csv", start, events)))
        judged = None
        if evaluate is not None:
            judged = _Judged(stack, folder, start, best, events if leads else None)
        pending = []
        bar, pool = stack.enter_context(_bar(leads)), stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
        task = bar.add_task(title, total=steps, completed=start, loss="")
        for step, batch in _prefetched(pool, batch_fn, start, steps, prefetch):
            if revise is not None and step and step % revise_every == 0:
                params = revise(step, params)
            params, opt_state, metrics = update(params, opt_state, _dealt(batch, mesh), step, *fixed)
            pending.append(metrics)
            done = step + 1
            save = done % save_every == 0 or done == steps
            judge = judged is not None and (done % evaluate_every == 0 or done == steps)
            if save or judge or done % log_every == 0:
                rows, pending = jax.device_get(pending), []
                _examine(rows, done, folder, manager.latest_step())
                if leads:
                    line = log.average(done, rows, tokens_per_step)
                    bar.update(task, completed=done, loss=f"loss {line['loss']:.4f}")
                    if not bar.console.is_terminal:
                        remaining = (steps - done) / line["rate"] / 60
                        text = "  ".join(f"{name} {value:.4g}" for name, value in line.items() if name != "step")
                        bar.console.print(f"{title} {done}/{steps}  {text}  {remaining:.1f} min left", soft_wrap=True)
            if judge:
                begin = time.monotonic()
                figures = judged.judge(done, evaluate(jax.tree.map(lambda x: x.addressable_data(0), params)), params)
                if leads:
                    text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
                    bar.console.print(f"{title} {done}/{steps}  held out: {text}", soft_wrap=True)
                    log.pause(time.monotonic() - begin)
            if save:
                manager.save(done, args=_items(ocp.args.StandardSave, params, {"opt_state": opt_state}))
        if leads and start < steps:
            plot(folder)
    return params


def restore(folder: str | pathlib.Path, params: PyTree, which: str = "checkpoints") -> PyTree:
    """The newest parameters of a run, or the best; `params` (arrays or `jax.ShapeDtypeStruct`) gives their structure.

    Args:
      which: "checkpoints", or "best" for those of the best evaluation.

    Raises:
      FileNotFoundError: if `folder` holds no checkpoint.
    """
    folder = pathlib.Path(folder).absolute()
    if (folder / which).is_dir():
        with _checkpoints(folder, which) as manager:
            if manager.latest_step() is not None:
                like = ocp.args.StandardRestore(jax.tree.map(_wanted, params))
                return manager.restore(manager.latest_step(), args=ocp.args.Composite(params=like))["params"]
    raise FileNotFoundError(f"{folder} holds no checkpoint: train first")


def _gradient(loss_fn, accumulate: int, mesh: Mesh | None):
    """(params, batch, key, ...) -> ((loss, metrics), gradient) of a whole batch."""
    whole = jax.value_and_grad(loss_fn, has_aux=True)

    def in_parts(params, batch, key, *fixed):
        parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(whole, params, first, key, *fixed)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        add = lambda total, part: (jax.tree.map(jnp.add, total, whole(params, part, key, *fixed)), None)
        return jax.tree.map(lambda x: x / accumulate, jax.lax.scan(add, zeros, parts)[0])

    found = whole if accumulate == 1 else in_parts
    if mesh is None:
        return found

    def averaged(params, batch, key, *fixed):
        own = jax.shard_map(
            lambda *arguments: jax.lax.pmean(found(*arguments), ROWS),
            mesh=mesh, in_specs=(P(), P(ROWS), P(), *(P() for _ in fixed)), out_specs=P(), check_vma=False,
        )  # fmt: skip
        return own(params, batch, key, *fixed)

    return averaged


def _everywhere(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Arrays that every process holds, on all devices of the mesh."""
    if mesh is None:
        return tree
    whole = NamedSharding(mesh, P())
    if jax.process_count() == 1:
        return jax.device_put(tree, whole)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, whole, lambda i: np.asarray(x)[i]), tree)


def _dealt(batch: PyTree, mesh: Mesh | None) -> PyTree:
    """This process's rows as part of the batch, on the devices of the mesh."""
    if mesh is None:
        return batch
    rows = NamedSharding(mesh, P(ROWS))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, np.asarray(x)), batch)


def _together(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


class _Judged:
    """Evaluations of a run, and in `best/` the parameters of the best of them."""

    def __init__(self, stack, folder: pathlib.Path, start: int, best: str, events: pathlib.Path | None):
        self._best = best
        self._manager = stack.enter_context(_checkpoints(folder, "best", keep=1))
        self._log = None
        if events is not None:
            self._log = stack.enter_context(contextlib.closing(Log(folder / "evaluation.csv", start, events)))

    def judge(self, step: int, figures: dict[str, float], params: PyTree) -> dict[str, float]:
        if self._log is not None:
            self._log.write(step, figures)
        known = self._manager.latest_step()
        if known is not None:
            stored = self._manager.restore(known, args=ocp.args.Composite(figures=ocp.args.JsonRestore()))
        if known is None or figures[self._best] > stored["figures"][self._best]:
            items = {"params": ocp.args.StandardSave(params), "figures": ocp.args.JsonSave(figures)}
            self._manager.save(step, args=ocp.args.Composite(**items))
        return figures


def _checkpoints(folder: pathlib.Path, which: str = "checkpoints", keep: int = 2) -> ocp.CheckpointManager:
    # Saving is synchronous because the arrays are donated to the next step.
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder / which, options=options)


def _wanted(x: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    # Without a place of its own an array would go back to the devices that it was saved from, which may not be here.
    place = x.sharding or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _items(kind, params, rest):
    # Two items, so that parameters can be read without knowing the optimizer.
    return ocp.args.Composite(params=kind(params), rest=kind(rest))


def _restore(manager, step, params, opt_state):
    like = jax.tree.map(_wanted, (params, {"opt_state": opt_state}))
    saved = manager.restore(step, args=_items(ocp.args.StandardRestore, *like))
    return saved["params"], saved["rest"]["opt_state"]


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
            what = f"the loss or its gradient is {row['loss']} in step {step}"
            raise FloatingPointError(f"{what} ({folder}); {kept}")


def _bar(shown: bool) -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[loss]}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),  # stdout is for results
        disable=not shown,
    )
