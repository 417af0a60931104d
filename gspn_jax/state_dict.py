"""Files of published weights, as arrays by name. No code in a file is run."""

import argparse
import pathlib
import pickle
from collections.abc import Mapping

import numpy as np

from gspn_jax import extras

_WRAPPERS = ("ema", "model")
"""Keys under which training checkpoints keep the state_dict; the first one found is taken."""


class WeightsError(ValueError):
    """Weights that cannot be used; the message is one sentence naming the file or the tensor."""


def read_state_dict(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Reads a `.safetensors` file, or a PyTorch file such as `.pt` or `.bin` (which needs PyTorch), as float32 arrays.

    Of a training checkpoint {"ema": ..., "model": ...} the "ema" weights are taken. Only tensors are unpickled.
    Raises FileNotFoundError, ImportError without PyTorch, and WeightsError for a file that holds no state_dict.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the weights must be a file, found nothing at {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise WeightsError(f"{path} must be a safetensors file, it cannot be read: {error}") from error
        return {name: np.asarray(value, np.float32) for name, value in tensors.items()}
    return _read_torch(path)


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    extras.require("torch", "torch", by=f"reading {path.name} (a .safetensors file is read without)")
    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the original's checkpoints carry their args
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path} must be a PyTorch file of tensors, it cannot be read: {reason}") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise WeightsError(f"{path} must hold a state_dict (names to tensors), found something else")
    return {name: value.float().numpy() for name, value in content.items()}
