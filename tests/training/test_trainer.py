"""The run, in this process: what it leaves behind, what it refuses, and that it resumes."""

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from knltrain import checkpoint
from knltrain.config import RunConfig, override
from knltrain.config.schedule import make_schedule
from knltrain.data.folder import DataError
from knltrain.errors import ConfigError, KnltrainError
from knltrain.launch.placement import find_placement
from knltrain.runlog.console import Console
from knltrain.runlog.metrics import read_metrics
from knltrain.training import evaluate as evaluating
from knltrain.training import setup, trainer
from knltrain.training import step as stepping
from knltrain.training.batching import rank_batch_of, rank_batches_by_size, refuse_untrainable_batches
from knltrain.training.due import DueRules

CONTRACT_SUMMARY = {"top1", "top5", "best_top1", "epochs", "steps", "images_per_s", "data_fraction", "comm_fraction",
                    "exposed_comm_fraction", "peak_rss_mb", "wall_s", "engine", "world_size",
                    "global_batch"}  # fmt: skip
CONTRACT_STEP = {"step", "epoch", "loss", "lr", "grad_norm", "images_per_s", "data_s", "step_s", "comm_s",
                 "exposed_comm_s", "rss_mb"}  # fmt: skip


@pytest.fixture
def config(image_folder, tmp_path):
    return override(
        RunConfig(),
        {
            "data": str(image_folder),
            "out": str(tmp_path / "run"),
            "model": "alexnet_bn_small",
            "image_size": 32,
            "global_batch": 16,
            "epochs": 3,
            "optim.lr": 5.0,
            "precision": "fp32",
            "engine": "eager",
            "workers": 2,
        },
    )


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")


def run(config, **changes):
    return trainer.train(override(config, changes), Console(silent=True))


def weights(out):
    newest = max(Path(out, "checkpoints").iterdir())
    return {**load_file(newest / "model.safetensors"), **load_file(newest / "optimizer.safetensors")}


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_run_folder_says_everything(config):
    summary, finished = run(config)
    out = Path(config.out)
    assert finished
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary.keys() >= CONTRACT_SUMMARY
    assert (summary["steps"], summary["epochs"], summary["world_size"], summary["finished"]) == (9, 3.0, 1, True)
    rows = read_metrics(out / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 10))
    assert all(row.keys() >= CONTRACT_STEP for row in steps)
    assert all(0 <= row["data_s"] <= row["step_s"] for row in steps)
    evaluations = [row for row in rows if "top1" in row]
    assert [row["step"] for row in evaluations] == [3, 6, 9]
    assert summary["top1"] == evaluations[-1]["top1"]
    # 13 validation images: every accuracy is a whole number of thirteenths.
    assert all(row["top1"] * 13 / 100 == pytest.approx(round(row["top1"] * 13 / 100)) for row in evaluations)
    record = json.loads((out / "config.json").read_text())
    assert record["config"]["optim"]["lr"] == 5.0
    assert record["plan"]["malloc"]["allocator"]
    assert {"torch", "python", "knltrain"} <= record["versions"].keys()
    assert record["cpu"]
    assert record["data"] == {"train": 48, "val": 13, "classes": 3}
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").glob("events*"))
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["step-00000006", "step-00000009"]


def test_no_time_goes_into_loading_a_compiler(config):
    """What would load it: operators of torch.library.custom_op, torch's optimizers, networks on the device meta."""
    code = (
        "import sys\n"
        "from knltrain.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "sys.exit('torch._dynamo is loaded' if 'torch._dynamo' in sys.modules else 0)\n"
    )
    command = ["train", "--recipe", "cifar-2k", "--data", config.data, "--out", config.out,
               "--global-batch", "8", "--local-batch", "4", "--max-steps", "1", "--engine", "fused"]  # fmt: skip
    result = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_training_learns(config):
    """Three kinds of smooth pictures are told apart better than by chance, and the loss falls."""
    run(config, epochs=20, **{"optim.lr": 2.0, "optim.variant": "mlperf"})
    losses = [row["loss"] for row in read_metrics(Path(config.out, "metrics.jsonl")) if "loss" in row]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_twice_the_same_run_is_the_same_run(config, tmp_path):
    run(config)
    run(config, out=str(tmp_path / "again"), workers=1)
    assert same(weights(config.out), weights(tmp_path / "again"))
    run(config, out=str(tmp_path / "other"), seed=1)
    assert not same(weights(config.out), weights(tmp_path / "other"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_run_after_a_checkpoint(config, monkeypatch, number):
    original, handler = stepping.seed_dropout, signal.getsignal(number)

    def interrupt(seed, step, micro):
        if step == 3:
            signal.raise_signal(number)
        original(seed, step, micro)

    monkeypatch.setattr(stepping, "seed_dropout", interrupt)
    summary, finished = run(config)
    assert not finished
    assert (summary["finished"], summary["steps"]) == (False, 4)
    assert max(Path(config.out, "checkpoints").iterdir()).name == "step-00000004"
    assert signal.getsignal(number) is handler
    monkeypatch.setattr(stepping, "seed_dropout", original)
    assert run(config)[0]["steps"] == 9


def test_an_evaluation_that_a_signal_prevented_is_made_up_for(config, monkeypatch):
    """And is in the checkpoint then, which stays if it is the best."""
    original = stepping.seed_dropout

    def interrupt(seed, step, micro):
        if step == 2:  # the last step of the first epoch
            signal.raise_signal(signal.SIGTERM)
        original(seed, step, micro)

    config = override(config, {"checkpoint.keep": 9})
    monkeypatch.setattr(stepping, "seed_dropout", interrupt)
    assert not run(config)[1]
    folder = Path(config.out, "checkpoints", "step-00000003")
    assert checkpoint.progress_of(checkpoint.read_state(folder)).evaluated_step == 0
    monkeypatch.undo()
    run(config)
    progress = checkpoint.progress_of(checkpoint.read_state(folder))
    assert progress.evaluated_step == 3
    assert progress.top1 is not None
    evaluations = [row["step"] for row in read_metrics(Path(config.out, "metrics.jsonl")) if "top1" in row]
    assert evaluations == [3, 6, 9]


@pytest.mark.parametrize("last", [False, True])
def test_a_signal_ends_an_evaluation_which_is_then_made_up_for(config, monkeypatch, last):
    """Of 50,000 images one takes minutes, and who sends a signal gives a minute or less."""
    steps = 9 if last else 3
    original, batches = evaluating.autocast, []

    def interrupt(precision):
        batches.append(precision)
        if len(batches) == (9 if last else 1):  # thirteen images, four at a time
            signal.raise_signal(signal.SIGUSR1)
        return original(precision)

    monkeypatch.setattr(evaluating, "autocast", interrupt)
    summary, finished = run(config, local_batch=4)
    assert (finished, summary["steps"]) == (False, steps)
    assert len(batches) == (9 if last else 1), "of this evaluation's four batches one was begun"
    assert max(Path(config.out, "checkpoints").iterdir()).name == f"step-{steps:08}"
    monkeypatch.undo()
    summary, finished = run(config, local_batch=4)
    assert finished
    assert summary["top1"] is not None
    evaluations = [row["step"] for row in read_metrics(Path(config.out, "metrics.jsonl")) if "top1" in row]
    assert evaluations == [3, 6, 9]


def test_a_signal_before_the_first_step_ends_the_run_before_it(config, monkeypatch):
    original = setup.open_data

    def interrupt(config):
        signal.raise_signal(signal.SIGUSR1)
        return original(config)

    monkeypatch.setattr(setup, "open_data", interrupt)
    summary, finished = run(config)
    assert (finished, summary["steps"]) == (False, 0)
    assert not Path(config.out, "checkpoints").exists()
    monkeypatch.undo()
    assert run(config)[1]


def test_accumulation_is_the_same_batch(config, tmp_path):
    """Without batch norm. With it, micro-batches normalise by themselves."""
    options = {"model": "alexnet", "image_size": 67, "dropout": 0.0, "max_steps": 3, "optim.weight_decay": 0.0}
    run(config, **options)
    run(config, out=str(tmp_path / "parts"), local_batch=4, **options)
    whole, parts = weights(config.out), weights(tmp_path / "parts")
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max()))


def test_an_epoch_need_not_be_a_whole_number_of_steps(config):
    summary, _ = run(config, global_batch=20, epochs=2)
    assert summary["steps"] == 5
    evaluations = [r["step"] for r in read_metrics(Path(config.out, "metrics.jsonl")) if "top1" in r]
    assert evaluations == [3, 5]


def test_a_batch_larger_than_the_data_set(config):
    summary, _ = run(config, global_batch=128, local_batch=64, max_steps=2, epochs=20)
    assert summary["steps"] == 2


def test_checkpoints_can_be_rarer_than_evaluations(config):
    run(config, **{"checkpoint.every": 2.0})
    assert [p.name for p in sorted(Path(config.out, "checkpoints").iterdir())] == ["step-00000006", "step-00000009"]


@pytest.mark.parametrize("num_images", [100, 1000, 1230])
def test_a_part_of_an_epoch_is_completed_once(num_images):
    """0.3 epochs over 0.1 is a little less than 3 in floating point."""
    config = RunConfig(global_batch=1, epochs=2)
    due = DueRules(config, make_schedule(config, num_images))
    part = num_images // 10
    assert [step for step in range(1, 2 * num_images + 1) if due.completed_interval(step, 0.1)] == [
        part * count for count in range(1, 21)
    ]


def test_a_crash_before_the_first_checkpoint_starts_over(config, monkeypatch):
    monkeypatch.setattr(trainer, "save_checkpoint", lambda *a, **k: (_ for _ in ()).throw(KnltrainError("crash")))
    with pytest.raises(KnltrainError, match="crash"):
        run(config)
    monkeypatch.undo()
    assert run(config, max_steps=1)[0]["steps"] == 1


def test_a_loss_that_is_no_number_stops_the_run(config):
    with pytest.raises(KnltrainError, match=r"at step \d+ .*rate .* loss .* is (nan|inf).*lower optim.lr"):
        run(config, **{"optim.name": "sgd", "optim.variant": "heavy-ball", "optim.lr": 1e6})


def test_bad_data_met_later_names_its_path(config, tmp_path, image_folder):
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    original = setup.open_data

    def spoil(config):
        parts = original(config)
        (data / "train" / "class1" / "007.jpg").write_bytes(b"\xff\xd8 not any more")
        return parts

    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError, match=r"class1/007\.jpg"):
        patch.setattr(setup, "open_data", spoil)
        run(config, data=str(data))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"global_batch": 10, "local_batch": 4}, "local-batch 4 does not divide the 10 images.*take 2"),
        ({"model": "alexnet", "data": "/nowhere"}, "at least 67"),
        ({"model": "lenet", "data": "/nowhere"}, "no 'lenet'"),
        (
            {"model": "resnet50", "dropout": None, "image_size": 32, "local_batch": 1, "data": "/not/looked/at/before"},
            r"one image: batch norm layer4\.0\.downsample\.1 of resnet50 .* at image-size 32, .*raise local-batch$",
        ),
        ({"data": "/nowhere/at/all"}, "/nowhere/at/all/train: no such folder"),
    ],
)
def test_refusals_come_before_training(config, changes, words):
    with pytest.raises(KnltrainError, match=words):
        run(config, **changes)
    assert not Path(config.out).exists()


def test_a_refused_run_leaves_no_folders(config, tmp_path):
    with pytest.raises(KnltrainError):
        run(config, data="/nowhere/at/all", out=str(tmp_path / "runs" / "first"))
    assert not (tmp_path / "runs").exists()


def test_an_evaluation_says_which_images_it_did_not_see(config, image_folder, tmp_path):
    """Their neighbours take their places in the accuracy."""
    run(config, max_steps=1)
    copy = tmp_path / "copy"
    shutil.copytree(image_folder, copy)
    for path in sorted((copy / "val").rglob("*.jpg"))[:2]:
        path.write_bytes(b"no image")
    said = []
    console = Console(silent=True)
    console.warn = said.append
    place = find_placement(strict=False)
    for on_bad, skipped in (("fail", 0), ("skip", 2)):
        again = override(config, {"data": str(image_folder if on_bad == "fail" else copy), "on_bad": on_bad})
        found = evaluating.evaluate_checkpoint(Path(config.out), again, console, place)
        assert found["skipped_images"] == skipped
    assert [line for line in said if "could not be decoded" in line] == [
        "2 images could not be decoded; the next good ones were used instead"
    ]


def test_a_single_image_is_refused_where_and_only_where_it_comes_with_a_single_pixel():
    def refuse(ranks, **fields):
        config = override(
            RunConfig(), {"model": "resnet50", "image_size": 64, "global_batch": 4, "epochs": 4, **fields}
        )
        refuse_untrainable_batches(config, rank_batches_by_size(config, 0, ranks))

    refuse(1)
    refuse(4)
    refuse(4, **{"schedule.image_sizes": [32], "schedule.image_size_epochs": [1], "schedule.batches": [8],
                 "schedule.batch_epochs": [2]})  # fmt: skip
    with pytest.raises(ConfigError, match=r"at image-size 32, .*; raise the batch of 4 to 8 or more, or use fewer"):
        refuse(4, image_size=32)
    with pytest.raises(ConfigError, match=r"at image-size 32, .*; raise local-batch$"):
        refuse(1, local_batch=1, **{"schedule.image_sizes": [32], "schedule.image_size_epochs": [1]})
    with pytest.raises(ConfigError, match=r"raise the batch of 1 to 2 or more$"):
        refuse(1, global_batch=1, image_size=32)


def test_share_of_several_ranks():
    share = rank_batch_of(RunConfig(global_batch=64, local_batch=8), 1, 4)
    assert (share.accumulate, share.ranges(2)) == (2, [(144, 152), (152, 160)])
    with pytest.raises(ConfigError, match="not a multiple of 3 ranks; take 63 or 66"):
        rank_batch_of(RunConfig(global_batch=64), 0, 3)
    with pytest.raises(ConfigError, match=r"take 3$"):
        rank_batch_of(RunConfig(global_batch=2), 0, 3)


def test_dropout_depends_on_the_place_in_the_run_alone():
    def drawn(*place):
        stepping.seed_dropout(*place)
        return torch.rand(4)

    assert torch.equal(drawn(0, 5, 2), drawn(0, 5, 2))
    assert not torch.equal(drawn(0, 5, 2), drawn(0, 5, 3))
    assert not torch.equal(drawn(0, 5, 2), drawn(0, 6, 2))
    assert not torch.equal(drawn(0, 5, 2), drawn(1, 5, 2))


def test_label_smoothing_changes_the_loss(config, tmp_path):
    run(config, max_steps=1)
    run(config, max_steps=1, label_smoothing=0.5, out=str(tmp_path / "smooth"))
    plain, smooth = (read_metrics(Path(out, "metrics.jsonl"))[0]["loss"] for out in (config.out, tmp_path / "smooth"))
    assert not math.isclose(plain, smooth, rel_tol=1e-4)
