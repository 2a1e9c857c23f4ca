"""The house stays one that can be read: files and functions of a size, and every room says what it is."""

import ast
import io
import pathlib
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("cascade_jax", "checkpoints_convert")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LINES, FUNCTION = 400, 60  # of a file; of code in a function

# What is longer, and why.
LONGER: dict[str, str] = {}


def name(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lines_of_code(source: str) -> set[int]:
    """Numbers of the lines that hold more than a comment or a part of a docstring."""
    found: set[int] = set()
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found.difference_update(range(node.lineno, node.end_lineno + 1))
    return found


def functions(source: str) -> dict[str, int]:
    """Lines of code of every function of a file."""
    code, found = lines_of_code(source), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            found[f"{node.name}:{node.lineno}"] = len(code & set(range(node.lineno, node.end_lineno + 1)))
    return found


def test_lines_of_code_are_those_that_do_something():
    lines = (
        "def f(x):",
        '    """Says.',
        "",
        "    More.",
        '    """',
        "    # why",
        "    y = [",
        "        x,  # this",
        "    ]",
        "",
    )
    source = "\n".join([*lines, "    return y", ""])
    assert functions(source) == {"f:1": 5}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_and_functions_can_be_read_at_a_sitting(path):
    source = path.read_text()
    too_long = {
        f"{name(path)}:{function}": size
        for function, size in functions(source).items()
        if size > FUNCTION and f"{name(path)}:{function.partition(':')[0]}" not in LONGER
    }
    assert not too_long, f"of at most {FUNCTION} lines of code"
    if name(path) not in LONGER:
        assert len(source.splitlines()) <= LINES


def test_exceptions_are_still_needed():
    for entry in LONGER:
        file, _, function = entry.partition(":")
        source = (ROOT / file).read_text()
        if function:
            sizes = [size for own, size in functions(source).items() if own.partition(":")[0] == function]
            assert max(sizes) > FUNCTION, entry
        else:
            assert len(source.splitlines()) > LINES, entry


@pytest.mark.parametrize("room", [path for path in FILES if path.name == "__init__.py"], ids=name)
def test_every_room_says_what_it_is(room):
    assert ast.get_docstring(ast.parse(room.read_text()))
