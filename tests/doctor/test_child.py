"""The process that tries torch may die and hang; the checks after that are made all the same."""

import json
import os
import signal
import sys
import time

import pytest

from knltrain.doctor import child
from knltrain.doctor.child import run_torch_checks

# Answers "ok" for each name that it is given, but for those whose name says what it does instead.
CHILD = """
import json, os, signal, sys, time
sys.stderr.write("last words\\n")
for name in sys.argv[2:]:
    if name == os.environ.get("DIES"):
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    if name == os.environ.get("LEAVES"):
        sys.exit(3)
    if name == os.environ.get("HANGS"):
        open(os.environ["PIDS"], "a").write(f"{os.getpid()}\\n")
        open(f"/dev/shm/{os.getpid()}:0:0", "w").close()  # as libfabric
        time.sleep(600)
    severity = "error" if name == os.environ.get("BAD") else "ok"
    print(json.dumps({"name": name, "severity": severity, "cause": sys.argv[1]}), flush=True)
time.sleep(600)  # threads that are not waited for
"""
NAMES = ("kernels", "engines", "openmp")


@pytest.fixture
def run(tmp_path, monkeypatch):
    script = tmp_path / "child.py"
    script.write_text(CHILD)

    def start(names=NAMES, data=None, **environ):
        for name, value in environ.items():
            monkeypatch.setenv(name, str(value))
        return run_torch_checks(names, data, (sys.executable, str(script)))

    return start


def severities(findings):
    return {finding.name: finding.severity for finding in findings}


def test_all_answers_are_taken_in_order(run, tmp_path):
    findings = run(data=tmp_path)
    assert [finding.name for finding in findings] == ["torch", *NAMES]
    assert {finding.cause for finding in findings} == {str(tmp_path)}


def test_an_error_among_them_ends_nothing(run):
    assert severities(run(BAD="engines")) == {"torch": "ok", "kernels": "ok", "engines": "error", "openmp": "ok"}


@pytest.mark.parametrize(
    "end, cause, remedy",
    [
        ({"DIES": "engines", "SIGNAL": int(signal.SIGILL)}, "was ended by SIGILL (last words)", "KNLTRAIN_ISA"),
        ({"DIES": "engines", "SIGNAL": int(signal.SIGKILL)}, "was ended by SIGKILL (last words)", "memory"),
        ({"LEAVES": "engines"}, "exited with 3 (last words)", "again"),
    ],
)
def test_the_checks_after_one_that_dies_are_made_in_a_new_process(run, end, cause, remedy):
    findings = run(**end)
    assert severities(findings) == {"torch": "ok", "kernels": "ok", "engines": "error", "openmp": "ok"}
    (bad,) = (finding for finding in findings if finding.severity == "error")
    assert cause in bad.cause
    assert remedy in bad.remedy


def test_one_that_hangs_is_ended(run, tmp_path, monkeypatch):
    monkeypatch.setattr(child, "_TIMEOUTS_S", {**child._TIMEOUTS_S, "openmp": 0.1})
    monkeypatch.setattr(child, "_GRACE_S", 2.0)
    pids = tmp_path / "pids"
    findings = run(HANGS="openmp", PIDS=pids)
    assert severities(findings) == {"torch": "ok", "kernels": "ok", "engines": "ok", "openmp": "error"}
    assert "no answer within 2.1 s" in findings[-1].cause
    deadline = time.monotonic() + 10
    pid = int(pids.read_text())
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{pid}")
    assert not os.path.exists(f"/dev/shm/{pid}:0:0")


@pytest.mark.parametrize("end", [{"BAD": "torch"}, {"DIES": "torch", "SIGNAL": int(signal.SIGSEGV)}])
def test_where_torch_does_not_load_nothing_else_is_tried(run, end):
    assert severities(run(**end)) == {"torch": "error"}


def test_a_torch_that_cannot_be_imported_is_a_finding(tmp_path, monkeypatch):
    """The real process, with a torch before the real one that is broken."""
    (tmp_path / "torch.py").write_text(
        "print('hello')\nraise ImportError('libgomp.so.1: cannot open shared object file')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,) = run_torch_checks(("kernels",), None)
    assert (finding.name, finding.severity) == ("torch", "error")
    assert "libgomp.so.1: cannot open" in finding.cause


def test_the_launchers_variables_may_be_damaged(monkeypatch):
    """What is wrong with them is another check's finding, and torch is tried all the same."""
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    findings = run_torch_checks(("openmp",), None)
    assert severities(findings).keys() == {"torch", "openmp"}
    assert findings[0].severity == "ok"
    assert json.dumps([finding.cause for finding in findings])
