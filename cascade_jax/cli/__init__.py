"""The command line, `cascade-jax` or `python -m cascade_jax`. Thin: flags in, a few lines out; the work is elsewhere.

A group of commands is a file, `commands` their registry, `flags` what they share. May import everything; nothing
imports it. Here stands what holds for all of them, and nothing is imported before signals are seen to.
"""

import os
import sys

from cascade_jax import interrupts


def entry() -> int:
    """The console script."""
    with interrupts.watch():
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter is no reason to fail
        return main(sys.argv[1:])


def main(argv: list[str]) -> int:
    """Runs a command; returns the exit status: 0, 2 for what cannot be done, 130 when interrupted."""
    with interrupts.watch():
        from cascade_jax.cli import console

        try:
            _run(argv)
            return 0
        except console.BadInput as error:
            console.say(f"cascade-jax: {error}")
        except BrokenPipeError:  # whoever read the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:
            console.say(f"cascade-jax: {console.one_line(error)}")
        except KeyboardInterrupt as interrupt:
            console.say("; ".join(["cascade-jax: interrupted", *map(str, interrupt.args)]))
            return interrupts.STATUS
        return 2


def _run(argv: list[str]) -> None:
    """A command's parts, one after the other; the folder that it owns is its own from the second on."""
    import contextlib
    import shlex

    from cascade_jax import files
    from cascade_jax.cli import commands, console

    command = commands.parse(argv)
    if command is None:
        return
    with contextlib.ExitStack() as owned:
        try:
            interrupts.check()
            with console.bad_input():
                checked = command.check()
                if (folder := command.owns()) is not None:
                    owned.enter_context(files.owned(folder))
            interrupts.check()
            console.set_up()
            with console.bad_input():
                loaded = command.load(checked)
            interrupts.check()
            command.run(loaded, f"cascade-jax {shlex.join(argv)}")
        except KeyboardInterrupt as interrupt:
            told = str(interrupt) or command.kept()  # what was interrupted may know more than the command
            raise interrupts.Interrupted(*[told] * bool(told)) from None
