"""The first signal waits for a safe place, the second does not; both whatever the main thread is at."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from cascade_jax import interrupts

BOTH = [signal.SIGINT, signal.SIGTERM]


def script(text: str, *signals: signal.Signals) -> subprocess.CompletedProcess:
    """Runs Python; each line "ready" that it prints is answered by the next signal."""
    command = [sys.executable, "-u", "-c", textwrap.dedent(text)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for number in signals:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.parametrize("number", BOTH)
def test_the_first_signal_ends_the_work_at_the_next_safe_place(number):
    done = []
    with interrupts.watch(), pytest.raises(interrupts.Interrupted):
        for item in interrupts.safely(range(5)):
            if item == 2:
                signal.raise_signal(number)
                assert interrupts.asked()
            done.append(item)
    assert done == [0, 1, 2]


def test_a_signal_behind_the_last_item_counts():
    with interrupts.watch(), pytest.raises(interrupts.Interrupted, match="kept"):
        signal.raise_signal(signal.SIGINT)
        interrupts.check("kept")


def test_after_the_block_everything_is_as_before():
    before = [signal.getsignal(number) for number in BOTH]
    with interrupts.watch():
        with interrupts.watch():
            assert interrupts.watching()
        assert interrupts.watching()
        signal.raise_signal(signal.SIGTERM)
    assert not interrupts.watching()
    assert not interrupts.asked()
    assert [signal.getsignal(number) for number in BOTH] == before
    interrupts.check()
    assert signal.set_wakeup_fd(-1) == -1


def test_another_thread_watches_nothing():
    seen = []

    def work():
        with interrupts.watch():
            seen.append(interrupts.watching())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_signals_that_a_library_took_are_given_back():
    with interrupts.watch():
        with interrupts.kept():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.asked()


def test_without_watch_an_interrupt_is_pythons_own():
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, former)
    assert not isinstance(caught.value, interrupts.Interrupted)
    assert not interrupts.asked()


BUSY = """
    import signal, threading, time
    from cascade_jax import interrupts
    with interrupts.watch():
        signal.pthread_sigmask(signal.SIG_BLOCK, interrupts.SIGNALS)  # compiled code is not woken either
        threading.Timer(0, print, ["ready"]).start()
        threading.Timer(1.8, print, ["ready"]).start()
        time.sleep(30)
"""


def test_the_second_signal_ends_the_process_at_once_whatever_it_is_at():
    ended = script(BUSY, signal.SIGINT, signal.SIGTERM)
    assert ended.returncode == interrupts.STATUS
    assert ended.stderr.count("\n") == 1  # said after a second
    assert "at once if asked again" in ended.stderr


TAKEN = """
    import signal, time
    from cascade_jax import interrupts
    with interrupts.watch():
        former = signal.set_wakeup_fd(-1)    # as an event loop does while it runs
        print("ready")
        while not interrupts.asked():
            time.sleep(0.01)
        signal.set_wakeup_fd(former)
        print("ready")
        time.sleep(30)
"""


def test_signals_are_noticed_while_an_event_loop_has_taken_the_pipe():
    assert script(TAKEN, signal.SIGINT, signal.SIGINT).returncode == interrupts.STATUS


def test_nothing_is_left_open():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(8):
        with interrupts.watch():
            pass
    assert len(os.listdir("/proc/self/fd")) == before
