"""From data to a drafter inside a model: a training run with held-out evaluation, and putting its result into a bundle.

OUT/settings.json   what was trained on what: the drafter's kind and sizes, the digest of its target, data, objective
OUT/best/           its parameters at the best evaluation; see `loop.fit` for the rest
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from cascade_jax import bundle, pipeline, rules
from cascade_jax import methods as by_name
from cascade_jax.acceptance import Rule
from cascade_jax.bundle import Bundle
from cascade_jax.models import families
from cascade_jax.models.prompt import Prompt
from cascade_jax.training import checkpoints, data, loop
from cascade_jax.training.batches import Batches
from cascade_jax.training.drafter import USUAL, Graphs, Objective, Schedule, drafter_loss, sizes, standard, start
from cascade_jax.tree import EAGLE_25, DynamicTree, Tree

Methods = Mapping[str, tuple[Rule, Tree | DynamicTree]]


def train(
    model: Bundle,
    rows: data.Data,
    folder: str | pathlib.Path,
    *,
    kind: str = USUAL,
    objective: Objective | None = None,
    schedule: Schedule | None = None,
    batch: int = 8,
    steps: int | None = None,
    epochs: int = 20,
    seed: int = 0,
    held_out: float = 0.05,
    methods: Methods | None = None,
    evaluate_every: int = 1,
    evaluated: int = 8,
    accumulate: int = 1,
    mesh: Mesh | None = None,
    save_every: int = 250,
) -> tuple[Any, nnx.State]:
    """Trains a drafter for the model's target; goes on from the newest checkpoint in `folder`.

    Args:
      rows: what to train on, made by this target.
      kind: one of `drafter.kinds`.
      objective: what it learns; None for the kind's standard.
      schedule: how; None for the public code's.
      batch: rows of a step, over all devices and parts.
      steps: of the whole run; None for `epochs` times the data.
      seed: of the first parameters, the order of the data and the noise.
      held_out: share of the rows, the last ones, that are not trained on.
      methods: (rule, tree) by name; the drafter is evaluated with each on the held-out rows' prompts. The first one's
        figure, "alpha" (the others' are "alpha_NAME"), says which parameters are best. None for no evaluation.
      evaluate_every: epochs between evaluations.
      evaluated: held-out prompts to draw.
      accumulate: parts in which a step's gradient is computed; see `loop.fit`.
      mesh: devices to deal rows to; see `loop.fit`.
      save_every: steps between checkpoints.

    Returns:
      The drafter's sizes, and its parameters: the best, or the last if nothing was evaluated.

    Raises:
      ValueError: if `folder` holds a run with other settings, if data, batch and devices do not go together, or if it
        is to look further ahead than a picture goes.
      FloatingPointError: if the loss is not finite.
    """
    objective = standard(kind) if objective is None else objective
    if objective.unroll >= model.length:
        raise ValueError(f"unroll must be below {model.length}, the tokens of a picture, not {objective.unroll}")
    config = sizes(kind, model.config.target, objective.unroll)
    schedule = Schedule() if schedule is None else schedule
    held = _held_out(rows, held_out)
    devices = 1 if mesh is None else mesh.size
    if batch % (devices * accumulate):
        raise ValueError(f"a batch of {batch} rows does not divide among {devices} devices and {accumulate} parts")
    batches = Batches(
        rows, model.config.target, rows=rows.count - held, batch=batch, seed=seed, objective=objective, taps=config.taps
    )
    graph, params = start(config, seed)
    steps = epochs * batches.per_epoch if steps is None else steps
    evaluate = None
    if methods and held:
        prompts = held_out_prompts(rows, held_out, evaluated)
        evaluate = functools.partial(alphas, with_drafter(model, config), methods, prompts, seed)
    about = {"drafter": kind, "config": dataclasses.asdict(config), **_of_data(rows)}
    about |= {"batch": batch, "accumulate": accumulate, "held_out": held}
    params = loop.fit(
        functools.partial(drafter_loss, Graphs(model.graph("target"), graph, config.taps, model.layout), objective),
        params,
        schedule.optimizer(steps),
        batches,
        steps=steps,
        folder=folder,
        seed=seed,
        save_every=save_every,
        title=kind,
        settings=about | dataclasses.asdict(objective) | dataclasses.asdict(schedule),
        frozen=model.params["target"],
        accumulate=accumulate,
        mesh=mesh,
        tokens_per_step=batch * model.length,
        evaluate=evaluate,
        evaluate_every=evaluate_every * batches.per_epoch,
    )
    return config, params if evaluate is None else checkpoints.restore(folder, params, checkpoints.BEST)


def _of_data(rows: data.Data) -> dict[str, Any]:
    about = {name: value for name, value in rows.about.items() if name not in ("model", "target")}
    return {"target": rows.about["target"], "data": about}


def naive_and_cascade(model: Bundle) -> Methods:
    """What drafters are evaluated by, one program: thresholds above 1 are strict, the paper's naive decoding."""
    drafting = dataclasses.replace(model, tree=EAGLE_25)  # on all machines alike
    cascade = by_name.method(by_name.CASCADE, drafting, window=0)
    kinds = {name: cascade.settings[name] for name in ("ledger", "mass")}
    strict = rules.cascade(tau_pos=1.01, tau_seq=1.01, budget=0.0, **kinds)
    return {"naive": (strict, cascade.tree), by_name.CASCADE: (cascade.rule, cascade.tree)}


def held_out_prompts(rows: data.Data, share: float, most: int) -> list[Prompt]:
    """The first prompts of the rows that `train` does not train on, at most `most`."""
    return rows.rows(range(rows.count - _held_out(rows, share), rows.count)[:most])[2]


def _held_out(rows: data.Data, share: float) -> int:
    return min(rows.count - 1, max(1, round(share * rows.count))) if share else 0


def with_drafter(model: Bundle, config: Any) -> Bundle:
    """The model with a drafter of these sizes, whose parameters are still to be filled in."""
    return dataclasses.replace(
        model, config=dataclasses.replace(model.config, drafter=config), params={**model.params, "drafter": None}
    )


def alphas(
    model: Bundle, methods: Methods, prompts: Sequence[Prompt], seed: int, params: nnx.State
) -> dict[str, float]:
    """Accepted drafts per step, averaged over pictures drawn from `prompts` with the drafter's parameters."""
    dtype = jax.tree.leaves(model.params["target"])[0].dtype
    own = {**model.params, "drafter": jax.tree.map(lambda x: x.astype(dtype), params)}
    model, keys, found = (
        dataclasses.replace(model, params=own),
        jax.random.split(jax.random.key(seed), len(prompts)),
        {},
    )
    for name, (rule, tree) in methods.items():
        _, stats = pipeline.draw_tokens(model, prompts, keys, rule, tree)
        found["alpha" if not found else f"alpha_{name}"] = float(np.mean(stats.alpha))
    return found


def trained(folder: str | pathlib.Path) -> tuple[Any, nnx.State, dict[str, Any]]:
    """Sizes and parameters of a run's drafter, the best or else the newest, and what settings.json says.

    Raises:
      FileNotFoundError: if it is no run, or has no checkpoint yet.
      ValueError: if it has some, and none can be read.
    """
    if not is_run(folder):
        raise FileNotFoundError(f"{folder} is no training run of a drafter")
    about = _settings(folder)
    config = bundle.built(families.KINDS["drafter"][about["drafter"]].config, about["config"])
    params = checkpoints.restore(folder, jax.eval_shape(lambda: start(config, 0)[1]), checkpoints.BEST)
    return config, params, about


def is_run(folder: str | pathlib.Path) -> bool:
    """Whether a folder is one of `train`'s."""
    return "drafter" in _settings(folder)


def _settings(folder: str | pathlib.Path) -> dict[str, Any]:
    path = pathlib.Path(folder) / "settings.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def merge(
    directory: str | pathlib.Path, folder: str | pathlib.Path, out: str | pathlib.Path | None = None, dtype=jnp.bfloat16
) -> None:
    """Puts a run's drafter into the bundle `directory`, in place of one that is there.

    Args:
      out: the bundle to write; None for `directory` itself. What does not change is linked.
      dtype: of the drafter's parameters on disk.

    Raises:
      FileNotFoundError: see `trained`.
      ValueError: if the drafter was trained for another target.
    """
    config, params, about = trained(folder)
    target = bundle.load(directory)
    if data.fingerprint(target.params["target"]) != about["target"]:
        raise ValueError(f"the drafter in {folder} was trained for another target than that of {directory}")
    origin = {**target.config.origin, "drafter": {"recipe": "cascade-jax train", "target": about["target"]}}
    with bundle.written(directory if out is None else out) as writer:
        writer.adopt(directory, without="drafter")
        writer.put("drafter", params, dtype)
        writer.finish(dataclasses.replace(target.config, drafter=config, origin=origin))
