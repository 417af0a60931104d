"""A file of weights -> a run directory: of the original DiT or SiT, or of what `export` wrote."""

import dataclasses
import logging
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp

from gspn_jax import models
from gspn_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    SamplerConfig,
    TrainConfig,
    check_numbers,
    from_dict,
    to_dict,
)
from gspn_jax.convert.exporting import FORMAT_VERSION, HEADER, named
from gspn_jax.files import check_new_folder, new_folder
from gspn_jax.models.convert import dit_from_sit, dit_from_torch
from gspn_jax.runs import averages, checkpoints, manifest, readback
from gspn_jax.runs.digest import digest_of
from gspn_jax.small_files import DamagedFile, parse, typed
from gspn_jax.state_dict import AVERAGES, Weights, WeightsError, layer_numbers, read_weights, refuse_pointer

log = logging.getLogger(__name__)

DIT_EMA_DECAY, DIT_BATCH_SIZE = 0.9999, 256
"""Settings of the published checkpoints (arXiv 2212.09748, section 4), which hold the average only."""
DIT_TABLE = 1001
"""Rows of their table of classes, of which the last is the null class of guidance."""
_TABLE = "y_embedder.embedding_table.weight"
_BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Make a run directory, to sample and evaluate, of a file of weights."""

    weights: str
    """A checkpoint of the original DiT or SiT (.pt or .safetensors), or a model.safetensors that `export` wrote."""
    output: str
    """The run directory to write, which must not exist."""
    step: int | None = None
    """Training steps of a DiT, which its file does not tell: 7000000 for the published one of 256 pixels, 3000000 for
    that of 512; 0 (unknown) by default."""
    heads: int | None = None
    """Attention heads of a DiT whose width and depth are those of no preset."""
    image_size: int | None = None
    """Side of the latents of a DiT whose file has no pos_embed."""
    objective: Literal["ddpm", "flow"] | None = None
    """Objective that a model of DiT's names was trained for: flow for SiT (linear path, velocity), ddpm for DiT (the
    default)."""
    null_row: Literal["last", "none"] | None = None
    """Whether the table of classes ends in the null class of guidance, or has none (trained without label dropout).
    Must be given unless the table has DiT's 1,001 rows, whose last is the null class."""

    def __post_init__(self) -> None:
        check_numbers(self)
        for name, least in (("step", 0), ("heads", 1), ("image_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} must be {least} or more, found {value}")


def import_weights(arguments: Import) -> None:
    """Raises ConfigError, WeightsError or ImportError with one sentence for what cannot be used."""
    output = pathlib.Path(arguments.output)
    check_new_folder(output)
    readback.check_path(output, "--output")
    header = _header(arguments.weights)
    weights = read_weights(arguments.weights)
    where = f" under {weights.wrapper!r}" if weights.wrapper else ""
    log.info("%s holds %d tensors of %s%s", arguments.weights, len(weights.tensors), ", ".join(weights.types), where)
    try:
        if header is None:
            step, config, params = arguments.step or 0, *_of_dit(weights, arguments)
            about = {"fingerprint": "unknown", "class_names": [str(i) for i in range(config.data.num_classes)]}
        else:
            step, config, params = _of_ours(weights.tensors, header, arguments)
            about = {name: header[name] for name in ("fingerprint", "class_names")}
    except WeightsError as error:
        raise WeightsError(f"{arguments.weights}: {error}") from error
    config = dataclasses.replace(config, run_dir=str(output))
    with new_folder(output, bytes_needed=sum(leaf.nbytes for leaf in jax.tree.leaves(params))) as folder:
        _write_checkpoint(
            folder,
            step,
            params,
            config,
            {"config": to_dict(config), "notes": {"imported_from": arguments.weights}} | about,
        )
    print(
        f"{_described(config)} ({models.count_parameters(config) / 1e6:.1f}M parameters) of step {step}, "
        f"{_average(config)}, in {output}: it can be sampled and evaluated, not trained on"
    )
    if header is None and arguments.objective is None:
        objective = config.diffusion.objective
        log.info("it was taken for a model of %s: a SiT has a DiT's names and needs --objective flow", objective)


def _described(config: Config) -> str:
    """The preset, or where the sizes are those of none, the sizes."""
    found, arch = models.resolve(config.model), models.PRESETS[config.model.preset]
    if (found.hidden, found.depth, found.patch) == (arch.hidden, arch.depth, arch.patch):
        return config.model.preset
    return f"a network of width {found.hidden}, depth {found.depth}, patch {found.patch}"


def _average(config: Config) -> str:
    decay = config.train.ema_decays[0]
    return f"EMA {decay:g}" if decay else "the parameters themselves, not an average"


HEADER_FIELDS = {
    "config": dict,
    "step": int,
    "names": str,
    "fingerprint": str,
    "class_names": list[str],
    "parameters_sha256": str,
}
"""Entries that are read again of those that `export` wrote beside the tensors."""


def _header(path: str) -> dict[str, Any] | None:
    """Notes that `export` wrote beside the tensors; None for a file of another origin. No tensor is read."""
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


def _of_ours(
    state_dict: Mapping[str, np.ndarray], header: dict[str, Any], arguments: Import
) -> tuple[int, Config, Any]:
    for name in ("step", "heads", "image_size", "objective", "null_row"):
        if getattr(arguments, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} is for a DiT of elsewhere, found {arguments.weights}, which tells its own"
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
    return step, config, params


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


def _of_dit(weights: Weights, arguments: Import) -> tuple[Config, Any]:
    objective = arguments.objective or ("flow" if "path_type" in weights.settings else "ddpm")
    for name, known in (("path_type", "Linear"), ("prediction", "velocity")):
        found = weights.settings.get(name, known)
        if objective == "flow" and found != known:
            raise WeightsError(f"a SiT must be of {name} {known!r}, found {found!r}")
    config = dit_config(
        weights.tensors,
        heads=arguments.heads,
        image_size=arguments.image_size,
        step=arguments.step or 0,
        objective=objective,
        null_row=arguments.null_row,
        average=weights.wrapper is None or weights.wrapper in AVERAGES,
    )
    tensors = weights.tensors
    if config.diffusion.label_dropout == 0:  # the row that guidance would use is there, and is never used
        tensors = tensors | {_TABLE: np.pad(tensors[_TABLE], ((0, 1), (0, 0)))}
    return config, _dit(dit_from_sit(tensors) if objective == "flow" else tensors, config)


def _dit(state_dict: Mapping[str, np.ndarray], config: Config) -> Any:
    try:
        return dit_from_torch(state_dict, config)
    except ConfigError:
        raise
    except ValueError as error:
        raise WeightsError(str(error)) from error


def dit_config(
    state_dict: Mapping[str, np.ndarray],
    *,
    heads: int | None = None,
    image_size: int | None = None,
    step: int = 0,
    objective: Literal["ddpm", "flow"] = "ddpm",
    null_row: Literal["last", "none"] | None = None,
    average: bool = True,
) -> Config:
    """Config that the tensors of an original DiT tell, on latents, with DiT's diffusion: 1,000 steps of linear betas.

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
    preset = next(
        (
            name
            for name, p in models.PRESETS.items()
            if (p.layout, p.hidden, p.depth, p.patch) == ("dit", hidden, depth, patch)
        ),
        None,
    )
    if preset is None and heads is None:
        raise ConfigError(
            f"--heads must be given for a DiT of width {hidden} and depth {depth}, which is no preset, found none"
        )
    model = (
        ModelConfig(preset=preset, heads=heads)
        if preset
        else ModelConfig(preset="DiT-S/2", hidden=hidden, depth=depth, patch=patch, heads=heads)
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


def _write_checkpoint(run: pathlib.Path, step: int, params: Any, config: Config, meta: dict[str, Any]) -> None:
    """A checkpoint of nothing but the average, whole with its manifest."""
    where, item = checkpoints.folder(run) / str(step), averages.item(config.train.ema_decays[0])
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(
            where, args=ocp.args.Composite(**{item: ocp.args.StandardSave(params), "meta": ocp.args.JsonSave(meta)})
        )
    manifest.write(where)
    wrong = readback.difference(where, {item: params})
    if wrong:
        raise checkpoints.CheckpointError(f"the checkpoint that was written cannot be read back: {wrong}")
