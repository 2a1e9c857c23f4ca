"""Training a drafter: what it learns, standard or weighed by convergence (the paper's section 4.3), and how fast.

At every position of a sequence the drafter knows the tokens up to the next one and the target's true features, with a
little noise, for below a tree's root it will see its own estimates; and guesses what the target says there. With
`unroll` it looks further ahead, as it will have to; how is the drafter's own affair (`draft.Trainable.ahead`).

The target is frozen. Its features are read from the data, or computed in the step.

Shapes: `B` sequences, `G` guidance branches, `R = G B` rows (branch-major), `P` prefix slots, `T` tokens,
`S = P + T - 1` slots, `d` model width, `V` tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cascade_jax.decode import Prefix, at_tokens, teacher_forced
from cascade_jax.models.families import KINDS, module_of
from cascade_jax.passes import split
from cascade_jax.sampling import Layout, guided_logits
from cascade_jax.training import losses
from cascade_jax.training.data import by_branch


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the drafter learns.

    Attributes:
      convergence_weight: the paper's c, by which the soft cross-entropy weighs more where consecutive features
        converge; 1 is the standard drafter.
      tau_seq: least cosine of consecutive features that converge.
      soft: weight of the cross-entropy with the target's distribution.
      hard: weight of the cross-entropy with the token that the target drew.
      feature: weight of SmoothL1 between estimates and features; 0 for a drafter whose estimates are its own affair.
      unroll: how many tokens ahead it guesses from every position; 1 is teacher forcing alone.
      unroll_decay: every further one weighs that much of the one before.
      anchors: positions of a sequence from which it guesses further than the next token, others at every step; None for
        all. Its memory and time grow with their number times `unroll`.
      guidance: compare the guided distributions of both branches under this guidance scale; None trains on one branch
        of each sequence, the conditional one but for the share `unconditional`.
      unconditional: see `guidance`.
      noise: features are seen with uniform noise of width noise * 512 / length of the sequence.
      remat: compute activations again in the backward pass instead of keeping them.
      dtype: type of the drafter's activations; its parameters, and logits, are float32.
    """

    convergence_weight: float = 1.0
    tau_seq: float = 0.5
    soft: float = 0.1
    hard: float = 0.1
    feature: float = 1.0
    unroll: int = 1
    unroll_decay: float = 0.8
    anchors: int | None = None
    guidance: float | None = None
    unconditional: float = 0.1
    noise: float = 0.2
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("convergence_weight", "soft", "hard", "feature", "unroll_decay", "noise"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.unroll < 1:
            raise ValueError(f"unroll must be at least 1, not {self.unroll}")
        if self.anchors is not None and self.anchors < 1:
            raise ValueError(f"anchors must be at least 1, not {self.anchors}")
        if not 0 <= self.unconditional <= 1:
            raise ValueError(f"unconditional is a share between 0 and 1, not {self.unconditional}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, not {self.dtype!r}")


@dataclasses.dataclass(frozen=True)
class Graphs:
    """What shapes the compiled step.

    Attributes:
      target: the target's graph definition.
      drafter: the drafter's.
      taps: the target's layers that the drafter reads.
      layout: what may stand where among the tokens.
    """

    target: nnx.GraphDef
    drafter: nnx.GraphDef
    taps: tuple[int, ...]
    layout: Layout | None = None


USUAL = next(iter(KINDS["drafter"]))
_ANCHORS = 2**31 - 1  # the number that anchors' keys are made with; no row's


def kinds() -> list[str]:
    """The drafters that can be trained."""
    return [name for name, kind in KINDS["drafter"].items() if hasattr(kind.config, "for_target")]


def check(kind: str) -> None:
    """Raises a ValueError that lists what there is unless drafters of this kind can be trained."""
    if kind not in kinds():
        raise ValueError(f"unknown drafter {kind!r}; known: {', '.join(kinds())}")


def sizes(kind: str, target: Any, ahead: int | None = None) -> Any:
    """Sizes of a new drafter, which looks so many tokens ahead (None: as many as is its kind's standard), for a target
    of these sizes. Raises as `check`."""
    check(kind)
    return KINDS["drafter"][kind].config.for_target(target, standard(kind).unroll if ahead is None else ahead)


def standard(kind: str) -> Objective:
    """What the public code of a kind of drafter trains on."""
    return Objective(**KINDS["drafter"][kind].module.standard)


def start(config: Any, seed: int) -> tuple[nnx.GraphDef, nnx.State]:
    """A fresh drafter of these sizes."""
    return nnx.split(module_of("drafter", config)(config, rngs=nnx.Rngs(seed)))


def prefix_of(graphs: Graphs, target: nnx.Module, drafter: nnx.Module | None, prompts: Any) -> Prefix:
    """What stands before the tokens in both branches, from stacked prompts as `data.by_row` lays them out."""
    return target.prefix(by_branch(prompts), True, drafter)


def branch_features(target: nnx.Module, prefix: Prefix, tokens: jax.Array, taps: tuple[int, ...]) -> jax.Array:
    """The target's features [B, 2, S, (1 + taps) d] over both branches' prefixes and tokens int [B, T]."""
    features = teacher_forced(target, prefix, jnp.concatenate([tokens, tokens]), taps)
    return features.reshape(2, len(tokens), *features.shape[1:]).swapaxes(0, 1)


def drafter_loss(graphs: Graphs, objective: Objective, params, batch, key: jax.Array, frozen) -> tuple[jax.Array, dict]:
    """Loss [] and metrics of a batch, for `loop.fit`.

    Args:
      params: the drafter's state.
      batch: see `Batches`.
      frozen: the target's state.
    """
    target, drafter = nnx.merge(graphs.target, frozen), nnx.merge(graphs.drafter, params)
    tokens, dtype = batch["tokens"], jnp.dtype(objective.dtype)
    batch_size, length = tokens.shape
    prefix = prefix_of(graphs, target, drafter, batch["prompts"])
    kept = batch.get("features")
    if kept is not None:
        kept = kept.swapaxes(0, 1).reshape(-1, *kept.shape[2:])
    if objective.guidance is None:
        rows = jnp.arange(batch_size) + jnp.where(batch["unconditional"], batch_size, 0)
        prefix, kept = jax.tree.map(lambda x: x[rows], (prefix, kept))
    branches = len(prefix.length) // batch_size
    everywhere = jnp.concatenate([tokens] * branches)
    if kept is None:
        kept = teacher_forced(target, prefix, everywhere, graphs.taps)
    features, read = split(jax.lax.stop_gradient(kept), graphs.taps)

    size = features.shape[1]
    place = jax.vmap(lambda x, new, at: jax.lax.dynamic_update_slice_in_dim(x, new, at, axis=0))
    known = prefix.drafter_embeddings.astype(dtype)
    embeddings = jnp.pad(known, [(0, 0), (0, size - known.shape[1]), (0, 0)])
    embeddings = place(embeddings, drafter.embed(everywhere[:, :-1], target).astype(dtype), prefix.length)
    read = read[:, :-1].astype(dtype) + _noise(objective.noise, key, batch["row"], prefix, length, read[:, :-1], dtype)
    anchors = _anchors(objective.anchors, length - objective.unroll, jax.random.fold_in(key, _ANCHORS))
    given = {} if anchors is None else {"anchors": (prefix.length - 1)[:, None] + anchors}
    estimates = drafter.ahead(embeddings, read, objective.unroll, objective.remat, **given)

    true = at_tokens(features, prefix, length)[:, 1:]  # of the second token and later: [R, T - 1, d]
    weights = jnp.ones((1, length - 1))
    if objective.convergence_weight != 1:
        conditional = true[:batch_size].astype(jnp.float32)
        weights = losses.convergence_weights(conditional, objective.convergence_weight, objective.tau_seq)
    free = np.ones(length - 1, bool) if graphs.layout is None else np.array(graphs.layout.forced[1:length]) < 0
    guided = functools.partial(_guided, target, drafter, objective.guidance, batch_size)

    def terms(estimate, true, tokens, weights, free):
        q, p = guided(true, estimate)
        mean = functools.partial(losses.masked_mean, mask=free)
        found = {"soft": mean(weights * losses.soft_cross_entropy(q, p))}
        if objective.hard:
            found["hard"] = mean(losses.hard_cross_entropy(p, tokens))
        if objective.feature:
            found["feature"] = jnp.mean(losses.smooth_l1(estimate.astype(jnp.float32), true.astype(jnp.float32)))
        rank = losses.rank_of_target(q, p)
        accuracy = {f"top{k}": mean((rank < k).astype(jnp.float32)) for k in (1, 2, 3)}
        return found, {"acceptance": mean(losses.expected_acceptance(q, p)), **accuracy}

    if objective.remat:
        terms = jax.checkpoint(terms)
    total, metrics = 0.0, {}
    for i, weight in enumerate(losses.unroll_weights(objective.unroll, objective.unroll_decay)):
        ahead = estimates[i]
        if i == 0 or anchors is None:
            ahead = at_tokens(ahead, prefix, length - 1)[:, : length - 1 - i]
        later = functools.partial(_later, i, anchors if i else None)
        found, figures = terms(ahead, *map(later, (true, tokens[:, 1:], weights, free[None])))
        total += weight * sum(getattr(objective, name) * value for name, value in found.items())
        if i == 0:
            metrics |= {**found, **figures}
            if objective.convergence_weight != 1:
                metrics["converged"] = jnp.mean((weights != 1).astype(jnp.float32))
        else:
            metrics[f"acceptance{i + 1}"] = figures["acceptance"]
    return total, jax.lax.stop_gradient(metrics)


def _later(i: int, anchors: jax.Array | None, x: jax.Array) -> jax.Array:
    """`x` [n, S, ...] from place i on; with anchors, i places behind each of them."""
    return x[:, i:] if anchors is None else jnp.take(x, anchors + i, axis=1)


def _anchors(count: int | None, places: int, key: jax.Array) -> jax.Array | None:
    """Of so many places `count`, int [count], spread evenly but for chance; all where there are no more."""
    if count is None:
        return None
    edges = np.linspace(0, places, min(count, places) + 1).astype(int)
    widths = np.diff(edges)
    return edges[:-1] + (jax.random.uniform(key, widths.shape) * widths).astype(jnp.int32)


def _noise(width: float, key: jax.Array, row: jax.Array, prefix: Prefix, length: int, like: jax.Array, dtype):
    """Uniform noise [R, S - 1, w]; a row's depends on the key and its number alone."""
    if not width:
        return jnp.zeros((), dtype)
    branches = len(prefix.length) // len(row)
    numbers = jnp.concatenate([branches * row + branch for branch in range(branches)])
    uniform = lambda number: jax.random.uniform(jax.random.fold_in(key, number), like.shape[1:], dtype) - 0.5
    scale = width * 512 / (prefix.length + length)
    return jax.vmap(uniform)(numbers) * scale[:, None, None].astype(dtype)


def _guided(target, drafter, guidance: float | None, batch: int, true: jax.Array, estimate: jax.Array):
    """The target's and the drafter's logits [B, n, V] from features and estimates [R, n, d]."""
    true, estimate = (x.reshape(-1, batch, *x.shape[1:]) for x in (true, estimate))
    q = guided_logits(target.logits, true, guidance, linear=target.linear_head)
    head = functools.partial(drafter.logits, target=target)
    return jax.lax.stop_gradient(q), guided_logits(head, estimate, guidance, linear=drafter.linear_head(target))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the drafter learns: AdamW with betas 0.9 and 0.95, warm-up, then decay to (almost) 0.

    Attributes:
      rate: the highest learning rate.
      warmup: share of the steps in which the rate rises.
      decay: "linear" or "cosine".
      clip: bound on every entry of the gradient; None for none.
      norm: bound on the gradient's norm; None for none.
    """

    rate: float = 1e-4
    warmup: float = 0.03
    decay: str = "linear"
    clip: float | None = 0.5
    norm: float | None = None

    def __post_init__(self):
        if self.decay not in ("linear", "cosine"):
            raise ValueError(f"decay must be linear or cosine, not {self.decay!r}")
        if not 0 < self.rate < float("inf") or not 0 <= self.warmup < 1:
            raise ValueError(f"rate must be positive and warmup a share below 1, not {self.rate} and {self.warmup}")

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """The optimiser of a run of so many steps."""
        rising = int(self.warmup * steps) + 1
        if self.decay == "cosine":
            rate = optax.warmup_cosine_decay_schedule(0.0, self.rate, rising, max(steps, rising + 1), self.rate / 200)
        else:
            falling = optax.linear_schedule(self.rate, 0.0, max(steps - rising, 1))
            rate = optax.join_schedules([optax.linear_schedule(0.0, self.rate, rising), falling], [rising])
        clips = [] if self.clip is None else [optax.clip(self.clip)]
        clips += [] if self.norm is None else [optax.clip_by_global_norm(self.norm)]
        return optax.chain(*clips, optax.adamw(rate, b1=0.9, b2=0.95))
