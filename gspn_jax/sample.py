"""Samples a checkpoint (in a checkout: python sample.py in place of gspn-sample).

gspn-sample --run runs/digits --classes 0 1 2                         a labelled grid, RUN/grid_0.png
gspn-sample --run runs/digits --num-samples 50000 --output s.npz      an .npz of the ADM layout; resumable
gspn-sample --run runs/gspn_xl_2 --vae VAE.safetensors                a run on latents, decoded to images
gspn-sample --run runs/digits --help                                  every flag with its value
"""

import argparse
import contextlib
import dataclasses
import itertools
import pathlib
import sys
from typing import Literal

from gspn_jax import cli, extras
from gspn_jax.config import Config, ConfigError, MeshConfig, SamplerConfig, check_numbers, whole_number


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Flags of what is drawn from a run."""

    run: str
    """The run directory that train_dit.py wrote."""
    step: int | None = None
    """The checkpoint; the latest by default."""
    ema: float | None = None
    """The EMA decay to sample from: the first of the run by default; 0 is the parameters themselves."""
    ema_width: float | None = None
    """In place of a decay, the width of a power-function average, made of the run's snapshots."""
    output: str | None = None
    """Where to write; in the run directory by default: grid_0.png, grid_1.png, ... or samples.npz for --num-samples.
    A file that exists is never overwritten."""
    classes: tuple[str, ...] = ()
    """Classes of the grid by name, or by number where none is called so; the first ten by default."""
    per_class: int = 8
    """Images of each class in the grid."""
    num_samples: int = 0
    """Draw this many images into an .npz instead of a grid."""
    labels: Literal["random", "balanced"] = "random"
    """Labels of --num-samples: uniform at random, as published numbers use, or equally many of each in turn."""
    seed: int = 0
    """Seed of the set, up to 2**64-1: the noise of image i comes from the seed and i, so that two seeds share none."""
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
        from gspn_jax.sampling import seeds

        check_numbers(self)
        for name, least in (("per_class", 1), ("num_samples", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name.replace('_', '-')} must be {least} or more, found {getattr(self, name)}")
        seeds.check(self.seed)
        wanted = ".npz" if self.num_samples else ".png"
        if self.output and pathlib.Path(self.output).suffix != wanted:
            raise ConfigError(f"--output must end in {wanted}, found {self.output!r}")

    @contextlib.contextmanager
    def claimed(self):
        """The file to write, which no other process writes until the block ends: `output`, or what it stands for."""
        from gspn_jax.files import claim_free, claim_new

        folder = pathlib.Path(self.run)
        if self.output or self.num_samples:
            path = pathlib.Path(self.output) if self.output else folder / "samples.npz"
            with claim_new(path):
                yield path
        else:
            with claim_free(folder / f"grid_{i}.png" for i in itertools.count()) as path:
                yield path


@cli.user_errors()
def main(argv: list[str] | None = None, *, program: str = "gspn-sample") -> None:
    cli.setup()
    from gspn_jax.data import DataError
    from gspn_jax.parallel.agreement import on_every_host
    from gspn_jax.runs.checkpoints import CheckpointError
    from gspn_jax.state_dict import WeightsError

    with cli.user_errors(DataError, CheckpointError, WeightsError, ImportError):
        argv = cli.join_other_hosts(cli.words(argv))
        run(*on_every_host(lambda: _parse(argv, program)))


def _parse(argv: list[str] | None, program: str) -> tuple[Arguments, Config, int]:
    """The flags (defaults from the checkpoint's config), that config, and the step."""
    extras.require("train", "tyro", by=program)
    from gspn_jax.runs import checkpoints

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--run")
    first.add_argument("--step", type=int)
    chosen, rest = first.parse_known_args(argv)
    if chosen.run is None:
        if "-h" in rest or "--help" in rest:
            print(__doc__)
            sys.exit(0)
        raise ConfigError(f"{program} needs --run RUN_DIRECTORY")
    step, config = checkpoints.read_config(chosen.run, chosen.step)
    default = Arguments(run=chosen.run, step=step, sampler=config.sampler)
    arguments = cli.parse(Arguments, args=rest, default=default, prog=f"{program} --run {chosen.run}")
    return arguments, dataclasses.replace(config, sampler=arguments.sampler), step


def run(arguments: Arguments, config: Config, step: int) -> pathlib.Path | None:
    """Draws what `arguments` ask for from the checkpoint of `step`; returns the file written, on the first host."""
    import numpy as np

    from gspn_jax.parallel.agreement import on_first_host
    from gspn_jax.runs import checkpoints, same_hosts
    from gspn_jax.sampling.drawing import draw_labels

    same_hosts.check_flags(arguments)
    same_hosts.check_files({"--vae": arguments.vae, "--sampler.guide": arguments.sampler.guide})
    meta = checkpoints.read_meta(arguments.run, step)[1]
    names = meta["class_names"]
    if arguments.num_samples:
        labels = draw_labels(arguments.labels, arguments.num_samples, config.data.num_classes, arguments.seed)
    else:
        labels = np.repeat(
            [_class(name, names) for name in arguments.classes] or range(min(10, len(names))), arguments.per_class
        )
    if arguments.num_samples and config.data.latents and not arguments.vae:
        raise ConfigError("--num-samples of a run on latents needs --vae to decode them")
    with contextlib.ExitStack() as stack:
        path = on_first_host(lambda: stack.enter_context(arguments.claimed()), ConfigError)
        _draw(arguments, config, step, labels, meta, path)
    if path:
        print(f"{len(labels)} images of step {step} in {path}")
    return path


def _draw(arguments: Arguments, config: Config, step: int, labels, meta: dict, path: pathlib.Path | None) -> None:
    """Draws an image a label into `path`, which only the first host has."""
    import numpy as np

    from gspn_jax.autoencoder import weights_file
    from gspn_jax.files import replacing, sha256_of
    from gspn_jax.parallel import sharding
    from gspn_jax.sampling.decoding import load_autoencoder
    from gspn_jax.sampling.drawing import Drawing
    from gspn_jax.sampling.files import write_npz
    from gspn_jax.sampling.grid import grid
    from gspn_jax.sampling.weights import Weights, guide_of

    mesh = sharding.make_mesh(arguments.mesh)
    weights = Weights(arguments.run, step, config, mesh, ema=arguments.ema, ema_width=arguments.ema_width)
    vae, names = load_autoencoder(arguments.vae, config, arguments.image_size, meta.get("latents")), meta["class_names"]
    numbers = np.arange(len(labels))
    with Drawing(
        weights,
        arguments.sampler,
        guide=guide_of(arguments.sampler, config, mesh),
        total=len(labels),
        batch_size=min(arguments.batch_size, len(labels)),
        seed=arguments.seed,
        image_size=arguments.image_size,
        vae=vae,
    ) as drawing:
        made = drawing.settings()  # every host has a part in it
        if path is None:
            _follow(drawing, labels, numbers)
            return
        draw = _led(drawing)
        if arguments.num_samples:
            settings = made | {
                "labels": arguments.labels,
                "seed": arguments.seed,
                "vae_sha256": sha256_of(weights_file(arguments.vae)) if vae else None,
            }
            write_npz(
                path,
                draw,
                labels,
                numbers,
                shape=drawing.shape,
                batch_size=drawing.batch_size,
                settings=settings,
                done=drawing.done,
            )
        else:
            images = []
            for start in range(0, len(labels), drawing.batch_size):
                batch = slice(start, start + drawing.batch_size)
                images.append(draw(labels[batch], numbers[batch]))
                drawing.done(start + len(images[-1]))
            picture = grid(np.concatenate(images), [names[label] for label in labels], columns=arguments.per_class)
            with replacing(path, new=True) as temporary:
                picture.save(temporary, "png")
        draw(None, None)


def _led(drawing):
    """`drawing` on the first host, which writes: it tells the others what is drawn, None that all is."""
    from gspn_jax.parallel.agreement import agree

    def draw(labels, numbers):
        agree(_DONE if numbers is None else int(numbers[0]))
        return None if numbers is None else drawing(labels, numbers)

    return draw


def _follow(drawing, labels, numbers) -> None:
    """The work of the other hosts: they draw their part of what the first one asks for."""
    from gspn_jax.parallel.agreement import agree

    while (start := agree(0)) != _DONE:
        batch = slice(start, start + drawing.batch_size)
        drawing(labels[batch], numbers[batch])


_DONE = -1


def _class(name: str, names: list[str]) -> int:
    """The number of a class given by name or, where none is called so, by number."""
    if name in names:
        return names.index(name)
    number = whole_number(name)
    if number is not None and number < len(names):
        return number
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    raise ConfigError(f"--classes must be numbers in 0..{len(names) - 1} or names ({shown}), found {name!r}")


if __name__ == "__main__":
    main()
