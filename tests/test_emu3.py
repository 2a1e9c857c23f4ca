"""Emu3 against `transformers`, from published files to pictures, and its text tokenizer; Emu3.5's ways of drawing."""

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
from transformers import LogitsProcessor, LogitsProcessorList

import cascade_jax as cj
from cascade_jax import bundle, methods
from cascade_jax import tree as trees
from cascade_jax.models import emu3
from cascade_jax.models.emu3 import Emu3Config
from cascade_jax.models.movq import EMU3 as MOVQ
from cascade_jax.models.prompt import Prompt
from cascade_jax.models.vq import VQConfig
from cascade_jax.sampling import Sampling
from checkpoints_convert import ConvertError, convert, movq, tiktoken
from checkpoints_convert import emu3 as tables
from checkpoints_convert.convert import planned
from checkpoints_convert.formats import Known
from checkpoints_convert.sources import Source, Tensor, open_source
from checkpoints_convert.table import plan

GREEDY = Sampling(temperature=0.0, guidance=3.0)
TREE = trees.parse("0 1 00 10")
FP32 = dict(rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Folders as they are downloaded: one with everything in the Hugging Face layout, and the authors' two."""
    hub = tmp_path_factory.mktemp("hub")
    vocabulary = tiktoken.vocabulary(oracles.write_tiktoken(hub / "Emu3-Gen"))
    model = oracles.emu3(vocabulary)
    oracles.save(model, hub / "Emu3-Gen-hf", shards="60KB")
    (hub / "Emu3-Gen-hf" / "tokenizer.json").write_text(tiktoken.text(hub / "Emu3-Gen" / "emu3.tiktoken"))
    weights = {name: np.array(tensor.read()) for name, tensor in open_source(hub / "Emu3-Gen-hf").tensors.items()}
    text = {n.removeprefix("text_model."): w for n, w in weights.items() if "vqmodel" not in n}
    settings = {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e6, "image_area": 8 * 8}
    published.write_folder(hub / "Emu3-Gen", text, settings, shards=2)
    published.write_folder(hub / "Emu3-VisionTokenizer", oracles.emu3_vq_original(weights), {"temporal": 4})
    return hub


@pytest.fixture(scope="module")
def reference(hub):
    return oracles.emu3(tiktoken.vocabulary(hub / "Emu3-Gen" / "emu3.tiktoken"))


@pytest.fixture(scope="module")
def model(hub):
    known = Known({"vq": VQConfig(oracles.CODES, channel_multipliers=(1, 1))}, pixels=8)
    return oracles.module(tables.HUGGING_FACE, hub / "Emu3-Gen-hf", known)


def prompts(config: Emu3Config) -> list[Prompt]:
    return [Prompt(ids=np.array([config.begin, 70, 71, 72, 73])), Prompt(ids=np.array([config.begin, 80]))]


def text_ids(config, prefix, tokens) -> list[int]:
    marks = [*range(config.first_code, config.first_code + config.codebook_size), *config.marks]
    return [*map(int, prefix), *(marks[token] for token in tokens)]


def prefix_rows(config) -> list[np.ndarray]:
    rows = config.stack(prompts(config))
    return [ids[:length] for ids, length in zip(rows.ids, rows.length)]


def reference_features(reference, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return reference.model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()


@pytest.mark.slow
def test_teacher_forced_features_and_logits_are_those_of_transformers(reference, model):
    """Both branches of two prompts, whose lengths differ; the unconditional one reads the negative prompt."""
    config = model.config
    prefix = oracles.prefix(model, prompts(config), True)
    forced = np.array(config.layout.forced)
    drawn = np.random.default_rng(3).integers(0, oracles.CODES, (4, config.length))
    tokens = np.where(forced < 0, drawn, forced)
    features, logits = oracles.scored(model, prefix, tokens)
    assert logits.dtype == jnp.float32 and logits.shape == (4, 20, oracles.CODES)
    head = reference.lm_head.weight.detach().numpy()[config.first_code : config.first_code + oracles.CODES]
    for row, ids in enumerate(prefix_rows(config)):
        want = reference_features(reference, text_ids(config, ids, tokens[row]))[len(ids) - 1 : -1]
        np.testing.assert_allclose(features[row], want, **FP32)
        np.testing.assert_allclose(logits[row], want @ head.T, **FP32)


@pytest.mark.slow
def test_step_by_step_and_through_a_tree_features_are_those_of_transformers(reference, model):
    config, rng = model.config, np.random.default_rng(4)
    tokens, nodes = rng.integers(0, oracles.CODES + 1, (4, 6)), rng.integers(0, oracles.CODES + 1, (4, TREE.num_nodes))
    prefix = oracles.prefix(model, prompts(config), True)
    stepped, branched = oracles.fed_through_cache(model, prefix, tokens, TREE, nodes)
    for row, ids in enumerate(prefix_rows(config)):
        given = text_ids(config, ids, tokens[row])
        np.testing.assert_allclose(stepped[row], reference_features(reference, given)[len(ids) - 1 :], **FP32)
        for node in range(TREE.num_nodes):
            path = np.flatnonzero(TREE.topology.ancestors[node])
            want = reference_features(reference, text_ids(config, np.array(given), nodes[row][path]))[-1]
            np.testing.assert_allclose(branched[row, node], want, **FP32)


class Rows(LogitsProcessor):
    """The end of a row after its codes, and codes elsewhere: what the authors' constraint leaves."""

    def __init__(self, config: Emu3Config, start: int):
        self.config, self.start = config, start

    def __call__(self, ids, scores):
        codes = range(self.config.first_code, self.config.first_code + self.config.codebook_size)
        ends = (ids.shape[1] - self.start + 1) % (self.config.columns + 1) == 0
        allowed = [self.config.newline] if ends else list(codes)
        masked = torch.full_like(scores, -torch.inf)
        masked[:, allowed] = scores[:, allowed]
        return masked


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers_generate_with_guidance(reference, model):
    config = model.config
    rows = prefix_rows(config)
    alone, speculative = (oracles.drawn(model, prompts(config), tree, GREEDY) for tree in (trees.ROOT, TREE))
    for row in range(2):
        out = reference.generate(
            torch.tensor([rows[row].tolist()]),
            max_new_tokens=config.length,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            guidance_scale=3.0,
            negative_prompt_ids=torch.tensor([rows[row + 2].tolist()]),
            logits_processor=LogitsProcessorList([Rows(config, len(rows[row]))]),
        )[0, len(rows[row]) :].tolist()
        np.testing.assert_array_equal(text_ids(config, [], alone.tokens[row, :20]), out)
        np.testing.assert_array_equal(alone.tokens[row, :20], speculative.tokens[row, :20])
    assert np.all(speculative.stats.accepted > 0)


# From files to pictures.


@pytest.mark.slow
def test_from_files_to_pictures_and_self_speculation(hub, tmp_path):
    both = [hub / "Emu3-Gen", hub / "Emu3-VisionTokenizer"]
    said = []
    config = convert("auto", both, tmp_path / "emu3", pixels=8, say=said.append)
    assert not [line for line in said if "warning" in line]
    whole = convert("emu3", [hub / "Emu3-Gen-hf"], tmp_path / "hf", pixels=8)
    one, other = cj.load(tmp_path / "emu3"), cj.load(tmp_path / "hf")
    assert config.target == whole.target and config.vq == whole.vq
    assert (config.target.rows, config.target.columns, config.target.length) == (4, 4, 20)
    jax.tree.map(np.testing.assert_array_equal, *({n: m.params[n] for n in ("target", "vq")} for m in (one, other)))
    read = one.read(["the dog"])[0].ids
    words = tiktoken.encoder(hub / "Emu3-Gen" / "emu3.tiktoken")
    assert read.tolist() == [config.target.begin, *words("the dog" + emu3.PRAISE)]
    assert config.target.unguided == (config.target.begin, *words(emu3.FLAWS))
    key, exact = jax.random.key(3), methods.method("pac", one)
    alone = cj.generate(one, ["the dog", "!?"], key, tree=cj.trees.ROOT, rule=cj.exact(), noise="gumbel")
    drawn = next(out for _, out in methods.draw_all(one, exact, ["the dog"], seed=0))
    assert alone.images.shape == (2, 8, 8, 3) and drawn.images.shape == (1, 8, 8, 3)
    forced = np.array(one.layout.forced)
    for tokens in (alone.tokens, drawn.tokens):
        np.testing.assert_array_equal(tokens[:, forced >= 0], np.tile(forced[forced >= 0], (len(tokens), 1)))


@pytest.mark.slow
def test_a_head_without_picture_tokens_and_a_tokenizer_of_other_codes_are_refused(hub, tmp_path):
    source = open_source(hub / "Emu3-Gen")
    cut = {name: np.array(tensor.read()) for name, tensor in source.tensors.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        cut[name] = cut[name][:500]
    folder = published.write_folder(tmp_path / "Emu3-Gen", cut, {"num_attention_heads": 4})
    oracles.write_tiktoken(folder)
    with pytest.raises(ConvertError, match="lacks picture tokens: its head has 500 rows, and the codes are 471 to 534"):
        planned(tables.ORIGINAL, open_source(folder), Known({}, pixels=8))
    other = {f"model.{n}": np.array(t.read()) for n, t in open_source(hub / "Emu3-VisionTokenizer").tensors.items()}
    other["model.quantize.embedding.weight"] = other["model.quantize.embedding.weight"][:32]
    published.write_folder(tmp_path / "VQ", other, {})
    with pytest.raises(ConvertError, match="the model draws 64 codes and its tokenizer has 32"):
        convert("emu3", [hub / "Emu3-Gen", tmp_path / "VQ"], tmp_path / "model", pixels=8)
    (folder / "emu3_vision_tokens.txt").unlink()
    with pytest.raises(ConvertError, match=r"lacks emu3_vision_tokens\.txt beside it"):
        planned(tables.ORIGINAL, open_source(folder), Known({}, pixels=8))


# Emu3.5.


@pytest.fixture(scope="module")
def hub_5(hub, tmp_path_factory):
    """Emu3.5-Image with the text tokenizer of its repository beside it, and its picture tokenizer."""
    hub_5 = tmp_path_factory.mktemp("hub")
    vocabulary = tiktoken.vocabulary(oracles.write_tiktoken(hub_5 / "Emu3.5-Image"))
    oracles.save(oracles.emu3_5(vocabulary), hub_5 / "Emu3.5-Image")
    published.write_pickle(hub_5 / "Emu3.5-VisionTokenizer" / "model.ckpt", oracles.ibq(), "state_dict")
    return hub_5


@pytest.mark.slow
def test_emu3_5s_features_and_logits_are_those_of_transformers_qwen3(hub_5):
    model = oracles.module(tables.EMU35_MODEL, hub_5 / "Emu3.5-Image", Known({}, pixels=64))
    config, forced = model.config, np.array(model.config.layout.forced)
    reference = oracles.emu3_5(tiktoken.vocabulary(hub_5 / "Emu3.5-Image" / "emu3.tiktoken"))
    drawn = np.random.default_rng(3).integers(0, oracles.CODES, (4, config.length))
    tokens = np.where(forced < 0, drawn, forced)
    features, logits = oracles.scored(model, oracles.prefix(model, prompts(config), True), tokens)
    head = reference.lm_head.weight.detach().numpy()[config.first_code : config.first_code + oracles.CODES]
    for row, ids in enumerate(prefix_rows(config)):
        want = reference_features(reference, text_ids(config, ids, tokens[row]))[len(ids) - 1 : -1]
        np.testing.assert_allclose(features[row], want, **FP32)
        np.testing.assert_allclose(logits[row], want @ head.T, **FP32)


@pytest.mark.slow
def test_emu3_5_converts_with_its_tokenizer_and_is_told_from_emu3(hub_5, tmp_path):
    sources = [hub_5 / "Emu3.5-Image", hub_5 / "Emu3.5-VisionTokenizer"]
    config = convert("auto", sources, tmp_path / "model", pixels=64)
    assert config.target.style == "emu3.5" and config.target.qk_norm and config.family == "emu3"
    assert config.vq.by_product and not config.vq.l2_norm and config.vq.downsampling == 16 and config.vq.attention
    words = tiktoken.encoder(hub_5 / "Emu3.5-Image" / "emu3.tiktoken")
    assert config.target.unguided == config.target.unconditional(words)
    with pytest.raises(ConvertError, match=r"no part of emu3: it looks like Emu3\.5"):
        convert("emu3", sources, tmp_path / "other", pixels=64)


# Words.


def joined(piece: bytes, words: dict[bytes, int]) -> list[int]:
    """tiktoken's law: a word whole, else always the neighbours whose word has the lowest number, leftmost first."""
    if piece in words:
        return [words[piece]]
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 1:
        rank, i = min((words.get(a + b, len(words)), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank == len(words):
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [words[part] for part in parts]


def test_words_are_joined_as_tiktoken_does(tmp_path):
    longer = (b"he", b"th", b"the", b"in", b"er", b"ther", b" t", b" the", b"rin", b"\xc3\xa9", b"\xe6\xbc")
    file = oracles.write_tiktoken(tmp_path, longer)
    words, encode = tiktoken._words(file), tiktoken.encoder(file)
    rng = np.random.default_rng(0)
    for _ in range(300):
        piece = "".join(rng.choice([*"therin", "é", "漢"], rng.integers(1, 12)))
        assert encode(piece) == joined(piece.encode(), words)
        assert encode(f"a {piece}") == [words[b"a"], *joined(f" {piece}".encode(), words)]
    assert encode("cafe\u0301") == encode("café")
    assert encode("90*87\n\n") == [words[x] for x in (b"9", b"0", b"*", b"8", b"7", b"\n", b"\n")]
    assert encode("<|image start|>th") == [len(words) + 209, words[b"th"]]


def test_a_damaged_tokenizer_is_refused(tmp_path):
    file = oracles.write_tiktoken(tmp_path)
    file.write_text("IQ== 0\nno words here\n")
    with pytest.raises(ConvertError, match=r"emu3\.tiktoken is damaged"):
        tiktoken.vocabulary(file)


# Prompts and layouts.


def test_emu3_announces_the_size_and_ends_every_row():
    config = dataclasses.replace(emu3.preset("emu3-gen-8b"), rows=90, columns=8)
    assert config.opening == (151852, 24, 15, 9, 23, 151851)  # <|image start|>90*8<|image token|>
    forced = np.array(config.layout.forced)
    assert config.length == len(forced) == 90 * 9 and np.all(forced[8::9] == 32768) and np.sum(forced < 0) == 720
    tokens = np.where(forced < 0, np.cumsum(forced < 0) - 1, forced)[None]
    np.testing.assert_array_equal(config.codes(tokens)[0], np.arange(720).reshape(90, 8))
    heard = []
    prompt = config.read(lambda text: heard.append(text) or [5, 6], "a red ball.")
    assert heard == ["a red ball. masterpiece, film grained, best quality."]
    assert prompt.ids.tolist() == [151849, 5, 6]
    rows = dataclasses.replace(config, unguided=(151849, 7)).stack([prompt, Prompt(ids=np.array([9, *config.opening]))])
    assert rows.length.tolist() == [9, 7, 8, 8]
    assert rows.ids[2][:8].tolist() == [151849, 7, *config.opening]


def test_emu3_5_ends_the_picture_in_place_of_its_last_row():
    config = emu3.preset("emu3.5-image-34b")
    assert config.length == 64 * 65 and config.layout.forced[-1] == 131073 and config.layout.forced[64] == 131072
    assert config.marks == (151846, 151853) and config.block.qk_norm and config.block.qk_rms
    heard = []
    prompt = config.read(lambda text: heard.append(text) or [5], "a red ball")
    assert config.unconditional(lambda text: heard.append(text) or [6]) == (151849, 6, 151746)
    assert prompt.ids.tolist() == [151849, 5, 151746]
    assert heard == [
        "You are a helpful assistant for t2i task. USER: a red ball ASSISTANT: ",
        "You are a helpful assistant. USER:  ASSISTANT: ",
    ]


def test_unusable_configurations_are_refused():
    config = emu3.preset("emu3-gen-8b")
    with pytest.raises(ValueError, match="lacks picture tokens: the codes are 151854 to 184621"):
        dataclasses.replace(config, vocab_size=184621)
    with pytest.raises(ValueError, match="style"):
        dataclasses.replace(config, style="emu4")
    with pytest.raises(ValueError, match="key heads"):
        dataclasses.replace(config, kv_heads=5)
    with pytest.raises(ValueError, match="emu3-gen-8b"):
        emu3.preset("emu3-9b")


@pytest.mark.slow
def test_the_tables_make_models_of_published_sizes():
    """Of all tensors that transformers has with the sizes that it, and Emu3.5's paper, state."""
    with torch.device("meta"):
        whole = transformers.Emu3ForConditionalGeneration(transformers.Emu3Config(vocabulary_map={}))
        sizes = dict(vocab_size=282926, hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, head_dim=128)
        heads = dict(num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False)
        other = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **heads))
    saved = {"model.text_model.": "text_model.model.", "lm_head.": "text_model.lm_head.", "model.vqmodel.": "vqmodel."}
    tensors = {}
    for name, value in whole.state_dict().items():
        old = next(old for old in saved if name.startswith(old))
        tensors[saved[old] + name.removeprefix(old)] = value
    for layout, config, of in (
        (tables.HUGGING_FACE, emu3.preset("emu3-gen-8b"), tensors),
        (movq.EMU3_HUGGING_FACE, MOVQ, tensors),
        (tables.EMU35_MODEL, emu3.preset("emu3.5-image-34b"), other.state_dict()),
    ):
        kinds = {name: Tensor(tuple(x.shape), np.dtype(np.float32), lambda: None) for name, x in of.items()}
        shapes = bundle.shapes(layout.part, config)
        source = Source(pathlib.Path("published"), (), kinds, {})
        assert plan(layout.rules(config), shapes, source, layout.skip).keys() == shapes.keys()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "billions"), [("emu3-gen-8b", 8.49), ("emu3.5-image-34b", 34.1)])
def test_the_published_models_have_the_published_number_of_parameters(name, billions):
    """Emu3's authors say 8 billion; transformers' default configuration has 8.49. Emu3.5's say 34.1 (31.2 in the
    transformer, 2.9 in embedding and head). Of the head only the rows of codes are kept."""
    config = emu3.preset(name)
    count = sum(int(np.prod(shape)) for shape in bundle.shapes("target", config).values())
    assert round((count + config.first_code * config.dim) / 1e9, 2 if billions < 9 else 1) == billions
