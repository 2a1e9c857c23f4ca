"""T5's encoder against transformers, and the way from a caption to a prompt against LlamaGen's own."""

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import sentencepiece
import torch
import transformers
from flax import nnx

from cascade_jax import bundle
from cascade_jax.models import t5 as model
from cascade_jax.text import classes, t5
from checkpoints_convert import families, sources, table
from checkpoints_convert.convert import planned, recognise
from checkpoints_convert.formats import Known

SETTINGS = dict(
    d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=40, feed_forward_proj="gated-gelu",
    relative_attention_num_buckets=8, relative_attention_max_distance=12, tie_word_embeddings=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """FLAN-T5 as it is published, but small: the whole model in shards, its settings and its tokenizer.json."""
    torch.manual_seed(0)
    whole = transformers.T5ForConditionalGeneration(transformers.T5Config(**SETTINGS))
    for p in whole.parameters():
        p.data = torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.2) + (p.ndim == 1)
    place = tmp_path_factory.mktemp("flan-t5-xl")
    whole.save_pretrained(place, max_shard_size="40KB")
    published.write_tokenizer(place / "tokenizer.json")
    assert len(list(place.glob("*.safetensors"))) > 1
    return place


@pytest.fixture(scope="module")
def encoder(folder):
    source = sources.open_source(folder)
    (layout,) = recognise(families.FAMILIES["llamagen"], source)
    assert layout.part == "text"
    part = planned(layout, source, Known({}))
    graph, state = bundle.skeleton("text", part.config)
    made = {tuple(path.split(".")): jnp.asarray(table.make(s, source.tensors)) for path, s in part.steps.items()}
    nnx.replace_by_pure_dict(state, bundle.restored_keys(bundle.nested(made)))
    return nnx.merge(graph, state)


def test_features_agree_with_transformers(folder, encoder):
    reference = transformers.T5EncoderModel.from_pretrained(folder).eval()
    ids = np.random.default_rng(0).integers(0, 40, (2, 20))
    mask = np.arange(20) < np.array([[20], [7]])
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask).long()).last_hidden_state
    found = jax.jit(lambda i, m: encoder(i, m))(jnp.asarray(ids), jnp.asarray(mask))
    # Where nobody looks, a row of padding may differ.
    np.testing.assert_allclose(np.where(mask[..., None], found, 0), np.where(mask[..., None], expected, 0), atol=1e-4)


@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 12)])
def test_distances_fall_into_the_published_buckets(buckets, most):
    from transformers.models.t5.modeling_t5 import T5Attention

    offset = torch.arange(300)[None, :] - torch.arange(300)[:, None]
    expected = T5Attention._relative_position_bucket(offset, True, buckets, most)
    np.testing.assert_array_equal(model.distance_buckets(300, buckets, most), expected)


def test_a_caption_becomes_left_padded_features_as_in_llamagens_sampler(folder, encoder):
    captions = ["A Red  ball on gravel", "a cat, " * 12]
    read = t5.reader(encoder, folder / "tokenizer.json", slots=10)
    prompts = read(captions)
    # LlamaGen's sample_t2i.py, with the tokenizer as transformers loads it
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>", eos_token="</s>"
    )
    given = words(
        [t5.clean(c) for c in captions], max_length=10, padding="max_length", truncation=True, return_tensors="pt"
    )
    reference = transformers.T5EncoderModel.from_pretrained(folder).eval()
    with torch.no_grad():
        features = reference(given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
    flipped = torch.flip(given["attention_mask"], dims=[-1])
    for prompt, feature, mask, new_mask in zip(prompts, features, given["attention_mask"], flipped):
        count = int(mask.sum())
        moved = torch.cat([feature[count:], feature[:count]]) * new_mask[:, None]
        np.testing.assert_array_equal(prompt.mask, new_mask.bool())
        np.testing.assert_allclose(prompt.features, moved, atol=1e-4)
    assert given["attention_mask"].sum(-1).tolist() == [6, 10]


def test_flan_t5_xl_has_its_published_number_of_parameters():
    shapes = bundle.shapes("text", model.T5Config())
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 1_223_527_424


def test_a_missing_tokenizer_is_named(encoder, tmp_path):
    with pytest.raises(bundle.BundleError, match="lacks its tokenizer"):
        t5.reader(encoder, tmp_path / "tokenizer.json")(["a cat"])


def test_captions_are_read_by_the_trained_tokenizer_where_there_is_no_other(encoder, folder, tmp_path):
    corpus = ["a red ball on gravel under a cloudy sky", "two small blue cubes stand on the grass at sunset"] * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(tmp_path / "spiece"), vocab_size=30, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    words = t5._tokenizer(tmp_path / "tokenizer.json", 12)
    reference = transformers.T5Tokenizer.from_pretrained(tmp_path)
    for caption in ("a red ball, on the grass", "two cubes " * 9):
        assert words(caption) == reference(caption, max_length=12, truncation=True).input_ids
    (prompt,) = t5.reader(encoder, tmp_path / "tokenizer.json", slots=12)(["a red ball"])
    assert prompt.features.shape == (12, 32)


def test_classes_are_numbers_in_range():
    read = classes.reader(5)
    assert [int(prompt.ids) for prompt in read(["3", " 0 "])] == [3, 0]
    for wrong in ("5", "cat", "-1", ""):
        with pytest.raises(ValueError, match="the number of a class, 0 to 4"):
            read([wrong])
