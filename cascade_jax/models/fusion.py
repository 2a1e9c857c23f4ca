"""One transformer over text and picture tokens of a common vocabulary (early fusion): Chameleon, and kin of Qwen and
Gemma whose vocabulary was continued by the codes of a picture tokenizer.

Only the head's rows of picture tokens are kept, in the order of the codes: while a picture is drawn nothing else can
follow. A drawn token is a code or, beyond the last code, one of the marks that some models put between codes; marks
are forced where they belong (`layout`), so they need no logits.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cascade_jax.cache import Context, Segment
from cascade_jax.decode import Prefix
from cascade_jax.models.prompt import LONG_PROMPT, Prompt, TokenRows, stack_tokens, text_tokens, token_prefix
from cascade_jax.models.transformer import Block, Linear, RMSNorm, rope_1d, run_target, to_logits


class FusionConfig:
    """What configurations of such models have in common; each is a frozen dataclass that says the rest.

    Attributes:
      first_code: text token of the first code; the other codes follow.
      marks: text tokens that the drawn tokens past the codes stand for.
      opening: text tokens between a prompt and the first drawn token.
      layout: what may stand where among the drawn tokens; None: any code.
      embedding_scale: what embeddings are multiplied by; None for nothing.
      unguided: what the unconditional branch reads in place of a prompt, text tokens.
    """

    marks, layout, embedding_scale = (), None, None

    @property
    def condition_slots(self) -> int:
        """Text has no fixed length; long prompts have about as many slots."""
        return LONG_PROMPT

    @property
    def table_rows(self) -> int:
        """Rows of a table that a drafter embeds tokens by, see `EarlyFusion.table_row`."""
        return self.vocab_size

    @property
    def picture_places(self) -> dict[str, int]:
        """Codes follow the text in one line."""
        return {}

    @property
    def cascade(self) -> dict:
        """The paper's thresholds are the usual ones."""
        return {}

    def check_codes(self) -> None:
        """Raises a ValueError if the vocabulary ends before the last code."""
        if self.first_code + self.codebook_size > self.vocab_size:
            last = self.first_code + self.codebook_size - 1
            raise ValueError(
                f"a vocabulary of {self.vocab_size} lacks picture tokens: the codes are {self.first_code} to {last}"
            )

    def stack(self, prompts: Sequence[Prompt]) -> TokenRows:
        """What stands before the first drawn token: a prompt, or `unguided`, and the opening; prompts may end with the
        opening already. The branches' lengths differ."""
        opening = np.array(self.opening, np.int32)

        def opened(ids: np.ndarray) -> np.ndarray:
            done = np.array_equal(ids[len(ids) - len(opening) :], opening)
            return ids if done else np.concatenate([ids, opening])

        conditional = [opened(text_tokens(prompt)) for prompt in prompts]
        return stack_tokens(conditional, [opened(np.array(self.unguided, np.int32))] * len(prompts))


class RasterConfig(FusionConfig):
    """What those have in common that draw a square picture, its codes in raster order with nothing between them.

    Attributes:
      grid: codes per side of the picture.
      begin: text token that begins a prompt.
      image_start: text token that ends it.
    """

    @property
    def length(self) -> int:
        """Drawn tokens of a picture."""
        return self.grid**2

    @property
    def opening(self) -> tuple[int, ...]:
        """Text tokens between a prompt and the first code."""
        return (self.image_start,)

    def blank(self) -> Prompt:
        """A prompt without meaning, as long as a usual one."""
        return Prompt(ids=np.array([self.begin] * 30 + [self.image_start], np.int32))

    def codes(self, tokens: jax.Array) -> jax.Array:
        """VQ codes int [B, grid, grid] of drawn tokens int [B, length]."""
        return tokens.reshape(-1, self.grid, self.grid)


class EarlyFusion(nnx.Module):
    """The transformer. Features are the outputs of the last norm; `logits` maps them to the codes."""

    linear_head = True

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, config.dim)) * 0.02)
        self.blocks = nnx.List([Block(config.block, rngs) for _ in range(config.layers)])
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Linear(config.dim, config.codebook_size, rngs=rngs)

    @property
    def dtype(self):
        return self.embedding.dtype

    def table_row(self, tokens: jax.Array) -> jax.Array:
        """The text tokens int [...] that drawn tokens int [...] are."""
        ids = self.config.first_code + tokens
        if not self.config.marks:
            return ids
        codes, marks = self.config.codebook_size, jnp.array(self.config.marks, jnp.int32)
        return jnp.where(tokens < codes, ids, marks[jnp.maximum(tokens - codes, 0)])

    def scaled(self, embeddings: jax.Array) -> jax.Array:
        """Rows of the table [..., d] as the first block takes them; the factor is rounded to their type, as Gemma's."""
        scale = self.config.embedding_scale
        return embeddings if scale is None else embeddings * jnp.asarray(scale, embeddings.dtype)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Drawn tokens int [...] to embeddings [..., d]."""
        return self.scaled(self.embedding[...][self.table_row(tokens)])

    def prefix(self, rows: TokenRows, guided: bool, drafter: nnx.Module | None = None) -> Prefix:
        """What stands before the first drawn token, from the configuration's `stack`."""
        return token_prefix(self.embedding[...], rows, guided, drafter, self.scaled)

    def rope(self, positions: jax.Array) -> jax.Array:
        """Rotary cosines and sines [..., D/2, 2] of slots int [...]."""
        block = self.config.block
        return rope_1d(positions, block.head_dim, self.config.rope_base, block.rotary)

    def __call__(
        self, x: jax.Array, context: Context, past: tuple[Segment, ...] = (), taps: tuple[int, ...] = ()
    ) -> tuple[jax.Array, Segment]:
        """Embeddings [R, S, d] to features, see `run_target`, and the new tokens' keys and values."""
        return run_target(self.blocks, self.norm, x, context, past, taps)

    def logits(self, features: jax.Array) -> jax.Array:
        """Features [..., d] to float32 logits [..., codebook_size], in the order of the codes."""
        return to_logits(features, self.head.kernel[...])
