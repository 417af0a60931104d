"""From parameters to images: the denoiser of `models` and a sampler of `diffusion`, jitted over a mesh."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from gspn_jax import models
from gspn_jax.config import Config, ConfigError
from gspn_jax.diffusion import samplers
from gspn_jax.diffusion.ddpm import Denoise
from gspn_jax.parallel import fsdp, sharding
from gspn_jax.pixels import to_uint8
from gspn_jax.sampling import seeds

Progress = Callable[[int, int], None]
Images = UInt8[np.ndarray, "N H W C"] | Float[np.ndarray, "N H W C"]
Decode = Callable[[Float[np.ndarray, "N h w C"]], Images]
"""Latents to images of 8 bits; what it gives is handed on as it is."""

LATENT_RANGE = 3.0
"""Latents have about unit variance: few lie outside of [-3, 3], which is shown as black to white."""


class Sampler:
    """Draws class-conditional images; compiled once per number of images and size.

    The image of a seed, a number and a label does not depend on what else is in the batch, or on the mesh.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        *,
        guide: Config | None = None,
        seed: int = 0,
        image_size: int | tuple[int, int] | None = None,
        progress: Progress | None = None,
        decode: Decode | None = None,
    ):
        """`guide` is the config of the model that guides (`sampler.guide`): `params` are then, in every call, those of
        the model and those of the guide. `seed` is that of the set of images (`sampling.seeds`); `image_size` None is
        the size trained on. `progress` is called with the network evaluations of a batch that are done and their total
        (`evaluations`). `decode` makes images of latents, in the scale they are trained on; without it the first three
        channels are shown."""
        size = config.data.image_size if image_size is None else image_size
        height, width = (size, size) if isinstance(size, int) else size
        arch = models.resolve(config.model)
        if height % arch.patch or width % arch.patch:
            raise ConfigError(f"the image size must be a multiple of the patch ({arch.patch}), found {height}x{width}")
        check_guidance(config, guided_by_model=guide is not None)
        self.evaluations = len(samplers.make_table(config.sampler, config.diffusion).time)
        self._config, self._mesh, self._decode = config, mesh, decode
        self._devices = mesh.shape["data"] * mesh.shape["fsdp"]
        networks = [_Network(one, mesh) for one in ([config, guide] if guide else [config])]
        shape = (height, width, config.data.channels)
        learn_sigma = models.learns_sigma(config)

        def draw(params, labels, numbers, seed):
            keys = seeds.image_keys(seed, numbers)
            given = params if guide else (params,)
            denoise, *guides = (network.denoiser(one) for network, one in zip(networks, given, strict=True))
            x = samplers.sample(
                config.sampler,
                config.diffusion,
                denoise,
                shape,
                labels,
                keys,
                null=config.data.num_classes,
                guide=guides[0] if guides else None,
                learn_sigma=learn_sigma,
                progress=progress,
            )
            if decode is not None:
                return x
            return to_uint8(x[..., :3] / LATENT_RANGE if config.data.latents else x)

        split, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        stored = tuple(sharding.stored(network.shapes, mesh) for network in networks)
        self._params = stored if guide else stored[0]
        placed = jax.tree.map(lambda s: s.sharding, self._params)
        self._draw = jax.jit(draw, in_shardings=(placed, split, split, everywhere), out_shardings=split)
        self._seed = seeds.words(seed)
        self._gather = jax.jit(lambda images: images, out_shardings=sharding.replicated(mesh))

    def __call__(
        self, params: Any, labels: Sequence[int] | Int[np.ndarray, " N"], numbers: Sequence[int] | Int[np.ndarray, " N"]
    ) -> Images:
        """One image per (label, number in its set), 0 .. 2**32-1. Raises ConfigError for a label out of range."""
        images = self._gather(self.draw(params, labels, numbers))
        images = np.asarray(images.addressable_data(0))[: len(labels)]
        return images if self._decode is None else self._decode(images)

    def lower(self, count: int) -> jax.stages.Lowered:
        """The program that draws `count` images, a multiple of the devices that images are split over."""
        integers = [jax.ShapeDtypeStruct((count,), dtype) for dtype in (np.int32, np.uint32)]
        return self._draw.lower(self._params, *integers, jax.ShapeDtypeStruct((2,), np.uint32))

    def draw(
        self, params: Any, labels: Sequence[int] | Int[np.ndarray, " N"], numbers: Sequence[int] | Int[np.ndarray, " N"]
    ) -> UInt8[Array, "M H W C"] | Float[Array, "M h w C"]:
        """Draws as `__call__` does, left on the devices, split over the mesh and not decoded: M is N, rounded up to a
        multiple of the devices that images are split over."""
        labels, numbers = np.asarray(labels, np.int32), np.asarray(numbers, np.uint32)
        bad = labels[(labels < 0) | (labels >= self._config.data.num_classes)]
        if bad.size:
            raise ConfigError(f"a class must be in 0..{self._config.data.num_classes - 1}, found {bad[0]}")
        padding = -len(labels) % self._devices
        split = sharding.batch_sharding(self._mesh)
        padded = [
            jax.make_array_from_callback(a.shape, split, lambda index, a=a: a[index])
            for a in (np.pad(labels, (0, padding)), np.pad(numbers, (0, padding)))
        ]
        everywhere = sharding.replicated(self._mesh)
        seed = jax.make_array_from_callback(self._seed.shape, everywhere, lambda index: self._seed[index])
        return self._draw(params, *padded, seed)


class _Network:
    """A denoiser over a mesh."""

    def __init__(self, config: Config, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._graphdef, self.shapes = models.abstract(config)

    def denoiser(self, params: Any) -> Denoise:
        """`params` as `sharding.stored`; prepared once for all evaluations."""
        with self._blocks():
            params = models.prepared(self._config, fsdp.outside_blocks(self.shapes, self._mesh, params))

        def denoise(x, t, y):
            with self._blocks():
                return models.apply(self._graphdef, params, x, t, y)

        return denoise

    def _blocks(self):
        return fsdp.sharded_blocks(self._mesh, self._config.train.compute, forward_only=True, repeats=True)


def check_guidance(config: Config, *, guided_by_model: bool = False) -> None:
    """Raises ConfigError for guidance by a network that was never trained on the null class it needs."""
    scale = config.sampler.guidance_scale
    if scale != 1 and config.diffusion.label_dropout == 0 and not guided_by_model:
        raise ConfigError(
            "sampler.guidance_scale must be 1 for weights that know no null class, as those of a run with "
            f"diffusion.label_dropout 0, found {scale:g}"
        )
