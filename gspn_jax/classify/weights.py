"""Weights of a classifier in and out: a run directory, or one safetensors file with all that is needed to use it."""

import dataclasses
import json
import logging
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gspn_jax.classify.config import ClassifyConfig, ValidationConfig
from gspn_jax.classify.network import Network
from gspn_jax.config import ConfigError, from_dict, to_dict
from gspn_jax.convert import card
from gspn_jax.files import check_new_folder, new_folder
from gspn_jax.parallel import sharding
from gspn_jax.runs import averages, checkpoints
from gspn_jax.runs.digest import digest_of
from gspn_jax.runs.weight_files import FORMAT_VERSION, HEADER, named
from gspn_jax.small_files import DamagedFile, parse, read_json, typed
from gspn_jax.state_dict import WeightsError, read_state_dict, refuse_pointer
from gspn_jax.tensor_files import errors_name
from gspn_jax.training.given import Given

log = logging.getLogger(__name__)

WEIGHTS, CARD = "model.safetensors", "README.md"
HEADER_FIELDS = {
    "version": int,
    "config": dict,
    "step": int,
    "ema_decay": float,
    "license": str,
    "class_names": list[str],
    "fingerprint": str,
    "parameters_sha256": str,
}
HEAD = "head/linear/"
"""Where the parameters that depend on the classes are."""
RELEASED = ("patch_embed.0.weight", "layers.0.blocks.0.op.in_proj.weight")
"""Tensors by which a checkpoint of NVlabs/GSPN's classification code is known."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained classifier: `sets` are its parameters as stored on a mesh, by name, "params" and averages' decays."""

    config: ClassifyConfig
    class_names: tuple[str, ...]
    fingerprint: str
    step: int
    sets: dict[str, Any]
    said: str
    """Where it comes from."""


def about(path: str, step: int | None = None) -> tuple[ClassifyConfig, tuple[str, ...]]:
    """(config, class names) of what `read` reads, without its weights; raises what that raises."""
    where = _file(path)
    if where:
        header = read_header(where)
        return _config(where, header), tuple(header["class_names"])
    meta = checkpoints.read_meta(path, step)[1]
    return from_dict(meta["config"], ClassifyConfig), tuple(meta["class_names"])


def read(path: str, mesh: Mesh, *, step: int | None = None, decays: tuple[float, ...] | None = None) -> Trained:
    """Reads a run directory, or the file or folder that `export` wrote.

    `decays` are those of averages, 0 for the parameters themselves; None is all that there are. Raises CheckpointError,
    WeightsError or ConfigError for what cannot be used.
    """
    where = _file(path)
    if where:
        if step is not None or decays is not None:
            raise ConfigError(f"--step and --ema choose from a run directory, found the file {where}")
        return _of_file(where, mesh)
    step, meta = checkpoints.read_meta(path, step)
    config = from_dict(meta["config"], ClassifyConfig)
    kept = config.train.ema_decays
    network = Network(config)
    sets = {
        _set_name(decay): checkpoints.restore_average(path, step, kept, network.shapes, mesh, ema_decay=decay)
        for decay in ((0.0, *kept) if decays is None else decays)
    }
    return Trained(config, tuple(meta["class_names"]), meta["fingerprint"], step, sets, f"{path}, step {step}")


def _file(path: str) -> pathlib.Path | None:
    """The file that `export` wrote, of its path or its folder's; None for a run directory."""
    where = pathlib.Path(path)
    return next((one for one in (where / WEIGHTS, where) if one.is_file()), None)


def _config(path: pathlib.Path, header: dict[str, Any]) -> ClassifyConfig:
    with errors_name(path):
        config = from_dict(header["config"], ClassifyConfig)
    if header["step"] < 0 or len(header["class_names"]) != config.data.num_classes:
        raise WeightsError(
            f"{path} must tell its step and {config.data.num_classes} names of classes, found step {header['step']} "
            f"and {len(header['class_names'])} names"
        )
    return config


def _set_name(decay: float) -> str:
    return "params" if decay == 0 else averages.item(decay)


def _of_file(path: pathlib.Path, mesh: Mesh) -> Trained:
    header = read_header(path)
    config = _config(path, header)
    tensors, network = read_state_dict(path), Network(config)
    expected = {name: leaf.shape for name, leaf in named(network.shapes)}
    for name in sorted(expected.keys() ^ tensors.keys()):
        raise WeightsError(f"{path} must have the tensors of its config, found {name!r} on one side only")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise WeightsError(f"{path}: {name!r} must have shape {shape}, found {tensors[name].shape}")
    params = jax.tree.unflatten(jax.tree.structure(network.shapes), [tensors[name] for name in expected])
    if digest_of(params, network.shapes) != header["parameters_sha256"]:
        raise WeightsError(f"{path} must hold the tensors that were exported, found that their SHA-256 has changed")
    sets = {_set_name(header["ema_decay"]): sharding.put(params, network.shapes, mesh)}
    return Trained(config, tuple(header["class_names"]), header["fingerprint"], header["step"], sets, str(path))


def read_header(path: pathlib.Path) -> dict[str, Any]:
    """Header that `export` wrote beside the tensors. Raises WeightsError for a file of another origin."""
    text = None
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        refuse_pointer(path)
        try:
            with safe_open(path, "numpy") as file:
                text, names = (file.metadata() or {}).get(HEADER), set(file.keys())
        except SafetensorError as error:
            raise WeightsError(f"{path} must be a safetensors file, it cannot be read: {error}") from error
    else:
        names = set(read_state_dict(path))
    if text is None:
        check_not_released(path, names)
        raise WeightsError(
            f"{path} must be a run directory of a classifier or what `python -m gspn_jax.classify export` wrote, found "
            f"{len(names)} tensors of another origin"
        )
    try:
        header = typed(parse(text, "its header"), HEADER_FIELDS, "its header")
    except DamagedFile as error:
        raise WeightsError(f"{path} must have what `export` writes beside the tensors, but {error}") from error
    if header["version"] != FORMAT_VERSION:
        raise WeightsError(f"{path} must be of format version {FORMAT_VERSION}, found {header['version']}")
    return header


def check_not_released(path: pathlib.Path, names: set[str]) -> None:
    """Raises WeightsError for tensors named as in NVlabs/GSPN, whose forward pass is another function than ours."""
    bare = {name.removeprefix("module.").removeprefix("model.") for name in names}
    if bare & set(RELEASED):
        raise WeightsError(
            f"{path} holds weights named as in the authors' released code, which are refused: that code leaves out the "
            "SiLU and merges scans that are still turned, so that its weights do not fit the network of the paper; "
            "model.released has its start and its skip term only"
        )


def given(path: str) -> Given:
    """The classifier that `path` names, for a run to begin with: the first average of a run. The last linear begins
    anew where the classes are others.

    Raises ConfigError, CheckpointError or WeightsError for what cannot be used.
    """
    where = _file(path)
    if where:
        config, said = _config(where, read_header(where)), path
    else:
        step, meta = checkpoints.read_meta(path)
        config = from_dict(meta["config"], ClassifyConfig)
        said = f"{path}, step {step}, {_set_name(config.train.ema_decays[0])}"

    def read_it(mesh: Mesh) -> Any:
        (params,) = read(path, mesh, decays=None if where else config.train.ema_decays[:1]).sets.values()
        return params

    return Given(said, Network(config).shapes, read_it, loose=(HEAD,))


def first_average(path: str) -> float:
    return from_dict(checkpoints.read_meta(path)[1]["config"], ClassifyConfig).train.ema_decays[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write one set of weights of a run as model.safetensors, with a model card."""

    run: str
    """The run directory."""
    output: str
    """The folder to write, which must not exist."""
    step: int | None = None
    """The checkpoint; the latest by default."""
    ema: float | None = None
    """The EMA decay whose average is written: the first of the run by default; 0 is the parameters themselves."""
    license: str = "unknown"
    """Under which the weights are given away, such as apache-2.0; the card says so."""


def export(arguments: Export) -> None:
    """Raises ConfigError or CheckpointError with one sentence for what cannot be used."""
    output = pathlib.Path(arguments.output)
    check_new_folder(output)
    card.check_license(arguments.license)
    mesh = sharding.make_mesh(ClassifyConfig(run_dir=".").mesh, jax.devices()[:1])
    decay = first_average(arguments.run) if arguments.ema is None else arguments.ema
    trained = read(arguments.run, mesh, step=arguments.step, decays=(decay,))
    (params,) = (jax.device_get(params) for params in trained.sets.values())
    network = Network(trained.config)
    tensors = {name: np.ascontiguousarray(value) for name, value in named(params)}
    header = {
        "version": FORMAT_VERSION,
        "step": trained.step,
        "ema_decay": decay,
        "license": arguments.license,
        "class_names": list(trained.class_names),
        "fingerprint": trained.fingerprint,
        "parameters_sha256": digest_of(params, network.shapes),
        "config": to_dict(_released(trained.config, decay)),
    }
    from safetensors.numpy import save_file

    with new_folder(output, bytes_needed=sum(value.nbytes for value in tensors.values())) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "np", HEADER: json.dumps(header)})
        results = _results(pathlib.Path(arguments.run), header["parameters_sha256"])
        (folder / CARD).write_text(_card(output.absolute().name, header, network, folder / WEIGHTS, results))
    print(f"step {trained.step}, {'the parameters themselves' if decay == 0 else f'EMA {decay:g}'}, in {output}")


def _released(config: ClassifyConfig, decay: float) -> ClassifyConfig:
    """The config of what is exported: with the one average that is there, and without the folders of this machine."""
    path = config.data.path and pathlib.PurePath(config.data.path).name
    return dataclasses.replace(
        config,
        run_dir=pathlib.PurePath(config.run_dir).name,
        data=dataclasses.replace(config.data, path=path),
        train=dataclasses.replace(config.train, ema_decays=(decay,)),
        eval=ValidationConfig(crop=config.eval.crop, image_size=config.eval.image_size),
        init_from=None,
    )


def _results(run: pathlib.Path, parameters_sha256: str) -> list[dict[str, Any]]:
    """Scores that `classify evaluate` wrote of these parameters into the run directory."""
    found = []
    for path in sorted((run / "evaluation").glob("*.json")):
        try:
            result = read_json(path)
            found += [one | result["how"] for one in result["scores"] if one["parameters_sha256"] == parameters_sha256]
        except (KeyError, TypeError, OSError, ConfigError):
            continue  # another program's file
    return found


def _card(
    name: str, header: dict[str, Any], network: Network, weights: pathlib.Path, results: list[dict[str, Any]]
) -> str:
    """Markdown, with the fields that model hubs read in front."""
    config = from_dict(header["config"], ClassifyConfig)
    size = config.validation.image_size
    decay = header["ema_decay"]
    rows = [
        ("architecture", f"{config.model.preset}, mixer {config.model.mixer}"),
        ("parameters", f"{network.parameters:,} in float32"),
        ("multiply-adds", f"{network.multiply_adds(size) / 1e9:.2f} G at {size}x{size}"),
        ("classes", f"{config.data.num_classes:,}"),
        (
            "training",
            f"{header['step']:,} steps of {config.train.batch_size:,} images of {config.data.image_size} pixels",
        ),
        ("weights", f"exponential moving average, decay {decay:g}" if decay else "the parameters themselves"),
        ("evaluated at", f"{size} pixels, crop {config.eval.crop:g}, bicubic"),
        *card.provenance(header, weights),
    ]
    scores = "\n".join(
        f"- top-1 {one['top1']:.2f} %, top-5 {one['top5']:.2f} % of {one['images']:,} images at {one['image_size']} "
        f"pixels, crop {one['crop']:g}, in {one['dtype']}"
        for one in results
    )
    return f"""---
license: {json.dumps(header["license"])}
library_name: gspn-jax
tags: [image-classification]
---
# {name}

{card.table(("", ""), rows)}

## How to use
```
python -m gspn_jax.classify evaluate --run {weights.name} --images IMAGES
python -m gspn_jax.classify predict --run {weights.name} --images picture.jpg
python -m gspn_jax.classify train --config CONFIG --init-from {weights.name}
```
or, as arrays by name, `safetensors.numpy.load_file("{weights.name}")`.

## Scores
{scores or "None were measured before the export."}

## Config
```json
{json.dumps(header["config"], indent=1)}
```
"""
