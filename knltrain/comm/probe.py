"""A two-rank all-reduce on this node, in every data type that the trainer communicates."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist

from knltrain.comm.backend import choose_backend
from knltrain.comm.segments import remove_segments_of
from knltrain.launch import rendezvous
from knltrain.launch.world import Ranks
from knltrain.node.affinity import plan_node
from knltrain.node.topology import read_node

# The types of comm.dtype.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ELEMENTS = 1_000_000
_RANKS = 2
# The first calls set up connections and buffers.
_NUM_WARMUP, _NUM_TIMED = 2, 5
# A rank without its peer times out before it is killed, and can say why.
_RANK_TIMEOUT_FRACTION = 0.7


@dataclass(frozen=True)
class AllReduceResult:
    """Result of the all-reduce in one data type.

    Attributes:
        dtype: fp32 or bf16.
        seconds: median time of an all-reduce of ``ELEMENTS`` elements; 0 if it failed.
        reason: why it failed; empty if the sums were right.
    """

    dtype: str
    seconds: float
    reason: str = ""


def run_two_rank_all_reduce(limit_s: float, backend: str = "gloo") -> list[AllReduceResult]:
    """Starts two ranks as the trainer would, and kills them after a time limit.

    Args:
        limit_s: time limit in seconds, torch's import included.
        backend: gloo or ccl.

    Returns:
        One result for each of ``DTYPES``, in that order.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        files = [
            (
                stack.enter_context(open(Path(folder, f"out{rank}"), "w+")),
                stack.enter_context(open(Path(folder, f"err{rank}"), "w+")),
            )
            for rank in range(_RANKS)
        ]
        timeout_s = _RANK_TIMEOUT_FRACTION * limit_s
        command = [sys.executable, "-m", "knltrain.comm.probe", str(Path(folder, "store")), str(timeout_s), backend]
        # One thread each: other ranks may be using the cores of this node.
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen([*command, str(rank)], stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environ)
            for rank, (out, err) in enumerate(files)
        ]
        deadline = time.monotonic() + limit_s
        late = []
        try:
            for rank, process in enumerate(processes):
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    late.append(rank)
        finally:
            for process in processes:
                process.kill()
                process.wait()
                remove_segments_of(process.pid)
        out, err = ([_text(stream) for stream in streams] for streams in zip(*files, strict=True))
    reason = _failure_reason(processes, late, err, limit_s)
    # gloo and oneCCL write to stdout too.
    rows = [json.loads(line) for line in out[0].splitlines() if line.startswith("{")]
    done = {row["dtype"]: AllReduceResult(**row) for row in rows}
    return [done.get(dtype, AllReduceResult(dtype, 0.0, reason)) for dtype in DTYPES]


def _text(stream: IO[str]) -> str:
    stream.seek(0)
    return stream.read()


def _failure_reason(
    processes: list[subprocess.Popen[bytes]], late: list[int], errors: list[str], limit_s: float
) -> str:
    """Returns why the all-reduce failed: a time-out, or the last line that a rank wrote to stderr."""
    last_lines = [lines[-1] for text in errors if (lines := text.strip().splitlines())]
    if late:
        return f"no answer of rank {' and '.join(map(str, late))} within {limit_s:g} s"
    ended = next((process.returncode for process in processes if process.returncode), 0)
    return last_lines[0] if last_lines else f"a rank exited with {ended} and no message"


def _rank(store_path: str, timeout_s: float, backend: str, rank: int) -> None:
    torch.set_num_threads(1)
    plan = plan_node(read_node(), _RANKS)
    with contextlib.suppress(OSError):
        # On separate cores, as the trainer's ranks: on one CPU, each would wait for the other's time slice.
        os.sched_setaffinity(0, plan.ranks[rank].compute)
    ranks = Ranks("none", rank, _RANKS, rank, _RANKS, f"file://{store_path}")
    found = rendezvous.find_rendezvous(ranks)
    choose_backend(backend, ranks, already_set=found.export())
    dist.init_process_group(
        backend, init_method=found.init_method, rank=rank, world_size=_RANKS, timeout=timedelta(seconds=timeout_s)
    )
    expected = sum(range(1, _RANKS + 1))
    for name, dtype in DTYPES.items():
        times, right = [], True
        for _ in range(_NUM_WARMUP + _NUM_TIMED):
            tensor = torch.full((ELEMENTS,), rank + 1, dtype=dtype)
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            times.append(time.perf_counter() - start)
            right = right and bool((tensor == expected).all())
        reason = "" if right else f"the sum of {_RANKS} ranks is wrong"
        print(
            json.dumps(
                {"dtype": name, "seconds": statistics.median(times[_NUM_WARMUP:]) if right else 0.0, "reason": reason}
            ),
            flush=True,
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(sys.argv[1], float(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
