"""How the judge of `scenes` is trained: to read attributes off renders, half of them worn."""

import io
import pathlib

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image

from cascade_jax import bundle
from cascade_jax.models.judge import Judge
from cascade_jax.models.vq import VQModel, to_float, to_uint8
from cascade_jax.scenes.data import scene_batch
from cascade_jax.scenes.judge import CONFIG, Array, accuracy, reading, targets
from cascade_jax.training import checkpoints, loop


def train_judge(
    folder: str | pathlib.Path,
    *,
    tokenizer: VQModel | None = None,
    steps: int = 500,
    batch: int = 64,
    seed: int = 0,
    rate: float = 2e-3,
) -> Judge:
    """Trains a judge on renders, half of them worn: blurred, noisy or compressed.

    With a tokenizer, a quarter of each batch comes from 512 renders that went through it and back, so that the judge
    reads what a tokenizer can show at best.
    """
    graphdef, params = nnx.split(Judge(CONFIG, rngs=nnx.Rngs(seed)))
    pool = None if tokenizer is None else _reconstructions(tokenizer, seed + 1, 512)
    fresh = batch if pool is None else batch - batch // 4

    def batch_fn(step):
        rng = np.random.default_rng((seed, step))
        data = scene_batch(seed, step, fresh, complete=True)
        images = [wear(rng, image) if i % 2 else image for i, image in enumerate(data["images"])]
        ids = data["ids"]
        if pool is not None:
            rows = rng.integers(0, len(pool["ids"]), batch - fresh)
            images.extend(wear(rng, image) if i % 2 else image for i, image in enumerate(pool["images"][rows]))
            ids = np.concatenate([ids, pool["ids"][rows]])
        return np.stack(images), targets(ids)

    def loss_fn(params, batch, key):
        del key
        images, truth = batch
        read = reading(nnx.merge(graphdef, params)(to_float(images)))
        losses = [_cross_entropy(logits, label) for logits, label in zip(read, truth)]
        return sum(losses), {"accuracy": jnp.mean(accuracy(read, truth))}

    params = loop.fit(
        loss_fn,
        params,
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, rate, min(50, steps // 2), steps), weight_decay=1e-3),
        batch_fn,
        steps=steps,
        folder=folder,
        seed=seed,
        title="judge",
        settings={"batch": batch, "rate": rate, "reconstructions": pool is not None},
    )
    return nnx.merge(graphdef, params)


def load_judge(folder: str | pathlib.Path) -> Judge:
    """The newest state in a folder of `train_judge`."""
    graphdef, params = bundle.skeleton("metric", CONFIG)
    return nnx.merge(graphdef, checkpoints.restore(folder, params))


def wear(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Blurs, compresses or adds noise to a picture, uint8 [H, W, 3], in one of these ways at random."""
    picture = Image.fromarray(image)
    match rng.integers(3):
        case 0:
            small = rng.integers(picture.width // 3, picture.width)
            picture = picture.resize((small, small), Image.BILINEAR).resize(picture.size, Image.BILINEAR)
        case 1:
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=int(rng.integers(8, 60)))
            picture = Image.open(file)
        case 2:
            noise = rng.normal(0, rng.uniform(4, 20), image.shape)
            return np.clip(image + noise, 0, 255).astype(np.uint8)
    return np.asarray(picture)


def _cross_entropy(logits: Array, label: Array) -> Array:
    """Mean over the labels that are not -1."""
    valid = label >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0))
    return jnp.sum(jnp.where(valid, losses, 0)) / jnp.maximum(jnp.sum(valid), 1)


def _reconstructions(tokenizer: VQModel, seed: int, count: int, batch: int = 16) -> dict[str, np.ndarray]:
    """Renders that went through the tokenizer and back, uint8 [count, 128, 128, 3], and all there is to say of them."""

    @nnx.jit
    def there_and_back(model, images):
        return to_uint8(model.decode_codes(model.encode_codes(to_float(images))))

    batches = [scene_batch(seed, step, batch, complete=True) for step in range(count // batch)]
    return {
        "images": np.concatenate([there_and_back(tokenizer, data["images"]) for data in batches]),
        "ids": np.concatenate([data["ids"] for data in batches]),
    }
