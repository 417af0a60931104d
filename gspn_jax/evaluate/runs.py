"""Evaluation of a checkpoint: images are drawn, decoded and scored in one pass, for one average and guidance scale, or
for a grid of them."""

import contextlib
import dataclasses
import logging
import pathlib
import time
from typing import Any

import jax
import numpy as np

from gspn_jax.autoencoder import weights_file
from gspn_jax.config import Config, ConfigError, MeshConfig, SamplerConfig, require_width
from gspn_jax.diffusion.samplers import sampler_name
from gspn_jax.evaluate import grid, plots, report
from gspn_jax.evaluate.grid import Cell
from gspn_jax.evaluate.scoring import ScoreFlags, Scorer, finish
from gspn_jax.files import claim_new, sha256_of
from gspn_jax.metrics.npz import StoredImages
from gspn_jax.metrics.reference import FEWEST
from gspn_jax.metrics.scores import captioned
from gspn_jax.parallel import sharding
from gspn_jax.pixels import to_rgb
from gspn_jax.runs import checkpoints, same_hosts
from gspn_jax.sampling import seeds
from gspn_jax.sampling.decoding import load_autoencoder
from gspn_jax.sampling.drawing import Drawing, Labels, draw_labels
from gspn_jax.sampling.files import write_npz
from gspn_jax.sampling.weights import Weights, guide_of
from gspn_jax.small_files import DamagedFile

log = logging.getLogger(__name__)

ROUGH = 0.05
"""Error of a reconstructed average's profile above which a result warns."""


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
    ema_decays: tuple[float, ...] = ()
    """Evaluate each of these decays in place of --ema: with --ema-widths and --guidance-scales a grid."""
    ema_widths: tuple[float, ...] = ()
    """Evaluate power-function averages of these widths, made of the run's snapshots."""
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
        for width in self.ema_widths:
            require_width("--ema-widths", width)
        if self.ema is not None and (self.ema_decays or self.ema_widths):
            raise ConfigError(f"--ema is in place of --ema-decays and --ema-widths, found {self.ema:g} beside them")
        for name in ("guidance_scales", "ema_decays", "ema_widths"):
            found = getattr(self, name)
            if len(set(found)) < len(found):
                raise ConfigError(f"--{name.replace('_', '-')} must have each number once, found {_shown(found)}")
        if len(self.guidance_scales) > 1 and (self.output or self.save_samples):
            raise ConfigError(
                "--output and --save-samples are for one guidance scale, found --guidance-scales "
                + _shown(self.guidance_scales)
            )
        if len(self.averages) > 1 and (self.output or self.save_samples):
            raise ConfigError(
                "--output and --save-samples are for one average, found " + _shown((*self.ema_decays, *self.ema_widths))
            )
        if self.save_samples and pathlib.Path(self.save_samples).suffix != ".npz":
            raise ConfigError(f"--save-samples must end in .npz, found {self.save_samples!r}")

    @property
    def scales(self) -> tuple[float, ...]:
        """The guidance scales to evaluate."""
        return self.guidance_scales or (self.sampler.guidance_scale,)

    @property
    def averages(self) -> list[dict[str, float | None]]:
        """The averages to evaluate, each as arguments of `Weights`."""
        rows = [{"ema": decay} for decay in self.ema_decays] + [{"ema_width": width} for width in self.ema_widths]
        return rows or [{"ema": self.ema}]


def _shown(numbers: tuple[float, ...]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def evaluate_run(flags: RunFlags, config: Config, step: int) -> list[dict[str, Any]]:
    """Scores the checkpoint of `step` for each average at each guidance scale; returns the results, average by average,
    also printed and written."""
    same_hosts.check_flags(flags, step=step)
    same_hosts.check_files(flags.files() | {"--vae": flags.vae, "--sampler.guide": flags.sampler.guide})
    if wanted := captioned(flags.metrics):
        raise ConfigError(f"--metrics {', '.join(wanted)} is of a folder of images with captions, found --run")
    with flags.claimed():
        return _evaluate_cells(flags, config, step)


def _evaluate_cells(flags: RunFlags, config: Config, step: int) -> list[dict[str, Any]]:
    # --- what can be wrong is found first
    if config.data.latents and not flags.vae:
        raise ConfigError("a run on latents needs --vae to decode what it draws, found none")
    if flags.save_samples and jax.process_count() > 1:
        raise ConfigError(f"--save-samples is for a single process, found {jax.process_count()}")
    mesh = sharding.make_mesh(flags.mesh)
    samplers = [dataclasses.replace(flags.sampler, guidance_scale=scale) for scale in flags.scales]
    rows = [Weights(flags.run, step, config, mesh, **average) for average in flags.averages]
    guide = guide_of(flags.sampler, config, mesh)
    latents = checkpoints.read_meta(flags.run, step)[1].get("latents") if flags.vae else None
    vae = load_autoencoder(flags.vae, config, flags.image_size, latents)
    scorer = Scorer(flags, mesh)
    folder = pathlib.Path(flags.run) / "evaluation"
    folder.mkdir(exist_ok=True)

    # --- draw and score: a program a scale, and each average read once
    drawings = [
        Drawing(
            rows[0],
            sampler,
            guide=guide,
            total=flags.num_samples,
            batch_size=scorer.batch_size,
            seed=flags.seed,
            image_size=flags.image_size,
            vae=vae,
        )
        for sampler in samplers
    ]
    cells: list[Cell] = []
    with grid.claimed(folder) if len(rows) > 1 else contextlib.nullcontext():
        while rows:
            weights = rows.pop(0)
            for drawing in drawings:  # all of them first: the memory of those before is free then
                drawing.weights = weights
            for drawing in drawings:
                total = len(flags.averages) * len(drawings)
                of = f" {len(cells) + 1} of {total}" if total > 1 else ""
                drawing.description = f"guidance {drawing.config.sampler.guidance_scale:g}{of}"
                cells.append(_cell(flags, drawing, scorer, folder / _name(flags, drawing)))
        results = [cell.result for cell in cells]
        if jax.process_index() == 0:
            if len(flags.averages) > 1:
                grid.write(cells, flags.scales, folder, step)
            elif len(results) > 1:
                picture = report.free_path(folder / f"guidance_step_{step:07d}.png")
                print(plots.draw_results(results, "guidance", picture))
    return results


def _name(flags: RunFlags, drawing: Drawing) -> str:
    """Name of the file of a result; an average that is not the run's default is in it."""
    weights, sampler = drawing.weights, drawing.config.sampler
    average = report.average(weights.average()) if len(flags.averages) > 1 or weights.recipe else ""
    return (
        f"step_{weights.step:07d}_{average.lower().replace(' ', '_')}{'_' * bool(average)}"
        f"{sampler_name(sampler, weights.config.diffusion)}{sampler.steps}_guidance_{sampler.guidance_scale:g}_"
        f"{flags.num_samples}.json"
    )


def _cell(flags: RunFlags, drawing: Drawing, scorer: Scorer, path: pathlib.Path) -> Cell:
    """The result of a drawing, which is drawn unless it is there; written to `path` or a free name beside it."""
    about = drawing.settings() | {
        "labels": flags.labels,
        "seed": flags.seed,
        "vae_sha256": sha256_of(weights_file(flags.vae)) if flags.vae else None,
    }
    found = None if flags.output or flags.save_samples else _finished(path.parent, flags, about, scorer)
    if found is None:
        result = _evaluate(flags, drawing, about, scorer)
        found = Cell(result, finish(result, flags, path))
    return found


def _evaluate(flags: RunFlags, drawing: Drawing, about: dict[str, Any], scorer: Scorer) -> dict[str, Any]:
    """Draws and scores; `about` tells how images are made, and goes into a file of samples as well."""
    config = drawing.config
    labels = draw_labels(flags.labels, flags.num_samples, config.data.num_classes, flags.seed)
    numbers = np.arange(flags.num_samples)
    start = time.perf_counter()
    scorer.prepare()
    with drawing:
        said = {
            "warnings": [*_uneven(flags, config), *_unlike(about)],
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


def _unlike(about: dict[str, Any]) -> list[str]:
    """Warning of an average that snapshots give roughly."""
    error = about.get("ema_error", 0.0)
    return (
        [
            f"the average of width {about['ema_width']:g} is made of {about['ema_terms']} others with an error of "
            f"{error:.1%} of its profile: more snapshots, or wider ones, come nearer"
        ]
        if error > ROUGH
        else []
    )


def _finished(folder: pathlib.Path, flags: RunFlags, about: dict[str, Any], scorer: Scorer) -> Cell | None:
    """The result in `folder` of the same samples, weights and reference that has all the metrics wanted; printed.

    Not looked for among several hosts, of which one might see it before another."""
    if jax.process_count() > 1:
        return None
    about = _unmoved(about) | {"count": flags.num_samples}
    for path in sorted(folder.glob("*.json")):
        try:
            result = report.read_result(path, report.SHOWN)
        except DamagedFile as error:
            log.warning("a result is passed over: %s", error)
            continue
        same = result.get("settings") == scorer.settings() and about.items() <= _unmoved(result["samples"]).items()
        if same and set(scorer.names) <= result["metrics"].keys():
            print(f"\n{report.table(result)}\nfrom {path}, which has it already")
            return Cell(result, path)
    return None


def _unmoved(samples: dict[str, Any]) -> dict[str, Any]:
    """What is told of samples without the run directories, which may have moved."""
    kept = {name: value for name, value in samples.items() if name != "run"}
    return kept | {"guide": _unmoved(kept["guide"])} if "guide" in kept else kept
