"""Emu3-Gen (arXiv 2409.18869) and Emu3.5-Image (arXiv 2510.26583): next-token prediction over text and picture codes.

A Llama over one vocabulary (`models.fusion`), of which the codes are the last part, in their order. Emu3.5's queries
and keys are normalised per head, as Qwen3's. The marks are the end of a row and, in place of the last row's, Emu3.5's
end of the picture. What Emu3 writes behind the last row is always the same, and is not drawn.
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

# What the authors' script for pictures puts behind every caption, and what it guides away from.
PRAISE = " masterpiece, film grained, best quality."
FLAWS = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)


@dataclass(frozen=True)
class Emu3Config(FusionConfig):
    """Sizes of an Emu3 transformer, and how it draws.

    Attributes:
      style: "emu3" (a caption with praise, guided away from flaws) or "emu3.5" (a task in words).
      rows: codes per column of the picture.
      columns: codes per row of the picture.
      qk_norm: whether queries and keys are normalised per head, by a root mean square.
      first_code: text token of code 0; the other codes follow it.
      begin: text token that begins a sequence.
      turn: text token that ends Emu3.5's prompt.
      image_start: text token in front of the picture's size.
      image: text token between the size and the first code.
      image_end: text token behind Emu3.5's last code.
      newline: text token behind a row.
      zero: text token of the digit 0; the other digits follow it.
      times: text token between the two lengths of the size.
      unguided: what the unconditional branch reads in place of a prompt, text tokens, see `unconditional`.

    Raises:
      ValueError: for another style, heads that do not share the key heads, or a vocabulary without all codes.
    """

    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    style: str = "emu3"
    rows: int = 90
    columns: int = 90
    codebook_size: int = 32768
    vocab_size: int = 184622
    norm_eps: float = 1e-5
    rope_base: float = 1e6
    qk_norm: bool = False
    first_code: int = 151854
    begin: int = 151849
    turn: int = 151746
    image_start: int = 151852
    image: int = 151851
    image_end: int = 151853
    newline: int = 151846
    zero: int = 15
    times: int = 9
    unguided: tuple[int, ...] = (151849,)

    def __post_init__(self):
        if self.style not in ("emu3", "emu3.5"):
            raise ValueError(f'style must be "emu3" or "emu3.5", not {self.style!r}')
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not share {self.kv_heads} key heads")
        self.check_codes()

    @property
    def block(self) -> BlockConfig:
        """The decoder block's sizes."""
        return BlockConfig(
            self.dim,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.ffn_dim,
            self.norm_eps,
            rope="half",
            qk_norm=self.qk_norm,
            qk_rms=self.qk_norm,
        )

    @property
    def length(self) -> int:
        """Drawn tokens of a picture."""
        return self.rows * (self.columns + 1)

    @cached_property
    def layout(self) -> Layout:
        """The marks among the drawn tokens: one past the codes ends a row, two past them the picture."""
        forced = ((-1,) * self.columns + (self.codebook_size,)) * self.rows
        if self.style == "emu3.5":
            forced = (*forced[:-1], self.codebook_size + 1)
        return Layout(forced, free_tokens=self.codebook_size)

    @property
    def marks(self) -> tuple[int, ...]:
        """Text tokens that the drawn tokens past the codes stand for."""
        return (self.newline, self.image_end) if self.style == "emu3.5" else (self.newline,)

    @property
    def opening(self) -> tuple[int, ...]:
        """Text tokens between a prompt and the first drawn token: the size in codes, height first."""
        rows, columns = ([self.zero + int(digit) for digit in str(n)] for n in (self.rows, self.columns))
        return (self.image_start, *rows, self.times, *columns, self.image)

    @property
    def sampling(self) -> dict:
        """The authors' settings for pictures of text."""
        if self.style == "emu3.5":
            return {"temperature": 1.0, "top_k": 5120, "guidance": 5.0}
        return {"temperature": 1.0, "top_k": 2048, "guidance": 3.0}

    def read(self, encode: Callable[[str], Sequence[int]], text: str) -> Prompt:
        """The prompt of a caption as the authors put it; `encode` is the text tokenizer, adding nothing."""
        if self.style == "emu3.5":
            asked = encode(f"You are a helpful assistant for t2i task. USER: {text} ASSISTANT: ")
            return Prompt(ids=np.array([self.begin, *asked, self.turn], np.int32))
        return Prompt(ids=np.array([self.begin, *encode(text + PRAISE)], np.int32))

    def unconditional(self, encode: Callable[[str], Sequence[int]]) -> tuple[int, ...]:
        """`unguided` as the authors have it: by flaws, or the task without a caption; `encode` as of `read`."""
        if self.style == "emu3.5":
            return (self.begin, *encode("You are a helpful assistant. USER:  ASSISTANT: "), self.turn)
        return (self.begin, *encode(FLAWS))

    def blank(self) -> Prompt:
        """A prompt without meaning, as long as a usual one."""
        return Prompt(ids=np.full(30, self.begin, np.int32))

    def codes(self, tokens: jax.Array) -> jax.Array:
        """VQ codes int [B, rows, columns] of drawn tokens int [B, length]."""
        return tokens.reshape(-1, self.rows, self.columns + 1)[:, :, :-1]


_PRESETS = {
    "emu3-gen-8b": Emu3Config(dim=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn_dim=14336),
    "emu3.5-image-34b": Emu3Config(
        dim=5120,
        layers=64,
        heads=64,
        kv_heads=8,
        head_dim=128,
        ffn_dim=25600,
        style="emu3.5",
        rows=64,
        columns=64,
        codebook_size=131072,
        vocab_size=282926,
        qk_norm=True,
    ),
}


def preset(name: str) -> Emu3Config:
    """The published configurations: emu3-gen-8b, and emu3.5-image-34b."""
    if name not in _PRESETS:
        raise ValueError(f"unknown Emu3 model {name!r}; known: {', '.join(_PRESETS)}")
    return _PRESETS[name]
