"""Asynchronous checkpoints: a thread writes them while training continues.

The training thread copies the state in memory, which takes some hundredths of a second. The writer thread has low
priority and holds the GIL only between chunks of 1 MiB. One checkpoint is written at a time; if the next is due
earlier, training waits. Training always waits for the last one, which is written with normal priority.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knltrain.checkpoint.store import Progress, Snapshot, folder_of, remove_old, write
from knltrain.errors import KnltrainError
from knltrain.files import free_space

# Longer waits are worth a warning.
_WARN_WAIT_S = 1.0
# Beside a busy thread, nice 10 has a tenth of a core. Nice 19 would have a seventieth, and training, which waits for a
# checkpoint when the next is due, would wait for minutes on a node where other processes are busy.
_NICE_INCREMENT = 10


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time.

    Attributes:
        waited_s: total time that training has waited for an earlier checkpoint, seconds.

    Args:
        out: the run's folder.
        keep: how many of the newest to keep, beside the best.
        cpus: logical CPUs of the thread; if empty, those of training.
        warn: called with warnings for the user.
        timeout_s: time-out for a checkpoint to be on disk, seconds.
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
        """Whether a checkpoint is being written."""
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
        """Copies a checkpoint's contents, as :meth:`Snapshot.take`, and starts writing them.

        A write error is a warning; for the ``last`` checkpoint, :meth:`finish` returns it.

        Raises:
            KnltrainError: the previous one is not written after ``timeout_s``.
            Exception: an error of the previous one that is not an OSError.
        """
        start = time.perf_counter()
        self._wait()
        waited = time.perf_counter() - start
        self.waited_s += waited
        if waited > _WARN_WAIT_S:
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
        # A daemon, so that the process can end if the storage hangs.
        self._thread = threading.Thread(target=self._write, args=(progress.step, last), name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> KnltrainError | None:
        """Waits for the checkpoint being written; returns why the last could not be written, or None."""
        try:
            self._wait()
        except KnltrainError as error:
            return error
        return self._failure

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Exception):  # not after a second interrupt, which asks to end now
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
            with contextlib.suppress(OSError):  # then it only slows training
                os.nice(_NICE_INCREMENT)  # on Linux, of this thread only
        with contextlib.suppress(OSError):
            if self._cpus:
                os.sched_setaffinity(0, self._cpus)
        folder = folder_of(self._out, step)
        try:
            write(self._snapshot, folder)
            remove_old(self._out, folder, self._keep)
        except OSError as error:
            reason = f"checkpoint {folder}: {error.strerror or error}{free_space(self._out)}"
            self._failure = KnltrainError(f"{reason}; the checkpoints before it are untouched")
            if not last:
                self._warn(f"{self._failure}, training goes on")
        except Exception as error:  # for the training thread to raise
            self._error = error
