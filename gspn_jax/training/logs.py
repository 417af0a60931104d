"""Records of a run for people: the progress line, metrics.jsonl (the source of truth), TensorBoard events, wandb."""

import contextlib
import json
import logging
import os
import pathlib
import time
from collections.abc import Callable

import numpy as np
from PIL import Image
from tqdm import tqdm

from gspn_jax.files import replacing
from gspn_jax.small_files import DamagedFile, read_lines, set_aside
from gspn_jax.training.events import Events
from gspn_jax.training.weights_and_biases import WandbLog

log = logging.getLogger(__name__)


class RunLog:
    """Writes on the first host only; `start_step` drops what a killed run logged after its last checkpoint."""

    def __init__(
        self,
        run_dir: str | pathlib.Path,
        *,
        start_step: int,
        steps: int,
        enabled: bool = True,
        wandb: WandbLog | None = None,
    ):
        self._enabled, self._wandb = enabled, wandb
        self._dir = pathlib.Path(run_dir)
        if not enabled:
            return
        self._dir.mkdir(parents=True, exist_ok=True)
        path = self._dir / "metrics.jsonl"
        _truncate(path, start_step)
        self._jsonl = _Lines(path)
        self._events = self._open_events(start_step)
        self._bar = tqdm(total=steps, initial=start_step, unit="step", dynamic_ncols=True, smoothing=0.05)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        if self._enabled:
            self._bar.close()
            self._jsonl.close()
            self._event(lambda events: events.close())

    def rewind(self, step: int) -> None:
        """Forgets what was logged after `step`, to which the run goes back."""
        if not self._enabled:
            return
        self._jsonl.close()
        self._event(lambda events: events.close())
        path = self._dir / "metrics.jsonl"
        _truncate(path, step)
        self._jsonl = _Lines(path)
        self._events = self._open_events(step)
        self._bar.reset()
        self._bar.update(step)

    def advance(self, step: int) -> None:
        if self._enabled:
            self._bar.update(step - self._bar.n)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """One JSONL line, one point a value in TensorBoard and wandb, and the numbers behind the progress bar."""
        if not self._enabled:
            return
        self._jsonl.add(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        self._event(lambda events: events.scalars(step, values))
        if self._wandb:
            self._wandb.metrics(step, values)
        if "loss" in values:
            shown = {
                "loss": f"{values['loss']:.4f}",
                "img/s": f"{values['images_per_second']:.1f}",
                "mfu": f"{values['mfu']:.1%}" if "mfu" in values else "n/a",
            }
            self._bar.set_postfix(shown, refresh=False)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Saves `<run_dir>/<name>/step_0000000.png` and shows it in TensorBoard and wandb."""
        if not self._enabled:
            return
        path = self._dir / name / f"step_{step:07d}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                image.save(temporary, "png")
        except OSError as error:
            log.warning("%s could not be written (%s); the run goes on without it", path, error.strerror or error)
        self._event(lambda events: events.image(step, name, np.asarray(image.convert("RGB"))))
        if self._wandb:
            self._wandb.image(step, name, image)

    def _open_events(self, start_step: int) -> Events | None:
        """None on a bare machine, which has no tensorboardX, and where they cannot be written."""
        try:
            return Events(self._dir / "tensorboard", start_step + 1)
        except ModuleNotFoundError:
            log.info("no TensorBoard events are written: tensorboardX is not installed; metrics.jsonl has all of it")
        except OSError as error:
            _without_events(error)
        return None

    def _event(self, write: Callable[[Events], None]) -> None:
        try:
            if self._events:
                write(self._events)
        except OSError as error:
            _without_events(error)
            with contextlib.suppress(OSError):
                self._events.close()
            self._events = None

    def say(self, line: str) -> None:
        """A line of text that does not break the progress bar."""
        if self._enabled:
            tqdm.write(line)


def _without_events(error: OSError) -> None:
    log.warning("no more TensorBoard events are written (%s); metrics.jsonl has all of it", error.strerror or error)


class _Lines:
    """A file to which lines are added whole. Those that a full disk refuses wait for the next that is added."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._waiting: list[str] = []

    def add(self, line: str) -> None:
        self._waiting.append(line)
        size = os.fstat(self._file).st_size
        left = "".join(self._waiting).encode()
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as error:
            os.ftruncate(self._file, size)  # no half of a line
            if len(self._waiting) == 1:
                log.warning("%s cannot be written (%s); its lines wait until it can", self._path, error.strerror)
        else:
            self._waiting.clear()

    def close(self) -> None:
        if self._waiting:
            self.add("")
        if self._waiting:
            log.error("%d lines of %s could not be written and are lost", len(self._waiting) - 1, self._path)
        os.close(self._file)


def _truncate(path: pathlib.Path, last_step: int) -> None:
    """Keeps the whole lines of steps up to `last_step`; the file is replaced at once, never half-written. One with
    other lines is set aside first."""
    try:
        lines, wrong = read_lines(path, {"step": int})
    except DamagedFile as error:
        lines, wrong = [], [error]
    if wrong:
        set_aside(path, f"{wrong[0]} ({len(wrong):,} damaged in all)" if len(wrong) > 1 else str(wrong[0]))
    if lines or wrong or path.exists():
        with replacing(path) as temporary:
            temporary.write_bytes(b"".join(line for line, values in lines if values["step"] <= last_step))
