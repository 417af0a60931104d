"""The task of training a class-conditional denoiser."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key
from PIL import Image

from gspn_jax import data, models
from gspn_jax.config import Config, require
from gspn_jax.diffusion import ddpm, objectives
from gspn_jax.pixels import from_uint8
from gspn_jax.runs import averages
from gspn_jax.sampling.grid import grid
from gspn_jax.sampling.sampler import Sampler, check_guidance
from gspn_jax.training.evaluation import SampleEvaluation, evaluated
from gspn_jax.training.given import Given
from gspn_jax.training.state import TrainState
from gspn_jax.training.task import Batch, Metrics, Task
from gspn_jax.training.weights import denoiser_of

GRID_PER_CLASS, GRID_CLASSES = 4, 10


class DiffusionTask(Task):
    """A denoiser of `config.model` under the objective of `config.diffusion`, judged by its samples."""

    config: Config

    def __init__(self, config: Config):
        """Raises ConfigError for a model whose settings do not fit together."""
        super().__init__(config)
        require(
            config.sampler.guide is None,
            "sampler.guide",
            "None in training: it is for samples of a run",
            config.sampler.guide,
        )
        self._arch = models.resolve(config.model)
        if config.train.sample_every:
            check_guidance(config)
        if config.eval.every:
            check_guidance(evaluated(config))

    @functools.cached_property
    def _abstract(self) -> tuple[Any, Any]:
        return models.abstract(self.config, embedder=self.embedder)

    @property
    def shapes(self) -> Any:
        return self._abstract[1]

    def init(self, key: Key[Array, ""]) -> Any:
        return models.init(self.config, key, embedder=self.embedder)

    def given(self) -> Given | None:
        path = self.config.init_from
        labels = self.embedder is None
        return path and denoiser_of(path, self.config, self._source.class_names, labels=labels)

    def condition(self, batch: Batch) -> Any:
        """Condition that the denoiser is told of a batch: a tree of arrays [B, ...] that its `embedder` embeds."""
        return batch["label"]

    @property
    def no_condition(self) -> Any:
        """Substitute for a condition that is dropped: such a tree without the axis B."""
        return self.config.data.num_classes

    embedder: Callable[..., Any] | None = None
    """As `models.create` has it; None embeds labels."""

    def loss(self, params: Any, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
        """Loss of a batch {"image": uint8 or, for latents, float32 [B, S, S, C], "label": int32 [B]}.

        Dropped conditions, times, noise and DropPath come from `key`.
        """
        label_key, noise_key, path_key = jax.random.split(key, 3)
        losses, metrics = self.losses(self.denoiser(params, path_key), batch, label_key, noise_key)
        return losses.mean(), {name: value.mean() for name, value in metrics.items()}

    def denoiser(self, params: Any, path_key: Key[Array, ""]) -> ddpm.Denoise:
        """The network as an objective calls it, with DropPath by `path_key`."""

        def denoise(x, t, condition, features=()):
            key = path_key if self._arch.drop_path else None
            return models.apply(self._abstract[0], params, x, t, condition, drop_path_key=key, features=features)

        return denoise

    def losses(
        self, denoise: ddpm.Denoise, batch: Batch, label_key: Key[Array, ""], noise_key: Key[Array, ""]
    ) -> tuple[Float[Array, "B"], Metrics]:
        """Loss and metrics of each image of a batch, as `loss` has it."""
        config = self.config
        condition = self.condition(batch)
        if not config.data.unconditional:
            condition = objectives.drop_condition(
                label_key, condition, config.diffusion.label_dropout, self.no_condition
            )
        image = batch["image"]
        x0 = from_uint8(image) if image.dtype == jnp.uint8 else image  # latents are floats, in their final scale
        return objectives.loss(config.diffusion, denoise, x0, condition, noise_key)

    def forward_flops(self) -> float:
        size = self.config.data.image_size
        return models.forward_flops(self._arch, self.config.data.channels, size, size)

    def image_bytes(self) -> int:
        data, arch = self.config.data, self._arch
        tokens = (data.image_size // arch.patch) ** 2
        pixels = data.image_size**2 * data.channels
        compute = jnp.dtype(self.config.train.compute).itemsize
        return 4 * pixels + arch.depth * tokens * arch.hidden * compute  # what each block begins with is kept

    def source(self) -> data.Source:
        return self._source

    @functools.cached_property
    def _source(self) -> data.Source:
        return data.make_source(self.config.data)

    def loader(self, source: data.Source, **place: int) -> data.Loader:
        return data.make_loader(self.config.data, source, batch_size=self.config.train.batch_size, **place)

    def describe(self, source: data.Source) -> str:
        config = self.config
        classes = "without classes" if config.data.unconditional else f"of {config.data.num_classes} classes"
        return (
            f"{config.model.preset} ({models.count_parameters(config) / 1e6:.1f}M parameters) on {len(source):,} "
            f"images {classes}"
        )

    def evaluation(self, mesh: Mesh) -> SampleEvaluation | None:
        return SampleEvaluation(self.config, mesh) if self.config.eval.every else None

    def picture(self, mesh: Mesh, class_names: Sequence[str]) -> Callable[[TrainState], Image.Image]:
        """A labelled grid from the first average: the same classes and seeds at each call, to be compared."""
        sampler, config = Sampler(self.config, mesh), self.config
        count = min(GRID_CLASSES, config.data.num_classes)
        classes = np.linspace(0, config.data.num_classes - 1, count).astype(int)
        labels = np.repeat(classes, GRID_PER_CLASS)

        def draw(state: TrainState) -> Image.Image:
            params = state.ema[averages.name(config.train.ema_decays[0])]
            images = sampler(params, labels, np.arange(len(labels)))
            return grid(images, [class_names[label] for label in labels], columns=GRID_PER_CLASS)

        return draw
