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

from gspn_jax import cli, extras
from gspn_jax.config import ConfigError

COMMANDS = ("latents", "features", "stats", "images", "captions", "inception")


@cli.user_errors()
def main(argv: list[str] | None = None) -> None:
    extras.require("train", "tyro", by="python -m gspn_jax.prepare")
    import tyro

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

            prepare_latents(tyro.cli(Latents, args=_joined(argv), prog="python -m gspn_jax.prepare latents"))
        elif command == "features":
            from gspn_jax.prepare.features import Features, prepare_features

            prepare_features(tyro.cli(Features, args=_joined(argv), prog="python -m gspn_jax.prepare features"))
        elif command == "captions":
            from gspn_jax.prepare.captions import Captions, prepare_captions

            prepare_captions(tyro.cli(Captions, args=_joined(argv), prog="python -m gspn_jax.prepare captions"))
        elif command == "stats":
            from gspn_jax.prepare.stats import Stats, prepare_stats

            rest = cli.join_other_hosts(argv[1:])
            prepare_stats(tyro.cli(Stats, args=rest, prog="python -m gspn_jax.prepare stats"))
        elif command == "images":
            from gspn_jax.prepare.records import Records, prepare_records

            prepare_records(tyro.cli(Records, args=argv[1:], prog="python -m gspn_jax.prepare images"))
        elif command == "inception":
            from gspn_jax.prepare.inception import Inception, prepare_inception

            prepare_inception(tyro.cli(Inception, args=argv[1:], prog="python -m gspn_jax.prepare inception"))
        else:
            raise ConfigError(f"gspn_jax.prepare can prepare: {', '.join(COMMANDS)}, found {command!r}")


def _joined(argv: list[str]) -> list[str]:
    """The flags, after joining the hosts of the job unless they are said not to know one another."""
    alone = any(word.split("=")[0].replace("_", "-") == "--num-hosts" for word in argv)
    return argv[1:] if alone else cli.join_other_hosts(argv[1:])
