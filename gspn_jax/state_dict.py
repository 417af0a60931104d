"""Files of published weights, as arrays by name. No code in a file is run."""

import argparse
import json
import math
import pathlib
import pickle
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gspn_jax import extras

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the text begins that Git keeps in place of a file of Git LFS."""

AVERAGES = ("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict")
WRAPPERS = (*AVERAGES, "model", "state_dict", "model_state_dict", "module")
"""Keys under which training checkpoints keep a state_dict, an average before what it is of; one may lie in another."""
PREFIXES = ("module.", "_orig_mod.", "ema.", "model.")
"""Beginnings of every name in a state_dict: of data-parallel, compiled and averaged modules."""

FLOATS: dict[str, Any] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
"""Types of safetensors that weights may have, as NumPy reads them."""
_INTEGERS = {f"{kind}{bits}": np.dtype(f"<{kind.lower()}{bits // 8}") for kind in "IU" for bits in (8, 16, 32, 64)} | {
    "BOOL": np.dtype(bool)
}

_DEEPEST = 16
"""Wrappers and prefixes in one another: a dictionary may hold itself."""
_REPEATED_BYTES = 2**20
"""Bytes of a tensor that repeats what is stored; a larger one is no weight."""


class WeightsError(ValueError):
    """Weights that cannot be used; the message is one sentence naming the file or the tensor."""


class Weights(NamedTuple):
    """Contents of a file of weights."""

    tensors: dict[str, np.ndarray]
    """float32, by name."""
    wrapper: str | None
    """The key of `WRAPPERS` under which they lay: that of the average, or else the innermost; None without one."""
    types: tuple[str, ...]
    """In which they are stored, such as "bfloat16"."""
    settings: dict[str, Any]
    """Arguments of the training that a checkpoint carries beside them."""


def read_state_dict(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Reads a `.safetensors` file, or a PyTorch file such as `.pt` or `.bin` (which needs PyTorch), as float32 arrays.

    Of a training checkpoint the average is taken if there is one (`WRAPPERS`). Only tensors are unpickled.
    Raises FileNotFoundError, ImportError without PyTorch, and WeightsError for a file that holds no state_dict.
    """
    return read_weights(path).tensors


def read_weights(path: str | pathlib.Path) -> Weights:
    """Reads as `read_state_dict`, and tells what was taken from where."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the weights must be a file, found nothing at {path}")
    refuse_pointer(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    settings = content.get("args") if isinstance(content, Mapping) else None
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
    content, wrapper = _unwrapped(content)
    if not isinstance(content, Mapping) or not content or not all(hasattr(v, "shape") for v in content.values()):
        raise WeightsError(f"{path} must hold a state_dict (names to tensors), found something else")
    convert = _float32 if path.suffix == ".safetensors" else _from_torch
    tensors = {str(name): convert(value, f"{name!r} of {path}") for name, value in content.items()}
    types = sorted({str(value.dtype).removeprefix("torch.") for value in content.values()})
    return Weights(tensors, wrapper, tuple(types), dict(settings) if isinstance(settings, Mapping) else {})


def refuse_pointer(path: pathlib.Path) -> None:
    """Raises WeightsError for the text that Git LFS leaves in place of a file that was not fetched."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise WeightsError(
                f"{path} is a Git LFS pointer, not the file it stands for: fetch that with `git lfs pull`"
            )


def layer_numbers(pattern: re.Pattern, names: Mapping[str, Any]) -> list[int]:
    """The numbers that group 1 of `pattern` matches at the start of `names`, sorted, each once.

    Raises WeightsError unless they are 0, 1, 2, ...: so no file makes a network of more layers than it has.
    """
    found = {match[1] for match in map(pattern.match, names) if match}
    wanted = [str(number) for number in range(len(found))]
    if odd := found - set(wanted):
        name = min(odd, key=len)
        shown = name if len(name) < 20 else f"one of {len(name):,} digits"
        raise WeightsError(f"the layers must be numbered from 0 to {len(found) - 1}, found {shown}")
    return list(range(len(found)))


def _unwrapped(content: Any) -> tuple[Any, str | None]:
    """Contents of all wrappers, without prefixes; and the last wrapper, or average, that was taken off."""
    taken = None
    for _ in range(_DEEPEST):
        if not isinstance(content, Mapping) or not content:
            break
        wrapper = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if wrapper:
            content, taken = content[wrapper], taken if taken in AVERAGES else wrapper
            continue
        content = {name: value for name, value in content.items() if name != "n_averaged"}  # of AveragedModel
        prefix = next((one for one in PREFIXES if all(str(name).startswith(one) for name in content)), None)
        if prefix is None or not content:
            break
        content = {name[len(prefix) :]: value for name, value in content.items()}
        taken = "ema" if prefix == "ema." else taken
    return content, taken


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Tensors as they are stored, mapped into memory."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):  # checks names, shapes and where each tensor ends
            pass
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} must be a safetensors file, it cannot be read: {error}") from error
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    tensors = {}
    for name, about in header.items():
        dtype = (FLOATS | _INTEGERS).get(about["dtype"])
        if dtype is None:
            raise WeightsError(f"{name!r} of {path} must be one of {', '.join(FLOATS)}, found {about['dtype']}")
        first, last = about["data_offsets"]
        tensors[name] = data[start + first : start + last].view(dtype).reshape(about["shape"])
    return tensors


def _float32(value: np.ndarray, name: str) -> np.ndarray:
    if value.dtype in _INTEGERS.values() and value.size > 1:
        raise WeightsError(f"{name} must be of floating point, found {value.dtype}: quantized weights are not read")
    return np.array(value, np.float32)


def _read_torch(path: pathlib.Path) -> Any:
    extras.require("torch", "torch", by=f"reading {path.name} (a .safetensors file is read without)")
    import torch

    try:
        with (
            torch.serialization.safe_globals([argparse.Namespace]),  # the original's checkpoints carry their args
            warnings.catch_warnings(action="ignore"),  # of kinds of tensors that are refused afterwards
        ):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a foreign file PyTorch raises whatever its unpickler meets
        raise WeightsError(f"{path} must be a PyTorch file of tensors, {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Why PyTorch did not read a file, without its advice to run the file's code."""
    text = str(error)
    if "TorchScript" in text:
        return "it is a TorchScript archive, which is a program: save its state_dict()"
    if foreign := re.search(r"Unsupported global: GLOBAL (\S+)|Unsupported class (\S+)", text):
        name = foreign[1] or foreign[2]
        return f"it cannot be read: it holds the Python object {name}, whose code is not run: save a state_dict()"
    of_pytorch = ("weights_only", "hasRecord", "inline_container", "PytorchStreamReader")  # what its own words speak of
    if any(word in text for word in of_pytorch) or isinstance(error, pickle.UnpicklingError):
        return "it cannot be read: it is damaged, or of another kind"
    return f"it cannot be read: {text.splitlines()[0] if text else type(error).__name__}"


def _from_torch(value: Any, name: str) -> np.ndarray:
    import torch

    if value.is_quantized or (not value.is_floating_point() and value.numel() > 1):
        other = "complex" if value.is_complex() else "quantized"
        raise WeightsError(f"{name} must be of floating point, found {value.dtype}: {other} weights are not read")
    if value.is_meta or value.layout != torch.strided or value.is_nested:
        kind = "without values (meta)" if value.is_meta else f"of layout {value.layout}"
        raise WeightsError(f"{name} must be a dense tensor with its values, found one {kind}")
    needed = math.prod(value.shape) * value.element_size()
    if needed > max(value.untyped_storage().nbytes(), _REPEATED_BYTES):
        raise WeightsError(f"{name} must store its {math.prod(value.shape):,} values, found a few that are repeated")
    return np.array(value.detach().float().numpy())
