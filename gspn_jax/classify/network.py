"""The network of a config: its parameters' shapes, its function, and what it costs."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, UInt8

from gspn_jax import models
from gspn_jax.classify.config import ClassifyConfig
from gspn_jax.config import ConfigError
from gspn_jax.data.augment.device import normalise
from gspn_jax.models.classifier import Classifier, count_multiply_adds, count_parameters, preset
from gspn_jax.models.hierarchy import Hierarchy
from gspn_jax.models.parameters import rngs_of
from gspn_jax.parallel import fsdp


def resolve(config: ClassifyConfig) -> Hierarchy:
    """The hierarchy of `config.model`. Raises ConfigError for choices that do not fit together."""
    model = config.model
    try:
        return preset(
            model.preset, skip=model.skip, released=model.released, groups=model.groups, drop_path=model.drop_path,
            mixer=model.mixer, remat=model.remat, unroll=model.unroll,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


class Network:
    """A classifier as a function of parameters, nested dicts of arrays; computed in `dtype`, None for the config's."""

    def __init__(self, config: ClassifyConfig, dtype: DTypeLike | None = None):
        self.hierarchy = resolve(config)
        self._data, self.dtype = config.data, dtype or config.train.compute
        try:
            self._graphdef, self.shapes = models.abstract_of(self._create)
        except ValueError as error:
            raise ConfigError(f"model: {error}") from error

    def _create(self, rngs: nnx.Rngs) -> Classifier:
        return Classifier(
            self.hierarchy, num_classes=self._data.num_classes, channels=self._data.channels, dtype=self.dtype,
            rngs=rngs,
        )  # fmt: skip

    def init(self, key: Key[Array, ""]) -> Any:
        return models.split(self._create(rngs_of(key)))[1]

    def apply(
        self, params: Any, images: Float[Array, "B H W C"], drop_path_key: Key[Array, ""] | None = None
    ) -> Float[Array, "B K"]:
        """Logits in float32."""
        return nnx.merge(self._graphdef, params)(images, drop_path_key=drop_path_key)

    @property
    def parameters(self) -> int:
        counts = count_parameters(self.hierarchy, num_classes=self._data.num_classes, channels=self._data.channels)
        return sum(counts.values())

    def multiply_adds(self, size: int) -> int:
        """Multiply-adds of one image [size, size, C], without those of the scans, as usual tables count."""
        counts = count_multiply_adds(
            self.hierarchy, num_classes=self._data.num_classes, height=size, width=size, channels=self._data.channels
        )
        return sum(counts.values()) - counts["scans"]

    def forward_flops(self, size: int) -> float:
        """Operations of one image, 2 a multiply-add, scans among them."""
        counts = count_multiply_adds(
            self.hierarchy, num_classes=self._data.num_classes, height=size, width=size, channels=self._data.channels
        )
        return 2.0 * sum(counts.values())


def forward(config: ClassifyConfig, network: Network, mesh: Mesh) -> Callable[[Any, UInt8[Array, "B S S C"]], Array]:
    """logits(params, images) [B, K] of parameters as they are stored on `mesh` and images as they are decoded, to be
    jitted; without gradients."""

    def logits(params: Any, images: UInt8[Array, "B S S C"]) -> Float[Array, "B K"]:
        with fsdp.sharded_blocks(mesh, network.dtype, forward_only=True):
            whole = fsdp.outside_blocks(network.shapes, mesh, params)
            return network.apply(whole, normalise(images, config.augment.mean, config.augment.deviation))

    return logits


def decayed(shapes: Any) -> Any:
    """True for the parameters that weight decay is of, kernels of linears and convolutions: not biases, norms, GRN's
    scale and shift, nor the weights that merge directions."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", shapes)
