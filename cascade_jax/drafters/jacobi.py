"""Jacobi self-speculation: no drafter at all, the target's own earlier guesses are the drafts.

Behind the output stands a window of L drafts, and with each the law that it was drawn from. A step runs the target over
the root and the window, and every position gets a new law, that of the target given the drafts before it. Accepted
drafts leave the window; the positions behind them are drawn anew from their new laws, and the end is filled by a guess.

- SJD (Teng et al. 2024, arXiv 2410.01699): every position behind a rejection is drawn afresh.
- SCD (arXiv 2510.24211) couples the draws: a draft x of law p whose new law is p' stays with probability
  min(1, p'(x) / p(x)), and is otherwise drawn from [p' - p]_+. Its law is p' either way, and drafts settle.
- SJD-PAC (Kang et al. 2026, arXiv 2603.18599): besides that, the first position has several candidates. Where one
  that the window does not continue is accepted, the positions behind it keep what was drawn for them.

All are lossless under the strict rule. Let F be everything that was drawn for the positions before t, in all steps.
Every law that position t ever has, the target's own in the end too, is a function of F, and so is the step in which the
position is decided: the first in which all before it are accepted. Given F, each redraw takes the draft from one law to
the next, so the draft has its last law when it is decided; that is all that verification asks for. Hence random numbers
must never be shared between positions, and a draft's law must be the last one even where the draft stayed.

Shapes: `B` sequences, `N` nodes, `L` drafts of the window, `K` candidates for its first position, `V` tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from cascade_jax import mesh, passes
from cascade_jax.cache import Prefix
from cascade_jax.draft import Draft, Outcome
from cascade_jax.sampling import Layout, Sampling, columns, distinct, draw
from cascade_jax.tree import DynamicTree, Tree, window

GUESSES = ("uniform", "repeat", "above")


@struct.dataclass
class Window:
    """What the drafter remembers between steps.

    Attributes:
      tokens: int [B, T], by output position: the output so far, and the window behind it.
      laws: [B, L, V], what the window's drafts were drawn from. For 64 drafts of 8,192 codes these are 2 MiB a
        sequence.
      known: int [B], the window's drafts that stand; those behind them are yet to be guessed.
    """

    tokens: jax.Array = mesh.by_sequence()
    laws: jax.Array = mesh.by_sequence()
    known: jax.Array = mesh.by_sequence()


class Jacobi(nnx.Module):
    """A `draft.Drafter` without parameters; its tree is a `tree.window`.

    Attributes:
      guess: what the end of the window is filled with: "uniform" draws; "repeat", the token before the end; "above",
        the token one row up the picture. The last two are point masses; where there is no such token, and where the
        layout forces another, the guess is a uniform draw of those allowed.
      coupled: whether redraws are coupled, so that a draft stays where it can.
      row: output positions from a token to the one above it, for "above".
    """

    memory = Window
    taps = ()
    reads_laws = True

    def __init__(self, guess: str = "uniform", coupled: bool = False, row: int | None = None):
        if guess not in GUESSES:
            raise ValueError(f"guess must be one of {', '.join(GUESSES)}, not {guess!r}")
        if guess == "above" and (row is None or row < 1):
            raise ValueError("to guess the token above, the drafter must know how many positions a row has: give row")
        self.guess, self.coupled, self.row = guess, coupled, row

    def start(
        self,
        target,
        tree: Tree | DynamicTree,
        prefix: Prefix,
        features: jax.Array,
        first: jax.Array,
        slots: int,
        layout: Layout | None = None,
    ) -> Window:
        """An empty window; see `draft.Drafter`."""
        del prefix, features
        _check(tree)
        vocab, batch = columns(passes.vocab(target), layout), first.shape[0]
        return Window(
            tokens=jnp.zeros((batch, slots), jnp.int32).at[:, 0].set(first),
            laws=jnp.zeros((batch, tree.depth, vocab)),
            known=jnp.zeros(batch, jnp.int32),
        )

    def propose(
        self,
        target,
        tree: Tree | DynamicTree,
        memory: Window,
        keys: jax.Array,
        sampling: Sampling,
        position: jax.Array,
        layout: Layout | None = None,
        noise: jax.Array | None = None,
    ) -> tuple[Draft, Window]:
        """Fills the window's end and draws further candidates for its first position; see `draft.Drafter`."""
        del target, sampling, noise  # the laws are the target's own, warped as it was, and settled by its noise
        alternatives = tree.num_nodes - 1 - tree.depth
        places = position[:, None] + jnp.arange(tree.depth)
        old = jnp.take_along_axis(memory.tokens, places, axis=1)
        known = jnp.arange(tree.depth) < memory.known[:, None]
        keys = _split(keys, tree.depth + 1)
        guessed = self._guesses(memory, places, position - 1 + memory.known, layout)
        laws = jnp.where(known[..., None], memory.laws, guessed)
        drafts = jnp.where(known, old, jax.vmap(jax.vmap(draw))(keys[:, 1:], laws))
        root = jnp.take_along_axis(memory.tokens, position[:, None] - 1, axis=1)
        others = jax.vmap(_others, (0, 0, 0, None))(keys[:, 0], laws[:, 0], drafts[:, 0], alternatives)
        tokens = jnp.concatenate([root, drafts[:, :1], others, drafts[:, 1:]], axis=1)
        memory = Window(_write(memory.tokens, drafts, position), laws, jnp.full_like(memory.known, tree.depth))
        return Draft(tokens, laws, None), memory

    def observe(self, target, memory: Window, outcome: Outcome) -> Window:
        """Moves the window behind the accepted drafts and draws it anew from its new laws; see `draft.Drafter`."""
        del target
        size = memory.laws.shape[1]
        moved = (outcome.accepted + 1)[:, None]
        slots = jnp.minimum(jnp.arange(size) + moved, size)  # where the new window's drafts stood in the old
        new = outcome.laws[:, _spine(size, outcome.laws.shape[1])]  # [B, L + 1, V], one more law than there are drafts
        laws = jnp.take_along_axis(new, slots[..., None], axis=1)
        keys = jax.vmap(jax.vmap(jax.random.split))(_split(outcome.keys, size))
        if self.coupled:
            here = slots < size
            drafts = jnp.take_along_axis(memory.tokens, outcome.position[:, None] + slots, axis=1)
            before = jnp.take_along_axis(memory.laws, jnp.minimum(slots, size - 1)[..., None], axis=1)
            before = jnp.where(here[..., None], before, 0.0)
            stays = here & jax.vmap(jax.vmap(_stays))(keys[..., 0], drafts, before, laws)
            left = jnp.maximum(laws - before, 0.0)
            # by rounding alone nothing may be left where a draft goes
            left = jnp.where(jnp.any(left > 0, axis=-1, keepdims=True), left, laws)
            drafts = jnp.where(stays, drafts, jax.vmap(jax.vmap(draw))(keys[..., 1], left))
        else:
            drafts = jax.vmap(jax.vmap(draw))(keys[..., 1], laws)
        tokens = _write(memory.tokens, outcome.emitted, outcome.position)
        tokens = _write(tokens, drafts, outcome.position + moved[:, 0])
        return Window(tokens, laws, size - outcome.accepted)

    def _guesses(self, memory: Window, places: jax.Array, last: jax.Array, layout: Layout | None) -> jax.Array:
        """The laws [B, L, V] of guesses for output `places` int [B, L], if tokens up to `last` int [B] are known."""
        vocab, last = memory.laws.shape[-1], last[:, None]
        if self.guess == "uniform":
            source = jnp.full_like(places, -1)
        elif self.guess == "repeat":
            source = jnp.broadcast_to(last, places.shape)
        else:
            source = places - self.row * -(-(places - last) // self.row)
        if layout is not None and self.guess != "uniform":
            forced = np.array(layout.forced) >= 0
            at = lambda table, positions: jnp.asarray(table)[jnp.clip(positions, 0, len(forced) - 1)]
            if self.guess == "repeat":  # the last code: a mark, a newline say, says nothing of what follows
                free = np.maximum.accumulate(np.where(forced, -1, np.arange(len(forced))))
                source = at(free, source)
            source = jnp.where(at(forced, places) | at(forced, source), -1, source)
        copied = jnp.take_along_axis(memory.tokens, jnp.maximum(source, 0), axis=1)
        allowed = (source < 0)[..., None] | (copied[..., None] == jnp.arange(vocab))
        logits = jnp.where(allowed, 0.0, -jnp.inf)
        if layout is not None:
            logits = layout.constrain(logits, places)
        return jax.nn.softmax(logits, axis=-1)


def _check(tree: Tree | DynamicTree) -> None:
    if isinstance(tree, Tree) and tree.depth and tree == window(tree.depth, tree.num_nodes - tree.depth):
        return
    raise ValueError(
        "self-speculation drafts a window, a chain with further candidates beside its first draft, and no other tree"
    )


def _spine(size: int, nodes: int) -> np.ndarray:
    """The ids [L + 1] of a window's root and of its chain, of a tree of so many nodes."""
    return np.concatenate([[0, 1], np.arange(nodes - size + 1, nodes)])


def _split(keys: jax.Array, count: int) -> jax.Array:
    """`count` keys for every sequence, [B, count]."""
    return jax.vmap(lambda key: jax.random.split(key, count))(keys)


def _others(key: jax.Array, law: jax.Array, draft: jax.Array, count: int) -> jax.Array:
    """`count` further tokens drawn from a law [V] after `draft`, without replacement."""
    rest = jnp.where(jnp.arange(len(law)) == draft, -jnp.inf, jnp.log(law))
    return distinct(rest + jax.random.gumbel(key, rest.shape), count) if count else jnp.zeros(0, jnp.int32)


def _stays(key: jax.Array, draft: jax.Array, before: jax.Array, law: jax.Array) -> jax.Array:
    """Whether a draft of law `before` [V] is also the draw from `law` [V] that is coupled to it."""
    return jax.random.uniform(key) * before[draft] < law[draft]


def _write(tokens: jax.Array, new: jax.Array, position: jax.Array) -> jax.Array:
    """`tokens` int [B, T] with `new` int [B, n] from `position` int [B] on."""
    return jax.vmap(lambda row, own, at: jax.lax.dynamic_update_slice(row, own, (at,)))(tokens, new, position)
