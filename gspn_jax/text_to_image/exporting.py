"""A run of distillation -> a file of GSPN layers, which `text_to_image --gspn-layers` reads."""

import dataclasses
import pathlib

import jax

import gspn_jax
from gspn_jax.config import ConfigError, MeshConfig, to_dict
from gspn_jax.parallel import sharding
from gspn_jax.runs import checkpoints
from gspn_jax.text_to_image import gspn_layers, layer_files
from gspn_jax.text_to_image.config import LayersConfig
from gspn_jax.text_to_image.distillation import read_unet_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write the GSPN layers of a run as one file."""

    run: str
    """The run directory."""
    output: str
    """The .safetensors file to write, which must not exist; a .json of the same name says what it is."""
    model: str | None = None
    """Folder of the model, by default that of the run's config."""
    step: int | None = None
    """The checkpoint; the latest by default."""
    ema: float | None = None
    """The EMA decay whose average is written: the first of the run by default; 0 is the parameters themselves."""

    def __post_init__(self) -> None:
        path = pathlib.Path(self.output)
        if path.suffix != ".safetensors" or not path.absolute().parent.is_dir() or path.exists():
            raise ConfigError(
                f"--output must be a new .safetensors file in a folder that exists, found {self.output!r}"
            )


def export(arguments: Export) -> None:
    """Raises ConfigError, CheckpointError or FileNotFoundError with one sentence for what cannot be used."""
    step, meta = checkpoints.read_meta(arguments.run, arguments.step)
    step, config = checkpoints.read_config(arguments.run, step, LayersConfig)
    unet_config, options = read_unet_config(arguments.model or config.model.folder), config.model.gspn
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    decays = config.train.ema_decays
    decay = decays[0] if arguments.ema is None else arguments.ema
    shapes = gspn_layers.shapes(unet_config, options)
    params = checkpoints.restore_average(arguments.run, step, decays, shapes, mesh, ema_decay=decay)
    about = {
        "unet_sha256": config.model.unet_sha256,
        "step": step,
        "images_seen": step * config.train.batch_size,
        "ema_decay": decay,
        "captions_fingerprint": meta["fingerprint"],
        "loss": to_dict(config)["loss"],
        "version": f"gspn-jax {gspn_jax.__version__}",
    }
    layer_files.save(arguments.output, jax.device_get(params), unet_config, options, about)
    weights = "the parameters themselves" if decay == 0 else f"EMA {decay:g}"
    print(f"step {step}, {weights}, in {arguments.output}")
