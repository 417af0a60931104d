"""Prompts to images over a mesh: text towers, a sampler around the U-Net, the autoencoder; one batch at a time."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from gspn_jax import autoencoder, unet
from gspn_jax.config import ConfigError
from gspn_jax.diffusion import stable_diffusion
from gspn_jax.diffusion.scheduler_config import SchedulerConfig
from gspn_jax.kernels import sharded
from gspn_jax.models.attention import attention
from gspn_jax.models.parameters import cast
from gspn_jax.parallel import sharding
from gspn_jax.parallel.memory import check_fits
from gspn_jax.sampling import seeds
from gspn_jax.sampling.decoding import DECODED_AT_A_TIME, DECODED_PIXELS
from gspn_jax.tables import STABLE_DIFFUSION_SAMPLERS
from gspn_jax.text_to_image import gspn_layers
from gspn_jax.text_to_image.conditions import condition_of, null_condition
from gspn_jax.text_to_image.folder import Model

log = logging.getLogger(__name__)

SAMPLERS = {
    "EulerDiscreteScheduler": "euler",
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "DPMSolverMultistepScheduler": "dpm++",
}
"""Classes that a `scheduler_config.json` names, and the sampler that each is here."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Choices that decide an image beside its prompt, the seed and its number."""

    size: tuple[int, int]
    """Height and width in pixels."""
    steps: int
    guidance: float
    guidance_rescale: float
    sampler: str
    scheduler: SchedulerConfig
    negative: str | None = None
    """None is the model's own: an empty text, or for SDXL states of zeros."""


class Drawing:
    """`drawing.decode(drawing.latents(prompts, numbers))` are images; draw in a `with` statement, which has the bar.

    The image of a seed, a number and a prompt does not depend on what else is in the batch, or on the mesh, beyond
    rounding. At most `batch_size` images are in memory, and for the decoder no more than a fixed number of pixels.
    """

    def __init__(self, model: Model, settings: Settings, mesh: Mesh, *, seed: int, batch_size: int, total: int):
        """Compiles for batches of `batch_size`, rounded up to a multiple of the devices; `total` is for the bar.

        Raises ConfigError for a size that the model does not take, for settings that its sampler does not, and for
        weights and a batch that a device cannot hold.
        """
        seeds.check(seed, total)
        self._model, self.settings, self._mesh = model, settings, mesh
        self._devices = mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch_size = -(-batch_size // self._devices) * self._devices
        self._sampler = STABLE_DIFFUSION_SAMPLERS[settings.sampler]
        table = stable_diffusion.make_table(self._sampler, settings.scheduler, settings.steps)
        self._evaluations, self._batches, self._total = len(table.time), 0, -(-total // self.batch_size)
        self._latent_size = _latent_size(model, settings.size)
        self._check_memory()
        height, width = settings.size
        at_a_time = max(1, min(DECODED_AT_A_TIME, DECODED_PIXELS // (height * width)))
        device = mesh.local_devices[0]
        self._texts = tuple(part._replace(params=jax.device_put(dict(part.params), device)) for part in model.texts)
        self._vae = autoencoder.Autoencoder(model.autoencoder, model.autoencoder_config, batch_size=at_a_time)
        self._seed = self._everywhere(seeds.words(seed))
        self._params = jax.tree.map(self._everywhere, network_params(model))
        self._null = self._encode_null()
        self._gather = jax.jit(lambda latents: latents, out_shardings=sharding.replicated(mesh))
        self._draw = self._compile()

    def _everywhere(self, value: np.ndarray) -> jax.Array:
        whole = sharding.replicated(self._mesh)
        return jax.make_array_from_callback(value.shape, whole, lambda index: value[index])

    def _encode_null(self) -> dict[str, jax.Array]:
        """The states of the negative prompt, which guidance leads away from."""
        found = null_condition(self._texts, self.settings.negative, zero=self._model.empty_is_zero)
        return {name: self._everywhere(value) for name, value in found.items()}

    def _compile(self):
        """The program that draws a batch of latents, compiled; says what it takes."""
        model, settings = self._model, self.settings
        shape = (*self._latent_size, model.unet_config.in_channels)
        dtype = model.unet["conv_in.weight"].dtype
        sizes = jnp.array([*settings.size, 0, 0, *settings.size], jnp.float32)

        def draw(params, condition, null, numbers, seed):
            def denoise(x, time, condition):
                added = None
                if "pooled" in condition:
                    added = unet.Added(condition["pooled"], jnp.broadcast_to(sizes, (len(x), 6)))
                mixer = network_mixer(model, params)
                output = unet.apply(
                    params["unet"], model.unet_config, x.astype(dtype), time, condition["context"], added,
                    attend=attend_of(dtype), mixer=mixer,
                )  # fmt: skip
                return output.astype(jnp.float32)

            return stable_diffusion.sample(
                self._sampler,
                settings.scheduler,
                settings.steps,
                denoise,
                start_noise(seed, numbers, shape),
                condition,
                null=null,
                guidance=settings.guidance,
                rescale=settings.guidance_rescale,
                progress=self._progress,
            )

        split = sharding.batch_sharding(self._mesh)
        condition = {
            name: jax.ShapeDtypeStruct((self.batch_size, *value.shape), value.dtype, sharding=split)
            for name, value in self._null.items()
        }
        numbers = jax.ShapeDtypeStruct((self.batch_size,), np.uint32, sharding=split)
        with sharded(self._mesh, batch=sharding.BATCH_AXES):
            lowered = jax.jit(draw, out_shardings=split).lower(self._params, condition, self._null, numbers, self._seed)
        compiled = lowered.compile()
        needed = compiled.memory_analysis()
        if needed is not None:
            log.info(
                "%d images of %dx%d at a time on %d devices: each holds %.3g GB of the U-Net and takes %.3g GB more "
                "while it draws",
                self.batch_size,
                *settings.size,
                self._devices,
                _bytes(self._params["unet"] | self._params["gspn"]) / 1e9,
                needed.temp_size_in_bytes / 1e9,
            )
        return compiled

    def _check_memory(self) -> None:
        """Raises ConfigError for weights and the attention scores of the finest transformer that a device cannot hold
        together; of a U-Net with GSPN there are only those of the text."""
        model, (height, width) = self._model, self._latent_size
        level = next(
            (i for i, depth in enumerate(model.unet_config.depths) if depth), len(model.unet_config.depths) - 1
        )
        tokens = -(-height // 2**level) * -(-width // 2**level)
        images = self.batch_size // self._devices * (1 if self.settings.guidance == 1.0 else 2)
        seen = tokens if model.gspn is None else model.texts[0].tokenizer.length
        scores = 4 * images * model.unet_config.heads[level] * tokens * seen
        network = network_params(model)
        weights = sum(map(_bytes, (*network.values(), *(part.params for part in model.texts), model.autoencoder)))
        check_fits(
            weights + scores,
            self._mesh,
            f"the weights and the attention of {self.batch_size} images of {'x'.join(map(str, self.settings.size))}",
            "a smaller --batch-size or --size takes less",
        )

    def __enter__(self) -> "Drawing":
        self._bar = tqdm(
            unit="evaluation",
            desc="drawing",
            dynamic_ncols=True,
            total=self._evaluations * self._total,
            disable=jax.process_index() > 0,
        )
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def _progress(self, evaluations: int, total: int) -> None:  # called from the device's thread, in any order
        self._bar.update(max(0, self._batches * total + evaluations - self._bar.n))

    def latents(self, prompts: Sequence[str], numbers: Sequence[int]) -> Float[np.ndarray, "N h w D"]:
        """Latents of up to `batch_size` prompts in the U-Net's scale; numbers[i] is that of image i in its seed.

        Every host must call it with the same prompts. Raises ConfigError for latents that are not finite.
        """
        count = len(prompts)
        padded = [*prompts, *[prompts[-1]] * (self.batch_size - count)]
        split = sharding.batch_sharding(self._mesh)
        condition = {
            name: jax.make_array_from_callback(value.shape, split, lambda index, value=value: value[index])
            for name, value in condition_of(self._texts, padded).items()
        }
        all_numbers = np.resize(np.asarray(numbers, np.uint32), self.batch_size)
        placed = jax.make_array_from_callback(all_numbers.shape, split, lambda index: all_numbers[index])
        drawn = self._gather(self._draw(self._params, condition, self._null, placed, self._seed))
        latents = np.asarray(drawn.addressable_data(0))[:count]
        jax.effects_barrier()  # the bar has all of its calls
        self._batches += 1
        self._bar.update(max(0, self._batches * self._evaluations - self._bar.n))
        check_finite(latents, numbers)
        return latents

    def decode(self, latents: Float[np.ndarray, "N h w D"]) -> UInt8[np.ndarray, "N H W 3"]:
        """Images of latents, on the devices of this host alone."""
        return self._vae.decode(latents)


def check_finite(latents: Float[np.ndarray, "N h w D"], numbers: Sequence[int]) -> None:
    """Raises ConfigError naming the first image that has no finite latents, as float16 may leave them."""
    for number, latent in zip(numbers, latents, strict=True):
        if not np.isfinite(latent).all():
            raise ConfigError(
                f"image {number} must have finite latents, found NaN or infinity: --dtype float32 or bfloat16 has a "
                "larger range than float16"
            )


def network_params(model: Model) -> dict[str, dict[str, Any]]:
    """Weights of the U-Net as `draw` reads them: with GSPN without the self-attentions that it replaces, and the layers
    in the type of the rest."""
    if model.gspn is None:
        return {"unet": dict(model.unet), "gspn": {}}
    dtype = model.unet["conv_in.weight"].dtype
    own = gspn_layers.shapes(model.unet_config, model.gspn.options)
    layers = {name: np.asarray(model.gspn.params[name]) for name in own}
    rest = {name: value for name, value in model.unet.items() if ".attn1." not in name}
    return {"unet": rest, "gspn": cast(layers, own, dtype)}


def network_mixer(model: Model, params: dict[str, dict[str, Any]], channels: int | None = None) -> unet.Mixer | None:
    """Mixer of a U-Net whose weights are those of `network_params`; None is its own self-attention. `channels` are
    scanned at a time, None for all."""
    if model.gspn is None:
        return None
    return gspn_layers.mixer(params["gspn"], model.unet_config, model.gspn.options, channels=channels)


def attend_of(dtype: DTypeLike) -> unet.Attend:
    """Attention of a U-Net that computes in `dtype`: of half precision flash attention where it can run."""
    return attention if jnp.dtype(dtype).itemsize == 2 else unet.attention


def start_noise(seed, numbers, shape: tuple[int, int, int], draw: int = 0) -> Float[Array, "N h w D"]:
    """Noise of image `numbers[i]` of a seed (`sampling.seeds`): what it begins with, or that of another `draw`."""
    keys = seeds.image_keys(seed, numbers)
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, draw), shape, jnp.float32))(keys)


def scheduler_of(model: Model, **changes: Any) -> SchedulerConfig:
    """Scheduler of the folder, with those of `changes` that are not None.

    As diffusers' pipeline of Stable Diffusion 1 and 2 does, steps_offset is taken for 1 there whatever the file says.
    """
    found = SchedulerConfig.from_json(model.scheduler)
    if len(model.texts) == 1:
        changes["steps_offset"] = 1
    return dataclasses.replace(found, **{name: value for name, value in changes.items() if value is not None})


def sampler_of(model: Model) -> str:
    """The sampler that the folder names. Raises ConfigError for one that is not built here."""
    name = model.scheduler.get("_class_name")
    if not isinstance(name, str) or name not in SAMPLERS:
        raise ConfigError(
            f"--sampler must be given, one of {', '.join(STABLE_DIFFUSION_SAMPLERS)}, as the model's scheduler is none "
            f"of them, found {name!r}"
        )
    return SAMPLERS[name]


def _latent_size(model: Model, size: tuple[int, int]) -> tuple[int, int]:
    factor = model.autoencoder_config.factor
    if min(size) < 1 or any(side % factor for side in size):
        raise ConfigError(f"--size must be multiples of {factor}, found {size[0]} {size[1]}")
    return size[0] // factor, size[1] // factor


def _bytes(params) -> int:
    return sum(value.nbytes for value in params.values())
