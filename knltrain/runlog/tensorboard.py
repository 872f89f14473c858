"""TensorBoard's event files. Loads the tensorboard package, which only a process that writes them needs."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # from the packages that TensorBoard's writer imports
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter


class _Writable(Protocol):
    def write(self, data: bytes, /) -> object: ...


class EventWriter:
    """Writes scalars as TensorBoard events.

    Args:
        file: what the encoded events are written to.
        first_step: events of this step and later ones in earlier files of the folder are not shown any more.
    """

    def __init__(self, file: _Writable, first_step: int) -> None:
        self._records = RecordWriter(file)
        self._add(file_version="brain.Event:2")
        self._add(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def add_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds an event with a value for each name."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._add(step=step, summary=Summary(value=values))

    def _add(self, **contents: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **contents).SerializeToString())
