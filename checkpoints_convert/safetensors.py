"""safetensors files, read without a library: a header of names, types, shapes and places, and the tensors behind it."""

import json
import pathlib
import struct

import ml_dtypes
import numpy as np

from checkpoints_convert.tensors import Contents, ConvertError, Tensor

HEADER_LIMIT = 100_000_000  # bytes; the format's own limit

# https://github.com/huggingface/safetensors: types by their names in a header
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
# Types of scales, of quantised and of complex numbers, by their bits.
_OTHER = {"C64": 64, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
_EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


def read(file: pathlib.Path) -> Contents:
    """The tensors of a safetensors file, as views of the mapped file.

    Raises:
      ConvertError: if it is damaged.
    """
    size = file.stat().st_size
    start, entries = _header(file, size)
    end = 0
    for name, (kind, shape, begin, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        bits = _OTHER.get(kind) or 8 * np.dtype(_DTYPES[kind]).itemsize
        need = -(-int(np.prod(shape, dtype=object)) * bits // 8)
        if min(shape, default=0) < 0 or begin != end or stop - begin != need:
            raise ConvertError(f"{file} is damaged: its header lies about {name}")
        end = stop
    if start + end != size:
        raise ConvertError(
            f"{file} is damaged: its header promises {start + end:,} bytes, and it has {size:,}. Download it again"
        )
    return Contents({name: _tensor(file, start, *entry) for name, entry in entries.items()})


def _header(file: pathlib.Path, size: int) -> tuple[int, dict[str, tuple[str, tuple[int, ...], int, int]]]:
    """Where the tensors begin, and of every tensor its type, shape, begin and end from there."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else HEADER_LIMIT
        if length >= HEADER_LIMIT or 8 + length > size:
            raise ConvertError(f"{file} is no safetensors file, or it is cut short: download it again")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {}
            for name, entry in header.items():
                begin, stop = map(int, entry["data_offsets"])
                entries[str(name)] = str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), begin, stop
                if entry["dtype"] not in _DTYPES | _OTHER:
                    raise ConvertError(f"{file} holds {name} as {entry['dtype']}, a type that is not known here")
        except ConvertError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            raise ConvertError(f"{file} is damaged: its header makes no sense ({error!r})") from error
    return 8 + length, entries


def _tensor(file: pathlib.Path, start: int, kind: str, shape: tuple[int, ...], begin: int, stop: int) -> Tensor:
    if kind in _OTHER:
        return Tensor(
            shape, np.dtype(np.void), lambda: None, fault=f"is {'complex' if kind == 'C64' else 'stored as ' + kind}"
        )
    dtype = np.dtype(_DTYPES[kind])

    def view() -> np.ndarray:
        if begin == stop:
            return np.zeros(shape, dtype)
        flat = np.memmap(file, np.uint8, "r", start + begin, (stop - begin,))
        return np.asarray(flat).view(dtype).reshape(shape)

    if kind in _EIGHT_BITS:
        return Tensor(shape, np.dtype(ml_dtypes.bfloat16), lambda: view().astype(ml_dtypes.bfloat16))
    return Tensor(shape, dtype, view)
