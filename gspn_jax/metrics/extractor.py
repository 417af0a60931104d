"""Features of any number of images, a batch at a time over the devices of a mesh."""

from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float32, UInt8

from gspn_jax.metrics import inception
from gspn_jax.metrics.inception import Features
from gspn_jax.metrics.networks import FeatureNetwork


class Extractor:
    """Compiled once for a batch size, whatever the size of the images; memory is bounded by `batch_size` images.

    The features of an image depend neither on its batch nor on the number of devices, to float32 rounding.
    """

    def __init__(
        self,
        params: Mapping[str, Float32[np.ndarray, "..."]],
        *,
        batch_size: int = 64,
        mesh: Mesh | None = None,
        network: FeatureNetwork = inception,
    ):
        """`params` are those of the `network`, such as `inception.load` gives. A batch is split over all devices of
        `mesh` (all local ones by default), so its size is rounded up to a multiple of their number. Raises ValueError
        for a size below 1.

        In a job of several processes with one mesh, each must make the same calls with the same images.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, found {batch_size}")
        if mesh is None:
            devices = jax.local_devices()
            mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        whole = NamedSharding(mesh, PartitionSpec())
        self._params = {name: _put(value, whole) for name, value in params.items()}
        # apart, because images come in several sizes: the long compilation is that of the network
        self._resize = jax.jit(network.resize, out_shardings=self._split)  # from wherever on these devices they are
        self._network = jax.jit(network.network, in_shardings=(whole, self._split), out_shardings=self._split)

    def __call__(self, images: UInt8[Array | np.ndarray, "n H W 3"]) -> tuple[Features, Bool[Array, " N"]]:
        """Features of 1 to `batch_size` images, padded to N = `batch_size`, and a mask that is True for the n images.

        The result stays on the devices; so does the way there for images that are on them already.
        Raises ValueError for images of another type or number.
        """
        count, padding = len(images), self.batch_size - len(images)
        if not 0 < count <= self.batch_size:
            raise ValueError(f"images must be 1 to {self.batch_size}, found {count}")
        if padding:
            pad = jnp.pad if isinstance(images, jax.Array) else np.pad
            images = pad(images, ((0, padding), *[(0, 0)] * (images.ndim - 1)))
        if not isinstance(images, jax.Array) or images.sharding.device_set != self._split.device_set:
            images = _put(images, self._split)
        features = self._network(self._params, self._resize(images))
        return features, _put(np.arange(self.batch_size) < count, self._split)

    def stream(self, chunks: Iterable[UInt8[np.ndarray, "n H W 3"]]) -> Iterator[tuple[Features, Bool[Array, " N"]]]:
        """Features and mask of batch after batch; images come in chunks of any number, and keep their order."""
        return map(self, in_batches(chunks, self.batch_size))


def in_batches(
    chunks: Iterable[UInt8[np.ndarray, "n H W 3"]], batch_size: int
) -> Iterator[UInt8[np.ndarray, "m H W 3"]]:
    """Images that come in chunks of any number, in batches of one size, but for the last."""
    waiting: list[np.ndarray] = []
    for chunk in chunks:
        waiting.append(chunk)
        if sum(map(len, waiting)) < batch_size:
            continue
        images = np.concatenate(waiting)
        whole = len(images) - len(images) % batch_size
        for start in range(0, whole, batch_size):
            yield images[start : start + batch_size]
        waiting = [images[whole:]] if whole < len(images) else []
    if waiting:
        yield np.concatenate(waiting)


def _put(array: Array | np.ndarray, sharding: NamedSharding) -> Array:
    """`array`, the same in all processes, in its place on the devices."""
    if isinstance(array, jax.Array):
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
