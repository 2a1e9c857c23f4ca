"""The judge: a small network that reads attributes off a picture, and the fidelity of a picture to its prompt.

judge = load_judge(folder)
share = fidelity(read(judge, images), [captions.parse(prompt) for prompt in prompts])
"""

import io
import itertools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image

from cascade_jax.models.vq import VQModel, to_float, to_uint8
from cascade_jax.scenes.captions import OFFSETS, Attributes
from cascade_jax.scenes.data import scene_batch
from cascade_jax.scenes.world import COLOURS, GROUNDS, PIXELS, PLACES, SHAPES, SIZES, SKIES
from cascade_jax.training import loop

Array = jax.Array

FEATURES = 128


class Reading(NamedTuple):
    """What stands in a picture, as logits; or, from `targets`, as indices without the last axis.

    Things are read place by place, which spares matching a list of things to another one.

    Attributes:
      ground: [B, 4], over GROUNDS.
      sky: [B, 3], over SKIES.
      shape: [B, 3, 1 + 3], for each of PLACES: nothing there, then SHAPES.
      colour: [B, 3, 6], for each of PLACES over COLOURS; means nothing where nothing is.
      size: [B, 3, 2], for each of PLACES over SIZES; means nothing where nothing is.
    """

    ground: Array
    sky: Array
    shape: Array
    colour: Array
    size: Array


class Judge(nnx.Module):
    """Strided convolutions from 128 x 128 pixels to 8 x 8 cells, then a layer that sees them all; 0.44 M parameters."""

    def __init__(self, *, rngs: nnx.Rngs):
        widths = (3, 16, 32, 64, 96, 96)
        self.convs = nnx.List(
            [
                nnx.Conv(a, b, (4, 4) if i == 0 else (3, 3), strides=2 if i < 4 else 1, rngs=rngs)
                for i, (a, b) in enumerate(zip(widths, widths[1:]))
            ]
        )
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for width in widths[1:]])
        self.squeeze = nnx.Conv(widths[-1], 32, (1, 1), rngs=rngs)
        self.join = nnx.Linear((PIXELS // 16) ** 2 * 32, FEATURES, rngs=rngs)
        self.heads = nnx.Linear(FEATURES, sum(_WIDTHS), rngs=rngs)

    def features(self, images: Array) -> Array:
        """The penultimate layer, float [B, 128], of uint8 [B, 128, 128, 3]."""
        h = to_float(images)
        for conv, norm in zip(self.convs, self.norms):
            h = nnx.gelu(norm(conv(h)))
        h = self.squeeze(h)
        return nnx.gelu(self.join(h.reshape(len(h), -1)))

    def __call__(self, images: Array) -> Reading:
        """Reads uint8 [B, 128, 128, 3]."""
        parts = jnp.split(self.heads(self.features(images)), np.cumsum(_WIDTHS)[:-1], axis=-1)
        return Reading(*(part.reshape(len(part), *shape) for part, shape in zip(parts, _SHAPES)))


_PER_PLACE = len(PLACES)
_SHAPES = (
    (len(GROUNDS),),
    (len(SKIES),),
    (_PER_PLACE, 1 + len(SHAPES)),
    (_PER_PLACE, len(COLOURS)),
    (_PER_PLACE, len(SIZES)),
)
_WIDTHS = tuple(int(np.prod(shape)) for shape in _SHAPES)


def targets(ids: np.ndarray) -> Reading:
    """What a perfect judge reads, as indices (-1: nothing), given ids int32 [B, 10] of all there is to say."""
    value = {slot: ids[:, i] - offset - 1 for i, (slot, offset) in enumerate(OFFSETS.items())}
    things = {"shape": np.zeros((len(ids), _PER_PLACE), np.int32)}
    things |= {name: np.full((len(ids), _PER_PLACE), -1, np.int32) for name in ("colour", "size")}
    for number in (1, 2):
        rows = np.flatnonzero(value[f"shape{number}"] >= 0)
        places = value[f"place{number}"][rows]
        things["shape"][rows, places] = 1 + value[f"shape{number}"][rows]
        for name in ("colour", "size"):
            things[name][rows, places] = value[f"{name}{number}"][rows]
    return Reading(value["ground"], value["sky"], **things)


def accuracy(reading: Reading, truth: Reading) -> Array:
    """Share of right attributes, float [5], in the order of Reading; colours and sizes only where a thing stands."""
    return jnp.stack(
        [
            jnp.sum((jnp.argmax(logits, -1) == label) & (label >= 0)) / jnp.maximum(jnp.sum(label >= 0), 1)
            for logits, label in zip(reading, truth)
        ]
    )


def fidelity(reading: Reading, attributes: Sequence[Attributes]) -> np.ndarray:
    """Share of what each prompt says that the judge reads in its picture: float [B], 1 if it reads everything.

    What counts, one point each and only where the prompt says it: the ground; the sky; of each thing its shape, colour,
    size and place. Each thing of the prompt is looked for at one place: the place said, otherwise any place that no
    other thing of the prompt takes, whichever assignment of things to places yields most points. At its place, a
    thing's shape, colour and size count if something stands there and has them; the place counts if something of the
    said shape stands there. What a prompt does not say is never held against the picture, nor are further things in it.

    Args:
      reading: logits for B pictures.
      attributes: B prompts, as `captions.parse` returns them.
    """
    if len(attributes) != len(reading.ground):
        raise ValueError(f"{len(attributes)} prompts for {len(reading.ground)} pictures: one each is needed")
    ground, sky, shape, colour, size = (np.argmax(np.asarray(logits), -1) for logits in reading)
    shares = []
    for row, said in enumerate(attributes):
        seen = [
            None if shape[row, p] == 0 else (SHAPES[shape[row, p] - 1], COLOURS[colour[row, p]], SIZES[size[row, p]])
            for p in range(_PER_PLACE)
        ]
        right = [GROUNDS[ground[row]] == said.ground, SKIES[sky[row]] == said.sky]
        points = sum(right) + max(
            sum(_points(thing, PLACES[p], seen[p]) for thing, p in zip(said.things, places))
            for places in itertools.permutations(range(_PER_PLACE), len(said.things))
        )
        count = (said.ground is not None) + (said.sky is not None)
        count += sum(value is not None for t in said.things for value in (t.shape, t.colour, t.size, t.place))
        shares.append(points / count)
    return np.array(shares)


def _points(thing, place, seen) -> int:
    if seen is None or thing.place not in (None, place):
        return 0
    shape, colour, size = seen
    points = (shape == thing.shape) + (colour == thing.colour) + (size == thing.size)
    return points + (thing.place is not None and shape == thing.shape)


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
    graphdef, params = nnx.split(Judge(rngs=nnx.Rngs(seed)))
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
        reading = nnx.merge(graphdef, params)(images)
        losses = [_cross_entropy(logits, label) for logits, label in zip(reading, truth)]
        return sum(losses), {"accuracy": jnp.mean(accuracy(reading, truth))}

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
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Judge(rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, loop.restore(folder, params))


def read(judge: Judge, images: np.ndarray, batch: int = 64) -> Reading:
    """Reads uint8 [B, 128, 128, 3] of any B in small batches."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *_in_batches(_read, judge, images, batch))


def features(judge: Judge, images: np.ndarray, batch: int = 64) -> np.ndarray:
    """The judge's penultimate layer, float [B, 128], of uint8 [B, 128, 128, 3] in small batches."""
    return np.concatenate(_in_batches(_features, judge, images, batch))


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


@nnx.jit
def _read(judge, images):
    return judge(images)


@nnx.jit
def _features(judge, images):
    return judge.features(images)


def _in_batches(function, judge, images, batch):
    return [function(judge, images[i : i + batch]) for i in range(0, len(images), batch)]


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
