"""The scenes target: a small LlamaGen conditioned on what a caption says, and its recipe.

The caption reader (`captions.parse`) yields ten attribute ids; a learned table turns them into the caption features
that LlamaGen's own caption embedder takes. Table and transformer are trained together on freshly rendered, tokenised
scenes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from cascade_jax.decode import Prefix, at_tokens, teacher_forced
from cascade_jax.models.llamagen import LlamaGen, LlamaGenConfig
from cascade_jax.scenes import captions
from cascade_jax.scenes.data import scene_batch
from cascade_jax.training.loop import fit

TARGET = LlamaGenConfig(
    dim=192,
    layers=8,
    heads=3,
    image_tokens=256,
    vocab_size=2048,
    condition_tokens=len(captions.SLOTS),
    caption_dim=64,
)
CONDITION_DROPOUT = 0.1


def init(config: LlamaGenConfig, seed: int) -> tuple[nnx.GraphDef, dict]:
    """Fresh parameters: {"target": LlamaGen's state, "text": caption table [NUM_IDS, caption_dim]}."""
    graphdef, state = nnx.split(LlamaGen(config, rngs=nnx.Rngs(seed)))
    table = jax.random.normal(jax.random.key(seed + 1), (captions.NUM_IDS, config.caption_dim))
    return graphdef, {"target": state, "text": table}


def loss(graphdef, params, batch, key) -> tuple[jax.Array, dict]:
    """Mean cross-entropy (nats) of the codes; every tenth row sees the unconditional caption."""
    model = nnx.merge(graphdef, params["target"])
    conditional = model.condition(params["text"][batch["ids"]])
    drop = jax.random.bernoulli(key, CONDITION_DROPOUT, (len(conditional), 1, 1))
    condition = jnp.where(drop, model.unconditional(len(conditional)), conditional)
    prefix = Prefix(condition, condition, jnp.full(len(condition), condition.shape[1]))
    features = at_tokens(teacher_forced(model, prefix, batch["codes"]), prefix, batch["codes"].shape[1])
    logits = model.logits(features)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["codes"])
    top1 = jnp.mean(jnp.max(jax.nn.softmax(logits), axis=-1))
    return jnp.mean(nats), {"top1_probability": top1, "top1_accuracy": jnp.mean(logits.argmax(-1) == batch["codes"])}


def optimizer(steps: int, rate: float = 0.01, adam_rate: float = 1.5e-3) -> optax.GradientTransformation:
    """Muon on the blocks' matrices, Adam on the rest; warm-up, constant, linear decay over the last 40 %."""
    shape = optax.join_schedules(
        [
            optax.linear_schedule(0.0, 1.0, min(100, steps // 10 + 1)),
            optax.constant_schedule(1.0),
            optax.linear_schedule(1.0, 0.0, int(0.4 * steps)),
        ],
        [min(100, steps // 10 + 1), steps - int(0.4 * steps)],
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


def train_target(folder, tokenizer, *, steps: int = 1850, batch: int = 8, seed: int = 0, config=TARGET) -> dict:
    """Trains the target on renders tokenised by `tokenizer` (a VQModel); returns the parameters of `init`."""
    graphdef, params = init(config, seed)
    vq_graphdef, vq_state = nnx.split(tokenizer)

    @jax.jit
    def encode(images):
        model = nnx.merge(vq_graphdef, vq_state)
        return model.encode_codes(images.astype(jnp.float32) / 127.5 - 1).reshape(len(images), -1)

    def make_batch(step):
        rows = scene_batch(seed, step, batch)
        return {"codes": encode(rows["images"]), "ids": rows["ids"]}

    return fit(
        functools.partial(loss, graphdef),
        params,
        optimizer(steps),
        make_batch,
        steps=steps,
        folder=folder,
        seed=seed,
        save_every=100,
        title="target",
        settings={"batch": batch, "config": dataclasses.asdict(config)},
    )
