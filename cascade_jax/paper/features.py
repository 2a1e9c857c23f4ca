"""The paper's figures of the target alone: how alike its features are, and how sure it is of its tokens."""

from typing import Any

import jax
import numpy as np

from cascade_jax import methods as by_name
from cascade_jax import pipeline
from cascade_jax.methods import AR
from cascade_jax.paper import figures, traces
from cascade_jax.paper.confidence import Confidence, confidence
from cascade_jax.paper.lab import Lab, Result


def figure_3(lab: Lab) -> Result:
    """Similarity of the target's features within rows of the picture."""
    images, features = _own_pictures(lab)
    rows = [traces.similarity_rows(own, _width(lab)) for own in features]
    pages = {"figure3.png": figures.draw_rows(images, rows)}
    content = {"pictures": [_likeness(*each) for each in zip(lab.texts, images, rows)]}
    return Result("figure3", "Figure 3: similarity of features within rows", content, pages=pages)


def figure_9(lab: Lab) -> Result:
    """Similarity of the target's features over the full sequence and within the last row; figure 10 is the same."""
    images, features = _own_pictures(lab)
    rows = [traces.similarity_rows(own, _width(lab)) for own in features]
    every = [traces.similarity(own) for own in features]
    pages = {"figure9.png": figures.draw_sequences(images, every, rows)}
    found = [_likeness(*each) for each in zip(lab.texts, images, rows)]
    for own, whole, last in zip(found, every, rows):
        own |= {"mean_cosine": float(_off_diagonal(whole[None]).mean())}
        own |= {"mean_cosine_last_row": float(_off_diagonal(last[-1:]).mean())}
    content = {"pictures": found}
    return Result("figure9", "Figure 9: similarity of features over the full sequence", content, pages=pages)


def figure_8(lab: Lab) -> Result:
    """How sure the target is of its tokens."""
    tokens, images = _token_by_token(lab)
    sampling, places = lab.checked_sampling, traces.places(lab.bundle)
    each = [confidence(lab.bundle, [text], own[None], sampling) for text, own in zip(lab.texts, tokens)]
    found = Confidence(*(np.concatenate([getattr(own, name) for own in each]) for name in ("entropy", "top1")))
    codes = lab.bundle.config.vq.codebook_size
    pages = {"figure8.png": figures.draw_confidence(found, images, places, codes)}
    quantiles = (0.05, 0.25, 0.5, 0.75, 0.95)
    content = {"codes": codes, "largest_entropy": float(np.log(codes)), "quantiles": quantiles}
    for name in ("entropy", "top1"):
        values = getattr(found, name)[:, places]
        own = {"mean": float(values.mean()), "quantiles": [float(x) for x in np.quantile(values, quantiles)]}
        content[name] = own | {"mean_by_row": [float(x) for x in values.mean(axis=(0, 2))]}
    return Result("figure8", "Figure 8: how sure the target is of its tokens", content, pages=pages)


def _token_by_token(lab: Lab) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int [B, L] and pictures uint8 [B, H, W, 3] that the target draws on its own."""
    progress = None
    if lab.progress is not None:
        progress = lambda done, total: lab.progress("drawing", done, total)
    ar = by_name.method(AR, lab.bundle)
    drawn = by_name.draw_all(lab.bundle, ar, lab.texts, lab.seed, lab.checked_sampling, progress, lab.batch)
    whole = jax.tree.map(lambda *parts: np.concatenate(parts), *(batch for _, batch in drawn))
    return whole.tokens, whole.images


def _own_pictures(lab: Lab) -> tuple[np.ndarray, list[np.ndarray]]:
    """Pictures that the target draws on its own, and its features [H W, h] at the codes of each, one at a time."""
    tokens, images = _token_by_token(lab)
    places = traces.places(lab.bundle).ravel()
    features = []
    for text, own in zip(lab.texts, tokens):
        scored = pipeline.score(lab.bundle, [text], own[None])
        features.append(np.asarray(scored.features[0].astype(np.float32))[places])
    return images, features


def _width(lab: Lab) -> int:
    return traces.places(lab.bundle).shape[1]


def _likeness(text: str, image: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    """How far the similarity of features within rows [H, W, W] goes with that of the colours that were drawn there."""
    height, width, _ = rows.shape
    side = image.shape[0] // height
    patches = image[: height * side, : width * side].reshape(height, side, width, side, 3)
    colours = patches.mean(axis=(1, 3))
    distance = np.linalg.norm(colours[:, :, None] - colours[:, None], axis=-1)
    cosine, apart = _off_diagonal(rows), _off_diagonal(distance)
    return {
        "prompt": text,
        "mean_cosine_within_rows": float(cosine.mean()),
        "mean_cosine_of_neighbours": float(rows[:, np.arange(width - 1), np.arange(1, width)].mean()),
        "correlation_with_colour_distance": float(np.corrcoef(cosine, apart)[0, 1]) if apart.std() > 0 else None,
    }


def _off_diagonal(matrices: np.ndarray) -> np.ndarray:
    """What stands above the diagonals of [M, n, n], flat."""
    return matrices[:, *np.triu_indices(matrices.shape[-1], 1)].ravel()
