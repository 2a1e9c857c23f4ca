import dataclasses
import itertools

import numpy as np
import pytest

from cascade_jax.scenes import captions, render, world
from cascade_jax.scenes.captions import Attributes, UnknownWords, attributes_of, describe, encode, parse
from cascade_jax.scenes.world import Scene, Thing, sample_scene


def _footprint(thing, scene, seed):
    """The pixels that change when only this thing's colour does: where it is visible."""
    recoloured = dataclasses.replace(thing, colour="white" if thing.colour != "white" else "blue")
    other = dataclasses.replace(scene, things=tuple(recoloured if t is thing else t for t in scene.things))
    before, after = (render.render(s, np.random.default_rng(seed)).astype(int) for s in (scene, other))
    return abs(before - after).max(-1) > 12


def test_sampled_scenes_belong_to_the_world():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(1000)]
    assert 0.55 < np.mean([len(scene.things) == 1 for scene in scenes]) < 0.65
    for scene in scenes:
        assert scene.ground in world.GROUNDS and scene.sky in world.SKIES
        for thing in scene.things:
            assert thing.shape in world.SHAPES and thing.colour in world.COLOURS
            assert thing.size in world.SIZES and thing.place in world.PLACES
        if len(scene.things) == 2:
            first, second = scene.things
            assert first.place != second.place
            assert (first.shape, first.colour) != (second.shape, second.colour)
            if first.size == second.size == "large":
                assert "middle" not in (first.place, second.place)


def test_same_generator_state_gives_the_same_picture():
    scene = sample_scene(np.random.default_rng(1))
    first, again, other = (render.render(scene, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first.shape == (128, 128, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("size, least, most", [("small", 24, 39), ("large", 44, 68)])
def test_a_thing_has_its_size_and_stands_at_its_place(shape, size, least, most):
    for (third, place), seed in itertools.product(enumerate(world.PLACES), range(3)):
        thing = Thing(shape, "red", size, place)
        rows, columns = np.nonzero(_footprint(thing, Scene("gravel", "cloudy", (thing,)), seed))
        assert least <= np.ptp(columns) <= most
        assert least <= np.ptp(rows) <= most
        assert third * 128 / 3 < columns.mean() < (third + 1) * 128 / 3


@pytest.mark.parametrize("sky", world.SKIES)
@pytest.mark.parametrize("colour", world.COLOURS)
def test_a_thing_shows_its_colour_under_every_sky(colour, sky):
    def direction(rgb):
        return np.asarray(rgb, float) / np.linalg.norm(rgb, axis=-1, keepdims=True)

    thing = Thing("ball", colour, "large", "middle")
    scene = Scene("sand", sky, (thing,))
    for seed in range(3):
        seen = render.render(scene, np.random.default_rng(seed))[_footprint(thing, scene, seed)].mean(0)
        lit = np.array(list(render._COLOUR_TONES.values())) * render._LAMPS[sky]
        assert world.COLOURS[np.argmax(direction(lit) @ direction(seen))] == colour


def test_two_things_leave_each_other_visible():
    rng = np.random.default_rng(2)
    scenes = [scene for scene in (sample_scene(rng) for _ in range(60)) if len(scene.things) == 2]
    for seed, scene in enumerate(scenes):
        for thing in scene.things:
            alone = _footprint(thing, dataclasses.replace(scene, things=(thing,)), seed).sum()
            assert _footprint(thing, scene, seed).sum() > 0.6 * min(alone, {"small": 500, "large": 1700}[thing.size])


def test_incomplete_scenes_are_not_rendered():
    with pytest.raises(ValueError, match="complete"):
        render.render(Scene("grass", "clear", (Thing("ball", "red"),)), np.random.default_rng(0))


def test_parse_inverts_describe():
    rng = np.random.default_rng(3)
    texts = set()
    for _ in range(2000):
        mentioned = captions._mention(sample_scene(rng), rng)
        text = captions._word(mentioned, rng)
        assert parse(text) == captions._canonical(mentioned), text
        texts.add(text)
    assert len(texts) > 1500


def test_describe_only_says_what_is_so():
    rng = np.random.default_rng(4)
    for _ in range(200):
        scene = sample_scene(rng)
        said = parse(describe(scene, rng))
        assert said.ground in (None, scene.ground) and said.sky in (None, scene.sky)
        assert sorted(t.shape for t in said.things) == sorted(t.shape for t in scene.things)


RED_BALL, BLUE_CUBE = Thing("ball", "red"), Thing("cube", "blue")


def _at(thing, place):
    return dataclasses.replace(thing, place=place)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a small red ball on gravel under a cloudy sky", Scene("gravel", "cloudy", (Thing("ball", "red", "small"),))),
        (
            "a large blue cube on the left and a yellow cone on the right, on grass",
            Scene("grass", None, (Thing("cube", "blue", "large", "left"), Thing("cone", "yellow", None, "right"))),
        ),
        (
            "gravel with a green cone in the middle at sunset",
            Scene("gravel", "sunset", (Thing("cone", "green", None, "middle"),)),
        ),
        ("Under a clear sky, a white ball sits on brick.", Scene("brick", "clear", (Thing("ball", "white"),))),
        (
            "A TINY crimson sphere next to a huge violet box on the lawn, at dusk!",
            Scene("grass", "sunset", (Thing("ball", "red", "small"), Thing("cube", "purple", "large"))),
        ),
        (
            "in the centre of the beach there is a little cone, overcast",
            Scene("sand", "cloudy", (Thing("cone", None, "small", "middle"),)),
        ),
        (
            "there's a red ball on the left-hand side of the picture, on pebbles",
            Scene("gravel", None, (_at(RED_BALL, "left"),)),
        ),
        ("the ball is red and big, the sky is blue", Scene(None, "clear", (Thing("ball", "red", "large"),))),
        ("the ball is red and the cube is blue, on green grass", Scene("grass", None, (RED_BALL, BLUE_CUBE))),
        ("a red ball on red bricks under white clouds", Scene("brick", "cloudy", (RED_BALL,))),
        ("two small balls on sand", Scene("sand", None, (Thing("ball", None, "small"),) * 2)),
        ("a red ball and a blue one on sand", Scene("sand", None, (RED_BALL, Thing("ball", "blue")))),
        ("on the left a red ball, on the right a blue cube", (_at(RED_BALL, "left"), _at(BLUE_CUBE, "right"))),
        ("a red ball and, on the right, a blue cube", (RED_BALL, _at(BLUE_CUBE, "right"))),
        ("a red ball, on the left a blue cube", (RED_BALL, _at(BLUE_CUBE, "left"))),
        ("a red ball, on the left, and a blue cube", (_at(RED_BALL, "left"), BLUE_CUBE)),
        ("a red ball to the left of a blue cube", (_at(RED_BALL, "left"), _at(BLUE_CUBE, "right"))),
        ("to the right of a red ball is a blue cube", (_at(RED_BALL, "left"), _at(BLUE_CUBE, "right"))),
        ("a red ball left of a blue cube in the middle", (_at(RED_BALL, "left"), _at(BLUE_CUBE, "middle"))),
    ],
)
def test_parse_reads_free_wording(text, expected):
    assert parse(text) == (expected if isinstance(expected, Scene) else Attributes(None, None, expected))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "empty"),
        ("  !? ", "empty"),
        ("grass under a clear sky", "names no thing"),
        ("a ball, a cube and a cone", "at most two things.* 3"),
        ("three cones", "at most two things.* 3"),
        ("a red blue ball", "a ball cannot be both red and blue"),
        ("a small large ball", "both small and large"),
        ("a ball on grass and sand", "the ground cannot be both grass and sand"),
        ("a ball under a cloudy sky at sunset", "the sky cannot be both cloudy and sunset"),
        ("a ball on blue grass", "grass cannot be blue"),
        ("a ball on the left and a cube on the left", "two things cannot both be at the place left"),
        ("a ball on the left on the right", "right: it is not clear of which thing"),
        ("a ball on grass, red", "red: it is not clear of which thing"),
        ("a ball ''' cube cube", "at most two things"),
    ],
)
def test_captions_that_make_no_scene_are_refused_in_one_line(text, message):
    with pytest.raises(ValueError, match=message) as refusal:
        parse(text)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("a neon dragon on a\nzebra, neon", ("neon", "dragon", "zebra")),
        ("an orange ball", ("orange",)),
        ("ein Ball 🎈", ("ein", "🎈")),
    ],
)
def test_unknown_words_are_all_named_next_to_the_known_ones(text, words):
    with pytest.raises(UnknownWords) as refusal:
        parse(text)
    assert refusal.value.words == words
    for known in (*words, *world.SHAPES, *world.COLOURS, *world.SIZES, *world.PLACES, *world.GROUNDS, *world.SKIES):
        assert known in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_encode_drops_nothing():
    seen = {}
    rng = np.random.default_rng(5)
    for _ in range(1000):
        attributes = parse(describe(sample_scene(rng), rng))
        ids = encode(attributes)
        assert ids.shape == (len(captions.SLOTS),) and ids.dtype == np.int32
        assert seen.setdefault(tuple(ids), attributes) == attributes
    starts = [captions.OFFSETS[slot] for slot in captions.SLOTS] + [captions.NUM_IDS]
    for ids in seen:
        assert all(low <= i < high for i, low, high in zip(ids, starts, starts[1:]))
    assert {i for ids in seen for i in ids} | {captions.OFFSETS["shape1"]} == set(range(captions.NUM_IDS))


def test_one_thing_leaves_the_second_things_slots_unsaid():
    ids = encode(parse("a red ball on sand"))
    assert dict(zip(captions.SLOTS, ids - list(captions.OFFSETS.values()))) == {
        "ground": 1 + world.GROUNDS.index("sand"),
        "sky": 0,
        "shape1": 1 + world.SHAPES.index("ball"),
        "colour1": 1 + world.COLOURS.index("red"),
        **dict.fromkeys(("size1", "place1", "shape2", "colour2", "size2", "place2"), 0),
    }


def conditions(text):
    return np.asarray(captions.condition_ids(encode(parse(text))))


def test_conditions_lose_nothing():
    rng = np.random.default_rng(6)
    ids = np.stack([encode(parse(describe(sample_scene(rng), rng))) for _ in range(1000)])
    rows = np.asarray(captions.condition_ids(ids))
    assert rows.shape == (1000, captions.CONDITION_SLOTS, 3)
    assert set(np.unique(rows)) == set(range(captions.NUM_CONDITIONS))
    assert len(np.unique(rows, axis=0)) == len(np.unique(ids, axis=0))


def test_a_places_slot_tells_what_is_there_whichever_thing_it_is():
    alone = conditions("a small red ball on the right")
    second = conditions("a cone on the left and a small red ball on the right")
    left, middle, right, *unplaced = alone[2:]
    np.testing.assert_array_equal(right, second[4])
    np.testing.assert_array_equal(middle, left)  # nothing
    for slot in unplaced:
        np.testing.assert_array_equal(slot, left)
    assert not np.any(second[2] == left)
    # without a place the ball has a slot of its own, and may be anywhere
    left, middle, right, first, other = conditions("a small red ball")[2:]
    np.testing.assert_array_equal(first, alone[4])
    np.testing.assert_array_equal(left, right)
    assert not np.any(left == alone[2])
    np.testing.assert_array_equal(other, alone[2])


def test_a_thing_without_a_place_gets_a_free_one_that_depends_on_what_is_said():
    rng = np.random.default_rng(7)
    for _ in range(300):
        said = parse(describe(sample_scene(rng), rng))
        whole = captions.placed(said)
        places = [thing.place for thing in whole.things]
        assert None not in places and len(set(places)) == len(places)
        assert whole == captions.placed(said) == captions.placed(whole)
        assert (whole.ground, whole.sky) == (said.ground, said.sky)
        unplaced = [dataclasses.replace(thing, place=None) for thing in whole.things]
        assert sorted(map(repr, unplaced)) == sorted(repr(dataclasses.replace(t, place=None)) for t in said.things)
        assert {thing for thing in said.things if thing.place} <= set(whole.things)
    chosen = {captions.placed(parse(f"a {size} {colour} ball")).things[0].place for size in world.SIZES for colour in
              world.COLOURS}  # fmt: skip
    assert chosen == set(world.PLACES)


def test_caption_features_are_means_of_rows_of_the_table():
    ids = encode(parse("a red ball on sand"))
    table = np.random.default_rng(0).normal(size=(captions.NUM_CONDITIONS, 2))
    wanted = [table[rows].mean(0) for rows in conditions("a red ball on sand")]
    np.testing.assert_allclose(captions.features(table, ids), wanted)


def test_cover_is_where_the_things_are():
    thing = Thing("ball", "red", "large", "left")
    scene = Scene("grass", "clear", (thing,))
    picture, cover = render.render_and_cover(scene, np.random.default_rng(3))
    np.testing.assert_array_equal(picture, render.render(scene, np.random.default_rng(3)))
    assert cover.min() == 0 and cover.max() == 1
    seen = _footprint(thing, scene, 3)
    assert np.mean(cover[seen] > 0) > 0.99 and np.mean(seen[cover > 0.9]) > 0.9


def test_scenes_that_differ_in_their_things_share_all_else():
    one, other = (
        Scene("gravel", "cloudy", (Thing("ball", colour, "small", place),))
        for colour, place in (("red", "left"), ("white", "right"))
    )
    (first, here), (second, there) = (render.render_and_cover(s, np.random.default_rng(8)) for s in (one, other))
    np.testing.assert_array_equal(first[:40], second[:40])  # the sky
    assert np.mean(np.all(first == second, axis=-1)[(here == 0) & (there == 0)]) > 0.8  # all but the shadows


def test_encode_refuses_what_is_not_of_the_world():
    with pytest.raises(ValueError, match="colour1 cannot be 'pink'"):
        encode(Attributes(None, None, (Thing("ball", "pink"),)))
    with pytest.raises(ValueError, match="one or two things, not 0"):
        encode(Attributes("grass", None, ()))


def test_things_stand_left_to_right_if_both_places_are_known():
    cone, cube = Thing("cone", "red", "small", "right"), Thing("cube", "blue", "large", "left")
    assert attributes_of(Scene("sand", "clear", (cone, cube))).things == (cube, cone)
    assert parse("a cone on the right and a cube").things == (Thing("cone", place="right"), Thing("cube"))
