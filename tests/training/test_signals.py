"""A second signal acts at once, wherever the run is, and what it interrupts does no harm."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from knltrain import checkpoint
from knltrain.training.signals import SIGNALS, StopRequest

# The command, whose checkpoints of a folder with the file "slow" in it are written for a minute.
SLOW = """
import sys, time
from pathlib import Path
from knltrain.cli import main as cli
from knltrain.checkpoint import store
write_file = store.write_file
def slowly(path, parts):
    written = write_file(path, parts)
    if (path.parents[2] / "slow").exists():
        (path.parents[2] / "writing").touch()
        time.sleep(60)
    return written
store.write_file = slowly
cli.main()
"""


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def caught(pid, number):
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(mask >> (number - 1) & 1)


@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_while_a_checkpoint_is_written_leaves_the_one_before(second, image_folder, tmp_path):
    out, script = tmp_path / "run", tmp_path / "slow.py"
    script.write_text(SLOW)
    # Steps of an epoch: two. A checkpoint after each.
    command = [sys.executable, str(script), "train", "--recipe", "cifar-256", "--data", str(image_folder),
               "--out", str(out), "--global-batch", "24", "--epochs", "1e5", "--precision", "fp32",
               "--engine", "eager"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        wait_for(lambda: list(out.glob("checkpoints/step-*")), process)
        (out / "slow").touch()
        wait_for(lambda: (out / "writing").exists(), process)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: not caught(process.pid, signal.SIGUSR1), process)  # it was noted
        process.send_signal(second)
        _, errors = process.communicate(timeout=40)  # less than what a file takes
    finally:
        process.kill()
    assert process.returncode == (130 if second == signal.SIGINT else -second), errors
    assert "Traceback" not in errors
    (whole, *_) = reversed(checkpoint.list_checkpoints(out))
    state = checkpoint.verify(whole)
    (out / "slow").unlink()
    result = subprocess.run(
        [*command, "--max-steps", str(state["step"] + 1)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert f"resumed from {whole}" in result.stdout
    assert not list(out.glob("checkpoints/.*"))


@pytest.mark.parametrize("first", SIGNALS)
def test_the_first_is_noted_and_what_was_before_is_there_again(first):
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(first)
        assert stop.requested
        assert caught(os.getpid(), signal.SIGINT)  # which is Python's own business
        assert not caught(os.getpid(), signal.SIGTERM)
        assert not caught(os.getpid(), signal.SIGUSR1)
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers


def test_late_ones_do_nothing_but_ctrl_c():
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGUSR1)
            stop.ignore_late()
            signal.raise_signal(signal.SIGTERM)
            assert caught(os.getpid(), signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        assert signal.getsignal(signal.SIGINT) == handlers[signal.SIGINT]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_signals_that_come_at_the_same_time_are_one():
    """As a launcher and a batch system may send them; Python would say of the second that it ignores it."""
    # In a process of one thread: in another one, a thread that does not block them would take the first at once.
    code = (
        "import os, signal\n"
        "from knltrain.training.signals import SIGNALS, StopRequest\n"
        "with StopRequest() as stop:\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)\n"
        "    for number in (signal.SIGTERM, signal.SIGUSR1):\n"
        "        os.kill(os.getpid(), number)\n"
        "    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)\n"
        "    assert stop.requested\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_parents_end_is_one_request_however_often_the_kernel_says_it():
    """It does for each thread of a parent that is killed; a sweep has several."""
    libc = ctypes.CDLL(None)
    set_signal, get_signal = 1, 2  # PR_SET_PDEATHSIG, PR_GET_PDEATHSIG: <sys/prctl.h>
    sent = ctypes.c_int()
    libc.prctl(set_signal, signal.SIGTERM)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        libc.prctl(get_signal, ctypes.byref(sent))
    assert stop.requested
    assert sent.value == 0
