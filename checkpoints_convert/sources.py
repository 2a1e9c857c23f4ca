"""Checkpoint files: what tensors there are, and each of them on demand.

Opening a source reads names, shapes and types only. A tensor is a view of the mapped file until a transform copies it,
so that a conversion never holds more than the tensors of one parameter. safetensors files are read without any library;
pickles (`.bin`, `.pt`, `.pth`, `.ckpt`) need PyTorch and are loaded with `weights_only=True`: nothing in them runs.
"""

import dataclasses
import json
import pathlib
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from cascade_jax.models.chameleon import code_ids

SAFETENSORS = (".safetensors",)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = ("model.safetensors", "pytorch_model.bin")
TOKENIZERS = ("tokenizer.json", "text_tokenizer.json")
SENTENCEPIECE = ("spiece.model",)  # T5's tokenizer as it was trained, where no tokenizer.json was made of it
CODES = "vocabulary.codes"  # not a tensor of any file: see `Source`
NESTED = ("model", "module", "state_dict")  # keys under which training scripts keep the weights, first found first
WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every name
HEADER_LIMIT = 100_000_000  # bytes; the format's own limit

# https://github.com/huggingface/safetensors: types by their names in a header
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


class ConvertError(ValueError):
    """A checkpoint that cannot be converted; the message says what is wrong and what would be right."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Attributes:
      shape: its shape.
      dtype: its NumPy type; bfloat16 is `ml_dtypes.bfloat16`.
      read: returns it, as a view of the mapped file where that is possible.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray] = dataclasses.field(compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Source:
    """One checkpoint.

    Attributes:
      path: the folder or the file that was named.
      files: the files that hold its tensors.
      tensors: by name. Where a vocabulary beside the files names VQ codes (see `models.chameleon.code_ids`), CODES is
        one more: the text token of every code, int32.
      settings: the `config.json` beside them; empty without one.
      others: folders of the checkpoints that were named with this one, which may hold what it lacks: Lumina-mGPT comes
        without a text tokenizer, and its VQGAN with one.
    """

    path: pathlib.Path
    files: tuple[pathlib.Path, ...]
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    others: tuple[pathlib.Path, ...] = ()

    @property
    def folder(self) -> pathlib.Path:
        """Where files that belong to the checkpoint lie, such as its tokenizer."""
        return _folder(self.path)

    def beside(self, names: Iterable[str]) -> pathlib.Path | None:
        """The first of some files that lies in the folder, or in a folder `tokenizer` of it or up to two levels above:
        Meta keeps models/7b/consolidated.00.pth and tokenizer/text_tokenizer.json. If it is in none of them, `others`
        are looked through likewise."""
        return _beside((self.folder, *self.others), names)

    def vocabulary(self) -> dict[str, int]:
        """The text tokens by name, from the settings or the tokenizer beside the checkpoint; empty without one."""
        return _vocabulary((self.folder, *self.others), self.settings)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that the format cannot do without.

        Raises:
          ConvertError: if it is missing.
        """
        if name not in self.tensors:
            raise ConvertError(f"{self.path} lacks the tensor {name}")
        return self.tensors[name].shape


def open_sources(paths: Iterable[str | pathlib.Path]) -> list[Source]:
    """Opens checkpoints that make one model, as `open_source`."""
    paths = [pathlib.Path(path) for path in paths]
    return [open_source(path, [_folder(other) for other in paths if other != path]) for path in paths]


def open_source(path: str | pathlib.Path, others: Iterable[pathlib.Path] = ()) -> Source:
    """Opens a checkpoint: a file, or a folder as it is downloaded; `others` as in `Source`.

    Raises:
      ConvertError: if there is nothing to read, a shard is missing, or a file is damaged.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        files, expected = _files_in(path)
    elif path.is_file():
        files, expected = (path,), None
    else:
        raise ConvertError(f"there is no checkpoint {path}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_tensors(file).items():
            if name in tensors:
                raise ConvertError(f"{path} has the tensor {name} in two files, one of them {file.name}")
            tensors[name] = tensor
    if expected is not None and (lost := sorted(expected - tensors.keys())):
        raise ConvertError(f"{path} lacks tensors that its index names: {_listed(lost)}")
    if not tensors:
        raise ConvertError(f"{path} holds no tensors")
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    source = Source(path, files, tensors, _settings(path), tuple(others))
    if (codes := _codes(source)) is not None:
        tensors[CODES] = Tensor(codes.shape, codes.dtype, lambda: codes)
    return source


def _folder(path: pathlib.Path) -> pathlib.Path:
    return path if path.is_dir() else path.parent


def _beside(folders: Iterable[pathlib.Path], names: Iterable[str]) -> pathlib.Path | None:
    for folder in map(pathlib.Path.absolute, folders):
        for place in (folder, *(above / "tokenizer" for above in (folder, *folder.parents[:2]))):
            for name in names:
                if (place / name).is_file():
                    return place / name
    return None


def _vocabulary(folders: Iterable[pathlib.Path], settings: Mapping[str, Any]) -> dict[str, int]:
    named = settings.get("vocabulary_map")
    if isinstance(named, dict) and _names_codes(named):
        return named
    if (file := _beside(folders, TOKENIZERS)) is None:
        return {}
    try:
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
        words = tokenizer["model"]["vocab"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConvertError(f"{file} is damaged: {error}") from error
    return words | added if isinstance(words, dict) else added


def _names_codes(vocabulary: Iterable[str]) -> bool:
    return any(name.startswith("IMGIMG") for name in vocabulary)


def _codes(source: Source) -> np.ndarray | None:
    """Every VQ code's text token, if the vocabulary beside a checkpoint names them."""
    if not _names_codes(vocabulary := source.vocabulary()):
        return None
    try:
        return code_ids(vocabulary)
    except ValueError as error:
        raise ConvertError(f"{source.folder}: {error}") from error


def _files_in(folder: pathlib.Path) -> tuple[tuple[pathlib.Path, ...], set[str] | None]:
    """The files of a folder's checkpoint, and the tensors that they must have between them if an index says so."""
    for name in INDICES:
        if (folder / name).is_file():
            try:
                where = json.loads((folder / name).read_text())["weight_map"]
                names, shards = set(where), sorted(set(where.values()))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise ConvertError(f"{folder / name} is damaged: {error}") from error
            if outside := [shard for shard in shards if pathlib.PurePath(shard).name != shard]:
                raise ConvertError(f"{folder / name} names files outside its folder: {_listed(outside)}")
            if lost := [shard for shard in shards if not (folder / shard).is_file()]:
                raise ConvertError(f"{folder} lacks {_listed(lost)}, which {name} names: download them too")
            return tuple(folder / shard for shard in shards), names
    for name in WHOLE:
        if (folder / name).is_file():
            return (folder / name,), None
    for endings in (SAFETENSORS, PICKLES):
        if files := sorted(file for file in folder.iterdir() if file.suffix in endings and file.is_file()):
            return tuple(files), None
    raise ConvertError(f"{folder} holds no {', '.join(SAFETENSORS + PICKLES)} file")


def _settings(path: pathlib.Path) -> dict[str, Any]:
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        if path.is_dir():
            raise ConvertError(f"{file} is damaged: {error}") from error
        return {}
    return settings if isinstance(settings, dict) else {}


def read_tensors(file: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of one file.

    Raises:
      ConvertError: if it is damaged or of another kind.
    """
    if file.suffix in SAFETENSORS:
        return _safetensors(file)
    if file.suffix in PICKLES:
        return _pickle(file)
    raise ConvertError(f"{file} is no checkpoint: known are {', '.join(SAFETENSORS + PICKLES)}")


def _safetensors(file: pathlib.Path) -> dict[str, Tensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else HEADER_LIMIT
        if length >= HEADER_LIMIT or 8 + length > size:
            raise ConvertError(f"{file} is no safetensors file, or it is cut short: download it again")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {
                str(name): (_DTYPES[e["dtype"]], tuple(int(n) for n in e["shape"]), *map(int, e["data_offsets"]))
                for name, e in header.items()
            }
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ConvertError(f"{file} is damaged: its header makes no sense ({error!r})") from error
    end = 0
    for name, (dtype, shape, begin, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        need = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
        if min(shape, default=0) < 0 or begin != end or stop - begin != need:
            raise ConvertError(f"{file} is damaged: its header lies about {name}")
        end = stop
    if 8 + length + end != size:
        raise ConvertError(
            f"{file} is damaged: its header promises {8 + length + end:,} bytes, and it has {size:,}. Download it again"
        )

    def tensor(dtype, shape, begin, stop):
        def read():
            if begin == stop:
                return np.zeros(shape, dtype)
            flat = np.memmap(file, np.uint8, "r", 8 + length + begin, (stop - begin,))
            return np.asarray(flat).view(dtype).reshape(shape)

        return Tensor(shape, np.dtype(dtype), read)

    return {name: tensor(*entry) for name, entry in entries.items()}


def _pickle(file: pathlib.Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError:
        raise ConvertError(
            f"{file.name} is a PyTorch pickle, and PyTorch is not installed: pip install 'cascade_jax[convert]'"
        ) from None
    import argparse
    import pickle
    import warnings

    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            # training scripts keep their arguments beside the weights; files of before 2020 cannot be mapped
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        if culprit := re.search(r"GLOBAL (\S+)", reason):
            raise ConvertError(f"{file} is refused: it asks for {culprit[1]}, which weights have no need of") from error
        raise ConvertError(f"{file} is refused: it is damaged, or holds more than weights") from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConvertError(f"{file} is damaged: {reason[:160] or type(error).__name__}") from error
    for key in NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict):
        raise ConvertError(f"{file} holds no dictionary of tensors")

    def tensor(value):
        dtype = np.dtype(ml_dtypes.bfloat16) if value.dtype == torch.bfloat16 else None
        if dtype is None:
            dtype = torch.empty(0, dtype=value.dtype).numpy().dtype

        def read():
            plain = value.detach()
            if value.dtype == torch.bfloat16:
                return plain.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return plain.numpy()

        return Tensor(tuple(value.shape), dtype, read)

    return {name: tensor(value) for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def _listed(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + rest
