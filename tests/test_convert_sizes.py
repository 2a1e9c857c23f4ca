"""What the converter makes of sizes and settings that contradict one another, and of what files leave out."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import oracles
import published
import pytest
from flax import nnx
from safetensors.numpy import save_file

import cascade_jax as cj
from cascade_jax import cache as kv
from cascade_jax.cache import Context
from cascade_jax.drafters.eagle import Eagle1
from cascade_jax.models import llamagen as models
from cascade_jax.models.janus import JanusConfig
from checkpoints_convert import ConvertError, convert, eagle, llamagen, sources, t5
from checkpoints_convert.chameleon import LUMINA
from checkpoints_convert.convert import planned
from checkpoints_convert.formats import Known

DIM, CODES = published.DIM, published.CODES
HF = published.LLAMAGEN_HF_SETTINGS
TARGET = models.LlamaGenConfig(
    DIM, 2, 2, image_tokens=16, vocab_size=CODES, condition_tokens=published.SLOTS, caption_dim=published.CAPTION
)
SMALL_VQ = {"multipliers": (1, 1)}


def plan(layout, folder: pathlib.Path, tensors, settings, **known):
    published.write_folder(folder, tensors, settings)
    return planned(layout, sources.open_source(folder), Known(**({"parts": {}} | known)))


def hf(folder: pathlib.Path, tensors=None, pixels: int | None = None, **settings):
    return plan(llamagen.HUGGING_FACE, folder, tensors or published.llamagen_hf(), HF | settings, pixels=pixels)


def drafter(folder: pathlib.Path, tensors=None, target=TARGET, layout=eagle.EAGLE1, said=None, **settings):
    own = published.DRAFTER_SETTINGS if layout is eagle.EAGLE1 else published.EAGLE3_SETTINGS
    say = (said if said is not None else []).append
    return plan(layout, folder, tensors or published.drafter(), own | settings, parts={"target": target}, say=say)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 3}, "config.json says num_hidden_layers 3 where its tensors have 2"),
        ({"hidden_size": 256}, "config.json says hidden_size 256 where its tensors have 128"),
        ({"intermediate_size": 8, "head_dim": 32}, "intermediate_size 8 where its tensors have 512; head_dim 32 where"),
        ({"cls_token_num": 120}, "config.json says cls_token_num 120 where its tensors have 6"),
        ({"caption_dim": 2048}, "config.json says caption_dim 2048 where its tensors have 24"),
        ({"hidden_act": "gelu"}, "has the activation gelu, and the published models have silu"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"scales its rotary embedding \(linear\)"),
        ({"num_attention_heads": 3}, "3 heads do not share a width of 128 in pairs"),
        ({"rms_norm_eps": ""}, "config.json says rms_norm_eps '', and that must be a positive number"),
        ({"rope_base": -1}, "config.json says rope_base -1, and that must be a positive number"),
    ],
)
def test_settings_that_contradict_the_tensors_are_named(settings, message, tmp_path):
    with pytest.raises(ConvertError, match=message):
        hf(tmp_path / "hf", **settings)


def test_settings_of_other_families_are_compared_with_the_tensors_too(tmp_path):
    cases = [(t5.ENCODER, published.t5(), published.T5_SETTINGS | {"num_layers": 24}, "num_layers 24 where .* 2")]
    cases += [(eagle.EAGLE1, published.drafter(), {"num_hidden_layers": 2}, "num_hidden_layers 2 where .* have 1")]
    for layout, tensors, settings, message in cases:
        with pytest.raises(ConvertError, match=message):
            plan(layout, tmp_path / layout.part, tensors, settings, parts={"target": TARGET})


def test_pixels_that_contradict_the_settings_are_refused(tmp_path):
    assert hf(tmp_path / "hf").config.image_tokens == hf(tmp_path / "hf", pixels=64).config.image_tokens == 16
    with pytest.raises(ConvertError, match="block_size says 16 codes a picture, and 256 pixels are 256 codes"):
        hf(tmp_path / "hf", pixels=256)


def test_pixels_that_contradict_a_name_are_warned_of(tmp_path):
    file = published.write_pickle(tmp_path / "t2i_XL_stage1_256.pt", published.llamagen(), "model")
    said: list[str] = []
    for pixels, tokens in ((None, 256), (256, 256), (64, 16)):
        part = planned(llamagen.ORIGINAL, sources.open_source(file), Known({}, pixels, said.append))
        assert part.config.image_tokens == tokens
    assert said == [f"warning: {file} draws 256 pixels a side by its name, and it is told to draw 64"]


def test_pixels_that_nothing_reads_or_that_are_none_are_refused(tmp_path):
    names = "Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.bn.running_var"
    save_file({name: np.ones(1, np.float32) for name in names}, tmp_path / "inception.safetensors")
    with pytest.raises(ConvertError, match="inception draws no pictures, so it has no use for pixels"):
        convert("inception", [tmp_path / "inception.safetensors"], tmp_path / "out", pixels=299)
    with pytest.raises(ConvertError, match="pixels must be positive, not 0"):
        convert("llamagen", [tmp_path], tmp_path / "out", pixels=0)


def test_the_layers_that_were_found_are_told_and_too_few_are_warned_of(tmp_path):
    wide = published._made({"tok_embeddings.weight": (8, 768), "norm.weight": (768,), "output.weight": (8, 768)})
    layer = {f"layers.0.{name}": np.zeros(shape, np.float32) for name, shape in (
        ("attention.wqkv.weight", (2304, 768)), ("attention.wo.weight", (768, 768)), ("attention_norm.weight", (768,)),
        ("feed_forward.w1.weight", (2048, 768)), ("feed_forward.w3.weight", (2048, 768)), ("ffn_norm.weight", (768,)),
        ("feed_forward.w2.weight", (768, 2048)),
    )}  # fmt: skip
    table = {"cls_embedding.embedding_table.weight": np.zeros((6, 768), np.float32)}
    save_file({**wide, **layer, **table}, tmp_path / "c2i_B_256.safetensors")
    said: list[str] = []
    source = sources.open_source(tmp_path / "c2i_B_256.safetensors")
    part = planned(llamagen.ORIGINAL, source, Known({}, say=said.append))
    assert said == [f"warning: {source.path} has 1 layers, and published models of this width have 12: is it whole?"]
    assert str(part).startswith("target: LlamaGen, 1 layer, ") and str(part).endswith(f" parameters, {source.path}")


def test_a_conversion_tells_what_it_found_of_every_part(tmp_path):
    target = published.write_pickle(tmp_path / "x.pt", published.llamagen(), "model")
    vq = published.write_pickle(tmp_path / "vq.pt", published.vq(**SMALL_VQ), "model")
    said: list[str] = []
    convert("llamagen", [target, vq], tmp_path / "out", pixels=16, say=said.append)
    assert [line.partition(",")[0] for line in said] == ["vq: LlamaGen's VQ", "target: LlamaGen"]
    assert "2 layers" in said[1]


def test_captions_are_no_use_to_a_model_that_draws_classes(tmp_path):
    target = published.write_pickle(tmp_path / "c2i_B_256.pt", published.llamagen(classes=True), "model")
    vq = published.write_pickle(tmp_path / "vq.pt", published.vq(), "model")
    text = published.write_folder(tmp_path / "flan-t5-xl", published.t5(), published.T5_SETTINGS)
    published.write_tokenizer(text / "tokenizer.json")
    with pytest.raises(ConvertError, match="draws classes and reads no captions: leave T5 out"):
        convert("llamagen", [target, vq, text], tmp_path / "out")


@pytest.mark.parametrize("damage", ["missing", "pointer"])
def test_a_text_encoder_without_its_tokenizer_is_refused_before_anything_is_written(damage, tmp_path):
    target = published.write_pickle(tmp_path / "t2i_XL_stage1_256.pt", published.llamagen(), "model")
    vq = published.write_pickle(tmp_path / "vq.pt", published.vq(), "model")
    text = published.write_folder(tmp_path / "flan-t5-xl", published.t5(), published.T5_SETTINGS)
    message = r"has no text tokenizer \(tokenizer.json or spiece.model\) beside it"
    if damage == "pointer":
        (text / "spiece.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
        message = r"spiece\.model is a pointer of Git LFS"
    with pytest.raises(ConvertError, match=message):
        convert("llamagen", [target, vq, text], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_not_taken(tmp_path):
    target = published.write_pickle(tmp_path / "t2i_XL_stage1_256.pt", published.llamagen(), "model")
    vq = published.write_pickle(tmp_path / "vq.pt", published.vq(), "model")
    text = published.write_folder(tmp_path / "flan-t5-xl", published.t5(), published.T5_SETTINGS)
    other = published.write_folder(tmp_path / "drafter", published.drafter(), published.DRAFTER_SETTINGS)
    published.write_tokenizer(other / "tokenizer.json")
    with pytest.raises(ConvertError, match="has no text tokenizer"):
        convert("llamagen", [target, vq, text, other], tmp_path / "out")
    large = json.loads((other / "tokenizer.json").read_text())
    large["model"]["vocab"].append(["more", -3.0])
    (text / "tokenizer.json").write_text(json.dumps(large))
    with pytest.raises(ConvertError, match="it has a token 12, and the embedding has 12 rows"):
        convert("llamagen", [target, vq, text], tmp_path / "out")


@pytest.mark.parametrize(("classes", "name"), [(False, "vq_ds16_c2i.pt"), (True, "vq_ds16_t2i.pt")])
def test_a_picture_tokenizer_of_the_other_kind_of_models_is_warned_of(classes, name, tmp_path):
    target = published.write_pickle(tmp_path / "x_256.pt", published.llamagen(classes=classes), "model")
    said: list[str] = []
    for vq, warnings in ((name, 1), (name.replace("c2i", "x").replace("t2i", "x"), 0)):
        known = Known({}, None, said.append, {"vq": tmp_path / vq})
        planned(llamagen.ORIGINAL, sources.open_source(target), known)
        assert len(said) == warnings, said
        said.clear()


def test_a_head_that_is_the_embedding_may_be_left_out(tmp_path):
    tensors = published.llamagen_hf()
    del tensors["lm_head.weight"]
    said: list[str] = []
    settings = HF | {"tie_word_embeddings": True}
    part = plan(llamagen.HUGGING_FACE, tmp_path / "hf", tensors, settings, say=said.append)
    made = part.steps["head.kernel"].transform(part.source.tensors["lm_head.weight"].read())
    np.testing.assert_array_equal(made, tensors["model.embed_tokens.weight"].T)
    assert said == [f"note: {tmp_path / 'hf'} has no lm_head.weight; model.embed_tokens.weight is taken for it"]
    assert hf(tmp_path / "unsaid", tensors).config.layers == 2
    with pytest.raises(ConvertError, match=r"1 missing: lm_head\.weight"):
        hf(tmp_path / "untied", tensors, tie_word_embeddings=False)
    assert LUMINA.formats[0].stand_ins == llamagen.HUGGING_FACE.stand_ins


@pytest.mark.parametrize("name", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
def test_t5s_embedding_may_be_stored_under_any_of_its_names(name, tmp_path):
    tensors = published.t5()
    tensors[name] = tensors.pop("shared.weight")
    part = plan(t5.ENCODER, tmp_path / "t5", tensors, published.T5_SETTINGS)
    np.testing.assert_array_equal(part.source.tensors["shared.weight"].read(), tensors[name])


def test_a_drafter_without_bias_has_one_of_zeros(tmp_path):
    tensors = published.drafter()
    del tensors["fc.bias"]
    part = drafter(tmp_path / "drafter", tensors)
    np.testing.assert_array_equal(part.source.tensors["fc.bias"].read(), np.zeros(DIM, np.float32))
    with pytest.raises(ConvertError, match=r"1 missing: fc\.bias"):
        drafter(tmp_path / "biased", tensors, bias=True)


def guesses(folder: pathlib.Path) -> np.ndarray:
    """What a drafter makes of three pairs."""
    module = oracles.module(eagle.EAGLE1, folder, Known({"target": TARGET}))
    pairs = np.random.default_rng(0).normal(size=(2, 1, 3, DIM)).astype(np.float32)
    context = Context(module.rope(jnp.arange(3)[None]), kv.bias(kv.causal(3))[None, None])
    return np.asarray(module(jnp.asarray(pairs[0]), jnp.asarray(pairs[1]), context)[0])


def test_of_several_layers_the_first_may_lack_the_norm_that_the_others_have(tmp_path):
    """EAGLE's code: `if self.index != 0: self.input_layernorm = ...`."""
    tensors = published.drafter()
    tensors |= {n.replace("layers.0", "layers.1"): x * 0.5 for n, x in tensors.items() if n.startswith("layers.0")}
    tensors["layers.1.input_layernorm.weight"] = published.tensor("norm.weight", DIM)
    part = drafter(tmp_path / "drafter", tensors, num_hidden_layers=2)
    assert part.config.layers == 2 and part.config.bare_first
    assert part.steps["blocks.1.attention_norm.scale"].names == ("layers.1.input_layernorm.weight",)
    module = nnx.eval_shape(lambda: Eagle1(part.config, rngs=nnx.Rngs(0)))
    assert module.blocks[0].attention_norm is None and module.blocks[1].attention_norm is not None
    silent = {n: x * 0 for n, x in tensors.items() if n.startswith("layers.1.") and ("o_proj" in n or "down_proj" in n)}
    drafter(tmp_path / "silent", tensors | silent, num_hidden_layers=2)
    drafter(tmp_path / "one")
    np.testing.assert_array_equal(guesses(tmp_path / "silent"), guesses(tmp_path / "one"))
    del tensors["layers.1.input_layernorm.weight"]
    assert not drafter(tmp_path / "bare", tensors, num_hidden_layers=2).config.block.input_norm


JANUS_TARGET = JanusConfig(DIM, 2, 2, 512, grid=4, codebook_size=CODES, vocab_size=96)


@pytest.mark.parametrize("target", [TARGET, JANUS_TARGET])
def test_an_embedding_of_too_few_rows_is_refused_and_of_too_many_warned_of(target, tmp_path):
    said: list[str] = []
    tensors, settings = published.drafter(), {"input_type": None}
    drafter(tmp_path / "same", tensors, target, said=said, **settings)
    assert said == []
    tensors["embed_tokens.weight"] = np.zeros((CODES + 1, DIM), np.float32)
    drafter(tmp_path / "more", tensors, target, said=said, **settings)
    assert f"has an embedding of 65 rows: the first {CODES} are the target's tokens" in said[0]
    tensors["embed_tokens.weight"] = np.zeros((CODES - 1, DIM), np.float32)
    with pytest.raises(ConvertError, match="has an embedding of 63 tokens, and the target has 64"):
        drafter(tmp_path / "fewer", tensors, target, **settings)


@pytest.mark.parametrize(
    ("theirs", "tokens", "classes", "ours"),
    [("t2i2", 256, None, "t2i"), ("t2i", 1024, None, "t2i2"), ("c2i", 256, None, "t2i"), ("t2i", 256, 5, "c2i")],
)
def test_a_drafter_of_another_kind_of_model_is_refused(theirs, tokens, classes, ours, tmp_path):
    sizes = {"condition_tokens": 1} if classes else {}
    target = models.LlamaGenConfig(DIM, 2, 2, image_tokens=tokens, vocab_size=CODES, classes=classes, **sizes)
    with pytest.raises(ConvertError, match=f"is a drafter for {theirs} by config.json's input_type, .* is {ours}"):
        drafter(tmp_path / "drafter", target=target, input_type=theirs)
    assert drafter(tmp_path / "drafter", target=target, input_type=ours).config.grid == target.grid


def test_a_drafter_of_another_architecture_is_refused(tmp_path):
    with pytest.raises(ConvertError, match=r"is a drafter for Chameleon by config\.json, .* is no Chameleon"):
        drafter(tmp_path / "drafter", model_type="chameleon")
    with pytest.raises(ConvertError, match=r"is a drafter for t2i by .*, and the target is no LlamaGen"):
        drafter(tmp_path / "drafter", target=JANUS_TARGET)


def narrow_eagle3(dim: int = DIM // 2) -> published.Tensors:
    """An EAGLE-3 drafter of half the target's width."""

    def cut(name: str, x: np.ndarray) -> np.ndarray:
        if name in ("d2t", "t2d"):
            return x
        rows = dim // 2 if "k_proj" in name or "v_proj" in name else dim
        x = x[:rows] if x.shape[0] in (DIM, DIM // 2) else x
        whole = x.ndim == 1 or name in ("fc.weight", "midlayer.mlp.down_proj.weight")
        return x if whole else x[:, : x.shape[1] // 2]

    return {name: np.ascontiguousarray(cut(name, x)) for name, x in published.eagle3().items()}


def test_eagle3_needs_an_embedding_of_its_own_where_it_is_narrower_than_its_target(tmp_path):
    narrow, settings = narrow_eagle3(), published.EAGLE3_SETTINGS | {"hidden_size": DIM // 2}
    with pytest.raises(ConvertError, match="has width 64 and no embedding of its own, and the target's has width 128"):
        drafter(tmp_path / "lacking", narrow, layout=eagle.EAGLE3, hidden_size=DIM // 2)
    narrow["embed_tokens.weight"] = published.tensor("embed_tokens.weight", CODES, DIM // 2)
    own = published.write_folder(tmp_path / "drafter", narrow, settings)
    target = published.write_pickle(tmp_path / "x.pt", published.llamagen(), "model")
    vq = published.write_pickle(tmp_path / "vq.pt", published.vq(**SMALL_VQ), "model")
    convert("llamagen", [target, vq, own], tmp_path / "model", pixels=8)
    model = cj.load(tmp_path / "model")
    caption = cj.Prompt(features=jnp.zeros((published.SLOTS, published.CAPTION)))
    prefix = model.prefix([caption], guided=True)
    assert [x.shape[-1] for x in (prefix.embeddings, prefix.drafter_embeddings)] == [DIM, DIM // 2]


def test_eagle3s_tokens_are_checked(tmp_path):
    def with_d2t(change):
        tensors = published.eagle3()
        change(tensors)
        return tensors

    def far(tensors):
        tensors["d2t"][-1] = CODES

    def twice(tensors):
        tensors["d2t"][1] = tensors["d2t"][0] - 1

    def other(tensors):
        tensors["t2d"] = np.zeros(CODES + 1, bool)

    for name, change, message in (
        ("far", far, "its d2t does not lead to 24 of 64 tokens"),
        ("twice", twice, "its d2t does not lead to 24 of 64 tokens"),
        ("other", other, "is one for 65 tokens, and the target has 64"),
    ):
        with pytest.raises(ConvertError, match=message):
            drafter(tmp_path / name, with_d2t(change), layout=eagle.EAGLE3)
