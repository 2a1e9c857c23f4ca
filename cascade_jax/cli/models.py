"""Commands that make and look at models: convert, info, merge, neighbours."""

import dataclasses
import json
import math
import pathlib
from typing import Annotated, Any

from tyro.conf import Positional, arg

from cascade_jax import hub, interrupts
from cascade_jax.cli import console, flags
from cascade_jax.cli.command import Command

Model = Annotated[Positional[str], arg(metavar="MODEL")]
_TYPES = {"float32": "fp32", "bfloat16": "bf16", "stored": "stored"}  # as flags and the converters call them


def _types(default: str) -> Any:
    return Annotated[str | None, flags.hint("|".join(_TYPES), default)]


@dataclasses.dataclass(frozen=True)
class Convert(Command):
    """What is what is told from the files' tensors."""

    family: Annotated[Positional[str], arg(metavar="FAMILY")]
    """llamagen, lumina-mgpt, anole, janus; clip or inception, which measure pictures; or auto, to go by the files"""
    paths: Annotated[Positional[tuple[pathlib.Path, ...]], flags.hint("SOURCE... DEST")] = ()
    """files and folders as downloaded, or hf://OWNER/NAME, in any order: the model, its picture tokenizer, its text
    encoder, a drafter; and last the folder to write"""
    dtype: _types("(default: bfloat16 from 3B on)") = None
    """of the weights; picture tokenizers and what measures pictures keep their own"""
    pixels: Annotated[int | None, flags.hint("N", "(default: from the files)")] = None
    """side of the pictures, where neither the files nor their names say it"""

    def check(self):
        if len(self.paths) < 2:
            raise ValueError("convert takes FAMILY SOURCE... DEST: name at least one file and where to write")
        if hub.is_address(self.paths[-1]):
            raise ValueError("convert takes FAMILY SOURCE... DEST: name a folder to write behind what is converted")
        flags.one_of("dtype", self.dtype, (None, *_TYPES))

    def owns(self) -> pathlib.Path:
        return self.paths[-1]

    def run(self, loaded, line) -> None:
        from checkpoints_convert import convert

        *sources, destination = self.paths
        with console.bad_input(), console.bar("converting") as progress:
            convert(
                self.family, sources, destination, dtype=_TYPES.get(self.dtype), pixels=self.pixels, say=console.say,
                progress=progress,
            )  # fmt: skip
        print(f"converted: {destination}")

    def kept(self) -> str:
        return "nothing was written"


@dataclasses.dataclass(frozen=True)
class Info(Command):
    """Of models that draw, and of those that measure pictures."""

    model: Model = "scenes"
    """scenes, scenes-small, or the folder of a converted model, or hf://OWNER/NAME"""
    json: flags.Json = False
    """print it as JSON"""

    def load(self, checked):
        from cascade_jax import bundle, pipeline

        directory = pipeline.folder(self.model)
        found = describe(bundle.read_any_config(directory), bundle.stored(directory))
        return found | {"neighbours": _width(directory / bundle.NEIGHBOURS)}

    def run(self, loaded, line) -> None:
        print(json.dumps(loaded, indent=2) if self.json else "\n".join(_lines(loaded)))


@dataclasses.dataclass(frozen=True)
class Merge(Command):
    """A drafter as it was downloaded, or trained here."""

    model: Model
    """the folder of a converted model"""
    drafter: flags.Out
    """the drafter as downloaded, config.json and its weights; or a run of `train`"""
    dtype: _types("(default: as stored)") = None
    """of the drafter's weights"""

    def check(self):
        flags.one_of("dtype", self.dtype, (None, *_TYPES))
        _check_own(self.model)

    def owns(self) -> pathlib.Path:
        return pathlib.Path(self.model)

    def run(self, loaded, line) -> None:
        from cascade_jax.training import run

        with console.bad_input():
            if run.is_run(self.drafter):
                # Trained in float32; bfloat16 is how drafters are published.
                dtype = {None: "bfloat16", "stored": "float32"}.get(self.dtype, self.dtype)
                run.merge(self.model, self.drafter, dtype=dtype)
            else:
                from checkpoints_convert import merge

                interrupts.check()
                merge(self.model, self.drafter, dtype=_TYPES.get(self.dtype), say=console.say)
        print(f"merged: {self.model}")


@dataclasses.dataclass(frozen=True)
class Neighbours(Command):
    """Methods make it anew in every run otherwise."""

    model: Model
    """the folder of a converted model"""
    k: flags.Count = 1000
    """neighbours of a code"""

    def check(self):
        _check_own(self.model)

    def owns(self) -> pathlib.Path:
        return pathlib.Path(self.model)

    def load(self, checked):
        from cascade_jax import bundle

        config = bundle.read_config(self.model)
        if not 1 <= self.k < config.target.codebook_size:
            raise ValueError(f"k must be between 1 and {config.target.codebook_size - 1}, not {self.k}")
        return bundle.load(self.model).merged("vq").raw_codebook()

    def run(self, codebook, line) -> None:
        from cascade_jax import bundle, rules

        with console.bad_input():
            bundle.save_neighbours(self.model, rules.nearest_codes(codebook, self.k))
        print(f"stored: {pathlib.Path(self.model) / bundle.NEIGHBOURS}, {len(codebook)} x {self.k}")


def _check_own(model: str) -> None:
    """Raises a ValueError for a model that comes with the package, which is read only."""
    from cascade_jax import pipeline

    if place := pipeline.EMBEDDED.get(model):
        raise ValueError(
            f"{model} is embedded in the package, which is not written to: copy it (cp -r {place} my-{model}) and name "
            "the copy"
        )


def describe(config, arrays: dict[str, Any]) -> dict[str, Any]:
    """What `info` prints: config.json's content, with every part's parameters counted."""
    from cascade_jax import bundle

    raw = bundle.to_json(config)
    for part, field in bundle.FIELDS.items():
        own = [leaf for path, leaf in arrays.items() if path.split(".")[0] == part]
        if raw.get(field) is not None:
            count = sum(int(math.prod(leaf.shape)) for leaf in own)
            raw[field] = {"parameters": count, "dtype": ", ".join(sorted({str(x.dtype) for x in own})), **raw[field]}
    return raw


def _lines(found: Any, indent: str = "") -> list[str]:
    """Nested dictionaries as an indented list; what is empty or None is left out."""
    lines = []
    for name, value in found.items():
        if value is None or value == {}:
            continue
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            shown = f"{value:,}" if name == "parameters" else value
            shown = " ".join(map(str, shown)) if isinstance(shown, list | tuple) else shown
            lines.append(f"{indent}{name}  {shown}")
    return lines


def _width(file: pathlib.Path) -> int | None:
    if not file.is_file():
        return None
    import numpy as np

    return np.load(file, mmap_mode="r").shape[1]
