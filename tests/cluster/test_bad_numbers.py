"""Two ranks, one of which computes or remembers wrongly: both decide alike, and say which it was."""

import json
import platform
import sys
from pathlib import Path

import pytest
from cluster.runs import GLOO, SMALL, TORCHRUN, mpiexec, start
from runs import assert_same_run, newest

from knltrain.runlog.metrics import read_metrics

FAULTS, COMMANDS = Path(__file__).parents[1] / "faults.py", Path(__file__).with_name("commands.py")
# Nine steps in three epochs: faults come in the second.
RUN = [*SMALL, "--local-batch", "8", "--global-batch", "16", "--epochs", "3"]
HOST = platform.node()


def train(image_folder, out, *options, faults="", launcher="mpiexec", backend=GLOO):
    ranks = TORCHRUN[:-1] if launcher == "torchrun" else [*mpiexec("-n", 2), sys.executable]
    return start([*ranks, FAULTS, "train", *RUN, *backend, "--data", image_folder, "--out", out, *options],
                 FAULTS=faults)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    result = train(image_folder, out)
    assert result.returncode == 0, result.stderr
    return out


def report_of(result):
    """What rank 0 says, on one line, and that no rank says anything else."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("knltrain: rank")]
    said = {line.split(": ", 2)[2] for line in lines}
    assert len(said) == 1, result.stderr
    return said.pop()


@pytest.mark.parametrize("kind, launcher", [("loss", "torchrun"), ("gradient", "mpiexec")])
def test_one_ranks_bad_number_stops_both_before_the_step(kind, launcher, undisturbed, image_folder, tmp_path):
    out = tmp_path / "run"
    # The checkpoint before it is still being written: no rank's end may cut that off.
    result = train(image_folder, out, faults=f"{kind}:5:1 disk:3:0", launcher=launcher)
    assert result.returncode == 1
    message = report_of(result)
    assert "at step 5 (epoch 1.67" in message
    if kind == "loss":
        assert f"the loss of rank 1 on {HOST} is nan; the first layer with a bad gradient is features.conv1" in message
    else:
        assert "finite on every rank, but the gradient is not" in message
        assert "the first layer with a bad gradient is features.conv3.weight, 1 of 22 have one" in message
    folder = out / "failed" / "step-00000005"
    assert sorted(path.name for path in folder.iterdir()) == [
        "rank-0000.json",
        "rank-0001.json",
        "report.json",
        "state",
    ]
    losses = [json.loads((folder / f"rank-000{rank}.json").read_text())["losses"] for rank in (0, 1)]
    assert ["nan" in of_rank for of_rank in losses] == [False, kind == "loss"]
    assert newest(out).name == "step-00000003"
    if kind == "loss":
        result = train(image_folder, out)
        assert result.returncode == 0, result.stderr
        assert_same_run(out, undisturbed)


def test_both_ranks_leave_the_step_out_or_go_back_together(image_folder, tmp_path):
    """Stopped later and resumed, it is the same run."""
    commands = []
    for policy in ("skip", "rewind"):
        for name, more in (("whole", ["--health.compare-every", 1]), ("parts", ["--max-steps", 7]), ("parts", [])):
            out = tmp_path / policy / name
            command = [*RUN, *GLOO, "--data", image_folder, "--out", out, "--health.policy", policy, *more]
            commands.append([[*map(str, command)], "loss:5:1"])
    result = start([*mpiexec("-n", 2), sys.executable, COMMANDS, json.dumps(commands)], OMP_NUM_THREADS="1",
                   PYTHONPATH=str(FAULTS.parent))  # fmt: skip
    assert result.returncode == 0, result.stderr
    for policy in ("skip", "rewind"):
        out = tmp_path / policy / "whole"
        rows = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
        assert [row["step"] for row in rows] == list(range(1, 10))
        assert [row["step"] for row in rows if row["loss"] is None] == ([5] if policy == "skip" else [])
        summary = json.loads((out / "summary.json").read_text())
        assert (summary["skipped_steps"], summary["rewinds"]) == ((1, 0) if policy == "skip" else (0, 1))
        assert_same_run(tmp_path / policy / "parts", out, evaluations=False)


@pytest.mark.parametrize("rank, backend", [(0, "gloo"), (1, "auto")])
def test_a_bit_that_flips_in_one_ranks_weights_is_found(rank, backend, undisturbed, image_folder, tmp_path):
    out = tmp_path / "run"
    result = train(image_folder, out, "--health.compare-every", "2", faults=f"weight:5:{rank}",
                   backend=["--comm.backend", backend])  # fmt: skip
    assert result.returncode == 1
    message = report_of(result)
    assert f"after step 6 the weights of rank 0 on {HOST} and rank 1 on {HOST} differ (" in message
    assert "which are right cannot be told" in message
    assert newest(out).name == "step-00000003"
    if backend == "gloo":
        result = train(image_folder, out, "--health.compare-every", "2")
        assert result.returncode == 0, result.stderr
        assert_same_run(out, undisturbed)


def test_of_three_ranks_the_one_that_differs_is_named(image_folder, tmp_path):
    run = ["--local-batch", "4", "--global-batch", "12", "--max-steps", "4", "--health.compare-every", "1"]
    result = start(
        [*mpiexec("-n", 3), sys.executable, FAULTS, "train", *SMALL, *GLOO, *run, "--data", image_folder, "--out",
         tmp_path / "run"], FAULTS="weight:2:1", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert result.returncode == 1
    message = report_of(result)
    assert f"after step 2 the weights of rank 1 on {HOST} differ from the others' (in features.conv3.weight)" in message


def test_a_checkpoint_is_compared_before_it_is_written(image_folder, tmp_path):
    """Whatever compare-every says: what a run goes on from is what all ranks had."""
    out = tmp_path / "run"
    result = train(image_folder, out, "--health.compare-every", "1000", faults="weight:5:1")
    assert result.returncode == 1
    assert "after step 6 the weights of" in report_of(result)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000003"]
