"""SimpleAR (Wang et al. 2025, arXiv 2504.11455): a Qwen2.5 whose vocabulary goes on with Cosmos' codes.

Codes follow the prompt in raster order, with nothing between them. What is drawn is guided away from a description of
bad pictures, which is the unconditional branch's prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cascade_jax.models.fusion import RasterConfig
from cascade_jax.models.prompt import Prompt
from cascade_jax.models.transformer import BlockConfig

# How the authors' script begins every caption, and what it guides away from.
PRAISE = "A highly realistic image of "
FLAWS = (
    "An image of aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, "
    "bad eyes, bad limbs, distortion"
)


@dataclass(frozen=True)
class SimpleARConfig(RasterConfig):
    """Sizes of a SimpleAR model.

    Attributes:
      grid: codes per side of the picture.
      first_code: text token of code 0; the other codes follow it.
      begin: text token that begins a prompt, `<|t2i|>`.
      image_start: text token that ends it, `<|soi|>`.
      flaws: what the picture is guided away from, text tokens; without any, the prompt is empty, as in training.

    Raises:
      ValueError: if heads leave a remainder, or the vocabulary ends before the last code.
    """

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn_dim: int
    grid: int = 64
    codebook_size: int = 64000
    vocab_size: int = 215672
    first_code: int = 151672
    norm_eps: float = 1e-6
    rope_base: float = 1e6
    begin: int = 151665
    image_start: int = 151667
    flaws: tuple[int, ...] = ()

    def __post_init__(self):
        if self.dim % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"dim {self.dim} is not a multiple of heads {self.heads}, or these of key heads {self.kv_heads}"
            )
        self.check_codes()

    @property
    def block(self) -> BlockConfig:
        """The decoder block's sizes."""
        head_dim = self.dim // self.heads
        return BlockConfig(
            self.dim, self.heads, self.kv_heads, head_dim, self.ffn_dim, self.norm_eps, rope="half", qkv_bias=True
        )

    @property
    def unguided(self) -> tuple[int, ...]:
        """What the unconditional branch reads in place of a prompt."""
        return (self.begin, *self.flaws)

    @property
    def sampling(self) -> dict:
        """The authors' settings; they cut no code off."""
        return {"temperature": 1.0, "guidance": 6.0}

    def read(self, encode: Callable[[str], Sequence[int]], text: str) -> Prompt:
        """The prompt of a caption as the authors put it; `encode` is the text tokenizer, adding nothing."""
        return Prompt(ids=np.array([self.begin, *encode(PRAISE + text), self.image_start], np.int32))


_PRESETS = {
    "0.5B": SimpleARConfig(dim=896, layers=24, heads=14, kv_heads=2, ffn_dim=4864),
    "1.5B": SimpleARConfig(dim=1536, layers=28, heads=12, kv_heads=2, ffn_dim=8960),
}


def preset(size: str) -> SimpleARConfig:
    """The published configurations: 0.5B and 1.5B."""
    if size not in _PRESETS:
        raise ValueError(f"unknown SimpleAR size {size!r}; known: {', '.join(_PRESETS)}")
    return _PRESETS[size]
