"""The task of training an image classifier: soft targets of augmented images, judged by accuracy."""

import functools
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from gspn_jax import data
from gspn_jax.classify import weights
from gspn_jax.classify.config import ClassifyConfig
from gspn_jax.classify.network import Network, decayed
from gspn_jax.classify.scoring import AccuracyEvaluation, validation_source
from gspn_jax.data.augment.crops import RandomResizedCrop
from gspn_jax.data.augment.device import DeviceAugmentation
from gspn_jax.data.augment.erasing import RandomErasing
from gspn_jax.data.augment.host import HostAugmentation
from gspn_jax.data.augment.mixing import Mixing
from gspn_jax.data.augment.rand_augment import RandAugment
from gspn_jax.parallel.agreement import on_every_host
from gspn_jax.runs import same_hosts
from gspn_jax.training.given import Given
from gspn_jax.training.task import Batch, Metrics, Task


class ClassificationTask(Task):
    """A network of `config.model` on the augmented images of `config.data`."""

    def __init__(self, config: ClassifyConfig):
        """Raises ConfigError for a network whose settings do not fit together."""
        super().__init__(config)
        self._config = config
        self.network = Network(config)
        self._on_device = device_augmentation(config)

    @property
    def shapes(self) -> Any:
        return self.network.shapes

    def init(self, key: Key[Array, ""]) -> Any:
        return self.network.init(key)

    def given(self) -> Given | None:
        return weights.given(self._config.init_from) if self._config.init_from else None

    def loss(self, params: Any, batch: Batch, key: Key[Array, ""], *_: Any) -> tuple[Float[Array, ""], Metrics]:
        """Cross-entropy with soft targets of a batch {"image": uint8 [B, S, S, C], "label": int32 [B]}.

        What is erased, mixed and dropped comes from `key`.
        """
        augment_key, path_key = jax.random.split(key)
        images, targets = self._on_device(batch["image"], batch["label"], augment_key)
        logits = self.network.apply(params, images, path_key)
        return optax.losses.softmax_cross_entropy(logits, targets).mean(), {}

    def decayed(self) -> Any:
        return decayed(self.shapes)

    def forward_flops(self) -> float:
        return self.network.forward_flops(self._config.data.image_size)

    def source(self) -> data.Source:
        return self._source

    def loader(self, source: data.Source, **place: int) -> data.Loader:
        return data.make_loader(
            self._config.data,
            source,
            batch_size=self._config.train.batch_size,
            augment=host_augmentation(self._config),
            **place,
        )

    def describe(self, source: data.Source) -> str:
        config = self._config
        return (
            f"{config.model.preset} with {config.model.mixer} ({self.network.parameters / 1e6:.1f}M parameters) on "
            f"{len(source):,} images of {config.data.num_classes} classes"
        )

    def evaluation(self, mesh: Mesh) -> AccuracyEvaluation | None:
        if not self._config.eval.every:
            return None
        source = on_every_host(lambda: validation_source(self._config, self._source.class_names))
        same_hosts.check_values({"the fingerprint of the validation set": source.fingerprint})
        return AccuracyEvaluation(self._config, self.network, source, mesh)

    @functools.cached_property
    def _source(self) -> data.Source:
        return data.make_source(self._config.data, whole=True)


def host_augmentation(config: ClassifyConfig) -> HostAugmentation:
    """Crop, flip and RandAugment of `config.augment`."""
    settings = config.augment
    rand_augment = RandAugment(
        settings.rand_layers, settings.rand_magnitude, settings.rand_deviation, settings.rand_probability
    )
    return HostAugmentation(
        config.data.image_size,
        RandomResizedCrop(settings.crop_area, settings.crop_aspect),
        settings.flip,
        rand_augment if settings.rand_layers else None,
    )


def device_augmentation(config: ClassifyConfig) -> DeviceAugmentation:
    """Erasing, mixing and smoothing of `config.augment`."""
    settings = config.augment
    mixes = settings.mix_probability and (settings.mixup or settings.cutmix)
    return DeviceAugmentation(
        config.data.num_classes,
        settings.smoothing,
        RandomErasing(settings.erasing) if settings.erasing else None,
        Mixing(settings.mixup, settings.cutmix, settings.mix_switch, settings.mix_probability) if mixes else None,
        settings.mean,
        settings.deviation,
    )
