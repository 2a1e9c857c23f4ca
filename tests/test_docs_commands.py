"""Every command that README and docs quote is one that the command line, or a script, understands.

Commands themselves are run in the tests of what they do, and README's for published models in test_readme.
"""

import importlib.util
import pathlib
import re
import shlex

import pytest

from cascade_jax.cli import commands

ROOT = pathlib.Path(__file__).parents[1]
OWN = ROOT / "docs" / "extending.md"  # its commands are of methods that it registers itself
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").rglob("*.md") if page != OWN)]
COMMAND = re.compile(r"(?:^|[\s`])(cascade-jax|python -m cascade_jax|python scripts/\w+\.py)((?: [^`\n]*)?)(?=[`\n]|$)")
PATTERN = re.compile(r" [A-Z]+(\.\.\.)?( |$)")  # capitals stand for what is to be filled in


def quoted(name: str) -> list[tuple[str, str]]:
    """Commands of a kind, with the page that quotes them: what stands on a line of its own or between backticks."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for start, rest in COMMAND.findall(text):
            if start.startswith(name):
                # a shell's comments, and whatever it does next
                line = re.split(r"\s&&?(?:\s|$)|;|\s#\s|\s[|>]\s", rest, maxsplit=1)[0]
                if not PATTERN.search(line):
                    found.append((page.relative_to(ROOT).as_posix(), f"{start}{line}"))
    return list(dict.fromkeys(found))


def names(command: tuple[str, str]) -> str:
    return " ".join(command)[:90]


@pytest.mark.parametrize("command", quoted("cascade-jax") + quoted("python -m cascade_jax"), ids=names)
def test_the_command_line_understands(command):
    _, line = command
    arguments = shlex.split(line.replace("$seed", "0"))
    arguments = arguments[1:] if arguments[0] == "cascade-jax" else arguments[3:]
    if not any(argument.startswith("-") for argument in arguments) and len(arguments) < 3:
        arguments += ["--help"]  # a command that is spoken of, not given
    commands.parse(arguments)


@pytest.mark.parametrize("command", quoted("python scripts/"), ids=names)
def test_a_script_understands(command, monkeypatch):
    _, line = command
    _, path, *flags = shlex.split(line)
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, ROOT / path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.parser().parse_args(flags)


def test_commands_are_found():
    assert len(quoted("cascade-jax")) > 40
    assert quoted("python scripts/")
