"""Tensors of published networks: read from safetensors files as they are stored, checked, and laid out for NHWC.

No code in a file is run: only safetensors are read, and types stay what they are in the file (bfloat16 is bfloat16).
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Shaped

from gspn_jax import small_files
from gspn_jax.config import ConfigError
from gspn_jax.state_dict import WeightsError, refuse_pointer

NetworkConfig = TypeVar("NetworkConfig")

TYPES = ("float32", "float16", "bfloat16")
"""Types of tensors that are read."""

VARIANTS = ("", ".fp16", ".bf16")
"""Ends of a file's name before `.safetensors`, as diffusers writes them; the first that is there is read."""

_CHANNELS_LAST = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}
"""Axes of a convolution [out, in, kh, kw], a linear [out, in] and a vector -> those of [kh, kw, in, out], [in, out]."""


class TensorFiles(Mapping[str, np.ndarray]):
    """Tensors of safetensors files by name; each is read when it is asked for, so that none is in memory twice.

    Raises WeightsError for a file that cannot be read and for a name that stands in two of the files.
    """

    def __init__(self, paths: list[pathlib.Path]):
        from safetensors import SafetensorError, safe_open

        self._homes: dict[str, tuple[pathlib.Path, safe_open]] = {}
        for path in paths:
            try:
                refuse_pointer(path)
                file = safe_open(path, "np")
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{path} must be a safetensors file, it cannot be read: {error}") from error
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if name in self._homes:
                    first = self._homes[name][0]
                    raise WeightsError(f"{name!r} must stand in one file, found it in {first} and {path}")
                self._homes[name] = (path, file)

    def __getitem__(self, name: str) -> Shaped[np.ndarray, "..."]:
        path, file = self._homes[name]
        kind = file.get_slice(name).get_dtype()
        if kind not in ("F32", "F16", "BF16"):
            raise WeightsError(f"{name!r} of {path} must be one of {', '.join(TYPES)}, found {kind}")
        return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)


@contextlib.contextmanager
def errors_name(path: pathlib.Path) -> Iterator[None]:
    """Inside, what a ConfigError or a WeightsError says begins with `path`, unless it names it already."""
    try:
        yield
    except (ConfigError, WeightsError) as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error


def open_folder(folder: pathlib.Path, stem: str) -> TensorFiles:
    """Opens the files that `weight_files` finds. Raises WeightsError for what is no safetensors file."""
    return TensorFiles(weight_files(folder, stem))


def weight_files(folder: pathlib.Path, stem: str) -> list[pathlib.Path]:
    """Finds `<stem>.safetensors` of `folder`, a variant of it such as `.fp16`, or the shards that an index names.

    Raises FileNotFoundError for a missing folder, file or shard.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder of weights {folder} must exist, found none")
    for variant in VARIANTS:
        whole = folder / f"{stem}{variant}.safetensors"
        if whole.is_file():
            return [whole]
        for index in (f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors.index.json"):
            if (folder / index).is_file():
                return _shards(folder / index)
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(
        f"{folder} must hold {stem}.safetensors (or its .fp16 variant, or shards with an index); "
        f"pickled .bin files are not read; found {found}"
    )


def load_network(
    folder: str | pathlib.Path,
    stem: str,
    read_config: Callable[[dict], NetworkConfig],
    from_state_dict: Callable[[Mapping[str, np.ndarray], NetworkConfig, DTypeLike | None], dict[str, Any]],
    dtype: DTypeLike | None,
) -> tuple[dict[str, Shaped[np.ndarray, "..."]], NetworkConfig]:
    """Reads the folder of one network, its `config.json` and the weights beside it, as `open_folder` finds them.

    Raises FileNotFoundError, and ConfigError and WeightsError that name the folder.
    """
    folder = pathlib.Path(folder)
    with errors_name(folder):
        config = read_config(read_json(folder / "config.json"))
        return from_state_dict(open_folder(folder, stem), config, dtype), config


def _shards(index: pathlib.Path) -> list[pathlib.Path]:
    """Files that an index names, all of them beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index} must hold a weight_map from names to files, found none")
    for name in weight_map.values():
        if not isinstance(name, str):
            raise WeightsError(f"{index} must name safetensors files beside it, found {name!r}")
    shards = [index.parent / name for name in sorted(set(weight_map.values()))]
    for shard in shards:
        if shard.parent != index.parent or shard.suffix != ".safetensors":
            raise WeightsError(f"{index} must name safetensors files beside it, found {shard.name!r}")
        if not shard.is_file():
            raise FileNotFoundError(f"{index} names the shard {shard.name}, which is not there")
    return shards


def read_json(path: pathlib.Path, *, nan: bool = False) -> dict:
    """Reads a JSON object; with `nan` also numbers that are not finite.

    Raises FileNotFoundError without the file and WeightsError for other contents.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} must exist, found nothing there")
    try:
        content = small_files.read_json(path, nan=nan, large=True)  # a tokenizer of no length has 10**30
    except small_files.DamagedFile as error:
        raise WeightsError(f"{path} must be a JSON file, it cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content


def arrange(
    tensors: TensorFiles | Mapping[str, Shaped[np.ndarray, "..."]],
    expected: Mapping[str, tuple[int, ...]],
    owner: str,
    *,
    dtype: DTypeLike | None = None,
    rename: Callable[[str], str | None] = str,
    as_stored: Callable[[str], bool] = lambda name: False,
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Checks the tensors of `owner` ("the U-Net") against names and shapes of `expected` and lays them out for NHWC.

    Convolutions become [kh, kw, in, out] and linears [in, out], except those for which `as_stored` is true (tables).
    `rename` maps a file's name to an expected one, or to None if it is to be left out; `dtype` None keeps each tensor's
    type. Raises WeightsError naming the tensor that is missing, unknown, of another shape or not finite.
    """
    found = {new: name for name in tensors if (new := rename(name)) is not None}
    for name in expected:
        if name not in found:
            raise WeightsError(f"the weights of {owner} must have {name!r}, found {len(found)} other tensors")
    for name, theirs in found.items():
        if name not in expected:
            raise WeightsError(f"every tensor must belong to {owner} of this config, found {theirs!r}")
    params = {}
    for name, shape in expected.items():
        value = tensors[found[name]]
        if value.shape != shape:
            raise WeightsError(f"{found[name]!r} must have shape {shape}, found {value.shape}")
        if not np.isfinite(value).all():
            raise WeightsError(f"{found[name]!r} must be finite, found NaN or infinity")
        order = range(value.ndim) if as_stored(name) else _CHANNELS_LAST[value.ndim]
        with np.errstate(over="ignore"):  # is looked at below
            params[name] = np.ascontiguousarray(value.transpose(order), dtype and jnp.dtype(dtype))
        if dtype is not None and not np.isfinite(params[name]).all():
            raise WeightsError(f"{found[name]!r} does not fit into {jnp.dtype(dtype)}: it would become infinite")
    return params
