"""CLIP's score and everything before the network, held against `transformers`."""

import shutil

import numpy as np
import oracles
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from cascade_jax.evaluation.networks import clip as clip_score
from cascade_jax.evaluation.networks import inception as fid
from cascade_jax.models.clip import normalise
from checkpoints_convert import convert

try:  # since transformers 5 the other one needs torchvision
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

START, END, POSITIONS, SIZE = 48, 49, 10, 32
TEXTS = ["a red ball", "Balls  on LAND", "a bold deer and a lone bear in a dell on a bare land", "%"]


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Letters, letters at the end of a word, and a few pairs; 48 starts and 49 ends a caption."""
    letters = "abdelnors%"
    merges = [("a", "l"), ("al", "l</w>"), ("e", "d</w>"), ("r", "ed</w>"), ("a", "n"), ("an", "d</w>")]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges)]
    return {word: i for i, word in enumerate(words)} | {"<|startoftext|>": START, "<|endoftext|>": END}, merges


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random CLIP of `transformers` and its tokenizer, and the same converted."""
    home, model = tmp_path_factory.mktemp("clip"), oracles.clip(END)
    words, merges = vocabulary()
    tokenizer = CLIPTokenizer(vocab=words, merges=merges)
    oracles.save(model, home / "source")
    tokenizer.backend_tokenizer.save(str(home / "source" / "tokenizer.json"))
    convert("clip", [home / "source"], home / "clip")
    return model, tokenizer, clip_score.load(home / "clip"), home / "clip"


def photographs() -> list[np.ndarray]:
    """Smooth pictures of several sizes, larger and smaller than CLIP's."""
    rng = np.random.default_rng(0)
    sizes = [(64, 64), (45, 60), (61, 40), (20, 27)]
    small = [rng.integers(0, 256, (6, 6, 3), np.uint8) for _ in sizes]
    return [np.asarray(Image.fromarray(s).resize(size[::-1], Image.BICUBIC)) for s, size in zip(small, sizes)]


def processor():
    return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def test_pictures_are_prepared_as_transformers_does():
    for image in photographs():
        expected = processor()(images=Image.fromarray(image), return_tensors="np")["pixel_values"][0]
        ours = normalise(clip_score.prepare(image, SIZE) / np.float32(255))
        # float32's rounding of values of one or two
        np.testing.assert_allclose(ours, np.asarray(expected).transpose(1, 2, 0), atol=2e-6)


def test_captions_become_the_tokens_of_transformers(pair):
    _, tokenizer, scorer, _ = pair
    expected = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=POSITIONS)["input_ids"]
    found = scorer.tokens(TEXTS)
    assert found.tolist() == expected
    assert found[2, -1] == END  # it was cut
    words = {number: word for word, number in vocabulary()[0].items()}
    assert [words[number] for number in found[0][1:5]] == ["a</w>", "red</w>", "b", "all</w>"]


def test_scores_are_the_cosines_of_transformers(pair):
    model, tokenizer, scorer, _ = pair
    images = photographs()
    given = processor()(images=[Image.fromarray(image) for image in images], return_tensors="pt")
    words = tokenizer(TEXTS, padding=True, truncation=True, max_length=POSITIONS, return_tensors="pt")
    with torch.no_grad():
        logits = model(**given, **words).logits_per_image / model.logit_scale.exp()
    told = []
    scores = scorer.scores(iter(images), TEXTS, batch=3, progress=lambda *done: told.append(done))
    assert told == [(3, 4), (4, 4)]
    np.testing.assert_allclose(scores, np.diag(logits.numpy()), rtol=1e-3)
    # a tolerance that means something: another caption gives another score
    assert np.abs(scores - np.diag(np.roll(logits.numpy(), 1, axis=1))).min() > 0.01


def test_pictures_and_captions_come_in_pairs(pair):
    scorer = pair[2]
    with pytest.raises(ValueError, match=r"more pictures than captions \(1\)"):
        scorer.scores(photographs(), TEXTS[:1], batch=3)
    with pytest.raises(ValueError, match="there are 4 captions and 2 pictures"):
        scorer.scores(photographs()[:2], TEXTS, batch=3)


def test_what_is_no_clip_or_has_no_tokenizer_is_refused(pair, tmp_path):
    copy = shutil.copytree(pair[3], tmp_path / "clip", ignore=shutil.ignore_patterns("text"))
    with pytest.raises(ValueError, match="is no Inception"):
        fid.load(copy)
    with pytest.raises(ValueError, match="lacks its text tokenizer"):
        clip_score.load(copy)
