"""TensorBoard events of a run, written by the thread that trains.

tensorboardX's own writer has a thread behind a queue: when a full disk ends the thread, the queue fills and whoever
logs waits for ever. Its records are written here without either.
"""

import pathlib
import time
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8


class Events:
    """A new file of events in `folder`; what earlier ones have from `purge_step` on is hidden. Raises OSError."""

    def __init__(self, folder: pathlib.Path, purge_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._event = Event
        self._writer = EventsWriter(str(folder / "events"))
        self._writer.write_event(Event(step=purge_step, file_version="brain.Event:2"))
        self._writer.write_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self._writer.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A point of each value."""
        from tensorboardX.summary import scalar

        self._write(step, [scalar(name, value) for name, value in values.items()])

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "H W 3"]) -> None:
        from tensorboardX.summary import image as summary

        self._write(step, [summary(name, image, dataformats="HWC")])

    def close(self) -> None:
        self._writer.close()

    def _write(self, step: int, summaries: list) -> None:
        for summary in summaries:
            self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()
