"""Trains a denoiser: gspn-train --config digits [--train.steps 2000 ...]; in a checkout, python train_dit.py.

The same command goes on from the latest checkpoint of its run directory. Exit codes: 0 done, 1 numbers that went bad,
2 input that cannot be used, 75 stopped by a signal after saving, or by the loss of another host.
"""

import sys

from gspn_jax import cli


@cli.user_errors()
def main(argv: list[str] | None = None, *, program: str = "gspn-train") -> None:
    cli.setup()
    from gspn_jax.data import DataError  # after setup: importing JAX reads the environment
    from gspn_jax.parallel.agreement import on_every_host
    from gspn_jax.runs.checkpoints import CheckpointError
    from gspn_jax.state_dict import WeightsError
    from gspn_jax.training.guard import DivergedError
    from gspn_jax.training.loop import Interrupted
    from gspn_jax.training.train import train

    with cli.user_errors(DataError, CheckpointError, WeightsError, ImportError):
        argv = cli.join_other_hosts(cli.words(argv))
        config = on_every_host(
            lambda: cli.parse_config(argv, program=program, description="Train a class-conditional denoiser.")
        )
        try:
            train(config)
        except DivergedError as error:
            sys.exit(f"error: {error}")
        except Interrupted as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(cli.INTERRUPTED)


if __name__ == "__main__":
    main()
