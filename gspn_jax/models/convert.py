"""Weights of the original DiT (facebookresearch/DiT, a PyTorch state_dict) to our parameters and back; those of
LightningDiT too, whose blocks have other parts under other names."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from gspn_jax import models
from gspn_jax.config import Config, ConfigError
from gspn_jax.models.embeddings import MAX_PERIOD, TIME_FREQUENCIES, sincos_positions
from gspn_jax.models.parameters import by_path
from gspn_jax.models.presets import resolve

# Our path -> the original's name. A stack of blocks is one array here and one array a block there ("{}").
_NAMES = {
    "patch_embed/proj": "x_embedder.proj",
    "time_embed/fc1": "t_embedder.mlp.0",
    "time_embed/fc2": "t_embedder.mlp.2",
    "label_embed": "y_embedder.embedding_table",
    "trunk/blocks/modulation/linear": "blocks.{}.adaLN_modulation.1",
    "trunk/blocks/mixer/qkv": "blocks.{}.attn.qkv",
    "trunk/blocks/mixer/proj": "blocks.{}.attn.proj",
    "trunk/blocks/mlp/fc1": "blocks.{}.mlp.fc1",
    "trunk/blocks/mlp/fc2": "blocks.{}.mlp.fc2",
    "final/modulation/linear": "final_layer.adaLN_modulation.1",
    "final/linear": "final_layer.linear",
    # those of LightningDiT (hustvl/LightningDiT)
    "trunk/blocks/norm1": "blocks.{}.norm1",
    "trunk/blocks/norm2": "blocks.{}.norm2",
    "trunk/blocks/mixer/q_norm": "blocks.{}.attn.q_norm",
    "trunk/blocks/mixer/k_norm": "blocks.{}.attn.k_norm",
    "final/norm": "final_layer.norm_final",
}
_SWIGLU = {"trunk/blocks/mlp/fc1": "blocks.{}.mlp.w12", "trunk/blocks/mlp/fc2": "blocks.{}.mlp.w3"}
_LEAVES = {"kernel": "weight", "embedding": "weight", "bias": "bias", "scale": "weight"}
_POSITIONS = "pos_embed"
_RIDGE = 1e-14


def dit_from_torch(state_dict: Mapping[str, np.ndarray], config: Config) -> dict:
    """The parameters of `models.create(config)`, a DiT with attention, from the original's state_dict.

    Raises ValueError naming the key for one that is missing, unknown, of the wrong shape, or not finite, and for a
    `pos_embed` that is not the fixed sine-cosine table; ConfigError if the config is not a DiT with attention.
    """
    targets = _targets(config)
    expected = {name for names, _ in targets.values() for name in names}
    for name in sorted(expected - set(state_dict)):
        raise ValueError(f"the state_dict must have {name!r}, found {len(state_dict)} other keys")
    for name in sorted(set(state_dict) - expected - {_POSITIONS}):
        raise ValueError(
            f"every key of the state_dict must belong to a DiT of depth {resolve(config.model).depth}, found {name!r}"
        )
    if _POSITIONS in state_dict:
        _check_positions(np.asarray(state_dict[_POSITIONS]), resolve(config.model).hidden)

    params: dict = {}
    for path, (names, shape) in targets.items():
        arrays = [_to_ours(name, np.asarray(state_dict[name]), shape, config) for name in names]
        *parents, leaf = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = np.stack(arrays) if _is_stacked(path) else arrays[0]
    return params


def dit_to_torch(params: Mapping, config: Config) -> dict[str, np.ndarray]:
    """The inverse of `dit_from_torch`, with the `pos_embed` of the config's image size."""
    arch = resolve(config.model)
    side = config.data.image_size // arch.patch
    positions = np.asarray(sincos_positions(side, side, arch.hidden)).reshape(1, side * side, arch.hidden)
    state_dict = {_POSITIONS: positions}
    flat = by_path(params)
    for path, (names, _) in _targets(config).items():
        array = np.asarray(flat[path], np.float32)
        for name, one in zip(names, array if _is_stacked(path) else [array], strict=True):
            state_dict[name] = _to_theirs(name, one, config)
    return state_dict


def _targets(config: Config) -> dict[str, tuple[list[str], tuple[int, ...]]]:
    """Our path -> (the original's names, one a block; the shape of one of them here)."""
    arch = resolve(config.model)
    if arch.layout != "dit" or arch.mixer != "attention":
        raise ConfigError(
            f"model.preset must be a DiT with attention to take the weights of the original, "
            f"found layout {arch.layout!r} with mixer {arch.mixer!r}"
        )
    if arch.bottleneck:
        raise ConfigError(f"model.bottleneck must be 0 to take the weights of the original, found {arch.bottleneck}")
    names = _NAMES | (_SWIGLU if arch.mlp == "swiglu" else {})
    targets = {}
    for path, leaf in by_path(models.abstract(config)[1]).items():
        module, _, kind = path.rpartition("/")
        name = f"{names[module]}.{_LEAVES[kind]}"
        stacked = _is_stacked(path)
        each = [name.format(i) for i in range(arch.depth)] if stacked else [name]
        targets[path] = (each, leaf.shape[1:] if stacked else leaf.shape)
    return targets


def _is_stacked(path: str) -> bool:
    return path.startswith("trunk/blocks/")


def _their_shape(name: str, shape: tuple[int, ...], config: Config) -> tuple[int, ...]:
    """The shape of `name` in the original, of a parameter that has `shape` here."""
    if name == "x_embedder.proj.weight":
        patch = resolve(config.model).patch
        return (shape[1], config.data.channels, patch, patch)
    if name.endswith(".bias"):
        return (int(np.prod(shape)),)
    if name.startswith("y_embedder") or len(shape) == 1:
        return shape
    return (int(np.prod(shape[1:])), shape[0])


def _to_ours(name: str, array: np.ndarray, shape: tuple[int, ...], config: Config) -> np.ndarray:
    expected = _their_shape(name, shape, config)
    if array.shape != expected:
        raise ValueError(f"{name} must have shape {expected} for this config, found {array.shape}")
    array = np.asarray(array, np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, found NaN or infinity")
    if name == "x_embedder.proj.weight":
        array = array.transpose(2, 3, 1, 0)  # [D, C, p, q] -> [p, q, C, D], the order of `patchify`
    elif name.endswith(".weight") and not name.startswith("y_embedder"):
        array = array.T
    return np.ascontiguousarray(array.reshape(shape))


def _to_theirs(name: str, array: np.ndarray, config: Config) -> np.ndarray:
    shape = _their_shape(name, array.shape, config)
    if name == "x_embedder.proj.weight":
        hidden, channels, patch, _ = shape
        array = array.reshape(patch, patch, channels, hidden).transpose(3, 2, 0, 1)
    elif name.endswith(".weight") and not name.startswith("y_embedder"):
        array = array.reshape(shape[::-1]).T
    return np.ascontiguousarray(array.reshape(shape))


def dit_from_sit(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights of SiT (willisma/SiT, linear path, velocity), which have DiT's names, in our convention of flow matching.

    SiT's time s runs from 0 (noise) to 1 (clean) and enters as it is; its velocity is clean - noise. Ours is
    t = 1 - s, enters as 1000 t, and the velocity is noise - clean. So the last layer changes its sign, and the first
    layer of the time MLP takes up the map from our cosines and sines to SiT's (`_frequencies_of`).
    """
    last = {name: -np.asarray(state_dict[name]) for name in ("final_layer.linear.weight", "final_layer.linear.bias")}
    return dict(state_dict) | last | _time_layer(state_dict, lambda t: 1 - t)


def dit_from_repa(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights of REPA (sihyun-yu/REPA, linear path, velocity) without its projectors, in our convention of flow
    matching: its time and its velocity are ours, but the time enters as it is, ours as 1000 t."""
    return dict(state_dict) | _time_layer(state_dict, lambda t: t)


def _time_layer(
    state_dict: Mapping[str, np.ndarray], theirs: Callable[[np.ndarray], np.ndarray]
) -> dict[str, np.ndarray]:
    """The first layer of the time MLP, which was given `theirs` of our time t in [0, 1], for our 1000 t."""
    first = "t_embedder.mlp.0.weight"
    return {first: (np.asarray(state_dict[first], np.float64) @ _frequencies_of(theirs)).astype(np.float32)}


def _frequencies_of(theirs: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The matrix M [256, 256] with M @ f(1000 t) = f(theirs(t)) for t in [0, 1], f as in `timestep_frequencies`;
    `theirs` is t or 1 - t.

    Our frequencies 96 to 127 are their 0 to 31; their others change so slowly over [0, 1] that a few of ours give them
    to 1e-7. Solved by least squares with a small ridge, which keeps the coefficients small.
    """
    half = TIME_FREQUENCIES // 2
    rate = MAX_PERIOD ** -(np.arange(half) / half)
    t = np.linspace(0, 1, 1001)[:, None]

    def features(time: np.ndarray) -> np.ndarray:
        return np.concatenate([np.cos(time * rate), np.sin(time * rate)], axis=1)

    slow = np.flatnonzero(np.tile(1000 * rate <= 1 + 1e-9, 2))
    wanted, ours = features(theirs(t)), features(1000 * t)[:, slow]
    gram = ours.T @ ours + _RIDGE * len(t) * np.eye(len(slow))
    matrix = np.zeros((TIME_FREQUENCIES, TIME_FREQUENCIES))
    matrix[:, slow] = np.linalg.solve(gram, ours.T @ wanted).T
    return matrix


def _check_positions(found: np.ndarray, hidden: int) -> None:
    """We compute positions for any grid; weights trained with other ones would be silently wrong."""
    side = round(found.shape[1] ** 0.5) if found.ndim == 3 else 0
    if found.shape != (1, side * side, hidden):
        raise ValueError(f"{_POSITIONS} must have shape (1, rows * rows, {hidden}), found {found.shape}")
    table = np.asarray(sincos_positions(side, side, hidden)).reshape(found.shape)
    error = np.abs(found - table)
    relative, absolute = _rounding(found)
    if not (error <= 1e-4 + absolute + relative * np.abs(table)).all():
        raise ValueError(
            f"{_POSITIONS} must be the fixed sine-cosine table of DiT, found one that is {error.max():.2g} off"
        )


def _rounding(values: np.ndarray) -> tuple[float, float]:
    """Relative and absolute rounding of the narrowest type that holds all `values`: that in which they were stored."""
    for dtype in (jnp.float8_e5m2, jnp.float8_e4m3fn, jnp.bfloat16, jnp.float16):
        with np.errstate(over="ignore"):
            if np.array_equal(values.astype(dtype).astype(np.float32), values):
                about = jnp.finfo(dtype)
                return float(about.eps) / 2, float(about.smallest_subnormal) / 2
    return 0.0, 0.0
