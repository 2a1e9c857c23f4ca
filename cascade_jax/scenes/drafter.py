"""The scenes drafter: an EAGLE-1 layer trained on pictures that the target itself drew, and its recipe.

`distill` lets the target generate sequences from random captions, with the guidance that decoding uses. `train_drafter`
then teaches the drafter to continue them: at every position it sees the target's true feature (with a little noise, for
below a tree's root it will see its own estimate) and the next token, and predicts the next feature.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cascade_jax import acceptance, decode
from cascade_jax.bundle import Bundle, Prompt
from cascade_jax.cache import Context, bias, causal
from cascade_jax.models.eagle import Eagle1, EagleConfig
from cascade_jax.models.llamagen import LlamaGenConfig
from cascade_jax.sampling import guided_logits
from cascade_jax.scenes import captions, world
from cascade_jax.training import losses
from cascade_jax.training.loop import fit
from cascade_jax.tree import ROOT


def drafter_config(target: LlamaGenConfig) -> EagleConfig:
    """The drafter of a LlamaGen target: its block without the input norm, one condition slot less."""
    block = target.block.__class__(**{**vars(target.block), "input_norm": False})
    return EagleConfig(block, grid=target.grid, condition_slots=target.condition_tokens - 1)


def caption_ids(seed: int, index: int) -> np.ndarray:
    """Attribute ids int32 [10] of the index-th random caption, which no comparison draws for the same seed."""
    rng = np.random.default_rng(np.random.SeedSequence((seed, index, 1)))
    return captions.encode(captions.placed(captions.parse(captions.describe(world.sample_scene(rng), rng))))


def distill(bundle: Bundle, folder, *, count: int, batch: int, seed: int, sampling, log=print) -> dict[str, np.ndarray]:
    """Sequences that the target draws: {"ids": int32 [count, 10], "tokens": int32 [count, T]}.

    Every batch is a file in `folder`, so a run that was interrupted goes on where it stopped.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    program, sampling = bundle.program(ROOT), sampling.checked()
    params, table = bundle.decoding_params(program), bundle.params["text"]
    for shard in range(-(-count // batch)):
        path = folder / f"{shard:05d}.npz"
        if path.exists():
            continue
        ids = np.stack([caption_ids(seed, shard * batch + row) for row in range(batch)])
        prefix = bundle.prefix([Prompt(features=features) for features in captions.features(table, ids)], guided=True)
        key = jax.random.key(seed)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(shard * batch + jnp.arange(batch))
        state = decode.generate_jit(program, params, prefix, keys, acceptance.strict(), sampling)
        temporary = path.with_suffix(".tmp.npz")
        np.savez_compressed(temporary, ids=ids, tokens=np.asarray(state.tokens[:, : bundle.length]).astype(np.uint16))
        temporary.rename(path)
        log(f"distilled {(shard + 1) * batch} of {count} pictures")
    shards = [np.load(path) for path in sorted(folder.glob("?????.npz"))]
    return {
        "ids": np.concatenate([s["ids"] for s in shards])[:count],
        "tokens": np.concatenate([s["tokens"] for s in shards])[:count].astype(np.int32),
    }


def drafter_loss(graph, target_graph, drafter_params, batch, key, *, noise: float, feature_weight: float):
    """Guided soft cross-entropy at every position, hard cross-entropy, and SmoothL1 on features of both branches.

    batch: {"features": [2, B, C + T - 1, d], "tokens": int [B, T], "target": the target's state, "guidance": []}
    """
    drafter, target = nnx.merge(graph, drafter_params), nnx.merge(target_graph, batch["target"])
    features, tokens = batch["features"], batch["tokens"]
    branches, rows, slots, width = features.shape
    first = slots - tokens.shape[1]  # slot of the last condition token
    features = features.reshape(branches * rows, slots, width)
    noisy = features + noise * (jax.random.uniform(key, features.shape) - 0.5)
    context_slots = first + 1
    filler = jnp.broadcast_to(target.embed(jnp.zeros((), jnp.int32)), (rows, context_slots - 1, width))
    embeddings = jnp.concatenate([filler, target.embed(tokens[:, :-1])], axis=1)  # of slots 1 ... slots - 1
    positions = jnp.broadcast_to(jnp.arange(slots - 1), (branches * rows, slots - 1))
    context = Context(drafter.rope(positions), bias(causal(slots - 1))[None, None])
    predicted, _ = drafter(jnp.concatenate([embeddings] * branches), noisy[:, :-1], context)
    predicted, true = predicted[:, first:], features[:, first + 1 :]  # after the first token and later

    def guided(hidden):
        hidden = hidden.reshape(branches, rows, *hidden.shape[1:])
        return guided_logits(target.logits, hidden, batch["guidance"], linear=target.linear_head)

    p, q = guided(predicted), jax.lax.stop_gradient(guided(true))
    soft = jnp.mean(losses.soft_cross_entropy(q, p))
    hard = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(p, tokens[:, 1:]))
    feature = jnp.mean(losses.smooth_l1(predicted, true))
    metrics = {"soft": soft, "feature": feature, "acceptance": jnp.mean(losses.expected_acceptance(q, p))}
    return soft + 0.1 * hard + feature_weight * feature, metrics


def train_drafter(
    folder,
    bundle: Bundle,
    data: dict[str, np.ndarray],
    *,
    steps: int = 900,
    batch: int = 8,
    seed: int = 0,
    guidance: float,
) -> tuple[EagleConfig, nnx.State]:
    """Trains a drafter for the bundle's target on `distill`'s sequences; returns its sizes and parameters."""
    config = drafter_config(bundle.config.target)
    graph, params = nnx.split(Eagle1(config, rngs=nnx.Rngs(seed)))
    target_graph, target_params = bundle.program(ROOT).target, bundle.params["target"]
    table = jnp.asarray(bundle.params["text"])

    slots = bundle.config.target.condition_tokens + bundle.length - 1

    @jax.jit
    def features(state, ids, tokens):
        target = nnx.merge(target_graph, state)
        condition = jnp.concatenate([target.condition(captions.features(table, ids)), target.unconditional(len(ids))])
        prefix = decode.Prefix(condition, condition, jnp.full(len(condition), condition.shape[1]))
        features = decode.teacher_forced(target, prefix, jnp.concatenate([tokens, tokens]))
        return features.reshape(2, len(ids), slots, config.block.dim)

    # The target is frozen, so its features of a sequence are computed when it first comes up, and kept.
    known = np.zeros(len(data["tokens"]), bool)
    kept = np.empty((2, len(known), slots, config.block.dim), np.float32)

    def make_batch(step):
        rows = np.random.default_rng((seed, step)).choice(len(known), batch, replace=False)
        if not known[rows].all():
            kept[:, rows] = features(target_params, data["ids"][rows], data["tokens"][rows])
            known[rows] = True
        tokens = jnp.asarray(data["tokens"][rows])
        return {
            "features": kept[:, rows],
            "tokens": tokens,
            "target": target_params,
            "guidance": jnp.float32(guidance),
        }

    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 2e-3, steps // 30 + 1, steps, 1e-5), b1=0.9, b2=0.95),
    )
    loss = functools.partial(drafter_loss, graph, target_graph, noise=0.2 * 512 / (slots + 1), feature_weight=1.0)
    params = fit(
        loss, params, optimizer, make_batch, steps=steps, folder=folder, seed=seed, save_every=250, title="drafter",
        settings={"batch": batch, "guidance": guidance},
    )  # fmt: skip
    return config, params
