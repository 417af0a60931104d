"""Inception-v3 of 2015-12-05, the network behind FID, sFID and IS, as pure functions of its weights.

It is the TensorFlow graph that Heusel et al. and OpenAI's ADM evaluator use, in the weights' PyTorch names
(pytorch-fid, torch-fidelity); it is not torchvision's Inception-v3. Batch normalisation is folded into the
convolutions when the weights are loaded. Everything is float32 at full precision: TF32 or bfloat16 change FID.
"""

import functools
import hashlib
import importlib
import math
import pathlib
import types
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from gspn_jax.config import ConfigError
from gspn_jax.files import replacing, sha256_of
from gspn_jax.state_dict import WeightsError, read_state_dict

SIZE = 299
"""Side of the square that every image is resized to."""
POOL, SPATIAL, LOGITS = 2048, 2023, 1008
"""Number of features of each kind."""
TENSORS, VALUES = 472, 23_885_392
"""In a file of weights, `num_batches_tracked` left out."""
PUBLISHED = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
"""The weights as pytorch-fid publishes them; the name ends in the first 8 hex digits of the file's SHA-256."""

CLEAN = "clean:"
"""Before the path of the weights: images are scaled as clean-fid does (`clean_inception`)."""

_EPSILON = 1e-3
_SPATIAL_CHANNELS = 7
_CONV_PARTS = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")

Params = Mapping[str, Float32[Array, "..."]]
Conv = Callable[..., Float[Array, "B h w D"]]


class Features(NamedTuple):
    """`pool`: after the last pooling (FID, KID, precision, recall). `spatial`: the first 7 channels of Mixed_6d, in the
    order 17 x 17 x 7 (sFID). `logits`: pool @ W of 1008 classes, without the bias, as in the ADM evaluator (IS)."""

    pool: Float32[Array, "N 2048"]
    spatial: Float32[Array, "N 2023"]
    logits: Float32[Array, "N 1008"]


def apply(params: Params, images: UInt8[Array, "N H W 3"]) -> Features:
    """The features of 0..255 images of any size. Raises ValueError for other than uint8 [N, H, W, 3]."""
    return network(params, resize(images))


def resize(images: UInt8[Array, "N H W 3"]) -> Float32[Array, "N 299 299 3"]:
    """0..255 images as the network takes them: bilinear to 299x299 as TensorFlow 1 does it, then (x - 128) / 128.

    Pixel i is read at i * size / 299: no half-pixel centres and no antialiasing, which `jax.image.resize` has both.
    """
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != jnp.uint8:
        raise ValueError(f"images must be uint8 [N, H, W, 3], found {images.dtype} {list(images.shape)}")
    x = images.astype(jnp.float32)
    for axis in (2, 1):
        low, high, fraction = _taps(x.shape[axis])
        shape = [1] * 4
        shape[axis] = SIZE
        below, above = jnp.take(x, low, axis), jnp.take(x, high, axis)
        x = below + (above - below) * fraction.reshape(shape)
    return (x - 128) * 0.0078125


def _taps(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both neighbours of each of the 299 positions, and the weight of the upper one; in float32, as TensorFlow."""
    position = np.arange(SIZE, dtype=np.float32) * (np.float32(size) / np.float32(SIZE))
    low = np.floor(position).astype(np.int32)
    return low, np.minimum(low + 1, size - 1), position - low


def network(params: Params, images: Float32[Array, "N 299 299 3"]) -> Features:
    """The features of images that `resize` made."""
    spatial, pool = _trunk(functools.partial(_conv, params), images)
    logits = jnp.matmul(pool, params["logits.kernel"], precision=jax.lax.Precision.HIGHEST)
    return Features(pool, spatial, logits)


def _conv(
    params: Params,
    name: str,
    x: Float[Array, "B H W C"],
    width: int,
    kernel: tuple[int, int],
    *,
    stride: int,
    padding: str,
) -> Float[Array, "B h w D"]:
    """`width` and `kernel` are those of the weights; `expected_shapes` reads them here."""
    y = jax.lax.conv_general_dilated(
        x,
        params[f"{name}.kernel"],
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
    return jax.nn.relu(y + params[f"{name}.bias"])


def _trunk(conv: Conv, x: Float[Array, "B 299 299 3"]) -> tuple[Float[Array, "B 2023"], Float[Array, "B 2048"]]:
    """The spatial and the pooled features, the network written once: `conv` applies a layer, or notes its shape."""
    layer = functools.partial(_layer, conv)
    x = layer("Conv2d_1a_3x3", x, 32, 3, stride=2)
    x = layer("Conv2d_2a_3x3", x, 32, 3, padding="VALID")
    x = layer("Conv2d_2b_3x3", x, 64, 3)
    x = _max_pool(x)
    x = layer("Conv2d_3b_1x1", x, 80, 1)
    x = layer("Conv2d_4a_3x3", x, 192, 3, padding="VALID")
    x = _max_pool(x)
    for name, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
        x = _block_a(functools.partial(_chain, conv, name), x, pooled)
    x = _block_b(functools.partial(_chain, conv, "Mixed_6a"), x)
    for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        x = _block_c(functools.partial(_chain, conv, name), x, width)
        if name == "Mixed_6d":
            spatial = x[..., :_SPATIAL_CHANNELS].reshape(x.shape[0], -1)
    x = _block_d(functools.partial(_chain, conv, "Mixed_7a"), x)
    x = _block_e(functools.partial(_chain, conv, "Mixed_7b"), x, _average_pool)
    # a maximum, where torchvision's network has an average: a slip of the 2015 graph that its features keep
    x = _block_e(functools.partial(_chain, conv, "Mixed_7c"), x, functools.partial(_max_pool, stride=1, padding="SAME"))
    return spatial, x.mean((1, 2))


def _layer(
    conv: Conv,
    name: str,
    x: jax.Array,
    width: int,
    kernel: int | tuple[int, int],
    *,
    stride: int = 1,
    padding: str | None = None,
) -> jax.Array:
    """Strided layers are not padded; the others are unless they say so."""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    return conv(name, x, width, kernel, stride=stride, padding=padding or ("SAME" if stride == 1 else "VALID"))


def _chain(conv: Conv, block: str, x: jax.Array, branch: str, *layers: tuple) -> jax.Array:
    """Layers `block`.`branch`_1, _2, ... one after the other, each (width, kernel) or (width, kernel, stride)."""
    for number, (width, kernel, *stride) in enumerate(layers, 1):
        name = f"{block}.{branch}" + (f"_{number}" if len(layers) > 1 else "")
        x = _layer(conv, name, x, width, kernel, stride=stride[0] if stride else 1)
    return x


def _concatenate(*branches: jax.Array) -> jax.Array:
    return jnp.concatenate(branches, axis=-1)


def _block_a(chain: Callable, x: jax.Array, pooled: int) -> jax.Array:
    return _concatenate(
        chain(x, "branch1x1", (64, 1)),
        chain(x, "branch5x5", (48, 1), (64, 5)),
        chain(x, "branch3x3dbl", (64, 1), (96, 3), (96, 3)),
        chain(_average_pool(x), "branch_pool", (pooled, 1)),
    )


def _block_b(chain: Callable, x: jax.Array) -> jax.Array:
    return _concatenate(
        chain(x, "branch3x3", (384, 3, 2)), chain(x, "branch3x3dbl", (64, 1), (96, 3), (96, 3, 2)), _max_pool(x)
    )


def _block_c(chain: Callable, x: jax.Array, width: int) -> jax.Array:
    row, column = (1, 7), (7, 1)
    return _concatenate(
        chain(x, "branch1x1", (192, 1)),
        chain(x, "branch7x7", (width, 1), (width, row), (192, column)),
        chain(x, "branch7x7dbl", (width, 1), (width, column), (width, row), (width, column), (192, row)),
        chain(_average_pool(x), "branch_pool", (192, 1)),
    )


def _block_d(chain: Callable, x: jax.Array) -> jax.Array:
    return _concatenate(
        chain(x, "branch3x3", (192, 1), (320, 3, 2)),
        chain(x, "branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)),
        _max_pool(x),
    )


def _block_e(chain: Callable, x: jax.Array, pool: Callable) -> jax.Array:
    # both fans start from the last layer of what stands before them
    row, column = (1, 3), (3, 1)
    middle = chain(x, "branch3x3_1", (384, 1))
    double = chain(chain(x, "branch3x3dbl_1", (448, 1)), "branch3x3dbl_2", (384, 3))
    return _concatenate(
        chain(x, "branch1x1", (320, 1)),
        chain(middle, "branch3x3_2a", (384, row)),
        chain(middle, "branch3x3_2b", (384, column)),
        chain(double, "branch3x3dbl_3a", (384, row)),
        chain(double, "branch3x3dbl_3b", (384, column)),
        chain(pool(x), "branch_pool", (192, 1)),
    )


def _max_pool(x: Float[Array, "B H W C"], *, stride: int = 2, padding: str = "VALID") -> Float[Array, "B h w C"]:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _average_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """3x3 with stride 1; at the border the mean is over the pixels that exist."""

    def total(values: jax.Array) -> jax.Array:
        return jax.lax.reduce_window(values, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")

    return total(x) / total(jnp.ones((1, *x.shape[1:3], 1), x.dtype))


@functools.cache
def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor in a file of weights (PyTorch's layout), `num_batches_tracked` left out."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, x: jax.Array, width: int, kernel: tuple[int, int], *, stride: int, padding: str) -> jax.Array:
        shapes[f"{name}.conv.weight"] = (width, x.shape[-1], *kernel)
        shapes.update({f"{name}.{part}": (width,) for part in _CONV_PARTS[1:]})
        return jax.lax.conv_general_dilated(
            x,
            jnp.zeros((*kernel, x.shape[-1], width)),
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    jax.eval_shape(functools.partial(_trunk, note), jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32))
    return shapes | {"fc.weight": (LOGITS, POOL), "fc.bias": (LOGITS,)}


def file_of(path: str | pathlib.Path) -> str:
    """The file of a path that may begin with `CLEAN`."""
    return str(path).removeprefix(CLEAN)


def configured(path: str | pathlib.Path) -> types.ModuleType:
    """Network of a path: `clean_inception` where it begins with `CLEAN`, or else this one."""
    name = "gspn_jax.metrics.clean_inception" if str(path).startswith(CLEAN) else __name__
    return importlib.import_module(name)


def require(path: str | None, flag: str) -> str:
    """`path` if it is a file; else ConfigError says which weights `flag` needs and where they are."""
    if path is None or not pathlib.Path(file_of(path)).is_file():
        raise ConfigError(
            f"{flag} must be the Inception-v3 weights of 2015-12-05 (95 MB, download {PUBLISHED}), found "
            + (f"nothing at {path}" if path else f"no {flag}")
        )
    return path


def load(path: str | pathlib.Path) -> dict[str, Float32[np.ndarray, "..."]]:
    """Reads the weights that pytorch-fid and torch-fidelity publish (.pth, which needs PyTorch), or `convert`ed ones.

    Raises FileNotFoundError, ImportError for a .pth file without PyTorch, and WeightsError for other contents.
    """
    return from_state_dict(read(path))


def read(path: str | pathlib.Path) -> dict[str, Float32[np.ndarray, "..."]]:
    """The tensors of a file of weights by their PyTorch names, checked; raises as `load`."""
    try:
        state_dict = {
            name: value
            for name, value in read_state_dict(file_of(path)).items()
            if not name.endswith(".num_batches_tracked")
        }
        check(state_dict)
    except WeightsError as error:
        where = "" if str(path) in str(error) else f"{path}: "
        raise WeightsError(f"{where}{error}") from error
    return state_dict


def check(state_dict: Mapping[str, np.ndarray]) -> None:
    """Raises WeightsError naming a tensor that is missing, unknown, of another shape or not finite, or a variance that
    is negative."""
    expected = expected_shapes()
    missing, unknown = sorted(expected.keys() - state_dict.keys()), sorted(state_dict.keys() - expected.keys())
    if missing:
        raise WeightsError(
            f"the weights of the Inception-v3 of 2015 must have {missing[0]!r}, found "
            f"{len(state_dict)} tensors without it" + _others(missing)
        )
    if unknown:
        raise WeightsError(
            f"every tensor must belong to the Inception-v3 of 2015, found {unknown[0]!r}" + _others(unknown)
        )
    for name, value in state_dict.items():
        if value.shape != expected[name]:
            hint = "; torchvision's Inception-v3 is another network" if name.startswith("fc.") else ""
            raise WeightsError(f"{name!r} must have shape {expected[name]}, found {value.shape}{hint}")
        if not np.isfinite(value).all():
            raise WeightsError(f"{name!r} must be finite, found NaN or infinity")
        if name.endswith("running_var") and (value < 0).any():
            raise WeightsError(f"{name!r} must be 0 or more, found {value.min()}")


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more such)" if len(names) > 1 else ""


def from_state_dict(state_dict: Mapping[str, np.ndarray]) -> dict[str, Float32[np.ndarray, "..."]]:
    """The weights for `apply`, of tensors that `check` accepts: "LAYER.kernel" [kh, kw, in, out] and "LAYER.bias", with
    batch normalisation folded in (in float64), and "logits.kernel" [2048, 1008]."""
    check(state_dict)
    params = {}
    for name in state_dict:
        if not name.endswith(_CONV_PARTS[0]):
            continue
        layer = name.removesuffix("." + _CONV_PARTS[0])
        kernel, gain, shift, mean, variance = (
            np.asarray(state_dict[f"{layer}.{part}"], np.float64) for part in _CONV_PARTS
        )
        scale = gain / np.sqrt(variance + _EPSILON)
        params[f"{layer}.kernel"] = np.ascontiguousarray((kernel.transpose(2, 3, 1, 0) * scale).astype(np.float32))
        params[f"{layer}.bias"] = (shift - mean * scale).astype(np.float32)
    params["logits.kernel"] = np.ascontiguousarray(np.asarray(state_dict["fc.weight"], np.float32).T)
    return params


def convert(path: str | pathlib.Path, output: str | pathlib.Path) -> None:
    """Writes the tensors of a file of weights as .safetensors, which needs no PyTorch to read; raises as `load`."""
    from safetensors.numpy import save_file

    state_dict = {name: np.ascontiguousarray(value) for name, value in read(path).items()}
    with replacing(pathlib.Path(output)) as temporary:
        save_file(state_dict, temporary, metadata={"source_sha256": sha256_of(path)})


def digest(state_dict: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes and float32 values: the same for a .pth file and what `convert` makes of it."""
    total = hashlib.sha256()
    for name in sorted(state_dict):
        value = np.ascontiguousarray(state_dict[name], np.dtype("<f4"))
        total.update(f"{name}{value.shape}".encode())
        total.update(value.tobytes())
    return total.hexdigest()


def random_state_dict(seed: int) -> dict[str, Float32[np.ndarray, "..."]]:
    """Weights that tell nothing about images but keep the size of activations: for tests, and to check a machine.

    The same bits on every platform and NumPy version: only the raw stream of PCG64 is used.
    """
    bits = np.random.PCG64(seed)

    def uniform(shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
        unit = (bits.random_raw(math.prod(shape)) >> np.uint64(40)).astype(np.float64) / 2**24
        return (low + (high - low) * unit).astype(np.float32).reshape(shape)

    ranges = {
        "bn.weight": (0.8, 1.2),
        "bn.bias": (-0.2, 0.2),
        "bn.running_mean": (-0.2, 0.2),
        "bn.running_var": (0.8, 1.2),
        "fc.bias": (-1.0, 1.0),
    }
    state_dict = {}
    for name, shape in expected_shapes().items():
        bound = math.sqrt(6 / math.prod(shape[1:]))  # He et al. 2015: keeps the variance through a ReLU
        low, high = next((ends for part, ends in ranges.items() if name.endswith(part)), (-bound, bound))
        state_dict[name] = uniform(shape, low, high)
    return state_dict


def random_params(seed: int) -> dict[str, Float32[np.ndarray, "..."]]:
    """`random_state_dict` for `apply`."""
    return from_state_dict(random_state_dict(seed))
