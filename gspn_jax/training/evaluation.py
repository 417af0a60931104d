"""Metrics of samples during training, and which checkpoint has the lowest FID."""

import dataclasses
import json
import logging
import math
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from gspn_jax import autoencoder
from gspn_jax.config import Config, ConfigError
from gspn_jax.drawing import draw_labels
from gspn_jax.files import replacing
from gspn_jax.metrics import inception
from gspn_jax.metrics.extractor import Extractor
from gspn_jax.metrics.reference import NEEDS, read_reference
from gspn_jax.metrics.scores import Collector
from gspn_jax.sampling import Sampler
from gspn_jax.training import checkpoints, ema, sharding
from gspn_jax.training.state import TrainState

log = logging.getLogger(__name__)

RECORD = "evaluation.json"
"""The file of a run directory that holds its `Record`."""


class Evaluation:
    """Draws the same labels and seeds at each evaluation, on the mesh that trains; images do not leave the devices.

    Use it as the config's `eval` says; every host makes the same calls. `record` is what it has found so far.
    """

    def __init__(self, config: Config, mesh: Mesh):
        """Raises ConfigError, WeightsError or OSError for files that are missing, damaged or do not go together."""
        settings = config.eval
        self._names, self._settings = settings.metrics, settings
        self._run_dir = config.run_dir
        self._steps = config.train.steps
        weights = inception.read(inception.require(settings.inception, "--eval.inception"))
        self._reference = None
        if set(NEEDS) & set(self._names):
            self._reference = read_reference(settings.reference, "eval.reference")
            self._reference.check(self._names)
            self._reference.check_inception(inception.digest(weights))
            if self._reference.images:
                for _ in self._reference.images.batches(1000):  # damage is found now, not at the first evaluation
                    pass
        sampler = dataclasses.replace(
            config.sampler, steps=settings.steps or config.sampler.steps,
            guidance_scale=(config.sampler.guidance_scale if settings.guidance_scale is None
                            else settings.guidance_scale))
        self._to_rgb, side = _to_rgb(config, mesh)
        images = self._reference and self._reference.images
        if images and images.shape[1:3] != (side, side):
            log.warning("the images of the reference %s are of %dx%d, samples of %dx%d: metrics are not those of "
                        "images of one size", settings.reference, *images.shape[1:3], side, side)
        self._sampler = Sampler(dataclasses.replace(config, sampler=sampler), mesh,
                                decode=np.asarray if settings.vae else None)  # latents are left as they are
        self._extractor = Extractor(inception.from_state_dict(weights), mesh=mesh,
                                    batch_size=min(settings.batch_size, settings.num_samples))
        self._labels = draw_labels(settings.labels, settings.num_samples, config.data.num_classes, settings.seed)
        decay = config.train.ema_decays[0] if settings.ema is None else settings.ema
        self._average = ema.name(decay) if decay or 0.0 in config.train.ema_decays else None
        self.record = Record.read(config.run_dir)
        self.stopped_by: str | None = None

    def due(self, step: int) -> bool:
        return step % self._settings.every == 0 or step == self._steps

    def missed(self, step: int) -> bool:
        """Whether a run that goes on from `step` was stopped before the evaluation that was due."""
        return step > 0 and self.due(step) and self.record.step < step

    def __call__(self, step: int, state: TrainState, asked: Callable[[], str | None] = lambda: None
                 ) -> dict[str, float] | None:
        """The metrics of `step`, by name, and the seconds they took; None when `asked` names a signal, which is then
        `stopped_by`. The checkpoint of `step` must be saved; `best_step` is the best one afterwards.
        """
        start = time.perf_counter()
        extractor = self._extractor
        if self._reference:
            self._reference = self._reference.complete(self._names, extractor, extractor.batch_size)
        params = state.params if self._average is None else state.ema[self._average]
        collector, size, count = Collector(self._names), extractor.batch_size, len(self._labels)
        with tqdm(total=count, unit="image", desc=f"evaluating step {step}", leave=False, dynamic_ncols=True,
                  disable=jax.process_index() > 0) as bar:
            for first in range(0, count, size):
                self.stopped_by = asked()
                if self.stopped_by:
                    return None
                rows = np.arange(first, first + size)
                # every batch has the same shape, so that all is compiled once
                drawn = self._sampler.draw(params, self._labels[rows % count], self._settings.seed + rows)
                features, _ = extractor(self._to_rgb(drawn))
                collector.add(features, rows < count)
                jax.block_until_ready(features)  # the bar and a signal's answer do not run ahead of the devices
                bar.update(min(size, count - first))
        scores = _of_first_host(collector.scores(self._reference))
        self.record = self.record.add(step, scores.get("fid"))
        if jax.process_index() == 0:
            self.record.write(self._run_dir)
        return scores | {"seconds": time.perf_counter() - start}

    @property
    def best_step(self) -> int | None:
        return self.record.best_step


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run directory notes of evaluations: the last one's step, and the step and value of the lowest FID."""

    step: int = -1
    best_step: int | None = None
    best_fid: float | None = None

    @classmethod
    def read(cls, run_dir: str | pathlib.Path) -> "Record":
        """That of a run, empty before its first evaluation; a best checkpoint that is gone is forgotten."""
        path = pathlib.Path(run_dir) / RECORD
        if not path.exists():
            return cls()
        record = cls(**json.loads(path.read_text()))
        if record.best_step in checkpoints.steps(run_dir):
            return record
        return cls(record.step)

    @classmethod
    def rewind(cls, run_dir: str | pathlib.Path, step: int) -> "Record":
        """That of a run that goes on from `step`: what was found after it is dropped, from the file too."""
        found = cls.read(run_dir)
        known = found.best_step is not None and found.best_step <= step
        record = cls(min(found.step, step), *((found.best_step, found.best_fid) if known else (None, None)))
        if record != found and jax.process_index() == 0:
            record.write(run_dir)
        return record

    def add(self, step: int, fid: float | None) -> "Record":
        if fid is None or not fid < (math.inf if self.best_fid is None else self.best_fid):  # NaN is not better
            return dataclasses.replace(self, step=step)
        return Record(step, step, fid)

    def write(self, run_dir: str | pathlib.Path) -> None:
        with replacing(pathlib.Path(run_dir) / RECORD) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self)) + "\n")


def _to_rgb(config: Config, mesh: Mesh) -> tuple[Callable[[jax.Array], jax.Array], int]:
    """From what the sampler leaves on the devices to uint8 [N, S, S, 3], there; and S."""
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    side, channels = config.data.image_size, config.data.channels
    if config.eval.vae is None:
        repeats = 3 // channels  # greyscale has one channel
        return jax.jit(lambda images: jnp.repeat(images, repeats, axis=-1), out_shardings=split), side
    weights, sizes = autoencoder.load(config.eval.vae)
    if sizes.latent_channels != channels:
        raise ConfigError(f"eval.vae must be of {channels} latent channels, as the run is, found "
                          f"{sizes.latent_channels} in {config.eval.vae}")
    weights = {name: jax.make_array_from_callback(value.shape, whole, lambda index, value=value: value[index])
               for name, value in weights.items()}
    decode = jax.jit(lambda weights, latents: autoencoder.decode_to_uint8(weights, sizes, latents),
                     out_shardings=split)
    return lambda latents: decode(weights, latents), side * sizes.factor


def _of_first_host(scores: dict[str, float]) -> dict[str, float]:
    """The same numbers on all hosts, whose processors may round differently: what follows depends on them."""
    if jax.process_count() == 1:
        return scores
    values = multihost_utils.broadcast_one_to_all(np.array(list(scores.values()), np.float64).view(np.uint32))
    return dict(zip(scores, np.asarray(values).view(np.float64).tolist(), strict=True))
