"""The scenes target: a small LlamaGen conditioned on what a caption says, and its recipe.

The caption reader (`captions.parse`) yields attributes; a learned table turns them into the caption features that
LlamaGen's own caption embedder takes. Table and transformer are trained together on freshly rendered, tokenised scenes.

While it trains, the embedding and the head of a code are each the sum of a table's row and a linear map of the code's
vector in the tokenizer's codebook, so that what is learned of one code holds for those that look like it. With 4,096
codes, each seen every other step, that saves more than half of the steps. The sum is a plain table again: the trained
model is an ordinary LlamaGen.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cascade_jax.bundle import built
from cascade_jax.decode import Prefix, at_tokens, teacher_forced
from cascade_jax.models.llamagen import LlamaGen, LlamaGenConfig
from cascade_jax.models.vq import VQModel
from cascade_jax.scenes import captions
from cascade_jax.scenes.data import renderers, scene_batch
from cascade_jax.training import checkpoints, loop

# Where the condition slots stand in the picture, row and column: ground, sky, the places, what has no place.
CONDITION_PLACES = ((13, 7.5), (3, 7.5), (10, 2.75), (10, 7.5), (10, 12.25), (-4, 2.75), (-4, 12.25))


@dataclasses.dataclass(frozen=True)
class Edition:
    """A size of the target, and how one of that size is trained.

    Attributes:
      config: sizes.
      steps: training steps.
      batch: pictures in a step.
      rate: Muon's highest learning rate.
      adam_rate: Adam's.
      guidance: the scale that the model draws with unless told otherwise.
    """

    config: LlamaGenConfig
    steps: int
    batch: int
    rate: float
    adam_rate: float
    guidance: float = 3.0


def _sizes(dim: int, heads: int) -> LlamaGenConfig:
    return LlamaGenConfig(
        dim=dim, layers=8, heads=heads, image_tokens=256, vocab_size=4096, condition_tokens=captions.CONDITION_SLOTS,
        caption_dim=64, ffn_multiple=64, condition_places=CONDITION_PLACES,
    )  # fmt: skip


EDITIONS = {
    # Muon's own products cost as much as the gradient of 8 pictures: hence larger and fewer steps.
    "scenes": Edition(_sizes(512, 8), steps=1300, batch=16, rate=0.004, adam_rate=8e-4, guidance=2.5),
    "scenes-small": Edition(_sizes(128, 2), steps=3000, batch=8, rate=0.004, adam_rate=1.5e-3),
}
CONDITION_DROPOUT = 0.1
THING_WEIGHT = 4.0
BLIND = 0.4  # share of the rows that do not see the codes of things, once the network has learned to see
BLIND_STEPS = (150, 500)  # all rows are blind before the first, that share of them from the second on
DECAY = 0.4  # share of the steps in which the learning rate falls


def init(config: LlamaGenConfig, seed: int, features: int) -> tuple[nnx.GraphDef, dict]:
    """Fresh parameters: {"target": LlamaGen's state, "text": caption table [NUM_CONDITIONS, caption_dim], "codes": maps
    from `code_features` [V, features] to what is added to the "embedding" and the "head" of each code}."""
    graphdef, state = nnx.split(LlamaGen(config, rngs=nnx.Rngs(seed)))
    table = jax.random.normal(jax.random.key(seed + 1), (captions.NUM_CONDITIONS, config.caption_dim))
    embedding = 0.04 * jax.random.normal(jax.random.key(seed + 2), (features, config.dim)) * features**-0.5
    codes = {"embedding": embedding, "head": jnp.zeros((features, config.dim))}
    return graphdef, {"target": state, "text": table, "codes": codes}


def code_features(codebook: np.ndarray, waves: int = 120) -> jax.Array:
    """What codes with alike vectors share: the vectors [V, n] and random waves over them at three scales, [V, F]."""
    codebook, rng = np.asarray(codebook, np.float32), np.random.default_rng(0)
    directions = rng.standard_normal((codebook.shape[1], waves)) * np.repeat([1.0, 2.0, 4.0], waves // 3)
    features = np.concatenate([codebook, np.cos(codebook @ directions + rng.uniform(0, 2 * np.pi, waves))], axis=1)
    return jnp.asarray((features - features.mean(0)) / features.std(0), jnp.float32)


def fold(params: dict, features: jax.Array) -> dict:
    """The parameters without "codes": their maps of `code_features` [V, F] added to the embedding and the head."""
    state = jax.tree.map(lambda x: x, params["target"])
    state["embedding"][...] += features @ params["codes"]["embedding"]
    state["head"]["kernel"][...] += (features @ params["codes"]["head"]).T
    return {"target": state, "text": params["text"]}


def loss(graphdef, features, params, batch, key, *, dtype=jnp.float32) -> tuple[jax.Array, dict]:
    """Mean cross-entropy (nats) of the codes, weighed by batch["weights"]; every tenth row is unconditional.

    A code of batch["hidden"] is to be predicted like any other, but those behind it do not see it. The network computes
    in `dtype`, from float32 parameters to float32 logits.
    """
    params, codes = fold(params, features), batch["codes"]
    seen = jnp.where(batch["hidden"], len(features), codes)
    table = params["target"]["embedding"]
    table.set_value(jnp.pad(table[...], ((0, 1), (0, 0))).astype(dtype))  # what a hidden code looks like: nothing
    model = nnx.merge(graphdef, params["target"])
    conditional = model.condition(captions.features(params["text"], batch["ids"]))
    drop = jax.random.bernoulli(key, CONDITION_DROPOUT, (len(conditional), 1, 1))
    condition = jnp.where(drop, model.unconditional(len(conditional)), conditional)
    prefix = Prefix(condition, condition, jnp.full(len(condition), condition.shape[1]))
    logits = model.logits(at_tokens(teacher_forced(model, prefix, seen), prefix, seen.shape[1]))
    top, right = jnp.max(logits, axis=-1), jnp.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]
    total = jax.nn.logsumexp(logits, axis=-1)
    metrics = {"top1_accuracy": jnp.mean(right == top), "top1_probability": jnp.mean(jnp.exp(top - total))}
    nats = total - right
    return jnp.sum(nats * batch["weights"]) / jnp.sum(batch["weights"]), metrics | {"nats": jnp.mean(nats)}


def optimizer(steps: int, rate: float, adam_rate: float) -> optax.GradientTransformation:
    """Muon on the blocks' matrices, Adam on the rest; warm-up, constant, linear decay at the end."""
    shape = optax.join_schedules(
        [
            optax.linear_schedule(0.0, 1.0, min(100, steps // 10 + 1)),
            optax.constant_schedule(1.0),
            optax.linear_schedule(1.0, 0.0, int(DECAY * steps)),
        ],
        [min(100, steps // 10 + 1), steps - int(DECAY * steps)],
    )

    def matrices(params):
        def label(path, leaf):
            inside = any(getattr(p, "key", None) == "blocks" for p in path)
            if not inside or leaf.ndim < 2:
                return None
            return optax.contrib.MuonDimensionNumbers(reduction_axis=0, output_axis=tuple(range(1, leaf.ndim)))

        return jax.tree_util.tree_map_with_path(label, params)

    def scaled(peak):
        return lambda step: peak * shape(step)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            learning_rate=scaled(rate),
            adam_learning_rate=scaled(adam_rate),
            adam_b1=0.9,
            adam_b2=0.95,
            weight_decay=0.01,
            muon_weight_dimension_numbers=matrices,
        ),
    )


def hide(rng: np.random.Generator, things: np.ndarray, share: float) -> np.ndarray:
    """Which codes, bool [B, g, g], the network does not see; given where things are, bool [B, g, g].

    About `share` of the rows are blind to their things, to the codes around them, and to up to half of the others.
    """
    padded = np.pad(things, ((0, 0), (1, 1), (1, 1)))
    around = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2)).any((3, 4))
    other = rng.random(things.shape) < rng.uniform(0, 0.5, (len(things), 1, 1))
    return (around | other) & (rng.random((len(things), 1, 1)) < share)


def train_target(
    folder,
    tokenizer: VQModel,
    edition: Edition,
    *,
    steps: int | None = None,
    batch: int | None = None,
    seed: int = 0,
) -> dict:
    """Trains the target on renders tokenised by `tokenizer`: {"target": LlamaGen's state, "text": caption table}.

    Args:
      steps, batch: in place of the edition's.

    Half of a batch comes with all there is to say of its scenes, the others with what a random caption says. What a
    caption says of things decides few of a picture's codes, and would be learned last: some 7 of 1,000 nats. So the
    network learns blind first: the codes of things are hidden, so that only the caption can tell what follows. Then
    ever more rows see everything; some stay blind, and codes that show part of a thing weigh more, until the learning
    rate decays.
    """
    config, steps, batch = edition.config, steps or edition.steps, batch or edition.batch
    codes = code_features(tokenizer.codebook())
    graphdef, params = init(config, seed, codes.shape[1])
    vq_graphdef, vq_state = nnx.split(tokenizer)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16

    @jax.jit
    def encode(images):
        model = nnx.merge(vq_graphdef, vq_state)
        return model.encode_codes(images.astype(jnp.float32) / 127.5 - 1).reshape(len(images), -1)

    def make_batch(step):
        complete = (np.arange(batch) + step) % 2 == 0
        rows = scene_batch(seed, step, batch, complete=complete, pool=renderers())
        decaying = step >= (1 - DECAY) * steps
        cells = rows["cover"].reshape(batch, config.grid, -1, config.grid, rows["cover"].shape[1] // config.grid)
        things = cells.max((2, 4)) > 0.1
        blind = 0 if decaying else np.interp(step, BLIND_STEPS, (1, BLIND))
        return {
            "codes": encode(rows["images"]),
            "ids": rows["ids"],
            "weights": np.where(things & ~decaying, THING_WEIGHT, 1.0).astype(np.float32).reshape(batch, -1),
            "hidden": hide(np.random.default_rng((seed, step)), things, blind).reshape(batch, -1),
        }

    params = loop.fit(
        functools.partial(loss, graphdef, codes, dtype=dtype),
        params,
        optimizer(steps, edition.rate, edition.adam_rate),
        make_batch,
        steps=steps,
        folder=folder,
        seed=seed,
        save_every=100,
        title="target",
        settings={
            "batch": batch,
            "rate": edition.rate,
            "adam_rate": edition.adam_rate,
            "config": dataclasses.asdict(config),
        },
    )
    return fold(params, codes)


def load_target(folder: str | pathlib.Path, tokenizer: VQModel) -> tuple[LlamaGenConfig, dict]:
    """The sizes and the newest state in a folder of `train_target`, the latter as that returns it."""
    settings = pathlib.Path(folder) / "settings.json"
    if not settings.exists():
        raise FileNotFoundError(f"{folder} holds no checkpoint: train first")
    config = built(LlamaGenConfig, json.loads(settings.read_text(encoding="utf-8"))["config"])
    codes = code_features(tokenizer.codebook())
    params = jax.eval_shape(lambda: init(config, 0, codes.shape[1])[1])
    return config, fold(checkpoints.restore(folder, params), codes)
