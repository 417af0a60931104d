"""One checkpoint of a run -> a folder with its weights as safetensors and a model card."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np

from gspn_jax.config import AlignConfig, Config, DistillConfig, EvalConfig, MeshConfig, to_dict
from gspn_jax.convert import card
from gspn_jax.evaluate import report
from gspn_jax.files import check_new_folder, new_folder
from gspn_jax.models.convert import dit_to_torch
from gspn_jax.parallel import sharding
from gspn_jax.runs import checkpoints
from gspn_jax.runs.digest import digest_of
from gspn_jax.runs.weight_files import FORMAT_VERSION, HEADER, named
from gspn_jax.sampling.weights import Weights

WEIGHTS, CARD = "model.safetensors", "README.md"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write one checkpoint of a run as model.safetensors, with a model card."""

    run: str
    """The run directory that train_dit.py wrote."""
    output: str
    """The folder to write, which must not exist."""
    step: int | None = None
    """The checkpoint; the latest by default."""
    ema: float | None = None
    """The EMA decay whose average is written: the first of the run by default; 0 is the parameters themselves."""
    ema_width: float | None = None
    """The width of a power-function average that is made of the run's snapshots and written, in place of --ema."""
    license: str = "unknown"
    """Under which the weights are given away, such as apache-2.0; the card says so."""
    dit_names: bool = False
    """Name and lay out the tensors as the original DiT does, for PyTorch (a DiT with attention only)."""


def export_weights(arguments: Export) -> None:
    """Raises ConfigError or CheckpointError with one sentence for what cannot be used."""
    output = pathlib.Path(arguments.output)
    check_new_folder(output)
    card.check_license(arguments.license)
    step, meta = checkpoints.read_meta(arguments.run, arguments.step)
    _, config = checkpoints.read_config(arguments.run, step)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    weights = Weights(arguments.run, step, config, mesh, ema=arguments.ema, ema_width=arguments.ema_width)
    average, params = weights.average(), jax.device_get(weights.params)
    tensors = dit_to_torch(params, config) if arguments.dit_names else dict(named(params))
    header = {
        "version": FORMAT_VERSION,
        "names": "dit" if arguments.dit_names else "gspn-jax",
        "step": step,
        **average,
        "license": arguments.license,
        "class_names": meta["class_names"],
        "fingerprint": meta["fingerprint"],
        "parameters_sha256": digest_of(params, weights.shapes),
        "config": to_dict(_released(config, average["ema_decay"])),
    }
    with new_folder(output, bytes_needed=sum(value.nbytes for value in tensors.values())) as folder:
        _write(folder / WEIGHTS, tensors, header)
        scores = card.scores(pathlib.Path(arguments.run), config, step, average, header["parameters_sha256"])
        text = card.text(
            output.absolute().name,
            header,
            count=sum(leaf.size for leaf in jax.tree.leaves(params)),
            weights=folder / WEIGHTS,
            scores=scores,
        )
        (folder / CARD).write_text(text, encoding="utf-8")
    if config.align.features:
        print("the projector of align.features, which only training needs, is left out")
    said = "the parameters themselves" if average["ema_decay"] == 0 else report.average(average)
    print(f"step {step}, {said}, in {output}")


def _released(config: Config, decay: float | None) -> Config:
    """The config of what is exported: with the one average that is there, and without the folders of this machine.

    `decay` None is an average of a width, which no field names: it comes back as parameters that are no average.
    """
    path = config.data.path and pathlib.PurePath(config.data.path).name
    return dataclasses.replace(
        config,
        run_dir=pathlib.PurePath(config.run_dir).name,
        data=dataclasses.replace(config.data, path=path),
        train=dataclasses.replace(config.train, ema_decays=(decay or 0.0,)),
        eval=EvalConfig(),
        init_from=None,
        distill=DistillConfig(),
        align=AlignConfig(),
    )


def _write(path: pathlib.Path, tensors: dict[str, np.ndarray], header: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    save_file(
        {name: np.ascontiguousarray(value) for name, value in tensors.items()},
        path,
        metadata={"format": "pt" if header["names"] == "dit" else "np", HEADER: json.dumps(header)},
    )
