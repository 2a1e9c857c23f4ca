"""A bundle on disk: written piece by piece, and read onto devices.

Orbax writes a parameter to several files, and those of one checkpoint to dozens. Here a checkpoint's database is one
file in the end: `_packed`.
"""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import nnx

from cascade_jax import files, platforms, tuned
from cascade_jax.bundle.arrays import (
    SCALE,
    Path,
    flat,
    here,
    lay_out,
    multiplied,
    nested,
    not_finite,
    on_disk,
    plain,
    restored_keys,
    stored_as,
)
from cascade_jax.bundle.config import FORMAT, BundleError, Config, MetricConfig, read_any_config, read_config, to_json
from cascade_jax.bundle.model import Bundle, skeletons
from cascade_jax.models import families
from cascade_jax.models.transformer import straight

NEIGHBOURS = "neighbours.npy"
SHARD = 256 << 20  # bytes of parameters in one orbax checkpoint, unless a single parameter is larger

# What orbax notes of the process that wrote, such as where its arrays lay and to which path. Reading needs none of it.
_OF_THE_WRITER = ("_sharding", "array_metadatas", "commit_success.txt")

Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]
Contents = dict[pathlib.Path, dict[Path, Any]]  # by checkpoint and path, shapes and types of its arrays


class Writer:
    """Writes a bundle piece by piece: parameters in any order, then `finish`. See `written`."""

    def __init__(self, directory: pathlib.Path, shard: int = SHARD):
        self.directory, self._limit = directory, shard
        self._tree: dict[str, Any] = {}
        self._size, self._shards = 0, 0

    def add(self, part: str, path: str, array: Any) -> None:
        """Takes a parameter by its dotted path in the part; "" is the part itself."""
        if self._size and self._size + array.nbytes > self._limit:
            self._flush()
        *folders, name = [part, *filter(None, path.split("."))]
        tree = self._tree
        for folder in folders:
            tree = tree.setdefault(folder, {})
        tree[name] = array
        self._size += array.nbytes

    def put(self, part: str, tree: Any, dtype=jnp.bfloat16) -> None:
        """Takes a part, an NNX state or a tree of arrays; floating-point arrays become `dtype`.

        Of int8 are large kernels and tables alone, with a scale for every column or row; the others become bfloat16.
        """
        for path, leaf in flat(plain(tree)).items():
            for own, array in on_disk(path, straight(leaf), dtype).items():
                self.add(part, ".".join(own), array)

    def copy(self, file: str | os.PathLike, name: str) -> None:
        """Takes a file along, as `name` in the bundle."""
        place = self.directory / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)

    def write(self, text: str, name: str) -> None:
        """Takes a text along, as the file `name` in the bundle."""
        place = self.directory / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")

    def adopt(self, directory: str | os.PathLike, without: str) -> None:
        """Takes over everything of another bundle but the part `without` and its config.json; files are linked."""
        directory = pathlib.Path(directory).absolute()
        self._flush()
        with ocp.StandardCheckpointer() as checkpointer:
            for shard in _checkpoints(directory):
                tree = checkpointer.metadata(shard).item_metadata.tree
                if without not in tree:
                    shutil.copytree(shard, self._next(), copy_function=_link)
                elif len(tree) > 1:
                    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here()), tree)
                    for path, array in flat(checkpointer.restore(shard, wanted)).items():
                        if path[0] != without:
                            self.add(path[0], ".".join(path[1:]), array)
        for other in directory.iterdir():
            if other.name not in ("params", "config.json", without):
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
        with _packed(self._next()) as folder, ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, self._tree)
        self._tree, self._size = {}, 0

    def _next(self) -> pathlib.Path:
        self._shards += 1
        return self.directory / "params" / str(self._shards - 1)


@contextlib.contextmanager
def _packed(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A place for an orbax checkpoint, which becomes `folder` with its many data files as one."""
    loose = folder.with_name(f"{folder.name}-loose")
    yield loose
    ignored = shutil.ignore_patterns("d", "manifest.ocdbt", "ocdbt.process_*", *_OF_THE_WRITER)
    shutil.copytree(loose, folder, ignore=ignored)
    source, place = (tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{x}/"}) for x in (loose, folder))
    with tensorstore.Transaction() as transaction:  # what is committed together lies together
        together = place.result().with_transaction(transaction)
        for key in source.result().list().result():
            together.write(key, source.result().read(key).result().value).result()
    shutil.rmtree(loose)


def _link(source: str | os.PathLike, place: str | os.PathLike) -> None:
    try:
        os.link(source, place)
    except OSError:  # another disk, or a file system without links
        shutil.copy2(source, place)


@contextlib.contextmanager
def written(directory: str | os.PathLike, shard: int = SHARD) -> Iterator[Writer]:
    """A `Writer` of a bundle; `directory` appears whole or not at all, and replaces a bundle that is there."""
    with files.replaced(directory) as temporary:
        yield Writer(temporary, shard)


def save(
    directory: str | os.PathLike, config: Config, params: dict[str, Any], dtype=jnp.bfloat16, shard: int = SHARD
) -> None:
    """Writes a bundle; `directory` appears whole or not at all, and replaces a bundle that is there.

    Args:
      params: as `Bundle.params`.
      dtype: of the floating-point arrays on disk, see `Writer.put`.
      shard: bytes of parameters in one checkpoint.
    """
    with written(directory, shard) as writer:
        for part, tree in params.items():
            if tree is not None:
                writer.put(part, tree, dtype)
        writer.finish(config)


def save_neighbours(directory: str | os.PathLike, table: np.ndarray) -> None:
    """Stores a table of neighbours, as `Bundle.neighbours`, in a bundle; it appears whole or not at all."""
    with files.whole(pathlib.Path(directory) / NEIGHBOURS) as temporary:
        np.save(temporary, np.asarray(table, np.int32))


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
      BundleError: if there is no bundle, it is damaged, or a parameter holds NaNs or infinities.
    """
    directory = pathlib.Path(directory).absolute()
    config = read_config(directory)
    if dtype is None:
        dtype = platforms.defaults().dtype
    _, states, found = _filled(directory, config, dtype, placement, contents, for_decoding and placement is None)
    return Bundle(
        config,
        {"drafter": None, "vq": None, "text": found.get(("text",)), **states},
        neighbours=_neighbours(directory, config),
        trees=tuned.read(directory),
    )


def load_metric(directory: str | os.PathLike, dtype=jnp.float32) -> nnx.Module:
    """Reads a network that measures pictures, one of the metrics of `models.families`.

    Args:
      dtype: of its floating-point parameters.

    Raises:
      BundleError: if there is none, or as `load`.
    """
    directory = pathlib.Path(directory).absolute()
    config = read_any_config(directory)
    if not isinstance(config, MetricConfig):
        raise BundleError(
            f"{directory} is a model that draws, and one that measures is needed: {', '.join(families.KINDS['metric'])}"
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
    skeleton = skeletons(config)
    wanted = {part: flat(plain(state)) for part, (_, state) in skeleton.items()}
    known = contents(directory) if known is None else known
    with _damage(directory):
        found = _restored(known, dtype, placement)
    for part, leaves in wanted.items():
        for path, leaf in leaves.items():
            array = found.get((part, *path))
            if array is None or array.shape != leaf.shape:
                name = ".".join((part, *path))
                what = "lacks" if array is None else f"has the shape {array.shape} for"
                raise BundleError(f"{directory} is damaged (convert or copy it again): it {what} {name}")
    if bad := not_finite(found):
        more = f" and {len(bad) - 1} others hold" if len(bad) > 1 else " holds"
        raise BundleError(f"{directory} cannot be used: {bad[0]}{more} NaNs or infinities; convert or train it again")
    if for_decoding:
        lay_out(found)
    graphs, states = {}, {}
    for part, (graph, state) in skeleton.items():
        nnx.replace_by_pure_dict(state, restored_keys(nested({p: found[(part, *p)] for p in wanted[part]})))
        graphs[part], states[part] = graph, state
    return graphs, states, found


@contextlib.contextmanager
def _damage(directory: pathlib.Path) -> Iterator[None]:
    """Turns what orbax and tensorstore raise over files that are missing or cut off into a BundleError."""
    try:
        yield
    except BundleError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise BundleError(f"{directory} is damaged (convert or copy it again): {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _neighbours(directory: pathlib.Path, config: Config) -> np.ndarray | None:
    if not (file := directory / NEIGHBOURS).is_file():
        return None
    try:
        table = np.load(file, mmap_mode="r")
        if table.ndim != 2 or table.dtype != np.int32 or len(table) != config.target.codebook_size:
            raise ValueError(f"it is {table.dtype} {table.shape}")
    except (OSError, ValueError) as error:
        raise BundleError(f"{file} is damaged (make it again: cascade-jax neighbours): {_first_line(error)}") from error
    return table


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
    directory, found = pathlib.Path(directory).absolute(), {}
    with _damage(directory), reader() as checkpointer:
        for shard in _checkpoints(directory):
            try:
                metadata = checkpointer.metadata(shard).item_metadata
            except (AttributeError, TypeError):  # JSON, but not orbax's: nothing but orbax runs in here
                metadata = None
            if metadata is None:
                raise ValueError(f"orbax finds no arrays in {shard.relative_to(directory)}")
            found[shard] = flat(metadata.tree)
    return found


def stored(directory: str | os.PathLike) -> dict[str, Any]:
    """Shapes and types of a bundle's arrays by dotted path, without reading them. Raises as `contents`."""
    return by_name(contents(directory))


def by_name(contents: Contents) -> dict[str, Any]:
    """The arrays of all checkpoints by dotted path; int8 ones are floating-point numbers, see `arrays.on_disk`."""
    every = ((path, leaf) for arrays in contents.values() for path, leaf in arrays.items())
    return {".".join(path): leaf for path, leaf in every if not path[-1].endswith(SCALE)}


def _restored(contents: Contents, dtype, placement: Placement | None) -> dict[Path, jax.Array]:
    """All arrays of a bundle, by path."""
    place = lambda path, shape: here() if placement is None else placement(".".join(path), shape)
    arrays = {}
    with reader() as checkpointer:
        for shard, stored in contents.items():
            wanted = {
                path: jax.ShapeDtypeStruct(
                    leaf.shape, stored_as(path, leaf.dtype, dtype), sharding=place(path, leaf.shape)
                )
                for path, leaf in stored.items()
            }
            arrays |= flat(checkpointer.restore(shard, nested(wanted)))
    return multiplied(arrays, dtype)
