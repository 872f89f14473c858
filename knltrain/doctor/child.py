"""The checks that need torch, in a process that may hang or die without taking the others with it."""

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

from knltrain.doctor.finding import Finding, run_check
from knltrain.errors import KnltrainError
from knltrain.launch.placement import RankPlacement, bind_rank

# torch comes from a parallel file system at times; the others are done in a few seconds where all is well.
_LIMITS_S = {"torch": 120.0, "kernels": 10.0, "engines": 30.0, "openmp": 10.0, "all-reduce": 60.0,
             "oneccl": 60.0, "data": 45.0}  # fmt: skip
# What keeps the interpreter's lock keeps the check's own limit from being noticed.
_GRACE_S = 5.0
_GOODBYE_S = 2.0


def try_out(names: Sequence[str], data: Path | None, command: Sequence[str] | None = None) -> list[Finding]:
    """Loads torch and runs checks by name; after one that ends the process, the others run in a new one.

    Args:
        names: of ``computing.CHECKS``.
        data: the folder of the check of that name.
        command: what is run in the place of this module.

    Returns:
        ``torch``, and where it loads one for each name.
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
    """The findings of one process: of all names, or up to the one that ended it, or of torch that does not load."""
    findings: list[Finding] = []
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            [*command, str(data or ""), *names],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        lines: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True)
        reader.start()
        try:
            for name in names:
                findings.append(_answer(name, lines, process, said))
                if findings[-1].severity == "error" and (name == "torch" or process.poll() is not None):
                    break
        finally:
            # With those that it has started. What hangs in the kernel is left behind, and ends when that lets it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GOODBYE_S)
            reader.join(_GOODBYE_S)
            if not reader.is_alive():
                process.stdout.close()
    return findings


def _pump(stream: IO[str], lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def _answer(name: str, lines: queue.Queue[str], process: subprocess.Popen[str], said: IO[str]) -> Finding:
    limit_s = _LIMITS_S[name] + _GRACE_S
    try:
        line = lines.get(timeout=limit_s)
    except queue.Empty:
        process.kill()
        process.wait(_GOODBYE_S)
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
    code = process.wait(_GOODBYE_S)
    end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    said.seek(0)
    last = (said.read().strip().splitlines() or ["it said nothing"])[-1]
    remedy = "install torch and knltrain again, one at a time, and see which one it is"
    if code == -signal.SIGILL:
        remedy = "a torch built for this processor; KNLTRAIN_ISA=avx2 and ONEDNN_MAX_CPU_ISA=AVX2 to find who it is"
    elif code == -signal.SIGKILL:
        remedy = "was there memory enough?"
    return Finding(name, "error", f"the process {end} ({last})", "training ends in the same way", remedy)


def _main(data: str, names: Sequence[str]) -> None:
    # What libraries print is not for those who read the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Before torch is loaded, as training does. What is wrong with it is the finding of another check.
    place: RankPlacement | None = None
    with contextlib.suppress(KnltrainError):
        place = bind_rank(strict=False)

    def say(finding: Finding) -> None:
        print(json.dumps(dataclasses.asdict(finding)), file=answers, flush=True)

    try:
        computing = importlib.import_module("knltrain.doctor.torch_checks")
    except Exception as error:  # a library that is missing, versions that do not fit
        say(
            Finding(
                "torch",
                "error",
                f"{type(error).__name__}: {error}",
                "nothing can be trained in this environment",
                "install torch again, or what the cause names",
            )
        )
    else:
        checks = computing.checks_of(place, Path(data))
        for name in names:
            say(run_check(name, checks[name], _LIMITS_S[name], computing.LATE.get(name)))
    # Threads of checks that hang are not waited for.
    os._exit(0)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2:])
