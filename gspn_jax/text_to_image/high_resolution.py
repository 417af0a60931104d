"""Images larger than a U-Net was trained on, coarse to fine: one that was drawn small is doubled and refined until it
has the size asked for. One image at a time, on one device, which holds the text towers, the U-Net and the autoencoder
only while they are used; every program is compiled, and its memory told, before anything is drawn.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float, UInt8
from PIL import Image

from gspn_jax import unet
from gspn_jax.autoencoder import TiledAutoencoder
from gspn_jax.config import ConfigError
from gspn_jax.diffusion import coarse_to_fine
from gspn_jax.diffusion.stable_diffusion import guide
from gspn_jax.sampling import seeds
from gspn_jax.tables import STABLE_DIFFUSION_SAMPLERS
from gspn_jax.text_to_image.conditions import condition_of, null_condition
from gspn_jax.text_to_image.drawing import Settings, attend_of, network_mixer, network_params, start_noise
from gspn_jax.text_to_image.folder import Model
from gspn_jax.unet import Execution

RATIO = 2
"""Ratio of the sides of an image and the next."""

CHANNELS = 128
"""Channels that a GSPN layer scans at a time."""

PUBLISHED = {
    1: {1024: (50, 0.56), 2048: (50, 0.48), 4096: (50, 0.40)},
    2: {1024: (50, 0.42), 2048: (50, 0.32), 4096: (30, 0.32), 8192: (30, 0.28)},
}
"""Steps and strength of a level by its shorter side, of models with one text tower and with two, as released."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefineOptions:
    """Choices of coarse to fine; tuples have an entry for each level, one entry holds for all, and empty ones are the
    published numbers by size."""

    steps: tuple[int, ...] = ()
    strengths: tuple[float, ...] = ()
    """Part of the steps that are run, (0, 1]: how much of a level is drawn anew."""
    blur: float = 1.0
    """Deviation, in latents, of the blur before the dilated call."""
    pieces: int = 16
    """Runs of tokens that feed-forwards and attentions to the text take one after another."""
    skips_on_host: bool = False
    """Whether the maps that the way up of the U-Net needs wait in the memory of the host."""
    tile: int | None = None
    """Side in pixels of the autoencoder's tiles; the size that the model was trained on by default."""

    def __post_init__(self) -> None:
        for name in ("steps", "strengths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if any(type(steps) is not int or steps < 1 for steps in self.steps):
            raise ConfigError(f"--refine.steps must be 1 or more, found {self.steps}")
        if any(not 0 < strength <= 1 for strength in self.strengths):
            raise ConfigError(f"--refine.strengths must be in (0, 1], found {self.strengths}")
        if not self.blur > 0:
            raise ConfigError(f"--refine.blur must be greater than 0, found {self.blur:g}")
        if type(self.pieces) is not int or self.pieces < 1:
            raise ConfigError(f"--refine.pieces must be 1 or more, found {self.pieces}")


class Level(NamedTuple):
    """One doubling: the size in pixels that it reaches, and how it is refined there."""

    size: tuple[int, int]
    steps: int
    strength: float


class Stage(NamedTuple):
    """Memory of one part of the work, in bytes, by the compiler."""

    name: str
    weights: int
    working: int
    """Beside the weights: inputs, outputs and temporary memory of its largest program."""
    host: int = 0
    """Taken on the host meanwhile: skip tensors, rows of tiles."""

    @property
    def together(self) -> int:
        return self.weights + self.working


def make_levels(
    size: tuple[int, int], trained: int, factor: int, options: RefineOptions, towers: int
) -> tuple[tuple[int, int], tuple[Level, ...]]:
    """(size that is drawn from noise, the levels from there to `size`): at first no more pixels than the square
    `trained` has. Raises ConfigError for sizes that cannot be halved so often, and options of another number of levels.
    """
    height, width = size
    count = 1
    while height * width > trained**2 * RATIO ** (2 * count):
        count += 1
    multiple = factor * RATIO**count
    if height % multiple or width % multiple:
        raise ConfigError(
            f"--size must be multiples of {multiple} to be drawn in {count} doublings, found {height} {width}"
        )

    def entry(values: Sequence, i: int, name: str, published: float) -> Any:
        if len(values) not in (0, 1, count):
            raise ConfigError(
                f"--refine.{name} must have an entry for all, or one for each of {count} levels, found {len(values)}"
            )
        return published if not values else values[i if len(values) > 1 else 0]

    levels = []
    for i in range(count):
        reached = tuple(side // RATIO ** (count - 1 - i) for side in size)
        steps, strength = _published(reached, towers)
        levels.append(
            Level(reached, entry(options.steps, i, "steps", steps), entry(options.strengths, i, "strengths", strength))
        )
    return (height // RATIO**count, width // RATIO**count), tuple(levels)


def _published(size: tuple[int, int], towers: int) -> tuple[int, float]:
    table = PUBLISHED[towers]
    side = 2 ** round(math.log2(min(size)))
    return table[min(max(side, min(table)), max(table))]


class Refinement:
    """`refinement(prompt, image, number)` is the image `image`, refined through all levels."""

    def __init__(
        self,
        model: Model,
        settings: Settings,
        levels: tuple[Level, ...],
        options: RefineOptions,
        *,
        seed: int,
        tile: int,
        device: jax.Device,
    ):
        """Compiles everything; `settings` are those of sampler and guidance, `tile` the side of a tile in latents.

        Raises ConfigError as `coarse_to_fine.rows`.
        """
        self._model, self._settings, self._levels, self._options = model, settings, levels, options
        self._device, self._where = device, SingleDeviceSharding(device)
        self._seed, self._sampler = seeds.words(seed), STABLE_DIFFUSION_SAMPLERS[settings.sampler]
        self._rows = [
            coarse_to_fine.rows(self._sampler, settings.scheduler, level.steps, level.strength) for level in levels
        ]
        self._params = network_params(model)
        self._vae = TiledAutoencoder(model.autoencoder, model.autoencoder_config, tile, device)
        self._null = null_condition(model.texts, settings.negative, zero=model.empty_is_zero)
        self._calls = {
            (i, dilated): self._compile(level, dilated) for i, level in enumerate(levels) for dilated in (False, True)
        }

    @property
    def calls(self) -> int:
        """Calls of the U-Net for an image."""
        return sum(self._calls_a_step * len(rows.time) for rows in self._rows)

    @property
    def _calls_a_step(self) -> int:
        return 2 * (1 if self._settings.guidance == 1.0 else 2)

    def plan(self) -> list[Stage]:
        """Memory of each stage."""
        network = sum(value.nbytes for part in self._params.values() for value in part.values())
        stages = []
        for i, level in enumerate(self._levels):
            found = [self._calls[i, dilated].memory_analysis() for dilated in (False, True)]
            latents = 4 * math.prod(self._latent_shape(level))
            name = f"{'x'.join(map(str, level.size))}: {len(self._rows[i].time)} of {level.steps} steps"
            working = max(
                one.argument_size_in_bytes + one.temp_size_in_bytes + one.output_size_in_bytes for one in found
            )
            host = max(one.host_temp_size_in_bytes for one in found)
            stages.append(Stage(name, network, working - network + _KEPT * latents, host))
        weights = sum(value.nbytes for value in self._model.autoencoder.values())
        size = self._latent_shape(self._levels[-1])[:2]
        for name, one in self._vae.memory(*size).items():
            working = one.argument_size_in_bytes + one.temp_size_in_bytes + one.output_size_in_bytes - weights
            scores = 4 * math.prod(min(side, self._vae.tile) for side in size) ** 2
            if one.temp_size_in_bytes < scores:
                working += scores  # on a CPU a library computes attention in memory of its own
            row = 3 * 4 * self._model.autoencoder_config.factor**2 * min(size[0], self._vae.tile) * size[1]
            host = 2 * row if name == "decode" else 0
            stages.append(Stage(f"{name[:-1]}ing a tile of the autoencoder", weights, working, host))
        return stages

    def __call__(
        self, prompt: str, image: UInt8[np.ndarray, "h w 3"], number: int, called: Callable[[], Any] = lambda: None
    ) -> UInt8[np.ndarray, "H W 3"]:
        """The image enlarged from `image`; `number` is its number in the seed, whose noise it takes, and `called` is
        called after each call of the U-Net."""
        condition = condition_of(self._model.texts, [prompt])
        for i, level in enumerate(self._levels):
            image = self._refined(i, condition, enlarged(image, level.size), number, called)
        return image

    def _refined(
        self,
        i: int,
        condition: dict[str, np.ndarray],
        image: UInt8[np.ndarray, "H W 3"],
        number: int,
        called: Callable[[], Any],
    ) -> UInt8[np.ndarray, "H W 3"]:
        """`image`, as large as level i, refined there."""
        z0 = self._vae.encode(image)
        noise = start_noise(self._seed, np.array([number], np.uint32), z0.shape, draw=i + 1)
        params = jax.device_put(self._params, self._device)
        put = functools.partial(jax.device_put, device=self._device)
        conditions = [put(condition), put({name: value[None] for name, value in self._null.items()})]

        def predict(x: Float[Array, "1 h w D"], time: float, dilated: bool) -> Float[Array, "1 h w D"]:
            outputs = []
            for one in conditions[: self._calls_a_step // 2]:
                outputs.append(self._calls[i, dilated](params, x, np.float32(time), one).block_until_ready())
                called()
            settings = self._settings
            return outputs[0] if len(outputs) == 1 else _guided(*outputs, settings.guidance, settings.guidance_rescale)

        latents = coarse_to_fine.refine(
            self._sampler,
            self._settings.scheduler,
            self._rows[i],
            predict,
            put(z0[None]),
            put(noise),
            ratio=RATIO,
            sigma=self._options.blur,
        )
        latents = np.asarray(latents[0])
        del params, conditions  # the autoencoder has the device for itself
        return self._vae.decode(latents)

    def _latent_shape(self, level: Level) -> tuple[int, int, int]:
        height, width = (side // self._model.autoencoder_config.factor for side in level.size)
        return height, width, self._model.unet_config.in_channels

    def _compile(self, level: Level, dilated: bool) -> Any:
        model, options = self._model, self._options
        dtype = model.unet["conv_in.weight"].dtype
        execution = Execution(
            dilation=RATIO if dilated else 1, pieces=options.pieces, skips_on_host=options.skips_on_host
        )
        sizes = jnp.array([[*level.size, 0, 0, *level.size]], jnp.float32)

        def call(params, x, time, condition):
            added = unet.Added(condition["pooled"], sizes) if "pooled" in condition else None
            output = unet.apply(
                params["unet"], model.unet_config, x.astype(dtype), time[None], condition["context"], added,
                attend=attend_of(dtype), mixer=network_mixer(model, params, CHANNELS), execution=execution,
            )  # fmt: skip
            return output.astype(jnp.float32)

        def spec(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=self._where)

        params = jax.tree.map(lambda value: spec(value.shape, value.dtype), self._params)
        condition = {name: spec((1, *value.shape), value.dtype) for name, value in self._null.items()}
        x = spec((1, *self._latent_shape(level)), jnp.float32)
        return jax.jit(call).lower(params, x, spec((), jnp.float32), condition).compile()


_KEPT = 6
"""Maps of latents beside those of a call: the image's, its noise, the state, blurred, and predictions."""

_guided = jax.jit(guide, static_argnums=(2, 3))


def enlarged(image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """`image` at `size` (height, width), bicubic."""
    height, width = size
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def describe(stages: Sequence[Stage], size: tuple[int, int]) -> str:
    """The plan as a table of GB on the device, and what the host holds beside the weights."""
    width = max(len(stage.name) for stage in stages)
    lines = [f"memory planned, GB (1e9 bytes) on one device{'':{max(0, width - 44)}}  weights  working  together"]
    for stage in stages:
        host = f"  and {stage.host / 1e9:.3g} on the host" if stage.host else ""
        numbers = "  ".join(f"{value / 1e9:7.2f}" for value in (stage.weights, stage.working, stage.together))
        lines.append(f"{stage.name:{max(width, 44)}}  {numbers}{host}")
    pixels = 3 * size[0] * size[1]
    lines.append(
        f"the most is {max(stage.together for stage in stages) / 1e9:.2f}; the host holds all weights, and "
        f"{2 * pixels / 1e9:.2f} of images"
    )
    return "\n".join(lines)
