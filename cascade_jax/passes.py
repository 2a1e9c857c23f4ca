"""What the loop asks of a target: to read a prefix, to look at a tree of drafts, to keep a path of it.

The cache between these is the target's own business (`Passes`). Most targets are modules that leave it to the engine:
they map embeddings to features and to the new tokens' keys and values, and `KeyValue` does the rest. Those that bring
a cache of their own are in `targets`.

Shapes: `R` rows (guidance branches times sequences), `P` prefix slots, `N` nodes, `D` tree depth, `V` tokens.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx, struct

from cascade_jax import cache as kv
from cascade_jax.cache import Context, Prefix, Segment


@struct.dataclass
class Pass:
    """What a target makes of new tokens.

    Attributes:
      features: [R, N, h], what acceptance rules compare.
      read: [R, N, ...], what the drafter reads: the features, or other layers' outputs if it asks for these.
      said: [R, N, ...], what `Passes.logits` takes.
    """

    features: jax.Array
    read: jax.Array
    said: jax.Array


class Passes(Protocol):
    """A target as the loop sees it.

    Attributes:
      linear: whether `logits` is a linear map.
      module: what drafters are given, for its embedding and head.
      vocab: how many tokens there are logits for.
    """

    linear: bool
    module: Any
    vocab: int

    def read(self, prefix: Prefix, slots: int, taps: tuple[int, ...]) -> tuple[Pass, Any]:
        """The pass over the prefix, and a cache that holds it and has room for so many slots in all."""

    def look(
        self, cache: Any, filled: kv.Filled, tokens: jax.Array, depths: jax.Array, ancestors: jax.Array, taps
    ) -> tuple[Pass, Any]:
        """The pass over a tree's tokens int [R, N] behind a cache, and what `keep` needs of it. Nothing is written.

        Args:
          depths: int [1 or R, N].
          ancestors: bool [1 or R, N, N], which of the nodes each sees.
        """

    def keep(
        self, cache: Any, fresh: Any, length: jax.Array, path: jax.Array, kept: jax.Array, after: jax.Array
    ) -> Any:
        """The cache with a path's nodes behind its `length` [R] slots.

        Args:
          path: int [R, D + 1], nodes from the root down.
          kept: int [R], how many of them; whatever is written behind these is overwritten by the next.
          after: float [R], see `cache.write`.
        """

    def logits(self, said: jax.Array) -> jax.Array:
        """What a pass said [..., x] as float32 logits [..., V]."""


@dataclasses.dataclass(frozen=True)
class KeyValue:
    """A module (see `models.families.Target`) whose keys and values the engine keeps."""

    module: Any

    @property
    def linear(self) -> bool:
        return self.module.linear_head

    @property
    def vocab(self) -> int:
        return vocab(self.module)

    def logits(self, said: jax.Array) -> jax.Array:
        return self.module.logits(said)

    def read(self, prefix: Prefix, slots: int, taps: tuple[int, ...]) -> tuple[Pass, Segment]:
        rows, size, _ = prefix.embeddings.shape
        seen = kv.causal(size)[None]
        if prefix.holes is not None:
            seen = seen & ~prefix.holes[:, None] | jnp.eye(size, dtype=bool)
        positions = jnp.broadcast_to(jnp.arange(size), (rows, size))
        context = Context(self.module.rope(positions), kv.bias(seen)[:, None])
        features, fresh = self.module(prefix.embeddings, context, taps=taps)
        return _pass(features, taps), kv.write(kv.room(fresh, slots), fresh, jnp.zeros(rows, jnp.int32))

    def look(self, cache: Segment, filled: kv.Filled, tokens, depths, ancestors, taps) -> tuple[Pass, Segment]:
        context = Context(
            self.module.rope(filled.length[:, None] + depths),
            kv.bias(ancestors)[:, None],
            (kv.filled(kv.slots(cache), filled.length, filled.holes),),
            (filled,),
        )
        features, fresh = self.module(self.module.embed(jnp.maximum(tokens, 0)), context, (cache,), taps)
        return _pass(features, taps), fresh

    def keep(self, cache: Segment, fresh: Segment, length, path, kept, after) -> Segment:
        del kept  # what is written behind the kept nodes is overwritten before it is seen
        return kv.write(cache, fresh, length, after=after, nodes=path)


def of(target: Any, state: Any) -> Passes:
    """A program's target with its parameters.

    Args:
      target: a module's graph definition, or anything that makes a `Passes` of parameters by `bind`.
    """
    return KeyValue(nnx.merge(target, state)) if isinstance(target, nnx.GraphDef) else target.bind(state)


def vocab(module: Any) -> int:
    """How many tokens what drafters are given has logits for."""
    if hasattr(module, "vocab"):
        return module.vocab
    logits = lambda tokens: module.logits(module.embed(tokens))
    return jax.eval_shape(logits, jax.ShapeDtypeStruct((1,), jnp.int32)).shape[-1]


def split(features: jax.Array, taps: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """A pass's features [..., d] and what the drafter reads of it: the same, or the tapped outputs [..., taps d]."""
    if not taps:
        return features, features
    width = features.shape[-1] // (1 + len(taps))
    return features[..., :width], features[..., width:]


def _pass(features: jax.Array, taps: tuple[int, ...]) -> Pass:
    features, read = split(features, taps)
    return Pass(features, read, features)
