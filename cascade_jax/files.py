"""Files and folders that appear whole or not at all, and folders that belong to one process at a time.

    with files.whole(path) as temporary:        a file
    with files.replaced(folder) as temporary:   a folder, in place of the one that is there
    with files.published(folder) as temporary:  files that join those of a folder
    with files.owned(folder):                   nobody else works in it meanwhile

What is unfinished lies in a hidden *room* beside its destination, `.NAME-unfinished-N`, which its process keeps locked.
The kernel opens the lock when the process dies, however it dies: so the next process tells a room in use from one that
was left, and clears the latter away. No other module renames a temporary; this one imports nothing of the package.
"""

import contextlib
import errno
import glob
import itertools
import json
import os
import pathlib
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_UNFINISHED = "-unfinished-"
_LOCK = ".lock"
_OLD = ".old"  # in a room: the folder that is being replaced
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}  # of a file system
_TENSORSTORE = re.compile(r"\[os_error_code='(\d+)'\]")  # in its errors, which are no OSErrors
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # errors of writing, which come without a path


class InUse(ValueError):
    """A folder that another process works in; the message is one line."""


@contextlib.contextmanager
def whole(path: str | os.PathLike, renamed: Callable[[pathlib.Path], str] | None = None) -> Iterator[pathlib.Path]:
    """A path of the same name that takes the place of the file `path` if the block succeeds, and vanishes if not.

    Args:
      renamed: gives the file's last name once it is written, where that depends on what is in it.

    Raises:
      OSError: if the disk is full, or nothing can be written there; it names `path`.
    """
    path = pathlib.Path(path).absolute()
    with _named(path), _room(path) as room:
        temporary = room / path.name
        yield temporary
        temporary.replace(path if renamed is None else path.with_name(renamed(temporary)))


@contextlib.contextmanager
def replaced(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    """An empty folder that takes the place of `folder` if the block succeeds, and vanishes if not.

    Raises:
      OSError: as `whole`.
    """
    folder = pathlib.Path(folder).absolute()
    sweep(folder.parent, folder.name)
    with _named(folder), _room(folder) as room:
        temporary, old = room / folder.name, room / _OLD
        temporary.mkdir()
        yield temporary
        if folder.exists():
            folder.rename(old)
        try:
            temporary.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise


@contextlib.contextmanager
def published(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    """An empty folder whose files move into `folder` if the block succeeds, and vanish if not.

    Files of other names that `folder` holds already stay; a new folder appears at once with all its files.

    Raises:
      OSError: as `whole`.
    """
    folder = pathlib.Path(folder).absolute()
    sweep(folder.parent, folder.name)
    with _named(folder), _room(folder / folder.name if folder.is_dir() else folder) as room:
        temporary = room / folder.name
        temporary.mkdir()
        yield temporary
        if not folder.is_dir():
            temporary.rename(folder)
            return
        for file in sorted(temporary.iterdir()):
            file.replace(folder / file.name)


@contextlib.contextmanager
def owned(folder: str | os.PathLike) -> Iterator[None]:
    """Keeps other processes from owning `folder` during the block; clears away what killed ones left in it.

    The folder need not exist. The lock is a file beside it, or in it where nothing can be written beside it, and goes
    with the block or with the process; so do folders above that are still empty then. Of several processes that work on
    a folder together, one owns it.

    Raises:
      InUse: if another block owns it; the message says of which process.
    """
    folder = pathlib.Path(folder).resolve()
    beside = folder.name and (os.access(folder.parent, os.W_OK) or not folder.is_dir())
    file = (folder.parent if beside else folder) / f".{folder.name}{_LOCK}"
    made = [above for above in file.parents if not above.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = _locked(file)
    except BlockingIOError:
        owner = file.read_text().strip() if file.is_file() else ""
        message = f"{folder} is in use by {owner or 'another process'}: wait until it ends, or choose another folder"
        raise InUse(message) from None
    try:
        if lock is not None:
            os.ftruncate(lock, 0)
            os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        sweep(folder)
        yield
    finally:
        if lock is not None:
            file.unlink(missing_ok=True)
            os.close(lock)
        with contextlib.suppress(OSError):
            for above in made:
                above.rmdir()


def sweep(folder: str | os.PathLike, name: str | None = None) -> None:
    """Clears away what killed processes left unfinished in `folder`, of one name or of all.

    A folder whose process died while it replaced it comes back.
    """
    if fcntl is None:  # what a living process uses cannot be told from what a dead one left
        return
    pattern = f".{'*' if name is None else glob.escape(name)}{_UNFINISHED}*"
    for room in sorted(pathlib.Path(folder).glob(pattern)):
        with contextlib.suppress(OSError):  # in use, gone already, or another user's
            _left(room, _entered(room))


def cache_folder() -> pathlib.Path:
    """Where what this package keeps for a user lies, in the user's cache; it need not exist."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return pathlib.Path(home if os.path.isabs(home) else pathlib.Path.home() / ".cache") / "cascade_jax"


def check_folder(folder: str | os.PathLike) -> None:
    """Makes sure that files can be written into `folder`, without leaving a trace.

    Raises:
      ValueError: if they cannot; the message says why.
    """
    place = pathlib.Path(folder).absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"cannot write to {folder}: {place} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror or error}") from error


def check_file(path: str | os.PathLike) -> None:
    """Makes sure that the file `path` can be written; as `check_folder`."""
    if pathlib.Path(path).is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    check_folder(pathlib.Path(path).parent)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes what JSON can hold, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _named(path: pathlib.Path) -> Iterator[None]:
    """Lets errors of writing name `path`, and not a room, or nothing as those of a full disk do."""
    try:
        yield
    except OSError as error:
        nameless = error.filename is None and error.errno in _DISK
        if not nameless and _UNFINISHED not in str(error.filename):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:
        if (code := _TENSORSTORE.search(str(error))) is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


@contextlib.contextmanager
def _room(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder beside `path` that no other process enters; it goes with the block, and what is in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        room = path.with_name(f".{path.name}{_UNFINISHED}{number}")
        with contextlib.suppress(BlockingIOError):
            lock = _entered(room)
            break
    try:
        yield room
    finally:
        _left(room, lock)


def _entered(room: pathlib.Path) -> int | None:
    """Makes a room, or empties one that a dead process left; returns its lock.

    Raises:
      BlockingIOError: if another process is in it.
    """
    while True:
        try:
            room.mkdir()
            new = True
        except FileExistsError:
            new = False
        try:
            lock = _locked(room / _LOCK)
        except FileNotFoundError:  # who was in it has just left
            continue
        if not new and lock is None:
            raise BlockingIOError
        if not new:
            _emptied(room)
        return lock


def _emptied(room: pathlib.Path) -> None:
    path, old = room.with_name(room.name[1:].rpartition(_UNFINISHED)[0]), room / _OLD
    if old.exists() and not path.exists():  # killed between two renames
        old.rename(path)
    for thing in room.iterdir():
        if thing.is_dir():
            shutil.rmtree(thing, ignore_errors=True)
        elif thing.name != _LOCK:
            thing.unlink()


def _left(room: pathlib.Path, lock: int | None) -> None:
    shutil.rmtree(room, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def _locked(file: pathlib.Path) -> int | None:
    """Locks a file, which is made, until the descriptor is closed or the process dies; None where there are no locks.

    Raises:
      BlockingIOError: if it is locked already.
    """
    if fcntl is None:
        return None
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):  # whoever had the lock removes the file before it is free
                if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                    return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno in _WITHOUT_LOCKS:
                return None
            raise
        os.close(descriptor)
