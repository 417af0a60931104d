"""Draws images of prompts with Stable Diffusion 1, 2 or SDXL, from a folder as diffusers writes it; distils layers, and
trains U-Nets.

python -m gspn_jax.text_to_image --model FOLDER --prompt "a photo of a dog" --output dog.png
python -m gspn_jax.text_to_image --model FOLDER --prompts PROMPTS.txt --images 4 --negative blurry --output out.png
python -m gspn_jax.text_to_image distill --config configs/gspn_sd15.py --model.folder FOLDER --data.path CAPTIONS
python -m gspn_jax.text_to_image train --config configs/unet_cifar10.py --model.folder FOLDER --data.path CAPTIONS
python -m gspn_jax.text_to_image export --run runs/gspn_sd15 --output layers.safetensors
python -m gspn_jax.text_to_image --help

An image is its prompt, the seed and its number, on any devices and in any batch. Several images become out_0.png,
out_1.png, ...; each holds what it was made with. `distill` trains GSPN layers in place of the U-Net's self-attentions,
as their student, `train` the U-Net itself; both go on from the latest checkpoint of their run directory. `export`
writes layers as the file that --gspn-layers reads, and a U-Net as a folder (docs/text_to_image.md). Exit codes are
those of train_dit.py.
"""

import sys

from gspn_jax import cli, extras

PROGRAM = "python -m gspn_jax.text_to_image"


@cli.user_errors()
def main(argv: list[str] | None = None) -> None:
    extras.require("train", "tyro", by=PROGRAM)
    cli.setup()
    from gspn_jax.data import DataError  # after setup: importing JAX reads the environment
    from gspn_jax.runs.checkpoints import CheckpointError
    from gspn_jax.state_dict import WeightsError
    from gspn_jax.training.guard import DivergedError
    from gspn_jax.training.loop import Interrupted

    with cli.user_errors(DataError, CheckpointError, WeightsError, ImportError):
        argv = cli.words(argv)
        if not argv:
            print(__doc__)
            sys.exit(0)
        try:
            _run(argv)
        except DivergedError as error:
            sys.exit(f"error: {error}")
        except Interrupted as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(cli.INTERRUPTED)


def _run(argv: list[str]) -> None:
    command = argv[0] if argv[0] in ("distill", "train", "export") else ""
    rest = cli.join_other_hosts(argv[1:] if command else argv)
    from gspn_jax.parallel.agreement import on_every_host
    from gspn_jax.runs import same_hosts

    program = f"{PROGRAM} {command}".rstrip()
    if command == "distill":
        from gspn_jax.text_to_image.config import LayersConfig
        from gspn_jax.text_to_image.distillation import distill

        said = "Train GSPN layers as the student of a U-Net's self-attentions."
        distill(on_every_host(lambda: cli.parse_config(rest, program=program, description=said, cls=LayersConfig)))
    elif command == "train":
        from gspn_jax.text_to_image.config import UNetTrainingConfig
        from gspn_jax.text_to_image.training import train

        said = "Train the U-Net of a folder on images with captions."
        train(on_every_host(lambda: cli.parse_config(rest, program=program, description=said, cls=UNetTrainingConfig)))
    elif command == "export":
        from gspn_jax.text_to_image.exporting import Export, export

        same_hosts.check_alone(program)
        said = "Write what a run trained: GSPN layers as one file, a U-Net in a new folder of its model."
        export(cli.parse(Export, args=rest, prog=program, description=said))
    else:
        from gspn_jax.text_to_image.command import Arguments, run

        said = "Draw images of prompts with Stable Diffusion."
        run(on_every_host(lambda: cli.parse(Arguments, args=rest, prog=program, description=said)))
