"""Who is still there when ranks wait for each other in vain."""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from typing import Any

_LOOK_S = 1.0
_IN_VAIN, _ELSEWHERE = "waits in vain", "is at something else"
# After this every rank that can has looked, and one that waits for the same as this one has run out of time as well.
_PATIENCE_S = 2.5
# Where the rank that keeps the store is the one that is gone, asking it is in vain.
_STORE_PATIENCE_S = 5.0


class PeerLiveness:
    """Ranks answer a call in the store over which they met, each on a thread of its own.

    So a rank that is blocked in a collective answers, and one that has ended, is stopped or cannot be reached does not.

    Args:
        store: where the ranks met.
        rank: this process.
        hosts: of each rank.
    """

    def __init__(self, store: Any, rank: int, hosts: list[str]) -> None:
        self._store, self._rank, self._hosts = store.clone(), rank, hosts
        self._noticed, self._ended = False, threading.Event()
        self._thread = threading.Thread(target=self._listen, name="liveness check", daemon=True)
        self._thread.start()
        atexit.register(self.end)  # before the interpreter goes, which a thread inside the store would meet

    def _listen(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store has gone, and with it whoever could call
            while not self._ended.wait(_LOOK_S):
                if self._store.check(["liveness check"]):
                    self._answer()
                    return

    def _answer(self) -> None:
        self._store.set(f"here{self._rank}", _IN_VAIN if self._noticed else _ELSEWHERE)

    def lost(self) -> str:
        """Calls, and says which ranks do not answer; of all that do, which do not wait for the others as this one does.

        Returns:
            Ranks and hosts, for people; empty where there is nobody to blame.
        """
        self._noticed = True
        said: list[str] = []

        def call() -> None:
            with contextlib.suppress(RuntimeError):
                said.append(self._call())

        caller = threading.Thread(target=call, name="liveness check", daemon=True)
        caller.start()
        caller.join(_PATIENCE_S + _STORE_PATIENCE_S)
        return said[0] if said else self._names([0])

    def _call(self) -> str:
        self._answer()
        self._store.set("liveness check", "1")
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            time.sleep(_PATIENCE_S / 10)
            # Whoever is the first to know may end the store with itself: the others say the same.
            if self._store.check(["lost"]):
                return str(self._store.get("lost").decode())
        ranks = range(len(self._hosts))
        answers = [
            self._store.get(f"here{rank}").decode() if self._store.check([f"here{rank}"]) else "" for rank in ranks
        ]
        lost = self._names([rank for rank in ranks if not answers[rank]]) or self._names(
            [rank for rank in ranks if answers[rank] == _ELSEWHERE]
        )
        self._store.set("lost", lost)
        return lost

    def _names(self, ranks: list[int]) -> str:
        return " and ".join(f"rank {rank} on {self._hosts[rank]}" for rank in ranks if rank != self._rank)

    def end(self) -> None:
        """Answers no more."""
        atexit.unregister(self.end)
        self._ended.set()
        self._thread.join(_STORE_PATIENCE_S)
