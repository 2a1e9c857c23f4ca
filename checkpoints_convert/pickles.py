"""PyTorch's pickles (`.bin`, `.pt`, `.pth`, `.ckpt`), mapped and loaded with `weights_only`: nothing in them runs."""

import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints_convert.tensors import Contents, ConvertError, Tensor, listed

# Keys under which training scripts keep the weights; the first that leads to some is followed, again and again.
WEIGHTS = (
    "model", "module", "state_dict", "model_state_dict", "model_state", "net", "network", "generator", "params",
    "weights", "ema", "model_ema", "ema_model", "ema_state_dict", "params_ema",
)  # fmt: skip
_AVERAGES = ("ema", "model_ema", "ema_model", "ema_state_dict", "params_ema")
_EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
# Keys of training's state, which holds tensors too.
_STATE = re.compile("(?i).*(optim|sched|scaler|rng|amp|callback|hyper_param|args|config).*")


def read(file: pathlib.Path) -> Contents:
    """The tensors of a pickle, as views of the mapped file.

    Raises:
      ConvertError: if it is damaged, asks for more than tensors, or PyTorch is missing.
    """
    loaded = _loaded(file)
    if not isinstance(loaded, Mapping):
        raise ConvertError(f"{file} holds a {type(loaded).__name__}, not a dictionary of tensors")
    keys, found = weights(loaded)
    if not found:
        raise ConvertError(f"{file} holds no tensors that could be a model's: {_keys(loaded)}")
    notes, within = (), ".".join(keys)
    if averages := [key for key in _AVERAGES if isinstance(loaded.get(key), Mapping) and key not in keys]:
        notes = (f"note: {file} holds {listed(averages)} too; {within or 'what is beside it'} is converted",)
    elif within and keys[0] not in WEIGHTS:
        notes = (f"note: of {file}, {within} is converted",)
    return Contents({str(name): _tensor(value) for name, value in found.items()}, notes)


def weights(found: Mapping) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The dictionary of tensors in a file's dictionary, and the keys that lead there; an empty one if there is none.

    A key of `WEIGHTS` goes before the dictionary itself, and that before its only key that leads to tensors.
    """
    inner = {str(key): value for key, value in found.items() if isinstance(value, Mapping)}
    for key in WEIGHTS:
        if key in inner and (own := weights(inner[key]))[1]:
            return (key, *own[0]), own[1]
    if tensors := {name: value for name, value in found.items() if _is_tensor(value)}:
        return (), tensors
    others = {key: weights(value) for key, value in inner.items() if not _STATE.fullmatch(key)}
    leading = [((key, *keys), own) for key, (keys, own) in others.items() if own]
    return leading[0] if len(leading) == 1 else ((), {})


def _keys(loaded: Mapping) -> str:
    """What a dictionary without weights does hold."""
    if not loaded:
        return "it is empty"
    return f"its keys are {listed((repr(key) for key in loaded), 8)}"


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _loaded(file: pathlib.Path) -> Any:
    try:
        import torch
    except ImportError:
        raise ConvertError(
            f"{file.name} is a PyTorch pickle, and PyTorch is not installed: pip install 'cascade_jax[convert]'"
        ) from None
    import argparse
    import pickle
    import warnings

    archive = zipfile.is_zipfile(file)
    if archive:
        with zipfile.ZipFile(file) as content:
            names = content.namelist()
        if not any(name.endswith("data.pkl") for name in names):
            raise ConvertError(f"{file} is an archive of {listed(names)}: unpack it, and name what is in it")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            # training scripts keep their arguments beside the weights; files of before 2020 cannot be mapped
            return torch.load(file, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        if culprit := re.search(r"GLOBAL (\S+)", reason):
            raise ConvertError(f"{file} is refused: it asks for {culprit[1]}, which weights have no need of") from error
        raise ConvertError(f"{file} is refused: it is damaged, or holds more than weights") from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConvertError(f"{file} is damaged: {reason[:160] or type(error).__name__}") from error


def _tensor(value) -> Tensor:
    """A PyTorch tensor; what NumPy has no arrays for is read as what holds the same numbers, or has a fault."""
    dtype, fault = _type(value)
    if fault:
        return Tensor(() if value.is_nested else tuple(value.shape), dtype, lambda: None, fault)

    def array() -> np.ndarray:
        import torch

        plain = value.detach()
        plain = (plain if plain.layout == torch.strided else plain.to_dense()).resolve_neg()
        if dtype != ml_dtypes.bfloat16:
            return plain.numpy()
        return plain.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)

    return Tensor(tuple(value.shape), dtype, array)


def _type(value) -> tuple[np.dtype, str]:
    """The type that a PyTorch tensor is read as, and what keeps it from being a model's parameter."""
    import torch

    kind, none = str(value.dtype).removeprefix("torch."), np.dtype(np.void)
    if value.device.type == "meta":
        return none, "has no numbers: it was saved from the meta device, before the weights were loaded"
    if value.is_quantized:
        return none, f"is quantised ({kind})"
    if value.is_nested:
        return none, "is a nested tensor"
    if value.dtype.is_complex:
        return none, f"is complex ({kind})"
    if kind in ("bfloat16", *_EIGHT_BITS):
        return np.dtype(ml_dtypes.bfloat16), ""
    try:
        return torch.empty(0, dtype=value.dtype).numpy().dtype, ""
    except TypeError:  # types of scales and of packed numbers
        return none, f"is stored as {kind}"
