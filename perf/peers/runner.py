"""A contestant's process, from the side of the race."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knltrain.errors import KnltrainError

# torch.compile takes over a minute for ResNet-50 on two cores, and ten times as long on a busy machine.
_ANSWER_TIMEOUT_S = 1200.0


class Runner:
    """Starts a worker, warms it up, has it measure, and ends it.

    Args:
        job: what :mod:`peers.steps` asks for, and ``cpus`` to bind it to (none: all).
        environ: the process's environment.
        python: the interpreter, which has knltrain beside its PyTorch.

    Raises:
        KnltrainError: the contestant cannot run, in its own words.
    """

    def __init__(self, job: Mapping[str, Any], environ: Mapping[str, str], python: str = sys.executable) -> None:
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), environ.get("PYTHONPATH")]))
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, "-m", "peers.worker", json.dumps(job)],
            env={**environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        self.start = self._answer()

    def measure(self, steps: int) -> dict[str, Any]:
        """Returns the seconds of each step, the last loss, the peak memory and what else used the processor.

        ``other_cores`` is how many cores, on average over the turn, worked for anything but this contestant: other
        contestants that do not sleep, or other processes.
        """
        start, everybody, mine = time.perf_counter(), _busy_s(), self._cpu_s()
        assert self._process.stdin is not None
        try:
            print(steps, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._death() from None
        answer = self._answer()
        others = (_busy_s() - everybody) - (self._cpu_s() - mine)
        return {**answer, "other_cores": max(0.0, others / (time.perf_counter() - start))}

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(_ANSWER_TIMEOUT_S):
                self.close()
                raise KnltrainError(f"no answer within {_ANSWER_TIMEOUT_S:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._death()
        answer: dict[str, Any] = json.loads(line)
        if "reason" in answer:
            self.close()
            raise KnltrainError(answer["reason"])
        return answer

    def _death(self) -> KnltrainError:
        code = self._process.wait()
        self._stderr.seek(0)
        said = self._stderr.read().strip().splitlines()
        self.close()
        if code == -9:
            return KnltrainError("killed, probably for want of memory")
        return KnltrainError(f"ended with {code}: {said[-1] if said else 'without a word'}")

    def _cpu_s(self) -> float:
        # The fields after the name, which is in parentheses and may hold blanks: utime and stime are the 12th and 13th.
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _busy_s() -> float:
    """Seconds that all cores together have worked since the machine started."""
    with open("/proc/stat") as stat:
        user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, stat.readline().split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
