"""Signals that act where the main thread waits in native code, as for a rank that is gone.

Python calls signal handlers on the main thread, between two of its own instructions, so not while that thread is in a
library. But the handler that Python installs in C writes the signal's number to a pipe at once, and here a thread reads
it. That thread runs whenever the interpreter's lock is free: torch, oneCCL's bindings and the kernels wait without it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any

from knltrain.errors import INTERRUPTED
from knltrain.launch.pmi import abort_job

# What a main thread that runs gets for leaving by itself: removing files, ending children.
_GRACE_S = 1.0
_before_end: list[Callable[[], None]] = []
_watchers: list[Watcher] = []


def run_before_end(function: Callable[[], None]) -> None:
    """Registers what is done before a signal or :func:`end` ends this process, and when it ends by itself."""
    if function not in _before_end:
        _before_end.append(function)
        atexit.register(function)


def end(code: int, message: str = "interrupted") -> None:
    """Ends this process, and under Hydra the job, whatever its other threads do. Does not return.

    Args:
        code: exit status.
        message: for stderr, one line.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"knltrain: {message}\n".encode())
    _clean_up()
    abort_job(code)
    os._exit(code)


def end_by(number: int) -> None:
    """Ends this process as the signal does that nobody handles; Ctrl-C as commands end by it, with 130."""
    if number == signal.SIGINT:
        end(INTERRUPTED)
    _clean_up()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    _reset(number)
    os.kill(os.getpid(), number)


def _clean_up() -> None:
    for function in _before_end:
        with contextlib.suppress(Exception):
            function()


def _reset(number: int) -> None:
    import ctypes

    # Not signal.signal, which the main thread alone may call.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(number, int(signal.SIG_DFL))


class Watcher:
    """While entered, a thread of its own calls :meth:`received` for each signal of ``numbers``.

    Watchers nest: the innermost gets the signals. Only the main thread can enter one; elsewhere nothing is watched, and
    the program that owns the main thread decides.

    Args:
        numbers: signals that get a handler here; SIGINT, if it is not among them, keeps Python's, and is read too.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = numbers
        self._before: dict[int, Any] = {}
        self._wakeup = -1
        self._pipe: tuple[socket.socket, socket.socket] | None = None
        self._left = threading.Event()

    def __enter__(self) -> Watcher:
        if threading.current_thread() is threading.main_thread():
            self._pipe = socket.socketpair()
            self._pipe[1].setblocking(False)
            self._wakeup = signal.set_wakeup_fd(self._pipe[1].fileno(), warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, self.handle) for number in self._numbers}
            threading.Thread(target=self._watch, args=(self._pipe[0],), name="signals", daemon=True).start()
            _watchers.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        for number, handler in self._before.items():
            if signal.getsignal(number) == self.handle:  # what was set since stays
                signal.signal(number, handler)
        if self._pipe:
            _watchers.remove(self)
            signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
            self._pipe[1].close()  # the thread reads the end, and closes the other one
            self._pipe = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Python's handler, on the main thread, which comes late or never; :meth:`received` acts."""

    def received(self, number: int) -> None:
        """Acts on a signal, on the watching thread."""
        raise NotImplementedError

    def end_unless_left(self, number: int) -> None:
        """Ends the process by a signal; by Ctrl-C if the main thread, which raises KeyboardInterrupt, has not left."""
        if number != signal.SIGINT or not self._left.wait(_GRACE_S):
            end_by(number)

    def _watch(self, reader: socket.socket) -> None:
        with reader:
            while numbers := reader.recv(64):
                for number in numbers:
                    if number == signal.SIGINT or number in self._numbers:
                        self.received(number)


def _not_in_child() -> None:
    """A forked process has the pipe but not the thread: its signals would count as this process's."""
    if _watchers:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_not_in_child)


class ActAtOnce(Watcher):
    """While entered, SIGTERM and a second Ctrl-C end this process, also where it waits in native code.

    The first Ctrl-C is Python's KeyboardInterrupt, so that what runs can leave things in order.
    """

    def __init__(self) -> None:
        super().__init__((signal.SIGTERM,))
        self._interrupts = 0

    def received(self, number: int) -> None:
        """Ends the process, unless this is the first Ctrl-C."""
        self._interrupts += number == signal.SIGINT
        if number != signal.SIGINT or self._interrupts > 1:
            self.end_unless_left(number)


def end_soon(code: int) -> None:
    """Gives the main thread a second to end the process by itself; after that, it is ended."""

    def wait() -> None:
        time.sleep(_GRACE_S)
        sys.stdout.flush()
        end(code)

    threading.Thread(target=wait, name="end", daemon=True).start()
