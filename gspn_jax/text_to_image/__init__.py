"""Draws images of prompts with Stable Diffusion 1, 2 or SDXL, from a folder as diffusers writes it.

python -m gspn_jax.text_to_image --model FOLDER --prompt "a photo of a dog" --output dog.png
python -m gspn_jax.text_to_image --model FOLDER --prompts PROMPTS.txt --images 4 --negative blurry --output out.png
python -m gspn_jax.text_to_image --help

An image is its prompt, the seed and its number, on any devices and in any batch. Several images become out_0.png,
out_1.png, ...; each holds what it was made with.
"""

import sys

from gspn_jax import cli, extras


@cli.user_errors()
def main(argv: list[str] | None = None) -> None:
    extras.require("train", "tyro", by="python -m gspn_jax.text_to_image")
    cli.setup()
    from gspn_jax.state_dict import WeightsError  # after setup: importing JAX reads the environment
    from gspn_jax.text_to_image.command import Arguments, run

    program = "python -m gspn_jax.text_to_image"
    with cli.user_errors(WeightsError, ImportError):
        argv = cli.words(argv)
        if not argv:
            print(__doc__)
            sys.exit(0)
        rest = cli.join_other_hosts(argv)
        run(cli.parse(Arguments, args=rest, prog=program, description="Draw images of prompts with Stable Diffusion."))
