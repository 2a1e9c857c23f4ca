"""The public face: names that load when they are asked for, whatever else was imported before."""

import subprocess
import sys

import pytest

import cascade_jax as cj


@pytest.mark.parametrize("name", cj.__all__)
def test_every_public_name_leads_to_something_of_that_name(name):
    assert getattr(cj, name).__name__.rpartition(".")[2] == {"trees": "tree"}.get(name, name)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="has no attribute 'casquade'"):
        cj.casquade  # noqa: B018


def fresh(text: str) -> str:
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout


def test_a_module_of_the_same_name_does_not_take_a_functions_place():
    assert fresh("import cascade_jax.verify, cascade_jax as cj; print(callable(cj.verify))") == "True\n"
    assert (
        fresh("import cascade_jax as cj; cj.verify; import cascade_jax.verify; print(callable(cj.verify))") == "True\n"
    )


def test_the_command_lines_help_needs_no_jax():
    assert fresh("import sys; from cascade_jax import cli; cli.main(['--help']); print('jax' in sys.modules)").endswith(
        "False\n"
    )
