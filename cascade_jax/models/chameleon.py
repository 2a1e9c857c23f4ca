"""Chameleon (arXiv 2405.09818), which draws as Lumina-mGPT (arXiv 2408.02657) or as Anole (arXiv 2407.06135).

One transformer over text and image tokens of a common vocabulary (`models.fusion`). Queries and keys are normalised per
head before they are rotated. Lumina-mGPT's marks are the newline after every row and the end of the picture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cascade_jax.models.fusion import EarlyFusion, FusionConfig
from cascade_jax.models.prompt import Prompt
from cascade_jax.models.transformer import BlockConfig
from cascade_jax.sampling import Layout

PIXELS = 16  # a code's side


@dataclass(frozen=True)
class ChameleonConfig(FusionConfig):
    """Sizes of a Chameleon transformer, and how it draws.

    Attributes:
      style: "lumina" (a size in front of the picture, a newline after every row, an end) or "anole" (codes alone).
      rows: codes per column of the picture.
      columns: codes per row of the picture.
      begin: text token that begins a sequence, `<s>`.
      turn: text token that ends the prompt, `<reserved08706>`.
      image_start: text token, `<racm3:break>`.
      image_end: text token, `<eoss>`.
      newline: text token, `<reserved08799>`.
      size: text token that stands for a length of 0 pixels, `<reserved08800>`; every further one is 32 pixels more.
    """

    dim: int
    layers: int
    heads: int
    ffn_dim: int
    style: str = "lumina"
    rows: int = 48
    columns: int = 48
    kv_heads: int | None = None
    codebook_size: int = 8192
    vocab_size: int = 65536
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    begin: int = 0
    turn: int = 8710
    image_start: int = 8197
    image_end: int = 8196
    newline: int = 8803
    size: int = 8804

    def __post_init__(self):
        if self.style not in ("lumina", "anole"):
            raise ValueError(f'style must be "lumina" or "anole", not {self.style!r}')
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        if self.style == "lumina" and (self.rows % 2 or self.columns % 2):
            raise ValueError(f"Lumina-mGPT's pictures are multiples of 32 pixels, not {self.columns}x{self.rows} codes")

    @property
    def block(self) -> BlockConfig:
        """The decoder block's sizes, which the published drafters share."""
        head_dim = self.dim // self.heads
        kv_heads = self.kv_heads or self.heads
        return BlockConfig(
            self.dim, self.heads, kv_heads, head_dim, self.ffn_dim, self.norm_eps, rope="half", qk_norm=True
        )

    @property
    def length(self) -> int:
        """Drawn tokens of a picture."""
        return len(self.layout.forced) if self.layout else self.rows * self.columns

    @cached_property
    def layout(self) -> Layout | None:
        """Lumina-mGPT's marks among the drawn tokens: one past the codes is the newline, two past them the end."""
        if self.style == "anole":
            return None
        row = (-1,) * self.columns + (self.codebook_size,)
        return Layout(row * self.rows + (self.codebook_size + 1,), free_tokens=self.codebook_size)

    @property
    def marks(self) -> tuple[int, ...]:
        """Text tokens that the drawn tokens past the codes stand for."""
        return (self.newline, self.image_end) if self.style == "lumina" else ()

    @property
    def opening(self) -> tuple[int, ...]:
        """Text tokens between a prompt and the first drawn token."""
        if self.style == "anole":
            return (self.image_start,)
        return (self.image_start, self.size + self.rows // 2, self.size + self.columns // 2)

    @property
    def unguided(self) -> tuple[int, ...]:
        """Without a prompt the opening stands alone, for Anole behind the token that begins a sequence."""
        return (self.begin,) if self.style == "anole" else ()

    @property
    def sampling(self) -> dict:
        """The paper's settings."""
        return {"temperature": 1.0, "top_k": 2000, "guidance": 3.0}

    @property
    def cascade(self) -> dict:
        """The paper's thresholds."""
        return {"tau_pos": 0.95, "tau_seq": 0.925} if self.style == "lumina" else {}

    def read(self, encode: Callable[[str], Sequence[int]], text: str) -> Prompt:
        """The prompt of a caption as the model was trained on it; `encode` is the text tokenizer, adding nothing."""
        if self.style == "lumina":
            size = f"{self.columns * PIXELS}x{self.rows * PIXELS}"
            text = f"Generate an image of {size} according to the following prompt:\n{text}"
        return Prompt(ids=np.array([self.begin, *encode(text), self.turn], np.int32))

    def blank(self) -> Prompt:
        """A prompt without meaning, as long as a usual one."""
        return Prompt(ids=np.array([self.begin] * 30 + [self.turn], np.int32))

    def codes(self, tokens: jax.Array) -> jax.Array:
        """VQ codes int [B, rows, columns] of drawn tokens int [B, length]."""
        if self.style == "anole":
            return tokens.reshape(-1, self.rows, self.columns)
        return tokens[:, :-1].reshape(-1, self.rows, self.columns + 1)[:, :, :-1]


class Chameleon(EarlyFusion):
    """The transformer; the text tokens of the codes stand in no order."""

    def __init__(self, config: ChameleonConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.code_ids = nnx.Variable(4 + jnp.arange(config.codebook_size, dtype=jnp.int32))  # a code's text token

    def table_row(self, tokens: jax.Array) -> jax.Array:
        """The text tokens int [...] that drawn tokens int [...] are."""
        return jnp.concatenate([self.code_ids[...], jnp.array(self.config.marks, jnp.int32)])[tokens]


_7B = ChameleonConfig(dim=4096, layers=32, heads=32, ffn_dim=11008)
_PRESETS = {
    "lumina-mgpt-7b-512": replace(_7B, rows=32, columns=32),
    "lumina-mgpt-7b-768": _7B,
    "lumina-mgpt-7b-1024": replace(_7B, rows=64, columns=64),
    "anole-7b": replace(_7B, style="anole", rows=32, columns=32),
}


def preset(name: str) -> ChameleonConfig:
    """The published configurations: lumina-mgpt-7b-512, -768 or -1024, and anole-7b."""
    if name not in _PRESETS:
        raise ValueError(f"unknown Chameleon model {name!r}; known: {', '.join(_PRESETS)}")
    return _PRESETS[name]


def code_ids(vocabulary: dict[str, int]) -> np.ndarray:
    """Every VQ code's text token, int32 [codes], by the tokens' names: IMGIMG, the code's digits as letters A-J, Z.

    Raises:
      ValueError: if the names do not number the codes from 0 without a gap.
    """
    digits = str.maketrans("ABCDEFGHIJ", "0123456789")
    found = {}
    for name, token in vocabulary.items():
        if name.startswith("IMGIMG") and name.endswith("Z") and (code := name[6:-1].translate(digits)).isdigit():
            found[int(code)] = token
    if sorted(found) != list(range(len(found))) or not found:
        raise ValueError(f"the vocabulary does not name the image tokens of all VQ codes: {len(found)} found")
    return np.array([found[code] for code in range(len(found))], np.int32)
