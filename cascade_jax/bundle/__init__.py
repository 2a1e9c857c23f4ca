"""A model directory, a *bundle*: everything needed to go from a prompt to a picture.

    DIR/config.json   what it is: family, sizes, layout, sampling defaults; plain to read
    DIR/params/       orbax checkpoints that together hold {"target", "drafter", "vq", "text"}, each a tree of arrays:
                      one, or several in folders 0, 1, ..., so that a large model is written piece by piece
    DIR/text/         what the text encoder needs beside its parameters, such as tokenizer.json
    DIR/neighbours.npy  LANTERN's table, int32 [codes, k]; optional
    DIR/trees.json    draft trees found for certain devices (`evaluation.tune`); optional

A bundle is written to a temporary directory beside its destination and renamed: a destination is never half a bundle.

A network that measures pictures, CLIP or Inception, is kept in the same way, with {"metric"} as its only part.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from cascade_jax import files, platforms
from cascade_jax.decode import Prefix, Program
from cascade_jax.drafters.eagle import Eagle1, EagleConfig
from cascade_jax.drafters.eagle3 import Eagle3, Eagle3Config
from cascade_jax.models.clip import CLIP, CLIPConfig
from cascade_jax.models.families import TARGETS
from cascade_jax.models.inception import Inception, InceptionConfig
from cascade_jax.models.prompt import Prompt
from cascade_jax.models.t5 import T5Config, T5Encoder
from cascade_jax.models.transformer import output_major, straight
from cascade_jax.models.vq import VQConfig, VQModel, to_uint8
from cascade_jax.sampling import Layout, Sampling
from cascade_jax.tree import DynamicTree, Tree

FORMAT = 1
NEIGHBOURS = "neighbours.npy"
TREES = "trees.json"
SHARD = 256 << 20  # bytes of parameters in one orbax checkpoint, unless a single parameter is larger

# What the parts of a bundle can be: the classes of their sizes and of their modules, by the name in config.json. The
# first is what a config.json without a name means.
KINDS: dict[str, dict[str, tuple[type, type]]] = {
    "target": TARGETS,
    "vq": {"llamagen": (VQConfig, VQModel)},
    "drafter": {"eagle1": (EagleConfig, Eagle1), "eagle3": (Eagle3Config, Eagle3)},
    "text": {"t5": (T5Config, T5Encoder)},
    "metric": {"clip": (CLIPConfig, CLIP), "inception": (InceptionConfig, Inception)},
}
# The fields of Config and MetricConfig, by part.
FIELDS = {"target": "target", "vq": "vq", "drafter": "drafter", "text": "encoder", "metric": "metric"}


class BundleError(ValueError):
    """A model directory that cannot be used; the message is one line and says what would help."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A bundle's config.json.

    Attributes:
      family: which architecture the target has, one of `models.families.TARGETS`.
      target: its sizes.
      drafter: the drafter's sizes; None without one.
      vq: the picture tokenizer's sizes.
      text: how prompts are read: "scenes", "t5", "class" (a class's number), "tokens" (the target reads text itself);
        None where they come encoded.
      sampling: default sampling settings.
      cascade: default thresholds of the cascade rule.
      origin: where the weights came from: source files, digests, recipe.
      encoder: the text encoder's sizes; None where there is none, or it is a table.

    The sizes are those of `KINDS`.
    """

    family: str
    target: Any
    drafter: Any | None
    vq: Any
    text: str | None = None
    sampling: dict[str, float] = dataclasses.field(default_factory=dict)
    cascade: dict[str, float] = dataclasses.field(default_factory=dict)
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    encoder: Any | None = None


@dataclasses.dataclass(frozen=True)
class MetricConfig:
    """The config.json of a network that measures pictures.

    Attributes:
      metric: its sizes, of `KINDS`.
      origin: as of `Config`.
    """

    metric: Any
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Which network it is."""
        return _kind("metric", self.metric)


@dataclasses.dataclass
class Bundle:
    """A loaded model.

    Attributes:
      config: what it is.
      params: {"target", "drafter", "vq", "text"}: NNX states, None where a part is missing, an array tree for text.
      read: the text encoder: prompts to a list of `Prompt`; None where prompts come encoded.
      neighbours: int32 [codes, k], the nearest other codes of every code, nearest first; None if no table is stored.
      mesh: the devices that the parameters lie on, see `sharding`; None for one device.
      trees: what `evaluation.tune` found, by kind of device and name of the method; each has a "tree" among its
        entries.
    """

    config: Config
    params: dict[str, Any]
    read: Callable[[Sequence[str]], list[Prompt]] | None = None
    neighbours: np.ndarray | None = None
    mesh: jax.sharding.Mesh | None = None
    trees: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self._graphs = {name: graph for name, (graph, _) in _skeleton(self.config).items()}

    @property
    def length(self) -> int:
        """Output tokens of a picture."""
        return self.config.target.length

    @property
    def layout(self) -> Layout | None:
        """What may stand where in the output."""
        return self.config.target.layout

    def program(self, tree: Tree | DynamicTree) -> Program:
        """The decoding program of this model with `tree`.

        Raises:
          BundleError: if the tree has drafts and the bundle no drafter.
        """
        drafter = self._graphs.get("drafter") if tree.depth else None
        if tree.depth and drafter is None:
            raise BundleError("this model has no drafter, so only autoregressive decoding is possible (--method ar)")
        taps = self.config.drafter.taps if tree.depth else ()
        if taps and not all(1 <= tap <= self.config.target.layers for tap in taps):
            raise BundleError(f"the drafter reads layers {taps} of a target that has {self.config.target.layers}")
        return Program(self._graphs["target"], drafter, tree, self.length, self.layout, taps)

    def decoding_params(self, program: Program) -> dict[str, Any]:
        """The parameters that `program` reads."""
        return {"target": self.params["target"], "drafter": self.params["drafter"] if program.drafter else None}

    def graph(self, part: str) -> nnx.GraphDef:
        """A part's graph definition."""
        return self._graphs[part]

    def merged(self, part: str) -> nnx.Module:
        """A part as a module: "target", "drafter" or "vq"."""
        return nnx.merge(self._graphs[part], self.params[part])

    def encode(self, prompts: Sequence[str | Prompt]) -> list[Prompt]:
        """Prompts as the target's conditioning.

        Raises:
          ValueError: for an empty prompt, or text that the text encoder cannot read.
        """
        return encode(prompts, self.read)

    def prefix(self, prompts: Sequence[Prompt], guided: bool) -> Prefix:
        """What stands before the first output token, for both guidance branches or the conditional one alone."""
        drafter = self._graphs.get("drafter")
        states = self.params["target"], self.params["drafter"]
        stacked = self.config.target.stack(prompts)
        return _prefix(self._graphs["target"], drafter, guided, states, stacked)

    def images(self, tokens: jax.Array) -> np.ndarray:
        """Output tokens int [B, L] as pictures, uint8 [B, H, W, 3]."""
        codes = self.config.target.codes(tokens)
        return np.asarray(_pictures(self._graphs["vq"], self.params["vq"], codes))


def encode(prompts: Sequence[str | Prompt], read: Callable[[Sequence[str]], list[Prompt]] | None) -> list[Prompt]:
    """Prompts as a target's conditioning; `read` is the text encoder, see `Bundle`. Raises as `Bundle.encode`."""
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
def _prefix(graph, drafter_graph, guided: bool, states, stacked) -> Prefix:
    drafter = None if drafter_graph is None else nnx.merge(drafter_graph, states[1])
    return nnx.merge(graph, states[0]).prefix(stacked, guided, drafter)


class Writer:
    """Writes a bundle piece by piece: parameters in any order, then `finish`. See `written`."""

    def __init__(self, directory: pathlib.Path, shard: int = SHARD):
        self.directory, self._limit = directory, shard
        self._tree: dict[str, Any] = {}
        self._size, self._shards = 0, 0

    def add(self, part: str, path: str, array: Any) -> None:
        """Takes a parameter by its dotted path in the part; "" is the part itself."""
        if self._size and (part not in self._tree or self._size + array.nbytes > self._limit):
            self._flush()
        *folders, name = [part, *filter(None, path.split("."))]
        tree = self._tree
        for folder in folders:
            tree = tree.setdefault(folder, {})
        tree[name] = array
        self._size += array.nbytes

    def put(self, part: str, tree: Any, dtype=jnp.bfloat16) -> None:
        """Takes a part, an NNX state or a tree of arrays; floating-point arrays become `dtype`."""
        for path, leaf in _flat(plain(tree)).items():
            x = straight(leaf)
            floating = jnp.issubdtype(x.dtype, jnp.floating)
            self.add(part, ".".join(path), x.astype(dtype) if floating else x)

    def copy(self, file: str | os.PathLike, name: str) -> None:
        """Takes a file along, as `name` in the bundle."""
        place = self.directory / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)

    def adopt(self, directory: str | os.PathLike, without: str) -> None:
        """Takes over everything of another bundle but the part `without` and its config.json; files are linked."""
        directory = pathlib.Path(directory).absolute()
        self._flush()
        with ocp.StandardCheckpointer() as checkpointer:
            for shard in _checkpoints(directory):
                tree = checkpointer.metadata(shard).item_metadata.tree
                if without not in tree:
                    place = self.directory / "params" / str(self._shards)
                    shutil.copytree(shard, place, copy_function=_link)
                    self._shards += 1
                elif len(tree) > 1:
                    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
                    for path, array in _flat(checkpointer.restore(shard, wanted)).items():
                        if path[0] != without:
                            self.add(path[0], ".".join(path[1:]), array)
        for other in directory.iterdir():
            if other.name not in ("params", "config.json", without, TREES if without == "drafter" else ""):
                copy = shutil.copytree if other.is_dir() else _link
                copy(other, self.directory / other.name)

    def finish(self, config: Config | MetricConfig) -> None:
        """Writes what is left, and config.json last of all."""
        self._flush()
        text = json.dumps({"format": FORMAT, **to_json(config)}, indent=2)
        (self.directory / "config.json").write_text(text + "\n")

    def _flush(self) -> None:
        if not self._tree:
            return
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self.directory / "params" / str(self._shards), self._tree)
        self._tree, self._size = {}, 0
        self._shards += 1


def _link(source: str | os.PathLike, place: str | os.PathLike) -> None:
    try:
        os.link(source, place)
    except OSError:  # another disk, or a file system without links
        shutil.copy2(source, place)


@contextlib.contextmanager
def written(directory: str | os.PathLike):
    """A `Writer` of a bundle; `directory` appears whole or not at all, and replaces a bundle that is there."""
    with files.replaced(directory) as temporary:
        yield Writer(temporary)


def save(directory: str | os.PathLike, config: Config, params: dict[str, Any], dtype=jnp.bfloat16) -> None:
    """Writes a bundle; `directory` appears whole or not at all, and replaces a bundle that is there.

    Args:
      params: as `Bundle.params`.
      dtype: of the floating-point arrays on disk.
    """
    with written(directory) as writer:
        for part, tree in params.items():
            if tree is not None:
                writer.put(part, tree, dtype)
        writer.finish(config)


Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]
Contents = dict[pathlib.Path, dict[tuple[str, ...], Any]]  # by checkpoint and path, shapes and types of its arrays


def load(
    directory: str | os.PathLike,
    dtype=None,
    placement: Placement | None = None,
    contents: Contents | None = None,
    *,
    for_decoding: bool = False,
) -> Bundle:
    """Reads a bundle. Parameters go from the disk to their devices; the host holds no copy of the model.

    Args:
      dtype: of the floating-point parameters; None for float32 on CPU and bfloat16 elsewhere.
      placement: gives the sharding of a parameter by its dotted path ("target.blocks.0.attention.qkv.kernel") and
        shape; None for the default device.
      contents: what the function of that name says of it, if that is known.
      for_decoding: lets kernels lie as this platform multiplies them with few rows soonest, see
        `models.transformer.OutputMajor`; not with a `placement`.

    Raises:
      BundleError: if there is no bundle, or it is damaged.
    """
    directory = pathlib.Path(directory).absolute()
    config = read_config(directory)
    if dtype is None:
        dtype = platforms.defaults().dtype
    _, states, found = _filled(directory, config, dtype, placement, contents, for_decoding and placement is None)
    return Bundle(
        config,
        {"drafter": None, "text": found.get(("text",)), **states},
        neighbours=_neighbours(directory, config),
        trees=_trees(directory),
    )


def load_metric(directory: str | os.PathLike, dtype=jnp.float32) -> nnx.Module:
    """Reads a network that measures pictures: a `CLIP` or an `Inception`.

    Args:
      dtype: of its floating-point parameters.

    Raises:
      BundleError: if there is none, or it is damaged.
    """
    directory = pathlib.Path(directory).absolute()
    config = read_any_config(directory)
    if not isinstance(config, MetricConfig):
        raise BundleError(
            f"{directory} is a model that draws, and one that measures is needed: {', '.join(KINDS['metric'])}"
        )
    graphs, states, _ = _filled(directory, config, dtype, None, None)
    return nnx.merge(graphs["metric"], states["metric"])


def _filled(
    directory: pathlib.Path,
    config: Config | MetricConfig,
    dtype,
    placement: Placement | None,
    known: Contents | None,
    for_decoding: bool = False,
):
    """Graph definitions and states of every part that is a module, and all arrays by path."""
    skeleton = _skeleton(config)
    wanted = {part: _flat(plain(state)) for part, (_, state) in skeleton.items()}
    known = contents(directory) if known is None else known
    try:
        found = _restored(known, dtype, placement)
    except Exception as error:
        raise BundleError(f"{directory} is damaged (convert or copy it again): {_first_line(error)}") from error
    for part, leaves in wanted.items():
        for path, leaf in leaves.items():
            array = found.get((part, *path))
            if array is None or array.shape != leaf.shape:
                name = ".".join((part, *path))
                what = "lacks" if array is None else f"has the shape {array.shape} for"
                raise BundleError(f"{directory} is damaged (convert or copy it again): it {what} {name}")
    if for_decoding:
        lay_out(found)
    graphs, states = {}, {}
    for part, (graph, state) in skeleton.items():
        nnx.replace_by_pure_dict(state, restored_keys(_nested({p: found[(part, *p)] for p in wanted[part]})))
        graphs[part], states[part] = graph, state
    return graphs, states, found


def lay_out(arrays: dict[tuple[str, ...], Any]) -> None:
    """Lets arrays, by path, lie as decoding likes them on this platform: one by one, so that no model is held twice."""
    for path, x in arrays.items():
        if path[0] in ("target", "drafter") and path[-1] == "kernel":
            arrays[path] = laid_out(x)


def laid_out(kernel: jax.Array) -> Any:
    """A kernel of a target's or drafter's product, as decoding likes it to lie on this platform."""
    large = kernel.size >= platforms.defaults().output_major and kernel.dtype == jnp.float32
    return output_major(kernel) if large else kernel


def _neighbours(directory: pathlib.Path, config: Config) -> np.ndarray | None:
    if not (file := directory / NEIGHBOURS).is_file():
        return None
    try:
        table = np.load(file, mmap_mode="r")
        if table.ndim != 2 or table.dtype != np.int32 or len(table) != config.vq.codebook_size:
            raise ValueError(f"it is {table.dtype} {table.shape}")
    except (OSError, ValueError) as error:
        raise BundleError(f"{file} is damaged (make it again: cascade-jax neighbours): {_first_line(error)}") from error
    return table


def _trees(directory: pathlib.Path) -> dict[str, dict[str, Any]]:
    if not (file := directory / TREES).is_file():
        return {}
    try:
        trees = json.loads(file.read_text())
        if not all(isinstance(found["tree"], str) for own in trees.values() for found in own.values()):
            raise ValueError("a tree is no text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{file} is damaged (remove it, or run cascade-jax tune-tree again): {error}") from error
    return trees


def save_tree(directory: str | os.PathLike, device: str, method: str, found: dict[str, Any]) -> None:
    """Stores what was found for a kind of device and a method, as of `Bundle.trees`; it appears whole or not at all."""
    directory = pathlib.Path(directory)
    trees = _trees(directory)
    trees.setdefault(device, {})[method] = found
    files.write_json(directory / TREES, trees)


def save_neighbours(directory: str | os.PathLike, table: np.ndarray) -> None:
    """Stores a table of neighbours, as `Bundle.neighbours`, in a bundle; it appears whole or not at all."""
    with files.whole(pathlib.Path(directory) / NEIGHBOURS) as temporary:
        np.save(temporary, np.asarray(table, np.int32))


def _checkpoints(directory: pathlib.Path) -> list[pathlib.Path]:
    """The orbax checkpoints of a bundle's parameters."""
    params = directory / "params"
    shards = sorted((p for p in params.iterdir() if p.name.isdigit() and p.is_dir()), key=lambda p: int(p.name))
    return [params] if (params / "_METADATA").exists() or not shards else shards


def reader() -> ocp.StandardCheckpointer:
    """Reads on its own: by default Orbax lets all processes wait for one another, those too that are gone."""
    if jax.process_count() == 1:
        return ocp.StandardCheckpointer()
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process-{own}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


def contents(directory: str | os.PathLike) -> Contents:
    """What a bundle's checkpoints hold, without reading it.

    Raises:
      BundleError: if they cannot be read.
    """
    directory = pathlib.Path(directory).absolute()
    try:
        with reader() as checkpointer:
            return {shard: _flat(checkpointer.metadata(shard).item_metadata.tree) for shard in _checkpoints(directory)}
    except Exception as error:
        raise BundleError(f"{directory} is damaged (convert or copy it again): {_first_line(error)}") from error


def stored(directory: str | os.PathLike) -> dict[str, Any]:
    """Shapes and types of a bundle's arrays by dotted path, without reading them. Raises as `contents`."""
    return by_name(contents(directory))


def by_name(contents: Contents) -> dict[str, Any]:
    """The arrays of all checkpoints by dotted path."""
    return {".".join(path): leaf for arrays in contents.values() for path, leaf in arrays.items()}


def _restored(contents: Contents, dtype, placement: Placement | None) -> dict[tuple[str, ...], jax.Array]:
    """All arrays of a bundle, by path."""
    arrays = {}
    with reader() as checkpointer:
        for shard, stored in contents.items():
            wanted = {
                path: jax.ShapeDtypeStruct(
                    leaf.shape,
                    _cast(leaf.dtype, dtype),
                    sharding=here() if placement is None else placement(".".join(path), leaf.shape),
                )
                for path, leaf in stored.items()
            }
            arrays |= _flat(checkpointer.restore(shard, _nested(wanted)))
    return arrays


def here() -> jax.sharding.Sharding:
    """One device of this process. Orbax would look for the one that wrote, which only the first of processes has."""
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def read_config(directory: str | os.PathLike) -> Config:
    """The config.json of a model that draws.

    Raises:
      BundleError: if it is missing, makes no sense, or is that of a network that measures.
    """
    config = read_any_config(directory)
    if isinstance(config, MetricConfig):
        raise BundleError(
            f"{directory} is a network that measures pictures ({config.kind}), not a model that draws them"
        )
    return config


def read_any_config(directory: str | os.PathLike) -> Config | MetricConfig:
    """A bundle's config.json, whatever the bundle is for.

    Raises:
      BundleError: if it is missing or makes no sense.
    """
    path = pathlib.Path(directory) / "config.json"
    if not path.is_file():
        raise BundleError(f"{directory} is not a model: it has no config.json")
    try:
        raw = json.loads(path.read_text())
        if raw.pop("format") != FORMAT:
            raise BundleError(f"{path} has another format than this version reads ({FORMAT}): convert the model again")
        return from_json(raw)
    except BundleError:
        raise
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path} is damaged: {error}") from error


def _skeleton(config: Config | MetricConfig) -> dict[str, tuple[nnx.GraphDef, nnx.State]]:
    """Graph definition and shapes of every part, without any memory."""
    sizes = {part: getattr(config, field, None) for part, field in FIELDS.items()}
    own = {part: _module(part, size) for part, size in sizes.items() if size is not None}
    return {part: (graph, jax.tree.map(lambda leaf: leaf, state)) for part, (graph, state) in own.items()}


@functools.lru_cache(maxsize=64)  # a bundle needs it twice, and tracing a module takes a second
def _module(part: str, config: Any) -> tuple[nnx.GraphDef, nnx.State]:
    module = next(module for own, module in KINDS[part].values() if own is type(config))
    return nnx.split(nnx.eval_shape(lambda: module(config, rngs=OneKey())))


def abstract(config: Config, dtype=jnp.float32) -> Bundle:
    """A bundle of shapes instead of parameters, for programs that are lowered and never run. It reads no text."""

    def shape(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, _cast(leaf.dtype, dtype))

    states = {part: jax.tree.map(shape, state) for part, (_, state) in _skeleton(config).items()}
    return Bundle(config, {"drafter": None, "text": None, **states})


class OneKey:
    """In place of `nnx.Rngs` where only shapes matter: counting keys takes longer than all the rest of tracing."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


def shapes(part: str, config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a part of these sizes, by dotted path."""
    return {".".join(path): leaf.shape for path, leaf in _flat(plain(_module(part, config)[1])).items()}


def _flat(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The leaves of nested dictionaries by path."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {p: leaf for key, value in tree.items() for p, leaf in _flat(value, (*path, key)).items()}


def _nested(leaves: dict[tuple[str, ...], Any]) -> Any:
    """The inverse of `_flat`."""
    tree: dict[str, Any] = {}
    for (*folders, name), leaf in leaves.items():
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = leaf
    return tree


def plain(part) -> Any:
    """An NNX state as nested dictionaries with string keys; other trees as they are."""
    if not isinstance(part, nnx.State):
        return part

    def named(tree):
        return {str(k): named(v) for k, v in tree.items()} if isinstance(tree, dict) else tree

    return named(nnx.to_pure_dict(part))


def restored_keys(tree):
    """The inverse of `plain`'s renaming: list positions are integers again."""
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdigit() else k: restored_keys(v) for k, v in tree.items()}


def _cast(stored, wanted):
    return wanted if jnp.issubdtype(stored, jnp.floating) else stored


def to_json(config: Config | MetricConfig) -> dict[str, Any]:
    """A configuration as config.json has it."""
    raw = dataclasses.asdict(config)
    for part, field in FIELDS.items():
        if raw.get(field) is not None:
            raw[field] = {"kind": _kind(part, getattr(config, field)), **raw[field]}
    return raw


def _kind(part: str, config: Any) -> str:
    return next(kind for kind, (own, _) in KINDS[part].items() if own is type(config))


def from_json(raw: dict) -> Config | MetricConfig:
    """The inverse of `to_json`; `raw` is used up."""
    cls = MetricConfig if "metric" in raw else Config
    if cls is Config and raw["family"] not in KINDS["target"]:
        known = ", ".join(KINDS["target"])
        raise BundleError(f"unknown model family {raw['family']!r}; this version knows: {known}")
    for part, field in FIELDS.items():
        if raw.get(field) is not None:
            own = dict(raw[field])
            kind = own.pop("kind", raw["family"] if part == "target" else next(iter(KINDS[part])))
            if kind not in KINDS[part]:
                raise BundleError(f"unknown {field} {kind!r}; this version knows: {', '.join(KINDS[part])}")
            raw[field] = built(KINDS[part][kind][0], own)
    return cls(**raw)


def built(cls: type, raw: dict) -> Any:
    """A configuration of a class from JSON: lists are tuples, and dictionaries configurations where it says so."""
    hints = typing.get_type_hints(cls)

    def value(name, x):
        if isinstance(x, dict) and dataclasses.is_dataclass(hints.get(name)):
            return built(hints[name], x)
        return tuple(value(None, y) for y in x) if isinstance(x, list) else x

    return cls(**{name: value(name, x) for name, x in raw.items()})


def default_sampling(config: Config) -> Sampling:
    """The bundle's own sampling settings."""
    return Sampling(**config.sampling)
