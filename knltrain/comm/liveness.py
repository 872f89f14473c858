"""Liveness check: which ranks still answer after a collective has timed out, and how far they are."""

from __future__ import annotations

import atexit
import contextlib
import json
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

_POLL_INTERVAL_S = 1.0
# By then every live rank has polled the store.
_ANSWER_TIMEOUT_S = 2.5
# If the rank that serves the store is the lost one, a request to the store blocks.
_STORE_TIMEOUT_S = 5.0
SILENT = "has ended or does not answer"
# A rank that has waited for less than this part of the longest wait has made the others wait.
_LATE_FRACTION = 0.5


class _Answer(NamedTuple):
    """Where a rank is.

    Attributes:
        collectives: how many it has come to; all ranks come to the same ones.
        since_s: seconds since it came to the last of them.
    """

    collectives: int
    since_s: float


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
        self._collectives, self._since = 0, time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="liveness check", daemon=True)
        self._thread.start()
        atexit.register(self.end)  # before the interpreter ends, which a thread inside the store would not survive

    def count_collective(self) -> None:
        """Notes that this rank has come to its next collective."""
        self._collectives, self._since = self._collectives + 1, time.monotonic()

    def _listen(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it whoever could ask
            while not self._ended.wait(_POLL_INTERVAL_S):
                if self._store.check(["liveness check"]):
                    self._answer()
                    return

    def _answer(self) -> None:
        answer = _Answer(self._collectives, time.monotonic() - self._since)
        self._store.set(f"here{self._rank}", json.dumps(answer))

    def lost(self) -> str:
        """Starts a liveness check, and says which rank the others wait for.

        Returns:
            Ranks, their hosts and what is wrong with them, for an error message; empty if no rank stands out.
        """
        result: list[str] = []

        def check() -> None:
            with contextlib.suppress(RuntimeError):
                result.append(self._check())

        checker = threading.Thread(target=check, name="liveness check", daemon=True)
        checker.start()
        checker.join(_ANSWER_TIMEOUT_S + _STORE_TIMEOUT_S)
        return result[0] if result else self._sentence([0], SILENT)

    def _check(self) -> str:
        self._answer()
        self._store.set("liveness check", "1")
        deadline = time.monotonic() + _ANSWER_TIMEOUT_S
        while time.monotonic() < deadline:
            time.sleep(_ANSWER_TIMEOUT_S / 10)
            # The first rank that knows may end, and the store with it: the others report what it has found.
            if self._store.check(["lost"]):
                return str(self._store.get("lost").decode())
        answers = {
            rank: _Answer(*json.loads(self._store.get(f"here{rank}")))
            for rank in range(len(self._hosts))
            if self._store.check([f"here{rank}"])
        }
        lost = self._judge(answers)
        self._store.set("lost", lost)
        return lost

    def _judge(self, answers: dict[int, _Answer]) -> str:
        if silent := [rank for rank in range(len(self._hosts)) if rank not in answers]:
            return self._sentence(silent, SILENT)
        furthest = max(answer.collectives for answer in answers.values())
        if behind := [rank for rank, answer in answers.items() if answer.collectives < furthest]:
            return self._sentence(behind, "has not come to what the others wait for: it hangs, or waits for its data")
        longest = max(answer.since_s for answer in answers.values())
        if late := [rank for rank, answer in answers.items() if answer.since_s < _LATE_FRACTION * longest]:
            after_s = longest - max(answers[rank].since_s for rank in late)
            return self._sentence(late, f"came {after_s:.3g} s after the first, which --comm.timeout-s does not allow")
        return ""

    def _sentence(self, ranks: Sequence[int], what: str) -> str:
        who = " and ".join(f"rank {rank} on {self._hosts[rank]}" for rank in ranks)
        return f"{who} {what}"

    def end(self) -> None:
        """Stops answering."""
        atexit.unregister(self.end)
        self._ended.set()
        self._thread.join(_STORE_TIMEOUT_S)
