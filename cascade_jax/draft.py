"""Drafting: a drafter proposes a tree of tokens, and remembers what became of it.

A drafter is three pure functions over a memory that nobody else looks into (`Drafter`): it starts one when the prefix
has been read, proposes a tree from it, and observes what the target made of the tree. `drafters` holds those that come
with the package.

Shapes: `B` sequences, `G` guidance branches, `R = G B` rows (branch-major), `P` prefix slots, `N` nodes, `M` inner
nodes, `V` tokens, `D` depth.
"""

import dataclasses
from typing import Any, Protocol

import jax
from flax import struct

from cascade_jax.cache import Prefix
from cascade_jax.sampling import Layout, Sampling
from cascade_jax.tree import DynamicTree, Topology, Tree


@struct.dataclass
class Draft:
    """A tree of draft tokens.

    Attributes:
      tokens: int [B, N], the root's first; -1 at nodes that do not exist.
      probs: [B, M, V], at every inner node the distribution its children were drawn from; None for point masses.
      topology: a dynamic tree's topology with a leading B; None for a static tree.
    """

    tokens: jax.Array
    probs: jax.Array | None
    topology: Topology | None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a draft.

    Attributes:
      draft: what was proposed.
      path: int [B, D + 1], the accepted nodes from the root down; behind the last of them the root again.
      accepted: int [B], number of accepted drafts.
      emitted: int [B, D + 1], their tokens and, behind the last, the bonus token; what follows means nothing.
      kept: int [B], how many of these became part of the output: `accepted` + 1, fewer at a picture's end, 0 in rows
        that were complete before.
      features: [R, N, ...], what the drafter reads of the target's pass, at every node (see `Drafter.taps`).
      laws: [B, N, V], the target's distributions behind every node, if the drafter `reads_laws`; else None.
      keys: [B], random keys for what the drafter draws of its own accord.
      position: int [B], the output position that the root's children stood at.
    """

    draft: Draft
    path: jax.Array
    accepted: jax.Array
    emitted: jax.Array
    kept: jax.Array
    features: jax.Array
    laws: jax.Array | None
    keys: jax.Array
    position: jax.Array


class Drafter(Protocol):
    """An NNX module, perhaps without parameters, that proposes drafts.

    Attributes:
      memory: the class of its memory: a struct whose fields are marked by `mesh.by_row`, arrays with leading R, or
        `mesh.by_sequence`, with leading B.
      taps: the target's layers that it reads in place of the target's features; () for the features.
      reads_laws: whether it observes the target's distributions behind all nodes.

    One that drafts only so many levels has that number as `depth`, and so has its configuration.
    """

    memory: type
    taps: tuple[int, ...]
    reads_laws: bool

    def start(
        self,
        target,
        tree: Tree | DynamicTree,
        prefix: Prefix,
        features: jax.Array,
        first: jax.Array,
        slots: int,
        layout: Layout | None = None,
    ) -> Any:
        """The memory after the prefix was read.

        Args:
          target: the target module.
          tree: what will be proposed.
          features: [R, P, ...], what it reads of the target's pass over the prefix.
          first: int [B], the first token of the output, the root of the first tree.
          slots: how many tokens the target's cache has room for.
          layout: what may stand where.
        """

    def propose(
        self,
        target,
        tree: Tree | DynamicTree,
        memory: Any,
        keys: jax.Array,
        sampling: Sampling,
        position: jax.Array,
        layout: Layout | None = None,
        noise: jax.Array | None = None,
    ) -> tuple[Draft, Any]:
        """A tree of drafts behind the last token that it observed, and the memory after that.

        Args:
          target: the target module, for its embedding and head.
          tree: static (children are drawn without replacement) or dynamic (the likeliest tokens).
          keys: a random key for every sequence, [B].
          sampling: the target's sampling settings.
          position: int [B], output position of the root's children.
          layout: what may stand where.
          noise: [B, D + 1, V], what the target's tokens at `position` and behind it are drawn with (see
            `sampling.position_noise`); None where its random numbers are fresh. A drafter that draws with it drafts
            what the target draws as often as can be.
        """

    def observe(self, target, memory: Any, outcome: Outcome) -> Any:
        """The memory after the target has judged the tree."""


class Trainable(Drafter, Protocol):
    """A drafter whose parameters `training` can find.

    Its configuration has a class method `for_target(target, ahead)`: the sizes of a new one for a target of these
    sizes, that is to look so many tokens ahead.

    Attributes:
      standard: what its public code trains on: settings of `training.drafter.Objective` that are not the usual ones.
    """

    standard: dict[str, Any]

    def embed(self, tokens: jax.Array, target) -> jax.Array:
        """Drawn tokens int [...] to the embeddings [..., d] that it takes in."""

    def ahead(
        self,
        embeddings: jax.Array,
        features: jax.Array,
        steps: int,
        remat: bool = False,
        anchors: jax.Array | None = None,
    ) -> list[jax.Array]:
        """Estimates [R, S - 1, d] of what the target says, from every slot of a sequence at once.

        The i-th is, at slot s, what drafts the token at slot s + 2 + i, of a drafter that knows the tokens up to slot
        s + 1 and the features up to slot s: a chain of i drafts, which are the sequence's own tokens. At a sequence's
        end tokens run out; what is there is not looked at.

        Args:
          embeddings: [R, S, d], what stands at every slot.
          features: [R, S - 1, ...], what it reads of the target's pass, see `taps`.
          steps: how many.
          remat: compute activations again in the backward pass.
          anchors: int [R, A], the slots from which it looks further than one token: all estimates but the first are
            [R, A, d]. None for all slots. Never given unless `Objective.anchors` is.
        """

    def logits(self, estimates: jax.Array, target) -> jax.Array:
        """Estimates [..., d] to float32 logits [..., V]."""

    def linear_head(self, target) -> bool:
        """Whether `logits` is a linear map."""
