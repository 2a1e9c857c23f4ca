"""Janus-Pro against `transformers`."""

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import torch

from cascade_jax import bundle
from cascade_jax import tree as trees
from cascade_jax.models import janus
from cascade_jax.models.janus import Janus
from cascade_jax.models.prompt import Prompt
from cascade_jax.models.vq import VQModel
from cascade_jax.sampling import Sampling
from checkpoints_convert.formats import Known
from checkpoints_convert.janus import FAMILY

TARGET, VQ = (layout for layout in FAMILY.formats if "Hugging Face" in layout.name)
PROMPTS = [Prompt(ids=np.array([1, 40, 41, 42, 43, 4])), Prompt(ids=np.array([1, 50, 51]))]
GREEDY = Sampling(temperature=0.0, guidance=5.0)
TREE = trees.parse("0 1 00 10")
FP32 = dict(rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def reference():
    return oracles.janus(seed=4)


@pytest.fixture(scope="module")
def saved(reference, tmp_path_factory):
    return oracles.save(reference, tmp_path_factory.mktemp("hub") / "Janus", oracles.janus_vocabulary())


@pytest.fixture(scope="module")
def vq(saved) -> VQModel:
    return oracles.module(VQ, saved)


@pytest.fixture(scope="module")
def model(saved, vq) -> Janus:
    return oracles.module(TARGET, saved, Known({"vq": vq.config}, pixels=64))


def reference_features(reference, ids: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Of the prompt's last token and of the codes, [1 + T, d]."""
    with torch.no_grad():
        text = reference.get_input_embeddings()(torch.tensor(ids[None].tolist()))
        drawn = reference.prepare_embeddings_for_image_generation(torch.tensor(tokens[None].tolist()))
        features = reference.model.language_model(inputs_embeds=torch.cat([text, drawn], dim=1)).last_hidden_state
    return features[0, len(ids) - 1 :].numpy()


def reference_logits(reference, features: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return reference.model.generation_head(torch.from_numpy(features)).numpy()


def prefix_rows(model: Janus) -> list[np.ndarray]:
    rows = model.config.stack(PROMPTS)
    return [ids[:length] for ids, length in zip(rows.ids, rows.length)]


def random_tokens(rows: int, count: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, oracles.CODES, (rows, count))


def test_teacher_forced_features_and_logits_are_those_of_transformers(reference, model):
    prefix, tokens = oracles.prefix(model, PROMPTS, True), random_tokens(4, 16)
    features, logits = oracles.scored(model, prefix, tokens)
    assert logits.dtype == jnp.float32 and logits.shape == (4, 16, 64)
    for row, ids in enumerate(prefix_rows(model)):
        want = reference_features(reference, ids, tokens[row])[:-1]
        np.testing.assert_allclose(features[row], want, **FP32)
        np.testing.assert_allclose(logits[row], reference_logits(reference, want), **FP32)


def test_step_by_step_and_through_a_tree_features_are_those_of_transformers(reference, model):
    prefix, tokens = oracles.prefix(model, PROMPTS, True), random_tokens(4, 5)
    nodes = np.random.default_rng(4).integers(0, oracles.CODES, (4, TREE.num_nodes))
    stepped, branched = oracles.fed_through_cache(model, prefix, tokens, TREE, nodes)
    for row, ids in enumerate(prefix_rows(model)):
        np.testing.assert_allclose(stepped[row], reference_features(reference, ids, tokens[row]), **FP32)
        for node in range(TREE.num_nodes):
            path = nodes[row][np.flatnonzero(TREE.topology.ancestors[node])]
            want = reference_features(reference, ids, np.concatenate([tokens[row], path]))[-1]
            np.testing.assert_allclose(branched[row, node], want, **FP32)


def test_bfloat16_stays_within_its_rounding(reference, saved, vq):
    """Weights and activations are rounded to 8 bits, 0.4 % each; over two layers and the head that moves logits with a
    spread of about 1 by a few hundredths."""
    model = oracles.module(TARGET, saved, Known({"vq": vq.config}, pixels=64), jnp.bfloat16)
    prefix, tokens = oracles.prefix(model, PROMPTS, False), random_tokens(2, 16)
    features, logits = oracles.scored(model, prefix, tokens)
    assert features.dtype == jnp.bfloat16
    for row, ids in enumerate(prefix_rows(model)[:2]):
        want = reference_logits(reference, reference_features(reference, ids, tokens[row])[:-1])
        np.testing.assert_allclose(logits[row], want, atol=0.1)


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers_generate_with_guidance(reference, model):
    alone, speculative = oracles.drawn(model, PROMPTS, trees.ROOT, GREEDY), oracles.drawn(model, PROMPTS, TREE, GREEDY)
    for row, ids in enumerate(prefix_rows(model)[:2]):
        want = reference.generate(
            torch.tensor([ids.tolist()]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            generation_mode="image",
            do_sample=False,
            guidance_scale=5,
        )[0].numpy()
        np.testing.assert_array_equal(alone.tokens[row, :16], want)
        np.testing.assert_array_equal(speculative.tokens[row, :16], want)
    assert np.all(speculative.stats.accepted > 0)


# The VQ.


def test_codes_latents_and_pixels_are_those_of_transformers(reference, vq):
    rng = np.random.default_rng(2)
    pixels = rng.uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    codes = rng.integers(0, oracles.CODES, (2, 4, 4))
    theirs = reference.model.vqmodel
    with torch.no_grad():
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        latents = theirs.quant_conv(theirs.encoder(images)).permute(0, 2, 3, 1).numpy()
        encoded = theirs.encode(images).image_tokens.reshape(2, 4, 4).numpy()
        decoded = reference.decode_image_tokens(torch.from_numpy(codes.reshape(2, -1))).numpy()
    own = oracles.through_vq(vq, pixels, codes)
    np.testing.assert_allclose(own[0], latents, **FP32)
    np.testing.assert_array_equal(own[1], encoded)
    np.testing.assert_allclose(own[2], decoded, **FP32)


# Prompts.


def test_the_unconditional_branch_keeps_the_ends_of_the_prompt_and_pads_between(model):
    assert [row.tolist() for row in prefix_rows(model)] == [
        [1, 40, 41, 42, 43, 4],
        [1, 50, 51, 4],
        [1, 3, 3, 3, 3, 4],
        [1, 3, 3, 4],
    ]


def test_the_caption_is_put_into_the_published_template():
    heard = []
    prompt = janus.preset("1B").read(lambda text: heard.append(text) or [7], " a red ball ")
    assert heard == ["<|User|>: a red ball\n\n<|Assistant|>:"]
    assert prompt.ids.tolist() == [100000, 7, 100016]


# Full size.


@pytest.mark.parametrize(("size", "language_model"), [("1B", 1_652_656_128), ("7B", 6_910_365_696)])
def test_the_published_models_have_the_published_number_of_parameters(size, language_model):
    """Of the language model all but the text head, [102400, d], is kept."""
    config = janus.preset(size)
    assert config.length == 576
    shapes = bundle.shapes("target", config)
    side = {name: shape for name, shape in shapes.items() if name.split(".")[0] in ("embedding", "aligner", "head")}
    dim = config.dim
    assert side == {
        "embedding": (16384, 8),
        "aligner.fc1.kernel": (8, dim),
        "aligner.fc1.bias": (dim,),
        "aligner.fc2.kernel": (dim, dim),
        "aligner.fc2.bias": (dim,),
        "head.fc1.kernel": (dim, dim),
        "head.fc1.bias": (dim,),
        "head.fc2.kernel": (dim, 16384),
        "head.fc2.bias": (16384,),
    }
    count = sum(int(np.prod(shape)) for name, shape in shapes.items() if name not in side)
    assert count + 102400 * dim == language_model
    with pytest.raises(ValueError, match="7B"):
        janus.preset("3B")
