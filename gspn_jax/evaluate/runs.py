"""Evaluation of a checkpoint: images are drawn, decoded and scored in one pass, for one guidance scale or several."""

import dataclasses
import logging
import pathlib
import time
from typing import Any

import jax
import numpy as np

from gspn_jax.autoencoder import weights_file
from gspn_jax.config import Config, ConfigError, MeshConfig, SamplerConfig
from gspn_jax.diffusion.samplers import sampler_name
from gspn_jax.evaluate import plots, report
from gspn_jax.evaluate.scoring import FEWEST, ScoreFlags, Scorer, finish
from gspn_jax.files import claim_new, sha256_of
from gspn_jax.metrics.npz import StoredImages
from gspn_jax.metrics.scores import captioned
from gspn_jax.parallel import sharding
from gspn_jax.pixels import to_rgb
from gspn_jax.runs import same_hosts
from gspn_jax.sampling import seeds
from gspn_jax.sampling.decoding import load_autoencoder
from gspn_jax.sampling.drawing import Drawing, Labels, draw_labels
from gspn_jax.sampling.files import write_npz
from gspn_jax.small_files import DamagedFile

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFlags(ScoreFlags):
    """Draws from a run and scores what it draws; results go to RUN/evaluation unless --output says where. What is there
    already is not drawn again."""

    run: str
    """The run directory that train_dit.py wrote."""
    step: int | None = None
    """The checkpoint; the latest by default."""
    ema: float | None = None
    """The EMA decay to sample from: the first of the run by default; 0 is the parameters themselves."""
    num_samples: int = report.PUBLISHED_SAMPLES
    labels: Labels = "random"
    """Uniform at random, or equally many of each class in turn, which lowers FID by about 0.1."""
    seed: int = 0
    """Seed of the set, up to 2**64-1: the noise of image i comes from the seed and i; random labels come from it
    too."""
    vae: str | None = None
    """Weights of the autoencoder (.safetensors or .bin) that decodes what a run on latents draws."""
    image_size: tuple[int, int] | None = None
    """Height and width, of the latents where those were trained on; the size trained on by default."""
    guidance_scales: tuple[float, ...] = ()
    """Evaluate at each of these in place of --sampler.guidance-scale, and draw FID against them."""
    save_samples: str | None = None
    """Write the images to this .npz first, and score that; a killed command then goes on where it was."""
    sampler: SamplerConfig = SamplerConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < FEWEST:
            raise ConfigError(f"--num-samples must be {FEWEST} or more, found {self.num_samples}")
        seeds.check(self.seed)
        for scale in self.guidance_scales:
            dataclasses.replace(self.sampler, guidance_scale=scale)  # checks it before the first is computed
        if len(self.guidance_scales) > 1 and (self.output or self.save_samples):
            raise ConfigError(
                "--output and --save-samples are for one guidance scale, found --guidance-scales "
                + " ".join(f"{scale:g}" for scale in self.guidance_scales)
            )
        if self.save_samples and pathlib.Path(self.save_samples).suffix != ".npz":
            raise ConfigError(f"--save-samples must end in .npz, found {self.save_samples!r}")


def evaluate_run(flags: RunFlags, config: Config, step: int) -> list[dict[str, Any]]:
    """Scores the checkpoint of `step` at each guidance scale; returns the results, also printed and written."""
    same_hosts.check_flags(flags, step=step)
    if wanted := captioned(flags.metrics):
        raise ConfigError(f"--metrics {', '.join(wanted)} is of a folder of images with captions, found --run")
    with flags.claimed():
        return _evaluate_scales(flags, config, step)


def _evaluate_scales(flags: RunFlags, config: Config, step: int) -> list[dict[str, Any]]:
    # --- what can be wrong is found first
    if config.data.latents and not flags.vae:
        raise ConfigError("a run on latents needs --vae to decode what it draws, found none")
    if flags.save_samples and jax.process_count() > 1:
        raise ConfigError(f"--save-samples is for a single process, found {jax.process_count()}")
    mesh = sharding.make_mesh(flags.mesh)
    scales = flags.guidance_scales or (flags.sampler.guidance_scale,)
    configs = [
        dataclasses.replace(config, sampler=dataclasses.replace(flags.sampler, guidance_scale=scale))
        for scale in scales
    ]
    vae = load_autoencoder(flags.vae, config, flags.image_size)
    scorer = Scorer(flags, mesh)
    folder = pathlib.Path(flags.run) / "evaluation"
    folder.mkdir(exist_ok=True)

    # --- draw and score
    results = []
    for number, config in enumerate(configs):
        of = f" {number + 1} of {len(configs)}" if len(configs) > 1 else ""
        drawing = Drawing(
            flags.run,
            step,
            config,
            mesh,
            total=flags.num_samples,
            batch_size=scorer.batch_size,
            seed=flags.seed,
            ema=flags.ema,
            image_size=flags.image_size,
            vae=vae,
            description=f"guidance {config.sampler.guidance_scale:g}{of}",
        )
        about = drawing.settings() | {
            "labels": flags.labels,
            "seed": flags.seed,
            "vae_sha256": sha256_of(weights_file(flags.vae)) if flags.vae else None,
        }
        result = None if flags.output or flags.save_samples else _finished(folder, flags, about, scorer)
        if result is None:
            result = _evaluate(flags, config, drawing, about, scorer)
            name = (
                f"step_{step:07d}_{sampler_name(config.sampler, config.diffusion)}{config.sampler.steps}_guidance_"
                f"{config.sampler.guidance_scale:g}_{flags.num_samples}.json"
            )
            finish(result, flags, folder / name)
        results.append(result)
    if len(results) > 1 and jax.process_index() == 0:
        print(plots.draw_results(results, "guidance", report.free_path(folder / f"guidance_step_{step:07d}.png")))
    return results


def _evaluate(
    flags: RunFlags, config: Config, drawing: Drawing, about: dict[str, Any], scorer: Scorer
) -> dict[str, Any]:
    """Draws and scores; `about` tells how images are made, and goes into a file of samples as well."""
    labels = draw_labels(flags.labels, flags.num_samples, config.data.num_classes, flags.seed)
    numbers = np.arange(flags.num_samples)
    start = time.perf_counter()
    scorer.prepare()
    with drawing:
        said = {
            "warnings": _uneven(flags, config),
            "samples": about | {"source": str(flags.run), "count": flags.num_samples},
        }
        if flags.save_samples:
            with claim_new(pathlib.Path(flags.save_samples), "--save-samples") as path:
                write_npz(
                    path,
                    drawing,
                    labels,
                    numbers,
                    shape=drawing.shape,
                    batch_size=drawing.batch_size,
                    settings=about,
                    done=drawing.done,
                )
            images = StoredImages(flags.save_samples, "--save-samples").batches(drawing.batch_size)
            result = scorer.score(images, labels=labels, **said)
        else:
            result = scorer.score_drawn(
                lambda *which: to_rgb(drawing(*which)), labels, numbers, done=drawing.done, **said
            )
    result["environment"]["seconds"] = time.perf_counter() - start
    return result


def _uneven(flags: RunFlags, config: Config) -> list[str]:
    left = flags.num_samples % config.data.num_classes
    return (
        [
            f"{flags.num_samples:,} balanced labels of {config.data.num_classes:,} classes give {left:,} of them one "
            "image more than the others"
        ]
        if flags.labels == "balanced" and left
        else []
    )


def _finished(folder: pathlib.Path, flags: RunFlags, about: dict[str, Any], scorer: Scorer) -> dict[str, Any] | None:
    """The result in `folder` of the same samples, weights and reference that has all the metrics wanted; printed.

    Not looked for among several hosts, of which one might see it before another."""
    if jax.process_count() > 1:
        return None
    about = {name: value for name, value in about.items() if name != "run"} | {"count": flags.num_samples}  # may move
    for path in sorted(folder.glob("*.json")):
        try:
            result = report.read_result(path, report.SHOWN)
        except DamagedFile as error:
            log.warning("a result is passed over: %s", error)
            continue
        same = result.get("settings") == scorer.settings() and about.items() <= result["samples"].items()
        if same and set(scorer.names) <= result["metrics"].keys():
            print(f"\n{report.table(result)}\nfrom {path}, which has it already")
            return result
    return None
