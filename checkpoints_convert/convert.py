"""From published checkpoints to a bundle, one parameter at a time."""

import collections
import contextlib
import dataclasses
import hashlib
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from cascade_jax import bundle
from checkpoints_convert.families import FAMILIES
from checkpoints_convert.files import read_json
from checkpoints_convert.formats import Known
from checkpoints_convert.parts import Part, family_of, fitted, parts, planned, recognise
from checkpoints_convert.sources import CODES, open_source, open_sources
from checkpoints_convert.table import Step, make
from checkpoints_convert.tensors import ConvertError, listed
from checkpoints_convert.tokenizers import check_tokenizer, take
from checkpoints_convert.transforms import integers

__all__ = ["convert", "merge", "planned", "recognise"]

VERSION = 1
DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp32": np.dtype(np.float32), "stored": None}
LARGE = 3_000_000_000  # parameters; targets of this size are stored in bfloat16 unless told otherwise


def convert(
    family: str,
    sources: Sequence[str | os.PathLike],
    destination: str | os.PathLike,
    *,
    dtype: str | None = None,
    pixels: int | None = None,
    say: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> bundle.Config | bundle.MetricConfig:
    """Converts published checkpoints to a bundle.

    Args:
      family: a name in `FAMILIES`, or "auto" to go by the files.
      sources: files and folders as they were downloaded, or addresses on the hub (`cascade_jax.hub`), in any order: the
        model, its picture tokenizer, its text encoder, a drafter. What is what is told from their tensors. What
        is needed and was not named is looked for in the folders that were.
      destination: the bundle's folder. It appears whole or not at all; a bundle that is there is replaced.
      dtype: of target, drafter and text encoder: "bf16", "fp32", or "stored". None is "bf16" from 3 billion parameters
        on and else "stored". A picture tokenizer, and a network that measures, keep their own.
      pixels: the picture's side, where neither the files nor their names say it.
      say: called with what was found, notes and warnings.
      progress: called with (bytes written, bytes in all).

    Returns:
      The bundle's configuration.

    Raises:
      ConvertError: if a source is damaged, unknown, missing or does not fit, or the disk is full.
    """
    _check_dtype(dtype)
    if pixels is not None and pixels < 1:
        raise ConvertError(f"pixels must be positive, not {pixels}")
    destination = pathlib.Path(destination)
    _check_destination(destination)
    opened = open_sources(sources)
    chosen = family_of(family, opened)
    found = parts(chosen, opened, pixels, say)
    config = chosen.assemble({name: part.config for name, part in found.items()})
    for part in found.values():
        check_tokenizer(part, say)
    with writing(destination, found, dtype, say, progress) as (writer, origin):
        writer.finish(dataclasses.replace(config, origin=origin))
    for part in found.values():
        say(str(part))
    return config


def merge(
    model: str | os.PathLike,
    drafter: str | os.PathLike,
    *,
    dtype: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> bundle.Config:
    """Puts a published drafter into a bundle, in place of one that is there.

    Args:
      model: the bundle's folder.
      drafter: the drafter as it was downloaded.
      dtype: of its parameters, as in `convert`.
      say: called with what was found, notes and warnings.

    Raises:
      ConvertError: if the drafter is damaged, unknown or does not fit.
      bundle.BundleError: if there is no such bundle.
    """
    _check_dtype(dtype)
    model = pathlib.Path(model)
    config = bundle.read_config(model)
    source = open_source(drafter)
    family = next((family for family in FAMILIES.values() if family.is_a(config.family)), None)
    if family is None:
        raise ConvertError(f"there is no converter for drafters of {config.family}")
    plain, layouts = fitted(family, source)
    fitting = [layout for layout in layouts if layout.part == "drafter"]
    if not fitting:
        what = f"a {layouts[0].part} ({layouts[0].name})" if layouts else "of no known kind"
        raise ConvertError(f"{source.path} is no drafter for {config.family}: it is {what}")
    for note in source.notes:
        say(note)
    part = planned(fitting[0], plain, Known({"vq": config.vq, "target": config.target}, say=say))
    with writing(model, {"drafter": part}, dtype, say, lambda done, total: None) as (writer, origin):
        writer.adopt(model, without="drafter")
        files = config.origin.get("files", {}) | origin["files"]
        config = dataclasses.replace(
            config, drafter=part.config, origin={**config.origin, "converter": VERSION, "files": files}
        )
        writer.finish(config)
    say(str(part))
    return config


@contextlib.contextmanager
def writing(
    destination: pathlib.Path, parts: Mapping[str, Part], dtype: str | None, say, progress
) -> Iterator[tuple[bundle.Writer, dict[str, Any]]]:
    """A bundle in the making that has the parameters of `parts` and their files; and its origin."""
    types = {name: _dtype(name, part, dtype) for name, part in parts.items()}
    total = sum(_size(part, types[name]) for name, part in parts.items())
    _check_space(destination, total)
    for part in parts.values():
        _warn_of_integers(part, say)
    done = 0
    with _disk_errors(destination), ThreadPoolExecutor(1) as digester:
        files = sorted({file for part in parts.values() for file in part.source.files})
        digests = {file: digester.submit(_digest, file) for file in files}
        with bundle.written(destination) as writer:
            for name, part in parts.items():
                for path, step in part.steps.items():
                    array = make(step, part.source.tensors)
                    if wrong := _not_finite(array):
                        say(f"warning: {' + '.join(step.names)} of {part.source.path} contains {wrong}")
                    array = array.astype(_kind(part, step, types[name]), copy=False)
                    writer.add(name, path, array)
                    done += array.nbytes
                    progress(done, total)
                take(part, writer)
            yield writer, {"converter": VERSION, "files": _origin_names(digests)}


def _warn_of_integers(part: Part, say: Callable[[str], None]) -> None:
    tensors = part.source.tensors
    read = {name: tensors[name].dtype for step in part.steps.values() if not _whole(step) for name in step.names}
    whole = [f"{name} ({dtype})" for name, dtype in read.items() if name != CODES and not _floating(dtype)]
    if whole:
        say(
            f"warning: {part.source.path} has weights that are integers: {listed(whole)}. If they were quantised they "
            "are wrong without their scales: convert the weights from before that"
        )


def _dtype(name: str, part: Part, dtype: str | None) -> np.dtype | None:
    if name in ("vq", "metric"):
        return None
    return DTYPES[dtype or ("bf16" if part.parameters >= LARGE else "stored")]


def _kind(part: Part, step: Step, dtype: np.dtype | None) -> np.dtype:
    """What a parameter is stored as: weights that are integers in the checkpoint become floats."""
    if _whole(step):
        return np.dtype(np.int32)
    stored = part.source.tensors[step.names[0]].dtype
    return dtype or (stored if _floating(stored) else np.dtype(np.float32))


def _whole(step: Step) -> bool:
    """Whether a parameter consists of whole numbers."""
    return step.transform is integers


def _size(part: Part, dtype: np.dtype | None) -> int:
    return sum(
        int(np.prod(part.shapes[path], dtype=np.int64)) * _kind(part, step, dtype).itemsize
        for path, step in part.steps.items()
    )


def _floating(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _not_finite(array: np.ndarray, rows: int = 1 << 20) -> str:
    """What an array has beside finite numbers; empty if nothing."""
    if not _floating(array.dtype):
        return ""
    flat = array.reshape(-1) if array.flags.c_contiguous else array.ravel("K")
    blocks = [flat[i : i + rows] for i in range(0, flat.size, rows)]
    if all(bool(np.isfinite(block).all()) for block in blocks):
        return ""
    return "NaNs" if any(bool(np.isnan(block).any()) for block in blocks) else "infinite numbers"


def _origin_names(digests: Mapping[pathlib.Path, Any]) -> dict[str, str]:
    """The digests of files by their names; by their folders' too where several have the same."""
    count = collections.Counter(file.name for file in digests)
    name = lambda file: file.name if count[file.name] == 1 else f"{file.absolute().parent.name}/{file.name}"
    return {name(file): digest.result() for file, digest in digests.items()}


def _digest(file: pathlib.Path) -> str:
    with file.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ConvertError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")


def _check_destination(destination: pathlib.Path) -> None:
    """A folder of something else is never replaced, nor is a download, which may have a config.json too."""
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    try:
        known = "format" in read_json(destination / "config.json")
    except (ConvertError, TypeError):
        known = False
    if not known:
        raise ConvertError(f"{destination} is there already and is no model: give another destination")


def _check_space(destination: pathlib.Path, need: int) -> None:
    place = next(p for p in (destination.absolute(), *destination.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if need * 1.02 > free:
        raise ConvertError(f"no room: the model needs {need / 1e9:.1f} GB, and {place} has {free / 1e9:.1f} GB left")


@contextlib.contextmanager
def _disk_errors(destination: pathlib.Path):
    try:
        yield
    except ConvertError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        if "No space left" in text or "RESOURCE_EXHAUSTED" in text:
            raise ConvertError(f"no room: the disk of {destination} is full") from error
        raise ConvertError(f"cannot write {destination}: {text[:200]}") from error
