"""The controlled world: what a scene is, and how one is drawn at random.

A scene is one or two simple things on a ground under a sky.

    rng = np.random.default_rng(0)
    picture = render.render(sample_scene(rng), rng)  # uint8 [128, 128, 3]
"""

import dataclasses

import numpy as np

SHAPES = ("ball", "cube", "cone")
COLOURS = ("red", "yellow", "green", "blue", "purple", "white")
SIZES = ("small", "large")
PLACES = ("left", "middle", "right")
GROUNDS = ("grass", "gravel", "brick", "sand")
SKIES = ("clear", "cloudy", "sunset")

PIXELS = 128


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object: members of SHAPES, COLOURS, SIZES and PLACES. None stands for "not said" in a caption."""

    shape: str
    colour: str | None = None
    size: str | None = None
    place: str | None = None


@dataclasses.dataclass(frozen=True)
class Scene:
    """A ground, a sky and one or two things. None stands for "not said" in a caption."""

    ground: str | None
    sky: str | None
    things: tuple[Thing, ...]


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draws a complete scene: one thing (60 %) or two.

    Two things differ in shape or colour and stand at different places. Two large ones stand left and right, because
    neighbouring places are too close for them.
    """
    count = 1 if rng.random() < 0.6 else 2
    places = rng.permutation(PLACES)
    sizes = rng.choice(SIZES, count)
    if count == 2 and (sizes == "large").all():
        places = rng.permutation(["left", "right"])
    looks = rng.choice(len(SHAPES) * len(COLOURS), count, replace=False)
    things = tuple(
        Thing(SHAPES[look // len(COLOURS)], COLOURS[look % len(COLOURS)], str(size), str(place))
        for look, size, place in zip(looks, sizes, places)
    )
    return Scene(str(rng.choice(GROUNDS)), str(rng.choice(SKIES)), things)
