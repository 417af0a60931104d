"""Prepares what training and evaluation read.

python -m gspn_jax.prepare latents --images IMAGENET/train --vae VAE.safetensors --output LATENTS
python -m gspn_jax.prepare stats --images IMAGENET/train --image-size 256 --inception INCEPTION.pth --output REF.npz
python -m gspn_jax.prepare images --images IMAGENET/train --output RECORDS
python -m gspn_jax.prepare features --images IMAGENET/train --weights DINOV2 --output FEATURES
python -m gspn_jax.prepare captions --model FOLDER --images IMAGES --output CAPTIONS
python -m gspn_jax.prepare inception --weights INCEPTION.pth --output INCEPTION.safetensors
python -m gspn_jax.prepare latents --help

`latents` encodes every image and its mirror image once; `stats` makes the reference statistics of FID and the other
metrics; `features` computes those of a frozen network, for training that is aligned with them (docs/recipes.md);
`images` decodes images once, for the training of classifiers (docs/classification.md); `captions` encodes images and
their captions for a model of Stable Diffusion (docs/text_to_image.md).
Several hosts with a common file system share the work: under Slurm, or with --coordinator HOST:PORT --num-processes N
--process-id I (docs/launch); `latents`, `features` and `captions` also, and `images` only, without knowing one another,
each with its own --host of --num-hosts. The same command goes on where a killed one stopped, and the result is the
same to the byte, on any number of hosts. `inception` makes of the weights that pytorch-fid publishes a file that is
read without PyTorch.
"""

import os
from typing import TypeVar

from gspn_jax import cli, extras
from gspn_jax.config import ConfigError

T = TypeVar("T")
COMMANDS = ("latents", "features", "stats", "images", "captions", "inception")


@cli.user_errors()
def main(argv: list[str] | None = None) -> None:
    extras.require("train", "tyro", by="python -m gspn_jax.prepare")
    cli.setup()
    # Autotuning may choose other kernels in another process, whose results differ in the last bit.
    if "xla_gpu_deterministic_ops" not in (flags := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true"
    from gspn_jax.data import DataError
    from gspn_jax.state_dict import WeightsError

    argv = cli.words(argv)
    command = argv[0] if argv else "--help"
    with cli.user_errors(DataError, WeightsError, ImportError):
        if command in ("-h", "--help"):
            print(__doc__)
        elif command == "latents":
            from gspn_jax.prepare.latents import Latents, prepare_latents

            prepare_latents(_parsed(Latents, _joined(argv), command))
        elif command == "features":
            from gspn_jax.prepare.features import Features, prepare_features

            prepare_features(_parsed(Features, _joined(argv), command))
        elif command == "captions":
            from gspn_jax.prepare.captions import Captions, prepare_captions

            prepare_captions(_parsed(Captions, _joined(argv), command))
        elif command == "stats":
            from gspn_jax.prepare.stats import Stats, prepare_stats

            prepare_stats(_parsed(Stats, cli.join_other_hosts(argv[1:]), command))
        elif command == "images":
            from gspn_jax.prepare.records import Records, prepare_records

            prepare_records(_parsed(Records, argv[1:], command))
        elif command == "inception":
            from gspn_jax.prepare.inception import Inception, prepare_inception

            prepare_inception(_parsed(Inception, argv[1:], command))
        else:
            raise ConfigError(f"gspn_jax.prepare can prepare: {', '.join(COMMANDS)}, found {command!r}")


def _parsed(cls: type[T], argv: list[str], command: str) -> T:
    """The flags of a command; all hosts of the job learn where one of them cannot use its own."""
    import tyro

    from gspn_jax.parallel.agreement import on_every_host

    return on_every_host(lambda: tyro.cli(cls, args=argv, prog=f"python -m gspn_jax.prepare {command}"))


def _joined(argv: list[str]) -> list[str]:
    """The flags, after joining the hosts of the job unless they are said not to know one another."""
    alone = any(word.split("=")[0].replace("_", "-") == "--num-hosts" for word in argv)
    return argv[1:] if alone else cli.join_other_hosts(argv[1:])
