"""Two ranks that are stopped go on as if they had not been, each with its own running statistics."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cluster.runs import GLOO, KNLTRAIN, SMALL, ccl_is_here, losses, mpiexec, start, train_here
from runs import assert_same_run, newest, state
from small_networks import CHANGES, CHANGING_STEPS, network_of, why_no_engine

RANK = Path(__file__).with_name("resuming_ranks.py")


def train_in_parts(cases, data, out, *, ranks=2, backend):
    """Has ranks train each case, a name and its fields, whole and in parts."""
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*mpiexec("-n", ranks), sys.executable, RANK, data, out, backend, json.dumps(cases)],
        capture_output=True, text=True, timeout=280, env={**os.environ, **environment},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("backend", ["gloo", pytest.param("ccl", marks=pytest.mark.hand)])
def test_the_order_in_which_gradients_of_many_ranks_are_added_up_stays(backend, image_folder, tmp_path):
    """It follows from the buckets, which DistributedDataParallel forms anew after its first step."""
    if backend == "ccl" and not ccl_is_here():
        pytest.skip("oneCCL does not load")
    train_in_parts({"three": {"global_batch": 12}}, image_folder, tmp_path, ranks=3, backend=backend)
    assert_same_run(tmp_path / "three" / "parts", tmp_path / "three" / "whole", evaluations=False)


def test_one_rank_goes_on_where_two_were_stopped(image_folder, tmp_path, monkeypatch):
    """With the same images in the same order, and a line that says what is another way."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def command(name, *more):
        return [*SMALL, "--global-batch", "16", "--local-batch", "4", "--epochs", "2", "--data", image_folder,
                "--out", tmp_path / name, *more]  # fmt: skip

    train_here(*command("alone"))
    result = start([*mpiexec("-n", 2), *KNLTRAIN, "train", *command("together", "--max-steps", "3", *GLOO)])
    assert result.returncode == 0, result.stderr
    said = " ".join(train_here(*command("together")).split())
    assert "was computed otherwise (world_size 2 -> 1, backend gloo -> none)" in said
    assert "bits may differ" in said
    assert losses(tmp_path / "together") == pytest.approx(losses(tmp_path / "alone"), rel=1e-3)


def test_all_ranks_refuse_other_data_with_what_differs(image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copytree(image_folder, tmp_path / "other")
    next((tmp_path / "other" / "train" / "class0").iterdir()).unlink()

    def command(data):
        return [*SMALL, "--global-batch", "16", "--data", data, "--out", tmp_path / "out"]

    train_here(*command(image_folder), "--max-steps", "1")
    result = start([*mpiexec("-n", 2), *KNLTRAIN, "train", *command(tmp_path / "other"), *GLOO])
    assert result.returncode == 2
    assert "was trained on other data (train: 48 -> 47 images); " in result.stderr
    assert "Traceback" not in result.stderr
    assert newest(tmp_path / "out").name == "step-00000001"


@pytest.mark.parametrize(
    "engine, precision, backend",
    [("eager", "bf16", "gloo"), ("fused", "fp32", "gloo"), ("fused", "fp32", "ccl"), ("ipex", "bf16", "gloo"),
     pytest.param("compile", "bf16", "gloo", marks=[pytest.mark.compile, pytest.mark.hand])],
)  # fmt: skip
def test_two_ranks_go_on_as_if_they_had_not_been_stopped(engine, precision, backend, image_folder, tmp_path):
    """The other precisions are those of a run that changes in its course."""
    if reason := why_no_engine(engine, precision):
        pytest.skip(reason)
    if backend == "ccl" and not ccl_is_here():
        pytest.skip("oneCCL does not load")
    network = {"dropout": 0.3} if backend == "ccl" else network_of(engine)
    cases = {precision: {"engine": engine, "precision": precision, **network}}
    train_in_parts(cases, image_folder, tmp_path, backend=backend)
    for name in cases:
        assert_same_run(tmp_path / name / "parts", tmp_path / name / "whole", evaluations=False)
        final = state(tmp_path / name / "whole")
        own = {key.split(": ")[1]: rows for key, rows in final.items() if key.startswith("statistics")}
        assert own, "each rank's own running statistics are there"
        for key, rows in own.items():
            assert not torch.equal(rows[0], rows[1]), key
            mean = final[f"model.safetensors: {key}"]
            torch.testing.assert_close(rows.mean(0), mean, rtol=1e-6, atol=1e-6, msg=key)
        made = json.loads((newest(tmp_path / name / "whole") / "state.json").read_text())["made"]
        assert (made["world_size"], made["threads"], made["engine"]) == (2, 1, engine)


@pytest.mark.parametrize("engine, precision", [("eager", "fp32"), ("fused", "bf16")])
def test_a_run_that_changes_in_its_course_goes_on_too(engine, precision, image_folder, tmp_path):
    """Batches, sizes, augmentation, LAMB's moments, and the average with each rank's own running statistics of it."""
    if reason := why_no_engine(engine, precision):
        pytest.skip(reason)
    options = {**CHANGES, "engine": engine, "precision": precision}
    train_in_parts({"changing": options}, image_folder, tmp_path, backend="gloo")
    assert newest(tmp_path / "changing" / "parts").name == f"step-{CHANGING_STEPS:08}"
    assert_same_run(tmp_path / "changing" / "parts", tmp_path / "changing" / "whole", evaluations=False)
    final = state(tmp_path / "changing" / "whole")
    rows = {key.split(": ")[1]: rows for key, rows in final.items() if key.startswith("statistics")}
    averaged = {key.removeprefix("average/"): value for key, value in rows.items() if key.startswith("average/")}
    assert averaged
    for key, own in averaged.items():
        assert not torch.equal(own[0], own[1]), key
        torch.testing.assert_close(own.mean(0), final[f"model.safetensors: {key}"], rtol=1e-6, atol=1e-6, msg=key)
        trained = final[f"trained.safetensors: {key}"]
        torch.testing.assert_close(rows[key].mean(0), trained, rtol=1e-6, atol=1e-6, msg=key)


def test_two_ranks_compute_what_one_does_while_batch_and_size_change(image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    changes = [f"--{name.replace('_', '-')}={','.join(map(str, value)) if isinstance(value, list) else value}"
               for name, value in CHANGES.items() if name != "dropout"]  # fmt: skip
    command = [*SMALL, "--global-batch", "16", "--local-batch", "4", "--epochs", "2", "--data", image_folder, *changes]
    train_here(*command, "--out", tmp_path / "alone")
    result = start([*mpiexec("-n", 2), *KNLTRAIN, "train", *command, *GLOO, "--out", tmp_path / "together"])
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "together") == pytest.approx(losses(tmp_path / "alone"), rel=1e-3)
