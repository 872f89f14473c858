"""Training steps in a child process, which does not share malloc's arenas, thread pools and compiled code."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from knltrain.bench.step import StepTime, TrainingStep
from knltrain.config import RunConfig
from knltrain.errors import KnltrainError
from knltrain.node.memory import peak_resident_mb

# Spawned: a forked process would inherit torch's state and memory of this one.
_SPAWN = multiprocessing.get_context("spawn")
_SHUTDOWN_TIMEOUT_S = 5.0


class Process:
    """A :class:`TrainingStep` in a child process, which sleeps between requests.

    Args:
        config: as for TrainingStep.
        threads: as for TrainingStep.

    Attributes:
        settings: settings of the step.
        warmup_s: duration of its first steps, seconds.

    Raises:
        KnltrainError: raised by TrainingStep in the child, or the child ended, for example for lack of memory.
    """

    def __init__(self, config: RunConfig, threads: int | None = None) -> None:
        self._pipe, child_end = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(child_end,))
        self._process.start()
        child_end.close()
        try:
            self.settings, self.warmup_s = self._request(to=(config, threads))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def measure(self, steps: int) -> tuple[list[StepTime], float]:
        """Runs one step that warms caches and threads, then ``steps`` timed ones.

        Returns:
            Their times, and the peak memory of the child so far, in MiB.
        """
        times, peak_rss_mb = self._request(to=steps)
        return times, peak_rss_mb

    def close(self) -> None:
        """Ends the child: it exits by itself if it sleeps, and is terminated otherwise."""
        self._pipe.close()
        self._process.join(_SHUTDOWN_TIMEOUT_S)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _request(self, to: object) -> Any:
        try:
            self._pipe.send(to)
            answer = self._pipe.recv()
        except (EOFError, OSError):  # the child has ended
            self._process.join()
            code = self._process.exitcode or 0
            end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
            hint = "; perhaps for lack of memory" if code == -signal.SIGKILL else ""
            raise KnltrainError(f"the measuring process {end}{hint}") from None
        if isinstance(answer, KnltrainError):
            raise answer
        return answer


def _serve(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            step = TrainingStep(*pipe.recv())
            pipe.send((step.settings, step.warm_up()))
            while True:
                steps = pipe.recv()
                step()
                times = [step() for _ in range(steps)]
                pipe.send((times, peak_resident_mb()))
        except KnltrainError as error:
            pipe.send(error)
        except RuntimeError as error:  # torch: out of memory, a compiler error
            pipe.send(KnltrainError(str(error).strip().splitlines()[0]))
