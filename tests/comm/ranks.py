"""Starts ranks of a test as processes, and waits for them with a deadline."""

import json
import os
import subprocess
import sys
import time

import pytest


def start_ranks(script, size, folder, *arguments, **environment):
    """Starts ``script`` once for each rank, as torchrun would, and returns the processes."""
    launcher = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(size):
        ours = {"RANK": str(rank), "LOCAL_RANK": str(rank), **launcher, **environment}
        output = (folder / f"rank{rank}.txt").open("w")
        processes.append(
            subprocess.Popen(
                [sys.executable, str(script), str(folder), *map(str, arguments)],
                stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **ours},
            )
        )  # fmt: skip
        output.close()
    return processes


def start_by_mpiexec(script, size, folder, *arguments, **environment):
    """Starts ``script`` once for each rank with Intel MPI's mpiexec, and returns that, in a list."""
    from knltrain.launch.mpiexec import command_line, find_mpiexec

    mpiexec = find_mpiexec()
    if mpiexec.kind != "intel":
        pytest.skip(f"{mpiexec.path} is not Intel MPI's")
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **mpiexec.environment, **environment}
    words = [sys.executable, str(script), str(folder), *map(str, arguments)]
    with (folder / "ranks.txt").open("w") as output:
        command = command_line(mpiexec, size, size, [], words, environ)
        return [subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environ)]


def wait_for(processes, seconds):
    """Waits until all have ended, kills what is left at the deadline, and returns their exit codes."""
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        return [process.poll() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def outputs(folder):
    """What the ranks printed, one after the other."""
    return "".join(path.read_text() for path in sorted(folder.glob("rank*.txt")))


def results(folder, size):
    """What each rank wrote as JSON."""
    return [json.loads(path.read_text()) for rank in range(size) if (path := folder / f"rank{rank}.json").exists()]
