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
from knltrain.launch.signals import ActAtOnce
from knltrain.training.signals import ONE_REQUEST_S, SIGNALS, StopRequest, waits_for_request

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
        wait_for(lambda: not waits_for_request(process.pid), process)  # it was noted
        time.sleep(ONE_REQUEST_S)
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


def noted(stop):
    deadline = time.monotonic() + 60
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.01)
    return stop.requested


@pytest.mark.parametrize("first", SIGNALS)
def test_the_first_is_noted_and_what_was_before_is_there_again(first):
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with StopRequest() as stop:
        assert not stop.requested
        assert waits_for_request(os.getpid())
        signal.raise_signal(first)
        signal.raise_signal(first)  # as from a terminal and from a launcher
        assert noted(stop)
        assert not waits_for_request(os.getpid())
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers


# A main thread that waits in native code, where Python's handlers do not run.
STUCK = """
import os, sys, tempfile, threading
import torch.distributed as dist
from knltrain.cli.options import reports_errors
from knltrain.launch.signals import run_before_end
from knltrain.training.signals import StopRequest
kind, mark = sys.argv[1:]
run_before_end(lambda: open(mark, "w").close())
store = dist.FileStore(tempfile.mkstemp()[1], 2)
def wait():
    print("ready", flush=True)
    store.wait(["never"])
@reports_errors
def command():
    if kind == "command":
        wait()
    with StopRequest() as stop:
        if kind == "run":
            wait()
        with stop.at_once():
            wait()
command()
"""


@pytest.mark.parametrize(
    "kind, numbers, code",
    [
        ("run", (signal.SIGTERM, signal.SIGTERM), -signal.SIGTERM),
        ("run", (signal.SIGINT, signal.SIGUSR1), -signal.SIGUSR1),
        ("run", (signal.SIGTERM, signal.SIGINT), 130),
        ("run", (signal.SIGINT, signal.SIGINT), 130),
        ("start", (signal.SIGTERM,), 75),
        ("start", (signal.SIGINT,), 75),
        ("command", (signal.SIGTERM,), -signal.SIGTERM),
        ("command", (signal.SIGINT, signal.SIGINT), 130),
    ],
)
def test_a_second_signal_ends_what_waits_in_native_code(kind, numbers, code, tmp_path):
    """And the first one what has nothing to save; what is registered is done before."""
    mark = tmp_path / "mark"
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, kind, str(mark)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        for number in numbers:
            time.sleep(2 * ONE_REQUEST_S)
            assert process.poll() is None
            process.send_signal(number)
        _, errors = process.communicate(timeout=60)  # the store waits for five minutes
    finally:
        process.kill()
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert mark.exists()


def test_a_child_that_is_forked_does_not_count_its_signals_as_its_parents():
    """A terminal sends Ctrl-C to all of them."""
    with StopRequest() as stop:
        if not (pid := os.fork()):
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        os.waitpid(pid, 0)
        time.sleep(0.2)
        assert not stop.requested


def test_late_ones_do_nothing_but_ctrl_c():
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with ActAtOnce(), StopRequest() as stop:  # as in a command
            signal.raise_signal(signal.SIGUSR1)
            assert noted(stop)
            stop.ignore_late()
            time.sleep(ONE_REQUEST_S)
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
        "import os, signal, time\n"
        "from knltrain.training.signals import SIGNALS, StopRequest\n"
        "with StopRequest() as stop:\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)\n"
        "    for number in (signal.SIGTERM, signal.SIGUSR1):\n"
        "        os.kill(os.getpid(), number)\n"
        "    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)\n"
        "    time.sleep(0.3)\n"
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
        assert noted(stop)
        libc.prctl(get_signal, ctypes.byref(sent))
    assert sent.value == 0
