"""Runs in processes of their own: skipped when done, resumed when stopped, recorded when they fail."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from sweeps import sweep_of

from knltrain.cli.main import main
from knltrain.runlog.metrics import read_metrics
from knltrain.sweep import runner
from knltrain.sweep.results import TRAINING_KEYS, Results, last_row
from knltrain.training.signals import StopRequest

SMALL = ("--recipe", "cifar-256", "--batches", "16", "--local-batch", "16", "--precision", "fp32", "--engine", "eager")


def invoke(*arguments):
    return CliRunner().invoke(main, ["sweep", *map(str, arguments)])


def rows(out):
    with (out / "sweep.csv").open(newline="") as file:
        return {row["run"].removeprefix("runs/"): row for row in csv.DictReader(file)}


def test_a_sweep_from_its_first_run_to_its_report(image_folder, tmp_path, monkeypatch):
    """One of its runs diverges, which is a result; another fails, and is tried again by the same command."""
    out = tmp_path / "sweep"
    # Warm-up, during which a loss may be anything, would last longer than these epochs.
    command = (*SMALL, "--data", image_folder, "--out", out, "--epochs", "2", "--lr-factors", "0.01,500000",
               "--schedule.warmup-epochs", "0", "--health.divergence-steps", "3", "--seeds", "0,1",
               "--search-seeds", "0", "--json")  # fmt: skip
    names = ["sgd-b16-lr6.25e-05-seed0", "sgd-b16-lr3125-seed0", "sgd-b16-lr6.25e-05-seed1"]
    broken = out / "runs" / names[0] / "config.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    first = invoke(*command)
    assert first.exit_code == 1, first.output + first.stderr
    assert f"1 of 3 runs failed, runs/{names[0]} first" in first.stderr
    assert [(name, row["status"]) for name, row in rows(out).items()] == [(names[0], "failed"), (names[1], "diverged")]
    assert "config.json is damaged" in (out / "report.md").read_text()

    broken.unlink()
    trained = []
    train = runner._train
    monkeypatch.setattr(
        runner, "_train", lambda one, point, *rest: trained.append(point.name) or train(one, point, *rest)
    )
    second = invoke(*command)
    assert second.exit_code == 0, second.stderr
    assert trained == [names[0], names[2]]
    found = json.loads(second.stdout.splitlines()[-1])
    assert [row["status"] for row in found["runs"]] == ["done", "diverged", "done"]
    assert [(one["lr"], sorted(one["top1"])) for one in found["best"]] == [(6.25e-05, ["0", "1"])]
    run = out / "runs" / names[2]
    assert json.loads((run / "config.json").read_text())["config"]["seed"] == 1
    assert "top-1" in (run / "train.log").read_text()


def test_a_task_trains_one_run(image_folder, tmp_path):
    command = (*SMALL, "--data", image_folder, "--out", tmp_path / "sweep", "--max-steps", "1", "--seeds", "0,1")
    listed = invoke(*command, "--dry-run", "--json")
    assert listed.exit_code == 0, listed.stderr
    assert [row["run"] for row in json.loads(listed.stdout.splitlines()[-1])["tasks"]] == [
        "sgd-b16-lr0.00625-seed0", "sgd-b16-lr0.00625-seed1"]  # fmt: skip
    assert not (tmp_path / "sweep").exists()
    printed = invoke(*command, "--dry-run", "--task", "1")
    assert printed.output.startswith("knltrain train --recipe cifar-256 --data ")
    result = invoke(*command, "--task", "1")
    assert result.exit_code == 0, result.stderr
    assert [path.name for path in (tmp_path / "sweep" / "runs").iterdir()] == ["sgd-b16-lr0.00625-seed1"]
    assert not (tmp_path / "sweep" / "sweep.csv").exists(), "tasks may run at the same time"


def start(command, metrics):
    """Starts a sweep as a shell does, and waits until its run has done some steps."""
    process = subprocess.Popen([sys.executable, "-m", "knltrain", "sweep", *map(str, command)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=dict(os.environ))  # fmt: skip
    before = len(read_metrics(metrics)) if metrics.exists() else 0
    wait_for(lambda: metrics.exists() and len(read_metrics(metrics)) > before + 5, process)
    return process


def wait_for(condition, process=None):
    deadline = time.monotonic() + 120
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_and_the_death_of_the_sweep_end_its_run_with_a_checkpoint(image_folder, tmp_path):
    out = tmp_path / "sweep"
    command = (*SMALL, "--data", image_folder, "--out", out, "--epochs", "3000")
    run = out / "runs" / "sgd-b16-lr0.00625-seed0"
    killed = start(command, run / "metrics.jsonl")
    killed.kill()
    killed.communicate()
    wait_for(lambda: "the same command goes on" in (run / "train.log").read_text())
    wait_for(lambda: not (run / ".lock").exists())

    stopped = start(command, run / "metrics.jsonl")
    stopped.send_signal(signal.SIGINT)
    output, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == 75, errors
    assert "the same command goes on from there" in output
    assert rows(out)[run.name]["status"] == "stopped"
    step = int(max((run / "checkpoints").iterdir()).name.removeprefix("step-"))
    assert (run / "train.log").read_text().count("resumed from") == 1

    finished = invoke(*command, "--max-steps", step + 2)
    assert finished.exit_code == 0, finished.stderr
    assert rows(out)[run.name]["status"] == "done"
    assert rows(out)[run.name]["steps"] == str(step + 2)


@pytest.mark.parametrize("notes", [True, False])
def test_a_run_that_was_asked_to_stop_already_is_not_asked_again(notes, tmp_path, monkeypatch):
    """A batch system's signal reaches both; the second one would end the run without a checkpoint."""
    monkeypatch.setattr(runner, "_POLL_INTERVAL_S", 0.1)
    lines = ["import signal, sys, time", "print('ready', flush=True)", "time.sleep(0.5)", "sys.exit(75)"]
    if notes:  # as a run that no signal has come to yet
        lines[1:1] = ["signal.signal(signal.SIGTERM, lambda *_: (print('asked', flush=True), sys.exit(75)))"]
        lines[-2] = "time.sleep(60)"
    code = "\n".join(lines)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    stop = StopRequest()
    stop.requested = True
    assert runner._wait(process, tmp_path, stop, lambda row: None) == 75
    assert process.stdout.read() == ("asked\n" if notes else "")
    process.stdout.close()


def test_a_run_that_does_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_POLL_INTERVAL_S", 0.1)
    monkeypatch.setattr(runner, "_SHUTDOWN_TIMEOUT_S", 0.3)
    code = "import signal, time; signal.signal(15, lambda *_: None); print(flush=True); time.sleep(60); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    stop = StopRequest()
    stop.requested = True
    assert runner._wait(process, tmp_path, stop, lambda row: None) == -signal.SIGKILL
    process.stdout.close()


def test_a_run_that_is_killed_has_failed_and_says_by_what(tmp_path, monkeypatch):
    results = Results(sweep_of(), tmp_path, 2560)
    point = results.sweep.point("sgd", 256, 1.0, 0)
    monkeypatch.setattr(type(point), "words", lambda self, out: ["--version"])
    with StopRequest() as stop:
        assert runner._train(results, point, stop, lambda row: None).status == "failed"
        monkeypatch.setattr(runner, "_wait", lambda process, *rest: process.kill() or process.wait())
        outcome = runner._train(results, point, stop, lambda row: None)
    assert (outcome.status, outcome.reason) == ("failed", "was ended by SIGKILL; was there memory enough?")


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "no message"),
        ("one\ntwo\n", "two"),
        ("knltrain: no data\nbye\n", "no data"),
        ("knltrain: rank 0: diverged: at step 3\n", "diverged: at step 3"),
    ],
)
def test_what_a_run_said_last(text, words):
    assert runner._last_words(text) == words


def test_the_last_step_of_a_file_that_grows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_row(path, *TRAINING_KEYS) == {}
    first = {"step": 1, "loss": 2.0, "images_per_s": 9.0}
    path.write_text(f'{json.dumps(first)}\n{{"step": 1, "top1": 3.0}}\n[1]\n{{"step": 2, "lo')
    assert last_row(path, *TRAINING_KEYS) == first
    path.write_text("x" * 10000 + f"\n{json.dumps(first)}\n")
    assert last_row(path, *TRAINING_KEYS) == first
