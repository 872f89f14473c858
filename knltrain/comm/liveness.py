"""Liveness check: which ranks still answer after a collective has timed out."""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from typing import Any

_POLL_INTERVAL_S = 1.0
_BLOCKED, _BUSY = "blocked", "busy"
# By then every live rank has polled the store, and the ranks blocked in the same collective have timed out as well.
_ANSWER_TIMEOUT_S = 2.5
# If the rank that serves the store is the lost one, a request to the store blocks.
_STORE_TIMEOUT_S = 5.0


class PeerLiveness:
    """Answers liveness checks of other ranks through the store, on a thread of its own.

    So a rank that is blocked in a collective answers, and one that has ended, is stopped or is unreachable does not.

    Args:
        store: the store of the rendezvous.
        rank: this process.
        hosts: the host name of each rank.
    """

    def __init__(self, store: Any, rank: int, hosts: list[str]) -> None:
        self._store, self._rank, self._hosts = store.clone(), rank, hosts
        self._blocked, self._ended = False, threading.Event()
        self._thread = threading.Thread(target=self._listen, name="liveness check", daemon=True)
        self._thread.start()
        atexit.register(self.end)  # before the interpreter ends, which a thread inside the store would not survive

    def _listen(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it whoever could ask
            while not self._ended.wait(_POLL_INTERVAL_S):
                if self._store.check(["liveness check"]):
                    self._answer()
                    return

    def _answer(self) -> None:
        self._store.set(f"here{self._rank}", _BLOCKED if self._blocked else _BUSY)

    def lost(self) -> str:
        """Starts a liveness check and names the ranks that do not answer; if all do, those that are not blocked.

        Returns:
            Ranks and hosts, for an error message; empty if no rank stands out.
        """
        self._blocked = True
        result: list[str] = []

        def check() -> None:
            with contextlib.suppress(RuntimeError):
                result.append(self._check())

        checker = threading.Thread(target=check, name="liveness check", daemon=True)
        checker.start()
        checker.join(_ANSWER_TIMEOUT_S + _STORE_TIMEOUT_S)
        return result[0] if result else self._names([0])

    def _check(self) -> str:
        self._answer()
        self._store.set("liveness check", "1")
        deadline = time.monotonic() + _ANSWER_TIMEOUT_S
        while time.monotonic() < deadline:
            time.sleep(_ANSWER_TIMEOUT_S / 10)
            # The first rank that knows may end, and the store with it: the others report what it has found.
            if self._store.check(["lost"]):
                return str(self._store.get("lost").decode())
        ranks = range(len(self._hosts))
        answers = [
            self._store.get(f"here{rank}").decode() if self._store.check([f"here{rank}"]) else "" for rank in ranks
        ]
        lost = self._names([rank for rank in ranks if not answers[rank]]) or self._names(
            [rank for rank in ranks if answers[rank] == _BUSY]
        )
        self._store.set("lost", lost)
        return lost

    def _names(self, ranks: list[int]) -> str:
        return " and ".join(f"rank {rank} on {self._hosts[rank]}" for rank in ranks if rank != self._rank)

    def end(self) -> None:
        """Stops answering."""
        atexit.unregister(self.end)
        self._ended.set()
        self._thread.join(_STORE_TIMEOUT_S)
