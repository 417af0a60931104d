"""The task of distilling a U-Net's self-attentions into GSPN layers (LinFusion, arXiv 2409.02097; GSPN's release).

Teacher and student are one frozen U-Net in the type of the computation, once with its attentions and once with the
layers; gradients are of the layers alone.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from gspn_jax import kernels, unet
from gspn_jax.config import ConfigError
from gspn_jax.data.source import Source
from gspn_jax.parallel import sharding
from gspn_jax.parallel.memory import check_fits
from gspn_jax.tensor_files import open_folder
from gspn_jax.text_to_image import gspn_layers, layer_files
from gspn_jax.text_to_image.captions_task import CaptionsTask, mean_square
from gspn_jax.text_to_image.config import LayersConfig
from gspn_jax.text_to_image.drawing import attend_of
from gspn_jax.text_to_image.folder import STEM, UNET, unet_digest
from gspn_jax.training.given import Given
from gspn_jax.training.task import Batch, Metrics
from gspn_jax.training.train import train_task

Weights = dict[str, Float[Array, "..."]]


def distill(config: LayersConfig) -> pathlib.Path:
    """Trains as `train_task`, on the teacher whose digest the config then has; returns the run directory."""
    return train_task(LayersTask(with_teacher(config)))


def with_teacher(config: LayersConfig) -> LayersConfig:
    """The config with the digest of its teacher. Raises ConfigError where it has that of another."""
    found = unet_digest(config.model.folder)
    if config.model.unet_sha256 not in (None, found):
        raise ConfigError(
            f"model.unet_sha256 must be that of the U-Net in {config.model.folder}, {found}, found "
            f"{config.model.unet_sha256}"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, unet_sha256=found))


class LayersTask(CaptionsTask):
    """GSPN layers of `config.model` in its U-Net, on the images and captions of `config.data`."""

    def __init__(self, config: LayersConfig):
        """Raises ConfigError, FileNotFoundError or WeightsError for a folder that has no U-Net, and for layers that do
        not fit it."""
        super().__init__(config)
        self._config = config
        self._shapes = gspn_layers.shapes(self.unet_config, config.model.gspn)
        self._mesh: Mesh | None = None

    # --- parameters
    @property
    def shapes(self) -> Any:
        return self._shapes

    def init(self, key: Key[Array, ""]) -> Weights:
        return gspn_layers.init(self.unet_config, self._config.model.gspn, key)

    def given(self) -> Given | None:
        """The teacher's linears, in float32 whatever its type is, or the layers of a file."""
        model, path = self._config.model, self._config.init_from
        if path is not None:
            layers = layer_files.load(path, self.unet_config, np.float32)
            if layers.options != model.gspn:
                raise ConfigError(f"init_from must be of layers of {model.gspn}, found {layers.options} in {path}")
            return self.given_of(path, {name: np.asarray(value) for name, value in layers.params.items()})
        if model.start == "fresh":
            return None
        folder = pathlib.Path(model.folder) / UNET
        tensors = open_folder(folder, STEM)
        taken = {name: np.asarray(tensors[name], np.float32).T for name in self._shapes if name in tensors}
        return self.given_of(str(folder), taken)

    def frozen(self, mesh: Mesh) -> tuple[Any, ...]:
        """The U-Net in the type of the computation, each weight split over "fsdp" where that divides an axis."""
        self._mesh = mesh
        weights, _ = unet.load_unet(pathlib.Path(self._config.model.folder) / UNET, self._config.train.compute)
        needed = sum(value.nbytes for value in weights.values())
        check_fits(
            needed // mesh.shape["fsdp"], mesh, "the teacher", "more mesh.fsdp takes less, and bfloat16 half of float32"
        )

        def placed(value: np.ndarray) -> Array:
            where = NamedSharding(mesh, _split(value.shape, mesh.shape["fsdp"]))
            return jax.make_array_from_callback(value.shape, where, lambda index: value[index])

        return ({name: placed(value) for name, value in weights.items()},)

    # --- a step
    def loss(self, params: Any, batch: Batch, key: Key[Array, ""], *frozen: Any) -> tuple[Float[Array, ""], Metrics]:
        """Loss of a batch {"image": float32 [B, h, w, C], "context": [B, N, D]}, of SDXL with "pooled" and "sizes".

        Timesteps, uniform over those of the model, and noise come from `key`.
        """
        time_key, noise_key = jax.random.split(key)
        image = batch["image"]
        times = jax.random.randint(time_key, image.shape[:1], 0, self.scheduler.timesteps)
        noise = jax.random.normal(noise_key, image.shape, jnp.float32)
        mesh = self._mesh
        if mesh is None or mesh.shape["fsdp"] == 1:
            terms = self.losses(params, frozen[0], batch, times, noise)
        else:
            whole = jax.lax.with_sharding_constraint(frozen[0], sharding.replicated(mesh))
            with kernels.sharded(mesh, batch=sharding.BATCH_AXES):
                terms = self.losses(params, whole, batch, times, noise)
        weights = dataclasses.asdict(self._config.loss)
        return sum((weights[name] * term for name, term in terms.items()), jnp.zeros(())), terms

    def losses(
        self, params: Weights, frozen: Weights, batch: Batch, times: Int[Array, " B"], noise: Float[Array, "B h w C"]
    ) -> dict[str, Float[Array, ""]]:
        """Mean squared errors at given timesteps and noise, by their names in `LossConfig`.

        Teacher and student see the same noised latents and text; what the layers of the student see is its own.
        """
        dtype = jnp.dtype(self._config.train.compute)
        noised = self.noised(batch, times, noise, dtype)

        def predict(mixer: unet.Mixer | None) -> tuple[Array, dict[str, Array]]:
            return unet.apply_with_features(
                frozen, self.unet_config, noised.x, times, batch["context"], noised.added,
                attend=attend_of(dtype), mixer=mixer,
            )  # fmt: skip

        teacher, attended = jax.lax.stop_gradient(predict(None))
        student, mixed = predict(gspn_layers.mixer(params, self.unet_config, self._config.model.gspn))
        return {
            "noise": mean_square(student, noised.target),
            "teacher": mean_square(student, teacher),
            "features": jnp.stack([mean_square(mixed[name], attended[name]) for name in attended]).mean(),
        }

    def forward_flops(self) -> float:
        """Operations of one pass of the U-Net as it is: a step is that of the teacher, that of the student, and a
        backward pass of the student to its activations, whose weights are frozen."""
        return super().forward_flops()

    # --- beside the steps
    def describe(self, source: Source) -> str:
        count = sum(int(np.prod(own.shape)) for own in self._shapes.values())
        names = len(gspn_layers.attention_widths(self.unet_config))
        return (
            f"{names} GSPN layers ({count / 1e6:.1f}M parameters) of {self._config.model.folder} on "
            f"{self.images_with_captions(source)}"
        )


def _split(shape: tuple[int, ...], parts: int) -> PartitionSpec:
    """The longest axis that so many devices divide, split over "fsdp"."""
    free = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not free or np.prod(shape) < sharding.MIN_SHARDED_SIZE:
        return PartitionSpec()
    longest = max(free, key=lambda axis: shape[axis])
    return PartitionSpec(*("fsdp" if axis == longest else None for axis in range(len(shape))))
