"""Liquid (Wu et al. 2024, arXiv 2412.04332): a Gemma whose vocabulary goes on with the codes of Chameleon's VQGAN.

Gemma's embeddings are scaled by the root of their width, its heads are wider than the model divided by their number,
and its gate is a GELU. Codes follow the prompt in raster order, with nothing between them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cascade_jax.models.fusion import RasterConfig
from cascade_jax.models.prompt import Prompt
from cascade_jax.models.transformer import BlockConfig

ASKED = " Generate an image based on this description."  # behind every caption, as in the authors' script
NOTHING = "<unconditional>"  # in place of a caption


@dataclass(frozen=True)
class LiquidConfig(RasterConfig):
    """Sizes of a Liquid model.

    Attributes:
      grid: codes per side of the picture.
      first_code: text token of code 0; the other codes follow it.
      begin: text token that begins a sequence, `<bos>`.
      image_start: text token that ends the prompt, `<boi>`.
      nothing: text tokens that stand for a caption where there is none, `<unconditional>`.

    Raises:
      ValueError: if heads do not share their keys, or the vocabulary ends before the last code.
    """

    dim: int
    layers: int
    heads: int
    head_dim: int
    ffn_dim: int
    image_start: int
    nothing: tuple[int, ...]
    kv_heads: int | None = None
    grid: int = 32
    codebook_size: int = 8192
    vocab_size: int = 264192
    first_code: int = 256000
    norm_eps: float = 1e-6
    rope_base: float = 10000.0
    begin: int = 2

    def __post_init__(self):
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"{self.heads} heads do not share {self.kv_heads} key heads")
        self.check_codes()

    @property
    def block(self) -> BlockConfig:
        """The decoder block's sizes."""
        return BlockConfig(
            self.dim,
            self.heads,
            self.kv_heads or self.heads,
            self.head_dim,
            self.ffn_dim,
            self.norm_eps,
            rope="half",
            activation="gelu",
        )

    @property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied by."""
        return self.dim**0.5

    @property
    def unguided(self) -> tuple[int, ...]:
        """What the unconditional branch reads in place of a prompt."""
        return (self.begin, *self.nothing)

    @property
    def sampling(self) -> dict:
        """The authors' settings."""
        return {"temperature": 0.99, "top_k": 4096, "top_p": 0.96, "guidance": 7.0}

    def read(self, encode: Callable[[str], Sequence[int]], text: str) -> Prompt:
        """The prompt of a caption as the model was trained on it; `encode` is the text tokenizer, adding nothing."""
        return Prompt(ids=np.array([self.begin, *encode(text + ASKED), self.image_start], np.int32))


_PRESETS = {
    "7B": LiquidConfig(dim=3072, layers=28, heads=16, head_dim=256, ffn_dim=24576, image_start=7, nothing=(8,)),
}


def preset(size: str) -> LiquidConfig:
    """The published configuration: 7B. What its two tokens are, the tokenizer says that comes with the weights."""
    if size not in _PRESETS:
        raise ValueError(f"unknown Liquid size {size!r}; known: {', '.join(_PRESETS)}")
    return _PRESETS[size]
