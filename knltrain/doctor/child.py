"""Checks with torch, in a child process that may hang or crash without affecting the other checks."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from knltrain.comm.segments import remove_segments_of
from knltrain.doctor.finding import Finding, run_check
from knltrain.errors import KnltrainError
from knltrain.launch.placement import RankPlacement, bind_rank

# Loading torch from a parallel file system may be slow; the other checks normally take a few seconds.
_TIMEOUTS_S = {"torch": 120.0, "kernels": 10.0, "engines": 30.0, "openmp": 10.0, "all-reduce": 60.0,
             "oneccl": 60.0, "data": 45.0}  # fmt: skip
# A check that holds the GIL delays its own time-out.
_GRACE_S = 5.0
_EXIT_TIMEOUT_S = 2.0


def run_torch_checks(names: Sequence[str], data: Path | None, command: Sequence[str] | None = None) -> list[Finding]:
    """Loads torch and runs checks by name; after a check that ends the process, the others run in a new one.

    Args:
        names: names of checks, from ``torch_checks.checks_of``.
        data: the folder for the check ``data``.
        command: a command to run instead of this module.

    Returns:
        The finding ``torch``, and if torch loads, one for each name.
    """
    findings: list[Finding] = []
    left = list(names)
    while left:
        torch, *found = _run(["torch", *left], data, command or (sys.executable, "-m", "knltrain.doctor.child"))
        findings = [*(findings or [torch]), *found]
        if not found:
            break
        left = left[len(found) :]
    return findings


def _run(names: Sequence[str], data: Path | None, command: Sequence[str]) -> list[Finding]:
    """Returns the findings of one process, up to the check that ended it, or only ``torch`` if it does not load."""
    findings: list[Finding] = []
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        process = subprocess.Popen(
            [*command, str(data or ""), *names],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        lines: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(target=_queue_lines, args=(process.stdout, lines), daemon=True)
        reader.start()
        try:
            for name in names:
                findings.append(_read_finding(name, lines, process, stderr))
                if findings[-1].severity == "error" and (name == "torch" or process.poll() is not None):
                    break
        finally:
            # With its children. A process that hangs in the kernel cannot be waited for.
            killed = {process.pid, *_session(process.pid)}
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            for one in killed:
                remove_segments_of(one)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_EXIT_TIMEOUT_S)
            reader.join(_EXIT_TIMEOUT_S)
            if not reader.is_alive():
                process.stdout.close()
    return findings


def _session(leader: int) -> list[int]:
    """Returns the processes of a session."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.getsid(int(name)) == leader:
                found.append(int(name))
    return found


def _queue_lines(stream: IO[str], lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def _read_finding(name: str, lines: queue.Queue[str], process: subprocess.Popen[str], stderr: IO[str]) -> Finding:
    limit_s = _TIMEOUTS_S[name] + _GRACE_S
    try:
        line = lines.get(timeout=limit_s)
    except queue.Empty:
        process.kill()
        process.wait(_EXIT_TIMEOUT_S)
        return Finding(
            name,
            "error",
            f"no answer within {limit_s:g} s",
            "training hangs in the same place",
            "a file system or a library that does not answer: run `python -X faulthandler -c 'import torch'`",
            limit_s,
        )
    if line:
        return Finding(**json.loads(line))
    code = process.wait(_EXIT_TIMEOUT_S)
    end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    stderr.seek(0)
    last = (stderr.read().strip().splitlines() or ["no message"])[-1]
    remedy = "install torch and knltrain again, one at a time, and see which one it is"
    if code == -signal.SIGILL:
        remedy = "a torch built for this processor; KNLTRAIN_ISA=avx2 and ONEDNN_MAX_CPU_ISA=AVX2 narrow it down"
    elif code == -signal.SIGKILL:
        remedy = "check for lack of memory (dmesg)"
    return Finding(name, "error", f"the process {end} ({last})", "training ends in the same way", remedy)


def _main(data: str, names: Sequence[str]) -> None:
    # Messages of libraries must not mix with the findings on stdout.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Before torch is loaded, as in training. Errors of binding are reported by another check.
    placement: RankPlacement | None = None
    with contextlib.suppress(KnltrainError):
        placement = bind_rank(strict=False)

    def report(finding: Finding) -> None:
        print(json.dumps(dataclasses.asdict(finding)), file=answers, flush=True)

    try:
        torch_checks = importlib.import_module("knltrain.doctor.torch_checks")
    except Exception as error:  # a missing library, or versions that do not match
        report(
            Finding(
                "torch",
                "error",
                f"{type(error).__name__}: {error}",
                "nothing can be trained in this environment",
                "install torch again, or what the cause names",
            )
        )
    else:
        checks = torch_checks.checks_of(placement, Path(data))
        for name in names:
            report(run_check(name, checks[name], _TIMEOUTS_S[name], torch_checks.ON_TIMEOUT.get(name)))
    # Do not wait for threads of checks that hang.
    os._exit(0)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2:])
