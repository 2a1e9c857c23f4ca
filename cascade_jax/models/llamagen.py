"""LlamaGen: a Llama-style transformer over VQ codes (Sun et al. 2024, arXiv 2406.06525), class- or text-conditional.

A picture of g x g codes is generated in raster order after a condition prefix of `C` slots: caption features through a
small MLP, or one class embedding. Positions are slots: 0 ... C-1 the condition, C + i the i-th code. Rotary embedding
is two-dimensional (half of a head turns with the code's row, half with its column), and the condition slots' cosines
AND sines are zero, so their queries and keys vanish: every token attends to all of them with the score 0. The
published weights were trained that way.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cascade_jax.cache import Context, Segment
from cascade_jax.decode import Prefix
from cascade_jax.models.prompt import Prompt
from cascade_jax.models.transformer import Block, BlockConfig, Linear, RMSNorm, rope_2d, rope_at, run_target, to_logits


@dataclass(frozen=True)
class LlamaGenConfig:
    """Sizes of a LlamaGen transformer. `classes` is None for a text-conditional model.

    `condition_places` lets the condition slots stand somewhere in the picture, each at a row and a column, like a code
    there, instead of taking away their queries and keys as the published models do. Then a code can choose what it
    reads of the condition, and sees how far away it is.
    """

    dim: int
    layers: int
    heads: int
    image_tokens: int = 256
    vocab_size: int = 16384
    condition_tokens: int = 120
    caption_dim: int = 2048
    classes: int | None = None
    kv_heads: int | None = None
    ffn_multiple: int = 256
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    condition_places: tuple[tuple[float, float], ...] | None = None

    def __post_init__(self):
        if self.grid**2 != self.image_tokens:
            raise ValueError(f"image_tokens must be a square number, not {self.image_tokens}")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        if self.condition_places is not None:
            if len(self.condition_places) != self.condition_tokens:
                raise ValueError(f"{self.condition_tokens} condition slots have {len(self.condition_places)} places")
            # As tuples, also from JSON: configurations are hashed.
            object.__setattr__(self, "condition_places", tuple(tuple(place) for place in self.condition_places))

    @property
    def grid(self) -> int:
        """Codes per side of the picture."""
        return int(round(self.image_tokens**0.5))

    @property
    def block(self) -> BlockConfig:
        """The decoder block's sizes: feed-forward width int(8 dim / 3) rounded up to a multiple of 256."""
        ffn = -(-int(2 * 4 * self.dim / 3) // self.ffn_multiple) * self.ffn_multiple
        head_dim = self.dim // self.heads
        return BlockConfig(self.dim, self.heads, self.kv_heads or self.heads, head_dim, ffn, self.norm_eps)

    @property
    def length(self) -> int:
        """Drawn tokens of a picture."""
        return self.image_tokens

    @property
    def layout(self) -> None:
        """Any code may stand anywhere."""
        return None

    @property
    def codebook_size(self) -> int:
        """Codes that it draws."""
        return self.vocab_size

    @property
    def condition_slots(self) -> int:
        """Slots in front of the first code."""
        return self.condition_tokens

    @property
    def table_rows(self) -> int:
        """Rows of a table that a drafter embeds tokens by, see `table_row`."""
        return self.vocab_size

    @property
    def picture_places(self) -> dict[str, int]:
        """The drafter's codes stand in rows and columns too, one slot earlier."""
        return {"grid": self.grid, "condition_slots": self.condition_tokens - 1}

    def blank(self) -> Prompt:
        """A prompt without meaning."""
        if self.classes is not None:
            return Prompt(ids=jnp.int32(0))
        return Prompt(features=jnp.zeros((self.condition_tokens, self.caption_dim)))

    def stack(self, prompts: Sequence[Prompt]) -> Prompt:
        """Classes int [B], or caption features [B, C, caption_dim] and their mask [B, C]."""
        return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves]), *prompts)

    def codes(self, tokens: jax.Array) -> jax.Array:
        """VQ codes int [B, grid, grid] of drawn tokens int [B, length]."""
        return tokens.reshape(-1, self.grid, self.grid)

    @cached_property
    def rope_table(self) -> np.ndarray:
        """[C + image_tokens, head_dim / 2, 2]: cosine and sine by slot; zeros at condition slots without a place."""
        head_dim = self.dim // self.heads
        table = rope_2d(self.grid, head_dim, self.condition_tokens, self.rope_base)
        if self.condition_places is not None:
            table[: self.condition_tokens] = rope_at(np.array(self.condition_places), head_dim, self.rope_base)
        return table


class CaptionEmbedder(nnx.Module):
    """Caption features [.., C, caption_dim] to condition embeddings [.., C, dim]; a learned unconditional caption."""

    def __init__(self, config: LlamaGenConfig, rngs: nnx.Rngs):
        shape = (config.condition_tokens, config.caption_dim)
        self.unconditional = nnx.Param(jax.random.normal(rngs.params(), shape) * config.caption_dim**-0.5)
        self.fc1 = Linear(config.caption_dim, config.dim, rngs=rngs)
        self.fc2 = Linear(config.dim, config.dim, rngs=rngs)

    def __call__(self, features: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(features), approximate=True))


class LlamaGen(nnx.Module):
    """The transformer. Features are the outputs of the last norm; `logits` maps them to the code vocabulary."""

    linear_head = True

    def __init__(self, config: LlamaGenConfig, *, rngs: nnx.Rngs):
        self.config = config
        if config.classes is None:
            self.caption = CaptionEmbedder(config, rngs)
        else:
            self.label = nnx.Param(jax.random.normal(rngs.params(), (config.classes + 1, config.dim)) * 0.02)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, config.dim)) * 0.02)
        self.blocks = nnx.List([Block(config.block, rngs) for _ in range(config.layers)])
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Linear(config.dim, config.vocab_size, std=0.0, rngs=rngs)

    @property
    def dtype(self):
        return self.embedding.dtype

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Codes int [...] to embeddings [..., d]."""
        return self.embedding[...][tokens]

    def table_row(self, tokens: jax.Array) -> jax.Array:
        """The rows of a drafter's embedding table that stand for codes int [...]."""
        return tokens

    def condition(self, prompt: jax.Array) -> jax.Array:
        """Caption features [B, C, caption_dim], or class labels int [B], to condition embeddings [B, C, d]."""
        if self.config.classes is None:
            return self.caption(prompt.astype(self.dtype))
        return self.label[...][prompt][:, None]

    def unconditional(self, batch: int) -> jax.Array:
        """The guidance branch's condition embeddings [B, C, d]."""
        if self.config.classes is None:
            caption = self.caption.unconditional[...]
            return self.condition(jnp.broadcast_to(caption, (batch, *caption.shape)))
        return self.condition(jnp.full((batch,), self.config.classes))

    def prefix(self, prompt: Prompt, guided: bool, drafter: nnx.Module | None = None) -> Prefix:
        """What stands before the first drawn token, from `LlamaGenConfig.stack`.

        The caption's mask holds for the unconditional branch too: so LlamaGen was trained and is sampled. LlamaGen's
        drafters see the embedding of token 0 at the condition's slots.
        """
        x = self.condition(prompt.ids if prompt.features is None else prompt.features)
        holes = None if prompt.mask is None else ~prompt.mask
        if guided:
            x = jnp.concatenate([x, self.unconditional(x.shape[0])])
            holes = None if holes is None else jnp.concatenate([holes, holes])
        zero = jnp.zeros((), jnp.int32)
        filler = self.embed(zero) if drafter is None else drafter.embed(zero, self)
        # a drafter's embeddings may be narrower
        filler = jnp.broadcast_to(filler.astype(x.dtype), (*x.shape[:-1], filler.shape[-1]))
        return Prefix(x, filler, jnp.full(x.shape[0], x.shape[1], jnp.int32), holes)

    def rope(self, positions: jax.Array) -> jax.Array:
        """Rotary cosines and sines [..., D/2, 2] of slots int [...]; slots past the picture's end read the last one."""
        return jnp.asarray(self.config.rope_table)[jnp.minimum(positions, len(self.config.rope_table) - 1)]

    def __call__(
        self, x: jax.Array, context: Context, past: tuple[Segment, ...] = (), taps: tuple[int, ...] = ()
    ) -> tuple[jax.Array, Segment]:
        """Embeddings [R, S, d] to features, see `run_target`, and the new tokens' keys and values."""
        return run_target(self.blocks, self.norm, x, context, past, taps)

    def logits(self, features: jax.Array) -> jax.Array:
        """Features [..., d] to float32 logits [..., vocab_size]."""
        return to_logits(features, self.head.kernel[...])


_T2I = {
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1280, 36, 20),
    "XXL": (1536, 48, 24),
    "XXXL": (2560, 48, 40),
    "1B": (2048, 22, 32),
    "3B": (3200, 24, 32),
    "7B": (4096, 32, 32),
}


def preset(size: str, *, image_tokens: int = 256, classes: int | None = None) -> LlamaGenConfig:
    """The published configurations: size B, L, XL, XXL, XXXL, 1B, 3B or 7B; `classes` makes it class-conditional."""
    if size not in _T2I:
        raise ValueError(f"unknown LlamaGen size {size!r}; known: {', '.join(_T2I)}")
    dim, layers, heads = _T2I[size]
    config = LlamaGenConfig(dim, layers, heads, image_tokens=image_tokens)
    return config if classes is None else replace(config, classes=classes, condition_tokens=1)
