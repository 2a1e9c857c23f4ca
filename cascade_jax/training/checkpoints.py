"""Checkpoints of a run. One that is damaged is passed over for the one before it, and named.

RUN/checkpoints/STEP    {"params", "rest": {"opt_state"}}, the last two
RUN/best/STEP           {"params", "figures"} of the best evaluation, and of the best before it
RUN/damaged/...         what could not be read when the run went on
"""

import contextlib
import dataclasses
import pathlib
import shutil
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

PyTree = Any
KEPT = 2
NEWEST, BEST = ("checkpoints",), ("best", "checkpoints")  # the best, or else the newest


class Checkpoints:
    """The checkpoints of a run that goes on."""

    def __init__(self, folder: pathlib.Path):
        self._folder, self._manager = folder, _manager(folder)

    @property
    def latest(self) -> int | None:
        """Steps of the newest."""
        return self._manager.latest_step()

    def newest(self, state: tuple[PyTree, PyTree]) -> tuple[int, tuple[PyTree, PyTree]]:
        """Steps of the newest checkpoint that can be read, and what it holds; 0 and `state` if there is none.

        Raises:
          ValueError: if there are checkpoints, and none can be read.
        """
        params, rest = jax.tree.map(_wanted, (state[0], {"opt_state": state[1]}))
        items = ocp.args.Composite(params=ocp.args.StandardRestore(params), rest=ocp.args.StandardRestore(rest))
        found = _readable(self._manager, self._folder, items)
        _move_away(self._manager, self._folder, found)
        if found.step is None:
            return 0, state
        return found.step, (found.saved["params"], found.saved["rest"]["opt_state"])

    def save(self, step: int, state: tuple[PyTree, PyTree]) -> None:
        """Saves parameters and optimizer's state: two items, so that the former can be read without the latter."""
        params, opt_state = map(ocp.args.StandardSave, (state[0], {"opt_state": state[1]}))
        self._manager.save(step, args=ocp.args.Composite(params=params, rest=opt_state))

    def close(self) -> None:
        self._manager.close()


class Best:
    """The parameters of a run's best evaluation.

    Args:
      figure: by which evaluations are compared.
    """

    def __init__(self, folder: pathlib.Path, figure: str):
        self._figure, self._manager = figure, _manager(folder)
        found = _readable(self._manager, folder, ocp.args.Composite(figures=ocp.args.JsonRestore()), needed=False)
        _move_away(self._manager, folder, found)
        self._most = None if found.step is None else found.saved["figures"][figure]

    def offer(self, step: int, figures: dict[str, float], params: PyTree) -> None:
        """Keeps the parameters if they are better than all before."""
        if self._most is None or figures[self._figure] > self._most:
            items = {"params": ocp.args.StandardSave(params), "figures": ocp.args.JsonSave(figures)}
            self._manager.save(step, args=ocp.args.Composite(**items))
            self._most = figures[self._figure]

    def close(self) -> None:
        self._manager.close()


def restore(folder: pathlib.Path, params: PyTree, which: tuple[str, ...] = NEWEST) -> PyTree:
    """The newest parameters of a run, or the best; `params` (arrays or `jax.ShapeDtypeStruct`) gives their structure.

    Args:
      which: NEWEST or BEST: folders to look into, in this order.

    Raises:
      FileNotFoundError: if `folder` holds no checkpoint.
      ValueError: if it holds some, and none can be read.
    """
    items = ocp.args.Composite(params=ocp.args.StandardRestore(jax.tree.map(_wanted, params)))
    places = [pathlib.Path(folder).absolute() / name for name in which]
    places = [place for place in places if place.is_dir()]
    for place in places:
        with contextlib.closing(_manager(place)) as manager:
            found = _readable(manager, place, items, needed=place == places[-1])
            if found.step is not None:
                return found.saved["params"]
    raise FileNotFoundError(f"{folder} holds no checkpoint: train first")


@dataclasses.dataclass(frozen=True)
class _Found:
    """The newest checkpoint that can be read; None where there is none. `damaged` are the steps passed over."""

    step: int | None
    saved: Any
    damaged: tuple[int, ...]


def _readable(manager, folder: pathlib.Path, items, needed: bool = True) -> _Found:
    """Reads items of the newest checkpoint that can be read, and names those that cannot.

    Raises:
      ValueError: if there are checkpoints, none can be read, and one is needed.
    """
    damaged: dict[int, str] = {}
    found = _Found(None, None, ())
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            found = _Found(step, manager.restore(step, args=items), ())
            break
        except Exception as error:  # Orbax and TensorStore raise whatever they stumble upon
            damaged[step] = " ".join(str(error).split())[:200] or type(error).__name__
    if damaged and found.step is None and needed:
        why = "; ".join(f"{step}: {why}" for step, why in damaged.items())
        raise ValueError(f"no checkpoint in {folder} can be read ({why}): remove them to begin again")
    for step, why in damaged.items():
        instead = "nothing" if found.step is None else found.step
        if jax.process_index() == 0:
            print(f"{folder / str(step)} is damaged ({why}); in its place: {instead}", file=sys.stderr, flush=True)
    return dataclasses.replace(found, damaged=tuple(damaged))


def _move_away(manager, folder: pathlib.Path, found: _Found) -> None:
    """Makes room for new checkpoints of the steps of damaged ones."""
    for step in found.damaged if jax.process_index() == 0 else ():
        place = folder.parent / "damaged" / f"{folder.name}-{step}"
        place.parent.mkdir(exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        (folder / str(step)).rename(place)
    if found.damaged:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are away")
        manager.reload()


def _manager(folder: pathlib.Path) -> ocp.CheckpointManager:
    # Saving is synchronous because the arrays are donated to the next step.
    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder, options=options)


def _wanted(x: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    # Without a place of its own an array would go back to the devices that it was saved from, which may not be here.
    place = x.sharding or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
