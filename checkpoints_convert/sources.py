"""Checkpoints: what tensors there are, and each of them on demand.

Opening a source reads names, shapes and types only. A tensor is a view of the mapped file until a transform copies it,
so that a conversion never holds more than the tensors of one parameter.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cascade_jax import hub
from cascade_jax.models.chameleon import code_ids
from checkpoints_convert import folders, tiktoken
from checkpoints_convert.files import read_json, read_tensors
from checkpoints_convert.tensors import ConvertError, Tensor, listed

TOKENIZERS = ("tokenizer.json", "text_tokenizer.json")
SENTENCEPIECE = ("spiece.model",)  # T5's tokenizer as it was trained, where no tokenizer.json was made of it
TIKTOKEN = ("emu3.tiktoken",)  # Emu3's, of which one can be made: see `tiktoken`
CODES = "vocabulary.codes"  # not a tensor of any file: see `Source`
# What wrappers (torch.compile, fully sharded and checkpointed modules, DeepSpeed) put into names, at any place.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")


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
      notes: what was chosen or passed over, for people.
      pieces: its files as checkpoints of their own, if they may be that as well.
      twice: a tensor that several of its files have, which then cannot be one checkpoint.
      place: where it lies; None if it is no file.
    """

    path: pathlib.Path
    files: tuple[pathlib.Path, ...]
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    others: tuple[pathlib.Path, ...] = ()
    notes: tuple[str, ...] = ()
    pieces: tuple["Source", ...] = ()
    twice: str | None = None
    place: folders.Place | None = None

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

    def unwrapped(self) -> "Source | None":
        """The same checkpoint without the first part of all its names; None if they do not share one."""
        names = [name for name in self.tensors if name != CODES]
        first = {name.partition(".")[0] for name in names}
        if len(first) != 1 or not all("." in name for name in names):
            return None
        tensors = {n if n == CODES else n.partition(".")[2]: tensor for n, tensor in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors)

    def number(self, settings: Mapping[str, Any], name: str, usual: float) -> float:
        """A setting that is a positive number; `usual` where it is not stated.

        Raises:
          ConvertError: if it is something else.
        """
        stated = usual if settings.get(name) is None else settings[name]
        if isinstance(stated, bool) or not isinstance(stated, int | float) or not 0 < stated < float("inf"):
            raise ConvertError(f"{self.path}: config.json says {name} {stated!r}, and that must be a positive number")
        return float(stated)

    def check_settings(self, settings: Mapping[str, Any], **found: int | None) -> None:
        """Compares sizes that the settings state with those of the tensors.

        Raises:
          ConvertError: if they contradict one another.
        """
        wrong = [
            f"{name} {settings[name]!r} where its tensors have {size}"
            for name, size in found.items()
            if settings.get(name) is not None and settings[name] != size
        ]
        if wrong:
            raise ConvertError(f"{self.path}: config.json says {'; '.join(wrong)}")


def open_sources(paths: Iterable[str | pathlib.Path]) -> list[Source]:
    """Opens checkpoints that make one model, as `open_source`. A folder that only has checkpoints in folders below it
    stands for these."""
    places: list[pathlib.Path] = []
    for path in map(pathlib.Path, paths):
        path = _found(path)
        below = _listing(path, _only_below) if path.is_dir() else []
        places += [place for place in below or [path] if place not in places or place.is_file()]
    return [open_source(path, [_folder(other) for other in places if other != path]) for path in places]


def open_source(path: str | pathlib.Path, others: Iterable[pathlib.Path] = ()) -> Source:
    """Opens a checkpoint: a file, or a folder as it is downloaded; `others` as in `Source`.

    Raises:
      ConvertError: if there is nothing to read, a shard is missing, or a file is damaged.
    """
    path = _found(pathlib.Path(path))
    place = _listing(path, folders.place)
    contents = {file: read_tensors(file) for file in place.files}
    notes = (*place.notes, *(note for content in contents.values() for note in content.notes))
    tensors: dict[str, Tensor] = {}
    twice = None
    for file, content in contents.items():
        for name, tensor in content.tensors.items():
            if name in tensors and not place.apart:
                raise ConvertError(f"{path} has the tensor {name} in two files, one of them {file.name}")
            twice = name if name in tensors else twice
            tensors[name] = tensor
    if place.expected is not None and (lost := sorted(place.expected - tensors.keys())):
        raise ConvertError(f"{path} lacks tensors that its index names: {listed(lost)}")
    if not tensors:
        raise ConvertError(f"{path} holds no tensors")
    common = {"settings": _settings(path), "others": tuple(others)}
    pieces = [
        _source(file, (file,), dict(content.tensors), place=folders.Place(file, (file,)), notes=content.notes, **common)
        for file, content in contents.items()
        if place.apart and content.tensors
    ]
    return _source(path, place.files, tensors, notes=notes, pieces=tuple(pieces), twice=twice, place=place, **common)


def _source(path, files, tensors: dict[str, Tensor], **more) -> Source:
    source = Source(path, files, _plain_names(path, tensors), **more)
    if (codes := _codes(source)) is not None:
        source.tensors[CODES] = Tensor(codes.shape, codes.dtype, lambda: codes)
    return source


def _plain_names(path: pathlib.Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names without what wrappers put into these."""
    while True:
        plain = {".".join(p for p in name.split(".") if p not in WRAPPERS): name for name in tensors}
        if all(name.startswith("module.") for name in plain):
            plain = {name.removeprefix("module."): old for name, old in plain.items()}
        if len(plain) != len(tensors):
            raise ConvertError(f"{path} has tensors that differ only in what wrappers put into their names")
        if all(name == old for name, old in plain.items()):
            return tensors
        tensors = {name: tensors[old] for name, old in plain.items()}


def _found(path: pathlib.Path) -> pathlib.Path:
    """The path that is meant, see `folders.located`; of an address on the hub, what is downloaded."""
    try:
        path = hub.local(path)
    except hub.HubError as error:
        raise ConvertError(str(error)) from error
    if not path.exists():
        raise ConvertError(f"there is no checkpoint {path}")
    return _listing(path, folders.located)


def _listing(path: pathlib.Path, look: Callable[[pathlib.Path], Any]) -> Any:
    """What is found at a path; if the system does not let it be looked at, a ConvertError says so."""
    try:
        return look(path)
    except OSError as error:
        raise ConvertError(f"cannot read {error.filename or path}: {error.strerror or error}") from error


def _only_below(folder: pathlib.Path) -> Sequence[pathlib.Path]:
    return folders.within(folder) if not folders.has_weights(folder) else ()


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
        file = _beside(folders, TIKTOKEN)
        return {} if file is None else tiktoken.vocabulary(file)
    tokenizer = read_json(file)
    try:
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
        words = tokenizer["model"]["vocab"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConvertError(f"{file} is damaged: {error}") from error
    return words | added if isinstance(words, dict) else added


def _names_codes(vocabulary: Iterable[str], called: tuple[str, ...] = ("IMGIMG", "<|visual token ")) -> bool:
    return any(name.startswith(called) for name in vocabulary)


def _codes(source: Source) -> np.ndarray | None:
    """Every VQ code's text token, if the vocabulary beside a checkpoint names them."""
    if not _names_codes(vocabulary := source.vocabulary(), ("IMGIMG",)):
        return None
    try:
        return code_ids(vocabulary)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConvertError(f"{source.folder}: {error}") from error


def _settings(path: pathlib.Path) -> dict[str, Any]:
    file = _folder(path) / "config.json"
    if not file.is_file():
        return {}
    try:
        settings = read_json(file)
        if not isinstance(settings, dict):
            raise ConvertError(f"{file} is damaged: it holds no settings by name")
    except ConvertError:
        if path.is_dir():
            raise
        return {}  # of something else in the same folder
    return settings
