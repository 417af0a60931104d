"""One config with line scans, with attention and with neither: trained, scored and drawn by one command."""

import dataclasses
import json
import logging
import pathlib
from typing import Any, get_args

import jax

from gspn_jax.classify import plots, weights
from gspn_jax.classify.config import ClassifyConfig, Mixer
from gspn_jax.classify.network import Network
from gspn_jax.classify.scoring import Scorer, validation_source
from gspn_jax.classify.task import ClassificationTask
from gspn_jax.config import ConfigError
from gspn_jax.files import replacing
from gspn_jax.parallel import sharding
from gspn_jax.small_files import read_lines
from gspn_jax.training.train import train_task

log = logging.getLogger(__name__)

MIXERS: tuple[Mixer, ...] = get_args(Mixer)
CLOSE = 0.02
"""Share of the parameters by which networks that are compared may differ."""


def compare(config: ClassifyConfig) -> dict[str, Any]:
    """Trains the config once with each of MIXERS, in run_dir/MIXER, and writes results.json, curve.png and one
    confusion matrix a mixer into run_dir; the same command goes on. Returns the results.

    Raises ConfigError for a config without evaluation, and networks whose parameters differ by more than 2 %.
    """
    plots.check()
    if not config.eval.every:
        raise ConfigError(
            "eval.every must be greater than 0 for a comparison, which is drawn from evaluations, found 0"
        )
    root = pathlib.Path(config.run_dir)
    configs = {mixer: _variant(config, root, mixer) for mixer in MIXERS}
    parameters = {mixer: Network(one).parameters for mixer, one in configs.items()}
    if max(parameters.values()) > (1 + CLOSE) * min(parameters.values()):
        raise ConfigError(f"networks to compare must have equal parameters within {CLOSE:.0%}, found {parameters}")
    for one in configs.values():
        train_task(ClassificationTask(one))
    results: dict[str, dict[str, Any]] = {mixer: _result(one, parameters[mixer]) for mixer, one in configs.items()}
    if jax.process_index() == 0:
        with replacing(root / "results.json") as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")
        plots.curve(root / "curve.png", results)
        for mixer, result in results.items():
            plots.confusion(root / f"confusion_{mixer}.png", result["confusion"], result["class_names"], mixer)
        for mixer, result in results.items():
            print(
                f"{mixer}: top-1 {result['top1']:.2f} % after {result['images_seen']:,} images, "
                f"{result['parameters']:,} parameters, {result['images_per_second']:.1f} images/s"
            )
    return results


def _variant(config: ClassifyConfig, root: pathlib.Path, mixer: Mixer) -> ClassifyConfig:
    return dataclasses.replace(config, run_dir=str(root / mixer), model=dataclasses.replace(config.model, mixer=mixer))


def _result(config: ClassifyConfig, parameters: int) -> dict[str, Any]:
    """The last scores of a finished run, those on the way, and its speed."""
    mesh = sharding.make_mesh(config.mesh)
    decay = config.train.ema_decays[0]
    trained = weights.read(config.run_dir, mesh, decays=(decay,))
    (params,) = trained.sets.values()
    source = validation_source(config, trained.class_names)
    network = Network(config, "float32")
    scorer = Scorer(
        config, network, source, mesh, size=config.validation.image_size, crop=config.eval.crop,
        batch_size=config.eval.batch_size,
    )  # fmt: skip
    scores = scorer.score(params)
    fields = {"step": int, "images_per_second": float | None, "eval/top1": float | None}
    whole, wrong = read_lines(pathlib.Path(config.run_dir) / "metrics.jsonl", fields)
    for error in wrong:
        log.warning("%s, and is left out", error)
    lines = [line for _, line in whole]
    rates = sorted(line["images_per_second"] for line in lines if line["images_per_second"] is not None)
    batch = config.train.batch_size
    return {
        "parameters": parameters,
        "gmac": network.multiply_adds(config.data.image_size) / 1e9,
        "steps": trained.step,
        "images_seen": trained.step * batch,
        "images": scores.images,
        "ema": decay,
        "top1": scores.top1,
        "top5": scores.top5,
        "loss": scores.loss,
        "images_per_second": rates[len(rates) // 2] if rates else 0.0,
        "curve": [
            {name.removeprefix("eval/"): value for name, value in line.items() if name.startswith("eval/")}
            | {"images_seen": line["step"] * batch}
            for line in lines
            if line["eval/top1"] is not None
        ],
        "class_names": list(trained.class_names),
        "confusion": scores.confusion.tolist(),
    }
