"""The recipe of the scenes tokenizer: pictures of 128 x 128 pixels as 16 x 16 codes."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax import contrib

from cascade_jax.models.vq import VQConfig, VQModel, to_float
from cascade_jax.scenes.data import scene_batch
from cascade_jax.training import checkpoints, loop

Array = jax.Array

TOKENIZER = VQConfig(
    codebook_size=4096,
    codebook_dim=8,
    channels=16,
    channel_multipliers=(1, 1, 2, 4),
    res_blocks=1,
    z_channels=64,
    norm_groups=8,
)


def train_tokenizer(
    folder: str | pathlib.Path,
    *,
    steps: int = 1500,
    warmup: int | None = None,
    batch: int = 2,
    seed: int = 0,
    rate: float = 0.02,
) -> VQModel:
    """Trains the tokenizer in two runs, both resumable.

    `folder/autoencoder` trains `warmup` steps, or a third of `steps`, without quantisation. Then the codebook is set to
    the centres of that encoder's latents, and `folder/quantised` trains `steps` steps with it. Codes that no latent of
    a pool of pictures chooses are revived from random latents every 200 steps, up to three quarters of the run. A
    codebook that meets a random encoder collapses; this one never meets a random encoder.

    A step sees 4 * `batch` crops of a quarter of a picture, each of another scene, which makes gradients less noisy
    than `batch` whole pictures would; in the last quarter of the run it sees whole pictures.
    """
    folder, warmup = pathlib.Path(folder), max(1, steps // 3) if warmup is None else warmup
    graphdef, params = nnx.split(VQModel(TOKENIZER, rngs=nnx.Rngs(seed)))
    settings = {"warmup": warmup, "batch": batch, "rate": rate}

    def crops(step):
        images = scene_batch(seed, step, 4 * batch)["images"]
        return random_crops(np.random.default_rng((seed, step)), images, images.shape[1] // 2)

    def crops_then_pictures(step):
        return crops(warmup + step) if step < 0.75 * steps else scene_batch(seed, warmup + step, batch)["images"]

    def autoencoder_loss(params, images, key):
        del key
        model, target = nnx.merge(graphdef, params), to_float(images)
        decoded = model.decode(model.quantize.normalise(model.latents(target)))
        return picture_loss(decoded, target), {}

    def quantised_loss(params, images, key):
        del key
        model, target = nnx.merge(graphdef, params), to_float(images)
        quantised = model.encode(target)
        decoded = model.decode(quantised.vectors)
        pictures = picture_loss(decoded, target)
        metrics = {
            "pictures": pictures,
            "l1": jnp.mean(jnp.abs(decoded - target)),
            "commitment": quantised.commitment_loss,
            "perplexity": perplexity(quantised.codes, TOKENIZER.codebook_size),
        }
        return pictures + quantised.codebook_loss + quantised.commitment_loss, metrics

    @jax.jit
    def latents(params, images):
        model = nnx.merge(graphdef, params)
        z = model.quantize.normalise(model.latents(to_float(images)))
        return z.reshape(-1, z.shape[-1])

    def pool(params, step, batches=8):
        # Pictures of another seed than those trained on, in small batches to bound memory.
        pictures = (scene_batch(seed + 1, step + i, 8)["images"] for i in range(batches))
        return jnp.concatenate([latents(params, images) for images in pictures])

    def revise(step, params):
        if step > 0.75 * steps:
            return params
        codebook = params["quantize"]["embedding"]
        codebook[...] = revive(jax.random.fold_in(jax.random.key(seed + 1), step), codebook[...], pool(params, step))
        return params

    params = loop.fit(
        autoencoder_loss, params, _optimizer(rate), crops,
        steps=warmup, folder=folder / "autoencoder", seed=seed, title="autoencoder", settings=settings,
    )  # fmt: skip
    codebook = params["quantize"]["embedding"]
    codebook[...] = spherical_kmeans(jax.random.key(seed + 2), pool(params, 0, batches=32), TOKENIZER.codebook_size)
    params = loop.fit(
        quantised_loss, params, _optimizer(rate, steps), crops_then_pictures,
        steps=steps, folder=folder / "quantised", seed=seed, title="tokenizer", settings=settings, revise=revise,
    )  # fmt: skip
    return nnx.merge(graphdef, params)


def load_tokenizer(folder: str | pathlib.Path) -> VQModel:
    """The newest state in a folder of `train_tokenizer`."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: VQModel(TOKENIZER, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, checkpoints.restore(pathlib.Path(folder) / "quantised", params))


def picture_loss(pictures: Array, target: Array) -> Array:
    """L1 + L2 + a fifth of the L1 distance of neighbouring pixels' differences, for float [B, H, W, 3]."""
    error = pictures - target
    edges = jnp.mean(jnp.abs(jnp.diff(error, axis=1))) + jnp.mean(jnp.abs(jnp.diff(error, axis=2)))
    return jnp.mean(jnp.abs(error)) + jnp.mean(error**2) + 0.2 * edges


def perplexity(codes: Array, codebook_size: int) -> Array:
    """exp of the entropy of the codes' frequencies: the number of codes in effective use, at most `codes.size`."""
    share = jnp.bincount(codes.reshape(-1), length=codebook_size) / codes.size
    return jnp.exp(-jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-12)), 0)))


def revive(key: Array, codebook: Array, points: Array) -> Array:
    """Replaces every code [n, d] that is no point's nearest by a random point; points [m, d], all unit vectors."""
    used = jnp.bincount(_nearest(points, codebook), length=len(codebook)) > 0
    chosen = points[jax.random.choice(key, len(points), (len(codebook),), replace=False)]
    return jnp.where(used[:, None], codebook, chosen)


def spherical_kmeans(key: Array, points: Array, count: int, iterations: int = 10) -> Array:
    """Centres, unit vectors [count, d], of unit vectors [m, d], m >= count; one without points stays where it is."""
    centres = points[jax.random.choice(key, len(points), (count,), replace=False)]

    def improve(_, centres):
        sums = jax.ops.segment_sum(points, _nearest(points, centres), count)
        norms = jnp.linalg.norm(sums, axis=-1, keepdims=True)
        return jnp.where(norms > 1e-6, sums / jnp.maximum(norms, 1e-6), centres)

    return jax.lax.fori_loop(0, iterations, improve, centres)


def _nearest(points: Array, codebook: Array) -> Array:
    # In blocks: the whole table of distances would take m * n floats.
    return jax.lax.map(lambda point: jnp.argmax(codebook @ point), points, batch_size=1024)


def random_crops(rng: np.random.Generator, images: np.ndarray, size: int) -> np.ndarray:
    """One random window [size, size] of each of uint8 [B, H, W, 3]."""
    corners = rng.integers(0, np.array(images.shape[1:3]) - size, (len(images), 2), endpoint=True)
    return np.stack([image[y : y + size, x : x + size] for image, (y, x) in zip(images, corners)])


def _optimizer(rate: float, steps: int | None = None) -> optax.GradientTransformation:
    """Muon for kernels, Adam at a tenth of the rate for the rest; with `steps`, the rate falls along a cosine."""

    def schedule(peak):
        if steps is None:
            return optax.linear_schedule(0.0, peak, 20)
        return optax.warmup_cosine_decay_schedule(0.0, peak, min(20, steps // 2), steps, 0.02 * peak)

    def kernels(params):
        matrix = contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
        return jax.tree.map(lambda leaf: matrix if leaf.ndim == 4 else None, params)

    # Orthogonalised updates need about half of Adam's steps here, and no clipping.
    return contrib.muon(
        schedule(rate),
        adam_learning_rate=schedule(0.1 * rate),
        adam_b2=0.99,
        muon_weight_dimension_numbers=kernels,
    )
