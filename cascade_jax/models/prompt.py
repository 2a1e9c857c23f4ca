"""Prompts as a target takes them in, and what stands before the first drawn token."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from cascade_jax.decode import Prefix

LONG_PROMPT = 128  # slots that are reckoned with where memory is planned
STRIDE = 32  # prefixes of similar lengths share a compiled program


@struct.dataclass
class Prompt:
    """A prompt that is already encoded.

    Attributes:
      ids: int [] for a class-conditional model; int [n], text tokens, for a model that reads text itself; else None.
      features: float [C, caption_dim], what the text encoder made of a caption; None for a class or text tokens.
      mask: bool [C] or [n], false at padding; None where there is none.
    """

    ids: jax.Array | None = None
    features: jax.Array | None = None
    mask: jax.Array | None = None


@struct.dataclass
class TokenRows:
    """Text tokens in front of the pictures, conditional rows first, then as many unconditional ones.

    Attributes:
      ids: int [2 B, P], 0 behind a row's end.
      length: int [2 B].
    """

    ids: jax.Array
    length: jax.Array


def text_tokens(prompt: Prompt) -> np.ndarray:
    """A prompt's text tokens int [n] without padding.

    Raises:
      ValueError: if it has none.
    """
    if prompt.ids is None or np.ndim(prompt.ids) != 1:
        raise ValueError("this model takes prompts as text, or as text tokens: Prompt(ids=[...])")
    ids = np.asarray(prompt.ids, np.int32)
    ids = ids if prompt.mask is None else ids[np.asarray(prompt.mask, bool)]
    if not len(ids):
        raise ValueError("the prompt has no tokens")
    return ids


def stack_tokens(conditional: Sequence[np.ndarray], unconditional: Sequence[np.ndarray]) -> TokenRows:
    """Rows of tokens int [n] side by side; both branches have as many rows."""
    rows = [*conditional, *unconditional]
    length = np.array([len(row) for row in rows], np.int32)
    ids = np.zeros((len(rows), -(-int(length.max()) // STRIDE) * STRIDE), np.int32)
    for slots, row in zip(ids, rows):
        slots[: len(row)] = row
    return TokenRows(ids, length)


def token_prefix(
    table: jax.Array,
    rows: TokenRows,
    guided: bool,
    drafter: nnx.Module | None,
    scaled: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> Prefix:
    """The prefix of both branches, or of the conditional one alone, by a table of embeddings [vocabulary, d], which are
    `scaled`.

    A drafter sees the same tokens, by its own table if it has one.
    """
    ids, length = (x if guided else x[: x.shape[0] // 2] for x in (rows.ids, rows.length))
    x = scaled(table[ids])
    own = getattr(drafter, "embedding", None)
    return Prefix(x, x if own is None else own[...][ids].astype(x.dtype), jnp.asarray(length))
