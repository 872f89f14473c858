"""run/slurm.sbatch in a Slurm that the tests start: it makes room for another job and goes on to the end after it."""

import json
import os
import sys
from pathlib import Path

from cluster.hosts import until
from cluster.runs import GLOO, SMALL, plan

from knltrain.runlog.metrics import read_metrics

SCRIPT = Path(__file__).parents[2] / "run" / "slurm.sbatch"
STEPS = 100


def test_a_job_that_is_preempted_is_queued_again_and_ends_as_one_run(slurm, image_folder, tmp_path, monkeypatch):
    out, log = tmp_path / "run", tmp_path / "log"
    monkeypatch.chdir(tmp_path)  # where there is no .venv, which the script would take
    number = slurm.submit(
        f"--output={log}", "--ntasks-per-node", "2", SCRIPT, *SMALL, *GLOO, "--max-steps", STEPS, "--epochs", "1e5",
        "--checkpoint.every", "1e5", "--data", image_folder, "--out", out,
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )  # fmt: skip

    def said():
        return f"{slurm.job(number)} {log.read_text() if log.exists() else ''}"

    until(lambda: len(steps(out)) >= 3, 60, said)
    urgent = slurm.submit("--partition=urgent", "--exclusive", f"--output={tmp_path}/urgent", "--wrap", "true")
    until(lambda: slurm.job(number)["Restarts"] == "1", 60, said)
    until(lambda: slurm.job(urgent)["JobState"] == "COMPLETED", 60, said)
    stopped_after = len(steps(out))
    assert 3 <= stopped_after < STEPS, said()
    until(lambda: slurm.job(number)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), 120, said)
    assert slurm.job(number)["JobState"] == "COMPLETED", said()
    assert slurm.job(number)["ExitCode"] == "0:0"
    text = log.read_text()
    assert f"stopped by a signal after step {stopped_after}; the same command goes on from there" in text
    assert f"resumed from {out}/checkpoints/step-{stopped_after:08}" in text
    assert steps(out) == list(range(1, STEPS + 1)), "no step is missing and none is there twice"
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["finished"], summary["steps"], summary["world_size"]) == (True, STEPS, 2)
    assert plan(out)["launcher"] == "slurm"


def test_slurms_warning_has_the_job_queued_again(slurm, image_folder, tmp_path, monkeypatch):
    """As --signal sends it before a time limit, which counts in minutes and is not waited for here."""
    out, log = tmp_path / "run", tmp_path / "log"
    assert "#SBATCH --signal=USR1@" in SCRIPT.read_text()
    monkeypatch.chdir(tmp_path)
    number = slurm.submit(
        f"--output={log}", "--ntasks-per-node", "2", SCRIPT, *SMALL, *GLOO, "--max-steps", STEPS, "--epochs", "1e5",
        "--checkpoint.every", "1e5", "--data", image_folder, "--out", out,
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )  # fmt: skip

    def said():
        return f"{slurm.job(number)} {log.read_text() if log.exists() else ''}"

    until(lambda: len(steps(out)) >= 3, 60, said)
    slurm.run("scancel", "--signal=USR1", number)
    until(lambda: slurm.job(number)["Restarts"] == "1", 60, said)
    until(lambda: slurm.job(number)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), 120, said)
    assert slurm.job(number)["JobState"] == "COMPLETED", said()
    assert log.read_text().count("stopped by a signal after step") == 1
    assert steps(out) == list(range(1, STEPS + 1))


def steps(out):
    path = out / "metrics.jsonl"
    return [row["step"] for row in read_metrics(path) if "loss" in row] if path.exists() else []
