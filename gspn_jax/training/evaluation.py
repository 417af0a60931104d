"""Metrics of samples during training, on the mesh that trains."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from gspn_jax.config import Config
from gspn_jax.metrics.extractor import Extractor
from gspn_jax.metrics.networks import Weights, read_networks
from gspn_jax.metrics.reference import Reference, read_reference
from gspn_jax.metrics.scores import Collector
from gspn_jax.parallel.agreement import agree
from gspn_jax.runs import averages
from gspn_jax.runs.evaluations import Best
from gspn_jax.sampling.decoding import rgb_on
from gspn_jax.sampling.drawing import draw_labels
from gspn_jax.sampling.sampler import Sampler
from gspn_jax.sampling.scoring import draw_and_score
from gspn_jax.tables import METRICS
from gspn_jax.training.state import TrainState

log = logging.getLogger(__name__)


class SampleEvaluation:
    """Draws the same labels and seeds at each evaluation; images do not leave the devices.

    Use it as the config's `eval` says; every host makes the same calls.
    """

    best = Best("fid", higher=False, said="the lowest FID")

    def __init__(self, config: Config, mesh: Mesh):
        """Raises ConfigError, WeightsError or OSError for files that are missing, damaged or do not go together."""
        settings = config.eval
        self.every = settings.every
        self._names = settings.metrics
        weights = read_networks(self._names, settings.inception, settings.networks, "--eval.")
        self._reference = _reference(config, weights)
        self._to_rgb, side = rgb_on(config, mesh, settings.vae)
        size = self._reference and self._reference.image_size
        if size and size != (side, side):
            log.warning(
                "the images of the reference %s are of %dx%d, samples of %dx%d: metrics are not those of "
                "images of one size",
                settings.reference,
                *size,
                side,
                side,
            )
        self._sampler = Sampler(
            evaluated(config), mesh, seed=settings.seed, decode=np.asarray if settings.vae else None
        )  # latents are left as they are
        size = min(settings.batch_size, settings.num_samples)
        self._extractors = {
            name: Extractor(one.params, mesh=mesh, batch_size=size, network=one.network)
            for name, one in weights.items()
        }
        self._labels = draw_labels(settings.labels, settings.num_samples, config.data.num_classes, settings.seed)
        self._numbers = np.arange(settings.num_samples)
        decay = config.train.ema_decays[0] if settings.ema is None else settings.ema
        self._average = averages.name(decay) if decay or 0.0 in config.train.ema_decays else None
        self.stopped_by: str | None = None

    def __call__(
        self, step: int, state: TrainState, asked: Callable[[], str | None] = lambda: None
    ) -> dict[str, float] | None:
        """The metrics of `step`, by name, and the seconds they took, the same on all hosts; None when `asked` names a
        signal, which is then `stopped_by`."""
        start = time.perf_counter()
        extractors = self._extractors
        if self._reference:
            size = next(iter(extractors.values())).batch_size
            self._reference = self._reference.complete(self._names, extractors, size)
        params = state.exported if self._average is None else state.ema[self._average]
        collector = Collector(self._names)
        with tqdm(
            total=len(self._labels),
            unit="image",
            desc=f"evaluating step {step}",
            leave=False,
            dynamic_ncols=True,
            disable=jax.process_index() > 0,
        ) as bar:
            self.stopped_by = draw_and_score(
                lambda labels, numbers: self._to_rgb(self._sampler.draw(params, labels, numbers)),
                self._labels,
                self._numbers,
                extractors,
                collector.add,
                stop=asked,
                done=lambda count: bar.update(count - bar.n),
            )
        if self.stopped_by:
            return None
        scores = collector.scores(self._reference)
        agreed = dict(zip(scores, agree([*scores.values()]), strict=True))  # hosts may round differently
        return agreed | {"seconds": time.perf_counter() - start}


def evaluated(config: Config) -> Config:
    """The config whose sampler draws what is evaluated."""
    settings, sampler = config.eval, config.sampler
    scale = sampler.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
    sampler = dataclasses.replace(sampler, steps=settings.steps or sampler.steps, guidance_scale=scale)
    return dataclasses.replace(config, sampler=sampler)


def _reference(config: Config, weights: Mapping[str, Weights]) -> Reference | None:
    """That of the config, found whole and fitting; None where no metric needs one."""
    names = config.eval.metrics
    if not any(METRICS[name].needs for name in names):
        return None
    reference = read_reference(config.eval.reference, "eval.reference")
    reference.check(names)
    for name, one in weights.items():
        reference.check_weights(name, one.digest)
    if reference.images:
        for _ in reference.images.batches(1000):  # damage is found now, not at the first evaluation
            pass
    return reference
