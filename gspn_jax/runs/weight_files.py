"""Files of weights as parameters of a denoiser and its config: what `convert export` wrote, and those of DiT, SiT and
REPA, which have the names of facebookresearch/DiT."""

import dataclasses
import logging
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from gspn_jax import models
from gspn_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    SamplerConfig,
    TrainConfig,
    from_dict,
)
from gspn_jax.models.convert import dit_from_repa, dit_from_sit, dit_from_torch
from gspn_jax.runs.digest import digest_of
from gspn_jax.small_files import DamagedFile, parse, typed
from gspn_jax.state_dict import AVERAGES, Weights, WeightsError, layer_numbers, read_weights, refuse_pointer

log = logging.getLogger(__name__)

HEADER = "gspn_jax"
"""The key of the file's metadata under which all that `import` needs lies as JSON."""
FORMAT_VERSION = 1
UNKNOWN = "unknown"
"""Fingerprint of the data of a run that was imported from a file that tells neither them nor the names of classes."""
HEADER_FIELDS = {
    "config": dict,
    "step": int,
    "names": str,
    "fingerprint": str,
    "class_names": list[str],
    "parameters_sha256": str,
}
"""Entries that are read again of those that `export` wrote beside the tensors."""

DIT_EMA_DECAY, DIT_BATCH_SIZE = 0.9999, 256
"""Settings of the published checkpoints (arXiv 2212.09748, section 4), which hold the average only."""
DIT_TABLE = 1001
"""Rows of their table of classes, of which the last is the null class of guidance."""
_TABLE = "y_embedder.embedding_table.weight"
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_PROJECTORS = "projectors."
"""Beginning of names that are of no denoiser in a file of REPA: of maps from its tokens to features."""
_ROTATIONS = "feat_rope."
"""Beginning of names of tables that follow from the size, in a file of LightningDiT (hustvl/LightningDiT)."""
_OPTIONS: dict[str, dict[str, Any]] = {
    "blocks.0.mlp.w12.": {"mlp": "swiglu"},
    "blocks.0.norm1.": {"norm": "rms"},
    _ROTATIONS: {"rope": True},
    "blocks.0.attn.q_norm.": {"qk_norm": True},
}
"""Beginning of names in a file of LightningDiT -> fields of `ModelConfig` that they tell."""

Objective = Literal["ddpm", "flow"]
NullRow = Literal["last", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Facts that a file of DiT's names does not tell, asked for by `convert import`; None where it can do without."""

    step: int | None = None
    heads: int | None = None
    image_size: int | None = None
    objective: Objective | None = None
    null_row: NullRow | None = None


class WeightFile(NamedTuple):
    """A denoiser of a file: `params` are arrays of NumPy in their own shapes."""

    config: Config
    params: Any
    step: int
    class_names: tuple[str, ...]
    fingerprint: str
    ours: bool
    """Whether `export` wrote it."""


def read(path: str, origin: Origin) -> WeightFile:
    """Reads a file of weights whole.

    Raises FileNotFoundError, WeightsError or ImportError for what cannot be used, and ConfigError for what must be said
    of a DiT and is not, or was said of what `export` wrote.
    """
    header = read_header(path)
    weights = read_weights(path)
    where = f" under {weights.wrapper!r}" if weights.wrapper else ""
    log.info("%s holds %d tensors of %s%s", path, len(weights.tensors), ", ".join(weights.types), where)
    try:
        if header is not None:
            return _of_ours(weights.tensors, header, origin, path)
        config, params = _of_dit(weights, origin)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    names = tuple(str(i) for i in range(config.data.num_classes))
    return WeightFile(config, params, origin.step or 0, names, UNKNOWN, ours=False)


def named(params: Any) -> Iterator[tuple[str, Any]]:
    """(name, leaf) of every parameter, such as "trunk.blocks.mixer.qkv.kernel", as in the file."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def read_header(path: str) -> dict[str, Any] | None:
    """Header that `export` wrote beside the tensors; None for a file of another origin. No tensor is read."""
    if pathlib.Path(path).suffix != ".safetensors" or not pathlib.Path(path).is_file():
        return None
    from safetensors import SafetensorError, safe_open

    refuse_pointer(pathlib.Path(path))
    try:
        with safe_open(path, "numpy") as file:
            text = (file.metadata() or {}).get(HEADER)
    except SafetensorError as error:
        raise WeightsError(f"{path} must be a safetensors file, it cannot be read: {error}") from error
    if text is None:
        return None
    try:
        header = typed(parse(text, "its header"), {"version": int}, "its header")
        version = header["version"]
        if version != FORMAT_VERSION:
            raise WeightsError(
                f"{path} must be of format version {FORMAT_VERSION} with its fields, found version {version}"
            )
        return typed(header, HEADER_FIELDS, "its header")
    except DamagedFile as error:
        raise WeightsError(f"{path} must have what `export` writes beside the tensors, but {error}") from error


def _of_ours(state_dict: Mapping[str, np.ndarray], header: dict[str, Any], origin: Origin, path: str) -> WeightFile:
    for name, value in dataclasses.asdict(origin).items():
        if value is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} is for a DiT of elsewhere, found {path}, which tells its own"
            )
    config, step, names = from_dict(header["config"]), header["step"], header["class_names"]
    if step < 0 or len(names) != config.data.num_classes:
        raise WeightsError(
            f"the file must tell its step and {config.data.num_classes} names of classes, found step "
            f"{step!r} and other names"
        )
    params = _dit(state_dict, config) if header["names"] == "dit" else _by_name(state_dict, config)
    found = digest_of(params, models.abstract(config)[1])
    if found != header["parameters_sha256"]:
        raise WeightsError(
            "the tensors must be those that were exported, found that their SHA-256 has changed "
            f"({found[:12]}..., not {header['parameters_sha256'][:12]}...)"
        )
    return WeightFile(config, params, step, tuple(names), header["fingerprint"], ours=True)


def _by_name(state_dict: Mapping[str, np.ndarray], config: Config) -> Any:
    shapes = models.abstract(config)[1]
    expected = {name: leaf.shape for name, leaf in named(shapes)}
    odd = sorted(expected.keys() ^ state_dict.keys())
    if odd:
        raise WeightsError(f"the tensors must be those of the config in the file, found {odd[0]!r} on one side only")
    for name, shape in expected.items():
        if state_dict[name].shape != shape:
            raise WeightsError(f"{name!r} must have shape {shape}, found {state_dict[name].shape}")
    return jax.tree.unflatten(jax.tree.structure(shapes), [state_dict[name] for name in expected])


def _of_dit(weights: Weights, origin: Origin) -> tuple[Config, Any]:
    tensors, settings = weights.tensors, weights.settings
    options = block_options(tensors)
    repa = any(name.startswith(_PROJECTORS) for name in tensors)
    objective = origin.objective or ("flow" if repa or options or "path_type" in settings else "ddpm")
    for name, known in (("path_type", ("Linear", "linear")), ("prediction", ("velocity", "v"))):
        found = settings.get(name, known[0])
        if objective == "flow" and found not in known:
            raise WeightsError(f"a SiT must be of {name} {known[0]!r}, found {found!r}")
    if repa and objective != "flow":
        raise ConfigError(f"--objective must be flow for a file of REPA, which has projectors, found {objective}")
    if options and objective != "flow":
        raise ConfigError(f"--objective must be flow for a file of LightningDiT, found {objective}")
    tensors = {name: value for name, value in tensors.items() if not name.startswith((_PROJECTORS, _ROTATIONS))}
    config = dit_config(
        tensors,
        heads=origin.heads,
        image_size=origin.image_size,
        step=origin.step or 0,
        objective=objective,
        null_row=origin.null_row,
        average=weights.wrapper is None or weights.wrapper in AVERAGES,
        options=options,
    )
    if config.diffusion.label_dropout == 0:  # the row that guidance would use is there, and is never used
        tensors = tensors | {_TABLE: np.pad(tensors[_TABLE], ((0, 1), (0, 0)))}
    if objective == "flow":
        tensors = dit_from_repa(tensors) if repa else dit_from_sit(tensors)
    return config, _dit(tensors, config)


def _dit(state_dict: Mapping[str, np.ndarray], config: Config) -> Any:
    try:
        return dit_from_torch(state_dict, config)
    except ConfigError:
        raise
    except ValueError as error:
        raise WeightsError(str(error)) from error


def block_options(names: Iterable[str]) -> dict[str, Any]:
    """Fields of `ModelConfig` that the names of a LightningDiT's tensors tell; empty for an original DiT."""
    names = tuple(names)
    found = [fields for part, fields in _OPTIONS.items() if any(name.startswith(part) for name in names)]
    return {name: value for fields in found for name, value in fields.items()}


def dit_config(
    state_dict: Mapping[str, np.ndarray],
    *,
    heads: int | None = None,
    image_size: int | None = None,
    step: int = 0,
    objective: Objective = "ddpm",
    null_row: NullRow | None = None,
    average: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Config:
    """Config that the tensors of an original DiT tell, or of a LightningDiT by its `block_options`: on latents, with
    DiT's diffusion, 1,000 steps of linear betas.

    Samples are drawn as behind DiT's published numbers: 250 DDPM steps (or Heun steps of a SiT), guidance of three of
    four channels, float32. `average` tells whether they are an average of the parameters.
    Raises WeightsError for tensors of something else, ConfigError for what must be said and was not.
    """
    shapes = {name: value.shape for name, value in state_dict.items()}
    patches, table, final = (
        shapes.get(name, ()) for name in ("x_embedder.proj.weight", _TABLE, "final_layer.linear.weight")
    )
    depth = len(layer_numbers(_BLOCK, state_dict))
    if (len(patches), len(table), len(final)) != (4, 2, 2) or not depth:
        raise WeightsError(
            "the weights must be those of a DiT, as facebookresearch/DiT names them, or of what `python "
            f"-m gspn_jax.convert export` wrote, found {len(shapes)} tensors named "
            f"{', '.join(sorted(shapes)[:3])}, ..."
        )
    hidden, channels, patch, _ = patches
    outputs = final[0] // max(patch, 1) ** 2
    if outputs not in (channels, 2 * channels):
        raise WeightsError(
            f"final_layer.linear.weight must give {channels} or {2 * channels} channels, found {outputs}"
        )
    if null_row is None and table[0] != DIT_TABLE:
        raise ConfigError(
            f"--null-row must be last or none for a table of {table[0]:,} classes, found neither: its last row may be "
            "the null class of guidance, or a class"
        )
    positions = shapes.get("pos_embed", ())
    if len(positions) != 3 and image_size is None:
        raise ConfigError("--image-size must be given for a file without pos_embed, found none")
    side = image_size or patch * round(positions[1] ** 0.5)
    fields = {"layout": "dit", "hidden": hidden, "depth": depth, "patch": patch}
    fields |= {"mlp": "gelu", "norm": "layer", "rope": False, "qk_norm": False, "bottleneck": 0} | dict(options or {})
    preset = next(
        (name for name, p in models.PRESETS.items() if all(getattr(p, k) == v for k, v in fields.items())), None
    )
    if preset is None and heads is None:
        raise ConfigError(
            f"--heads must be given for a DiT of width {hidden} and depth {depth}, which is no preset, found none"
        )
    model = (
        ModelConfig(preset=preset, heads=heads)
        if preset
        else ModelConfig(preset="DiT-S/2", hidden=hidden, depth=depth, patch=patch, heads=heads, **dict(options or {}))
    )
    return Config(
        run_dir="unknown",
        model=dataclasses.replace(model, drop_path=0.0, learn_sigma=outputs == 2 * channels),
        data=DataConfig(
            source="latents",
            path="unknown",
            image_size=side,
            channels=channels,
            num_classes=table[0] - (null_row != "none"),
            flip=True,
        ),
        diffusion=DiffusionConfig(
            objective=objective,
            timesteps=1000,
            beta_schedule="linear",
            label_dropout=0.0 if null_row == "none" else 0.1,
        ),
        sampler=SamplerConfig(name="heun" if objective == "flow" else "ddpm", steps=250, guidance_channels="first3"),
        train=TrainConfig(
            steps=max(step, 1),
            batch_size=DIT_BATCH_SIZE,
            ema_decays=(DIT_EMA_DECAY if average else 0.0,),
            precision="params=float32,compute=float32",
        ),
    )
