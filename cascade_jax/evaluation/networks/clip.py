"""How well pictures fit their captions: the cosine of CLIP's vectors (Hessel et al. 2021, arXiv 2104.08718).

    scorer = load("models/clip")
    scorer.scores(images, texts)  # [B]

The score of Hessel et al. is 2.5 max(cosine, 0); the CASCADE paper reports cosines, and so does this. Pictures and
captions are prepared as CLIP's own code does it: the shorter side bicubic to 224 pixels, the square in the middle,
normalised; captions by CLIP's byte-pair encoding, cut at 77 tokens.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from cascade_jax import bundle
from cascade_jax.evaluation.metrics.metric import stacks
from cascade_jax.models.clip import CLIP, CLIPConfig, normalise
from cascade_jax.text.tokens import open_tokenizer
from cascade_jax.training.data import fingerprint

BATCH = 32


@dataclasses.dataclass(frozen=True)
class Scorer:
    """CLIP, and the tokenizer that belongs to it.

    Attributes:
      graph, state: of a `models.clip.CLIP`.
      config: its sizes.
      tokenizer: of the `tokenizers` library; it puts start and end around a caption.
      digest: of the network's parameters.
    """

    graph: nnx.GraphDef
    state: nnx.State
    config: CLIPConfig
    tokenizer: Any
    digest: str = ""

    def scores(
        self,
        images: Iterable[np.ndarray],
        texts: Sequence[str],
        *,
        batch: int = BATCH,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Cosines [B] of pictures, uint8 [H, W, 3] of any sizes, and their own captions.

        Args:
          batch: pictures at once.
          progress: called with (pictures done, pictures in all).

        Raises:
          ValueError: if there are not as many pictures as captions.
        """
        ids = self.tokens(texts)
        done: list[np.ndarray] = []
        for prepared in stacks((prepare(image, self.config.image_size) for image in images), batch):
            own = ids[len(done) : len(done) + len(prepared)]
            if len(own) < len(prepared):
                raise ValueError(f"there are more pictures than captions ({len(texts)}): each needs its own")
            missing = batch - len(prepared)  # all batches have one size, so that one program serves them all
            filled = [np.concatenate([rows, *[rows[-1:]] * missing]) for rows in (prepared, own)]
            done.extend(np.asarray(_cosines(self.graph, self.state, *filled))[: len(prepared)])
            if progress is not None:
                progress(len(done), len(texts))
        if len(done) < len(texts):
            raise ValueError(f"there are {len(texts)} captions and {len(done)} pictures: each needs its own")
        return np.array(done)

    def tokens(self, texts: Sequence[str]) -> np.ndarray:
        """Captions as ids int32 [B, positions], cut to fit; behind the end token stand more of it."""
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.config.positions)
        ids = np.full((len(texts), self.config.positions), self.config.end_token, np.int32)
        for row, found in enumerate(self.tokenizer.encode_batch(list(texts))):
            ids[row, : len(found.ids)] = found.ids
        return ids


def load(directory: str | os.PathLike) -> Scorer:
    """The CLIP in a converted directory.

    Raises:
      ValueError: if it holds none, or no tokenizer.
    """
    network = bundle.load_metric(directory)
    if not isinstance(network, CLIP):
        raise ValueError(f"{directory} is no CLIP: make one with cascade-jax convert clip")
    tokenizer = open_tokenizer(pathlib.Path(directory) / "text" / "tokenizer.json")
    graph, state = nnx.split(network)
    return Scorer(graph, state, network.config, tokenizer, fingerprint(state)[:16])


def prepare(image: np.ndarray, size: int) -> np.ndarray:
    """A picture uint8 [H, W, 3] as the square that CLIP looks at, uint8 [size, size, 3]; not yet normalised."""
    height, width, _ = image.shape
    short = min(height, width)
    wide, high = (size * width // short, size * height // short)
    resized = np.asarray(Image.fromarray(image).resize((wide, high), Image.Resampling.BICUBIC))
    top, left = (high - size) // 2, (wide - size) // 2
    return resized[top : top + size, left : left + size]


@jax.jit(static_argnums=0)
def _cosines(graph: nnx.GraphDef, state: nnx.State, images: jax.Array, ids: jax.Array) -> jax.Array:
    return nnx.merge(graph, state).cosines(normalise(images.astype(jnp.float32) / 255), ids)
