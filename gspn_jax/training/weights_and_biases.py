"""A run's metrics and pictures in Weights & Biases, beside the run directory: `--log.wandb PROJECT`."""

import contextlib
import logging
import pathlib
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from PIL import Image

from gspn_jax.config import ConfigError, RunConfig, to_dict
from gspn_jax.files import replacing

log = logging.getLogger(__name__)

ID_FILE = "wandb_id"
"""In the run directory: the id of its wandb run, in which the command that goes on logs, too."""


class WandbLog:
    """Log that goes to `run`, a wandb run, by its step of training: a command that goes on logs some steps anew,
    which wandb's own count, as it only grows, would drop."""

    def __init__(self, run):
        self._run = run
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._send({"step": step, **values})

    def image(self, step: int, name: str, image: Image.Image) -> None:
        import wandb

        self._send({"step": step, name: wandb.Image(image)})

    def _send(self, values: Mapping[str, Any]) -> None:
        import wandb

        try:
            if self._run:
                self._run.log(values)
        except (wandb.Error, OSError) as error:  # its service has ended
            log.warning("nothing more goes to wandb (%s); the run directory has all of it", error)
            self._run = None


@contextlib.contextmanager
def wandb_log(config: RunConfig) -> Iterator[WandbLog | None]:
    """The wandb run of `config.log.wandb`, with the config in it; None without a project and on all hosts but one.

    WANDB_MODE (offline, disabled) and the other variables of wandb mean what they mean elsewhere. An exception marks
    the wandb run as failed. Raises ConfigError where wandb does not start a run.
    """
    project = config.log.wandb
    if project is None or jax.process_index() > 0:
        yield None
        return
    import wandb

    folder = pathlib.Path(config.run_dir)
    try:
        run = wandb.init(
            project=project,
            id=_kept_id(folder / ID_FILE),
            resume="allow",
            name=folder.resolve().name,
            dir=folder,
            config=to_dict(config),
            allow_val_change=True,
        )
    except wandb.Error as error:
        raise ConfigError(
            f"--log.wandb could not start a run of {project!r} ({error}): `wandb login`, or WANDB_MODE=offline"
        ) from error
    try:
        yield WandbLog(run)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def _kept_id(path: pathlib.Path) -> str:
    if not path.exists():
        with replacing(path) as temporary:
            temporary.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()
