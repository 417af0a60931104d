"""TensorBoard events of a run, written by the thread that trains.

tensorboardX's own writer has a thread behind a queue: when a full disk ends the thread, the queue fills and whoever
logs waits for ever. Its records are written here without either.
"""

import pathlib
import socket
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

FLUSH_SECONDS = 30


class Events:
    """A new file of events in `folder`; what earlier ones have from `purge_step` on is hidden. Raises OSError."""

    def __init__(self, folder: pathlib.Path, purge_step: int):
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._event = Event
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"  # as TensorBoard looks for it
        self._records = RecordWriter(str(folder / name))
        self._flushed = -FLUSH_SECONDS
        self._write(
            Event(wall_time=time.time(), file_version="brain.Event:2"),
            Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A point of each value."""
        from tensorboardX.summary import scalar

        self._write(*(self._of(step, scalar(name, value)) for name, value in values.items()))

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "H W 3"]) -> None:
        from tensorboardX.summary import image as summary

        self._write(self._of(step, summary(name, image, dataformats="HWC")))

    def close(self) -> None:
        self._records.close()

    def _of(self, step: int, summary: Any) -> Any:
        return self._event(wall_time=time.time(), step=step, summary=summary)

    def _write(self, *events: Any) -> None:
        for event in events:
            self._records.write(event.SerializeToString())
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._records.flush()  # onto the disk, which takes a while
            self._flushed = time.monotonic()
