"""What Python users hand over: keys of every kind, prompts, settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

import cascade_jax as cj
from cascade_jax import pipeline

PROMPTS = ["a red ball on gravel", "a small blue cube on the left, on grass"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cj.load(small.write_bundle(tmp_path_factory.mktemp("pipeline") / "model"))


def tokens(model, key, prompts=PROMPTS, **settings):
    return pipeline.draw_tokens(model, prompts, key, tree=cj.trees.ROOT, **settings)[0]


@pytest.mark.parametrize("key", [3, np.int64(3), jax.random.PRNGKey(3), np.asarray(jax.random.PRNGKey(3))], ids=str)
def test_a_seed_and_keys_of_the_older_kind_draw_as_the_key_does(model, key):
    np.testing.assert_array_equal(tokens(model, key), tokens(model, jax.random.key(3)))


def test_keys_of_the_older_kind_may_be_one_for_every_picture(model):
    """Two numbers are one key, not two."""
    keys = jax.random.split(jax.random.key(5), 2)
    np.testing.assert_array_equal(tokens(model, jax.random.key_data(keys)), tokens(model, keys))


@pytest.mark.parametrize("key", [None, 0.5, "seed", True, jnp.zeros(2), jnp.zeros(3, jnp.uint32)], ids=str)
def test_what_is_no_key_is_told_what_one_is(model, key):
    with pytest.raises(TypeError, match=r"key is jax\.random\.key\(SEED\)"):
        tokens(model, key)


def test_keys_of_another_number_than_prompts_are_refused(model):
    with pytest.raises(ValueError, match=r"2 prompts need one key or 2, not keys of shape \(3,\)"):
        tokens(model, jax.random.split(jax.random.key(0), 3))


@pytest.mark.parametrize("draw", [cj.generate, lambda m, p, key: cj.score(m, p, np.zeros((1, 16), np.int32))])
@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ("a red ball on gravel", TypeError, "prompts are a list"),
        (cj.Prompt(features=np.zeros((3, 8))), TypeError, "prompts are a list"),
        ([7], TypeError, "a prompt is a text or a cascade_jax.Prompt, not 7"),
        ([], ValueError, "there is no prompt"),
        (["  "], ValueError, "the prompt is empty"),
    ],
)
def test_what_is_no_list_of_prompts_is_told_what_is_wrong(model, draw, prompts, error, message):
    with pytest.raises(error, match=message):
        draw(model, prompts, key=jax.random.key(0))


def test_a_top_k_beyond_every_vocabulary_draws_from_all_tokens(model):
    many = tokens(model, 0, sampling=cj.Sampling(top_k=2**40))
    np.testing.assert_array_equal(many, tokens(model, 0, sampling=cj.Sampling(top_k=64)))
