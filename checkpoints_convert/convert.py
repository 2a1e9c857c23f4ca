"""From published checkpoints to a bundle, one parameter at a time."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np

from cascade_jax import bundle
from checkpoints_convert.families import FAMILIES
from checkpoints_convert.formats import Family, Format, Known
from checkpoints_convert.sources import (
    SENTENCEPIECE,
    TOKENIZERS,
    ConvertError,
    Source,
    Tensor,
    open_source,
    open_sources,
)
from checkpoints_convert.table import Step, make, plan, present

VERSION = 1
DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp32": np.dtype(np.float32), "stored": None}
LARGE = 3_000_000_000  # parameters; targets of this size are stored in bfloat16 unless told otherwise
_ORDER = ("vq", "target", "drafter", "text", "metric")


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the bundle to be: where it comes from, and how its parameters are made."""

    format: Format
    source: Source
    config: Any
    steps: Mapping[str, Step]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes.values())


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
      sources: files and folders as they were downloaded, in any order: the model, its picture tokenizer, its text
        encoder, a drafter. What is what is told from their tensors.
      destination: the bundle's folder. It appears whole or not at all; a bundle that is there is replaced.
      dtype: of target, drafter and text encoder: "bf16", "fp32", or "stored". None is "bf16" from 3 billion parameters
        on and else "stored". A picture tokenizer, and a network that measures, keep their own.
      pixels: the picture's side, where neither the files nor their names say it.
      say: called with notes and warnings.
      progress: called with (bytes written, bytes in all).

    Returns:
      The bundle's configuration.

    Raises:
      ConvertError: if a source is damaged, unknown, missing or does not fit, or the disk is full.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConvertError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    destination = pathlib.Path(destination)
    _check_destination(destination)
    opened = open_sources(sources)
    chosen = _family(family, opened)
    parts = _parts(chosen, opened, pixels)
    config = chosen.assemble({name: part.config for name, part in parts.items()})
    with writing(destination, parts, dtype, say, progress) as (writer, origin):
        writer.finish(dataclasses.replace(config, origin=origin))
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
      say: called with warnings.

    Raises:
      ConvertError: if the drafter is damaged, unknown or does not fit.
      bundle.BundleError: if there is no such bundle.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConvertError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    model = pathlib.Path(model)
    config = bundle.read_config(model)
    source = open_source(drafter)
    family = next(family for family in FAMILIES.values() if family.is_a(config.family))
    layouts = recognise(family, source)
    fitting = [layout for layout in layouts if layout.part == "drafter"]
    if not fitting:
        what = f"a {layouts[0].part} ({layouts[0].name})" if layouts else "of no known kind"
        raise ConvertError(f"{source.path} is no drafter for {config.family}: it is {what}")
    part = planned(fitting[0], source, Known({"vq": config.vq, "target": config.target}))
    with writing(model, {"drafter": part}, dtype, say, lambda done, total: None) as (writer, origin):
        writer.adopt(model, without="drafter")
        files = config.origin.get("files", {}) | origin["files"]
        config = dataclasses.replace(
            config, drafter=part.config, origin={**config.origin, "converter": VERSION, "files": files}
        )
        writer.finish(config)
    return config


@contextlib.contextmanager
def writing(
    destination: pathlib.Path, parts: Mapping[str, Part], dtype: str | None, say, progress
) -> Iterator[tuple[bundle.Writer, dict[str, Any]]]:
    """A bundle in the making that has the parameters of `parts` and their files; and its origin."""
    types = {name: _dtype(name, part, dtype) for name, part in parts.items()}
    total = sum(_size(part, types[name]) for name, part in parts.items())
    _check_space(destination, total)
    done = 0
    with _disk_errors(destination), ThreadPoolExecutor(1) as digester:
        files = sorted({file for part in parts.values() for file in part.source.files})
        digests = {file: digester.submit(_digest, file) for file in files}
        with bundle.written(destination) as writer:
            for name, part in parts.items():
                for path, step in part.steps.items():
                    array = make(step, part.source.tensors)
                    if _has_nan(array):
                        say(f"warning: {' + '.join(step.names)} of {part.source.path} contains NaNs")
                    array = array if types[name] is None or not _floating(array.dtype) else array.astype(types[name])
                    writer.add(name, path, array)
                    done += array.nbytes
                    progress(done, total)
                if part.format.tokenizer and (tokenizer := part.source.beside(TOKENIZERS)):
                    writer.copy(tokenizer, "text/tokenizer.json")
                elif part.format.tokenizer and (tokenizer := part.source.beside(SENTENCEPIECE)):
                    writer.copy(tokenizer, "text/spiece.model")
            listed = {str(file.name): digests[file].result() for file in files}
            yield writer, {"converter": VERSION, "files": listed}


def _family(name: str, opened: Sequence[Source]) -> Family:
    """The family of a name; of an architecture's name or "auto", the one that the files, or else their names, tell."""
    if name in FAMILIES:
        return FAMILIES[name]
    fitting = [family for family in FAMILIES.values() if name == "auto" or family.is_a(name)]
    if not fitting:
        raise ConvertError(f"unknown family {name!r}; known: {', '.join(FAMILIES)}, auto")
    fitting = [family for family in fitting if all(recognise(family, source) for source in opened)]
    is_main = lambda family, source: any(layout.part in ("target", "metric") for layout in recognise(family, source))
    fitting = [family for family in fitting if any(is_main(family, source) for source in opened)]
    if len(fitting) > 1:  # fine-tunes of one architecture
        names = [str(source.path.absolute()).lower() for source in opened if is_main(fitting[0], source)]
        fitting = [family for family in fitting if any(family.name in name for name in names)]
    if len(fitting) != 1:
        raise ConvertError(f"the files do not tell the family: name one of {', '.join(FAMILIES)}")
    return fitting[0]


def recognise(family: Family, source: Source) -> list[Format]:
    """The formats of a family that a source has: of every part the first that fits."""
    found: dict[str, Format] = {}
    for layout in family.formats:
        if all(present(pattern, source.tensors) for pattern in layout.signature):
            found.setdefault(layout.part, layout)
    return list(found.values())


def _parts(family: Family, opened: Sequence[Source], pixels: int | None) -> dict[str, Part]:
    formats: dict[str, tuple[Format, Source]] = {}
    for source in opened:
        layouts = recognise(family, source)
        if not layouts:
            others = [f"{own[0].name} ({f.name})" for f in FAMILIES.values() if (own := recognise(f, source))]
            looks = (
                f"it looks like {others[0]}" if others else f"its tensors are {', '.join(list(source.tensors)[:3])} ..."
            )
            raise ConvertError(f"{source.path} is no part of {family.name}: {looks}")
        for layout in layouts:
            if layout.part in formats:
                raise ConvertError(f"{source.path} and {formats[layout.part][1].path} are both a {layout.part}")
            formats[layout.part] = layout, source
    for part in family.required:
        if part not in formats:
            known = " or ".join(layout.name for layout in family.formats if layout.part == part)
            raise ConvertError(f"{family.name} needs its {part} too ({known}): name that file as well")
    parts: dict[str, Part] = {}
    for name in _ORDER:
        if name in formats:
            known = Known({n: p.config for n, p in parts.items()}, pixels)
            parts[name] = planned(*formats[name], known)
    return parts


def planned(layout: Format, source: Source, known: Known) -> Part:
    """Works out a part's configuration and how its parameters are made."""
    try:
        config = layout.configure(source, known)
        shapes = bundle.shapes(layout.part, config)
    except (ArithmeticError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise ConvertError(f"{source.path} is no proper {layout.name}: {type(error).__name__}: {error}") from error
    return Part(layout, source, config, plan(layout.rules(config), shapes, source, layout.skip), shapes)


def _dtype(name: str, part: Part, dtype: str | None) -> np.dtype | None:
    if name in ("vq", "metric"):
        return None
    return DTYPES[dtype or ("bf16" if part.parameters >= LARGE else "stored")]


def _size(part: Part, dtype: np.dtype | None) -> int:
    size = 0
    for path, step in part.steps.items():
        stored: Tensor = part.source.tensors[step.names[0]]
        kind = stored.dtype if dtype is None or not _floating(stored.dtype) else dtype
        size += int(np.prod(part.shapes[path], dtype=np.int64)) * kind.itemsize
    return size


def _floating(dtype: np.dtype) -> bool:
    return dtype == ml_dtypes.bfloat16 or np.issubdtype(dtype, np.floating)


def _has_nan(array: np.ndarray, rows: int = 1 << 20) -> bool:
    if not _floating(array.dtype):
        return False
    flat = array.reshape(-1) if array.flags.c_contiguous else array.ravel("K")
    return any(bool(np.isnan(flat[i : i + rows]).any()) for i in range(0, flat.size, rows))


def _digest(file: pathlib.Path) -> str:
    with file.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def _check_destination(destination: pathlib.Path) -> None:
    if (
        destination.exists()
        and not (destination / "config.json").is_file()
        and (not destination.is_dir() or any(destination.iterdir()))
    ):
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
