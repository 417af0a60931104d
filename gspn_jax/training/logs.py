"""What a run writes for people: the progress line, metrics.jsonl (the source of truth) and TensorBoard events."""

import json
import logging
import pathlib
import time
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from gspn_jax.files import replacing
from gspn_jax.small_files import DamagedFile, read_lines, set_aside

log = logging.getLogger(__name__)


class RunLog:
    """Writes on the first host only; `start_step` drops what a killed run logged after its last checkpoint."""

    def __init__(self, run_dir: str | pathlib.Path, *, start_step: int, steps: int, enabled: bool = True):
        self._enabled = enabled
        self._dir = pathlib.Path(run_dir)
        if not enabled:
            return
        self._dir.mkdir(parents=True, exist_ok=True)
        path = self._dir / "metrics.jsonl"
        _truncate(path, start_step)
        self._jsonl = path.open("a", buffering=1)
        self._events = _events(self._dir, start_step)
        self._bar = tqdm(total=steps, initial=start_step, unit="step", dynamic_ncols=True, smoothing=0.05)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        if self._enabled:
            self._bar.close()
            self._jsonl.close()
            if self._events:
                self._events.close()

    def rewind(self, step: int) -> None:
        """Forgets what was logged after `step`, to which the run goes back."""
        if not self._enabled:
            return
        self._jsonl.close()
        if self._events:
            self._events.close()
        path = self._dir / "metrics.jsonl"
        _truncate(path, step)
        self._jsonl = path.open("a", buffering=1)
        self._events = _events(self._dir, step)
        self._bar.reset()
        self._bar.update(step)

    def advance(self, step: int) -> None:
        if self._enabled:
            self._bar.update(step - self._bar.n)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """One JSONL line, one TensorBoard point a value, and the numbers behind the progress bar."""
        if not self._enabled:
            return
        self._jsonl.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        for name, value in values.items() if self._events else ():
            self._events.add_scalar(name, value, step)
        if "loss" in values:
            shown = {
                "loss": f"{values['loss']:.4f}",
                "img/s": f"{values['images_per_second']:.1f}",
                "mfu": f"{values['mfu']:.1%}" if "mfu" in values else "n/a",
            }
            self._bar.set_postfix(shown, refresh=False)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Saves `<run_dir>/<name>/step_0000000.png` and shows it in TensorBoard."""
        if not self._enabled:
            return
        path = self._dir / name / f"step_{step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        if self._events:
            self._events.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def say(self, line: str) -> None:
        """A line of text that does not break the progress bar."""
        if self._enabled:
            tqdm.write(line)


def _events(run_dir: pathlib.Path, start_step: int) -> Any:
    """A tensorboardX.SummaryWriter; None on a bare machine, which has none."""
    try:
        import tensorboardX
    except ModuleNotFoundError:
        log.info("no TensorBoard events are written: tensorboardX is not installed; metrics.jsonl has all of it")
        return None
    return tensorboardX.SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)


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
