"""Decoding programs in a file, for several platforms, run without the models' code: what `export` makes.

An artifact is an uncompressed zip file:

    meta.json      what it is: format, versions, platforms, the bundle's config.json, method, names of arguments
    programs/NAME  serialised `jax.export` programs, of the same StableHLO that jit compiles
    arrays/N       the arrays that the programs read, raw, in the order that meta.json lists with types and shapes
    text/NAME      what reading prompts needs beside arrays

Its programs, whose arguments and results are dictionaries by dotted path:

    generate (parameters, prompts, seed, numbers, rule, sampling) -> tokens and sums of statistics
    start    the same but the rule                                -> a decoding state after the prefill
    step     (parameters, state, rule, sampling)                  -> the state one step later
    pictures (tokens)                                             -> uint8 pictures
    text     (ids, mask)                                          -> caption features, with a T5 encoder alone

Thresholds, sampling settings and seeds are arguments, and so is the batch's size unless it is fixed.
"""

import dataclasses
import json
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from cascade_jax import bundle as bundles
from cascade_jax import decode, files, pipeline
from cascade_jax.bundle import Bundle, Prompt
from cascade_jax.methods import Method
from cascade_jax.models.prompt import TokenRows
from cascade_jax.text import readers
from cascade_jax.tree import name_of

FORMAT = 1


class ArtifactError(ValueError):
    """An artifact that cannot be written or run here; the message is one line and says what would help."""


@dataclasses.dataclass(frozen=True)
class Lowered:
    """Programs and what they read.

    Attributes:
      programs: `jax.export.Exported` by name.
      arrays: the programs' constant arguments: {"parameters", "pictures", "text", "rule", "sampling"}, each a
        dictionary of arrays, or of shapes, by dotted path.
      batch: the fixed batch size; None if any will do.
      slots: text tokens of a prompt; None with other kinds of prompts.
    """

    programs: dict[str, jax.export.Exported]
    arrays: dict[str, dict[str, Any]]
    batch: int | None
    slots: int | None


def write(file: pathlib.Path, model: Bundle, method: Method, lowered: Lowered, folder: pathlib.Path) -> None:
    """Writes an artifact, whole or not at all.

    Args:
      folder: the bundle's directory, whose text/ goes along.

    Raises:
      ArtifactError: if the library that serialises is missing.
    """
    try:
        blobs = {name: program.serialize() for name, program in lowered.programs.items()}
    except ImportError as error:
        raise ArtifactError("writing programs needs flatbuffers: pip install 'cascade_jax[export]'") from error
    leaves = [(part, name, leaf) for part, own in lowered.arrays.items() for name, leaf in own.items()]
    meta = {
        "format": FORMAT,
        "versions": {"jax": jax.__version__},
        "platforms": list(next(iter(lowered.programs.values())).platforms),
        "config": bundles.to_json(model.config),
        "method": method.name,
        "tree": name_of(method.tree),
        "settings": method.settings,
        "batch": lowered.batch,
        "slots": lowered.slots,
        "arrays": [[part, name, str(leaf.dtype), list(leaf.shape)] for part, name, leaf in leaves],
    }
    with files.whole(file) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
        archive.writestr("meta.json", json.dumps(meta, indent=2))
        for name, blob in blobs.items():
            archive.writestr(f"programs/{name}", bytes(blob))
        for number, (_, _, leaf) in enumerate(leaves):
            archive.writestr(f"arrays/{number}", np.asarray(leaf).tobytes())
        if (folder / "text").is_dir():
            for path in sorted((folder / "text").iterdir()):
                archive.write(path, f"text/{path.name}")


class Artifact:
    """An artifact that is open for running.

    Attributes:
      meta: its meta.json.
      config: the configuration of the bundle that it was made of.
      arrays: as of `Lowered`, on the default device.
    """

    def __init__(self, file: pathlib.Path):
        """Opens an artifact.

        Raises:
          ArtifactError: if it is none, is damaged, or is for other versions or platforms.
        """
        self._file = pathlib.Path(file)
        if not self._file.is_file():
            raise ArtifactError(f"there is no artifact {file}: cascade-jax export writes one")
        self._text = tempfile.TemporaryDirectory()
        try:
            with zipfile.ZipFile(self._file) as archive:
                self.meta = json.loads(archive.read("meta.json"))
                self._check()
                self.arrays = self._arrays(archive)
                self._blobs = {
                    name.split("/")[1]: archive.read(name)
                    for name in archive.namelist()
                    if name.startswith("programs/")
                }
                for name in archive.namelist():
                    if name.startswith("text/"):
                        with archive.open(name) as source:
                            self._extract(source, name.split("/")[-1])
            self.config = bundles.from_json(dict(self.meta["config"]))
        except ArtifactError:
            raise
        except (zipfile.BadZipFile, KeyError, ValueError, TypeError, OSError, EOFError) as error:
            raise ArtifactError(f"{file} is damaged, or no artifact of cascade-jax export: {error}") from error

    def program(self, name: str) -> Callable:
        """One of the programs, jitted.

        Raises:
          ArtifactError: if the artifact has no such program, or this version of JAX cannot read it.
        """
        if name not in self._programs:
            if name not in self._blobs:
                raise ArtifactError(f"{self._file} has no program {name!r}; it has {', '.join(self._blobs)}")
            try:
                program = jax.export.deserialize(bytearray(self._blobs[name]))
            except ImportError as error:
                raise ArtifactError("reading programs needs flatbuffers: pip install 'cascade_jax[export]'") from error
            except Exception as error:
                raise ArtifactError(self._other_version()) from error
            version = program.calling_convention_version
            low, high = (getattr(jax.export, f"{m}imum_supported_calling_convention_version") for m in ("min", "max"))
            if not low <= version <= high:
                raise ArtifactError(self._other_version())
            self._programs[name] = jax.jit(program.call)
        return self._programs[name]

    @cached_property
    def read(self) -> Callable[[Sequence[str]], list[Prompt]] | None:
        """From texts to encoded prompts; None where prompts come encoded."""
        encode = None
        if "text" in self._blobs:
            encode = lambda ids, mask: self.program("text")(self.arrays["text"], ids, mask)
        table = self.arrays["text"].get("")
        return readers.reader(self.config, table, encode, pathlib.Path(self._text.name))

    def encode(self, prompts: Sequence[str | Prompt]) -> list[Prompt]:
        """As `Bundle.encode`."""
        return bundles.encode(prompts, self.read)

    def prompts(self, encoded: Sequence[Prompt]) -> dict[str, jax.Array]:
        """Encoded prompts as the programs take them.

        Raises:
          ValueError: if they do not fit: their number is fixed, or one is too long.
        """
        if self.meta["batch"] not in (None, len(encoded)):
            raise ArtifactError(f"{self._file} draws {self.meta['batch']} pictures at once, not {len(encoded)}")
        stacked = self.config.target.stack(encoded)
        if isinstance(stacked, TokenRows):
            missing = self.meta["slots"] - int(np.max(stacked.length))
            if missing < 0:
                raise ArtifactError(
                    f"a prompt has {int(np.max(stacked.length))} tokens and {self._file} takes {self.meta['slots']}: "
                    "export it with more --slots"
                )
            used = stacked.ids[:, : self.meta["slots"]]
            stacked = stacked.replace(ids=np.pad(used, ((0, 0), (0, self.meta["slots"] - used.shape[1]))))
        floating = lambda x: np.issubdtype(x.dtype, np.floating) or x.dtype == jnp.bfloat16
        return {name: x.astype(jnp.float32) if floating(x) else x for name, x in named(stacked).items()}

    def generate(self, prompts: Sequence[str | Prompt], seed: int, first: int = 0) -> pipeline.Generated:
        """Draws a picture for every prompt as `pipeline.generate` does with key(seed); the i-th is number first + i."""
        numbers = jnp.arange(first, first + len(prompts), dtype=jnp.int32)
        out = self.program("generate")(
            self.arrays["parameters"], self.prompts(self.encode(prompts)), jnp.uint32(seed), numbers,
            self.arrays["rule"], self.arrays["sampling"],
        )  # fmt: skip
        tokens = out.pop("tokens")
        images = self.program("pictures")(self.arrays["pictures"], tokens)
        return pipeline.Generated(np.asarray(images), np.asarray(tokens), pipeline.report(decode.Stats(**out)))

    @cached_property
    def _programs(self) -> dict[str, Callable]:
        return {}

    def _check(self) -> None:
        if self.meta["format"] != FORMAT:
            raise ArtifactError(
                f"{self._file} has the format {self.meta['format']} and this version reads {FORMAT}: export it again"
            )
        here = jax.export.default_export_platform()
        if here not in self.meta["platforms"]:
            raise ArtifactError(
                f"{self._file} is for {', '.join(self.meta['platforms'])} and this machine has {here}: "
                f"export it with --platforms {','.join([*self.meta['platforms'], here])}"
            )

    def _other_version(self) -> str:
        return (
            f"{self._file} was written with JAX {self.meta['versions']['jax']}, which JAX {jax.__version__} cannot "
            "read: export it again"
        )

    def _arrays(self, archive: zipfile.ZipFile) -> dict[str, dict[str, jax.Array]]:
        found: dict[str, dict[str, jax.Array]] = {name: {} for name in ("parameters", "text", "rule", "sampling")}
        for number, (part, name, dtype, shape) in enumerate(self.meta["arrays"]):
            raw = np.frombuffer(archive.read(f"arrays/{number}"), jnp.dtype(dtype))
            found.setdefault(part, {})[name] = jnp.asarray(raw.reshape(shape))
        return found

    def _extract(self, source, name: str) -> None:
        with (pathlib.Path(self._text.name) / name).open("wb") as copy:
            shutil.copyfileobj(source, copy)


def named(tree) -> dict[str, Any]:
    """The leaves of a tree by dotted path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in leaves]
    return {name: leaf for name, (_, leaf) in zip(names, leaves)}
