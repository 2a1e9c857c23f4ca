"""TorchScript's archives (`.jit`): their tensors, by the names that `state_dict()` gives them. Nothing in them runs.

An archive holds its modules as a pickle of objects, whose attributes are settings, tensors and further modules, beside
a program that is not looked at. The pickle is read with stand-ins for everything that it names.
"""

import collections
import pathlib
import pickle
import zipfile
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from checkpoints_convert.tensors import Contents, ConvertError, Tensor

_TYPES = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip


def is_archive(file: pathlib.Path) -> bool:
    """Whether a file is one."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as content:
        return any(name.endswith("/constants.pkl") for name in content.namelist())


def read(file: pathlib.Path) -> Contents:
    """The tensors of an archive, each read when it is asked for.

    Raises:
      ConvertError: if it is damaged, or its pickle asks for more than modules and tensors.
    """
    try:
        with zipfile.ZipFile(file) as content:
            name = next(name for name in content.namelist() if name.endswith("/data.pkl"))
            with content.open(name) as stream:
                root = _Unpickler(stream, file, name.removesuffix("data.pkl") + "data/").load()
        tensors = dict(_tensors(root))
    except ConvertError:
        raise
    except Exception as error:  # a pickle's faults have any type
        reason = " ".join(str(error).split())
        raise ConvertError(f"{file} is damaged: {reason[:160] or type(error).__name__}") from error
    if not tensors:
        raise ConvertError(f"{file} holds no tensors that could be a model's")
    return Contents(tensors)


class _Module:
    """Stands for an object of any class that the archive defines."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream, file: pathlib.Path, folder: str):
        super().__init__(stream)
        self.file, self.folder = file, folder

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "__torch__":
            return _Module
        if module == "torch" and name in _TYPES:
            return np.dtype(_TYPES[name])
        known = {
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "collections.OrderedDict": collections.OrderedDict,
            "torch.jit._pickle.build_intlist": list,
            "torch.jit._pickle.build_doublelist": list,
            "torch.jit._pickle.build_boollist": list,
            "torch.jit._pickle.build_tensorlist": list,
            "torch.jit._pickle.restore_type_tag": lambda value, tag: value,
        }
        if (asked := f"{module}.{name}") not in known:
            raise ConvertError(f"{self.file} is refused: it asks for {asked}, which weights have no need of")
        return known[asked]

    def persistent_load(self, pid):
        _, dtype, key, _, _ = pid
        return dtype, f"{self.folder}{key}"

    def _tensor(self, storage, offset: int, shape: tuple, strides: tuple, *rest) -> Tensor:
        dtype, place = storage
        shape, strides = tuple(map(int, shape)), tuple(map(int, strides))

        def array() -> np.ndarray:
            with zipfile.ZipFile(self.file) as content:
                numbers = np.frombuffer(content.read(place), dtype)
            last = offset + sum((n - 1) * step for n, step in zip(shape, strides))
            if 0 in shape or min((offset, *strides)) < 0 or last >= len(numbers):
                raise ConvertError(
                    f"{self.file} is damaged: a tensor of {shape} reaches beyond its {len(numbers)} numbers"
                )
            steps = tuple(step * dtype.itemsize for step in strides)
            return np.lib.stride_tricks.as_strided(numbers[offset:], shape, steps, writeable=False)

        return Tensor(shape, dtype, array)


def _tensors(module: _Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")
