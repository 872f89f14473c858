"""Checks that fail, hang and answer; and the table."""

import threading
import time

from knltrain.doctor.finding import Finding, as_row, run_check, worst, worst_first

FINE = Finding("one", "ok", "all of it")
BAD = Finding("two", "error", "3 of 4", "nothing works", "repair it")


def test_a_check_that_answers():
    found = run_check("one", lambda: FINE, 5)
    assert (found.severity, found.cause) == ("ok", "all of it")
    assert found.seconds < 5


def test_a_check_that_raises_is_a_warning_that_says_what():
    found = run_check("one", lambda: 1 // 0, 5)
    assert (found.name, found.severity) == ("one", "warning")
    assert "ZeroDivisionError" in found.cause
    assert found.remedy


def test_a_check_that_hangs_is_left_behind():
    over = threading.Event()

    def hang():
        over.wait(60)
        return FINE

    started = time.monotonic()
    found = run_check("one", hang, 0.05)
    assert time.monotonic() - started < 30
    assert (found.severity, found.cause) == ("warning", "no answer within 0.05 s")
    assert run_check("two", hang, 0.05, on_timeout=BAD).severity == "error"
    over.set()
    for thread in [thread for thread in threading.enumerate() if thread.name.startswith("doctor-")]:
        thread.join(10)


def test_the_worst_comes_first_and_the_rest_stays_in_order():
    note, warning = Finding("three", "note", "x"), Finding("four", "warning", "x")
    assert [one.name for one in worst_first([FINE, note, warning, BAD, note])] == [
        "two",
        "four",
        "three",
        "three",
        "one",
    ]
    assert worst([FINE, note]) == "note"
    assert worst([warning, BAD]) == "error"
    assert worst([]) == "ok"


def test_rows_fit_on_80_columns_and_keep_paths_whole():
    path = "/a/very/long/path/" + 60 * "x"
    row = as_row(Finding("numa-balancing", "warning", "because " * 20, "symptom " * 20, f"LD_PRELOAD={path}"))
    lines = row.splitlines()
    assert lines[0].startswith("warning  numa-balancing symptom")
    assert [line for line in lines if len(line) > 80] == [line for line in lines if path in line]
    assert any(line.strip().startswith("cause: because") for line in lines)
    assert any(path in line for line in lines)
    assert as_row(FINE) == f"{'ok       one':<24}all of it"
