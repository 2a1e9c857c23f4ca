"""Spellings of the last release, which go on working for this one, with a hint on how they are written now."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

_DTYPES = (("bf16", "bfloat16"), ("fp32", "float32"))


class Old(NamedTuple):
    """A flag as it was written.

    Attributes:
      flag: its old name.
      now: its name today; None if it is still the same.
      values: values that have another name today, and that name.
      joined: whether its values were separated by spaces, and are by commas today.
      pairs: whether its values were NAME=VALUE, and are flags of their own today.
    """

    flag: str
    now: str | None = None
    values: tuple[tuple[str, str], ...] = ()
    joined: bool = False
    pairs: bool = False


_CAPTIONS, _SAMPLING = Old("--captions", now="--prompts"), Old("--sampling", pairs=True)
_OLD = {
    "eval": [Old("--methods", joined=True), _CAPTIONS, _SAMPLING],
    "paper": [Old("--drafters", joined=True), _CAPTIONS, _SAMPLING],
    "generate-list": [Old("--settings", pairs=True)],
    "export": [Old("--settings", pairs=True)],
    "convert": [Old("--dtype", values=_DTYPES)],
    "merge": [Old("--dtype", values=_DTYPES)],
    "scenes sweep": [
        Old(flag, joined=True) for flag in ("--trees", "--tau-pos", "--tau-seq", "--budget", "--ledger", "--mass")
    ],
}


def modern(command: str, argv: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """The arguments of a command in today's spelling; `say` is told of every one that was not."""
    argv = list(argv)
    for old in _OLD.get(command, ()):
        flag, equals, value = next((a for a in argv if a.split("=")[0] == old.flag), "").partition("=")
        if not flag:
            continue
        at = argv.index(flag + equals + value)
        end = next((i for i in range(at + 1, len(argv)) if argv[i].startswith("--")), len(argv))
        given = [value] if equals else argv[at + 1 : end]
        if equals:
            end = at + 1
        elif old.joined and old.flag == "--drafters":  # what is no NAME=DIR stands for itself
            end = next((i for i in range(at + 2, end) if "=" not in argv[i]), end)
            given = argv[at + 1 : end]
        written = _written(old, given)
        if written is not None:
            say(f"cascade-jax: {' '.join(argv[at:end])} is written {' '.join(written)} now")
            argv[at:end] = written
    return argv


def _written(old: Old, given: list[str]) -> list[str] | None:
    """A flag and its values as they are written today; None if that is what they are."""
    if old.pairs:
        split = [pair.partition("=") for pair in given]
        return [part for name, _, value in split for part in (f"--{name.replace('_', '-')}", value)]
    if old.joined:
        return [old.flag, ",".join(given)] if len(given) > 1 else None
    if old.values:
        known = [dict(old.values).get(value, value) for value in given]
        return [old.flag, *known] if known != given else None
    return [old.now or old.flag, *given]
