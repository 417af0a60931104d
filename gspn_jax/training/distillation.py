"""The task of training a denoiser that learns from another one, its teacher: such as a GSPN from a DiT."""

import dataclasses
import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from gspn_jax import models
from gspn_jax.config import Config, ConfigError, from_dict
from gspn_jax.parallel import fsdp
from gspn_jax.runs import checkpoints
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.given import Given
from gspn_jax.training.task import Batch, Metrics
from gspn_jax.training.weights import class_rows, denoiser_of

log = logging.getLogger(__name__)

_SAME = {
    "data.image_size": lambda c: c.data.image_size,
    "data.channels": lambda c: c.data.channels,
    "data.num_classes": lambda c: c.data.num_classes,
    "diffusion.objective": lambda c: c.diffusion.objective,
    "diffusion.timesteps": lambda c: c.diffusion.timesteps,
    "diffusion.beta_schedule": lambda c: c.diffusion.beta_schedule,
    "model.learn_sigma": models.learns_sigma,
}
"""Settings by which a teacher's prediction is one that the student could make."""


class Teacher(NamedTuple):
    """A denoiser that is learned from: its config, in the student's precision, and its network without parameters."""

    step: int
    config: Config
    graphdef: nnx.GraphDef
    shapes: Any


class DistillationTask(DiffusionTask):
    """A denoiser that is trained on what `config.distill.teacher` makes of the same noised images.

    A new run begins with the teacher's weights where they fit, if `init_from` names no others.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        if config.distill.teacher is None:
            raise ConfigError("distill.teacher must be the run directory of a trained denoiser, found None")
        if models.spans(config):
            raise ConfigError(
                f"distill.teacher must be None with diffusion.objective={config.diffusion.objective!r}, which "
                f"differentiates the denoiser by its times, found {config.distill.teacher!r}"
            )

    def given(self) -> Given | None:
        _ = self._teacher  # is found to fit first
        path = self.config.init_from or self.config.distill.teacher
        return denoiser_of(path, self.config, self._source.class_names, labels=True)

    def frozen(self, mesh: Mesh) -> tuple[Any, ...]:
        """The teacher's parameters, the first average of its run, split as the student's are."""
        teacher, path = self._teacher, self.config.distill.teacher
        stored = checkpoints.restore_params(path, teacher.step, teacher.config, mesh)
        return (fsdp.gathered_outside_blocks(stored, teacher.shapes, mesh),)

    def loss(self, params: Any, batch: Batch, key: Key[Array, ""], teacher: Any) -> tuple[Float[Array, ""], Metrics]:
        """Weighted sum of the squared distance from the teacher's prediction, that from its tokens after the blocks of
        `distill.features`, relative to their mean square, and the loss of the objective; at the images, times and
        conditions that the objective draws."""
        settings, blocks = self.config.distill, self.config.distill.features
        label_key, noise_key, path_key = jax.random.split(key, 3)
        student, seen = self.denoiser(params, path_key), []

        def denoise(x, t, condition, features=()):
            output, tokens = _with_features(student(x, t, condition, features=tuple({*features, *blocks})))
            theirs = models.apply(self._teacher.graphdef, teacher, x, t, condition, features=blocks)
            seen.append((output, tokens, *_with_features(jax.lax.stop_gradient(theirs))))
            return (output, {i: tokens[i] for i in features}) if features else output

        losses, metrics = self.losses(denoise, batch, label_key, noise_key)
        ((output, tokens, their_output, their_tokens),) = seen  # an objective evaluates the denoiser once
        metrics = {name: value.mean() for name, value in metrics.items()}
        metrics |= {"data_loss": losses.mean(), "prediction_loss": jnp.square(output - their_output).mean()}
        total = settings.prediction_weight * metrics["prediction_loss"] + settings.data_weight * metrics["data_loss"]
        if blocks:
            metrics["feature_loss"] = sum(_distance(tokens[i], their_tokens[i]) for i in blocks) / len(blocks)
            total += settings.feature_weight * metrics["feature_loss"]
        return total, metrics

    def forward_flops(self) -> float:
        """With the teacher's forward pass, which no backward pass follows."""
        config = self._teacher.config
        size = config.data.image_size
        teacher = models.forward_flops(models.resolve(config.model), config.data.channels, size, size)
        return super().forward_flops() + teacher / 3

    @functools.cached_property
    def _teacher(self) -> Teacher:
        """The teacher of the config. Raises ConfigError or CheckpointError for one that does not fit."""
        config, settings = self.config, self.config.distill
        step, meta = checkpoints.read_meta(settings.teacher, settings.step)
        try:
            theirs = from_dict(meta["config"])
        except ConfigError as error:
            raise ConfigError(f"distill.teacher {settings.teacher}: {error}") from error
        for name, value in _SAME.items():
            if value(theirs) != value(config):
                raise ConfigError(
                    f"{name} must be that of the teacher in {settings.teacher}, {value(theirs)!r}, found "
                    f"{value(config)!r}"
                )
        if class_rows(meta, self._source.class_names).there != (*range(config.data.num_classes + 1),):
            raise ConfigError(
                f"the classes of the data must be those of the teacher in {settings.teacher}, in their order, found "
                "others"
            )
        if theirs.diffusion.label_dropout == 0 and config.diffusion.label_dropout and not config.data.unconditional:
            raise ConfigError(
                "diffusion.label_dropout must be 0 for a teacher that knows no null class, found "
                f"{config.diffusion.label_dropout}"
            )
        arch = models.resolve(theirs.model)
        self._check_features(arch)
        if arch.positions and not self._arch.positions and self._arch.layout == "dit":
            log.warning(
                "the teacher's tokens have positions and the student's have none, for which all its weights must make "
                "up: --model.positions True adds them"
            )
        theirs = dataclasses.replace(
            theirs, train=dataclasses.replace(theirs.train, precision=config.train.precision), mesh=config.mesh
        )
        return Teacher(step, theirs, *models.abstract(theirs))

    def _check_features(self, teacher: models.Architecture) -> None:
        """Raises ConfigError for features that student and teacher do not both have, of one shape."""
        student, blocks = self._arch, self.config.distill.features
        if not blocks:
            return
        fewest = min(student.blocks, teacher.blocks)
        if max(blocks) >= fewest:
            raise ConfigError(
                f"distill.features must be numbers of blocks in 0..{fewest - 1}, which student and teacher have, found "
                f"{blocks}"
            )
        ours, theirs = ((one.hidden, one.patch) for one in (student, teacher))
        if ours != theirs:
            raise ConfigError(
                f"distill.features needs a student of the teacher's width and patch, {theirs}, found {ours}"
            )


def _with_features(result: Any) -> tuple[Any, dict[int, Any]]:
    """(output, tokens by block), whether or not a denoiser was asked for tokens."""
    return result if isinstance(result, tuple) else (result, {})


def _distance(ours: Float[Array, "B h w D"], theirs: Float[Array, "B h w D"]) -> Float[Array, ""]:
    """Mean squared distance over the mean square of `theirs`, in float32."""
    ours, theirs = ours.astype(jnp.float32), theirs.astype(jnp.float32)
    return jnp.square(ours - theirs).mean() / jnp.square(theirs).mean()
