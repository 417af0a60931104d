"""A file of weights -> a run directory: of the original DiT, or of what `export` wrote."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

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
from gspn_jax.models.convert import dit_from_torch
from gspn_jax.runs import averages, checkpoints, manifest
from gspn_jax.runs.digest import digest_of
from gspn_jax.small_files import DamagedFile, parse, typed
from gspn_jax.state_dict import WeightsError, read_state_dict

DIT_EMA_DECAY, DIT_BATCH_SIZE = 0.9999, 256
"""Of the published checkpoints (arXiv 2212.09748, section 4), which hold the average only."""
_BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Make a run directory, to sample and evaluate, of a file of weights."""

    weights: str
    """A checkpoint of the original DiT (.pt or .safetensors), or a model.safetensors that `export` wrote."""
    output: str
    """The run directory to write, which must not exist."""
    step: int | None = None
    """Training steps of a DiT, which its file does not tell: 7000000 for the published one of 256 pixels, 3000000 for
    that of 512; 0 (unknown) by default."""
    heads: int | None = None
    """Attention heads of a DiT whose width and depth are those of no preset."""
    image_size: int | None = None
    """Side of the latents of a DiT whose file has no pos_embed."""

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
    header = _header(arguments.weights)
    state_dict = read_state_dict(arguments.weights)
    try:
        if header is None:
            step, config, params = arguments.step or 0, *_of_dit(state_dict, arguments)
            about = {"fingerprint": "unknown", "class_names": [str(i) for i in range(config.data.num_classes)]}
        else:
            step, config, params = _of_ours(state_dict, header, arguments)
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
        f"{config.model.preset} ({models.count_parameters(config) / 1e6:.1f}M parameters) of step {step}, EMA "
        f"{config.train.ema_decays[0]:g}, in {output}: it can be sampled and evaluated, not trained on"
    )


HEADER_FIELDS = {
    "config": dict,
    "step": int,
    "names": str,
    "fingerprint": str,
    "class_names": list[str],
    "parameters_sha256": str,
}
"""What is read again of what `export` wrote beside the tensors."""


def _header(path: str) -> dict[str, Any] | None:
    """What `export` wrote beside the tensors; None for a file of another origin. No tensor is read."""
    if pathlib.Path(path).suffix != ".safetensors" or not pathlib.Path(path).is_file():
        return None
    from safetensors import SafetensorError, safe_open

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
    for name in ("step", "heads", "image_size"):
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


def _of_dit(state_dict: Mapping[str, np.ndarray], arguments: Import) -> tuple[Config, Any]:
    config = dit_config(state_dict, heads=arguments.heads, image_size=arguments.image_size, step=arguments.step or 0)
    return config, _dit(state_dict, config)


def _dit(state_dict: Mapping[str, np.ndarray], config: Config) -> Any:
    try:
        return dit_from_torch(state_dict, config)
    except ConfigError:
        raise
    except ValueError as error:
        raise WeightsError(str(error)) from error


def dit_config(
    state_dict: Mapping[str, np.ndarray], *, heads: int | None = None, image_size: int | None = None, step: int = 0
) -> Config:
    """What the tensors of an original DiT tell of it, on latents, with DiT's diffusion: 1,000 steps of linear betas.

    Samples are drawn as behind DiT's published numbers: 250 DDPM steps, guidance of three of four channels, float32.
    Raises WeightsError for tensors of something else, ConfigError for what must be said and was not.
    """
    shapes = {name: value.shape for name, value in state_dict.items()}
    patches, table, final = (
        shapes.get(f"{name}.weight", ())
        for name in ("x_embedder.proj", "y_embedder.embedding_table", "final_layer.linear")
    )
    blocks = [int(match[1]) for match in map(_BLOCK.match, shapes) if match]
    if (len(patches), len(table), len(final)) != (4, 2, 2) or not blocks:
        raise WeightsError(
            "the weights must be those of a DiT, as facebookresearch/DiT names them, or of what `python "
            f"-m gspn_jax.convert export` wrote, found {len(shapes)} tensors named "
            f"{', '.join(sorted(shapes)[:3])}, ..."
        )
    hidden, channels, patch, _ = patches
    depth = 1 + max(blocks)
    outputs = final[0] // max(patch, 1) ** 2
    if outputs not in (channels, 2 * channels):
        raise WeightsError(
            f"final_layer.linear.weight must give {channels} or {2 * channels} channels, found {outputs}"
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
            source="latents", path="unknown", image_size=side, channels=channels, num_classes=table[0] - 1, flip=True
        ),
        diffusion=DiffusionConfig(objective="ddpm", timesteps=1000, beta_schedule="linear"),
        sampler=SamplerConfig(name="ddpm", steps=250, guidance_channels="first3"),
        train=TrainConfig(
            steps=max(step, 1),
            batch_size=DIT_BATCH_SIZE,
            ema_decays=(DIT_EMA_DECAY,),
            precision="params=float32,compute=float32",
        ),
    )


def _write_checkpoint(run: pathlib.Path, step: int, params: Any, config: Config, meta: dict[str, Any]) -> None:
    """A checkpoint of nothing but the average, whole with its manifest."""
    where = checkpoints.folder(run) / str(step)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(
            where,
            args=ocp.args.Composite(
                **{
                    averages.item(config.train.ema_decays[0]): ocp.args.StandardSave(params),
                    "meta": ocp.args.JsonSave(meta),
                }
            ),
        )
    manifest.write(where)
