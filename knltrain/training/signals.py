"""Asking a run to stop: the first signal is noted, the second acts at once.

SIGINT is Ctrl-C, SIGTERM what launchers and batch systems send, SIGUSR1 what Slurm sends before a time limit to a job
that asks for a warning.
"""

from __future__ import annotations

import ctypes
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_libc = ctypes.CDLL(None)
_libc.signal.argtypes, _libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class InterruptError(Exception):
    """A signal asked a rank to stop; all ranks raise it at the same step."""


class StopRequest:
    """While entered, the first of ``SIGNALS`` sets ``requested``; a second one does what it would have done without us.

    That is: SIGINT raises KeyboardInterrupt, the others end the process, also where it waits in a library. Different
    signals that come at the same time may be taken for one.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread may set handlers; a run inside another program's thread is stopped by that program.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def ignore_late(self) -> None:
        """From now on, and after the block too, SIGTERM and SIGUSR1 do nothing.

        For a rank that has come to its end: its launcher sends them when another one was quicker.
        """
        for number in (signal.SIGTERM, signal.SIGUSR1):
            if self._before.pop(number, None) is not None:
                signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        # The kernel may report the death of a parent once for each of its threads. That is no second request.
        _libc.prctl(_PR_SET_PDEATHSIG, 0)
        for other, before in self._before.items():
            if callable(before):
                signal.signal(other, before)
            else:
                # Not by Python's own function: Python may be about to call this method for another signal that came at
                # the same time, and would complain that the handler is gone.
                _libc.signal(other, int(before))

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
