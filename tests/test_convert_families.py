"""Lumina-mGPT, Anole and Janus-Pro from published files to pictures, on small random checkpoints in their formats."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import published
import pytest
import torch
from flax import nnx

import cascade_jax as cj
from cascade_jax import bundle, methods
from cascade_jax.models import chameleon, janus
from cascade_jax.models.vq import CHAMELEON, JANUS
from cascade_jax.text import tokens
from cascade_jax.tree import DynamicTree, parse
from checkpoints_convert import ConvertError, convert, merge
from checkpoints_convert.chameleon import ANOLE, LUMINA, VQGAN
from checkpoints_convert.convert import planned
from checkpoints_convert.formats import Known
from checkpoints_convert.janus import FAMILY
from checkpoints_convert.sources import CODES, Source, Tensor, open_source
from checkpoints_convert.table import plan

GOLDEN = pathlib.Path(__file__).parent / "golden"
SMALL = dict(channels=32, multipliers=(1,) * 5, blocks=1, latent=32, codes=oracles.CODES, width=8)


# The VQGAN.


def test_the_vqgan_encodes_and_decodes_as_the_public_code_does(tmp_path):
    """golden/chameleon_vqgan.npz: `VQModel` of models/base_models/anole/chameleon/vqgan.py in github.com/jadohu/LANTERN
    at 3a56e45 (Meta's code, unchanged), with ch 32, ch_mult [1, 2], one residual block, z_channels 32, no attention but
    the middle's, 64 codes of width 8, the weights of `published.vqgan`, codes and pixels of default_rng(0)."""
    golden = np.load(GOLDEN / "chameleon_vqgan.npz")
    weights = published.vqgan(channels=32, multipliers=(1, 2), blocks=1, latent=32, codes=64, width=8)
    weights["loss.perceptual_loss.lin0.model.1.weight"] = np.zeros((1, 64, 1, 1), np.float32)
    vq = oracles.module(VQGAN, published.write_pickle(tmp_path / "vqgan.ckpt", weights, "state_dict"))
    latents, codes, decoded = oracles.through_vq(vq, golden["pixels"], golden["codes"])
    np.testing.assert_allclose(decoded, golden["decoded"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(latents, golden["latents"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(codes, golden["encoded"])


def test_the_vqgans_encoder_is_that_of_transformers(tmp_path):
    reference = oracles.chameleon().model.vqmodel
    weights = {name: value.numpy() for name, value in reference.state_dict().items()}
    weights |= {name: w for name, w in published.vqgan(**SMALL).items() if name.startswith("decoder")}
    vq = oracles.module(VQGAN, published.write_pickle(tmp_path / "vqgan.ckpt", weights, "state_dict"))
    pixels = np.random.default_rng(2).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        latents = reference.quant_conv(reference.encoder(images)).permute(0, 2, 3, 1).numpy()
        codes = reference.encode(images).image_tokens.reshape(2, 4, 4).numpy()
    own = oracles.through_vq(vq, pixels, codes)
    np.testing.assert_allclose(own[0], latents, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(own[1], codes)


# Two layouts of one model.


def meta(model) -> dict[str, np.ndarray]:
    """A Hugging Face Chameleon, whose heads share their norms, in Meta's layout: rotary pairs are neighbours."""
    theirs = {name: value.numpy() for name, value in model.state_dict().items() if "vqmodel" not in name}
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    names = {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    pairs = lambda weight, n: weight.reshape(n, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    out = {
        "tok_embeddings.weight": theirs["model.embed_tokens.weight"],
        "norm.weight": theirs["model.norm.weight"],
        "output.weight": theirs["lm_head.weight"],
        "rope.freqs": np.zeros(4, np.float32),
    }
    for i in range(model.config.num_hidden_layers):
        layer = f"model.layers.{i}."
        out |= {f"layers.{i}.{new}.weight": theirs[f"{layer}{old}.weight"] for old, new in names.items()}
        for x, n in (("q", heads), ("k", kv_heads)):
            out[f"layers.{i}.attention.w{x}.weight"] = pairs(theirs[f"{layer}self_attn.{x}_proj.weight"], n)
            for kind in ("weight", "bias"):
                norm = theirs[f"{layer}self_attn.{x}_norm.{kind}"][0]
                out[f"layers.{i}.attention.{x}_normalization.{kind}"] = pairs(norm, 1)
        out[f"layers.{i}.attention.wv.weight"] = theirs[f"{layer}self_attn.v_proj.weight"]
    return {name: np.ascontiguousarray(value) for name, value in out.items()}


def shared_norms(model):
    for layer in model.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            for parameter in (norm.weight, norm.bias):
                parameter.data = parameter.data[:1].expand_as(parameter).clone()
    return model


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> pathlib.Path:
    """Folders as they are downloaded: Lumina-mGPT-7B-64 in two shards, anole/ as Meta lays models out, and Janus."""
    hub = tmp_path_factory.mktemp("hub")
    vocabulary = oracles.chameleon_vocabulary()
    model = shared_norms(oracles.chameleon())
    oracles.save(model, hub / "Lumina-mGPT-7B-64", vocabulary, shards="40KB")
    assert (hub / "Lumina-mGPT-7B-64" / "model.safetensors.index.json").is_file()
    published.write_pickle(hub / "anole" / "models" / "7b" / "consolidated.00.pth", meta(model))
    (hub / "anole" / "models" / "7b" / "params.json").write_text(json.dumps({"model": {"norm_eps": 1e-5}}))
    oracles.write_tokenizer(hub / "anole" / "tokenizer" / "text_tokenizer.json", vocabulary)
    published.write_pickle(hub / "anole" / "tokenizer" / "vqgan.ckpt", published.vqgan(**SMALL), "state_dict")
    oracles.save(oracles.janus(seed=4), hub / "Janus", oracles.janus_vocabulary())
    weights = published.chameleon_drafter(dim=32, heads=4, kv_heads=2, ffn=48, vocab=128)
    published.write_folder(hub / "drafter", weights, published.CHAMELEON_DRAFTER_SETTINGS, pickled=True)
    weights = published.chameleon_drafter(dim=32, heads=4, kv_heads=4, ffn=48, vocab=None, qk_norm=False)
    published.write_folder(hub / "janus_drafter", weights, published.JANUS_DRAFTER_SETTINGS)
    return hub


def test_metas_layout_and_that_of_hugging_face_hold_the_same_model(hub):
    known = Known({}, pixels=64)
    one = oracles.module(LUMINA.formats[0], hub / "Lumina-mGPT-7B-64", known)
    other = oracles.module(LUMINA.formats[1], hub / "anole" / "models" / "7b", known)
    assert one.config == other.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(one), nnx.state(other))


def test_janus_has_the_same_tables_in_both_layouts(hub, tmp_path):
    """The authors' names are those that transformers' conversion script maps from."""
    names = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.generation_embeddings.": "gen_embed.",
        "model.generation_aligner.fc1.": "gen_aligner.layers.0.",
        "model.generation_aligner.hidden_layers.0.": "gen_aligner.layers.2.",
        "model.generation_head.proj_out.": "gen_head.output_mlp_projector.",
        "model.generation_head.vision_head.": "gen_head.vision_head.",
        "model.vision_model.": "vision_model.",
        "model.aligner.": "aligner.",
        "model.vqmodel.": "gen_vision_model.",
    }
    inside = {
        "encoder.down.": "encoder.conv_blocks.",
        "decoder.up.": "decoder.conv_blocks.",
        ".block.": ".res.",
        "mid.block_1": "mid.0",
        "mid.attn_1": "mid.1",
        "mid.block_2": "mid.2",
    }
    renamed = {"gen_vision_model.quantize.codebook_used": np.zeros(16, np.float32)}
    for name, tensor in open_source(hub / "Janus").tensors.items():
        old, new = next((old, new) for old, new in names.items() if name.startswith(old))
        own = new + name[len(old) :]
        for before, after in inside.items() if "gen_vision_model" in own else ():
            own = own.replace(before, after)
        renamed[own] = np.array(tensor.read())
    settings = json.loads((hub / "Janus" / "config.json").read_text())
    folder = published.write_folder(tmp_path / "J", renamed, {"language_config": settings["text_config"]}, pickled=True)
    oracles.write_tokenizer(folder / "tokenizer.json", oracles.janus_vocabulary())
    original, hugging_face = FAMILY.formats[0:3:2], FAMILY.formats[1:4:2]
    for one, other in zip(original, hugging_face):
        parts = [oracles.module(one, folder, Known({}, 64)), oracles.module(other, hub / "Janus", Known({}, 64))]
        assert parts[0].config == parts[1].config
        jax.tree.map(np.testing.assert_array_equal, *(nnx.state(part) for part in parts))


# To pictures.


def sources(hub: pathlib.Path, family: str) -> list[pathlib.Path]:
    return {
        "lumina-mgpt": [hub / "Lumina-mGPT-7B-64", hub / "anole" / "tokenizer" / "vqgan.ckpt"],
        "anole": [hub / "anole" / "models" / "7b", hub / "anole" / "tokenizer" / "vqgan.ckpt", hub / "drafter"],
        "janus": [hub / "Janus", hub / "janus_drafter"],
    }[family]


@pytest.fixture(scope="module")
def lumina(hub, tmp_path_factory) -> bundle.Bundle:
    place = tmp_path_factory.mktemp("models") / "lumina"
    convert("lumina-mgpt", [*sources(hub, "lumina-mgpt"), hub / "drafter"], place, pixels=64)
    return cj.load(place)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "length"), [("lumina-mgpt", 21), ("anole", 16), ("janus", 16)])
def test_from_files_to_pictures_by_every_method(hub, tmp_path, family, length):
    config = convert(family, sources(hub, family), tmp_path / "model", pixels=64)
    if family == "lumina-mgpt":
        config = merge(tmp_path / "model", hub / "drafter")
        assert config.cascade == {"tau_pos": 0.95, "tau_seq": 0.925} and config.target.style == "lumina"
    model = cj.load(tmp_path / "model")
    assert model.length == length and model.config == bundle.read_config(tmp_path / "model")
    prompts, key, tree = ["!AB,", "A(CB)D"], jax.random.key(3), parse("0 1 00")
    greedy = bundle.default_sampling(config).replace(temperature=0.0)
    alone = cj.generate(model, prompts, key, tree=cj.trees.ROOT, sampling=greedy)
    naive = cj.generate(model, prompts, key, tree=tree, sampling=greedy)
    np.testing.assert_array_equal(naive.tokens, alone.tokens)
    np.testing.assert_array_equal(naive.images, alone.images)
    assert alone.images.shape == (2, 64, 64, 3) and alone.tokens.shape == (2, length)
    cascade = methods.method("cascade", model, tree=tree)
    relaxed = cj.generate(model, prompts, key, rule=cascade.rule, tree=tree)
    free = np.array(model.layout.forced) < 0 if model.layout else np.ones(length, bool)
    np.testing.assert_array_equal(relaxed.tokens[:, ~free], alone.tokens[:, ~free])
    assert np.all(relaxed.tokens[:, free] < oracles.CODES) and relaxed.images.shape == (2, 64, 64, 3)
    logits = cj.score(model, prompts, alone.tokens).logits
    assert logits.shape == (2, length, oracles.CODES) and bool(jnp.all(jnp.isfinite(logits)))


@pytest.mark.parametrize(
    ("name", "tree"),
    [("lantern", "0 1 00"), ("lantern++", "0 1 00"), ("gsd", "0 1 00"), ("lantern", DynamicTree(2, 1, 4))],
)
def test_every_rule_keeps_to_a_layout(hub, lumina, name, tree):
    """Lumina-mGPT's marks have no neighbours: LANTERN's table has a row for every code, and for them alone."""
    prompts, key = ["!AB,", "A(CB)D"], jax.random.key(3)
    method = methods.method(name, lumina, tree=tree)
    if name != "gsd":
        assert len(method.rule.neighbours) == oracles.CODES
    drawn = cj.generate(lumina, prompts, key, rule=method.rule, tree=method.tree)
    forced = np.array(lumina.layout.forced)
    np.testing.assert_array_equal(drawn.tokens[:, forced >= 0], np.stack([forced[forced >= 0]] * 2))
    assert np.all(drawn.tokens[:, forced < 0] < oracles.CODES)
    assert np.all(drawn.stats.accepted > 0)


def test_what_is_missing_is_named(hub, tmp_path):
    with pytest.raises(ConvertError, match="needs its vq too"):
        convert("lumina-mgpt", [hub / "Lumina-mGPT-7B-64"], tmp_path / "model", pixels=64)
    with pytest.raises(ConvertError, match="--pixels 512, 768 or 1024"):
        convert("lumina-mgpt", sources(hub, "lumina-mgpt"), tmp_path / "model")
    with pytest.raises(ConvertError, match="multiple of 32"):
        convert("lumina-mgpt", sources(hub, "lumina-mgpt"), tmp_path / "model", pixels=80)
    with pytest.raises(ConvertError, match="no part of janus: it looks like Chameleon"):
        convert("janus", sources(hub, "lumina-mgpt"), tmp_path / "model")
    lonely = published.write_pickle(tmp_path / "alone" / "consolidated.00.pth", meta(shared_norms(oracles.chameleon())))
    with pytest.raises(ConvertError, match="text_tokenizer"):
        bare = published.write_pickle(tmp_path / "alone" / "vqgan.ckpt", published.vqgan(**SMALL), "state_dict")
        convert("anole", [lonely, bare], tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_vocabulary_beside_the_vqgan_serves_a_model_without_one(hub, tmp_path):
    lonely = published.write_pickle(tmp_path / "7b" / "consolidated.00.pth", meta(shared_norms(oracles.chameleon())))
    convert("anole", [lonely, sources(hub, "anole")[1]], tmp_path / "model")
    assert (tmp_path / "model" / "text" / "tokenizer.json").is_file()


def test_the_name_tells_fine_tunes_of_one_architecture_apart(hub, tmp_path):
    lumina = convert("auto", sources(hub, "lumina-mgpt"), tmp_path / "model", pixels=64)
    anole = convert("chameleon", sources(hub, "anole"), tmp_path / "model", pixels=64)
    assert (lumina.target.style, anole.target.style) == ("lumina", "anole")


def test_a_text_tokenizer_that_is_missing_or_damaged_is_named(tmp_path):
    config = chameleon.preset("anole-7b")
    with pytest.raises(bundle.BundleError, match="lacks its text tokenizer"):
        tokens.reader(tmp_path / "tokenizer.json", config)(["a ball"])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(bundle.BundleError, match="damaged"):
        tokens.reader(tmp_path / "tokenizer.json", config)(["a ball"])


def test_luminas_size_is_in_the_repositorys_name_and_not_in_a_revision(hub, tmp_path):
    snapshot = tmp_path / "models--Alpha-VLLM--Lumina-mGPT-7B-768" / "snapshots" / "9c512ab7d0"
    shutil.copytree(hub / "Lumina-mGPT-7B-64", snapshot)
    for path in (snapshot, snapshot.parents[1]):
        assert planned(LUMINA.formats[0], open_source(path), Known({})).config.rows == 768 // 16
    said: list[str] = []
    planned(LUMINA.formats[0], open_source(snapshot), Known({}, 512, said.append))
    assert said == [f"warning: {snapshot} draws 768 pixels a side by its name, and it is told to draw 512"]


def test_luminas_head_may_be_its_embedding(hub, tmp_path):
    tensors = {name: np.array(x.read()) for name, x in open_source(hub / "Lumina-mGPT-7B-64").tensors.items()}
    del tensors["lm_head.weight"], tensors[CODES]
    settings = json.loads((hub / "Lumina-mGPT-7B-64" / "config.json").read_text()) | {"tie_word_embeddings": True}
    folder = published.write_folder(tmp_path / "Lumina", tensors, settings)
    target = oracles.module(LUMINA.formats[0], folder, Known({}, 64))
    own = np.asarray(target.embedding[...])[np.asarray(target.code_ids[...])]
    np.testing.assert_array_equal(target.head.kernel[...], own.T)


def test_metas_whole_download_is_one_source_and_its_params_are_compared(hub, tmp_path):
    """models/7b beside tokenizer, as Anole's repository has them."""
    config = convert("anole", [hub / "anole"], tmp_path / "model")
    assert config.target.style == "anole" and (tmp_path / "model" / "text" / "tokenizer.json").is_file()
    own = pathlib.Path(shutil.copytree(hub / "anole", tmp_path / "anole"))
    (own / "models" / "7b" / "params.json").write_text(json.dumps({"model": {"n_layers": 3}}))
    with pytest.raises(ConvertError, match=r"params\.json says n_layers 3 where the tensors have 2"):
        convert("anole", [own], tmp_path / "other")


def test_pictures_are_as_large_as_januss_settings_say(hub):
    assert planned(FAMILY.formats[1], open_source(hub / "Janus"), Known({})).config.grid == 4
    with pytest.raises(ConvertError, match=r"config\.json says pictures of 64 pixels a side, not 128"):
        planned(FAMILY.formats[1], open_source(hub / "Janus"), Known({}, 128))


def test_a_model_without_its_text_tokenizer_is_warned_of(hub, tmp_path):
    own = pathlib.Path(shutil.copytree(hub / "Janus", tmp_path / "Janus"))
    (own / "tokenizer.json").unlink()
    said: list[str] = []
    convert("janus", [own], tmp_path / "model", say=said.append)
    assert "has no text tokenizer (tokenizer.json or text_tokenizer.json) beside it" in said[0]


def test_a_drafter_with_an_embedding_of_its_own_drafts_for_janus(hub, tmp_path):
    weights = published.chameleon_drafter(dim=32, heads=4, kv_heads=4, ffn=48, vocab=oracles.CODES, qk_norm=False)
    folder = published.write_folder(tmp_path / "drafter", weights, published.JANUS_DRAFTER_SETTINGS)
    convert("janus", [hub / "Janus", folder], tmp_path / "model")
    model = cj.load(tmp_path / "model", jnp.float32)
    drafter, target = model.merged("drafter"), model.merged("target")
    np.testing.assert_array_equal(drafter.embed(jnp.arange(64), target), weights["embed_tokens.weight"])
    drawn = cj.generate(model, ["!AB,"], jax.random.key(3), tree=cj.trees.chain(1))
    assert drawn.images.shape == (1, 64, 64, 3) and np.all(drawn.tokens < oracles.CODES)


# Full size: every tensor of the published models has its place. Shapes are transformers' own, without memory.


def published_shapes(model) -> Source:
    tensors = {name: Tensor(tuple(x.shape), np.dtype(np.float32), None) for name, x in model.state_dict().items()}
    return Source(pathlib.Path("published"), (), tensors, {})


def test_lumina_at_full_size_fits_the_table():
    import transformers

    with torch.device("meta"):
        config = transformers.ChameleonConfig(vocabulary_map={"<image>": 8711, "IMGIMGAZ": 4})
        source = published_shapes(transformers.ChameleonForConditionalGeneration(config))
    source.tensors[CODES] = Tensor((8192,), np.dtype(np.int32), None)
    layout, target = ANOLE.formats[0], chameleon.preset("anole-7b")
    assert len(plan(layout.rules(target), bundle.shapes("target", target), source, layout.skip)) == 4 + 32 * 10
    encoder = {name[len("model.vqmodel.") :]: t for name, t in source.tensors.items() if "vqmodel" in name}
    shapes = {path: shape for path, shape in bundle.shapes("vq", CHAMELEON).items() if not path.startswith("decoder")}
    assert plan(VQGAN.rules(CHAMELEON), shapes, Source(source.path, (), encoder, {})).keys() == shapes.keys()


@pytest.mark.parametrize("size", ["1B", "7B"])
def test_janus_at_full_size_fits_the_tables(size):
    import transformers

    target = janus.preset(size)
    text = transformers.LlamaConfig(
        vocab_size=102400,
        hidden_size=target.dim,
        intermediate_size=target.ffn_dim,
        num_hidden_layers=target.layers,
        num_attention_heads=target.heads,
        num_key_value_heads=target.heads,
    )
    vision = transformers.JanusVisionConfig(projection_dim=target.dim, depth=2)
    vq = transformers.JanusVQVAEConfig(
        projection_dim=target.dim, image_token_embed_dim=target.dim, num_embeddings=16384, num_hidden_layers=2
    )
    with torch.device("meta"):
        config = transformers.JanusConfig(text_config=text, vision_config=vision, vq_config=vq)
        source = published_shapes(transformers.JanusForConditionalGeneration(config))
    for layout, part, own in ((FAMILY.formats[1], "target", target), (FAMILY.formats[3], "vq", JANUS)):
        shapes = bundle.shapes(part, own)
        assert plan(layout.rules(own), shapes, source, layout.skip).keys() == shapes.keys()
