"""SimpleAR and Liquid against `transformers`' Qwen2 and Gemma, and their ways of drawing."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import published
import pytest
import torch
import transformers
from test_cosmos import SMALL, write_cosmos
from transformers import LogitsProcessor, LogitsProcessorList

import cascade_jax as cj
from cascade_jax import bundle, methods
from cascade_jax import tree as trees
from cascade_jax.models import liquid, simplear
from cascade_jax.models.prompt import Prompt
from cascade_jax.models.vq import VQConfig
from cascade_jax.sampling import Sampling
from checkpoints_convert import ConvertError, convert, fusion
from checkpoints_convert.convert import planned
from checkpoints_convert.formats import Known
from checkpoints_convert.sources import open_source

CODES, WORDS = oracles.CODES, 100
GREEDY = Sampling(temperature=0.0, guidance=3.0)
TREE = trees.parse("0 1 00 10")
FP32 = dict(rtol=0, atol=2e-4)  # logits of a head tied to embeddings of size 1 are as large as 20
KNOWN = Known({"vq": VQConfig(CODES, channel_multipliers=(1, 1, 1, 1, 1))}, pixels=64)
SIZES = dict(
    vocab_size=WORDS + CODES, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_key_value_heads=2,
    bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True,
)  # fmt: skip
MARKS = {
    "simplear": ["<unk>", "<|t2i|>", "<|i2t|>", "<|soi|>"],
    "liquid": ["<unk>", "<bos>", "<eos>", "<boi>", "<unconditional>"],
}
VQGAN = dict(channels=32, multipliers=(1, 1, 1, 1, 1), blocks=1, latent=32, codes=CODES, width=8)
FORMATS = {name: family.formats[0] for name, family in (("simplear", fusion.SIMPLEAR), ("liquid", fusion.LIQUID))}


def vocabulary(family: str) -> dict[str, int]:
    names = MARKS[family] + [chr(ord("!") + i) for i in range(WORDS - len(MARKS[family]))]
    return {name: i for i, name in enumerate(names)}


def transformer(family: str):
    if family == "simplear":
        settings = transformers.Qwen2Config(**SIZES, num_attention_heads=4, rope_theta=1e6)
        return oracles._random(transformers.Qwen2ForCausalLM(settings), 2)
    settings = transformers.GemmaConfig(**SIZES, num_attention_heads=2, head_dim=32)
    return oracles._random(transformers.GemmaForCausalLM(settings), 3)


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> pathlib.Path:
    hub = tmp_path_factory.mktemp("hub")
    for family in MARKS:
        oracles.save(transformer(family), hub / family, vocabulary(family))
    return hub


@pytest.fixture(scope="module", params=MARKS)
def pair(request, hub):
    """A family's model as transformers and as we have it."""
    return transformer(request.param), oracles.module(FORMATS[request.param], hub / request.param, KNOWN)


def prompts(config) -> list[Prompt]:
    return [Prompt(ids=np.array([config.begin, 70, 71, 72, 73])), Prompt(ids=np.array([config.begin, 80]))]


def rows(config) -> list[np.ndarray]:
    stacked = config.stack(prompts(config))
    return [ids[:length] for ids, length in zip(stacked.ids, stacked.length)]


def reference_features(reference, ids: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Of the prompt's last token and of the codes, [1 + T, d]."""
    with torch.no_grad():
        given = torch.tensor([[*map(int, ids), *(WORDS + int(token) for token in tokens)]])
        return reference.model(input_ids=given).last_hidden_state[0, len(ids) - 1 :].numpy()


@pytest.mark.slow
def test_teacher_forced_features_and_logits_are_those_of_transformers(pair):
    """Both branches of two prompts, whose lengths differ."""
    reference, model = pair
    tokens = np.random.default_rng(3).integers(0, CODES, (4, 16))
    features, logits = oracles.scored(model, oracles.prefix(model, prompts(model.config), True), tokens)
    assert logits.dtype == jnp.float32 and logits.shape == (4, 16, CODES)
    head = reference.lm_head.weight.detach().numpy()[WORDS:]
    for row, ids in enumerate(rows(model.config)):
        want = reference_features(reference, ids, tokens[row])[:-1]
        np.testing.assert_allclose(features[row], want, **FP32)
        np.testing.assert_allclose(logits[row], want @ head.T, **FP32)


@pytest.mark.slow
def test_step_by_step_and_through_a_tree_features_are_those_of_transformers(pair):
    reference, model = pair
    rng = np.random.default_rng(4)
    tokens, nodes = rng.integers(0, CODES, (4, 5)), rng.integers(0, CODES, (4, TREE.num_nodes))
    prefix = oracles.prefix(model, prompts(model.config), True)
    stepped, branched = oracles.fed_through_cache(model, prefix, tokens, TREE, nodes)
    for row, ids in enumerate(rows(model.config)):
        np.testing.assert_allclose(stepped[row], reference_features(reference, ids, tokens[row]), **FP32)
        for node in range(TREE.num_nodes):
            path = nodes[row][np.flatnonzero(TREE.topology.ancestors[node])]
            want = reference_features(reference, ids, np.concatenate([tokens[row], path]))[-1]
            np.testing.assert_allclose(branched[row, node], want, **FP32)


class Codes(LogitsProcessor):
    """Codes and no words."""

    def __call__(self, ids, scores):
        return torch.cat([torch.full_like(scores[:, :WORDS], -torch.inf), scores[:, WORDS:]], dim=1)


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers_generate_with_guidance(pair):
    reference, model = pair
    given = rows(model.config)
    alone, speculative = (oracles.drawn(model, prompts(model.config), tree, GREEDY) for tree in (trees.ROOT, TREE))
    for row in range(2):
        out = reference.generate(
            torch.tensor([given[row].tolist()]),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            guidance_scale=3.0,
            negative_prompt_ids=torch.tensor([given[row + 2].tolist()]),
            logits_processor=LogitsProcessorList([Codes()]),
        )[0, len(given[row]) :].tolist()
        np.testing.assert_array_equal(WORDS + alone.tokens[row, :16], out)
        np.testing.assert_array_equal(alone.tokens[row, :16], speculative.tokens[row, :16])


@pytest.mark.slow
def test_simplear_from_files_to_pictures_by_self_speculation(hub, tmp_path):
    write_cosmos(tmp_path / "Cosmos-1.0-Tokenizer-DV8x16x16", whole=True, levels=(2,) * 6)
    said = []
    sources = [hub / "simplear", tmp_path / "Cosmos-1.0-Tokenizer-DV8x16x16"]
    config = convert("auto", sources, tmp_path / "model", pixels=64, say=said.append)
    assert not [line for line in said if "warning" in line]
    words, target = vocabulary("simplear"), config.target
    assert config.vq == dataclasses.replace(SMALL, codebook_size=64, levels=(2,) * 6)
    assert (target.grid, target.first_code, target.begin, target.image_start) == (4, WORDS, 1, 3)
    letters = lambda text: [words.get(letter, 0) for letter in text]
    assert target.flaws == tuple(letters(simplear.FLAWS))
    model = cj.load(tmp_path / "model")
    assert model.read(["dog"])[0].ids.tolist() == [1, *letters("A highly realistic image of dog"), 3]
    drawn = next(out for _, out in methods.draw_all(model, methods.method("sjd", model), ["dog", "a!"], seed=0))
    assert drawn.images.shape == (2, 64, 64, 3) and drawn.images.std() > 1


@pytest.mark.slow
def test_liquid_from_files_to_pictures(hub, tmp_path):
    vq = published.write_pickle(tmp_path / "vqgan.ckpt", published.vqgan(**VQGAN), "state_dict")
    config = convert("liquid", [hub / "liquid", vq], tmp_path / "model", pixels=64)
    words, target = vocabulary("liquid"), config.target
    assert (target.begin, target.image_start, target.nothing, target.head_dim) == (1, 3, (4,), 32)
    model = cj.load(tmp_path / "model")
    asked = [words.get(letter, 0) for letter in "dog Generate an image based on this description."]
    assert model.read(["dog"])[0].ids.tolist() == [1, *asked, 3]
    out = cj.generate(model, ["dog"], jax.random.key(0), tree=cj.trees.ROOT)
    assert out.tokens.shape == (1, target.length) and out.images.shape[0] == 1


def family_folder(tmp_path, family: str, settings: dict, words: int = WORDS, **changes) -> pathlib.Path:
    """A checkpoint of zeros and its tokenizer."""
    heads, head_dim = (4, 8) if family == "simplear" else (2, 32)
    layer, wide = "model.layers.0", (heads * head_dim, 2 * head_dim)
    weights = {"model.embed_tokens.weight": (WORDS + CODES, 32), "model.norm.weight": (32,)}
    weights |= {f"{layer}.self_attn.{x}_proj.weight": (wide[x != "q"], 32) for x in "qkv"}
    weights |= {f"{layer}.self_attn.o_proj.weight": (32, wide[0])}
    weights |= {f"{layer}.mlp.{x}_proj.weight": (48, 32) for x in ("gate", "up")}
    weights |= {f"{layer}.mlp.down_proj.weight": (32, 48)}
    weights |= {f"{layer}.{x}_layernorm.weight": (32,) for x in ("input", "post_attention")}
    if family == "simplear":
        weights |= {f"{layer}.self_attn.{x}_proj.bias": (wide[x != "q"],) for x in "qkv"}
    arrays = {name: np.zeros(shape, np.float32) for name, shape in (weights | changes).items()}
    folder = published.write_folder(tmp_path / family, arrays, {"num_attention_heads": heads, **settings})
    names = dict(list(vocabulary(family).items())[:words])
    oracles.write_tokenizer(folder / "tokenizer.json", names)
    return folder


@pytest.mark.parametrize("family", MARKS)
def test_models_and_tokenizers_that_do_not_fit_are_refused(family, tmp_path):
    layout = FORMATS[family]
    folder = family_folder(tmp_path, family, {})
    assert planned(layout, open_source(folder), KNOWN).config.first_code == WORDS
    other = dataclasses.replace(KNOWN, parts={"vq": VQConfig(CODES + 1)})
    with pytest.raises(ConvertError, match="do not fit: of the vocabulary's 164 rows 64 are no words, and 65 codes"):
        planned(layout, open_source(folder), other)
    cut = family_folder(tmp_path / "cut", family, {}, **{"model.embed_tokens.weight": (WORDS, 32)})
    with pytest.raises(ConvertError, match="of the vocabulary's 100 rows 0 are no words, and 64 codes need as many"):
        planned(layout, open_source(cut), KNOWN)
    with pytest.raises(ConvertError, match="pixels must be a multiple of 16, not 60"):
        planned(layout, open_source(folder), dataclasses.replace(KNOWN, pixels=60))
    relu = family_folder(tmp_path / "relu", family, {"hidden_act": "relu"})
    with pytest.raises(ConvertError, match="has the activation relu"):
        planned(layout, open_source(relu), KNOWN)


def test_liquid_needs_a_tokenizer_that_knows_its_marks(tmp_path):
    folder = family_folder(tmp_path, "liquid", {}, words=3)
    with pytest.raises(ConvertError, match=r"has no tokenizer\.json beside it that names <boi>"):
        planned(FORMATS["liquid"], open_source(folder), KNOWN)


def test_prompts_are_those_of_the_public_code():
    heard = []
    encode = lambda text: heard.append(text) or [5, 6]
    config = dataclasses.replace(simplear.preset("0.5B"), flaws=(7, 8, 9))
    assert config.read(encode, "a red ball").ids.tolist() == [151665, 5, 6, 151667]
    other = dataclasses.replace(liquid.preset("7B"), image_start=3, nothing=(4,))
    assert other.read(encode, "a red ball").ids.tolist() == [2, 5, 6, 3]
    assert heard == [
        "A highly realistic image of a red ball",
        "a red ball Generate an image based on this description.",
    ]
    for own, unguided in ((config, [151665, 7, 8, 9, 151667]), (other, [2, 4, 3])):
        stacked = own.stack([Prompt(ids=np.array([own.begin, 5])), Prompt(ids=np.array([own.begin, own.image_start]))])
        assert stacked.length.tolist() == [3, 2, *[len(unguided)] * 2]
        assert stacked.ids[2, : len(unguided)].tolist() == unguided
        np.testing.assert_array_equal(
            own.codes(np.arange(own.length)[None])[0, :, 0], np.arange(0, own.length, own.grid)
        )


@pytest.mark.parametrize(
    ("config", "parameters"),
    # beside the embedding: Gemma's technical report, table 2; Qwen2.5's model cards, which say 0.36B and 1.31B
    [
        (liquid.preset("7B"), 7_751_248_896),
        (simplear.preset("0.5B"), 357_898_112),
        (simplear.preset("1.5B"), 1_310_340_608),
    ],
    ids=["Gemma-7B", "Qwen2.5-0.5B", "Qwen2.5-1.5B"],
)
def test_presets_are_the_published_language_models(config, parameters):
    shapes = bundle.shapes("target", config)
    own = {name: shape for name, shape in shapes.items() if name.startswith(("blocks", "norm"))}
    assert sum(int(np.prod(shape)) for shape in own.values()) == parameters
    assert shapes["embedding"][0] == config.first_code + config.codebook_size


def test_unusable_configurations_are_refused():
    with pytest.raises(ValueError, match="a vocabulary of 200000 lacks picture tokens: the codes are 151672 to 215671"):
        dataclasses.replace(simplear.preset("0.5B"), vocab_size=200000)
    with pytest.raises(ValueError, match="16 heads do not share 3 key heads"):
        dataclasses.replace(liquid.preset("7B"), kv_heads=3)
    with pytest.raises(ValueError, match=r"unknown SimpleAR size '3B'; known: 0\.5B, 1\.5B"):
        simplear.preset("3B")
