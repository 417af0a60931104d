"""Takes weights in from elsewhere and hands them out.

python -m gspn_jax.convert import --weights DiT-XL-2-256x256.pt --step 7000000 --output runs/dit_published
python -m gspn_jax.convert export --run runs/gspn_xl_2 --license apache-2.0 --output gspn_xl_2_release
python -m gspn_jax.convert import --weights gspn_xl_2_release/model.safetensors --output runs/gspn_xl_2_released

`import` makes a run directory of a checkpoint of the original DiT (.pt, which needs PyTorch, or .safetensors) or of
what `export` wrote; sample.py and `python -m gspn_jax.evaluate` take it as any other. `export` writes the weights of
one checkpoint as model.safetensors, with a model card in README.md. Nothing that exists is overwritten.
"""

from gspn_jax import cli, extras
from gspn_jax.config import ConfigError

COMMANDS = ("import", "export")


@cli.user_errors()
def main(argv: list[str] | None = None) -> None:
    extras.require("train", "tyro", by="python -m gspn_jax.convert")
    import tyro

    cli.setup()
    from gspn_jax.runs.checkpoints import CheckpointError
    from gspn_jax.state_dict import WeightsError

    argv = cli.words(argv)
    command = argv[0] if argv else "--help"
    with cli.user_errors(CheckpointError, WeightsError, ImportError):
        if command in ("-h", "--help"):
            print(__doc__)
        elif command == "import":
            from gspn_jax.convert.importing import Import, import_weights

            import_weights(tyro.cli(Import, args=argv[1:], prog="python -m gspn_jax.convert import"))
        elif command == "export":
            from gspn_jax.convert.exporting import Export, export_weights

            export_weights(tyro.cli(Export, args=argv[1:], prog="python -m gspn_jax.convert export"))
        else:
            raise ConfigError(f"gspn_jax.convert can: {', '.join(COMMANDS)}, found {command!r}")
