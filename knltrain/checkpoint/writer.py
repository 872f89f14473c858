"""Checkpoints are written by a thread while training goes on.

The training thread copies (memory to memory, some hundredths of a second), the writer takes what time is left: its
priority is low, and it holds the interpreter's lock for no longer than it takes to go on to the next MiB. Only one
checkpoint is under way at a time; if the next is due earlier, training waits. For the last one training always waits,
so that one has the priority of training.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knltrain.checkpoint.store import Progress, Snapshot, folder_of, remove_old, write
from knltrain.errors import KnltrainError

# A wait that a person would notice is said.
_NOTICED_S = 1.0
# Ten more leave it a tenth of a core beside a thread that never sleeps. At 19 it would be a seventieth, and training,
# which waits for the checkpoint when the next is due, would stand still for minutes where other processes are busy.
_NICER_BY = 10


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time.

    Attributes:
        waited_s: how long training waited, in all, for a checkpoint before the next could begin.

    Args:
        out: the run's folder.
        keep: how many of the newest stay, beside the best.
        cpus: logical CPUs that the thread runs on; none: where training does.
        warn: told what a person should know.
        timeout_s: the longest wait for a checkpoint to be on disk, seconds.
    """

    def __init__(
        self, out: Path, *, keep: int, cpus: Collection[int], warn: Callable[[str], None], timeout_s: float
    ) -> None:
        self._out, self._keep, self._cpus, self._warn, self._timeout_s = out, keep, cpus, warn, timeout_s
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._failure: KnltrainError | None = None
        self._error: Exception | None = None
        self.waited_s = 0.0

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is under way."""
        return self._thread is not None and self._thread.is_alive()

    def begin(
        self,
        progress: Progress,
        weights: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        meta: Mapping[str, Any],
        statistics: Mapping[str, Tensor] | None = None,
        average: Mapping[str, Tensor] | None = None,
        average_statistics: Mapping[str, Tensor] | None = None,
        last: bool = False,
    ) -> None:
        """Copies a checkpoint's contents, as :meth:`Snapshot.take`, and begins to write them.

        A disk that takes no more is a warning; of the ``last`` checkpoint it is what :meth:`finish` returns.

        Raises:
            KnltrainError: the one before is still not written after ``timeout_s``.
            Exception: what is no fault of the disk, from the one before.
        """
        start = time.perf_counter()
        self._wait()
        waited = time.perf_counter() - start
        self.waited_s += waited
        if waited > _NOTICED_S:
            self._warn(
                f"training waited {waited:.0f} s: the checkpoint before that of step {progress.step:,} was still being "
                "written; checkpoint.every spaces them out"
            )
        self._failure = None
        self._snapshot.take(
            progress,
            weights,
            optimizer,
            meta=meta,
            statistics=statistics,
            average=average,
            average_statistics=average_statistics,
        )
        # A daemon: where the storage hangs, the process can still end.
        self._thread = threading.Thread(target=self._write, args=(progress.step, last), name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> KnltrainError | None:
        """Waits for what is under way, and returns why the last checkpoint could not be written, if so."""
        try:
            self._wait()
        except KnltrainError as error:
            return error
        return self._failure

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Exception):  # who interrupts a second time does not want to wait
            self._wait()

    def _wait(self) -> None:
        if self._thread is None:
            return
        self._thread.join(self._timeout_s)
        if self._thread.is_alive():
            raise KnltrainError(
                f"{self._out}: a checkpoint was not on disk after {self._timeout_s:g} s; does the storage hang?"
            )
        self._thread = None
        if self._error:
            raise self._error

    def _write(self, step: int, last: bool) -> None:
        if not last:
            with contextlib.suppress(OSError):  # only lost time
                os.nice(_NICER_BY)  # of this thread: Linux has it so
        with contextlib.suppress(OSError):
            if self._cpus:
                os.sched_setaffinity(0, self._cpus)
        folder = folder_of(self._out, step)
        try:
            write(self._snapshot, folder)
            remove_old(self._out, folder, self._keep)
        except OSError as error:
            reason = f"checkpoint {folder}: {error.strerror or error}{_free(self._out)}"
            self._failure = KnltrainError(f"{reason}; the checkpoints before it are untouched")
            if not last:
                self._warn(f"{self._failure}, training goes on")
        except Exception as error:  # for the training thread to raise
            self._error = error


def _free(folder: Path) -> str:
    """How much space is left, in words; nothing where that cannot be said."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return ""
    return f" ({free / 2**20:,.0f} MiB free)"
