"""The autoencoder over any number of images, a batch at a time on all devices of this process."""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, UInt8

from gspn_jax.autoencoder import model
from gspn_jax.autoencoder.model import AutoencoderConfig
from gspn_jax.pixels import from_uint8, to_uint8


def decode_to_uint8(
    params: Mapping[str, Float32[Array, "..."]], config: AutoencoderConfig, latents: Float[Array, "N h w D"]
) -> UInt8[Array, "N H W C"]:
    """0..255 images of latents as they are trained on, shifted and scaled."""
    latents = latents / config.scaling_factor
    return to_uint8(model.decode(params, config, latents + config.shift_factor if config.shift_factor else latents))


class Autoencoder:
    """Encodes and decodes NumPy arrays; memory is bounded by `batch_size` images, over all `devices` (default: local).

    Every batch is padded to one size, so that encoder and decoder are compiled once for each size of image.
    """

    def __init__(
        self,
        params: Mapping[str, np.ndarray],
        config: AutoencoderConfig,
        *,
        batch_size: int = 32,
        devices: Sequence[jax.Device] | None = None,
    ):
        devices = jax.local_devices() if devices is None else devices
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, found {batch_size}")
        self.config = config
        self.batch_size = -(-batch_size // len(devices)) * len(devices)
        mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
        self._split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
        self._params = jax.device_put(dict(params), whole)

        def encode(params, images):
            return model.encode(params, config, from_uint8(images))

        self._encode = jax.jit(encode)
        self._decode = jax.jit(lambda params, latents: decode_to_uint8(params, config, latents))

    def encode(self, images: UInt8[np.ndarray, "N H W C"]) -> Float32[np.ndarray, "N h w moments"]:
        """Mean and log-variance of the posterior of 0..255 images, neither scaled nor clipped."""
        return self._run(self._encode, images)

    def decode(self, latents: Float[np.ndarray, "N h w D"]) -> UInt8[np.ndarray, "N H W C"]:
        """0..255 images of latents as they are trained on, shifted and scaled."""
        return self._run(self._decode, np.asarray(latents, np.float32))

    def _run(self, function: Callable, inputs: np.ndarray) -> np.ndarray:
        outputs = []
        for start in range(0, len(inputs), self.batch_size):
            batch = inputs[start : start + self.batch_size]
            padded = np.concatenate([batch, np.zeros((self.batch_size - len(batch), *batch.shape[1:]), batch.dtype)])
            result = function(self._params, jax.device_put(padded, self._split))
            outputs.append(np.asarray(result)[: len(batch)])
        return np.concatenate(outputs)
