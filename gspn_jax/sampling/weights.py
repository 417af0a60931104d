"""Weights that images are drawn with: an average of a run's parameters, stored or made of snapshots, and the model that
guides them."""

import functools
import pathlib
from typing import Any

from jax.sharding import Mesh

from gspn_jax import models
from gspn_jax.config import Config, ConfigError, SamplerConfig, require_width
from gspn_jax.parallel import sharding
from gspn_jax.parallel.memory import bytes_a_device
from gspn_jax.runs import checkpoints, snapshots
from gspn_jax.runs.digest import digest_of
from gspn_jax.tables import OBJECTIVES


class Weights:
    """One average of a run after `step`, on `mesh`: of the decay `ema` (None is the run's first, 0 the parameters
    themselves) or, made afterwards, of the width `ema_width`. It is read when it is first asked for."""

    def __init__(
        self,
        run: str | pathlib.Path,
        step: int,
        config: Config,
        mesh: Mesh,
        *,
        ema: float | None = None,
        ema_width: float | None = None,
    ):
        """Raises ConfigError or CheckpointError for what the run does not have."""
        self.run, self.step, self.config, self.mesh = str(run), step, config, mesh
        self.ema = config.train.ema_decays[0] if ema is None else ema
        checkpoints.check_decay(ema, config.train.ema_decays)
        self.recipe: snapshots.Recipe | None = None
        if ema_width is not None:
            if ema is not None:
                raise ConfigError(f"--ema and --ema-width are one average, found {ema:g} and {ema_width:g}")
            require_width("--ema-width", ema_width)
            self.recipe = snapshots.recipe(run, step, ema_width)

    @functools.cached_property
    def shapes(self) -> Any:
        return models.abstract(self.config)[1]

    def bytes_a_device(self) -> int:
        return bytes_a_device(sharding.stored(self.shapes, self.mesh))

    @functools.cached_property
    def params(self) -> Any:
        """As `sharding.stored`. Raises CheckpointError for files that are not those that were saved."""
        if self.recipe is not None:
            return snapshots.restore(self.recipe, self.shapes, self.mesh)
        try:
            return checkpoints.restore_params(self.run, self.step, self.config, self.mesh, ema_decay=self.ema)
        except KeyError as error:  # an item that is not there
            raise checkpoints.CheckpointError(
                f"the checkpoint of step {self.step} in {self.run} must hold the parameters asked "
                f"for (--ema {self.ema:g}), found none: it was imported, without those"
            ) from error

    @functools.cached_property
    def digest(self) -> str:
        """Every host must ask for it."""
        return digest_of(self.params, self.shapes)

    def average(self) -> dict[str, Any]:
        """The average, as JSON values: its decay, or its width, of how many others it was made, and how well."""
        if self.recipe is None:
            return {"ema_decay": self.ema}
        return {
            "ema_decay": None,
            "ema_width": self.recipe.width,
            "ema_terms": len(self.recipe.terms),
            "ema_error": self.recipe.error,
        }

    def settings(self) -> dict[str, Any]:
        """Origin and identity of the weights, as JSON values; `images_seen` in training."""
        return {
            "run": self.run,
            "model": self.config.model.preset,
            "step": self.step,
            "images_seen": self.step * self.config.train.batch_size,
            **self.average(),
            "parameters_sha256": self.digest,
        }


def guide_of(sampler: SamplerConfig, config: Config, mesh: Mesh) -> Weights | None:
    """The weights that `sampler.guide` names, for guiding a model of `config`; None for none.

    Raises ConfigError for a model that cannot guide it, and CheckpointError for what its run does not have.
    """
    if sampler.guide is None:
        return None
    step, other = checkpoints.read_config(sampler.guide, sampler.guide_step)
    _check_guide(other, config, sampler.guide)
    return Weights(sampler.guide, step, other, mesh, ema=sampler.guide_ema, ema_width=sampler.guide_ema_width)


def _check_guide(guide: Config, config: Config, run: str) -> None:
    """Raises ConfigError unless both models predict the same thing of the same images."""
    one, other = _predicted(config), _predicted(guide)
    for name, value in one.items():
        if value != other[name]:
            raise ConfigError(
                f"sampler.guide must be a model of the same classes, images and objective: {name} must be {value!r}, "
                f"found {other[name]!r} in {run}"
            )


def _predicted(config: Config) -> dict[str, Any]:
    """What a denoiser is told and predicts."""
    data, diffusion = config.data, config.diffusion
    found = {
        "data.num_classes": data.num_classes,
        "data.image_size": data.image_size,
        "data.channels": data.channels,
        "latents": data.latents,
        "diffusion.objective": diffusion.objective,
    }
    if OBJECTIVES[diffusion.objective].discrete:
        found |= {"diffusion.timesteps": diffusion.timesteps, "diffusion.beta_schedule": diffusion.beta_schedule}
    return found
