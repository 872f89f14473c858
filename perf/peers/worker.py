"""One contestant of perf/vs_peers.py in a process of its own: warms up, then measures whenever it is told to.

Started as ``python -m peers.worker JOB`` with the job as JSON. Answers are JSON lines on stdout: one when it is warm,
then one for each line ``STEPS`` on stdin, until stdin closes. Between them it sleeps and holds no memory that it does
not need.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
import time
import traceback
from typing import Any

_WARMUP_STEPS = 3
# Steps that bring back the memory which was released while others measured: the first does not bring back all.
_UNTIMED_STEPS = 2


def main() -> None:
    # What libraries print goes to stderr; stdout is for answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job: dict[str, Any] = json.loads(sys.argv[1])
    if job["cpus"]:
        os.sched_setaffinity(0, job["cpus"])
    try:
        import torch

        from knltrain.bench.primitives import onednn_version
        from peers.steps import RECIPES

        start = time.perf_counter()
        step = RECIPES[job["recipe"]](job)
        losses = [float(step()) for _ in range(_WARMUP_STEPS)]
        answer = {
            "warmup_s": time.perf_counter() - start,
            "first_loss": losses[0],
            "engine": job["engine"],
            "torch": torch.__version__,
            "onednn": onednn_version(),
        }
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"reason": f"{type(error).__name__}: {error}".splitlines()[0]}), file=answers)
        return
    _release_free_memory()
    print(json.dumps(answer), file=answers)
    for line in sys.stdin:
        for _ in range(_UNTIMED_STEPS):
            step()
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - start)
        last_loss = float(loss)
        del loss  # and the graph that it holds
        _release_free_memory()
        if not math.isfinite(last_loss):
            print(json.dumps({"reason": f"its loss is {last_loss}"}), file=answers)
            return
        print(json.dumps({"seconds": seconds, "last_loss": last_loss, "peak_mib": _peak_mib()}), file=answers)


def _release_free_memory() -> None:
    """Lets ten contestants wait side by side: what malloc holds for the next step goes back to the system."""
    process = ctypes.CDLL(None)
    for release in ("MallocExtension_ReleaseFreeMemory", "malloc_trim"):  # tcmalloc's, glibc's
        if hasattr(process, release):
            getattr(process, release)(0)


def _peak_mib() -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    main()
