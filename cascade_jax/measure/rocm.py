"""JAX's ROCm plugin on a machine without ROCm, for compiling alone.

The plugin's library is linked against ROCm's own: the HIP runtime, RCCL, MIOpen, rocBLAS and others, which no package
index has. Compiling for a description of a card calls none of them. So stand-ins take their places where they are
missing: libraries of the same names whose functions all fail. They are made by the machine's C compiler and loaded into
this process alone. Nothing can be *run* in it on an AMD GPU any more.
"""

import contextlib
import ctypes
import importlib
import importlib.util
import pathlib
import re
import subprocess
import tempfile
import types

import jax

PLUGIN = "jax_plugins.xla_rocm7"
_LIBRARY = "xla_rocm_plugin.so"
_FAILED = 100  # hipErrorNoDevice, and an error to the other libraries
_OTHERS = re.compile(r"@(GLIBC|GCC|CXXABI|GLIBCXX)")


@contextlib.contextmanager
def compiling():
    """Lets JAX know the ROCm plugin in this process, whatever is missing beside it; gives what registers it once more.

    Raises:
      OSError: if there is no C compiler or no binutils.
    """
    stand_in(pathlib.Path(importlib.util.find_spec(PLUGIN).origin).with_name(_LIBRARY))
    plugin = importlib.import_module(PLUGIN)
    counting, plugin.hardware_utils = plugin.hardware_utils, types.SimpleNamespace(num_available_amd_gpus=lambda **_: 1)
    try:
        jax.devices()  # JAX looks at its plugins at the first call
        yield plugin.initialize
    finally:
        plugin.hardware_utils = counting


def stand_in(library: pathlib.Path) -> list[str]:
    """Loads a library for each that `library` needs and that is missing; returns their names."""
    headers = _output("readelf", "--dynamic", "--wide", str(library))
    missing = [name for name in re.findall(r"\(NEEDED\).*\[(.+)\]", headers) if not _loads(name)]
    if not missing:
        return []
    symbols = _output("nm", "--dynamic", "--undefined-only", str(library)).splitlines()
    wanted = sorted({name.split()[-1].split("@")[0] for name in symbols if " U " in name and not _OTHERS.search(name)})
    functions = "".join(f"long {name}(void) {{ return {_FAILED}; }}\n" for name in wanted)
    with tempfile.TemporaryDirectory() as place:
        for number, name in enumerate(missing):
            source, made = pathlib.Path(place, "functions.c"), pathlib.Path(place, name)
            source.write_text("" if number else functions)  # whichever library is asked, the first has them all
            flags = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", "-o", str(made), str(source)]
            _output("cc", *flags)
            ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)
    return missing


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as error:
        raise OSError(f"{command[0]} is missing: install a C compiler and binutils") from error
    except subprocess.CalledProcessError as error:
        raise OSError(f"{command[0]} failed: {error.stderr.strip().splitlines()[-1]}") from error
