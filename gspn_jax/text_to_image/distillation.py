"""The task of distilling a U-Net's self-attentions into GSPN layers (LinFusion, arXiv 2409.02097; GSPN's release).

Teacher and student are one frozen U-Net in the type of the computation, once with its attentions and once with the
layers; gradients are of the layers alone.
"""

import dataclasses
import functools
import hashlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from gspn_jax import kernels, unet
from gspn_jax.config import ConfigError
from gspn_jax.data.captioned_latents import CaptionedLatents, make_loader
from gspn_jax.data.loader import Loader
from gspn_jax.data.source import Source
from gspn_jax.diffusion.scheduler_config import SchedulerConfig, alphas_cumprod
from gspn_jax.files import sha256_of
from gspn_jax.parallel import sharding
from gspn_jax.parallel.memory import check_fits
from gspn_jax.tensor_files import errors_name, open_folder, read_json, weight_files
from gspn_jax.text_to_image import gspn_layers, layer_files
from gspn_jax.text_to_image.config import LayersConfig
from gspn_jax.text_to_image.drawing import attend_of
from gspn_jax.text_to_image.folder import encoder_hashes
from gspn_jax.training.given import Given
from gspn_jax.training.task import Batch, Metrics, Task
from gspn_jax.training.train import train_task
from gspn_jax.unet import UNetConfig

UNET, STEM = "unet", "diffusion_pytorch_model"
"""The U-Net's folder within that of the model, and how its files of weights begin."""

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


def unet_digest(folder: str | pathlib.Path) -> str:
    """SHA-256 of the file of a U-Net's weights; of shards, of their SHA-256 one after the other."""
    hashes = [sha256_of(path) for path in weight_files(pathlib.Path(folder) / UNET, STEM)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def read_unet_config(folder: str | pathlib.Path) -> UNetConfig:
    """Sizes of the U-Net in the folder of a model."""
    path = pathlib.Path(folder) / UNET
    with errors_name(path):
        return UNetConfig.from_json(read_json(path / "config.json"))


class LayersTask(Task):
    """GSPN layers of `config.model` in its U-Net, on the images and captions of `config.data`."""

    def __init__(self, config: LayersConfig):
        """Raises ConfigError, FileNotFoundError or WeightsError for a folder that has no U-Net, and for layers that do
        not fit it."""
        super().__init__(config)
        self._config = config
        folder = pathlib.Path(config.model.folder)
        self.unet_config = read_unet_config(folder)
        with errors_name(folder / "scheduler"):
            self._scheduler = SchedulerConfig.from_json(
                read_json(folder / "scheduler" / "scheduler_config.json", nan=True)
            )
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
            return self._given(path, {name: np.asarray(value) for name, value in layers.params.items()})
        if model.start == "fresh":
            return None
        folder = pathlib.Path(model.folder) / UNET
        tensors = open_folder(folder, STEM)
        taken = {name: np.asarray(tensors[name], np.float32).T for name in self._shapes if name in tensors}
        return self._given(str(folder), taken)

    def _given(self, said: str, found: dict[str, np.ndarray]) -> Given:
        shapes = {name: self._shapes[name] for name in found}

        def read(mesh: Mesh) -> Weights:
            where = sharding.param_shardings(shapes, mesh)
            return jax.jit(lambda found: sharding.pad(found, shapes, mesh), out_shardings=where)(found)

        return Given(said, shapes, read)

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
        times = jax.random.randint(time_key, image.shape[:1], 0, self._scheduler.timesteps)
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
        alpha = jnp.asarray(alphas_cumprod(self._scheduler), jnp.float32)[times][:, None, None, None]
        signal, sigma = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
        x = (signal * batch["image"] + sigma * noise).astype(dtype)
        target = noise if self._scheduler.prediction == "epsilon" else signal * noise - sigma * batch["image"]
        added = unet.Added(batch["pooled"], batch["sizes"]) if "pooled" in batch else None

        def predict(mixer: unet.Mixer | None) -> tuple[Array, dict[str, Array]]:
            return unet.apply_with_features(
                frozen, self.unet_config, x, times, batch["context"], added, attend=attend_of(dtype), mixer=mixer
            )

        teacher, attended = jax.lax.stop_gradient(predict(None))
        student, mixed = predict(gspn_layers.mixer(params, self.unet_config, self._config.model.gspn))
        return {
            "noise": _mean_square(student, target),
            "teacher": _mean_square(student, teacher),
            "features": jnp.stack([_mean_square(mixed[name], attended[name]) for name in attended]).mean(),
        }

    def forward_flops(self) -> float:
        """Operations of one pass of the U-Net as it is: a step is that of the teacher, that of the student, and a
        backward pass of the student to its activations, whose weights are frozen."""
        metadata, config = self._source.metadata, self.unet_config
        shapes = unet.expected_shapes(config)
        weights = {name: jax.ShapeDtypeStruct(_laid_out(shape), jnp.float32) for name, shape in shapes.items()}
        x = jax.ShapeDtypeStruct((1, *metadata.latent_shape), jnp.float32)
        context = jax.ShapeDtypeStruct((1, *metadata.context_shape), jnp.float32)
        pooled: Any = jax.ShapeDtypeStruct((1, metadata.pooled_width), jnp.float32)
        sizes: Any = jax.ShapeDtypeStruct((1, 6), jnp.float32)
        added = unet.Added(pooled, sizes) if metadata.pooled_width else None
        time = jax.ShapeDtypeStruct((1,), jnp.float32)
        apply = jax.jit(lambda *arguments: unet.apply(arguments[0], config, *arguments[1:]))
        found = apply.lower(weights, x, time, context, added).cost_analysis()
        return float((found or {}).get("flops", 0.0))

    # --- data
    def source(self) -> Source:
        """The set of `data.path`. Raises ConfigError unless it was made by the encoders of the folder."""
        return self._source

    @functools.cached_property
    def _source(self) -> CaptionedLatents:
        source, config, folder = CaptionedLatents(self._config.data.path), self.unet_config, self._config.model.folder
        about = source.metadata
        found = (about.latent_shape[2], about.context_shape[1], about.pooled_width)
        if found != (expected := (config.in_channels, config.context_width, config.pooled_width)):
            raise ConfigError(
                f"data.path must hold latents, text states and pooled states as wide as the U-Net takes, {expected}, "
                f"found {found} in {self._config.data.path}"
            )
        hashes = encoder_hashes(folder)
        if changed := sorted(name for name in hashes | about.files if hashes.get(name) != about.files.get(name)):
            raise ConfigError(
                f"data.path must be prepared by the encoders of {folder}, found a set that was made with "
                f"{'another' if changed[0] in about.files else 'no'} {changed[0]}: prepare the captions again"
            )
        return source

    def loader(self, source: Source, **place: int) -> Loader:
        return make_loader(self._source, batch_size=self._config.train.batch_size, **place)

    # --- beside the steps
    def describe(self, source: Source) -> str:
        count = sum(int(np.prod(own.shape)) for own in self._shapes.values())
        names = len(gspn_layers.attention_widths(self.unet_config))
        size = self._source.metadata.image_size
        return (
            f"{names} GSPN layers ({count / 1e6:.1f}M parameters) of {self._config.model.folder} on {len(source):,} "
            f"images of {size}x{size} with captions"
        )


def _mean_square(one: Float[Array, "B *N D"], other: Float[Array, "B *N D"]) -> Float[Array, ""]:
    return jnp.square(one.astype(jnp.float32) - other.astype(jnp.float32)).mean()


def _split(shape: tuple[int, ...], parts: int) -> PartitionSpec:
    """The longest axis that so many devices divide, split over "fsdp"."""
    free = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not free or np.prod(shape) < sharding.MIN_SHARDED_SIZE:
        return PartitionSpec()
    longest = max(free, key=lambda axis: shape[axis])
    return PartitionSpec(*("fsdp" if axis == longest else None for axis in range(len(shape))))


def _laid_out(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a weight of PyTorch's as `unet.apply` takes it."""
    return {4: lambda: (*shape[2:], shape[1], shape[0]), 2: lambda: shape[::-1], 1: lambda: shape}[len(shape)]()
