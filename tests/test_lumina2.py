"""Lumina-mGPT 2.0, from files as the public code reads them to pictures; its block against transformers' Chameleon."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import oracles
import published
import pytest
import torch

import cascade_jax as cj
from cascade_jax import methods
from cascade_jax.models import lumina2
from cascade_jax.models.movq import MoVQConfig
from cascade_jax.models.prompt import Prompt
from cascade_jax.sampling import Sampling
from checkpoints_convert import ConvertError, convert
from checkpoints_convert.convert import planned
from checkpoints_convert.formats import Known
from checkpoints_convert.lumina2 import MODEL
from checkpoints_convert.sources import open_source

FIRST = 155000  # text token of code 0 in the public code
VQ = Known({"vq": MoVQConfig(oracles.CODES, channel_multipliers=(1, 1, 1, 1))}, pixels=32)


def vocabulary() -> dict[str, int]:
    """Characters, then the marks in no order, as the tokenizer lists them by name."""
    marks = ["<racm3:break>", "<eoss>", "<reserved08706>", "<reserved08799>"]
    sizes = [f"<reserved{8800 + i:05d}>" for i in range(5)]
    names = [*(chr(32 + i) for i in range(95)), "\n", "<|endoftext|>", "<unk>", *sizes, *marks]
    return {name: i for i, name in enumerate(names)}


@pytest.fixture(scope="module")
def reference():
    return oracles.chameleon(vocab_size=FIRST + oracles.CODES, vocabulary_map={"<image>": 1})


@pytest.fixture(scope="module")
def hub(reference, tmp_path_factory):
    hub = tmp_path_factory.mktemp("hub")
    folder = oracles.save(reference, hub / "Lumina-mGPT-2.0", vocabulary())
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": "<|endoftext|>"}))
    sizes = dict(channels=32, multipliers=(1,) * 4, blocks=1, latent=4, codes=oracles.CODES, width=4)
    weights = published.vqgan(**sizes, attention=True, modulated=True)
    published.write_pickle(hub / "movqgan_270M.ckpt", weights)
    return hub


@pytest.mark.slow
def test_teacher_forced_features_and_logits_are_those_of_transformers_chameleon(reference, hub):
    """Both branches of two prompts, whose lengths differ; without a prompt the picture's opening stands alone."""
    model = oracles.module(MODEL, hub / "Lumina-mGPT-2.0", VQ)
    config = model.config
    prompts = [Prompt(ids=np.array([config.begin, 50, 51, 52, config.turn])), Prompt(ids=np.array([60, config.turn]))]
    prefix, forced = oracles.prefix(model, prompts, True), np.array(config.layout.forced)
    tokens = np.where(forced < 0, np.random.default_rng(3).integers(0, oracles.CODES, (4, config.length)), forced)
    features, logits = oracles.scored(model, prefix, tokens)
    assert logits.dtype == jnp.float32 and logits.shape == (4, 21, oracles.CODES)
    names, stacked = [*range(FIRST, FIRST + oracles.CODES), *config.marks], config.stack(prompts)
    head = reference.lm_head.weight.detach().numpy()[FIRST:]
    for row, (ids, length) in enumerate(zip(stacked.ids, stacked.length)):
        given = [*map(int, ids[:length]), *(names[token] for token in tokens[row])]
        with torch.no_grad():
            want = reference.model(input_ids=torch.tensor([given])).last_hidden_state[0, length - 1 : -1].numpy()
        np.testing.assert_allclose(features[row], want, rtol=0, atol=1e-4)
        np.testing.assert_allclose(logits[row], want @ head.T, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_from_files_to_pictures_and_self_speculation(hub, tmp_path):
    said = []
    sources = [hub / "Lumina-mGPT-2.0", hub / "movqgan_270M.ckpt"]
    config = convert("auto", sources, tmp_path / "model", pixels=32, say=said.append)
    assert config.family == "lumina2" and not [line for line in said if "warning" in line]
    names, model = vocabulary(), cj.load(tmp_path / "model")
    begin, turn = names["<|endoftext|>"], names["<reserved08706>"]
    text = "Generate an image of 32x32 according to the following prompt:\na dog"
    assert model.read(["a dog"])[0].ids.tolist() == [begin, *(names[x] for x in text), turn]
    greedy = Sampling(temperature=0.0, guidance=4.0)
    alone = next(out for _, out in methods.draw_all(model, methods.method("ar", model), ["a dog"], 0, sampling=greedy))
    drawn = next(out for _, out in methods.draw_all(model, methods.method("sjd", model), ["a dog"], 0, sampling=greedy))
    np.testing.assert_array_equal(drawn.tokens, alone.tokens)
    assert drawn.images.shape == (1, 32, 32, 3) and drawn.tokens.shape == (1, 21)
    np.testing.assert_array_equal(drawn.tokens[0, 4:20:5], oracles.CODES)
    assert drawn.tokens[0, 20] == oracles.CODES + 1


@pytest.mark.slow
def test_a_head_without_picture_tokens_and_a_vocabulary_without_marks_are_refused(hub, tmp_path):
    known = Known({"vq": MoVQConfig(2 * oracles.CODES, channel_multipliers=(1, 1, 1, 1))}, pixels=32)
    with pytest.raises(ConvertError, match=r"lacks picture tokens: its head has 155064 rows, .* 128 codes are 155000"):
        planned(MODEL, open_source(hub / "Lumina-mGPT-2.0"), known)
    folder = shutil.copytree(hub / "Lumina-mGPT-2.0", tmp_path / "Lumina-mGPT-2.0")
    oracles.write_tokenizer(folder / "tokenizer.json", {n: i for n, i in vocabulary().items() if n != "<eoss>"})
    with pytest.raises(ConvertError, match=r"no tokenizer\.json beside it that names <eoss>"):
        planned(MODEL, open_source(folder), VQ)
    with pytest.raises(ConvertError, match="a code of the tokenizer is 2 pixels wide"):
        weights = published.write_pickle(tmp_path / "movqgan.ckpt", published.movqgan())
        convert("lumina-mgpt-2", [hub / "Lumina-mGPT-2.0", weights], tmp_path / "model", pixels=32)


def test_the_size_is_announced_in_steps_of_32_pixels_and_every_row_ends():
    config = lumina2.preset("lumina-mgpt-2-7b")
    assert config.opening == (151665, 151671 + 24, 151671 + 24)
    forced = np.array(config.layout.forced)
    assert len(forced) == config.length == 96 * 97 + 1 and forced[96] == 16384 and forced[-1] == 16385
    tokens = np.where(forced < 0, np.cumsum(forced < 0) - 1, forced)[None]
    np.testing.assert_array_equal(config.codes(tokens)[0], np.arange(96 * 96).reshape(96, 96))
    heard = []
    prompt = config.read(lambda text: heard.append(text) or [5, 6], "a red ball")
    assert heard == ["Generate an image of 768x768 according to the following prompt:\na red ball"]
    assert prompt.ids.tolist() == [151643, 5, 6, config.turn]
    assert config.stack([prompt]).length.tolist() == [7, 3]


def test_unusable_configurations_are_refused():
    sizes = dict(dim=32, layers=1, heads=2, ffn_dim=16, turn=0)
    with pytest.raises(ValueError, match="32 pixels"):
        lumina2.Lumina2Config(**sizes, rows=6)
    with pytest.raises(ValueError, match="lacks picture tokens: the codes are 155000 to 171383"):
        lumina2.Lumina2Config(**sizes, vocab_size=171383)
    with pytest.raises(ValueError, match="lumina-mgpt-2-7b"):
        lumina2.preset("2b")
