"""Two ranks on this machine, started as users start them."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from cluster import listening, runs
from cluster.runs import SMALL, TORCHRUN, assert_same_training, ccl_is_here, losses, train_here, weights
from conftest import write_jpeg
from safetensors.torch import save_file

from knltrain.cli.main import main
from knltrain.runlog.metrics import read_metrics
from knltrain.training.gradient_noise import estimate

STEPS = ["--max-steps", "3"]


def mpiexec(ranks):
    return [*runs.mpiexec("-n", ranks), sys.executable, "-m"]


def start(command, image_folder, out, *options, **environment):
    arguments = ["train", *SMALL, *STEPS, "--data", image_folder, "--out", out, *options]
    return runs.start([*command, "knltrain", *arguments], timeout=240, **environment)


def here(image_folder, out, *options):
    return train_here(*SMALL, *STEPS, "--data", image_folder, "--out", out, *options)


@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_two_ranks_are_one(launcher, alone, image_folder, tmp_path):
    command = TORCHRUN if launcher == "torchrun" else mpiexec(2)
    out = tmp_path / "run"
    result = start(command, image_folder, out, "--json")
    assert result.returncode == 0, result.stderr
    assert_same_training(out, alone)
    summary = json.loads(result.stdout.strip().splitlines()[-1])
    assert (summary["world_size"], summary["steps"]) == (2, 3)
    assert result.stdout.count('"top1"') == 1, "rank 0 alone writes"
    evaluated = CliRunner().invoke(main, ["eval", str(out), "--data", str(image_folder), "--json"])
    found = json.loads(evaluated.stdout.splitlines()[-1])
    assert (found["top1"], found["top5"]) == (summary["top1"], summary["top5"]), "each evaluates a part of the images"
    plan = json.loads((out / "config.json").read_text())["plan"]
    assert plan["launcher"] == ("torchrun" if launcher == "torchrun" else "hydra")
    assert plan["ranks_per_node"] == 2
    assert plan["backend"] == ("ccl" if ccl_is_here() else "gloo")
    assert plan["transport"] == ("ofi" if ccl_is_here() else "tcp")
    assert plan["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)


def test_ranks_over_mpi_are_one_too(alone, image_folder, tmp_path):
    if not ccl_is_here():
        pytest.skip("no oneCCL in this environment")
    result = start(mpiexec(2), image_folder, tmp_path / "run", "--comm.backend", "ccl", CCL_ATL_TRANSPORT="mpi")
    assert result.returncode == 0, result.stderr
    assert_same_training(tmp_path / "run", alone)
    assert "oneCCL uses exported variables: CCL_ATL_TRANSPORT=mpi" in result.stdout


# A rate so low that a rank alone sees all images with the same weights, and no batch norm: what an image's gradient is
# does not depend on which others are in its micro-batch.
QUIET = [
    "--recipe", "alexnet-512", "--image-size", "67", "--augment.resize", "77", "--dropout", "0", "--optim.lr", "1e-6",
    "--optim.weight-decay", "0", "--schedule.warmup-epochs", "0", "--precision", "fp32", "--engine", "eager",
]  # fmt: skip


@pytest.fixture(scope="module")
def signal_and_scatter(image_folder, tmp_path_factory):
    """Of the gradient of 16 images, from those of one rank that sees them in two steps, and in one."""
    norms = {}
    for batch, steps in ((8, 2), (16, 1)):
        out = tmp_path_factory.mktemp("noise") / "run"
        train_here(*QUIET, "--global-batch", batch, "--max-steps", steps, "--data", image_folder, "--out", out)
        rows = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
        assert "noise_scale" not in rows[0]
        norms[batch] = [row["grad_norm"] for row in rows]
    return estimate(8, sum(norm**2 for norm in norms[8]) / 2, 16, norms[16][0] ** 2)


@pytest.mark.parametrize("backend, wire", [("gloo", "fp32"), ("gloo", "bf16"), ("ccl", "fp32")])
def test_the_noise_scale_compares_a_rank_with_all(backend, wire, signal_and_scatter, image_folder, tmp_path):
    """Of eight images each."""
    if backend == "ccl" and not ccl_is_here():
        pytest.skip("no oneCCL in this environment")
    result = runs.start([*mpiexec(2), "knltrain", "train", *QUIET, "--global-batch", "16", "--local-batch", "4",
                         "--max-steps", "1", "--data", image_folder, "--out", tmp_path / "two",
                         "--comm.backend", backend, "--comm.dtype", wire])  # fmt: skip
    assert result.returncode == 0, result.stderr
    (row,) = [row for row in read_metrics(tmp_path / "two" / "metrics.jsonl") if "loss" in row]
    assert "noise_scale" in row
    signal, scatter = signal_and_scatter
    (state,) = (tmp_path / "two" / "checkpoints").glob("*/state.json")
    kept = json.loads(state.read_text())
    rel = 0.02 if wire == "bf16" else 1e-3
    assert kept["gradient_signal"] == pytest.approx(0.05 * signal, rel=rel)
    assert kept["gradient_noise"] == pytest.approx(0.05 * scatter, rel=rel)


def test_no_thread_of_the_group_outlives_the_run(image_folder, tmp_path):
    """One that is still busy when Python has ended takes the process down."""
    script = tmp_path / "threads.py"
    script.write_text(
        "import os, sys, threading\n"
        "import torch\n"
        "from knltrain.cli.main import main\n"
        "torch.set_num_threads(1)\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "left = len(os.listdir('/proc/self/task')) - threading.active_count()\n"
        "sys.exit(f'{left} threads are left' if left else 0)\n"
    )
    arguments = ["train", *SMALL, *STEPS, "--data", image_folder, "--out", tmp_path / "run"]
    result = runs.start([*mpiexec(2)[:-1], script, *arguments], OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr


def test_batch_norm_ranks_accumulation_and_bf16_on_the_wire(image_folder, tmp_path):
    """Two ranks that accumulate normalise the same micro-batches as one rank that does: equal losses."""
    here(image_folder, tmp_path / "one", "--engine", "fused")
    for name, more in (("two", []), ("bf16", ["--comm.dtype", "bf16"])):
        result = start(mpiexec(2), image_folder, tmp_path / name, "--engine", "fused", *more)
        assert result.returncode == 0, result.stderr
        rows = [row for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row]
        assert all(0 <= row["exposed_comm_s"] <= row["comm_s"] < row["step_s"] for row in rows)
        assert all(row["comm_s"] > 0 for row in rows)
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert 0 < summary["exposed_comm_fraction"] <= summary["comm_fraction"] < 1
    rows = [row for row in read_metrics(tmp_path / "one" / "metrics.jsonl") if "loss" in row]
    assert all(row["exposed_comm_s"] == row["comm_s"] == 0 for row in rows)
    one, two, bf16 = (losses(tmp_path / name) for name in ("one", "two", "bf16"))
    assert two == pytest.approx(one, rel=1e-4)
    assert bf16 == pytest.approx(one, rel=2e-2)
    assert bf16 != two
    # Every rank has its own running statistics in training; the checkpoint holds their mean, which one rank that
    # sees all micro-batches in turn comes close to.
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    name = "features.norm1.running_var"
    assert not torch.equal(one[name], two[name])
    assert torch.isfinite(two[name]).all()


@pytest.mark.parametrize("format", ["raw", "tar"])
def test_two_ranks_train_on_staged_data_as_one_does_on_what_was_prepared(format, image_folder, tmp_path):
    packed = tmp_path / "packed"
    assert (
        CliRunner()
        .invoke(main, ["prepare", str(image_folder), str(packed), "--format", format, "--size", "32"])
        .exit_code
        == 0
    )
    result = start(mpiexec(2), packed, tmp_path / "two", "--stage", str(tmp_path / "local"))
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "local").glob("packed-*/meta.json"))) == 1
    here(packed, tmp_path / "one")
    assert_same_training(tmp_path / "two", tmp_path / "one")


def test_one_ranks_failure_ends_all_with_its_message(image_folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    bad = data / "val" / "class2" / "003.jpg"
    bad.write_bytes(b"no image")
    result = start(mpiexec(2), data, tmp_path / "run")
    assert result.returncode != 0
    assert str(bad) in result.stderr


def test_two_ranks_start_from_a_file_as_one_does(alone, image_folder, tmp_path):
    options = ["--init-from", alone, "--max-steps", "2"]
    result = start(mpiexec(2), image_folder, tmp_path / "two", *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("starts from") == 1
    assert here(image_folder, tmp_path / "one", *options).count("starts from") == 1
    assert_same_training(tmp_path / "two", tmp_path / "one")
    one, two = (json.loads((tmp_path / name / "config.json").read_text())["init_from"] for name in ("one", "two"))
    assert one == two
    assert one["file"].startswith(str(alone))


def test_a_file_that_does_not_fit_ends_all_ranks_and_is_named_by_one(image_folder, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    result = start(mpiexec(2), image_folder, tmp_path / "run", "--init-from", str(tmp_path / "other.safetensors"))
    assert result.returncode != 0
    assert result.stderr.count("is of another network: missing") == 1
    assert not (tmp_path / "run" / "config.json").exists()


def test_many_processes_that_would_each_train_alone_are_refused(image_folder, tmp_path):
    result = start(mpiexec(2), image_folder, tmp_path / "run", RANK="0", WORLD_SIZE="1")
    assert result.returncode == 2
    assert "each would train a model of its own" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_is_refused(image_folder, tmp_path):
    result = start(mpiexec(2), image_folder, tmp_path / "run", "--global-batch", "63")
    assert result.returncode != 0
    assert "global-batch 63 is not a multiple of 2 ranks; take 62 or 64" in result.stderr


@pytest.mark.parametrize("launcher, backend", [("mpiexec", "auto"), ("torchrun", "gloo")])
def test_a_bad_image_that_one_rank_meets_later_ends_all_with_its_path(launcher, backend, tmp_path):
    """Start-up decodes a sample of a large data set; this image is none of it."""
    data = tmp_path / "data"
    for index in range(600):
        write_jpeg(data / "train" / f"class{index % 2}" / f"{index:04}.jpg", 32, 32, index)
    write_jpeg(data / "val" / "class0" / "0.jpg", 32, 32, 0)
    write_jpeg(data / "val" / "class1" / "0.jpg", 32, 32, 0)
    bad = data / "train" / "class1" / "0003.jpg"
    bad.write_bytes(b"\xff\xd8 no picture")
    result = subprocess.run(
        [*(TORCHRUN if launcher == "torchrun" else mpiexec(2)), "knltrain", "train", "--recipe", "cifar-256", "--data",
         str(data), "--out", str(tmp_path / "run"), "--global-batch", "16", "--precision", "fp32", "--comm.backend",
         backend], capture_output=True, text=True, timeout=240)  # fmt: skip
    assert result.returncode == 1
    assert "SIGABRT" not in result.stderr
    assert f"{bad}: a JPEG with a damaged header; replace or remove this image" in result.stderr
    # Over gloo the others see its connections end. Over oneCCL they wait, until the launcher ends them.
    assert "what that rank printed is the cause" in result.stderr or backend != "gloo"
    assert 'File "' not in result.stderr.split("torch/distributed/elastic")[0], "no traceback of ours"


LISTENER = [sys.executable, listening.__file__]


@pytest.mark.parametrize("backend", ["gloo", "ccl"])
@pytest.mark.parametrize("several", [False, True], ids=["one node", "a node twice"])
def test_ranks_of_one_machine_listen_on_loopback_alone(backend, several):
    if backend == "ccl" and not ccl_is_here():
        pytest.skip("no oneCCL in this environment")
    hosts = ["-launcher", "fork", "-hosts", f"{socket.gethostname()},localhost", "-ppn", 1] if several else []
    command = [*runs.mpiexec(*hosts, "-n", 2), *LISTENER, backend]
    result = runs.start(command, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert listening.of_ranks(result.stdout) == {0: ["127.0.0.1"], 1: ["127.0.0.1"]}


def test_the_first_rank_listens_at_master_addr_alone_unless_torchrun_does():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    given = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
             "OMP_NUM_THREADS": "1"}  # fmt: skip
    processes = [
        subprocess.Popen([*LISTENER, "gloo"], stdout=subprocess.PIPE, text=True,
                         env={**os.environ, **given, "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]  # fmt: skip
    try:
        output = "".join(process.communicate(timeout=120)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert listening.of_ranks(output) == {0: ["127.0.0.1"], 1: ["127.0.0.1"]}
    under_torchrun = runs.start([*TORCHRUN[:-1], *LISTENER[1:], "gloo"], OMP_NUM_THREADS="1")
    assert under_torchrun.returncode == 0, under_torchrun.stderr
    assert listening.of_ranks(under_torchrun.stdout) == {0: ["127.0.0.1"], 1: ["127.0.0.1"]}
