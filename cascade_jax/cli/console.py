"""The command line's surroundings: one-line errors, a progress bar, and a place for compiled programs."""

import contextlib
import os
import pathlib
import re
import sys
import time

from cascade_jax import files, interrupts


class BadInput(Exception):
    """What was asked for cannot be done; the message is for the person who asked."""


@contextlib.contextmanager
def bad_input():
    """Turns errors in what was asked for into `BadInput`."""
    try:
        yield
    except (ValueError, OverflowError, OSError) as error:
        raise BadInput(one_line(error)) from error


def one_line(error: Exception) -> str:
    """An error's message."""
    return " ".join(str(error).split()) or type(error).__name__


def say(text: str) -> None:
    """Prints to stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def step(text: str) -> None:
    """Says what is done next, or was done. Whoever says so is at a safe place: it ends what was interrupted."""
    interrupts.check()
    say(text)


def show(*renderables) -> None:
    """Prints rich tables to stdout, wide ones too where it is no terminal."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=160)
    for renderable in renderables:
        console.print(renderable)


def usage_error(text: str, help_command: str) -> str:
    """tyro's box as one line: what is wrong, and where to find help."""
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", row).strip("│╭╰╮╯ ") for row in text.splitlines()[1:]]
    paragraphs = [""]
    for row in rows:
        if re.fullmatch(r"[─-]*", row):
            paragraphs.append("")
        else:
            paragraphs[-1] += f" {row}"
    what = next((" ".join(paragraph.split()) for paragraph in paragraphs if paragraph), text)
    number = r"Error parsing (\S+): (?:no type .* from \[(.*)\]\.?|(?:invalid literal|could not convert) .*: (.*))"
    if wrong := re.fullmatch(number, what):
        what = f"{wrong[1]} takes a number, not {wrong[2] or wrong[3]}"
        if wrong[3] and "int()" in text:
            what = what.replace("a number", "a whole number")
    elif listed := re.fullmatch(r"Error parsing (\S+): (takes .*)", what):
        what = f"{listed[1]} {listed[2]}"
    return f"{what.rstrip('.')} (see {help_command})"


def set_up() -> None:
    """Quiet libraries, and a folder for compiled programs, before anything is compiled."""
    import logging
    import warnings

    import jax

    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("jax").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    folder = cache_folder()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # the many small ones add up to seconds
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def cache_folder() -> pathlib.Path:
    """Where compiled programs are kept: JAX_COMPILATION_CACHE_DIR, or a folder in the user's cache."""
    if own := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return pathlib.Path(own)
    return files.cache_folder() / "xla"


class CompileClock:
    """Times compilation inside the block.

    Attributes:
      seconds: spent so far on tracing, and on compiling or on reading compiled programs.
      fresh: the part of it in which something was compiled anew.
    """

    def __init__(self):
        self.fresh = 0.0
        self._since = time.time()
        self._spans: list[tuple[float, float]] = []

    @property
    def seconds(self) -> float:
        return sum(end - begin for begin, end in self._spans)

    def stored(self) -> pathlib.Path | None:
        """Where programs that were compiled meanwhile are kept; None if none could be written there."""
        folder = cache_folder()
        with contextlib.suppress(OSError):
            if any(file.stat().st_mtime >= self._since - 1 for file in os.scandir(folder)):
                return folder
        return None

    def __enter__(self):
        import jax

        jax.monitoring.register_event_duration_secs_listener(self._add)
        return self

    def __exit__(self, *_):
        import jax

        jax.monitoring.unregister_event_duration_listener(self._add)

    def _add(self, event: str, seconds: float, **_):
        self.fresh += seconds * (event == "/jax/core/compile/backend_compile_duration")
        self.fresh -= seconds * (event == "/jax/compilation_cache/cache_retrieval_time_sec")
        if not event.startswith("/jax/core/compile/"):
            return
        end = time.perf_counter()
        begin = end - seconds
        while self._spans and self._spans[-1][0] >= begin:  # inner spans end first: the outer one holds them
            self._spans.pop()
        self._spans.append((max(begin, self._spans[-1][1]) if self._spans else begin, end))


@contextlib.contextmanager
def bar(title: str):
    """A progress bar on stderr, if a person looks at it: a function of (done, total) and perhaps a new title.

    Whoever reports progress is at a safe place: the function ends what was interrupted.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)

        def show(done: int, total: int | None, title: str = title) -> None:
            interrupts.check()
            progress.update(task, completed=done, total=total, description=title)

        yield show
