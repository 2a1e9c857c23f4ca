"""Chameleon against `transformers`, and Lumina-mGPT's and Anole's ways of drawing with it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import torch
from flax import nnx
from transformers import LogitsProcessor, LogitsProcessorList

from cascade_jax import bundle
from cascade_jax import tree as trees
from cascade_jax.models import chameleon
from cascade_jax.models.chameleon import Chameleon, ChameleonConfig
from cascade_jax.models.prompt import Prompt
from cascade_jax.sampling import Sampling
from checkpoints_convert.chameleon import LUMINA
from checkpoints_convert.formats import Known

VOCABULARY = oracles.chameleon_vocabulary()
TURN = VOCABULARY["<reserved08706>"]
PROMPTS = [Prompt(ids=np.array([0, 100, 120, 101, 102, TURN])), Prompt(ids=np.array([0, 111, TURN]))]
GREEDY = Sampling(temperature=0.0, guidance=3.0)
TREE = trees.parse("0 1 00 10")
FP32 = dict(rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def reference():
    return oracles.chameleon()


@pytest.fixture(scope="module")
def saved(reference, tmp_path_factory):
    return oracles.save(reference, tmp_path_factory.mktemp("hub") / "Lumina-mGPT-7B-64", VOCABULARY)


@pytest.fixture(scope="module")
def lumina(saved) -> Chameleon:
    return oracles.module(LUMINA.formats[0], saved, Known({}, pixels=64))


def random_tokens(config: ChameleonConfig, rows: int) -> np.ndarray:
    """Codes where the layout leaves the choice, its marks elsewhere."""
    drawn = np.random.default_rng(3).integers(0, config.codebook_size, (rows, config.length))
    forced = np.array(config.layout.forced) if config.layout else np.full(config.length, -1)
    return np.where(forced < 0, drawn, forced)


def text_ids(model: Chameleon, prefix_ids: np.ndarray, tokens: np.ndarray) -> list[int]:
    return [*map(int, prefix_ids), *map(int, model.table_row(jnp.asarray(tokens)))]


def reference_features(reference, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return reference.model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()


def reference_logits(reference, model: Chameleon, features: np.ndarray) -> np.ndarray:
    """Of the codes, in their order. `ChameleonForConditionalGeneration` hides them, so the head is applied here."""
    return features @ reference.lm_head.weight.detach().numpy()[np.asarray(model.code_ids[...])].T


def prefix_rows(config: ChameleonConfig) -> list[np.ndarray]:
    rows = config.stack(PROMPTS)
    return [ids[:length] for ids, length in zip(rows.ids, rows.length)]


def test_teacher_forced_features_and_logits_are_those_of_transformers(reference, lumina):
    """Both branches of two prompts: four prefixes of three lengths."""
    config = lumina.config
    prefix, tokens = oracles.prefix(lumina, PROMPTS, True), random_tokens(config, 4)
    features, logits = oracles.scored(lumina, prefix, tokens)
    assert logits.dtype == jnp.float32 and logits.shape == (4, 21, 64)
    for row, ids in enumerate(prefix_rows(config)):
        want = reference_features(reference, text_ids(lumina, ids, tokens[row]))[len(ids) - 1 : -1]
        np.testing.assert_allclose(features[row], want, **FP32)
        np.testing.assert_allclose(logits[row], reference_logits(reference, lumina, want), **FP32)


def test_step_by_step_and_through_a_tree_features_are_those_of_transformers(reference, lumina):
    config = lumina.config
    prefix, tokens = oracles.prefix(lumina, PROMPTS, True), random_tokens(config, 4)[:, :6]
    nodes = np.random.default_rng(4).integers(0, config.codebook_size + 1, (4, TREE.num_nodes))
    stepped, branched = oracles.fed_through_cache(lumina, prefix, tokens, TREE, nodes)
    for row, ids in enumerate(prefix_rows(config)):
        given = text_ids(lumina, ids, tokens[row])
        want = reference_features(reference, given)[len(ids) - 1 :]
        np.testing.assert_allclose(stepped[row], want, **FP32)
        for node in range(TREE.num_nodes):
            path = np.flatnonzero(TREE.topology.ancestors[node])
            want = reference_features(reference, text_ids(lumina, np.array(given), nodes[row][path]))[-1]
            np.testing.assert_allclose(branched[row, node], want, **FP32)


def test_bfloat16_stays_within_its_rounding(reference, saved):
    """Weights and activations are rounded to 8 bits, 0.4 % each; over two layers that moves logits with a spread of
    about 1 by a few hundredths."""
    model = oracles.module(LUMINA.formats[0], saved, Known({}, pixels=64), jnp.bfloat16)
    config = model.config
    prefix, tokens = oracles.prefix(model, PROMPTS, False), random_tokens(config, 2)
    features, logits = oracles.scored(model, prefix, tokens)
    assert features.dtype == jnp.bfloat16
    for row, ids in enumerate(prefix_rows(config)[:2]):
        want = reference_features(reference, text_ids(model, ids, tokens[row]))[len(ids) - 1 : -1]
        want = reference_logits(reference, model, want)
        assert 0.5 < want.std() < 3
        np.testing.assert_allclose(logits[row], want, atol=0.1)


class Layout(LogitsProcessor):
    """Lumina-mGPT's marks and nothing but codes elsewhere, in text tokens."""

    def __init__(self, model: Chameleon, start: int):
        self.model, self.start = model, start

    def __call__(self, ids, scores):
        layout, position = self.model.config.layout, ids.shape[1] - self.start
        forced = layout.forced[position] if layout else -1
        allowed = np.asarray(self.model.code_ids[...]) if forced < 0 else [int(self.model.table_row(forced))]
        masked = torch.full_like(scores, -torch.inf)
        masked[:, allowed] = scores[:, allowed]
        return masked


def reference_greedy(reference, model: Chameleon, conditional, unconditional) -> np.ndarray:
    """`generate` with guidance; the codes that it hides from text are let through."""
    mapping = reference.model.vocabulary_mapping
    mapping.__dict__["image_tokens"] = []
    try:
        out = reference.generate(
            torch.tensor([conditional.tolist()]),
            max_new_tokens=model.config.length,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=1,
            guidance_scale=3.0,
            negative_prompt_ids=torch.tensor([unconditional.tolist()]),
            logits_processor=LogitsProcessorList([Layout(model, len(conditional))]),
        )[0, len(conditional) :].numpy()
    finally:
        del mapping.__dict__["image_tokens"]
    every = np.asarray(model.table_row(jnp.arange(model.config.codebook_size + len(model.config.marks))))
    return np.argmax(every == out[:, None], axis=1)


def test_greedy_tokens_are_those_of_transformers_generate_with_guidance(reference, lumina):
    rows = prefix_rows(lumina.config)
    alone, speculative = (
        oracles.drawn(lumina, PROMPTS, trees.ROOT, GREEDY),
        oracles.drawn(lumina, PROMPTS, TREE, GREEDY),
    )
    for row in range(2):
        want = reference_greedy(reference, lumina, rows[row], rows[row + 2])
        np.testing.assert_array_equal(alone.tokens[row, :21], want)
        np.testing.assert_array_equal(speculative.tokens[row, :21], want)
    np.testing.assert_array_equal(alone.tokens[:, 4:20:5], 64)
    np.testing.assert_array_equal(alone.tokens[:, 20], 65)
    assert np.all(speculative.stats.accepted > 0)


def test_anole_draws_codes_alone(reference, lumina):
    config = dataclasses.replace(lumina.config, style="anole")
    anole = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: Chameleon(config, rngs=nnx.Rngs(0)))), nnx.state(lumina))
    rows = prefix_rows(config)
    assert rows[0].tolist() == [*PROMPTS[0].ids, config.image_start] and rows[2].tolist() == [0, config.image_start]
    alone = oracles.drawn(anole, PROMPTS, trees.ROOT, GREEDY)
    np.testing.assert_array_equal(alone.tokens[1, :16], reference_greedy(reference, anole, rows[1], rows[3]))


# Prompts and layouts.


def test_lumina_announces_the_size_and_ends_every_row():
    config = chameleon.preset("lumina-mgpt-7b-768")
    assert config.opening == (8197, 8828, 8828)
    assert len(config.opening) + config.length == 2356
    forced = np.array(config.layout.forced)
    assert forced[48] == forced[97] == 8192 and forced[-1] == 8193
    assert np.sum(forced < 0) == 48 * 48
    heard = []
    prompt = config.read(lambda text: heard.append(text) or [5, 6], "a red ball")
    assert heard == ["Generate an image of 768x768 according to the following prompt:\na red ball"]
    assert prompt.ids.tolist() == [0, 5, 6, 8710]
    tokens = np.where(forced < 0, np.cumsum(forced < 0) - 1, forced)[None]
    np.testing.assert_array_equal(config.codes(tokens)[0], np.arange(48 * 48).reshape(48, 48))


def test_anole_reads_the_caption_as_it_is():
    config = chameleon.preset("anole-7b")
    assert config.layout is None and config.length == 1024
    assert config.read(lambda text: [len(text)], "a red ball").ids.tolist() == [0, 10, 8710]


def test_a_prompt_that_is_already_opened_is_left_alone():
    config = chameleon.preset("lumina-mgpt-7b-768")
    opened = Prompt(ids=np.array([0, 5, 8710, *config.opening]))
    padded = Prompt(ids=np.array([1, 0, 5, 8710]), mask=np.array([False, True, True, True]))
    rows = config.stack([opened, padded])
    np.testing.assert_array_equal(rows.ids[0], rows.ids[1])
    assert rows.length.tolist() == [6, 6, 3, 3]
    with pytest.raises(ValueError, match="text tokens"):
        config.stack([Prompt(features=np.zeros((3, 4)))])


def test_codes_are_told_by_their_tokens_names():
    ids = chameleon.code_ids(VOCABULARY)
    assert ids[0] == VOCABULARY["IMGIMGAZ"] and ids[63] == VOCABULARY["IMGIMGGDZ"]
    with pytest.raises(ValueError, match="63 found"):
        chameleon.code_ids({name: i for name, i in VOCABULARY.items() if name != "IMGIMGFZ"})


def test_unusable_configurations_are_refused():
    with pytest.raises(ValueError, match="32 pixels"):
        ChameleonConfig(dim=32, layers=1, heads=2, ffn_dim=16, rows=3)
    with pytest.raises(ValueError, match="style"):
        ChameleonConfig(dim=32, layers=1, heads=2, ffn_dim=16, style="dall-e")
    with pytest.raises(ValueError, match="anole-7b"):
        chameleon.preset("8b")


# Full size.


def test_the_published_models_have_the_published_number_of_parameters():
    """Chameleon-7B's language model has 7,013,666,816; of its head's 65,536 rows the 8,192 of image tokens are kept."""
    shapes = bundle.shapes("target", chameleon.preset("lumina-mgpt-7b-768"))
    assert shapes.pop("code_ids") == (8192,)
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    assert count + (65536 - 8192) * 4096 == 7_013_666_816
