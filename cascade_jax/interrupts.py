"""Ctrl-C and polite kills: the first ends the work at the next safe place, the second at once.

A signal that raises wherever it strikes tears down what it strikes: callbacks of compiled programs swallow the
exception, or die of it. So inside `watch()` the first SIGINT or SIGTERM only leaves word, and whoever does the work
asks for it where stopping loses nothing: between pictures, chunks of steps, training steps.

    for picture in interrupts.safely(pictures):
        ...                                      # or, within a loop:  interrupts.check()

Outside of `watch()`, which commands run in, nothing is asked for and nothing changes.
"""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

STATUS = 130  # the exit status of what was interrupted
PATIENCE = 1.0  # seconds until it is said that the safe place is not reached yet
SIGNALS = (signal.SIGINT, signal.SIGTERM)

T = TypeVar("T")
# Signals belong to the process, and so does this state: whether they are waited for, whether one came.
_watching = threading.Event()
_asked = threading.Event()


class Interrupted(KeyboardInterrupt):
    """The work was ended at a safe place; the message says what is kept, and may be empty."""


def check(kept: str = "") -> None:
    """Raises `Interrupted`, perhaps with a message, if an interrupt was asked for."""
    if _asked.is_set():
        raise Interrupted(*[kept] * bool(kept))


def asked() -> bool:
    """Whether an interrupt was asked for: for loops that have something to save before they end."""
    return _asked.is_set()


def watching() -> bool:
    """Whether interrupts are waited for: long compiled loops run in chunks then, instead of in one call."""
    return _watching.is_set()


def safely(items: Iterable[T]) -> Iterator[T]:
    """The items; before each, and behind the last, is a safe place."""
    for item in items:
        check()
        yield item
    check()


@contextlib.contextmanager
def watch() -> Iterator[None]:
    """Within the block interrupts wait for a safe place. Does nothing inside itself, and outside the main thread."""
    if _watching.is_set() or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _watching.set()
    try:
        with _listening() as handler:
            for number in SIGNALS:
                signal.signal(number, handler)
            try:
                yield
            finally:
                for number, former in before.items():
                    signal.signal(number, signal.SIG_DFL if former is None else former)
    finally:
        _watching.clear()
        _asked.clear()


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Gives the signals back after a block in which a library takes them, as what makes processes meet does."""
    own = {number: signal.getsignal(number) for number in SIGNALS} if _watching.is_set() else {}
    try:
        yield
    finally:
        for number, handler in own.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _listening() -> Iterator[Callable]:
    """A signal handler; a thread hears of signals too, even while compiled code holds the main thread."""
    counts = {"handled": 0, "heard": 0}  # of the same signals, so the larger is how many there were

    def count(who: str, numbers) -> None:
        counts[who] += sum(number in SIGNALS for number in numbers)
        if max(counts.values()) > 1:
            os._exit(STATUS)
        if max(counts.values()):
            _asked.set()

    def hear(pipe: int) -> None:
        told = False
        while True:
            waiting = _asked.is_set() and not told
            if not select.select([pipe], [], [], PATIENCE if waiting else None)[0]:
                told = True
                _say("interrupted: ends when the step or compilation under way is done; at once if asked again")
            elif numbers := os.read(pipe, 64):
                count("heard", numbers)
            else:
                os.close(pipe)
                return

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    former = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=hear, args=[reader], name="interrupts", daemon=True)
    thread.start()
    try:
        # Event loops take the pipe away while they run; then this hears of a signal, and the thread does not.
        yield lambda number, _: count("handled", [number])
    finally:
        signal.set_wakeup_fd(former)
        os.close(writer)
        thread.join()


def _say(text: str) -> None:
    # Not through sys.stderr, whose lock the main thread may hold while the interpreter ends.
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())
