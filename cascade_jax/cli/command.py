"""What a command is: a dataclass whose fields are its flags, with three parts that are run one after the other."""

import pathlib
from typing import Any


class Command:
    """A command. Errors, set-up, owned folders and interrupts are the entry's business, see `cli.main`.

    `check` and `load` raise ValueError, OverflowError or OSError for what cannot be done; the message is one line.
    """

    def check(self) -> Any:
        """What can be told from the flags and small files; nothing is written. Its result is handed to `load`."""

    def owns(self) -> pathlib.Path | None:
        """The folder in which no other process may be at work meanwhile; None where the work sees to it itself."""

    def load(self, checked: Any) -> Any:
        """Reads models and large inputs, and finds whatever else may be wrong. Its result is handed to `run`."""
        return checked

    def run(self, loaded: Any, line: str) -> None:
        """Does the work; `line` is the command as it was typed."""

    def kept(self) -> str:
        """What an interrupt leaves, and how to go on."""
        return ""
