"""Collectives under way: what a caller of the process group ``ccl`` gets, and the thread that completes it."""

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

# Nobody waits longer than this without looking up: a signal may have come, or a time-out passed.
LOOK_UP_S = 1.0
# What oneCCL may still write to after its group was given up.
_abandoned: list["Work"] = []


class Owner(Protocol):
    """The process group of a collective."""

    def overdue(self, work: "Work") -> RuntimeError | None:
        """Looks at one that is not done; past its time, returns the error with which it ends."""


class Work(dist.Work):
    """A collective under way, or done.

    Args:
        owner: its group.
        what: its name, for people.
        mark: names it among the group's collectives, the same on all ranks.
        peer: the other rank, of what goes between two.
        result: the tensors of the future.
        keep: what oneCCL reads and writes.
        finish: what is left to do when oneCCL is done, such as copying a result to where it was asked for.
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
        self._settled = threading.Event()
        self._future: torch.futures.Future[list[Tensor]] | None = None
        self._lock = threading.Lock()

    def run(self) -> None:
        """Drives it to its end on this thread.

        Raises:
            RuntimeError: oneCCL failed, or a rank did not come in time.
        """
        for request in self.requests:
            while not request.wait(LOOK_UP_S):
                if error := self.owner.overdue(self):
                    self.give_up(error)
                    raise error
        self.settle()
        self.wait()

    def settle(self) -> None:
        """Completes it, now that its requests are done."""
        failed = next((request.error for request in self.requests if request.error), "")
        error = RuntimeError(f"{self.what}: {failed}") if failed else None
        if error is None and self._finish is not None:
            try:
                self._finish()
            except RuntimeError as problem:
                error = problem
        self._keep = self._finish = None
        self._end(error)

    def give_up(self, error: RuntimeError) -> None:
        """Ends it with an error while oneCCL may still be at it."""
        _abandoned.append(self)
        self._end(error)

    def _end(self, error: RuntimeError | None) -> None:
        with self._lock:
            self._error = error
            self._settled.set()
            future = self._future
        if future is not None:
            self._complete(future)

    def _complete(self, future: "torch.futures.Future[list[Tensor]]") -> None:
        if self._error is None:
            future.set_result(self._result)
        else:
            future.set_exception(self._error)  # type: ignore[arg-type]

    # What follows is torch's interface.

    def is_completed(self) -> bool:
        return self._settled.is_set()

    def is_success(self) -> bool:
        return self._settled.is_set() and self._error is None

    def exception(self) -> BaseException | None:
        return self._error

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        # Its owner's time-out ends it in any case.
        if not self._settled.wait(timeout.total_seconds() or None):
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
            settled = self._settled.is_set()
        if settled:
            self._complete(self._future)
        return self._future


class Waiter:
    """The thread that waits for what no caller waits for at once; it is there while a group is."""

    def __init__(self) -> None:
        self._groups = 0
        self._works: dict[int, Work] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def join(self) -> None:
        """A group has come."""
        with self._lock:
            self._groups += 1
            if self._thread is None:
                oneccl.load().stop(False)
                self._thread = threading.Thread(target=self._run, name="ccl", daemon=True)
                self._thread.start()

    def leave(self) -> None:
        """A group has gone; with the last one, the thread ends."""
        with self._lock:
            self._groups -= 1
            if self._groups > 0 or self._thread is None:
                return
            thread, self._thread = self._thread, None
            oneccl.load().stop(True)
        if thread is not threading.current_thread():
            thread.join()

    def start(self, work: Work, requests: Callable[[], list[Any]]) -> None:
        """Makes the requests of a collective, and completes it when they are done."""
        with self._lock:  # lest one be done before it is known whose it is
            work.requests = requests()
            self._works.update({request.number: work for request in work.requests})
        if not work.requests:
            work.settle()

    def outstanding(self, owner: Owner) -> list[Work]:
        """What a group still has under way."""
        with self._lock:
            return [work for work in dict.fromkeys(self._works.values()) if work.owner is owner]

    def _run(self) -> None:
        shim = oneccl.load()
        while True:
            request = shim.next(LOOK_UP_S)
            if request is not None:
                self._done(request.number)
            elif self._thread is not threading.current_thread():
                return
            self._look_at_the_clock()

    def _done(self, number: int) -> None:
        with self._lock:
            work = self._works.pop(number, None)
            if work is None or any(request.number in self._works for request in work.requests):
                return
        work.settle()

    def _look_at_the_clock(self) -> None:
        with self._lock:
            works = list(dict.fromkeys(self._works.values()))
        for work in works:
            if time.monotonic() - work.started >= LOOK_UP_S and (error := work.owner.overdue(work)):
                with self._lock:
                    for request in work.requests:
                        self._works.pop(request.number, None)
                work.give_up(error)


waiter = Waiter()
