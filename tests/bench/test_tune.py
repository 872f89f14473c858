"""What tune stores is found where it holds, and nowhere else."""

import contextlib
import dataclasses
import errno
import functools
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from knltrain.bench import tune
from knltrain.bench.compare import compare
from knltrain.config import RunConfig
from knltrain.errors import KnltrainError
from knltrain.launch.mpiexec import find_mpiexec
from knltrain.node import tuning_cache
from knltrain.node.affinity import threads_per_rank
from knltrain.node.layouts import Layout
from knltrain.node.topology import Node, read_node
from knltrain.node.tuning_cache import measured_file, settings_of, store, stored_engine, stored_layout
from knltrain.runlog.console import Console

NODE = Node("Some CPU", frozenset({"avx2"}), (0, 1), ((0,), (1,)), 2)
SMALL = RunConfig(model="alexnet_bn_small", image_size=32, global_batch=4, precision="fp32")
QUIET = Console(silent=True)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KNLTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def keep(fastest, **more):
    tuning_cache.check_writable()
    store({**settings_of("resnet50", "bf16", NODE, 2), **more}, {"fastest": fastest})


def asked(model="resnet50", precision="bf16", node=NODE, threads=2):
    return stored_engine(model, precision, node, threads)


def test_tune_measures_and_stores(monkeypatch, cache):
    monkeypatch.setattr(tune, "compare", functools.partial(compare, engines=("eager",)))
    result = tune.tune(SMALL, QUIET, steps=1, budget_s=0)
    assert (result["fastest"], result["stored"]) == ("eager", str(cache / "measured.json"))
    (stored,) = json.loads(measured_file().read_text())
    assert result["layout"] is None
    assert {row["reason"] for row in result["layouts"]} == {"the time limit of 0 s was reached"}
    assert stored["engines"] == result["engines"]
    assert stored["settings"].items() >= {"model": "alexnet_bn_small", "batch": 4, "optimizer": "lars/paper"}.items()
    node = read_node()
    threads = threads_per_rank(node, local_size=1)
    assert stored_engine("alexnet_bn_small", "fp32", node, threads) == "eager"
    assert stored_engine("alexnet_bn_small", "fp32", node, threads + 1) is None


def test_the_shortest_step_wins(monkeypatch):
    engines = [{"engine": "eager", "images_per_s": 3.0}, {"engine": "ipex", "images_per_s": 4.0},
               {"engine": "compile", "reason": "no compiler"}]  # fmt: skip
    settings = {"precision": "fp32", "threads": 2, "batch": 4, "image_size": 32, "optimizer": "lars/paper"}
    monkeypatch.setattr(tune, "compare", lambda *args, **options: {**settings, "engines": engines})
    assert tune.tune(SMALL, QUIET, steps=1, budget_s=0)["fastest"] == "ipex"
    assert stored_engine("alexnet_bn_small", "fp32", read_node(), 2) == "ipex"


def test_a_measurement_holds_for_its_settings_only(monkeypatch):
    monkeypatch.delenv("KNLTRAIN_ISA", raising=False)  # it is one of them, whatever the node's are
    assert asked() is None
    keep("fused")
    assert asked() == "fused"
    assert asked(model="alexnet") is None
    assert asked(precision="fp32") is None
    assert asked(threads=1) is None
    assert asked(node=dataclasses.replace(NODE, cpu_model="Other CPU")) is None
    assert asked(node=dataclasses.replace(NODE, flags=frozenset({"avx512f"}))) is None
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda package: "1.0")
        assert asked() is None
    with monkeypatch.context() as patch:
        patch.setattr("knltrain.__version__", "99")
        assert asked() is None
    assert asked() == "fused"


def test_the_newest_measurement_counts_and_takes_the_place_of_its_like():
    keep("eager", batch=32)
    keep("fused", batch=64)
    assert asked() == "fused"
    keep("ipex", batch=32)
    assert asked() == "ipex"
    assert [one["fastest"] for one in json.loads(measured_file().read_text())] == ["fused", "ipex"]


FOREIGN = ["", "{", "{}", "3", "[3]", '["settings"]', '[{"settings": {}}]', '[{"settings": 3, "fastest": "eager"}]',
           '[{"settings": {}, "fastest": 3}]', "[" * 100_000]  # fmt: skip


@pytest.mark.parametrize("text", FOREIGN, ids=range(len(FOREIGN)))
def test_a_damaged_or_foreign_file_is_ignored_with_one_warning_and_replaced(cache, text):
    keep("eager")
    measured_file().write_text(text)
    with pytest.warns(UserWarning, match=r"measured\.json: .*ignored") as caught:
        assert asked() is None
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="ignored"):
        keep("fused")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asked() == "fused"


def test_a_file_that_cannot_be_read_now_is_neither_used_nor_replaced(cache, monkeypatch):
    keep("eager")
    before = measured_file().read_text()

    def refuse(path, *_):
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    with monkeypatch.context() as patch:
        patch.setattr(tuning_cache, "open_regular", refuse)
        with pytest.warns(UserWarning, match=r"measured\.json: Input/output error: it is not used"):
            assert asked() is None
        with pytest.raises(KnltrainError, match="Input/output error"):
            tuning_cache.check_writable()
        with pytest.warns(UserWarning, match="not used"), pytest.raises(OSError, match="Input/output error"):
            store(settings_of("resnet50", "bf16", NODE, 2), {"fastest": "fused"})
    assert measured_file().read_text() == before


def test_a_file_that_has_what_is_asked_for_and_something_else_around_it():
    keep("eager")
    (one,) = json.loads(measured_file().read_text())
    for engines in (3, [3], [{"engine": "eager", "images_per_s": "many"}], {"engine": "eager"}):
        measured_file().write_text(json.dumps([{**one, "engines": engines, "layout": {"ranks_per_node": 10**30}}]))
        assert tuning_cache.measured_rates("bf16", NODE, 2) == {}
        assert stored_layout(NODE) is None


def test_a_write_that_fails_leaves_what_was_there(monkeypatch):
    keep("eager")

    def fail(*args):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is full"):
        patch.setattr(os, "replace", fail)
        keep("fused")
    assert asked() == "eager"


def test_an_unwritable_cache_is_refused_before_anything_is_measured(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KNLTRAIN_CACHE", str(tmp_path / "file" / "sub"))
    monkeypatch.setattr(tune, "compare", lambda *args, **options: pytest.fail("measured"))
    with pytest.raises(KnltrainError, match="KNLTRAIN_CACHE"):
        tune.tune(SMALL, QUIET, steps=1, budget_s=0)


def test_reading_needs_no_torch():
    code = (
        "import sys; from knltrain.node.tuning_cache import stored_engine;"
        "from knltrain.node.topology import read_node;"
        "stored_engine('resnet50', 'bf16', read_node(), 2); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


LAYOUTS = [Layout(1, 2, 0, 4), Layout(2, 1, 0, 2), Layout(1, 2, 0, 2)]


def test_the_fastest_layout_is_stored_beside_the_engines(monkeypatch):
    engines = [{"engine": "eager", "images_per_s": 3.0}]
    settings = {"precision": "fp32", "threads": 2, "batch": 4, "image_size": 32, "optimizer": "lars/paper"}
    monkeypatch.setattr(tune, "compare", lambda *args, **options: {**settings, "engines": engines})
    rates = {LAYOUTS[0]: 10.0, LAYOUTS[1]: 30.0}

    def measure(config, layout, steps, deadline):
        assert (config.engine, config.precision, steps) == ("eager", "fp32", 7)
        if layout not in rates:
            raise KnltrainError("training ended with 1: no memory")
        return {"images_per_s": rates[layout], "step_s": 4 / rates[layout]}

    monkeypatch.setattr(tune, "_measure", measure)
    monkeypatch.setattr(tune, "layouts", lambda node, batch: LAYOUTS)
    result = tune.tune(SMALL, QUIET, steps=7, budget_s=60)
    assert result["layout"] == dataclasses.asdict(LAYOUTS[1])
    assert [row.get("images_per_s") for row in result["layouts"]] == [10.0, 30.0, None]
    assert result["layouts"][2]["reason"] == "training ended with 1: no memory"
    assert stored_layout(read_node()).layout == LAYOUTS[1]
    assert stored_engine("alexnet_bn_small", "fp32", read_node(), 2) == "eager"
    assert stored_engine("alexnet_bn_small", "fp32", read_node(), 1) == "eager", "its ranks have one thread"


def test_what_there_is_no_time_for_is_not_measured(monkeypatch, capsys):
    times = iter([0.0, 1.0, 2.0, 11.0, 11.0, 11.0, 11.0])
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(tune, "_measure", lambda *arguments: {"images_per_s": 1.0, "step_s": 4.0})
    rows = tune.measure_layouts(SMALL, Console(), LAYOUTS, steps=1, budget_s=10.0)
    assert ["images_per_s" in row for row in rows] == [True, False, False]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 x 2 threads, local batch 4: 1.0 img/s; 8 s of 10 left"
    assert lines[1] == "2 x 1 threads, local batch 2: the time limit of 10 s was reached; 0 s of 10 left"
    assert any(line.split() == ["1", "2", "0", "4", "1.0", "4000.0"] for line in lines)


def no_mpiexec():
    raise KnltrainError("no mpiexec")


@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_two_ranks_are_measured_as_training_starts_them(launcher, monkeypatch, tmp_path):
    if launcher == "torchrun":
        monkeypatch.setattr(tune, "find_mpiexec", no_mpiexec)
    else:
        try:
            found = find_mpiexec()
        except KnltrainError as error:
            pytest.skip(str(error))
        if found.kind == "openmpi" and os.geteuid() == 0:
            pytest.skip("Open MPI does not start ranks as root")
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        tune.subprocess, "Popen", lambda *args, **options: started.append(popen(*args, **options)) or started[-1]
    )
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tune.tempfile, "tempdir", None)
    config = dataclasses.replace(SMALL, engine="eager")
    row = tune._measure(config, Layout(2, 1, 0, 2), 1, time.monotonic() + 200)
    assert row["images_per_s"] == pytest.approx(4 / row["step_s"])
    *_, process = started
    assert process.returncode is not None
    run = next(word for word in process.args if str(word).startswith(str(tmp_path)))
    deadline = time.monotonic() + 60
    while left := _with_word(run):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert list(tmp_path.glob("tmp*")) == []


def _with_word(word):
    """The processes that have a word in their command."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and word.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                found.append(entry.name)
    return found


def test_ranks_that_fail_are_a_reason(monkeypatch):
    config = dataclasses.replace(SMALL, engine="eager")
    with pytest.raises(KnltrainError, match=r"training ended with 2: knltrain: local-batch 3 does not divide the 4"):
        tune._measure(config, Layout(1, 2, 0, 3), 1, time.monotonic() + 200)


@pytest.mark.parametrize("text, line", [
    ("", "no message"),
    ("--------\nmpiexec has detected an attempt to run as root.\n\nRunning as root\n-----\n",
     "mpiexec has detected an attempt to run as root."),
    ("warning: one\nTraceback\nMemoryError: 3\n\n", "MemoryError: 3"),
    ("knltrain: rank 1: no data\nBAD TERMINATION\n", "knltrain: rank 1: no data"),
])  # fmt: skip
def test_the_line_that_matters(text, line):
    assert tune.last_message(text) == line


def test_ranks_for_which_the_time_is_over_are_ended(monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        tune.subprocess, "Popen", lambda *args, **options: started.append(popen(*args, **options)) or started[-1]
    )
    with pytest.raises(KnltrainError, match=r"step 0 of 4 when the time limit was reached"):
        tune._measure(dataclasses.replace(SMALL, engine="eager"), Layout(1, 2, 0, 4), 1, time.monotonic())
    assert started[0].returncode is not None


def test_ranks_that_do_not_end_are_killed(monkeypatch):
    monkeypatch.setattr(tune, "_SHUTDOWN_TIMEOUT_S", 0.1)
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
    process.stdout.readline()
    tune._terminate(process)
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL


def test_a_warning_is_a_line_to_whoever_runs_a_command(cache):
    keep("eager")
    measured_file().write_text("{}")
    words = ["bench", "--model", "alexnet_bn_small", "--batch", "2", "--steps", "1"]
    result = subprocess.run([sys.executable, "-m", "knltrain", *words], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "ignored" in line]
    assert line.startswith("warning: ")
    assert "UserWarning" not in result.stderr
