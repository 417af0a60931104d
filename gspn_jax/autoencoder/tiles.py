"""Encoding and decoding in tiles that overlap by a quarter and are blended linearly: memory is that of one tile.

Group norms and the attention in the middle see one tile, so that tones of tiles may differ; the blend hides the step
but not the difference. Where tiles fit exactly this is diffusers' tiling (0.42), but for corners where four meet,
which it blends in part twice; elsewhere tiles of full size are spread evenly, where it has narrow ones at the end. The
whole image is in the memory of the host alone.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Float32, UInt8

from gspn_jax.autoencoder import model
from gspn_jax.autoencoder.model import AutoencoderConfig
from gspn_jax.pixels import from_uint8, to_uint8

OVERLAP = 4
"""Neighbouring tiles share 1 / OVERLAP of their side, or more."""


class Places(NamedTuple):
    """Tiles along one axis."""

    side: int
    starts: tuple[int, ...]
    weights: tuple[Float32[np.ndarray, " finer"], ...]
    """Weights of each tile at each of its positions, which may be finer than those that `starts` counts; their sum is
    1."""

    @property
    def each(self) -> tuple[tuple[int, Float32[np.ndarray, " finer"]], ...]:
        """Start and weights of each tile."""
        return tuple(zip(self.starts, self.weights, strict=True))


def places(length: int, side: int, finer: int = 1) -> Places:
    """Tiles of `side` over `length` positions, with weights at `finer` times as many; one tile where it fits.

    From tile to tile the weight goes over linearly, in the middle of what the two share.
    """
    side = min(side, length)
    ramp = side // OVERLAP
    count = 1 if length == side else -(-(length - ramp) // (side - ramp))
    starts = tuple(round(start) for start in np.linspace(0, length - side, count))
    weights = [np.ones(finer * side) for _ in starts]
    for i in range(count - 1):
        shared = starts[i] + side - starts[i + 1]
        position = np.arange(finer * shared) - finer * ((shared - ramp) // 2)
        after = np.clip(position / max(finer * ramp, 1), 0, 1)
        weights[i][finer * (side - shared) :] *= 1 - after
        weights[i + 1][: finer * shared] *= after
    return Places(side, starts, tuple(weight.astype(np.float32) for weight in weights))


class TiledAutoencoder:
    """An autoencoder over one image in tiles, each on `device`, where the weights are only meanwhile.

    `tile` is the side of a tile in latents: those that Stable Diffusion 1 and 2 (64) and SDXL (128) were trained on are
    a good choice. Programs are compiled once for each size of tile, which `memory` asks for and `encode` and `decode`
    find.
    """

    def __init__(
        self,
        params: Mapping[str, Float32[np.ndarray, "..."]],
        config: AutoencoderConfig,
        tile: int,
        device: jax.Device | None = None,
    ):
        if tile < OVERLAP:
            raise ValueError(f"the side of a tile must be {OVERLAP} or more, found {tile}")
        self.config, self.tile = config, tile
        self._params, self._device = dict(params), device or jax.local_devices()[0]
        self._compiled: dict[tuple[int, int, bool], Any] = {}

    def encode(self, image: UInt8[np.ndarray, "H W C"]) -> Float32[np.ndarray, "h w D"]:
        """Means of the posterior of an image, as they are trained on: shifted and scaled."""
        factor = self.config.factor
        height, width = (side // factor for side in image.shape[:2])
        rows, columns = places(height, self.tile), places(width, self.tile)
        run, latents = self._program(height, width, decodes=False), np.zeros((height, width, self._depth), np.float32)
        for top, by_row in rows.each:
            for left, by_column in columns.each:
                part = image[factor * top : factor * (top + rows.side), factor * left : factor * (left + columns.side)]
                place = latents[top : top + rows.side, left : left + columns.side]
                place += by_row[:, None, None] * by_column[:, None] * run(part)
        return latents

    def decode(self, latents: Float[np.ndarray, "h w D"]) -> UInt8[np.ndarray, "H W C"]:
        """0..255 image of latents as they are trained on; a row of tiles is in memory as float32."""
        factor, (height, width) = self.config.factor, latents.shape[:2]
        rows, columns = places(height, self.tile, factor), places(width, self.tile, factor)
        run = self._program(height, width, decodes=True)
        image = np.empty((factor * height, factor * width, self.config.image_channels), np.uint8)
        strip = np.zeros((factor * rows.side, *image.shape[1:]), np.float32)
        for (top, by_row), end in zip(rows.each, (*rows.starts[1:], height), strict=True):
            for left, by_column in columns.each:
                found = run(latents[top : top + rows.side, left : left + columns.side].astype(np.float32))
                place = strip[:, factor * left : factor * (left + columns.side)]
                place += by_row[:, None, None] * by_column[:, None] * found
            done = factor * (end - top)
            image[factor * top : factor * end] = to_uint8(strip[:done])
            strip = np.concatenate([strip[done:], np.zeros_like(strip[:done])])
        return image

    def memory(self, height: int, width: int) -> dict[str, Any]:
        """Memory of the programs for latents of this size, by the compiler: {"encode": ..., "decode": ...}."""
        return {
            name: self._compile(height, width, decodes=name == "decode").memory_analysis()
            for name in ("encode", "decode")
        }

    @property
    def _depth(self) -> int:
        return self.config.latent_channels

    def _program(self, height: int, width: int, *, decodes: bool) -> Callable[[np.ndarray], np.ndarray]:
        """Function of one tile [H, W, C] -> [H, W, C]; the weights are on the device as long as it is."""
        compiled, params = self._compile(height, width, decodes=decodes), jax.device_put(self._params, self._device)
        return lambda part: np.asarray(compiled(params, jax.device_put(part[None], self._device))[0])

    def _compile(self, height: int, width: int, *, decodes: bool) -> Any:
        config, key = self.config, (min(height, self.tile), min(width, self.tile), decodes)

        def encode(params, pixels):
            moments = model.encode(params, config, from_uint8(pixels))
            return (moments[..., : config.latent_channels] - config.shift_factor) * config.scaling_factor

        def decode(params, latents):
            return model.decode(params, config, latents / config.scaling_factor + config.shift_factor)

        if key not in self._compiled:
            where = jax.sharding.SingleDeviceSharding(self._device)
            finer, depth, dtype = (
                (1, self._depth, np.float32) if decodes else (config.factor, config.image_channels, np.uint8)
            )
            params = {
                name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=where)
                for name, value in self._params.items()
            }
            tile = jax.ShapeDtypeStruct((1, finer * key[0], finer * key[1], depth), dtype, sharding=where)
            self._compiled[key] = jax.jit(decode if decodes else encode).lower(params, tile).compile()
        return self._compiled[key]
