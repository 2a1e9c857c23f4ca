"""Lumina-mGPT 2.0 (arXiv 2507.17801): Chameleon's block, trained anew over Qwen's words and MoVQGAN's codes.

One vocabulary (`models.fusion`), in which the codes follow one another. Pictures are laid out as by Lumina-mGPT: their
size in front, a newline after every row, an end; but a code is a square of 8 pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np

from cascade_jax.models.fusion import FusionConfig
from cascade_jax.models.prompt import Prompt
from cascade_jax.models.transformer import BlockConfig
from cascade_jax.sampling import Layout

PIXELS = 8  # a code's side
STEP = 32 // PIXELS  # codes by which pictures grow


@dataclass(frozen=True)
class Lumina2Config(FusionConfig):
    """Sizes of a Lumina-mGPT 2.0 transformer, and how it draws.

    Attributes:
      turn: text token that ends the prompt, `<reserved08706>`.
      rows: codes per column of the picture.
      columns: codes per row of the picture.
      first_code: text token of code 0; the other codes follow it.
      begin: text token that begins a sequence.
      image_start: text token, `<racm3:break>`.
      image_end: text token, `<eoss>`.
      newline: text token, `<reserved08799>`.
      size: text token that stands for a length of 0 pixels, `<reserved08800>`; every further one is 32 pixels more.

    Raises:
      ValueError: for heads that do not share the width, a size that no token stands for, or a vocabulary without all
        codes.
    """

    dim: int
    layers: int
    heads: int
    ffn_dim: int
    turn: int
    rows: int = 96
    columns: int = 96
    kv_heads: int | None = None
    codebook_size: int = 16384
    vocab_size: int = 171384
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    first_code: int = 155000
    begin: int = 151643
    image_start: int = 151665
    image_end: int = 151666
    newline: int = 151670
    size: int = 151671

    unguided = ()  # without a prompt the opening stands alone

    def __post_init__(self):
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        if self.rows % STEP or self.columns % STEP:
            raise ValueError(f"Lumina-mGPT's pictures are multiples of 32 pixels, not {self.columns}x{self.rows} codes")
        if self.first_code + self.codebook_size > self.vocab_size:
            last = self.first_code + self.codebook_size - 1
            raise ValueError(
                f"a vocabulary of {self.vocab_size} lacks picture tokens: the codes are {self.first_code} to {last}"
            )

    @property
    def block(self) -> BlockConfig:
        """The decoder block's sizes."""
        head_dim, kv_heads = self.dim // self.heads, self.kv_heads or self.heads
        return BlockConfig(
            self.dim, self.heads, kv_heads, head_dim, self.ffn_dim, self.norm_eps, rope="half", qk_norm=True
        )

    @property
    def length(self) -> int:
        """Drawn tokens of a picture."""
        return len(self.layout.forced)

    @cached_property
    def layout(self) -> Layout:
        """The marks among the drawn tokens: one past the codes is the newline, two past them the end."""
        row = (-1,) * self.columns + (self.codebook_size,)
        return Layout(row * self.rows + (self.codebook_size + 1,), free_tokens=self.codebook_size)

    @property
    def marks(self) -> tuple[int, ...]:
        """Text tokens that the drawn tokens past the codes stand for."""
        return self.newline, self.image_end

    @property
    def opening(self) -> tuple[int, ...]:
        """Text tokens between a prompt and the first drawn token."""
        return self.image_start, self.size + self.rows // STEP, self.size + self.columns // STEP

    @property
    def sampling(self) -> dict:
        """The authors' settings."""
        return {"temperature": 1.0, "top_k": 4096, "guidance": 4.0}

    def read(self, encode: Callable[[str], Sequence[int]], text: str) -> Prompt:
        """The prompt of a caption as the model was trained on it; `encode` is the text tokenizer, adding nothing."""
        size = f"{self.columns * PIXELS}x{self.rows * PIXELS}"
        text = f"Generate an image of {size} according to the following prompt:\n{text}"
        return Prompt(ids=np.array([self.begin, *encode(text), self.turn], np.int32))

    def blank(self) -> Prompt:
        """A prompt without meaning, as long as a usual one."""
        return Prompt(ids=np.array([self.begin] * 30 + [self.turn], np.int32))

    def codes(self, tokens: jax.Array) -> jax.Array:
        """VQ codes int [B, rows, columns] of drawn tokens int [B, length]."""
        return tokens[:, :-1].reshape(-1, self.rows, self.columns + 1)[:, :, :-1]


# Chameleon-7B's sizes, the defaults of the public code: the published config.json could not be seen, nor where the
# vocabulary has `turn`. A conversion goes by tensors and names.
_PRESETS = {"lumina-mgpt-2-7b": Lumina2Config(dim=4096, layers=32, heads=32, ffn_dim=11008, turn=151643)}


def preset(name: str) -> Lumina2Config:
    """The published configuration, lumina-mgpt-2-7b: pictures of 768 pixels a side."""
    if name not in _PRESETS:
        raise ValueError(f"unknown Lumina-mGPT 2.0 model {name!r}; known: {', '.join(_PRESETS)}")
    return _PRESETS[name]
