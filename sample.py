"""Samples a checkpoint.

python sample.py --run runs/digits --classes 0 1 2                         a labelled grid, RUN/grid_0.png
python sample.py --run runs/digits --num-samples 50000 --output s.npz      an .npz of the ADM layout; resumable
python sample.py --run runs/gspn_xl_2 --vae VAE.safetensors                a run on latents, decoded to images
python sample.py --run runs/digits --help                                  every flag with its value
"""

import argparse
import dataclasses
import itertools
import pathlib
import sys
from typing import Literal

from gspn_jax import cli
from gspn_jax.config import Config, ConfigError, MeshConfig, SamplerConfig

DECODED_AT_A_TIME = 16
"""Bounds the memory of decoding, which at 256 pixels is more than that of sampling."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to draw from a run."""

    run: str
    """The run directory that train_dit.py wrote."""
    step: int | None = None
    """The checkpoint; the latest by default."""
    ema: float | None = None
    """The EMA decay to sample from: the first of the run by default; 0 is the parameters themselves."""
    output: str | None = None
    """Where to write; in the run directory by default: grid_0.png, grid_1.png, ... or samples.npz for --num-samples.
    A file that exists is never overwritten."""
    classes: tuple[str, ...] = ()
    """Classes of the grid by number or name; the first ten by default."""
    per_class: int = 8
    """Images of each class in the grid."""
    num_samples: int = 0
    """Draw this many images into an .npz instead of a grid."""
    labels: Literal["random", "balanced"] = "random"
    """Labels of --num-samples: uniform at random, as published numbers use, or equally many of each in turn."""
    seed: int = 0
    """Image i is drawn from seed + i."""
    batch_size: int = 64
    """Images at a time, over all devices."""
    image_size: tuple[int, int] | None = None
    """Height and width, of the latents where those were trained on; the size trained on by default."""
    vae: str | None = None
    """Weights of the autoencoder (.safetensors or .bin) that decodes what a run on latents draws; without it a grid
    shows the first three latent channels."""
    sampler: SamplerConfig = SamplerConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        for name, least in (("per_class", 1), ("num_samples", 0), ("seed", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name.replace('_', '-')} must be {least} or more, found {getattr(self, name)}")
        wanted = ".npz" if self.num_samples else ".png"
        if self.output and pathlib.Path(self.output).suffix != wanted:
            raise ConfigError(f"--output must end in {wanted}, found {self.output!r}")

    @property
    def path(self) -> pathlib.Path:
        """`output`, or the file it stands for: the first grid_N.png that is free."""
        if self.output:
            return pathlib.Path(self.output)
        folder = pathlib.Path(self.run)
        if self.num_samples:
            return folder / "samples.npz"
        return next(path for i in itertools.count() if not (path := folder / f"grid_{i}.png").exists())


def main(argv: list[str] | None = None) -> None:
    cli.setup()
    from gspn_jax.data import DataError
    from gspn_jax.state_dict import WeightsError
    from gspn_jax.training.checkpoints import CheckpointError

    with cli.user_errors(DataError, CheckpointError, WeightsError, ImportError):
        cli.join_other_hosts()
        run(*_parse(argv))


def _parse(argv: list[str] | None) -> tuple[Arguments, Config, int]:
    """The flags (defaults from the checkpoint's config), that config, and the step."""
    import tyro

    from gspn_jax.training import checkpoints

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--run")
    first.add_argument("--step", type=int)
    chosen, rest = first.parse_known_args(argv)
    if chosen.run is None:
        if "-h" in rest or "--help" in rest:
            print(__doc__)
            sys.exit(0)
        raise ConfigError("sample.py needs --run RUN_DIRECTORY")
    step, config = checkpoints.read_config(chosen.run, chosen.step)
    default = Arguments(run=chosen.run, step=step, sampler=config.sampler)
    arguments = tyro.cli(Arguments, args=rest, default=default, prog=f"sample.py --run {chosen.run}")
    return arguments, dataclasses.replace(config, sampler=arguments.sampler), step


def run(arguments: Arguments, config: Config, step: int) -> pathlib.Path:
    """Draws what `arguments` ask for from the checkpoint of `step`; returns the file written."""
    import numpy as np
    from tqdm import tqdm

    from gspn_jax.data.images import grid
    from gspn_jax.sample_files import write_npz
    from gspn_jax.sampling import Sampler
    from gspn_jax.training import checkpoints, sharding

    path = arguments.path
    if not path.parent.is_dir():
        raise ConfigError(f"--output must lie in a folder that exists, found {str(path)!r}")
    if path.exists():
        raise ConfigError(f"{path} exists already: choose another --output, or delete it")
    names = checkpoints.read_meta(arguments.run, step)[1]["class_names"]
    if arguments.num_samples:
        classes, count = config.data.num_classes, arguments.num_samples
        labels = (np.random.default_rng(arguments.seed).integers(classes, size=count)
                  if arguments.labels == "random" else np.arange(count) % classes)
    else:
        labels = np.repeat([_class(name, names) for name in arguments.classes] or range(min(10, len(names))),
                           arguments.per_class)
    vae = _autoencoder(arguments, config)
    seeds = arguments.seed + np.arange(len(labels))
    batch_size = min(arguments.batch_size, len(labels))

    mesh = sharding.make_mesh(arguments.mesh)
    size = arguments.image_size or (config.data.image_size,) * 2
    with tqdm(unit="evaluation", desc="sampling") as bar:
        batch = 0

        def progress(evaluations: int, total: int) -> None:  # called from the device's thread, in any order
            bar.update(max(0, batch * total + evaluations - bar.n))

        sampler = Sampler(config, mesh, image_size=size, progress=progress,
                          decode=vae.decode if vae else None)
        bar.reset(sampler.evaluations * -(-len(labels) // batch_size))
        params = checkpoints.restore_params(arguments.run, step, config, mesh, ema_decay=arguments.ema)

        def draw(labels: np.ndarray, seeds: np.ndarray) -> np.ndarray:
            # every batch has the same shape, so that the sampler is compiled once
            padded = [np.resize(a, batch_size) for a in (labels, seeds)]
            return sampler(params, *padded)[:len(labels)]

        def done(count: int) -> None:
            nonlocal batch
            batch = -(-count // batch_size)
            bar.update(max(0, batch * sampler.evaluations - bar.n))

        shape = (*(vae.config.factor * side for side in size), 3) if vae else (*size, config.data.channels)
        if arguments.num_samples:
            settings = dataclasses.asdict(dataclasses.replace(arguments, step=step, output=str(path)))
            settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items() if k != "mesh"}
            settings["sampler"]["guidance_interval"] = list(settings["sampler"]["guidance_interval"])
            write_npz(path, draw, labels, seeds, shape=shape, batch_size=batch_size, settings=settings, done=done)
        else:
            images = []
            for start in range(0, len(labels), batch_size):
                images.append(draw(labels[start:start + batch_size], seeds[start:start + batch_size]))
                done(start + len(images[-1]))
            grid(np.concatenate(images), [names[label] for label in labels], columns=arguments.per_class).save(path)
    print(f"{len(labels)} images of step {step} in {path}")
    return path


def _autoencoder(arguments: Arguments, config: Config):
    """The decoder of a run on latents; None for a run on pixels, and for a grid of the latents themselves."""
    from gspn_jax import autoencoder

    if config.data.source != "latents":
        if arguments.vae:
            raise ConfigError(f"--vae is for a run on latents, found one with data.source {config.data.source!r}")
        return None
    if not arguments.vae:
        if arguments.num_samples:
            raise ConfigError("--num-samples of a run on latents needs --vae to decode them")
        return None
    weights, sizes = autoencoder.load(arguments.vae)
    if sizes.latent_channels != config.data.channels:
        raise ConfigError(f"--vae must be of {config.data.channels} latent channels, as the run is, found "
                          f"{sizes.latent_channels} in {arguments.vae}")
    return autoencoder.Autoencoder(weights, sizes, batch_size=DECODED_AT_A_TIME)


def _class(name: str, names: list[str]) -> int:
    """The number of a class given by number or name."""
    if name.isdigit() and int(name) < len(names):
        return int(name)
    if name in names:
        return names.index(name)
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    raise ConfigError(f"--classes must be numbers in 0..{len(names) - 1} or names ({shown}), found {name!r}")


if __name__ == "__main__":
    main()
