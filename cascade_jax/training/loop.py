"""The training loop of every recipe: resumable, logged and seeded.

    params = fit(loss_fn, params, optax.adam(1e-3), batch_fn, steps=1000, folder="run", settings={"batch": 8})

Everything that happens in a step is a function of the parameters and the step number: the batch is `batch_fn(step)`
and the key `fold_in(key(seed), step)`. So a checkpoint of (step, params, optimizer state) is all there is to resume
from, and a run that was interrupted or killed and started again ends with the very same bits as one that was not.

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
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cascade_jax import files, interrupts
from cascade_jax.training.checkpoints import Best, Checkpoints
from cascade_jax.training.log import Record
from cascade_jax.training.settings import settle

PyTree = Any
ROWS = "data"  # the mesh's axis
AHEAD = 3  # batches made ahead of time


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
        TensorBoard `events/`, `checkpoints/`, and at the end a plot, `loss.png`. It belongs to one run at a time.
      seed: of the keys handed to `loss_fn`.
      save_every: steps between checkpoints, of which two are kept. The last step is always saved, and the one under way
        when an interrupt is asked for.
      log_every: steps between lines of the log; losses are examined at these steps and before each checkpoint.
      title: label of the progress bar.
      settings: whatever else determines the run; anything that JSON can hold.
      revise: (step, params) -> params, applied before each step that is a positive multiple of `revise_every`: a
        deterministic change outside of gradient descent, such as reviving dead codes.
      revise_every: see `revise`.
      frozen: arrays that the loss reads and nobody changes.
      accumulate: parts in which a batch's gradient is computed, one after the other. Loss, metrics and gradient are
        means over them, so the loss must be a mean over rows; and its key is the same for all parts, so what is random
        in a row has to depend on something in the batch.
      mesh: devices to deal a batch's rows to, of one axis `ROWS`; the same holds as for `accumulate`. None for the
        default device. All leaves of a batch have the rows as their leading axis.
      tokens_per_step: for the log's tokens_per_second.
      evaluate: params -> figures, after every `evaluate_every` steps and the last one; they go to `evaluation.csv`.
      evaluate_every: see `evaluate`.
      best: the figure by which `best/` keeps the parameters of the best evaluation, see `checkpoints.restore`.

    Returns:
      The parameters after the last step.

    Raises:
      ValueError: if `folder` holds a run with other settings, whose difference the message shows, or checkpoints of
        which none can be read.
      files.InUse: if another process trains in `folder`.
      FloatingPointError: if a loss or its gradient is not finite; the message names the step. The last checkpoint,
        which is finite, is kept.
      interrupts.Interrupted: when that was asked for, after a checkpoint was saved.
    """
    folder, leads = pathlib.Path(folder).absolute(), jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        with _all_or_none():
            if leads:
                stack.enter_context(files.owned(folder))
                settle(folder / "settings.json", {**(settings or {}), "steps": steps, "seed": seed})
        # The step donates its arguments; the copy keeps the caller's arrays alive.
        params = jax.tree.map(jnp.array, params)
        state = _everywhere((params, optimizer.init(params)), mesh)
        fixed = () if frozen is None else (_everywhere(frozen, mesh),)
        update = _update(loss_fn, optimizer, seed, accumulate, mesh)
        saved = stack.enter_context(contextlib.closing(Checkpoints(folder / "checkpoints")))
        start, state = saved.newest(state)
        record = stack.enter_context(contextlib.closing(Record(folder, title, start, steps, tokens_per_step, leads)))
        judge = _judge(stack, folder, evaluate, best, record)
        last = lambda done, every: done % every == 0 or done == steps
        if judge and start and last(start, evaluate_every) and start not in record.evaluated:
            judge(start, state[0])
        pending = []
        for done, batch in stack.enter_context(contextlib.closing(_prefetched(batch_fn, start, steps))):
            if revise is not None and done > 1 and (done - 1) % revise_every == 0:
                state = revise(done - 1, state[0]), state[1]
            *state, metrics = update(*state, _dealt(batch, mesh), done - 1, *fixed)
            pending.append(metrics)
            told, due = last(done, log_every), judge and last(done, evaluate_every)
            stops = _stops(told)
            save = last(done, save_every) or due or stops
            if save or told:
                record.losses(done, _examined(pending, done, folder, saved.latest))
                pending = []
            if save:
                saved.save(done, state)
            if stops:
                raise _stopped(done, folder)
            if due:
                judge(done, state[0])
        record.plot(start < steps)
    return state[0]


def _update(loss_fn, optimizer, seed: int, accumulate: int, mesh: Mesh | None):
    """(params, optimizer state, batch, step, ...) -> both after the step, and metrics with the loss among them."""
    gradient = _gradient(loss_fn, accumulate, mesh)

    @jax.jit(donate_argnums=(0, 1))
    def update(params, opt_state, batch, step, *fixed):
        key = jax.random.fold_in(jax.random.key(seed), step)
        (loss, metrics), grads = gradient(params, batch, key, *fixed)
        loss = jnp.where(jnp.isfinite(optax.global_norm(grads)), loss, jnp.nan)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, {"loss": loss, **metrics}

    return update


def _judge(stack, folder: pathlib.Path, evaluate, best: str, record: Record) -> Callable[[int, PyTree], None] | None:
    """What evaluates parameters after a step, records the figures and keeps the best."""
    if evaluate is None:
        return None
    kept = stack.enter_context(contextlib.closing(Best(folder / "best", best)))

    def judge(step: int, params: PyTree) -> None:
        begin = time.monotonic()
        try:
            figures = evaluate(jax.tree.map(lambda x: x.addressable_data(0), params))
        except interrupts.Interrupted as asked:
            raise _stopped(step, folder) from asked
        kept.offer(step, figures, params)
        record.evaluation(step, figures, time.monotonic() - begin)

    return judge


def _stopped(step: int, folder: pathlib.Path) -> interrupts.Interrupted:
    return interrupts.Interrupted(f"stopped after step {step}, which {folder} keeps: the same command goes on from it")


def _stops(together: bool) -> bool:
    """Whether an interrupt was asked for, of any process: they end after the same step, one in which all are told."""
    if jax.process_count() == 1:
        return interrupts.asked()
    return together and bool(np.any(multihost_utils.process_allgather(np.array(interrupts.asked()))))


@contextlib.contextmanager
def _all_or_none() -> Iterator[None]:
    """Lets what fails in one process fail in all, or else the others would wait for it."""
    failed = None
    try:
        yield
    except Exception as error:
        failed = error
    if jax.process_count() > 1 and multihost_utils.process_allgather(np.array(failed is not None)).any():
        raise failed or ValueError("another process cannot train: see its message")
    if failed is not None:
        raise failed


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


def _prefetched(batch_fn, start: int, steps: int) -> Iterator[tuple[int, PyTree]]:
    """The steps' numbers, from 1, and their batches, some of which are made ahead by a thread."""
    queue = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            for step in range(start, steps):
                while len(queue) <= AHEAD and step + len(queue) < steps:
                    queue.append(pool.submit(batch_fn, step + len(queue)))
                yield step + 1, queue.popleft().result()
        finally:
            for future in queue:
                future.cancel()


def _examined(pending: list[dict[str, jax.Array]], done: int, folder: pathlib.Path, saved: int | None) -> list[dict]:
    """The metrics of the last steps, on the host; raises a FloatingPointError if a loss among them is not finite."""
    rows = jax.device_get(pending)
    for step, row in enumerate(rows, done - len(rows)):
        if not np.isfinite(row["loss"]):
            kept = f"the checkpoint after {saved} steps is kept" if saved else "there is no checkpoint yet"
            what = f"the loss or its gradient is {row['loss']} in step {step}"
            raise FloatingPointError(f"{what} ({folder}); {kept}")
    return rows
