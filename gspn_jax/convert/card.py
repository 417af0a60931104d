"""The model card: what a stranger must know of a file of weights, from the config and the results of the run."""

import json
import logging
import pathlib
from typing import Any

from gspn_jax.config import Config, ConfigError, from_dict
from gspn_jax.evaluate.report import label, read_result
from gspn_jax.files import sha256_of
from gspn_jax.models import learns_sigma, resolve
from gspn_jax.runs.evaluations import Record
from gspn_jax.small_files import DamagedFile
from gspn_jax.tables import OBJECTIVES

log = logging.getLogger(__name__)

AUTOENCODER_FACTOR = 8
"""Side of the image over that of the latent, in Stable Diffusion's autoencoder."""


def text(name: str, header: dict[str, Any], *, count: int, weights: pathlib.Path, scores: list[tuple[str, str]]) -> str:
    """Markdown, with the fields that model hubs read in front. `header` is what lies in the file of weights."""
    config = from_dict(header["config"])
    rows = [
        ("architecture", _architecture(config)),
        ("preset", config.model.preset),
        ("parameters", f"{count:,} in float32"),
        ("resolution", _resolution(config)),
        ("objective", _objective(config)),
        ("training", _training(config, header)),
        ("weights", _average(header)),
        ("data set", f"{_data(config)}, {config.data.num_classes:,} classes, fingerprint {header['fingerprint']}"),
        *provenance(header, weights),
    ]
    vae = " --vae VAE.safetensors" if config.data.latents else ""
    names = (
        "the original DiT's, laid out as in PyTorch"
        if header["names"] == "dit"
        else "those of gspn-jax (blocks of one kind are stacked along the first axis)"
    )
    measured = table(("", ""), scores) if scores else "None were measured before the export."
    return f"""---
license: {json.dumps(header["license"])}
library_name: gspn-jax
tags: [diffusion, class-conditional, image-generation]
---
# {name}

{table(("", ""), rows)}

## How to load
```
python -m gspn_jax.convert import --weights {weights.name} --output runs/{name}
python sample.py --run runs/{name}{vae}
```
or, as arrays by name, `safetensors.numpy.load_file("{weights.name}")`; the names are {names}.

## Scores
{measured}

## Config
```json
{json.dumps(header["config"], indent=1)}
```
"""


def scores(
    run: pathlib.Path, config: Config, step: int, average: dict[str, Any], parameters_sha256: str
) -> list[tuple[str, str]]:
    """(the metrics, how they were measured) of every result in the run directory that is of these parameters, which are
    the `average` that `sampling.weights.Weights` tells."""
    found = []
    for path in sorted((run / "evaluation").glob("*.json")):
        try:
            result = read_result(path)
        except DamagedFile as error:
            log.warning("a result is left out of the model card: %s", error)
            continue
        samples, sampler = result["samples"], result["samples"]["sampler"]
        if samples.get("parameters_sha256") != parameters_sha256:
            continue
        values = ", ".join(f"{label(name)} {value:.5g}" for name, value in result["metrics"].items())
        found.append(
            (
                values,
                f"{samples['count']:,} samples, {sampler['name']} {sampler['steps']} steps, guidance "
                f"{sampler['guidance_scale']:g}, {samples['labels']} labels",
            )
        )
    record, settings = Record.read(run), config.eval
    evaluated = config.train.ema_decays[0] if settings.ema is None else settings.ema
    if record.best_step == step and record.best is not None and average["ema_decay"] == evaluated:
        found.append((f"FID {record.best:.5g}", f"{settings.num_samples:,} samples, while it trained"))
    return found


def check_license(license: str) -> None:
    """Raises ConfigError for a `--license` that a card cannot name in its front matter."""
    if not license.strip() or "\n" in license:
        raise ConfigError(f"--license must be one line, found {license!r}")


def provenance(header: dict[str, Any], weights: pathlib.Path) -> list[tuple[str, str]]:
    """Rows of every card: the license, and by which hashes parameters and file are known."""
    return [
        ("license", header["license"] if header["license"] != "unknown" else "unknown: not stated by who exported"),
        ("SHA-256 of the parameters", header["parameters_sha256"]),
        (f"SHA-256 of {weights.name}", f"{sha256_of(weights)} ({weights.stat().st_size:,} bytes)"),
    ]


def table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    """Markdown of two columns."""
    return "\n".join(f"| {left} | {right} |" for left, right in [head, ("---", "---"), *rows])


def _architecture(config: Config) -> str:
    arch = resolve(config.model)
    layout = {"paper": "GSPN, the paper's layout", "dit": f"DiT with {arch.mixer}"}[arch.layout]
    heads = f", {arch.options.heads} heads" if arch.mixer == "attention" else ""
    return f"{layout}: width {arch.hidden}, depth {arch.depth}, patch {arch.patch}{heads}"


def _resolution(config: Config) -> str:
    side, channels = config.data.image_size, config.data.channels
    if not config.data.latents:
        return f"{side}x{side}, {channels} channel{'s' if channels > 1 else ''}"
    pixels = AUTOENCODER_FACTOR * side
    return (
        f"{pixels}x{pixels}: latents of {side}x{side}x{channels}, decoded by Stable Diffusion's autoencoder "
        "(such as sd-vae-ft-mse)"
    )


def _objective(config: Config) -> str:
    return OBJECTIVES[config.diffusion.objective].describe(config.diffusion, learns_sigma(config))


def _training(config: Config, header: dict[str, Any]) -> str:
    if not header["step"]:
        return "unknown number of steps"
    return (
        f"{header['step']:,} steps of {config.train.batch_size:,} images "
        f"({header['step'] * config.train.batch_size:,} seen)"
    )


def _average(header: dict[str, Any]) -> str:
    decay = header["ema_decay"]
    if decay is None:
        return (
            f"power-function average of width {header['ema_width']:g} (EDM2), made of {header['ema_terms']} averages "
            f"of snapshots, error {header['ema_error']:.1%} of its profile"
        )
    return f"exponential moving average, decay {decay:g}" if decay else "the parameters themselves, not averaged"


def _data(config: Config) -> str:
    data = config.data
    return f"{data.source} {data.name or data.path or ''}".strip()
