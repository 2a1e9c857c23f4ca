"""Which files of a folder are a checkpoint, and what a checkpoint is called.

A folder as it was downloaded holds an index and its shards, one whole file, shards without an index, or files that are
checkpoints of their own, such as a model beside its picture tokenizer. The hub's cache keeps a repository as
models--OWNER--NAME/snapshots/REVISION, of links to files in blobs/ that have digests for names.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

from checkpoints_convert.files import PICKLES, SAFETENSORS, read_json
from checkpoints_convert.tensors import ConvertError, listed

INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = ("model.safetensors", "pytorch_model.bin", "autoencoder.jit")  # the last beside encoder.jit and decoder.jit
_SHARD = re.compile(r"(?P<stem>.+?)[-_.]?(?P<number>\d{1,6})-of-(?P<count>\d{1,6})(?P<ending>\.\w+)")
_META = re.compile(r"consolidated\.\d+\.pth")
# What training leaves beside the weights: its arguments, and what it needs to go on.
_STATE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|trainer_state)[\w.-]*|.*optim_states\.pt"
)
_HUB = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)|models--(?P<only>.+)")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one checkpoint lies.

    Attributes:
      path: its folder, or its only file.
      files: that hold its tensors.
      expected: tensors that it must have, if an index says so.
      apart: whether the files may be checkpoints of their own as well.
      notes: what was passed over, for people.
    """

    path: pathlib.Path
    files: tuple[pathlib.Path, ...]
    expected: frozenset[str] | None = None
    apart: bool = False
    notes: tuple[str, ...] = ()


class _Incomplete(ConvertError):
    """Shards are missing; other files of the folder may hold the same weights."""


def located(path: pathlib.Path) -> pathlib.Path:
    """The folder or the file that a path means: of a repository in the hub's cache its snapshot, of a blob the file
    that links to it, of a shard or an index its folder.

    Raises:
      ConvertError: if a repository's folder in the cache does not tell which of its snapshots is meant.
    """
    if path.is_dir():
        return _snapshot(path) if (path / "snapshots").is_dir() else path
    if path.parent.name == "blobs" and (snapshots := path.parent.parent / "snapshots").is_dir():
        links = (file for file in sorted(snapshots.rglob("*")) if file.is_file() and file.samefile(path))
        path = next(links, path)
    shard = _SHARD.fullmatch(path.name)
    if path.is_file() and (path.name in INDICES or (shard and int(shard["count"]) > 1)):
        return path.parent
    return path


def _snapshot(repository: pathlib.Path) -> pathlib.Path:
    there = sorted(p for p in (repository / "snapshots").iterdir() if p.is_dir())
    main = repository / "refs" / "main"
    if main.is_file() and (chosen := repository / "snapshots" / main.read_text().strip()) in there:
        return chosen
    if len(there) != 1:
        what = f"snapshots {listed(p.name for p in there)}: name the folder of one" if there else "no snapshot"
        raise ConvertError(f"{repository} has {what}")
    return there[0]


def names(path: pathlib.Path) -> Iterator[str]:
    """What a checkpoint is called, from its file or folder upwards. A snapshot's revision is no name, and a repository
    in the hub's cache is called what it is called on the hub."""
    parts = path.absolute().parts
    for i in reversed(range(len(parts))):
        if parts[i] == "snapshots" or (parts[i - 1] == "snapshots" and i > 0):
            continue
        if match := _HUB.fullmatch(parts[i]):
            yield from filter(None, (match["only"] or match["name"], match["owner"]))
        else:
            yield parts[i]


def number_in_name(path: pathlib.Path, known: Iterable[int]) -> int | None:
    """The only one of some numbers that a checkpoint's file or folder has in its name, as a word of its own."""
    number = rf"(?<![0-9a-z])({'|'.join(map(str, known))})(?:px|p|x\1)?(?![0-9a-z])"
    resolved = path.resolve()
    places = [path, *([] if path.is_dir() else [path.parent]), *([resolved] if path.is_dir() else [])]
    for name in (next(names(place), "") for place in places):
        if found := set(re.findall(number, name.lower())):
            return int(found.pop()) if len(found) == 1 else None
    return None


def place(path: pathlib.Path) -> Place:
    """The checkpoint of a file or a folder.

    Raises:
      ConvertError: if there is none, or a part of it is missing.
    """
    if not path.is_dir():
        if _META.fullmatch(path.name):
            _check_meta([file for file in path.parent.iterdir() if _META.fullmatch(file.name)])
        return Place(path, (path,))
    incomplete: _Incomplete | None = None
    for candidate in (_indexed, _whole, _sharded):
        try:
            if found := candidate(path):
                return _instead(found, incomplete)
        except _Incomplete as error:
            incomplete = incomplete or error
    if incomplete:
        raise incomplete
    if found := _loose(path):
        return found
    if (path / "params").is_dir() and (path / "config.json").is_file():
        raise ConvertError(f"{path} is a converted model already: name what was downloaded")
    raise ConvertError(f"{path} holds no {', '.join(SAFETENSORS + PICKLES)} file")


def _instead(found: Place, incomplete: _Incomplete | None) -> Place:
    """A checkpoint that is read in place of one that is incomplete, with a note that says so."""
    if incomplete is None:
        return found
    note = f"note: {incomplete}; {listed(file.name for file in found.files)} is read instead"
    return dataclasses.replace(found, notes=(*found.notes, note))


def within(folder: pathlib.Path, levels: int = 2) -> list[pathlib.Path]:
    """The folders below one, up to some levels deep, that hold checkpoints."""
    below = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = []
    for inner in below:
        if has_weights(inner):
            found.append(inner)
        elif levels > 1:
            found += within(inner, levels - 1)
    return found


def beside(place: Place) -> list[pathlib.Path]:
    """What else a checkpoint's folder holds: files that are no part of it, nor of the same weights in another form, and
    the folders below it with checkpoints."""
    if not place.path.is_dir():
        return []
    same = (*WHOLE, *(file.name for file in place.files))
    files = [
        f for f in _files(place.path, SAFETENSORS + PICKLES) if f.name not in same and not _SHARD.fullmatch(f.name)
    ]
    return files + within(place.path)


def has_weights(folder: pathlib.Path) -> bool:
    """Whether a folder holds a checkpoint, complete or not."""
    return bool(_files(folder, SAFETENSORS + PICKLES)) or any((folder / name).is_file() for name in INDICES)


def _files(folder: pathlib.Path, endings: Sequence[str]) -> list[pathlib.Path]:
    """A folder's checkpoint files of some kind, without what training leaves beside them."""
    files = (file for file in sorted(folder.iterdir()) if file.suffix in endings and not file.name.startswith("."))
    return [file for file in files if file.is_file() and not _STATE.fullmatch(file.name)]


def _indexed(folder: pathlib.Path) -> Place | None:
    """The shards that an index names: of the first index all of whose shards are there."""
    incomplete = None
    for name in INDICES:
        if not (folder / name).is_file():
            continue
        try:
            where = read_json(folder / name)["weight_map"]
            tensors, shards = frozenset(where), sorted(set(where.values()))
            outside = [shard for shard in shards if pathlib.PurePath(shard).name != shard]
        except (KeyError, TypeError, AttributeError) as error:
            raise ConvertError(f"{folder / name} is damaged: it has no proper weight_map") from error
        if outside:
            raise ConvertError(f"{folder / name} names files outside its folder: {listed(outside)}")
        lost = [shard for shard in shards if not (folder / shard).is_file()]
        if not lost:
            return _instead(Place(folder, tuple(folder / shard for shard in shards), tensors), incomplete)
        lacks = f"{folder} lacks {listed(lost)}, which {name} names: download them too"
        incomplete = incomplete or _Incomplete(lacks)
    if incomplete:
        raise incomplete
    return None


def _whole(folder: pathlib.Path) -> Place | None:
    return next((Place(folder, (folder / name,)) for name in WHOLE if (folder / name).is_file()), None)


def _sharded(folder: pathlib.Path) -> Place | None:
    """Shards without an index, which say themselves how many they are: the first complete set."""
    sets: dict[tuple[str, str, str], dict[int, pathlib.Path]] = {}
    for file in (*_files(folder, SAFETENSORS), *_files(folder, PICKLES)):
        if match := _SHARD.fullmatch(file.name):
            sets.setdefault((match["stem"], match["count"], match["ending"]), {})[int(match["number"])] = file
    incomplete = None
    for (_, count, _), shards in sets.items():
        first = 0 if 0 in shards else 1
        if not (lost := sorted({*range(first, int(count) + first)} - shards.keys())):
            return Place(folder, tuple(shards[number] for number in sorted(shards)))
        known, example = next(iter(shards.items()))
        width = len(_SHARD.fullmatch(example.name)["number"])
        missing = [example.name.replace(f"{known:0{width}d}-of", f"{number:0{width}d}-of") for number in lost]
        incomplete = incomplete or _Incomplete(f"{folder} lacks {listed(missing)}: download them too")
    if incomplete:
        raise incomplete
    return None


def _loose(folder: pathlib.Path) -> Place | None:
    """Files that do not say how they belong together."""
    _check_meta([file for file in _files(folder, PICKLES) if _META.fullmatch(file.name)])
    for endings in (SAFETENSORS, PICKLES):
        files = [file for file in _files(folder, endings) if not _SHARD.fullmatch(file.name)]
        if files:
            return Place(folder, tuple(files), apart=len(files) > 1)
    return None


def _check_meta(files: Sequence[pathlib.Path]) -> None:
    if len(files) > 1:
        raise ConvertError(
            f"{files[0].parent} holds a model that was split for {len(files)} devices "
            f"({listed(sorted(file.name for file in files))}). Such parts are not joined: take the Hugging Face layout"
        )
