import jax
import numpy as np
import pytest
from flax import nnx

from cascade_jax.models.judge import Judge
from cascade_jax.models.vq import to_float
from cascade_jax.recipes import judge as recipe
from cascade_jax.scenes import captions, judge
from cascade_jax.scenes.world import COLOURS, GROUNDS, PLACES, SHAPES, SIZES, SKIES, Scene, Thing

PICTURE = Scene("grass", "cloudy", (Thing("ball", "red", "small", "left"), Thing("cone", "blue", "large", "right")))


def _certain(scenes):
    """A reading that is sure of each scene."""
    truth = judge.targets(np.stack([captions.encode(captions.attributes_of(scene)) for scene in scenes]))
    sizes = (len(GROUNDS), len(SKIES), 1 + len(SHAPES), len(COLOURS), len(SIZES))
    return judge.Reading(*(5.0 * (label[..., None] == np.arange(size)) for label, size in zip(truth, sizes)))


def _fidelity(prompt, scene=PICTURE):
    return judge.fidelity(_certain([scene]), [captions.parse(prompt)])[0]


def test_targets_stand_at_their_places():
    truth = judge.targets(captions.encode(captions.attributes_of(PICTURE))[None])
    assert truth.ground == GROUNDS.index("grass") and truth.sky == SKIES.index("cloudy")
    np.testing.assert_array_equal(truth.shape[0], [1 + SHAPES.index("ball"), 0, 1 + SHAPES.index("cone")])
    np.testing.assert_array_equal(truth.colour[0], [COLOURS.index("red"), -1, COLOURS.index("blue")])
    np.testing.assert_array_equal(truth.size[0], [SIZES.index("small"), -1, SIZES.index("large")])
    assert PLACES == ("left", "middle", "right")


@pytest.mark.parametrize(
    "prompt",
    [
        "a small red ball on the left and a large blue cone on the right, on grass under a cloudy sky",
        "a blue cone and a red ball",
        "a ball",
        "a large cone on grass",
    ],
)
def test_what_is_said_and_seen_counts_fully(prompt):
    assert _fidelity(prompt) == 1


@pytest.mark.parametrize(
    ("prompt", "share"),
    [
        ("a red ball on gravel", 2 / 3),
        ("a green ball on grass", 2 / 3),
        ("a large red ball under a cloudy sky", 3 / 4),
        # Nothing stands in the middle, so none of shape, colour and place can be read there.
        ("a red ball in the middle, on grass", 1 / 4),
        # A red thing stands at the left, but not the thing that was asked for: its place does not count.
        ("a red cube on the left", 1 / 3),
        # Each place holds one thing of the prompt only: the second ball must take the cone's place.
        ("a red ball and a small red ball", 3 / 5),
    ],
)
def test_what_is_said_but_not_seen_is_missing_from_the_share(prompt, share):
    assert _fidelity(prompt) == pytest.approx(share)


def test_things_are_matched_to_whichever_places_fit_best():
    picture = Scene("sand", "clear", (Thing("cube", "red", "small", "middle"), Thing("cube", "blue", "small", "right")))
    assert _fidelity("a blue cube and a red cube", picture) == 1


def test_each_picture_is_held_against_its_own_prompt():
    other = Scene("brick", "sunset", (Thing("cube", "green", "large", "middle"),))
    prompts = [captions.parse("a red ball on grass"), captions.parse("a red ball on brick")]
    np.testing.assert_allclose(judge.fidelity(_certain([PICTURE, other]), prompts), [1, 1 / 3])
    with pytest.raises(ValueError, match="1 prompts for 2 pictures"):
        judge.fidelity(_certain([PICTURE, other]), prompts[:1])


def test_accuracy_of_a_certain_reading_is_one_and_ignores_empty_places():
    reading = _certain([PICTURE])
    truth = judge.targets(captions.encode(captions.attributes_of(PICTURE))[None])
    np.testing.assert_array_equal(judge.accuracy(reading, truth), np.ones(5))
    wrong = reading._replace(colour=np.roll(reading.colour, 1, axis=-1))
    np.testing.assert_array_equal(judge.accuracy(wrong, truth), [1, 1, 1, 0, 1])


def test_the_judge_reads_any_number_of_pictures_in_batches():
    network = Judge(judge.CONFIG, rngs=nnx.Rngs(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network))) < 500_000
    images = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), np.uint8)
    reading = judge.read(network, images, batch=2)
    assert [part.shape for part in reading] == [(3, 4), (3, 3), (3, 3, 4), (3, 3, 6), (3, 3, 2)]
    features = judge.features(network, images, batch=2)
    assert features.shape == (3, judge.FEATURES)
    # Batches of two and of one sum in different orders.
    np.testing.assert_allclose(features, network.features(to_float(images)), atol=1e-5)


def test_worn_pictures_keep_their_shape_and_depend_on_the_generator_alone():
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    for seed in range(6):
        first, second = (recipe.wear(np.random.default_rng(seed), image) for _ in range(2))
        assert first.shape == image.shape and first.dtype == np.uint8
        np.testing.assert_array_equal(first, second)


def test_marks_tell_what_is_said_and_right_by_kind():
    marks = judge.marks(_certain([PICTURE]), [captions.parse("a small red cone on the left and a blue cone, on sand")])
    found = {kind: tuple(own[0]) for kind, own in marks.items()}
    # The first is looked for at the left, where a small red ball stands; the second is at the right.
    assert found == {
        "ground": (0, 1),
        "sky": (0, 0),
        "shape": (1, 2),
        "colour": (2, 2),
        "size": (1, 1),
        "place": (0, 1),
    }
