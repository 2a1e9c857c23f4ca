"""A target of one's own: two pure functions over an opaque cache, and whatever else it can do.

`forward` looks at new tokens behind a cache and writes nothing; `commit` keeps a path of them. The loop that draws by
them is the one that draws by all other targets (`Bound` is what it sees of them), so that every tree, rule, drafter and
verifier is theirs too. What not every target can do is a capability, each a protocol of its own: `Text`, `Pictures`,
`Guidance`, `Constraint`.

Both functions are of one sequence, and are mapped over a batch: no sequence can see another.

Shapes: `N` new tokens, `D` tree depth, `V` tokens, `h` width of the features, `L` tokens of the output.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cascade_jax import cache as kv
from cascade_jax import platforms
from cascade_jax.cache import Prefix
from cascade_jax.decode import Program, check_drafter
from cascade_jax.drafters.jacobi import Jacobi
from cascade_jax.models.prompt import stack_tokens
from cascade_jax.passes import Pass
from cascade_jax.sampling import FRESH, Sampling
from cascade_jax.tree import DynamicTree, Tree, named, window
from cascade_jax.verify import TRAVERSAL, WALK


@runtime_checkable
class Text(Protocol):
    """Reads and writes text; tokenizers of transformers and sentencepiece do as they are."""

    def encode(self, text: str) -> Sequence[int]:
        """A text's tokens, at least one."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of drawn tokens, cut where it ends if that is marked among them."""


@runtime_checkable
class Pictures(Protocol):
    """Makes pictures of drawn tokens; a `Bundle` does."""

    def images(self, tokens: jax.Array) -> np.ndarray:
        """Tokens int [B, L] as uint8 [B, H, W, 3]."""


@runtime_checkable
class Guidance(Protocol):
    """Knows what the other branch of classifier-free guidance reads.

    Branches are rows of the batch, each with a cache of its own; `Sampling.guidance` combines their logits.
    """

    def unconditional(self, prefix: np.ndarray) -> Sequence[int]:
        """The unconditional branch's prefix for this one, int [P]; it may be shorter or longer."""


@runtime_checkable
class Constraint(Protocol):
    """What may stand where in the output: hashable, and `sampling.Layout` is one.

    Attributes:
      forced: for every output position the only token allowed there, or -1.
    """

    forced: tuple[int, ...]

    def constrain(self, logits: jax.Array, positions: jax.Array) -> jax.Array:
        """Logits [..., V] of the tokens at output `positions` int [...], -inf at what is not allowed."""


Forward = Callable[[Any, Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, Any]]
Commit = Callable[[Any, Any, jax.Array, jax.Array], Any]


def no_cache(slots: int) -> tuple[()]:
    """The cache of a target that remembers nothing."""
    del slots
    return ()


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A target made of functions. `pipeline.generate` draws from it.

    Attributes:
      params: any pytree of arrays; whatever `forward` reads. A Flax NNX module is one.
      forward: (params, cache, tokens int [N], positions int [N], mask bool [N, N]) -> (logits [N, V], features [N, h],
        fresh). Token n stands at positions[n]; it sees all tokens in the cache, positions[0] in number, and the
        new tokens m with mask[n, m], itself among them. `fresh` is what `commit` needs of the new tokens, their keys
        and values say. The features are what relaxed rules compare and EAGLE's drafters read.
      commit: (cache, fresh, path int [n], length int []) -> cache: the same cache with the new tokens path[0], path[1],
        ... in this order behind the `length` that it holds; those from the first -1 on are not kept. They may be
        written all the same where what comes next overwrites them.
      cache: slots -> the empty cache of one sequence, arrays of any shapes. Its slots hold prefix, output and one whole
        tree behind them. The prefix is read into it by `forward`, with the causal mask, and `commit`.
      embed: (params, tokens int [...]) -> [..., h], for drafters of EAGLE's kind, which borrow the network's ends.
      head: (params, features [..., h]) -> logits [..., V], likewise.
      length: output tokens (L); `generate` may be given another number.
      sampling: its usual settings.
      text, pictures, guidance, layout: capabilities, None where it lacks one.
      drafter: what proposes drafts; None for its own guesses (`drafters.jacobi`), on a `tree.window`.

    The functions are part of the compiled program: the same functions with other parameters compile nothing.
    """

    params: Any
    forward: Forward
    commit: Commit
    cache: Callable[[int], Any] = no_cache
    _: dataclasses.KW_ONLY
    embed: Callable[[Any, jax.Array], jax.Array] | None = None
    head: Callable[[Any, jax.Array], jax.Array] | None = None
    length: int | None = None
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    text: Text | None = None
    pictures: Pictures | None = None
    guidance: Guidance | None = None
    layout: Constraint | None = None
    drafter: nnx.Module | None = None

    mesh = None  # of the engine's making: a target's own arrays lie where they lie

    def __post_init__(self):
        for name, protocol in (("text", Text), ("pictures", Pictures), ("guidance", Guidance), ("layout", Constraint)):
            own = getattr(self, name)
            if own is not None and not isinstance(own, protocol):
                asked = sorted(x for x in (*protocol.__annotations__, *vars(protocol)) if not x.startswith("_"))
                raise TypeError(
                    f"{name} is {own!r}, which lacks one of {', '.join(asked)} (targets.{protocol.__name__})"
                )

    @functools.cached_property
    def functions(self) -> "Functions":
        """What of it shapes the compiled program.

        Raises:
          TypeError, ValueError: if `forward` or `commit` return something else than they should; says what.
        """
        given = self.forward, self.commit, self.cache, self.embed, self.head
        return Functions(*given, vocab=_probed(self.forward, self.commit, self.cache, self.params))

    @property
    def usual_tree(self) -> Tree:
        """What is drafted where no tree is named."""
        own = platforms.defaults()
        if self.drafter is None:
            return window(min(own.window, self.length or own.window), 1)
        return named(own.tree)

    def drafting(self, drafter: nnx.Module | None) -> "Target":
        """This target with another drafter; None for its own."""
        return self if drafter is None else self._with(drafter=drafter)

    def sized(self, length: int | None) -> "Target":
        """This target with so many output tokens; None for its own number."""
        return self if length is None else self._with(length=length)

    def _with(self, **changes) -> "Target":
        other = dataclasses.replace(self, **changes)
        vars(other)["functions"] = self.functions  # found once
        return other

    def program(self, tree: Tree | DynamicTree, noise: str = FRESH, verifier: str = WALK) -> Program:
        """The decoding program with this tree.

        Raises:
          ValueError: without a length, or with a drafter that reads layers or is not for the verifier.
        """
        if self.length is None or self.length < 1:
            raise ValueError(f"length says how many tokens are drawn, at least 1, not {self.length}")
        drafter = self.drafter or Jacobi(coupled=verifier != TRAVERSAL)
        check_drafter(drafter, noise, verifier)
        if drafter.taps and tree.depth:
            raise ValueError(
                f"the drafter reads layers {drafter.taps} of the target, and forward gives its last features"
            )
        graph = nnx.graphdef(drafter) if tree.depth else None
        functions = dataclasses.replace(self.functions, nodes=tree.num_nodes)
        return Program(functions, graph, tree, self.length, self.layout, (), noise, verifier)

    def decoding_params(self, program: Program) -> dict[str, Any]:
        """The parameters that `program` reads."""
        drafter = self.drafter or Jacobi()  # of which there are none
        return {"target": self.params, "drafter": nnx.state(drafter) if program.drafter else None}

    def encode(self, prefixes: Any) -> list[np.ndarray]:
        """Prefixes as tokens, int [P] each: a text or tokens, or several of these.

        Raises:
          TypeError, ValueError: for anything else.
        """
        rows = [prefixes] if isinstance(prefixes, str) else list(prefixes)
        if not rows:
            raise ValueError("there is no prefix")
        if not any(isinstance(row, str) or np.ndim(row) for row in rows):  # tokens
            rows = [rows]
        return [self._tokens(row) for row in rows]

    def _tokens(self, prefix: Any) -> np.ndarray:
        if isinstance(prefix, str):
            if self.text is None:
                raise TypeError("this target reads no text: give it a tokenizer, text=..., or give token ids")
            prefix = self.text.encode(prefix)
        tokens = np.asarray(prefix)
        if tokens.ndim != 1 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"a prefix is at least one token, int [n], not {tokens.dtype} {list(tokens.shape)}")
        return tokens.astype(np.int32)

    def prefix(self, prefixes: Sequence[np.ndarray], guided: bool) -> Prefix:
        """What stands before the first output token, for both guidance branches or the conditional one alone.

        Raises:
          ValueError: if it is guided and cannot be.
        """
        if guided and self.guidance is None:
            raise ValueError("this target has no guidance: give it guidance=..., or sampling without")
        others = [self._tokens(self.guidance.unconditional(tokens)) for tokens in prefixes] if guided else []
        rows = stack_tokens(prefixes, others)
        graph, state = (None, None) if self.drafter is None else nnx.split(self.drafter)
        return _prefix(self.functions, graph, (self.params, state), rows.ids, rows.length)

    def images(self, tokens: jax.Array) -> np.ndarray | None:
        """Output tokens int [B, L] as pictures; None for a target without them."""
        return None if self.pictures is None else np.asarray(self.pictures.images(tokens))

    def texts(self, tokens: jax.Array) -> np.ndarray | None:
        """Output tokens int [B, L] as texts, [B]; None for a target without them."""
        return None if self.text is None else np.array([self.text.decode(row.tolist()) for row in np.asarray(tokens)])


@dataclasses.dataclass(frozen=True)
class Functions:
    """A target's functions, the static part of it; see `Target`.

    Attributes:
      vocab: how many tokens there are logits for.
      nodes: of the tree that is drafted.
    """

    forward: Forward
    commit: Commit
    cache: Callable[[int], Any]
    embed: Callable[[Any, jax.Array], jax.Array] | None
    head: Callable[[Any, jax.Array], jax.Array] | None
    vocab: int
    nodes: int = 1

    def bind(self, params: Any) -> "Bound":
        """The target with its parameters."""
        return Bound(self, params)


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """`passes.Passes` of a target's functions. What a pass says are its logits."""

    functions: Functions
    params: Any

    linear = True

    @property
    def vocab(self) -> int:
        return self.functions.vocab

    @property
    def module(self) -> "Ends":
        return Ends(self.functions, self.params)

    def logits(self, said: jax.Array) -> jax.Array:
        return said

    def read(self, prefix: Prefix, slots: int, taps: tuple[int, ...]) -> tuple[Pass, Any]:
        tokens = prefix.embeddings
        order, none = jnp.arange(tokens.shape[1]), jnp.zeros(tokens.shape[0], jnp.int32)
        # a forward pass may write all nodes where one path of them will stay
        empty = self.functions.cache(kv.capacity(slots, self.functions.nodes, 0))
        empty = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(none), *jnp.shape(x))), empty)
        seen, fresh = self.look(empty, kv.Filled(none), tokens, order[None], kv.causal(len(order))[None], taps)
        path = jnp.broadcast_to(order, tokens.shape)
        return seen, self.keep(empty, fresh, none, path, prefix.length, seen.said[:, 0, 0])

    def look(self, cache: Any, filled: kv.Filled, tokens, depths, ancestors, taps) -> tuple[Pass, Any]:
        del taps

        def one(cache, tokens, positions, mask):
            made = self.functions.forward(self.params, cache, tokens, positions, mask)
            return _forwarded(made, len(tokens), self.vocab)

        given = cache, jnp.maximum(tokens, 0), filled.length[:, None] + depths
        alike = ancestors.shape[0] == 1
        mapped = jax.vmap(one, (0, 0, 0, None if alike else 0))
        logits, features, fresh = mapped(*given, ancestors[0] if alike else ancestors)
        return Pass(features, features, logits.astype(jnp.float32)), fresh

    def keep(self, cache: Any, fresh: Any, length, path, kept, after) -> Any:
        length = jnp.where(jnp.isnan(after), 0, length)  # see `cache.write`
        path = jnp.where(jnp.arange(path.shape[1]) < kept[:, None], path, -1)
        one = lambda cache, *given: _committed(cache, self.functions.commit(cache, *given))
        return jax.vmap(one)(cache, fresh, path, length)


@dataclasses.dataclass(frozen=True, eq=False)
class Ends:
    """Both ends of a target's network, which drafters of EAGLE's kind borrow."""

    functions: Functions
    params: Any

    linear_head = False

    @property
    def vocab(self) -> int:
        return self.functions.vocab

    def embed(self, tokens: jax.Array) -> jax.Array:
        return self._end("embed")(self.params, tokens)

    def table_row(self, tokens: jax.Array) -> jax.Array:
        return tokens

    def logits(self, features: jax.Array) -> jax.Array:
        logits = self._end("head")(self.params, features)
        if logits.shape != (*features.shape[:-1], self.vocab):
            wanted = (*features.shape[:-1], self.vocab)
            raise ValueError(f"head returned logits of shape {logits.shape}, and {wanted} is needed")
        return logits.astype(jnp.float32)

    def _end(self, name: str) -> Callable:
        function = getattr(self.functions, name)
        if function is None:
            raise TypeError(f"this drafter borrows the target's {name}, and it has none: give {name}=... to Target")
        return function


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefix(functions: Functions, graph: nnx.GraphDef | None, states, tokens: jax.Array, length: jax.Array) -> Prefix:
    drafter = None if graph is None else nnx.merge(graph, states[1])
    known = drafter.embed(tokens, functions.bind(states[0]).module) if hasattr(drafter, "embed") else None
    return Prefix(tokens, known, length)


def _probed(forward: Forward, commit: Commit, cache: Callable[[int], Any], params: Any) -> int:
    """How many tokens there are logits for, of two tokens that are neither computed nor kept."""

    def pass_of(params):
        before, two = cache(kv.capacity(2, 1, 1)), jnp.arange(2)
        made = forward(params, before, jnp.zeros(2, jnp.int32), two, jnp.tril(jnp.ones((2, 2), bool)))
        logits, _, fresh = _forwarded(made, 2, None)
        _committed(before, commit(before, fresh, two, jnp.int32(0)))
        return logits

    return jax.eval_shape(pass_of, params).shape[-1]


def _forwarded(made: Any, size: int, vocab: int | None) -> tuple[jax.Array, jax.Array, Any]:
    if not isinstance(made, tuple) or len(made) != 3:
        got = f"{len(made)} things" if isinstance(made, tuple) else type(made).__name__
        raise TypeError(f"forward returns (logits, features, fresh), not {got}")
    logits, features, fresh = made
    right = jnp.ndim(logits) == 2 and logits.shape == (size, logits.shape[1] if vocab is None else vocab)
    if not right:
        wanted = f"({size}, {'V' if vocab is None else vocab})"
        raise ValueError(
            f"forward returned logits of shape {jnp.shape(logits)} for {size} tokens, and {wanted} is needed"
        )
    if jnp.ndim(features) != 2 or features.shape[0] != size:
        got = jnp.shape(features)
        raise ValueError(f"forward returned features of shape {got} for {size} tokens, and ({size}, h) is needed")
    return logits, features, fresh


def _committed(before: Any, after: Any) -> Any:
    kinds = [jax.tree.structure(cache) for cache in (before, after)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"commit returned a cache of structure {kinds[1]}, and was given {kinds[0]}")
    leaves = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after))
    for (path, old), new in leaves:
        old, new = jnp.asarray(old), jnp.asarray(new)
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            where = "cache" + jax.tree_util.keystr(path)
            raise ValueError(f"commit returned {where} as {new.dtype}{new.shape}, and was given {old.dtype}{old.shape}")
    return after
