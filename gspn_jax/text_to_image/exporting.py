"""A run -> what `text_to_image` draws with: a file of GSPN layers that were distilled, a folder of a trained model."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

import gspn_jax
from gspn_jax import unet
from gspn_jax.config import ConfigError, MeshConfig, RunConfig, to_dict
from gspn_jax.config.saved import task_of
from gspn_jax.files import new_folder
from gspn_jax.parallel import sharding
from gspn_jax.runs import checkpoints
from gspn_jax.text_to_image import gspn_layers, layer_files
from gspn_jax.text_to_image.config import LayersConfig, UNetTrainingConfig
from gspn_jax.text_to_image.folder import STEM, UNET, read_unet_config
from gspn_jax.text_to_image.training import shapes_of

MADE_BY = "gspn_jax.json"
"""The file beside the weights of an exported U-Net that says what they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write what a run trained: GSPN layers as one file, a U-Net in a new folder of its model."""

    run: str
    """The run directory."""
    output: str
    """Output, which must not exist: for GSPN layers a .safetensors file, beside which a .json of the same name says
    what it is; for a U-Net a folder."""
    model: str | None = None
    """Folder of the model, by default that of the run's config."""
    step: int | None = None
    """The checkpoint; the latest by default."""
    ema: float | None = None
    """The EMA decay whose average is written: the first of the run by default; 0 is the parameters themselves."""


def export(arguments: Export) -> None:
    """Raises ConfigError, CheckpointError or FileNotFoundError with one sentence for what cannot be used."""
    step, meta = checkpoints.read_meta(arguments.run, arguments.step)
    of_unet = task_of(meta["config"]) == UNetTrainingConfig.TASK
    _check_output(arguments.output, "" if of_unet else ".safetensors")
    (_export_unet if of_unet else _export_layers)(arguments, step, meta["fingerprint"])


def _check_output(output: str, suffix: str) -> None:
    path = pathlib.Path(output)
    if (suffix and path.suffix != suffix) or not path.absolute().parent.is_dir() or path.exists():
        kind = f"a new {suffix} file" if suffix else "a new folder"
        raise ConfigError(f"--output must be {kind} in a folder that exists, found {output!r}")


def _export_layers(arguments: Export, step: int, fingerprint: str) -> None:
    step, config = checkpoints.read_config(arguments.run, step, LayersConfig)
    unet_config, options = read_unet_config(arguments.model or config.model.folder), config.model.gspn
    params, decay = _average(arguments, step, config, gspn_layers.shapes(unet_config, options))
    about = {"unet_sha256": config.model.unet_sha256} | _about(config, step, decay, fingerprint)
    about["loss"] = to_dict(config)["loss"]
    layer_files.save(arguments.output, params, unet_config, options, about)
    _say(arguments, step, decay)


def _export_unet(arguments: Export, step: int, fingerprint: str) -> None:
    """Copies the folder of the model, but for the weights of its U-Net, and writes those of the run."""
    from safetensors.numpy import save_file

    step, config = checkpoints.read_config(arguments.run, step, UNetTrainingConfig)
    folder = pathlib.Path(arguments.model or config.model.folder)
    unet_config = read_unet_config(folder)
    params, decay = _average(arguments, step, config, shapes_of(unet_config))
    others = [path for path in folder.rglob("*") if path.is_file() and path.parent != folder / UNET]
    needed = sum(value.nbytes for value in params.values()) + sum(path.stat().st_size for path in others)
    with new_folder(pathlib.Path(arguments.output), bytes_needed=needed) as temporary:
        for path in (*others, folder / UNET / "config.json"):
            copy = temporary / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        save_file(unet.to_state_dict(params), temporary / UNET / f"{STEM}.safetensors", metadata={"format": "pt"})
        about = {"start": config.model.start} | _about(config, step, decay, fingerprint)
        (temporary / UNET / MADE_BY).write_text(json.dumps(about, indent=1) + "\n")
    _say(arguments, step, decay)


def _average(
    arguments: Export, step: int, config: RunConfig, shapes: dict[str, Any]
) -> tuple[dict[str, np.ndarray], float]:
    """The average that is asked for, on the host, and its decay."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    decays = config.train.ema_decays
    decay = decays[0] if arguments.ema is None else arguments.ema
    found = checkpoints.restore_average(arguments.run, step, decays, shapes, mesh, ema_decay=decay)
    return jax.device_get(found), decay


def _about(config: RunConfig, step: int, decay: float, fingerprint: str) -> dict[str, Any]:
    return {
        "step": step,
        "images_seen": step * config.train.batch_size,
        "ema_decay": decay,
        "captions_fingerprint": fingerprint,
        "version": f"gspn-jax {gspn_jax.__version__}",
    }


def _say(arguments: Export, step: int, decay: float) -> None:
    weights = "the parameters themselves" if decay == 0 else f"EMA {decay:g}"
    print(f"step {step}, {weights}, in {arguments.output}")
