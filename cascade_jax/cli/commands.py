"""THE registry of commands. A command's module is imported when it is asked for."""

import contextlib
import difflib
import importlib
import importlib.metadata
import io
import shutil
import textwrap
from typing import NamedTuple

from cascade_jax.cli import console, spellings
from cascade_jax.cli.command import Command


class Entry(NamedTuple):
    """A command: the module of this package and the class in it, and what it does, for the help."""

    module: str
    kind: str
    about: str


DESCRIPTION = "Draw pictures with CASCADE and its peers: speculative decoding of autoregressive image models."
COMMANDS = {
    "generate": Entry("draw", "Generate", "Draw pictures from prompts."),
    "generate-list": Entry(
        "draw", "GenerateList",
        "Draw a file of prompts, on one process or many; started again, it goes on where it stopped.",
    ),
    "trace": Entry(
        "trace", "Trace", "Draw a picture, and write a page for a browser that shows every step of it, draft by draft."
    ),
    "compare": Entry(
        "evaluate", "Compare", "Draw the same prompts with several methods: table, report and a grid of pictures."
    ),
    "eval": Entry(
        "evaluate", "Eval",
        "Draw captions by several methods and measure speed and quality; started again, it goes on where it stopped.",
    ),
    "paper": Entry(
        "paper", "Paper",
        "Make a table or figure of the paper with a model, beside the paper's numbers; it goes on where it stopped.",
    ),
    "convert": Entry(
        "models", "Convert", "Turn published PyTorch checkpoints into a model that the other commands load."
    ),
    "info": Entry(
        "models", "Info",
        "Print what a model is: family, sizes, layout, sampling defaults, where its weights come from.",
    ),
    "merge": Entry("models", "Merge", "Put a drafter into a model; one that it has is replaced."),
    "neighbours": Entry(
        "models", "Neighbours",
        "Store LANTERN's table: for every code of a model's picture tokenizer the codes nearest to it.",
    ),
    "distill": Entry(
        "train", "Distill",
        "Make training data for a drafter: pictures that the model draws, or captioned ones that it encodes.",
    ),
    "train": Entry(
        "train", "Train", "Train a drafter for a model on data that distill made; a run that stopped goes on."
    ),
    "bench": Entry(
        "measure", "Bench", "Measure where the time goes: parts of a step, the loop, the memory's limit, batches."
    ),
    "tune-tree": Entry(
        "measure", "TuneTree",
        "Find the draft tree with the most tokens per second on this machine; it is stored, and used from then on.",
    ),
    "plan": Entry(
        "plan", "Plan",
        "Compile for devices that are not there: does it fit, kernels and bytes, and the modelled time of a picture.",
    ),
    "export": Entry(
        "export", "Export",
        "Write a model's decoding programs, lowered for several platforms, into one file together with its weights.",
    ),
    "run-exported": Entry("export", "RunExported", "Draw pictures with a file that export wrote."),
    "scenes sweep": Entry(
        "scenes", "Sweep",
        "Find the trade-off between speed and quality over cascade's thresholds: table, figure, and the best choice.",
    ),
    "scenes train": Entry(
        "scenes", "Train",
        "Train a part of the embedded model: the tokenizer, then the target, then the drafter; and the judge.",
    ),
    "scenes pack": Entry("scenes", "Pack", "Put finished runs together as a model like the one that comes along."),
}  # fmt: skip


def parse(argv: list[str]) -> Command | None:
    """The command asked for; None if it was for help or the version, which are printed.

    Raises:
      console.BadInput: if it makes no sense; the message says where help is found.
    """
    if argv[:1] == ["--version"]:
        print(f"cascade-jax {version()}, jax {importlib.metadata.version('jax')}")
        return None
    name = next((name for name in (" ".join(argv[:2]), *argv[:1]) if name in COMMANDS), None)
    if name is None:
        return _without_command(argv)
    entry, rest = COMMANDS[name], spellings.modern(name, argv[len(name.split()) :], console.say)
    kind = getattr(importlib.import_module(f"cascade_jax.cli.{entry.module}"), entry.kind)
    import tyro

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                kind,
                prog=f"cascade-jax {name}",
                description=entry.about,
                args=rest,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
            )
    except SystemExit as stop:
        if not stop.code:
            return None
        raise console.BadInput(console.usage_error(errors.getvalue(), f"cascade-jax {name} --help")) from None


def version() -> str:
    """The package's."""
    from cascade_jax import __version__

    return __version__


def listing(group: str = "") -> str:
    """The commands, or those of a group, and what they do."""
    own = {name: entry.about for name, entry in COMMANDS.items() if name.startswith(group)}
    width, most = max(map(len, own)) + 4, min(shutil.get_terminal_size().columns, 110)
    rows = [
        textwrap.fill(f"  {name:{width - 2}}{about}", most, subsequent_indent=" " * width)
        for name, about in own.items()
    ]
    head = [f"usage: cascade-jax {group}COMMAND ...", "", DESCRIPTION, ""]
    tail = ["", f"cascade-jax {group}COMMAND --help tells a command's flags, cascade-jax --version the version."]
    return "\n".join([*head, *rows, *tail])


def _without_command(argv: list[str]) -> None:
    first = argv[0] if argv else ""
    group = f"{first} "
    grouped = any(name.startswith(group) for name in COMMANDS)
    asked = argv[1:2] if grouped else argv[:1]
    if asked and asked[0] in ("-h", "--help"):
        print(listing(group if grouped else ""))
        return None
    known = [name for name in COMMANDS if not grouped or name.startswith(group)]
    given = " ".join(argv[: 1 + grouped])
    if not asked:
        what = "say which command"
    else:
        near = difflib.get_close_matches(given, known, n=1)
        what = f"unknown command {given!r}" + (f", perhaps {near[0]}" if near else "")
    raise console.BadInput(f"{what}; there are {', '.join(known)} (see cascade-jax {group if grouped else ''}--help)")
