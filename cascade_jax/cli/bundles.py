"""Commands that make and look at models: convert, info, merge, neighbours."""

import dataclasses
import json
import math
import pathlib
from typing import Annotated, Any

from tyro.conf import Positional, arg

from cascade_jax.cli import console

Model = Annotated[Positional[str], arg(metavar="MODEL")]


@dataclasses.dataclass(frozen=True)
class Convert:
    """Turn published PyTorch checkpoints into a model that the other commands load."""

    family: Annotated[Positional[str], arg(metavar="FAMILY")]
    """llamagen, lumina-mgpt, anole, janus; clip or inception, which measure pictures; or auto, to go by the files"""
    paths: Annotated[Positional[tuple[pathlib.Path, ...]], arg(metavar="SOURCE... DEST", help_behavior_hint="")] = ()
    """files and folders as downloaded, in any order: the model, its picture tokenizer, its text encoder, a drafter; and
    last the folder to write"""
    dtype: Annotated[str | None, arg(metavar="bf16|fp32|stored", help_behavior_hint="(default: bf16 from 3B on)")] = (
        None
    )
    """of the weights; picture tokenizers and what measures pictures keep their own"""
    pixels: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: from the files)")] = None
    """side of the pictures, where neither the files nor their names say it"""

    def run(self, command: str) -> None:
        with console.bad_input():
            if len(self.paths) < 2:
                raise ValueError("convert takes FAMILY SOURCE... DEST: name at least one file and where to write")
            from checkpoints_convert import convert
        *sources, destination = self.paths
        with console.bad_input(), console.terminable(), console.bar("converting") as progress:
            convert(
                self.family, sources, destination, dtype=self.dtype, pixels=self.pixels, say=console.say,
                progress=progress,
            )  # fmt: skip
        print(f"converted: {destination}")


@dataclasses.dataclass(frozen=True)
class Info:
    """Print what a model is: family, sizes, layout, sampling defaults, where its weights come from."""

    model: Model = "scenes"
    """scenes, or the folder of a converted model"""
    json: bool = False
    """print it as JSON"""

    def run(self, command: str) -> None:
        with console.bad_input():
            from cascade_jax import bundle, pipeline

            directory = pipeline.folder(self.model)
            config = bundle.read_any_config(directory)
            found = describe(config, bundle.stored(directory))
            found["neighbours"] = _width(directory / bundle.NEIGHBOURS)
        print(json.dumps(found, indent=2) if self.json else "\n".join(_lines(found)))


@dataclasses.dataclass(frozen=True)
class Merge:
    """Put a drafter into a model; one that it has is replaced."""

    model: Model
    """the folder of a converted model"""
    drafter: Annotated[pathlib.Path, arg(metavar="DIR")]
    """the drafter as downloaded, config.json and its weights; or a run of `train`"""
    dtype: Annotated[str | None, arg(metavar="bf16|fp32|stored", help_behavior_hint="(default: as stored)")] = None
    """of the drafter's weights"""

    def run(self, command: str) -> None:
        with console.bad_input(), console.terminable():
            _check_own(self.model)
            from cascade_jax.training import run

            if run.is_run(self.drafter):
                run.merge(self.model, self.drafter, dtype=_type(self.dtype))
            else:
                from checkpoints_convert import merge

                merge(self.model, self.drafter, dtype=self.dtype, say=console.say)
        print(f"merged: {self.model}")


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Store LANTERN's table: for every code of a model's picture tokenizer the codes nearest to it."""

    model: Model
    """the folder of a converted model"""
    k: Annotated[int, arg(metavar="N")] = 1000
    """neighbours of a code"""

    def run(self, command: str) -> None:
        console.set_up()
        with console.bad_input():
            _check_own(self.model)
            from cascade_jax import bundle, rules

            config = bundle.read_config(self.model)
            if not 1 <= self.k < config.vq.codebook_size:
                raise ValueError(f"k must be between 1 and {config.vq.codebook_size - 1}, not {self.k}")
            codebook = bundle.load(self.model).merged("vq").raw_codebook()
            bundle.save_neighbours(self.model, rules.nearest_codes(codebook, self.k))
        print(f"stored: {pathlib.Path(self.model) / bundle.NEIGHBOURS}, {config.vq.codebook_size} x {self.k}")


def _check_own(model: str) -> None:
    """Raises a ValueError for the model that comes with the package, which is read only."""
    if model == "scenes":
        from cascade_jax import pipeline

        raise ValueError(
            f"scenes is embedded in the package, which is not written to: copy it (cp -r {pipeline.SCENES} my-scenes) "
            "and name the copy"
        )


def _type(name: str | None):
    """The type that a trained drafter is stored as; float32 is how it was trained."""
    types = {None: "bfloat16", "bf16": "bfloat16", "fp32": "float32", "stored": "float32"}
    if name not in types:
        raise ValueError(f"unknown dtype {name!r}; known: bf16, fp32, stored")
    return types[name]


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
