"""The command: flags, prompts, and the files that images are written to with what they were made with."""

import contextlib
import dataclasses
import json
import logging
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image, PngImagePlugin
from tqdm import tqdm

import gspn_jax
from gspn_jax.config import ConfigError, MeshConfig, check_numbers
from gspn_jax.diffusion.scheduler_config import Spacing
from gspn_jax.files import claim_new, replacing
from gspn_jax.parallel import sharding
from gspn_jax.parallel.agreement import on_first_host
from gspn_jax.parallel.memory import check_fits
from gspn_jax.runs import same_hosts
from gspn_jax.runs.digest import digest_of
from gspn_jax.sampling import seeds
from gspn_jax.tables import STABLE_DIFFUSION_SAMPLERS
from gspn_jax.tensor_files import errors_name, read_json
from gspn_jax.text_to_image import gspn_layers, high_resolution, layer_files
from gspn_jax.text_to_image.drawing import Drawing, Settings, sampler_of, scheduler_of
from gspn_jax.text_to_image.folder import Model, load_folder, unet_digest
from gspn_jax.text_to_image.gspn_layers import LayerOptions, Layers
from gspn_jax.text_to_image.high_resolution import RefineOptions

log = logging.getLogger(__name__)

GUIDANCE = {1: 7.5, 2: 5.0}
"""By the number of text towers, as diffusers' pipelines of Stable Diffusion and SDXL."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of what is drawn."""

    model: str
    """Folder of Stable Diffusion 1, 2 or SDXL, as diffusers writes it."""
    prompt: tuple[str, ...] = ()
    """Text to draw; several are drawn one after another."""
    prompts: str | None = None
    """A text file of prompts, one a line."""
    negative: str | None = None
    """The text that guidance leads away from; by default an empty text, for SDXL nothing."""
    output: str
    """A .png that is not there yet; of several images NAME_0.png, NAME_1.png, ..."""
    images: int = 1
    """Images of each prompt."""
    size: tuple[int, int] | None = None
    """Height and width in pixels, multiples of 8; the size trained on by default."""
    steps: int = 50
    guidance: float | None = None
    """1 is none; 7.5 by default, 5 for SDXL."""
    guidance_rescale: float = 0.0
    """How far guided predictions get the deviation of conditional ones, 0 to 1; 0.7 for models of zero terminal SNR."""
    sampler: str | None = None
    """euler, ddim, pndm or dpm++; the model's own by default."""
    spacing: Spacing | None = None
    """Spacing of timesteps; the model's own by default."""
    karras: bool = False
    """Noise levels of Karras et al. (euler and dpm++), also where the model's folder does not say so."""
    seed: int = 0
    """Up to 2**64-1: the noise of image i comes from the seed and i."""
    batch_size: int = 1
    """Images at a time, over all devices."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the U-Net and the text towers; that of the files by default. The autoencoder is float32."""
    mixer: Literal["attention", "gspn"] = "attention"
    """gspn replaces the U-Net's self-attentions by GSPN layers."""
    gspn_layers: str | None = None
    """A .safetensors file of GSPN layers that were trained for this model; without it they are untrained."""
    gspn: LayerOptions = LayerOptions()
    """Form of untrained layers; those of a file are what it says."""
    coarse_to_fine: bool | None = None
    """Draw at a size trained on, then double the image and refine it until --size; by default from four times the
    pixels trained on. One image at a time, on one device."""
    refine: RefineOptions = RefineOptions()
    """Settings of coarse to fine."""
    mesh: MeshConfig = MeshConfig()
    """Images are split over mesh.data and mesh.fsdp; weights are whole on every device."""

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("images", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more, found {getattr(self, name)}")
        seeds.check(self.seed)
        if bool(self.prompt) == bool(self.prompts):
            found = "both" if self.prompt else "neither"
            raise ConfigError(f"--prompt or --prompts FILE must say what to draw, found {found}")
        for flag, texts in (("--prompt", self.prompt), ("--negative", (self.negative or "",))):
            for text in texts:
                _check_unicode(flag, text)
        if self.guidance is not None and self.guidance < 0:
            raise ConfigError(f"--guidance must be 0 or more, found {self.guidance:g}")
        if not 0 <= self.guidance_rescale <= 1:
            raise ConfigError(f"--guidance-rescale must be in [0, 1], found {self.guidance_rescale:g}")
        if self.sampler not in (*STABLE_DIFFUSION_SAMPLERS, None):
            names = ", ".join(STABLE_DIFFUSION_SAMPLERS)
            raise ConfigError(f"--sampler must be one of {names}, found {self.sampler!r}")
        if self.karras and self.sampler is not None and not STABLE_DIFFUSION_SAMPLERS[self.sampler].takes_karras:
            raise ConfigError(f"--karras is for the samplers euler and dpm++, found {self.sampler}")
        if self.size is not None and (min(self.size) < 8 or any(side % 2 for side in self.size)):
            raise ConfigError(f"--size must be multiples of 8, found {self.size[0]} {self.size[1]}")
        if self.gspn_layers is not None and self.mixer != "gspn":
            raise ConfigError(f"--gspn-layers is for --mixer gspn, found --mixer {self.mixer}")
        if self.gspn_layers is not None and self.gspn != LayerOptions():
            raise ConfigError("--gspn.* are for untrained layers, as a file of --gspn-layers says its own, found both")
        if pathlib.Path(self.output).suffix != ".png":
            raise ConfigError(f"--output must end in .png, found {self.output!r}")


def _check_unicode(flag: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of a command line that are no text
        raise ConfigError(f"{flag} must be valid Unicode, found {text!r}") from error


def run(arguments: Arguments) -> list[pathlib.Path]:
    """Draws all images; returns the files written, on the first host."""
    same_hosts.check_flags(arguments)
    same_hosts.check_files(
        {"--model": arguments.model, "--prompts": arguments.prompts, "--gspn-layers": arguments.gspn_layers}
    )
    prompts = [prompt for prompt in _prompts(arguments) for _ in range(arguments.images)]
    seeds.check(arguments.seed, len(prompts))
    paths = _paths(pathlib.Path(arguments.output), len(prompts))
    with contextlib.ExitStack() as stack:
        on_first_host(lambda: _claim(stack, arguments, paths), ConfigError)
        model = load_folder(arguments.model, arguments.dtype)
        if arguments.mixer == "gspn":
            model = model._replace(gspn=read_layers(arguments, model))
        settings = _settings(arguments, model)
        refined = _is_refined(arguments, model, settings.size)
        made = _described(arguments, settings, model)
        draw = _refined_images if refined else _images
        for i, image, more in draw(arguments, model, settings, prompts):
            _write(paths[i], image, made | more | {"prompt": prompts[i], "number": i})
    if jax.process_index():
        return []
    print(f"{len(paths)} images in {paths[0]}" + (f" to {paths[-1].name}" if len(paths) > 1 else ""))
    return paths


Drawn = Iterator[tuple[int, UInt8[np.ndarray, "H W 3"], dict[str, Any]]]
"""Number of an image, itself, and what more is to be said of it; on the first host."""


def _images(arguments: Arguments, model: Model, settings: Settings, prompts: list[str]) -> Drawn:
    """Images in one pass, a batch at a time over the mesh."""
    batch_size, mesh = min(arguments.batch_size, len(prompts)), sharding.make_mesh(arguments.mesh)
    with Drawing(model, settings, mesh, seed=arguments.seed, batch_size=batch_size, total=len(prompts)) as drawing:
        for start in range(0, len(prompts), drawing.batch_size):
            batch = range(start, min(start + drawing.batch_size, len(prompts)))
            latents = drawing.latents([prompts[i] for i in batch], batch)
            if jax.process_index() == 0:
                for i, image in zip(batch, drawing.decode(latents), strict=True):
                    yield i, image, {}


def _refined_images(arguments: Arguments, model: Model, settings: Settings, prompts: list[str]) -> Drawn:
    """Images coarse to fine, one at a time on one device: first by the model's own attention at a size that it knows,
    then doubled and refined. Prints the plan of memory before anything is drawn."""
    if jax.process_count() > 1:
        raise ConfigError("coarse to fine must run on one host, one image at a time, found several")
    device, trained = jax.local_devices()[0], _trained_size(arguments, model)
    mesh, factor = sharding.make_mesh(MeshConfig(), [device]), model.autoencoder_config.factor
    first, levels = high_resolution.make_levels(settings.size, trained, factor, arguments.refine, len(model.texts))
    refinement = high_resolution.Refinement(
        model,
        settings,
        levels,
        arguments.refine,
        seed=arguments.seed,
        tile=(arguments.refine.tile or trained) // factor,
        device=device,
    )
    stages = refinement.plan()
    print(high_resolution.describe(stages, settings.size), flush=True)
    most = max(stage.together for stage in stages)
    check_fits(most, mesh, f"an image of {'x'.join(map(str, settings.size))}", "a smaller --size takes less")
    small = dataclasses.replace(settings, size=first)
    with Drawing(
        model._replace(gspn=None), small, mesh, seed=arguments.seed, batch_size=1, total=len(prompts)
    ) as drawing:
        images = [drawing.decode(drawing.latents([prompt], [i]))[0] for i, prompt in enumerate(prompts)]
    del drawing  # the device is free for the levels
    more = {"drawn_at": list(first), "levels": [level._asdict() for level in levels], "blur": arguments.refine.blur}
    with tqdm(unit="evaluation", desc="refining", dynamic_ncols=True, total=refinement.calls * len(prompts)) as bar:
        for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            yield i, refinement(prompt, image, i, bar.update), more


def _is_refined(arguments: Arguments, model: Model, size: tuple[int, int]) -> bool:
    """Whether images are drawn coarse to fine: as asked, or else from four times the pixels trained on."""
    if arguments.coarse_to_fine is not None:
        return arguments.coarse_to_fine
    trained = _sample_size(arguments)
    if not isinstance(trained, int):
        return False
    found = size[0] * size[1] >= 4 * (trained * model.autoencoder_config.factor) ** 2
    if found:
        log.info("coarse to fine, as the size has four times the pixels that the model was trained on, or more")
    return found


def _sample_size(arguments: Arguments) -> Any:
    return read_json(pathlib.Path(arguments.model) / "unet" / "config.json").get("sample_size")


def _trained_size(arguments: Arguments, model: Model) -> int:
    """Side in pixels that the U-Net was trained on."""
    trained = _sample_size(arguments)
    if not isinstance(trained, int) or trained < 1:
        raise ConfigError(f"--size must be given, as the U-Net's sample_size is not a number, found {trained!r}")
    return trained * model.autoencoder_config.factor


def _prompts(arguments: Arguments) -> list[str]:
    """Raises ConfigError for a file that is no text, or has none."""
    if arguments.prompts is None:
        return list(arguments.prompt)
    if pathlib.Path(arguments.prompts).exists() and not pathlib.Path(arguments.prompts).is_file():
        raise ConfigError(f"--prompts must be a text file, found a folder, pipe or device at {arguments.prompts}")
    try:
        lines = pathlib.Path(arguments.prompts).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--prompts must be a text file in UTF-8, found other bytes in {arguments.prompts}"
        ) from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ConfigError(f"--prompts must be a file with a prompt on each line, found none in {arguments.prompts}")
    return found


def _paths(output: pathlib.Path, count: int) -> list[pathlib.Path]:
    return [output] if count == 1 else [output.with_stem(f"{output.stem}_{i}") for i in range(count)]


def _claim(stack: contextlib.ExitStack, arguments: Arguments, paths: list[pathlib.Path]) -> None:
    """Claims `--output`, which stands for all images of the call. Raises ConfigError where one is there."""
    stack.enter_context(claim_new(pathlib.Path(arguments.output)))
    for path in paths:
        if path.exists() or path.is_symlink():
            raise ConfigError(f"{path} exists already: choose another --output, or delete it")


def _settings(arguments: Arguments, model: Model) -> Settings:
    size = arguments.size
    if size is None:
        size = (_trained_size(arguments, model),) * 2
    sampler = arguments.sampler or sampler_of(model)
    if arguments.karras and not STABLE_DIFFUSION_SAMPLERS[sampler].takes_karras:
        raise ConfigError(f"--karras is for the samplers euler and dpm++, found {sampler}")
    with errors_name(pathlib.Path(arguments.model) / "scheduler"):
        scheduler = scheduler_of(model, spacing=arguments.spacing, karras=arguments.karras or None)
    return Settings(
        size=size,
        steps=arguments.steps,
        guidance=GUIDANCE[len(model.texts)] if arguments.guidance is None else arguments.guidance,
        guidance_rescale=arguments.guidance_rescale,
        sampler=sampler,
        scheduler=scheduler,
        negative=arguments.negative,
    )


def read_layers(arguments: Arguments, model: Model) -> Layers:
    """Layers of the file; without one, fresh ones that start from the model's own attentions, with a warning."""
    if arguments.gspn_layers is not None:
        layers = layer_files.load(arguments.gspn_layers, model.unet_config)
        trained_for = layers.about.get("unet_sha256")
        if trained_for not in (None, found := unet_digest(arguments.model)):
            log.warning(
                "the GSPN layers of %s were distilled from a U-Net of another file (%.12s, found %.12s in %s): for the "
                "same weights in another type that is nothing, for a relative of it they may do, for another they draw "
                "noise",
                arguments.gspn_layers, trained_for, found, arguments.model,
            )  # fmt: skip
        return layers
    log.warning(
        "the GSPN layers are untrained: what is drawn is noise until --gspn-layers names some that were distilled from "
        "this model"
    )
    fresh = jax.jit(gspn_layers.init, static_argnums=(0, 1))(model.unet_config, arguments.gspn, jax.random.key(0))
    started = gspn_layers.started_from(fresh, model.unet)
    return Layers({name: np.asarray(value) for name, value in started.items()}, arguments.gspn)


def _described(arguments: Arguments, settings: Settings, model: Model) -> dict[str, Any]:
    """What decides an image beside its prompt and number, as JSON values. Every host has a part in it."""
    weights: dict[str, Any] = {
        "unet": dict(model.unet),
        "texts": [dict(part.params) for part in model.texts],
        "autoencoder": dict(model.autoencoder),
    }
    gspn = {}
    if model.gspn is not None:
        weights["gspn"] = dict(model.gspn.params)
        gspn = dataclasses.asdict(model.gspn.options) | {"layers": arguments.gspn_layers or "untrained"}
    return {
        "mixer": arguments.mixer,
        **({"gspn": gspn} if gspn else {}),
        "negative": settings.negative,
        "seed": arguments.seed,
        "noise": seeds.RULE,
        "sampler": settings.sampler,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "guidance_rescale": settings.guidance_rescale,
        "scheduler": dataclasses.asdict(settings.scheduler),
        "size": list(settings.size),
        "model": str(arguments.model),
        "model_sha256": digest_of(weights, weights),
        "version": f"gspn-jax {gspn_jax.__version__}",
    }


def _write(path: pathlib.Path, image: UInt8[np.ndarray, "H W 3"], made: dict[str, Any]) -> None:
    """A PNG with an entry of text for each of `made`; texts are as they are, all else JSON."""
    info = PngImagePlugin.PngInfo()
    for name, value in made.items():
        info.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
    with replacing(path, new=True) as temporary:
        Image.fromarray(image).save(temporary, "png", pnginfo=info)
