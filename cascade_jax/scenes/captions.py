"""Captions: attributes in words, words back to attributes, attributes to the ids that condition the model.

    attributes = parse("a small red ball on gravel under a cloudy sky")
    ids = encode(attributes)  # int32 [10], one id for each of SLOTS
    conditions = features(table, ids)  # [7, d], from a model's table of caption features

A caption may leave anything but the shapes unsaid. It names all things there are: one thing named means exactly one.
The things of attributes stand in canonical order: left to right if both places are known, otherwise as mentioned.
"""

import dataclasses
import functools
import re
import string
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from cascade_jax.scenes.world import COLOURS, GROUNDS, PLACES, SHAPES, SIZES, SKIES, Scene, Thing

# What a caption says of a scene: a scene in which None stands for "not said".
Attributes = Scene

_THING_VALUES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "place": PLACES}
_VALUES = {"ground": GROUNDS, "sky": SKIES} | {
    f"{name}{number}": values for number in (1, 2) for name, values in _THING_VALUES.items()
}
SLOTS = tuple(_VALUES)
# Every slot owns the ids [offset, offset + 1 + its number of values): "not said" first, then its values.
OFFSETS = dict(zip(SLOTS, np.cumsum([0] + [1 + len(values) for values in _VALUES.values()]).tolist()))
NUM_IDS = sum(1 + len(values) for values in _VALUES.values())

# What the model is conditioned on: a slot for the ground, the sky, each place of a thing, and each thing without a
# place. The slot of a place tells the shape, colour and size of what is there, in three rows of a table. Every kind
# has rows for its values; the one before them stands for "not said" (of a shape: there may be a thing here), the one
# behind them for "there is nothing here".
CONDITION_SLOTS = 2 + len(PLACES) + 2
_KINDS = {"shape": SHAPES, "colour": COLOURS, "size": SIZES}
_SETTING_ROWS = 1 + len(GROUNDS) + 1 + len(SKIES)
_FIRST_ROWS = _SETTING_ROWS + np.cumsum([0] + [len(values) + 2 for values in _KINDS.values()])
NUM_CONDITIONS = int(_FIRST_ROWS[-1])


class UnknownWords(ValueError):
    """A caption holds words that the world of scenes has no meaning for."""

    def __init__(self, words):
        self.words = tuple(words)
        known = (("things", SHAPES), ("colours", COLOURS), ("sizes", SIZES), ("places", PLACES))
        known += (("grounds", GROUNDS), ("skies", SKIES))
        listing = "; ".join(f"{name}: {', '.join(values)}" for name, values in known)
        super().__init__(f"unknown word{'s' * (len(self.words) > 1)} {', '.join(self.words)}. Known {listing}")


def attributes_of(scene: Scene) -> Attributes:
    """Everything there is to say of a complete scene, in canonical order."""
    return _canonical(scene)


def encode(attributes: Attributes) -> np.ndarray:
    """The condition ids int32 [10], one for each of SLOTS, each below NUM_IDS.

    A slot's id is its offset when nothing is said of it, otherwise 1 + the offset + the value's index. The four slots
    of the second thing all say nothing when there is one thing.

    Raises:
      ValueError: if there are no things or more than two, or if a value is not of the world.
    """
    if not 1 <= len(attributes.things) <= 2:
        raise ValueError(f"a scene holds one or two things, not {len(attributes.things)}")
    said = {"ground": attributes.ground, "sky": attributes.sky}
    for number, thing in enumerate(_canonical(attributes).things, 1):
        said |= {f"{name}{number}": getattr(thing, name) for name in _THING_VALUES}
    for slot, value in said.items():
        if value not in (None, *_VALUES[slot]):
            raise ValueError(f"{slot} cannot be {value!r}: choose from {', '.join(_VALUES[slot])}")
    ids = [
        OFFSETS[slot] + (0 if said.get(slot) is None else 1 + values.index(said[slot]))
        for slot, values in _VALUES.items()
    ]
    return np.array(ids, np.int32)


def placed(attributes: Attributes) -> Attributes:
    """The attributes with a place for every thing; one that is left open depends on what else is said, and on nothing
    else. A small model that may choose the place of a thing while it draws likes to choose twice."""
    seed = zlib.crc32(repr(dataclasses.astuple(attributes)).encode())
    free = [place for place in PLACES if place not in [thing.place for thing in attributes.things]]
    free = iter(np.random.default_rng(seed).permutation(free).tolist())
    things = [thing if thing.place else dataclasses.replace(thing, place=next(free)) for thing in attributes.things]
    return _canonical(dataclasses.replace(attributes, things=tuple(things)))


def condition_ids(ids: jax.Array) -> jax.Array:
    """The rows [..., CONDITION_SLOTS, 3] of the model's table of caption features, given `encode`'s ids [..., 10]."""
    said = {slot: ids[..., i] - OFFSETS[slot] for i, slot in enumerate(SLOTS)}  # 0: not said
    first = _FIRST_ROWS[:-1]
    unknown, nothing = jnp.asarray(first), jnp.asarray(_FIRST_ROWS[1:] - 1)
    things = []
    for number in (1, 2):
        rows = first + jnp.stack([said[f"{kind}{number}"] for kind in _KINDS], axis=-1)
        things.append((rows, said[f"shape{number}"] > 0, said[f"place{number}"]))
    anywhere = functools.reduce(jnp.logical_or, [there & (place == 0) for _, there, place in things])

    slots = [jnp.stack([row] * 3, axis=-1) for row in (said["ground"], 1 + len(GROUNDS) + said["sky"])]
    for number in range(1, 1 + len(PLACES)):
        slot = jnp.where(anywhere[..., None], unknown, nothing)
        for rows, there, place in things:
            slot = jnp.where((there & (place == number))[..., None], rows, slot)
        slots.append(slot)
    slots += [jnp.where((there & (place == 0))[..., None], rows, nothing) for rows, there, place in things]
    return jnp.stack(slots, axis=-2)


def features(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Caption features [..., C, d] of `encode`'s ids [..., 10], from a model's table [rows, d]: slots' means."""
    return table[condition_ids(ids)].mean(-2)


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """An English caption of a scene, which leaves some attributes unsaid and varies in wording and order."""
    return _word(_mention(scene, rng), rng)


def _canonical(attributes):
    places = [thing.place for thing in attributes.things]
    if len(places) < 2 or None in places:
        return attributes
    things = sorted(attributes.things, key=lambda thing: PLACES.index(thing.place))
    return dataclasses.replace(attributes, things=tuple(things))


def _mention(scene, rng):
    """Chooses what a caption says of a scene and in which order it names the things."""

    def keep(value, probability):
        return value if rng.random() < probability else None

    things = [
        Thing(thing.shape, keep(thing.colour, 0.9), keep(thing.size, 0.7), keep(thing.place, 0.7))
        for thing in scene.things
    ]
    order = rng.permutation(len(things))
    return Attributes(keep(scene.ground, 0.9), keep(scene.sky, 0.8), tuple(things[i] for i in order))


_PLACE_PHRASES = {
    "left": ("on the left", "at the left", "on the left side"),
    "middle": ("in the middle", "in the centre"),
    "right": ("on the right", "at the right", "on the right side"),
}
_GROUND_PHRASES = {
    "grass": ("grass", "the grass", "a lawn"),
    "gravel": ("gravel", "the gravel", "pebbles"),
    "brick": ("brick", "the bricks", "a brick floor"),
    "sand": ("sand", "the sand", "a beach"),
}
_SKY_PHRASES = {
    "clear": ("under a clear sky", "beneath a clear blue sky", "on a sunny day"),
    "cloudy": ("under a cloudy sky", "beneath an overcast sky", "on a cloudy day"),
    "sunset": ("at sunset", "at dusk", "under a sunset sky"),
}


def _word(attributes, rng):
    """Words attributes; `parse` returns them in canonical order."""

    def pick(phrases):
        return phrases[rng.integers(len(phrases))]

    def noun_phrase(thing):
        words = " ".join(filter(None, (thing.size, thing.colour, thing.shape)))
        return f"a {words}"

    names = [noun_phrase(thing) for thing in attributes.things]
    places = [thing.place and pick(_PLACE_PHRASES[thing.place]) for thing in attributes.things]
    ground = attributes.ground and pick(_GROUND_PHRASES[attributes.ground])
    sky = attributes.sky and pick(_SKY_PHRASES[attributes.sky])

    if ground and rng.random() < 0.2:
        opening = f"{ground} with "
    elif ground and rng.random() < 0.25:
        opening = f"on {ground} {sky}, " if sky and rng.random() < 0.5 else f"on {ground}, "
    elif sky and rng.random() < 0.25:
        opening = f"{sky}, "
    else:
        opening = ""

    places_first = all(places) and not opening.endswith("with ") and rng.random() < 0.25
    if places_first:
        things = ", and ".join(f"{place}, {name}" for name, place in zip(names, places))
    else:
        things = pick((" and ", " and ", " next to ")).join(
            f"{name} {place}" if place else name for name, place in zip(names, places)
        )
    caption = opening + things
    if ground and ground not in opening:
        verb = pick(("sits", "stands", "lies") if len(names) == 1 else ("sit", "stand", "lie"))
        plain = not any(places) or places_first
        caption += (
            pick((" on ", " on ", f" {verb} on ") if plain and " next to " not in things else (", on ",)) + ground
        )
    if sky and sky not in opening:
        caption += f" {sky}"
    return caption


def parse(text: str) -> Attributes:
    """Reads a caption: attributes in canonical order.

    An adjective describes the noun that follows it ("a red ball") or, after "is", the noun before it ("the ball is
    red"). A place belongs to the thing before it, unless that has one or "and" and the like stand between; then it
    belongs to the next thing ("on the left, a red ball, and on the right, a cone").

    Raises:
      UnknownWords: names every word that has no meaning here.
      ValueError: if the text is empty, names no thing or more than two, or contradicts itself.
    """
    words = re.findall(r"[\w']+|[^\w\s]", text.lower().replace("’", "'").replace("_", " "))
    words = [word.strip("'") for word in words]
    words = [word for word in words if word in _LEXICON or word not in string.punctuation]
    if not words:
        raise ValueError("the caption is empty: name a thing, such as 'a small red ball on gravel'")
    unknown = dict.fromkeys(word for word in words if word not in _LEXICON)
    if unknown:
        raise UnknownWords(unknown)
    return _read([_LEXICON[word] for word in words])


def _lexicon():
    """Every known word's (kind, value)."""
    table = {
        ("shape", "ball"): "ball sphere orb globe",
        ("shape", "cube"): "cube box block",
        ("shape", "cone"): "cone",
        ("shapes", "ball"): "balls spheres orbs globes",
        ("shapes", "cube"): "cubes boxes blocks",
        ("shapes", "cone"): "cones",
        ("colour", "red"): "red scarlet crimson",
        ("colour", "yellow"): "yellow golden",
        ("colour", "green"): "green",
        ("colour", "blue"): "blue",
        ("colour", "purple"): "purple violet",
        ("colour", "white"): "white",
        # Colours of skies and gravel only.
        ("colour", "orange"): "orange",
        ("colour", "pink"): "pink",
        ("colour", "grey"): "grey gray",
        ("size", "small"): "small little tiny",
        ("size", "large"): "large big huge giant",
        ("place", "left"): "left lefthand",
        ("place", "middle"): "middle center centre",
        ("place", "right"): "right righthand",
        ("ground", "grass"): "grass grassy lawn meadow",
        ("ground", "gravel"): "gravel pebbles pebble stones",
        ("ground", "brick"): "brick bricks",
        ("ground", "sand"): "sand sandy beach desert",
        ("weather", "clear"): "clear sunny cloudless",
        ("weather", "cloudy"): "cloudy overcast",
        ("sky", "cloudy"): "clouds",
        ("sky", "sunset"): "sunset dusk sundown evening",
        ("sky", None): "sky skies",
        ("count", 2): "two 2 pair",
        ("count", 3): "three 3",
        ("count", 4): "four 4",
        ("article", None): "a an the another",
        ("one", None): "one",
        ("is", None): "is are",
        ("there", None): "there",
        ("adverb", None): "very bright",
        ("of", None): "of",
        ("frame", None): "picture image photo photograph scene view frame ground floor surface day weather",
        ("break", None): "and with while ; . : next beside near plus",
        ("comma", None): ",",
        ("side", None): "side hand",
        ("", None): "on in at under beneath below by to from upon onto over there's that which it far sits sit sitting "
        "stands stand standing lies lie lying rests rest resting placed shows showing has having",
    }
    return {word: meaning for meaning, words in table.items() for word in words.split()}


_LEXICON = _lexicon()

_USUAL_COLOURS = {"grass": ("green",), "gravel": ("grey", "white"), "brick": ("red",), "sand": ("yellow", "white")}
_COLOURED_SKIES = {"blue": "clear", "grey": "cloudy", "white": "cloudy"}
_COLOURED_SKIES |= dict.fromkeys(("orange", "red", "pink", "purple", "yellow"), "sunset")


def _read(tokens):
    """Binds the tokens of a caption, (kind, value) each, to nouns."""
    # The setting's "hint" is the sky that its colour suggests; a thing's is the place that "left of" leaves for it.
    setting, things, adjectives = {}, [], []  # adjectives were said, and wait for their noun
    noun = None  # the last noun: a thing's dict, or the (kind, value) of a ground or sky
    ahead = opposite = None  # a place that waits for its thing; the place that "left of" leaves for the next thing
    count, after_is, apart, comma = 1, False, False, False

    def add_things(shape, number):
        nonlocal noun, ahead, opposite, apart
        for _ in range(number):
            noun = {"shape": shape}
            things.append(noun)
            for adjective in adjectives:
                _adjoin(setting, noun, *adjective)
        if opposite:
            noun["hint"], opposite = opposite, None
        elif ahead:
            noun["place"], ahead = ahead, None
        adjectives.clear()
        apart = False

    kinds = [kind for kind, _ in tokens]
    for i, (kind, value) in enumerate(tokens):
        following = next((k for k in kinds[i + 1 :] if k != "side"), None)
        match kind:
            case "colour" | "size" if after_is and noun:
                _adjoin(setting, noun, kind, value)
            case "colour" | "size":
                adjectives.append((kind, value))
            case "shape" | "shapes":
                add_things(value, max(count, 2 if kind == "shapes" else 1))
                count = 1
            case "one" if adjectives and things:
                add_things(things[-1]["shape"], 1)
            case "ground" | "sky":
                if value:
                    _set(setting, kind, value, f"the {kind}")
                noun, opposite = (kind, value), None
                for adjective in adjectives:
                    _adjoin(setting, noun, *adjective)
                adjectives.clear()
            case "weather":
                _set(setting, "sky", value, "the sky")
            case "place":
                fronted = comma and following in ("article", "colour", "size", "shape")
                if not things or "place" in things[-1] or apart or fronted:
                    if ahead:
                        raise ValueError(f"{ahead} and {value} follow each other: name a thing at each place")
                    ahead = value
                else:
                    things[-1]["place"] = value
                if following == "of":
                    opposite = {"left": "right", "right": "left"}.get(value)
            case "count":
                count = value
            case "frame":
                opposite = None
            case "break":
                apart = True
        says_is = kind == "is" and kinds[max(i - 1, 0)] != "there"
        after_is = says_is or (after_is and kind in ("colour", "size", "weather", "break", "comma", "adverb"))
        comma = kind == "comma" or (comma and kind in ("", "article"))

    return _finish(setting, things, adjectives, ahead)


def _set(target, kind, value, name):
    """Says one thing of a noun, once."""
    if kind == "colour" and target.get("shape") and value not in COLOURS:
        raise UnknownWords([value])
    if target.setdefault(kind, value) != value:
        raise ValueError(f"{name} cannot be both {target[kind]} and {value}")


def _adjoin(setting, noun, kind, value):
    """Says an adjective of the last noun: a thing's dict, or (kind, value) of a ground or sky."""
    if isinstance(noun, dict):
        _set(noun, kind, value, f"a {noun['shape']}")
    elif noun[0] == "sky" and value in _COLOURED_SKIES:
        _set(setting, "hint", _COLOURED_SKIES[value], "the sky")
    elif value not in _USUAL_COLOURS.get(noun[1], ()):
        raise ValueError(f"{noun[1] or noun[0]} cannot be {value} here: say it of a thing, as in 'a {value} ball'")


def _finish(setting, things, adjectives, ahead):
    if not things:
        raise ValueError(f"the caption names no thing: name a {', a '.join(SHAPES[:-1])} or a {SHAPES[-1]}")
    if len(things) > 2:
        raise ValueError(f"a scene holds at most two things, and the caption names {len(things)}")
    loose = [value for _, value in adjectives] + [ahead] * bool(ahead)
    if loose:
        raise ValueError(f"{', '.join(loose)}: it is not clear of which thing; say it before its name")
    for thing in things:
        hint = thing.pop("hint", None)
        thing.setdefault("place", hint)
    places = [thing["place"] for thing in things]
    if len(things) == 2 and places[0] and places[0] == places[1]:
        raise ValueError(f"two things cannot both be at the place {places[0]}: give them different places")
    sky = setting.get("sky", setting.get("hint"))
    return _canonical(Attributes(setting.get("ground"), sky, tuple(Thing(**thing) for thing in things)))
