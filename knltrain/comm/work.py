"""Work objects of the process group ``ccl``, and the thread that completes asynchronous ones."""

# No "from __future__ import annotations": torch binds some of these methods by their signatures.

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from knltrain.comm import oneccl

# Waits return this often to handle signals and check time-outs.
POLL_INTERVAL_S = 1.0
# Keeps alive the memory that oneCCL may still write to after a group was abandoned.
_abandoned: list["Work"] = []


class Owner(Protocol):
    """The process group of a collective."""

    def overdue(self, work: "Work") -> RuntimeError | None:
        """Checks a pending collective; after its time-out, returns the error to fail it with."""


class Work(dist.Work):
    """A collective or point-to-point operation, pending or done.

    Args:
        owner: its process group.
        what: its name, for messages.
        mark: its key among the group's collectives, the same on all ranks.
        peer: the other rank of a point-to-point operation; None for a collective.
        result: the tensors of the future.
        keep: the memory that oneCCL reads and writes, kept alive until it is done.
        finish: called when oneCCL is done, to copy a result to the caller's tensor.
    """

    def __init__(
        self,
        owner: Owner,
        what: str,
        *,
        mark: str,
        peer: int | None,
        result: list[Tensor],
        keep: object,
        finish: Callable[[], None] | None,
    ) -> None:
        super().__init__()
        self.owner, self.what, self.mark, self.peer = owner, what, mark, peer
        self.requests: list[Any] = []
        self.started, self.noticed = time.monotonic(), False
        self._result, self._keep, self._finish = result, keep, finish
        self._error: RuntimeError | None = None
        self._done_event = threading.Event()
        self._future: torch.futures.Future[list[Tensor]] | None = None
        self._lock = threading.Lock()

    def run(self) -> None:
        """Waits for it on this thread.

        Raises:
            RuntimeError: oneCCL failed, or a rank did not take part before the time-out.
        """
        for request in self.requests:
            while not request.wait(POLL_INTERVAL_S):
                if error := self.owner.overdue(self):
                    self.fail(error)
                    raise error
        self.complete()
        self.wait()

    def complete(self) -> None:
        """Completes the work once its requests are done."""
        failed = next((request.error for request in self.requests if request.error), "")
        error = RuntimeError(f"{self.what}: {failed}") if failed else None
        if error:
            self.fail(error)
            return
        if self._finish is not None:
            try:
                self._finish()
            except RuntimeError as problem:
                error = problem
        self._keep = self._finish = None
        self._end(error)

    def fail(self, error: RuntimeError) -> None:
        """Completes the work with an error while oneCCL may still be running it."""
        _abandoned.append(self)
        self._end(error)

    def _end(self, error: RuntimeError | None) -> None:
        with self._lock:
            self._error = error
            self._done_event.set()
            future = self._future
        if future is not None:
            self._complete_future(future)

    def _complete_future(self, future: "torch.futures.Future[list[Tensor]]") -> None:
        if self._error is None:
            future.set_result(self._result)
        else:
            future.set_exception(self._error)  # type: ignore[arg-type]

    # torch.distributed.Work's interface.

    def is_completed(self) -> bool:
        return self._done_event.is_set()

    def is_success(self) -> bool:
        return self._done_event.is_set() and self._error is None

    def exception(self) -> BaseException | None:
        return self._error

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        # The owner's time-out ends it in any case.
        if not self._done_event.wait(timeout.total_seconds() or None):
            raise RuntimeError(f"{self.what} is not done after {timeout.total_seconds():g} s")
        if self._error is not None:
            raise self._error
        return True

    def synchronize(self) -> None:
        self.wait()

    def result(self) -> list[Tensor]:
        return self._result

    def get_future(self) -> "torch.futures.Future[list[Tensor]]":
        with self._lock:
            if self._future is not None:
                return self._future
            self._future = torch.futures.Future()
            done = self._done_event.is_set()
        if done:
            self._complete_future(self._future)
        return self._future


class Waiter:
    """The thread that completes asynchronous work; it runs as long as there is a process group."""

    def __init__(self) -> None:
        self._groups = 0
        self._works: dict[int, Work] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def join(self) -> None:
        """Registers a group; with the first one, the thread starts."""
        with self._lock:
            self._groups += 1
            if self._thread is None:
                oneccl.load().stop(False)
                self._thread = threading.Thread(target=self._run, name="ccl", daemon=True)
                self._thread.start()

    def leave(self) -> None:
        """Unregisters a group; with the last one, the thread ends."""
        with self._lock:
            self._groups -= 1
            if self._groups > 0 or self._thread is None:
                return
            thread, self._thread = self._thread, None
            oneccl.load().stop(True)
        if thread is not threading.current_thread():
            thread.join()

    def start(self, work: Work, requests: Callable[[], list[Any]]) -> None:
        """Starts the requests of a collective, and completes it when they are done."""
        with self._lock:  # a request must not finish before it is registered
            work.requests = requests()
            self._works.update({request.number: work for request in work.requests})
        if not work.requests:
            work.complete()

    def outstanding(self, owner: Owner) -> list[Work]:
        """Returns a group's pending work."""
        with self._lock:
            return [work for work in dict.fromkeys(self._works.values()) if work.owner is owner]

    def _run(self) -> None:
        shim = oneccl.load()
        while True:
            request = shim.next(POLL_INTERVAL_S)
            if request is not None:
                self._done(request.number)
            elif self._thread is not threading.current_thread():
                return
            self._check_timeouts()

    def _done(self, number: int) -> None:
        with self._lock:
            work = self._works.pop(number, None)
            if work is None or any(request.number in self._works for request in work.requests):
                return
        work.complete()

    def _check_timeouts(self) -> None:
        with self._lock:
            works = list(dict.fromkeys(self._works.values()))
        for work in works:
            if time.monotonic() - work.started >= POLL_INTERVAL_S and (error := work.owner.overdue(work)):
                with self._lock:
                    for request in work.requests:
                        self._works.pop(request.number, None)
                work.fail(error)


waiter = Waiter()
