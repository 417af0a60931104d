"""Trains, evaluates and uses image classifiers.

python -m gspn_jax.classify train --config configs/gspn_t.py --data.path RECORDS/train --eval.path RECORDS/val
python -m gspn_jax.classify evaluate --run runs/gspn_t --images IMAGENET/val
python -m gspn_jax.classify predict --run runs/gspn_t --images picture.jpg folder
python -m gspn_jax.classify throughput --preset GSPN-T
python -m gspn_jax.classify export --run runs/gspn_t --license apache-2.0 --output gspn_t_release
python -m gspn_jax.classify compare --config configs/classify_cifar10.py --data.path CIFAR/train --eval.path CIFAR/test
python -m gspn_jax.classify evaluate --help

`train` goes on from the latest checkpoint of its run directory; --init-from begins with the weights of another run, or
of what `export` wrote, also with other classes or another size. `evaluate` prints top-1 and top-5 of the parameters and
of every average as JSON. `compare` trains one config with line scans, with attention and with neither, and draws what
came of it. Exit codes are those of train_dit.py.
"""

import sys

from gspn_jax import cli, extras
from gspn_jax.config import ConfigError

COMMANDS = ("train", "evaluate", "predict", "throughput", "export", "compare")
ALONE = ("predict", "export")
"""Those that are for one process."""


@cli.user_errors()
def main(argv: list[str] | None = None) -> None:
    extras.require("train", "tyro", by="python -m gspn_jax.classify")
    cli.setup()
    from gspn_jax.data import DataError  # after setup: importing JAX reads the environment
    from gspn_jax.runs.checkpoints import CheckpointError
    from gspn_jax.state_dict import WeightsError
    from gspn_jax.training.guard import DivergedError
    from gspn_jax.training.loop import Interrupted

    argv = cli.words(argv)
    command = argv[0] if argv else "--help"
    with cli.user_errors(DataError, CheckpointError, WeightsError, ImportError):
        if command in ("-h", "--help"):
            print(__doc__)
            return
        if command not in COMMANDS:
            raise ConfigError(f"gspn_jax.classify can: {', '.join(COMMANDS)}, found {command!r}")
        try:
            _run(command, cli.join_other_hosts(argv[1:]))
        except DivergedError as error:
            sys.exit(f"error: {error}")
        except Interrupted as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(cli.INTERRUPTED)


def _run(command: str, argv: list[str]) -> None:
    import tyro

    from gspn_jax.parallel.agreement import on_every_host
    from gspn_jax.runs import same_hosts

    program = f"python -m gspn_jax.classify {command}"
    if command in ALONE:
        same_hosts.check_alone(program)
    if command in ("train", "compare"):
        from gspn_jax.classify.config import ClassifyConfig

        what = {"train": "Train an image classifier.", "compare": "Train one config with scans, attention and neither."}
        config = on_every_host(
            lambda: cli.parse_config(argv, program=program, description=what[command], cls=ClassifyConfig)
        )
        if command == "train":
            from gspn_jax.classify.task import ClassificationTask
            from gspn_jax.training.train import train_task

            train_task(ClassificationTask(config))
        else:
            from gspn_jax.classify.compare import compare

            compare(config)
    elif command == "evaluate":
        from gspn_jax.classify.evaluate import Evaluate, evaluate

        evaluate(on_every_host(lambda: tyro.cli(Evaluate, args=argv, prog=program)))
    elif command == "predict":
        from gspn_jax.classify.predict import Predict, predict

        predict(tyro.cli(Predict, args=argv, prog=program))
    elif command == "throughput":
        from gspn_jax.classify.throughput import Throughput, throughput

        throughput(on_every_host(lambda: tyro.cli(Throughput, args=argv, prog=program)))
    else:
        from gspn_jax.classify.weights import Export, export

        export(tyro.cli(Export, args=argv, prog=program))
