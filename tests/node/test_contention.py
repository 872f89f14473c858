"""What other processes and machines take of a rank's CPUs."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from knltrain.config import RunConfig, override
from knltrain.node import contention
from knltrain.node.contention import CpuContention, CpuContentionMonitor
from knltrain.runlog.console import Console
from knltrain.training.trainer import train

TICK = os.sysconf("SC_CLK_TCK")


class Machine:
    """A machine whose clock, own time and /proc/stat are made up."""

    def __init__(self, path, cpus, monkeypatch):
        self.path, self.clock, self.own = path, 100.0, 5.0
        self.cpus = {cpu: [0.0, 0.0] for cpu in cpus}  # busy and stolen seconds
        monkeypatch.setattr(contention.time, "monotonic", lambda: self.clock)
        monkeypatch.setattr(contention.time, "process_time", lambda: self.own)
        monkeypatch.setattr(contention, "_child_ticks", lambda process: 0)
        self.write()

    def write(self):
        lines = [
            f"cpu{cpu} {round(busy * TICK / 2)} {round(busy * TICK / 4)} {round(busy * TICK / 4)} 900 90 70 80 "
            f"{round(stolen * TICK)} 60 50"
            for cpu, (busy, stolen) in self.cpus.items()
        ]
        self.path.write_text("\n".join(["cpu  1 2 3 4 5 6 7 8 9 10", *lines, "intr 1 2 3", "ctxt 4"]) + "\n")

    def goes_on(self, seconds, own, busy, stolen=None):
        self.clock += seconds
        self.own += own
        for cpu in self.cpus:
            self.cpus[cpu][0] += busy.get(cpu, 0.0)
            self.cpus[cpu][1] += (stolen or {}).get(cpu, 0.0)
        self.write()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path / "stat", range(8), monkeypatch)


def test_what_is_not_this_process_s_is_others(machine):
    watch = CpuContentionMonitor({2, 3}, machine.path)
    machine.goes_on(10, own=15, busy={0: 9, 2: 10, 3: 10}, stolen={1: 5, 3: 2})
    assert watch.taken() == pytest.approx((0.5, 0.2))
    machine.goes_on(10, own=20, busy={2: 10, 3: 10})
    assert watch.taken() == pytest.approx((0.25, 0.1))


def test_what_a_run_has_no_thread_for_is_the_others(machine):
    """With fewer threads than cores, which the kernel moves out of each other's way."""
    watch = CpuContentionMonitor({0, 1, 2, 3}, machine.path, spare=2)
    machine.goes_on(40, own=80, busy=dict.fromkeys(range(4), 40))
    assert watch.taken() == pytest.approx((0, 0))
    assert watch.problem() == ""
    machine.goes_on(40, own=40, busy=dict.fromkeys(range(4), 40))
    assert watch.problem().startswith(
        "of this rank's 4 CPUs (0-3), beyond the 2 that it has no thread for, 1.0 went to other processes"
    )


def test_a_problem_is_that_of_half_a_minute_and_is_said_once(machine):
    watch = CpuContentionMonitor({2, 3}, machine.path)
    machine.goes_on(20, own=20, busy={2: 20, 3: 20})
    assert watch.problem() == "", "not yet half a minute"
    machine.goes_on(20, own=40, busy={2: 20, 3: 20})
    assert watch.problem() == (
        "of this rank's 2 CPUs (2-3) 0.5 went to other processes (`top` has their names): every step waits for its "
        "slowest thread"
    )
    machine.goes_on(40, own=0, busy={2: 40, 3: 40})
    assert watch.problem() == "", "it was said"


def test_each_look_is_at_what_came_after_the_one_before(machine):
    watch = CpuContentionMonitor({2, 3}, machine.path)
    machine.goes_on(40, own=80, busy={2: 40, 3: 40})
    assert watch.problem() == ""
    machine.goes_on(40, own=80, busy={2: 40, 3: 40}, stolen={2: 30})
    assert "0.8 went to other machines of the hypervisor" in watch.problem()


@pytest.mark.parametrize("cpus, others, said", [(2, 0.2, False), (2, 0.3, True), (64, 0.6, False), (64, 1.0, True)])
def test_what_daemons_take_is_not_worth_a_word(cpus, others, said, tmp_path):
    path = tmp_path / "stat"
    path.write_text("".join(f"cpu{cpu} 0 0 0 0 0 0 0 0\n" for cpu in range(cpus)))
    assert bool(CpuContentionMonitor(range(cpus), path).describe(CpuContention(others, 0.0))) == said


@pytest.mark.parametrize("text", [None, "", "cpu0 1 2\n", "cpux 1 2 3 4 5 6 7 8\n", "cpu0 1 2 3 4 5 6 7 8\n"])
def test_a_kernel_that_does_not_say_it_is_no_problem(text, tmp_path):
    """A container may count CPUs of its own from 0."""
    path = tmp_path / "stat"
    if text is not None:
        path.write_text(text)
    watch = CpuContentionMonitor({4, 5}, path)
    assert (watch.taken(), watch.problem()) == (CpuContention(0.0, 0.0), "")


SPIN = """
import os, sys
os.sched_setaffinity(0, [int(sys.argv[1])])
if os.fork() == 0:
    os.setsid()
    print(os.getpid(), flush=True)
    while True: pass
if sys.argv[2] == "stay":
    os.wait()
"""


@contextlib.contextmanager
def spinning(then):
    """On each CPU a process that spins, the child of one that stays with it as this one's child, or leaves it."""
    started = [
        subprocess.Popen([sys.executable, "-c", SPIN, str(cpu), then], stdout=subprocess.PIPE)
        for cpu in sorted(os.sched_getaffinity(0))
    ]
    pids = [int(process.stdout.readline()) for process in started]
    try:
        if then == "leave":
            for process in started:
                process.wait()
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for process in started:
            process.communicate()


def test_a_process_that_spins_is_seen():
    with spinning("leave"):
        watch = CpuContentionMonitor(os.sched_getaffinity(0))
        time.sleep(1)
        assert watch.taken().other > 0.5


@pytest.mark.skipif(not list(Path("/proc/self/task").glob("*/children")), reason="a kernel without lists of children")
def test_the_children_of_children_are_no_others():
    """torch.compile's workers, and the compilers that those start."""
    with spinning("stay"):
        before = contention._child_ticks("self")
        time.sleep(1)
        assert contention._child_ticks("self") - before > TICK / 10


def test_a_run_says_what_others_take_of_its_cpus(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(contention, "_CHECK_INTERVAL_S", 0.2)
    # Two threads would wait for each other at every loop, each for its turn beside what spins.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = override(
        RunConfig(),
        {"data": str(image_folder), "out": str(tmp_path / "run"), "model": "alexnet_bn_small", "image_size": 32,
         "global_batch": 16, "epochs": 3, "engine": "eager", "precision": "fp32",
         "checkpoint.every": 3.0},  # the thread that writes them hardly gets a turn beside what spins
    )  # fmt: skip
    with spinning("leave"), pytest.warns(UserWarning, match=r"of this rank's .* went to other processes"):
        summary, finished = train(config, Console(silent=True))
    assert finished
    assert summary["other_cpus"] > 0
    assert summary["stolen_cpus"] >= 0
