"""Janus-Pro (Chen et al. 2025, arXiv 2501.17811), the side that draws.

A Llama reads the prompt. VQ codes enter it through an embedding of the codebook's width and a small aligner, and leave
it through a head of their own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from cascade_jax import mesh
from cascade_jax.cache import Context, Segment
from cascade_jax.decode import Prefix
from cascade_jax.models.prompt import LONG_PROMPT, Prompt, TokenRows, stack_tokens, text_tokens, token_prefix
from cascade_jax.models.transformer import Block, BlockConfig, Linear, RMSNorm, rope_1d, run_target, to_logits


@dataclass(frozen=True)
class JanusConfig:
    """Sizes of a Janus-Pro model.

    Attributes:
      grid: codes per side of the picture.
      code_dim: width of a code's embedding before the aligner.
      head_width: width of the head's hidden layer; None for `dim`.
      begin: text token that begins a sequence.
      image_start: text token `<begin_of_image>`.
      pad: text token that stands for every word of the prompt in the unconditional branch.
    """

    dim: int
    layers: int
    heads: int
    ffn_dim: int
    grid: int = 24
    kv_heads: int | None = None
    codebook_size: int = 16384
    code_dim: int = 8
    head_width: int | None = None
    vocab_size: int = 102400
    norm_eps: float = 1e-6
    rope_base: float = 10000.0
    begin: int = 100000
    image_start: int = 100016
    pad: int = 100002

    def __post_init__(self):
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")

    @property
    def block(self) -> BlockConfig:
        """The decoder block's sizes."""
        head_dim = self.dim // self.heads
        return BlockConfig(
            self.dim, self.heads, self.kv_heads or self.heads, head_dim, self.ffn_dim, self.norm_eps, rope="half"
        )

    @property
    def length(self) -> int:
        """Drawn tokens of a picture."""
        return self.grid**2

    @property
    def layout(self) -> None:
        """Any code may stand anywhere."""
        return None

    @property
    def condition_slots(self) -> int:
        """Text has no fixed length; long prompts have about as many slots."""
        return LONG_PROMPT

    @property
    def table_rows(self) -> int:
        """Rows of a table that a drafter embeds tokens by, see `table_row`."""
        return self.codebook_size

    @property
    def picture_places(self) -> dict[str, int]:
        """Codes follow the text in one line."""
        return {}

    @property
    def sampling(self) -> dict:
        """The authors' settings."""
        return {"temperature": 1.0, "guidance": 5.0}

    @property
    def cascade(self) -> dict:
        """The paper's thresholds are the usual ones."""
        return {}

    def read(self, encode: Callable[[str], Sequence[int]], text: str) -> Prompt:
        """The prompt of a caption as the model was trained on it; `encode` is the text tokenizer, adding nothing."""
        text = f"<|User|>: {text.strip()}\n\n<|Assistant|>:"
        return Prompt(ids=np.array([self.begin, *encode(text), self.image_start], np.int32))

    def blank(self) -> Prompt:
        """A prompt without meaning, as long as a usual one."""
        return Prompt(ids=np.array([self.begin] * 30 + [self.image_start], np.int32))

    def stack(self, prompts: Sequence[Prompt]) -> TokenRows:
        """What stands before the first drawn token. The unconditional branch keeps the first and the last token and
        pads those between, which it sees like any other."""
        conditional = []
        for prompt in prompts:
            ids = text_tokens(prompt)
            started = ids[-1] == self.image_start
            conditional.append(ids if started else np.append(ids, np.int32(self.image_start)))
        unconditional = [np.full_like(ids, self.pad) for ids in conditional]
        for padded, ids in zip(unconditional, conditional):
            padded[[0, -1]] = ids[[0, -1]]
        return stack_tokens(conditional, unconditional)

    def codes(self, tokens: jax.Array) -> jax.Array:
        """VQ codes int [B, grid, grid] of drawn tokens int [B, length]."""
        return tokens.reshape(-1, self.grid, self.grid)


class Mlp(nnx.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, in_dim: int, hidden: int, out_dim: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(in_dim, hidden, use_bias=True, rngs=rngs)
        self.fc2 = Linear(hidden, out_dim, use_bias=True, rngs=rngs)

    def hidden(self, x: jax.Array) -> jax.Array:
        """The activations between the two."""
        return jax.nn.gelu(self.fc1(x), approximate=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.hidden(x))


class Janus(nnx.Module):
    """The transformer. Features are the outputs of the last norm; `logits` maps them to the VQ codes."""

    linear_head = False

    def __init__(self, config: JanusConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.text_embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, config.dim)) * 0.02)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (config.codebook_size, config.code_dim)))
        self.aligner = Mlp(config.code_dim, config.dim, config.dim, rngs=rngs)
        self.blocks = nnx.List([Block(config.block, rngs) for _ in range(config.layers)])
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Mlp(config.dim, config.head_width or config.dim, config.codebook_size, rngs=rngs)

    @property
    def dtype(self):
        return self.text_embedding.dtype

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Codes int [...] to embeddings [..., d]."""
        return self.aligner(self.embedding[...][tokens])

    def table_row(self, tokens: jax.Array) -> jax.Array:
        """The rows of a drafter's embedding table that stand for codes int [...]."""
        return tokens

    def prefix(self, rows: TokenRows, guided: bool, drafter: nnx.Module | None = None) -> Prefix:
        """What stands before the first drawn token, from `JanusConfig.stack`.

        Codes and text have no table in common: a drafter's own is one of codes, and text is read by the target's.
        """
        del drafter
        return token_prefix(self.text_embedding[...], rows, guided, None)

    def rope(self, positions: jax.Array) -> jax.Array:
        """Rotary cosines and sines [..., D/2, 2] of slots int [...]."""
        return rope_1d(positions, self.config.block.head_dim, self.config.rope_base)

    def __call__(
        self, x: jax.Array, context: Context, past: tuple[Segment, ...] = (), taps: tuple[int, ...] = ()
    ) -> tuple[jax.Array, Segment]:
        """Embeddings [R, S, d] to features, see `run_target`, and the new tokens' keys and values."""
        return run_target(self.blocks, self.norm, x, context, past, taps)

    def logits(self, features: jax.Array) -> jax.Array:
        """Features [..., d] to float32 logits [..., codebook_size]."""
        last = self.head.fc2
        logits = to_logits(mesh.whole(self.head.hidden(features)), last.kernel[...])
        return logits + last.bias[...].astype(logits.dtype)


_PRESETS = {
    "1B": JanusConfig(dim=2048, layers=24, heads=16, ffn_dim=5632),
    "7B": JanusConfig(dim=4096, layers=30, heads=32, ffn_dim=11008),
}


def preset(size: str) -> JanusConfig:
    """The published configurations: Janus-Pro-1B and -7B."""
    if size not in _PRESETS:
        raise ValueError(f"unknown Janus-Pro size {size!r}; known: {', '.join(_PRESETS)}")
    return _PRESETS[size]
