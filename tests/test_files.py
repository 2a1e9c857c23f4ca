"""Whole or not at all, and one owner at a time, whatever kills a process."""

import ast
import errno
import os
import pathlib
import resource
import signal

import numpy as np
import orbax.checkpoint as ocp
import pytest

from cascade_jax import files


def in_a_process(work) -> int:
    """Forks; the child says that `work` is under way by a byte, and waits. Returns the child's id."""
    reads, writes = os.pipe()
    if (child := os.fork()) == 0:
        try:
            with work():
                os.write(writes, b"!")
                signal.pause()
        finally:
            os._exit(1)
    assert os.read(reads, 1) == b"!"
    os.close(reads)
    os.close(writes)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"

    def write(text: str, fails: bool = False):
        with files.whole(path) as temporary:
            temporary.write_text(text)
            assert temporary.name == "a.txt" and (not path.exists() or path.read_text() == "whole")
            if fails:
                raise RuntimeError

    with pytest.raises(RuntimeError):
        write("half", fails=True)
    assert names(tmp_path / "new") == []
    write("whole")
    with pytest.raises(RuntimeError):
        write("half", fails=True)
    assert names(tmp_path / "new") == ["a.txt"] and path.read_text() == "whole"


def test_a_files_name_may_depend_on_what_is_in_it(tmp_path):
    with files.whole(tmp_path / "0.txt", lambda file: f"0-{file.read_text()}.txt") as temporary:
        temporary.write_text("digest")
    assert names(tmp_path) == ["0-digest.txt"]


def test_published_files_join_those_that_are_there(tmp_path):
    folder = tmp_path / "new"

    def publish(text: str, fails: bool = False):
        with files.published(folder) as temporary:
            (temporary / "a").write_text(text)
            if fails:
                raise RuntimeError

    with pytest.raises(RuntimeError):
        publish("half", fails=True)
    assert names(tmp_path) == []
    with files.published(folder) as temporary:
        (temporary / "a").write_text("whole")
        assert not folder.exists()
    (folder / "b").touch()
    with pytest.raises(RuntimeError):
        publish("half", fails=True)
    assert (folder / "a").read_text() == "whole"
    publish("again")
    assert names(folder) == ["a", "b"] and (folder / "a").read_text() == "again"


def test_a_folder_takes_the_place_of_another(tmp_path):
    for name in ("x", "y"):
        with files.replaced(tmp_path / "model") as temporary:
            (temporary / name).touch()
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["y"]


@pytest.mark.parametrize("write", [files.whole, files.replaced, files.published])
def test_what_a_killed_process_left_is_cleared_away_and_what_a_living_one_writes_is_not(tmp_path, write):
    place = tmp_path / "model"
    living, dead = in_a_process(lambda: write(place)), in_a_process(lambda: write(place))
    (tmp_path / ".model-else").mkdir()
    assert len(names(tmp_path)) == 3
    kill(dead)
    with write(place) as temporary:
        temporary.touch()
    left = names(tmp_path)
    assert left[0] == ".model-else" and left[-1] == "model" and len(left) == 3 and left[1].startswith(".model-")
    kill(living)
    with write(place) as temporary:
        temporary.touch()
    assert names(tmp_path) == [".model-else", "model"]


def test_a_folder_whose_process_died_between_the_two_renames_comes_back(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    with files.replaced(folder) as temporary:
        (temporary / "x").touch()

    def replace():
        rename, done = pathlib.Path.rename, []

        def stop(self, target):
            if done:
                os.write(writes, b"!")
                signal.pause()
            done.append(target)
            return rename(self, target)

        monkeypatch.setattr(pathlib.Path, "rename", stop)
        with files.replaced(folder):
            pass

    reads, writes = os.pipe()
    if (child := os.fork()) == 0:
        replace()
    os.read(reads, 1)
    kill(child)
    assert not folder.exists()
    with pytest.raises(ZeroDivisionError), files.replaced(folder):
        raise ZeroDivisionError
    assert names(tmp_path) == ["model"] and names(folder) == ["x"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    folder, rename = tmp_path / "model", pathlib.Path.rename
    with files.replaced(folder) as temporary:
        (temporary / "x").touch()

    def refuse(self, target):
        if self.name == "model" and target == folder:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(self))
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    with pytest.raises(OSError), files.replaced(folder):
        pass
    assert names(tmp_path) == ["model"] and names(folder) == ["x"]


def test_a_folder_has_one_owner(tmp_path):
    folder = tmp_path / "runs" / "first"
    child = in_a_process(lambda: files.owned(folder))
    with pytest.raises(files.InUse) as caught, files.owned(folder):
        pass
    message = str(caught.value)
    assert f"{folder} is in use by process {child} on " in message and "\n" not in message
    with files.owned(tmp_path / "runs" / "second"):
        pass
    kill(child)
    with files.owned(folder), pytest.raises(files.InUse, match=f"process {os.getpid()} "), files.owned(folder):
        pass
    assert names(tmp_path / "runs") == []


def test_a_folder_is_the_same_under_another_name(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with files.owned(tmp_path / "run"), pytest.raises(files.InUse), files.owned(tmp_path / "link"):
        pass


def test_owning_a_folder_clears_away_what_killed_processes_left_in_it(tmp_path):
    folder = tmp_path / "run"
    for name in ("a.png", "b.png"):
        kill(in_a_process(lambda: files.whole(folder / name)))
    living = in_a_process(lambda: files.whole(folder / "c.png"))
    assert len(names(folder)) == 3
    with files.owned(folder):
        assert [name.startswith(".c.png") for name in names(folder)] == [True]
    kill(living)


def test_without_file_locks_files_are_written_all_the_same(tmp_path, monkeypatch):
    """As on Windows: nobody's work is cleared away."""
    monkeypatch.setattr(files, "fcntl", None)
    (tmp_path / ".model-unfinished-0").mkdir()
    for _ in range(2):
        with files.owned(tmp_path), files.replaced(tmp_path / "model") as temporary:
            (temporary / "x").touch()
    assert names(tmp_path) == [".model-unfinished-0", "model"]


@pytest.mark.parametrize("write", [files.whole, files.replaced, files.published])
def test_a_full_disk_is_named_by_path(tmp_path, write):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as of a write, which knows no path
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'out'}'"), write(tmp_path / "out"):
        raise full
    assert names(tmp_path) == []


def test_a_full_disk_is_named_by_path_where_orbax_writes(tmp_path):
    """A limit of the size of files stands in for the disk's."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    named = pytest.raises(OSError, match=f"File too large: '{tmp_path / 'model'}'")
    try:
        with named, files.replaced(tmp_path / "model") as temporary, ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(temporary / "params", {"a": np.random.default_rng(0).random(1 << 14)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == []


def test_errors_name_the_destination_and_not_where_it_is_written_meanwhile(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"'{tmp_path / 'a.txt'}'"), files.whole(tmp_path / "a.txt"):
        pass  # which writes nothing
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=f"'{tmp_path / 'folder'}'"), files.whole(tmp_path / "folder") as temporary:
        temporary.touch()
    other = tmp_path / "input.txt"
    with pytest.raises(FileNotFoundError, match=f"'{other}'"), files.whole(tmp_path / "a.txt"):
        other.read_text()


def test_no_other_module_renames_a_temporary():
    """What is damaged may be put aside under another name; that is no temporary."""
    package, found = pathlib.Path(files.__file__).parent, set()
    for path in [*package.rglob("*.py"), *(package.parent / "checkpoints_convert").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("rename", "renames", "mkstemp", "mkdtemp"):
                found.add(path.relative_to(package.parent).as_posix())
    assert found == {"cascade_jax/files.py", "cascade_jax/training/checkpoints.py"}
