"""What the judge, `models.judge`, reads off a picture, and the fidelity of a picture to its prompt.

share = fidelity(read(judge, images), [captions.parse(prompt) for prompt in prompts])
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cascade_jax.models.judge import Judge, JudgeConfig
from cascade_jax.models.vq import to_float
from cascade_jax.scenes.captions import OFFSETS, Attributes
from cascade_jax.scenes.world import COLOURS, GROUNDS, PIXELS, PLACES, SHAPES, SIZES, SKIES

Array = jax.Array

FEATURES = 128
OF_THINGS = ("shape", "colour", "size", "place")
KINDS = ("ground", "sky", *OF_THINGS)


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


_PER_PLACE = len(PLACES)
_SHAPES = (
    (len(GROUNDS),),
    (len(SKIES),),
    (_PER_PLACE, 1 + len(SHAPES)),
    (_PER_PLACE, len(COLOURS)),
    (_PER_PLACE, len(SIZES)),
)
_WIDTHS = tuple(int(np.prod(shape)) for shape in _SHAPES)


CONFIG = JudgeConfig(PIXELS, FEATURES, sum(_WIDTHS))  # 0.44 M parameters


def reading(logits: Array) -> Reading:
    """The judge's logits [B, outputs] by what they are about."""
    parts = jnp.split(logits, np.cumsum(_WIDTHS)[:-1], axis=-1)
    return Reading(*(part.reshape(len(part), *shape) for part, shape in zip(parts, _SHAPES)))


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


def marks(reading: Reading, attributes: Sequence[Attributes]) -> dict[str, np.ndarray]:
    """What each prompt says, and how much of it the judge reads in its picture: int [B, 2] by KINDS, (right, said).

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
    found = {kind: np.zeros((len(attributes), 2), int) for kind in KINDS}
    for row, said in enumerate(attributes):
        seen = [
            None if shape[row, p] == 0 else (SHAPES[shape[row, p] - 1], COLOURS[colour[row, p]], SIZES[size[row, p]])
            for p in range(_PER_PLACE)
        ]
        found["ground"][row] = GROUNDS[ground[row]] == said.ground, said.ground is not None
        found["sky"][row] = SKIES[sky[row]] == said.sky, said.sky is not None
        things = max(
            ([_points(thing, PLACES[p], seen[p]) for thing, p in zip(said.things, places)]
             for places in itertools.permutations(range(_PER_PLACE), len(said.things))),
            key=lambda points: sum(map(sum, points)),
        )  # fmt: skip
        for i, kind in enumerate(OF_THINGS):
            right = sum(points[i] for points in things)
            found[kind][row] = right, sum(getattr(thing, kind) is not None for thing in said.things)
    return found


def fidelity(reading: Reading, attributes: Sequence[Attributes]) -> np.ndarray:
    """Share of what each prompt says that the judge reads in its picture: float [B], 1 if it reads everything. See
    `marks`."""
    right, said = sum(marks(reading, attributes).values()).T
    return right / said


def _points(thing, place, seen) -> tuple[bool, ...]:
    """What is right of a thing at a place, by OF_THINGS."""
    if seen is None or thing.place not in (None, place):
        return (False,) * len(OF_THINGS)
    shape, colour, size = seen
    right = shape == thing.shape
    return right, colour == thing.colour, size == thing.size, right and thing.place is not None


def read(judge: Judge, images: np.ndarray, batch: int = 64) -> Reading:
    """Reads uint8 [B, 128, 128, 3] of any B in small batches."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *_in_batches(_read, judge, images, batch))


def features(judge: Judge, images: np.ndarray, batch: int = 64) -> np.ndarray:
    """The judge's penultimate layer, float [B, 128], of uint8 [B, 128, 128, 3] in small batches."""
    return np.concatenate(_in_batches(_features, judge, images, batch))


@nnx.jit
def _read(judge, images):
    return reading(judge(to_float(images)))


@nnx.jit
def _features(judge, images):
    return judge.features(to_float(images))


def _in_batches(function, judge, images, batch):
    return [function(judge, images[i : i + batch]) for i in range(0, len(images), batch)]
