"""A loaded model: graph definitions and parameters of its parts, and what they do together."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cascade_jax import platforms
from cascade_jax.bundle.arrays import cast, flat, plain
from cascade_jax.bundle.config import BundleError, Config, MetricConfig, default_sampling
from cascade_jax.decode import Prefix, Program, check_drafter
from cascade_jax.models import families
from cascade_jax.models.prompt import Prompt
from cascade_jax.models.vq import to_uint8
from cascade_jax.rules import nearest_codes
from cascade_jax.sampling import FRESH, Layout, Sampling
from cascade_jax.tree import DynamicTree, Tree, named
from cascade_jax.verify import WALK

Read = Callable[[Sequence[str]], list[Prompt]]


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """A loaded model. It is not changed; `dataclasses.replace` makes another one.

    Attributes:
      config: what it is.
      params: {"target", "drafter", "vq", "text"}: NNX states, None where a part is missing, an array tree for text.
      read: the text encoder: prompts to a list of `Prompt`; None where prompts come encoded.
      neighbours: int32 [codes, k], the nearest other codes of every code, nearest first; None if no table is stored.
      mesh: the devices that the parameters lie on, see `sharding`; None for one device.
      trees: what `measure.tune` found on this machine, see `tuned`.
      drafter: a drafter that takes the place of the one that `config` names (`drafting`); None for the latter.
      tree: what is drafted where no tree is named; None for what fits the platform.
    """

    config: Config
    params: dict[str, Any]
    read: Read | None = None
    neighbours: np.ndarray | None = None
    mesh: jax.sharding.Mesh | None = None
    trees: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    drafter: nnx.Module | None = None
    tree: Tree | None = None

    @functools.cached_property
    def _graphs(self) -> dict[str, nnx.GraphDef]:
        graphs = {part: graph for part, (graph, _) in skeletons(self.config).items()}
        return graphs if self.drafter is None else graphs | {"drafter": nnx.graphdef(self.drafter)}

    def drafting(self, drafter: nnx.Module | None) -> "Bundle":
        """This model with a drafter in place of its own, one that reads nothing of the prefix; None for its own."""
        if drafter is None:
            return self
        return dataclasses.replace(self, params={**self.params, "drafter": nnx.state(drafter)}, drafter=drafter)

    def sized(self, length: int | None) -> "Bundle":
        """This model, whose pictures all have the same number of tokens.

        Raises:
          ValueError: if another is asked for.
        """
        if length not in (None, self.length):
            raise ValueError(f"a picture of this model has {self.length} tokens, not {length}")
        return self

    @property
    def alone(self) -> bool:
        """Whether it has no drafter."""
        return self.drafter is None and self.config.drafter is None

    @property
    def usual_tree(self) -> Tree:
        """What is drafted where no tree is named."""
        return named(platforms.defaults().tree) if self.tree is None else self.tree

    @property
    def sampling(self) -> Sampling:
        """The model's own settings."""
        return default_sampling(self.config)

    @property
    def length(self) -> int:
        """Output tokens of a picture."""
        return self.config.target.length

    @property
    def layout(self) -> Layout | None:
        """What may stand where in the output."""
        return self.config.target.layout

    @property
    def drafted_levels(self) -> int | None:
        """Levels of the deepest tree that the drafter can fill; None if any will do."""
        return getattr(self.drafter or self.config.drafter, "depth", None)

    def program(self, tree: Tree | DynamicTree, noise: str = FRESH, verifier: str = WALK) -> Program:
        """The decoding program of this model with `tree`.

        Args:
          noise, verifier: see `decode.Program`.

        Raises:
          BundleError: if the tree has drafts and the bundle no drafter.
          ValueError: if there is no such noise, or the drafter is not for the verifier or for so deep a tree.
        """
        drafter = self._graphs.get("drafter") if tree.depth else None
        if tree.depth and drafter is None:
            raise BundleError(
                "this model has no drafter: draw with --method ar, or with one that needs none, as sjd, scd and pac"
            )
        check_drafter(self.drafter, noise, verifier)
        if tree.depth > (most := self.drafted_levels or tree.depth):
            raise ValueError(
                f"this model's drafter was trained to draft {most} levels, and the tree has {tree.depth}: "
                f"name one that is no deeper (--tree chain:{most}, say)"
            )
        taps = (self.drafter or self.config.drafter).taps if tree.depth else ()
        if taps and not all(1 <= tap <= self.config.target.layers for tap in taps):
            raise BundleError(f"the drafter reads layers {taps} of a target that has {self.config.target.layers}")
        return Program(self._graphs["target"], drafter, tree, self.length, self.layout, taps, noise, verifier)

    def decoding_params(self, program: Program) -> dict[str, Any]:
        """The parameters that `program` reads."""
        return {"target": self.params["target"], "drafter": self.params["drafter"] if program.drafter else None}

    def nearest(self, count: int) -> np.ndarray:
        """Every code's nearest others, int32 [codes, count], nearest first: of the stored table, or of a new one.

        Raises:
          ValueError: if there are not as many.
        """
        codes = self.config.target.codebook_size
        if not 0 <= count < codes:
            raise ValueError(f"neighbours must be between 0 and {codes - 1} for {codes} codes, not {count}")
        table = self.neighbours
        if table is None or table.shape[1] < count:
            codebook = np.asarray(self.merged("vq").raw_codebook(), np.float32)
            # at least as many as LANTERN takes, so that methods share a table
            table = _table(codebook.tobytes(), codebook.shape[1], max(count, usual_neighbours(self.config)))
        return table[:, :count]

    def graph(self, part: str) -> nnx.GraphDef:
        """A part's graph definition."""
        return self._graphs[part]

    def merged(self, part: str) -> nnx.Module:
        """A part as a module: "target", "drafter" or "vq". Raises a BundleError if there is none."""
        if part not in self._graphs:
            what = {"vq": "no picture tokenizer: it draws tokens, and makes no pictures of them"}.get(
                part, f"no {part}"
            )
            raise BundleError(f"this model has {what}")
        return nnx.merge(self._graphs[part], self.params[part])

    def encode(self, prompts: Sequence[str | Prompt]) -> list[Prompt]:
        """Prompts as the target's conditioning.

        Raises:
          ValueError: for no prompt, an empty one, or text that the text encoder cannot read.
          TypeError: for what is no list of texts or encoded prompts.
        """
        return encode(prompts, self.read)

    def prefix(self, prompts: Sequence[Prompt], guided: bool) -> Prefix:
        """What stands before the first output token, for both guidance branches or the conditional one alone."""
        drafter = self._graphs.get("drafter") if self.drafter is None else None
        states = self.params["target"], self.params["drafter"]
        stacked = self.config.target.stack(prompts)
        return prefix(self._graphs["target"], drafter, guided, states, stacked)

    def images(self, tokens: jax.Array) -> np.ndarray | None:
        """Output tokens int [B, L] as pictures, uint8 [B, H, W, 3]; None without a picture tokenizer."""
        if self.config.vq is None:
            return None
        codes = self.config.target.codes(tokens)
        return np.asarray(_pictures(self._graphs["vq"], self.params["vq"], codes))

    def texts(self, tokens: jax.Array) -> None:
        """None: it draws pictures alone."""


def usual_neighbours(config: Config) -> int:
    """LANTERN's neighbourhood: 1,000 of 16,384 codes; at most a twentieth of the codebook."""
    return min(1000, config.target.codebook_size // 20)


@functools.lru_cache(maxsize=4)
def _table(codebook: bytes, width: int, count: int) -> np.ndarray:
    """Of a float32 codebook [codes, width]: every code's nearest others, int32 [codes, count]."""
    return nearest_codes(np.frombuffer(codebook, np.float32).reshape(-1, width), count)


def encode(prompts: Sequence[str | Prompt], read: Read | None) -> list[Prompt]:
    """Prompts as a target's conditioning; `read` is the text encoder, see `Bundle`. Raises as `Bundle.encode`."""
    if isinstance(prompts, (str, Prompt)):
        raise TypeError("prompts are a list: put the one into brackets, [prompt]")
    for prompt in prompts:
        if not isinstance(prompt, (str, Prompt)):
            raise TypeError(f"a prompt is a text or a cascade_jax.Prompt, not {prompt!r}")
    if not len(prompts):
        raise ValueError("there is no prompt")
    texts = [p for p in prompts if isinstance(p, str)]
    for text in texts:
        if not text.strip():
            raise ValueError("the prompt is empty")
    if texts and read is None:
        raise BundleError("this model has no text encoder: pass encoded prompts (cascade_jax.Prompt)")
    done = iter(read(texts) if texts else [])
    return [next(done) if isinstance(p, str) else p for p in prompts]


def pictures(graph: nnx.GraphDef, state: nnx.State, codes: jax.Array) -> jax.Array:
    """VQ codes int [B, h, w] as pictures, uint8 [B, H, W, 3]."""
    return to_uint8(nnx.merge(graph, state).decode_codes(codes))


_pictures = jax.jit(pictures, static_argnums=0)


@jax.jit(static_argnums=(0, 1, 2))
def prefix(graph: nnx.GraphDef, drafter_graph: nnx.GraphDef | None, guided: bool, states, stacked) -> Prefix:
    """What stands before the first output token, by target and drafter; `states` are their parameters."""
    drafter = None if drafter_graph is None else nnx.merge(drafter_graph, states[1])
    drafter = drafter if hasattr(drafter, "embed") else None  # it may take in no embeddings
    return nnx.merge(graph, states[0]).prefix(stacked, guided, drafter)


def skeletons(config: Config | MetricConfig) -> dict[str, tuple[nnx.GraphDef, nnx.State]]:
    """Graph definition and shapes of every part that is a module, without any memory."""
    sizes = {part: getattr(config, field, None) for part, field in families.FIELDS.items()}
    return {part: skeleton(part, own) for part, own in sizes.items() if own is not None}


def skeleton(part: str, config: Any) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph definition and shapes of a part of these sizes; the state is the caller's own."""
    graph, state = _traced(part, config)
    return graph, jax.tree.map(lambda leaf: leaf, state)


@functools.lru_cache(maxsize=64)  # a bundle needs it twice, and tracing a module takes a second
def _traced(part: str, config: Any) -> tuple[nnx.GraphDef, nnx.State]:
    module = families.module_of(part, config)
    return nnx.split(nnx.eval_shape(lambda: module(config, rngs=OneKey())))


def abstract(config: Config, dtype=jnp.float32) -> Bundle:
    """A bundle of shapes instead of parameters, for programs that are lowered and never run. It reads no text."""

    def shape(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, cast(leaf.dtype, dtype))

    states = {part: jax.tree.map(shape, state) for part, (_, state) in skeletons(config).items()}
    return Bundle(config, {"drafter": None, "vq": None, "text": None, **states})


class OneKey:
    """In place of `nnx.Rngs` where only shapes matter: counting keys takes longer than all the rest of tracing."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


def shapes(part: str, config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a part of these sizes, by dotted path."""
    return {".".join(path): leaf.shape for path, leaf in flat(plain(skeleton(part, config)[1])).items()}
