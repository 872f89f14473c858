"""Training steps in a process of their own: malloc's arenas, thread pools and compiled code are not shared."""

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

# Spawned, not forked: a fork would inherit this process's torch and what it has allocated.
_SPAWN = multiprocessing.get_context("spawn")
_GOODBYE_S = 5.0


class Process:
    """A :class:`TrainingStep` elsewhere; it sleeps while nothing is asked of it.

    Args:
        config: as of TrainingStep.
        threads: as of TrainingStep.

    Attributes:
        settings: of the step.
        warmup_s: seconds of its first steps.

    Raises:
        KnltrainError: what TrainingStep raised there, or the process ended, as for want of memory.
    """

    def __init__(self, config: RunConfig, threads: int | None = None) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()
        try:
            self.settings, self.warmup_s = self._answer(to=(config, threads))
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
        """Does one step that brings caches and threads back, then ``steps`` that are timed.

        Returns:
            Their times, and the peak memory of the process so far, in MiB.
        """
        times, peak_rss_mb = self._answer(to=steps)
        return times, peak_rss_mb

    def close(self) -> None:
        """Ends the process: of itself where it sleeps, and otherwise whatever it is doing."""
        self._pipe.close()
        self._process.join(_GOODBYE_S)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _answer(self, to: object) -> Any:
        try:
            self._pipe.send(to)
            answer = self._pipe.recv()
        except (EOFError, OSError):  # nobody is at the other end any more
            self._process.join()
            code = self._process.exitcode or 0
            end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
            hint = "; was there memory enough?" if code == -signal.SIGKILL else ""
            raise KnltrainError(f"the measuring process {end}{hint}") from None
        if isinstance(answer, KnltrainError):
            raise answer
        return answer


def _serve(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one, which ends it
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
        except RuntimeError as error:  # torch: no memory, a compiler that failed
            pipe.send(KnltrainError(str(error).strip().splitlines()[0]))
