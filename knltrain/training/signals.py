"""Asking a run to stop: the first signal is noted, the second ends the process.

SIGINT is Ctrl-C, SIGTERM what launchers and batch systems send, SIGUSR1 what Slurm sends before a time limit to a job
that asks for a warning.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType

from knltrain.errors import STOPPED
from knltrain.launch.signals import Watcher, end

_libc = ctypes.CDLL(None)
_libc.signal.argtypes, _libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Signals this close together are one request: a terminal and a launcher both pass on a Ctrl-C, and the kernel reports
# the death of a parent once for each of its threads.
ONE_REQUEST_S = 0.5
# To be ignored or not makes no difference to this signal, and other processes see which it is.
_MARK = signal.SIGURG


class InterruptError(Exception):
    """A signal asked a rank to stop; all ranks raise it at the same step."""


class StopRequest(Watcher):
    """While entered, the first of ``SIGNALS`` sets ``requested``; a later one ends the process, wherever it waits.

    By Ctrl-C it ends with 130, after the KeyboardInterrupt of a main thread that runs; by another signal as if nobody
    handled it.
    """

    def __init__(self) -> None:
        super().__init__(SIGNALS)
        self.requested = False
        self._requested_at = 0.0
        self._at_once = self._ignores_late = self._interrupts = False
        self._lock = threading.Lock()

    def __enter__(self) -> StopRequest:
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        _libc.signal(_MARK, signal.SIG_DFL)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside the block, which waits for other ranks and leaves nothing to save, the first signal ends the process.

        It ends with 75, as a run that a signal has stopped.
        """
        with self._lock:
            self._at_once = True
        if self.requested:
            self._end_before_start()
        try:
            yield
        finally:
            with self._lock:
                self._at_once = False

    def ignore_late(self) -> None:
        """From now on, and after the block too, SIGTERM and SIGUSR1 do nothing.

        For a rank that has come to its end: its launcher sends them when another one was quicker.
        """
        self._ignores_late = True
        for number in (signal.SIGTERM, signal.SIGUSR1):
            if signal.getsignal(number) == self.handle:
                signal.signal(number, signal.SIG_IGN)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Interrupts the main thread where a second request came by Ctrl-C."""
        # Set for this thread alone. The kernel would report the death of a parent more than once.
        _libc.prctl(_PR_SET_PDEATHSIG, 0)
        if self._interrupts:
            raise KeyboardInterrupt

    def received(self, number: int) -> None:
        """Notes a first request; ends the process at a later one, or where there is nothing to save."""
        with self._lock:
            first, self.requested = not self.requested, True
            at_once = self._at_once
        if first:
            self._requested_at = time.monotonic()
            _libc.signal(_MARK, signal.SIG_IGN)
        if at_once:
            self._end_before_start()
        if time.monotonic() - self._requested_at < ONE_REQUEST_S or (self._ignores_late and number != signal.SIGINT):
            return
        if number == signal.SIGINT and not self._interrupts:
            self._interrupts = True
            _thread.interrupt_main(signal.SIGINT)
        self.end_unless_left(number)

    def _end_before_start(self) -> None:
        end(STOPPED, "stopped by a signal before the first step; the same command starts again")


def waits_for_request(pid: int) -> bool:
    """Whether a run's process handles signals, and none has come to it yet; False if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text("utf-8")
        masks = dict(line.split(":\t") for line in status.splitlines() if line.startswith(("SigCgt:", "SigIgn:")))
        caught, ignored = int(masks["SigCgt"], 16), int(masks["SigIgn"], 16)
    except (OSError, ValueError, KeyError):
        return False
    return bool(caught >> (signal.SIGTERM - 1) & 1) and not ignored >> (_MARK - 1) & 1
