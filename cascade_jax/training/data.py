"""What drafters are trained on: token sequences with their prompts, on disk in shards that carry their own digests.

    DIR/data.json               what the data are, and the digest of the target they belong to
    DIR/00007-DIGEST.npz        a shard's rows: tokens, captions, encoded prompts
    DIR/00007-DIGEST.npy        the target's features of these rows, if they are kept

A shard appears whole or not at all, under a name that holds the first 16 digits of its SHA-256. Prompts are kept as the
target takes them in, so that training needs no text encoder.
"""

import collections
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from cascade_jax import bundle, files
from cascade_jax.models.prompt import Prompt, TokenRows
from cascade_jax.models.transformer import OutputMajor

FORMAT = 1
WINDOW = 64  # shards among which rows are shuffled
_HALF = ":bfloat16"  # marks arrays that NumPy has no type for


class DataError(ValueError):
    """A folder of training data that cannot be used; the message is one line and says what would help."""


def fingerprint(target: Any) -> str:
    """Digest of a target's parameters, rounded to bfloat16: the same whatever type they were loaded as."""
    digest = hashlib.sha256()
    whole = lambda leaf: isinstance(leaf, OutputMajor)
    leaves = jax.tree_util.tree_leaves_with_path(bundle.plain(target), is_leaf=whole)
    for path, leaf in sorted(((jax.tree_util.keystr(path), leaf) for path, leaf in leaves), key=lambda item: item[0]):
        array = np.asarray(leaf)
        array = array.astype(ml_dtypes.bfloat16) if jax.numpy.issubdtype(leaf.dtype, np.floating) else array
        digest.update(f"{path} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8))
    return digest.hexdigest()


def write_shard(
    folder: pathlib.Path,
    number: int,
    tokens: np.ndarray,
    captions: Sequence[str],
    prompts: Sequence[Prompt],
    features: np.ndarray | None = None,
) -> None:
    """Writes a shard of n rows.

    Args:
      tokens: int [n, T].
      captions: what the prompts say; "" where they came encoded.
      prompts: as the target takes them in.
      features: [n, 2, S, w], see `drafter.branch_features`; None to keep none.
    """
    small = np.uint16 if tokens.max(initial=0) < 1 << 16 else np.int32
    arrays = {"tokens": tokens.astype(small), "captions": np.array(captions, str)} | _stacked(prompts)
    arrays = dict(_packed(name, array) for name, array in arrays.items())
    if features is not None:
        arrays["slots"] = np.int32(features.shape[2])
        for left in folder.glob(f"{number:05d}-*.npy"):  # a run that was killed in between left it
            left.unlink()
        _place(folder, number, "npy", lambda file: np.save(file, _packed("", features)[1]))
    _place(folder, number, "npz", lambda file: np.savez_compressed(file, **arrays))


def shards(folder: pathlib.Path, suffix: str = "npz") -> dict[int, pathlib.Path]:
    """The finished shards of a folder by number."""
    found = {}
    for path in sorted(folder.glob(f"*.{suffix}")):
        if match := re.fullmatch(r"(\d{5,})-[0-9a-f]{16}\." + suffix, path.name):
            found[int(match[1])] = path
    return found


class Data:
    """A folder of training data.

    Attributes:
      about: data.json's content.
      count: number of rows.
      taps: which of the target's layers stand behind the kept features; None if none are kept.
    """

    def __init__(self, folder: str | os.PathLike, target: str | None = None):
        """Opens a folder.

        Args:
          target: the fingerprint of the target that the data must belong to; None for any.

        Raises:
          DataError: if there are no data, shards are missing, or they are another model's.
        """
        self.folder = pathlib.Path(folder)
        try:
            self.about = json.loads((self.folder / "data.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise DataError(f"{folder} holds no training data: make some with cascade-jax distill") from error
        if self.about.get("format") != FORMAT:
            raise DataError(f"{folder} has another format than this version reads ({FORMAT}): distill again")
        if target is not None and self.about["target"] != target:
            raise DataError(
                f"{folder} was made by another model ({self.about['model']}, {self.about['target'][:12]}; this one is "
                f"{target[:12]}): distill with this model, or train with that one"
            )
        self.count, self._size = self.about["count"], self.about["shard"]
        self.taps = None if self.about["features"] is None else tuple(self.about["features"])
        self._files, wanted = shards(self.folder), range(-(-self.count // self._size))
        self._features = {} if self.taps is None else shards(self.folder, "npy")
        missing = [n for n in wanted if n not in self._files or (self.taps is not None and n not in self._features)]
        if missing:
            some = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise DataError(f"{folder} lacks {len(missing)} of {len(wanted)} shards ({some}): run distill again")
        self._read: collections.OrderedDict[int, dict[str, np.ndarray]] = collections.OrderedDict()
        self._checked: set[int] = set()

    @functools.cached_property
    def kept_slots(self) -> int:
        """The most slots that kept features of a row have."""
        found = []
        for path in self._files.values():
            with np.load(path) as arrays:
                found.append(int(arrays["slots"]))
        return max(found)

    def rows(self, indices: Sequence[int]) -> tuple[np.ndarray, list[str], list[Prompt]]:
        """Tokens int32 [n, T], captions and prompts of the rows.

        Raises:
          DataError: if a shard is not what it was when it was written.
        """
        found = [(self._shard(i // self._size), i % self._size) for i in map(int, indices)]
        tokens = np.stack([shard["tokens"][row] for shard, row in found]).astype(np.int32)
        prompts = [Prompt(*(_cut(shard, name, row) for name in ("ids", "features", "mask"))) for shard, row in found]
        return tokens, [str(shard["captions"][row]) for shard, row in found], prompts

    def features(self, indices: Sequence[int], slots: int) -> np.ndarray:
        """Kept features [n, 2, slots, w] of the rows; zeros behind a row's end."""
        rows = []
        for number, row in (divmod(int(i), self._size) for i in indices):
            path = self._features[number]
            if number not in self._checked:
                _verify(path)
                self._checked.add(number)
            array = _unpacked(self.about["dtype"], np.load(path, mmap_mode="r")[row])
            rows.append(np.pad(array, [(0, 0), (0, slots - array.shape[1]), (0, 0)]))
        return np.stack(rows)

    def order(self, rows: int, seed: int, epoch: int) -> np.ndarray:
        """The first `rows` rows in an epoch's order, int [rows]: shards shuffled, and rows within `WINDOW` shards."""
        rng = np.random.default_rng((seed, epoch))
        numbers = rng.permutation(-(-rows // self._size))
        windows = []
        for start in range(0, len(numbers), WINDOW):
            chosen = np.concatenate([np.arange(n * self._size, (n + 1) * self._size) for n in numbers[start:][:WINDOW]])
            windows.append(rng.permutation(chosen[chosen < rows]))
        return np.concatenate(windows)

    def _shard(self, number: int) -> dict[str, np.ndarray]:
        if number not in self._read:
            path = self._files[number]
            _verify(path)
            with np.load(path) as arrays:
                loaded = [(name.removesuffix(_HALF), _unpacked(name, arrays[name])) for name in arrays.files]
            self._read[number] = dict(loaded)
            while len(self._read) > 2 * WINDOW:
                self._read.popitem(last=False)
        self._read.move_to_end(number)
        return self._read[number]


def by_row(stacked: Any, slots: int | None = None) -> Any:
    """Stacked prompts with the sequence as every leaf's leading axis; token rows are padded to `slots`.

    Families stack text tokens branch by branch, [2 B, ...]: here [B, 2, ...].
    """
    if not isinstance(stacked, TokenRows):
        return jax.tree.map(np.asarray, stacked)
    ids, length = np.asarray(stacked.ids), np.asarray(stacked.length)
    ids = np.pad(ids, [(0, 0), (0, (slots or ids.shape[1]) - ids.shape[1])])
    return TokenRows(ids.reshape(2, -1, ids.shape[1]).swapaxes(0, 1), length.reshape(2, -1).swapaxes(0, 1))


def by_branch(stacked: Any) -> Any:
    """The inverse of `by_row`."""
    if not isinstance(stacked, TokenRows):
        return stacked
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), stacked)


def _stacked(prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
    """Prompts as arrays; text tokens of different lengths are padded, and masked."""
    arrays = {}
    ids = [None if p.ids is None else np.asarray(p.ids, np.int32) for p in prompts]
    masks = [None if p.mask is None else np.asarray(p.mask, bool) for p in prompts]
    if ids[0] is not None and ids[0].ndim:
        ids = [row if mask is None else row[mask] for row, mask in zip(ids, masks)]
        width = max(map(len, ids))
        masks = [np.arange(width) < len(row) for row in ids]
        ids = [np.pad(row, (0, width - len(row))) for row in ids]
    if ids[0] is not None:
        arrays["ids"] = np.stack(ids)
    if prompts[0].features is not None:
        arrays["features"] = np.stack([np.asarray(p.features) for p in prompts])
    if masks[0] is not None:
        arrays["mask"] = np.stack(masks)
    return arrays


def _cut(shard: dict[str, np.ndarray], name: str, row: int) -> np.ndarray | None:
    return shard[name][row] if name in shard else None


def _packed(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    half = array.dtype == ml_dtypes.bfloat16
    return (name + _HALF, array.view(np.uint16)) if half else (name, array)


def _unpacked(name: str, array: np.ndarray) -> np.ndarray:
    return array.view(ml_dtypes.bfloat16) if name.endswith("bfloat16") else array


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _verify(path: pathlib.Path) -> None:
    if _digest(path) != path.stem.partition("-")[2]:
        raise DataError(f"{path} is damaged: delete it and run distill again")


def _place(folder: pathlib.Path, number: int, suffix: str, save) -> None:
    named = lambda path: f"{number:05d}-{_digest(path)}.{suffix}"
    with files.whole(folder / f"{number:05d}.{suffix}", named) as temporary, temporary.open("wb") as file:
        save(file)
