"""The command as a user meets it: flags, exit codes, one line for every mistake."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner
from conftest import write_jpeg
from safetensors.torch import load_file

from knltrain import config as configuration
from knltrain.cli.main import main
from knltrain.cli.predict import predict
from knltrain.config import aliases
from knltrain.ops.native import load_error
from knltrain.training import trainer

# Adding a flag is a decision: it is added here too, or better becomes a field of a recipe.
FIELDS = """
    data classes class-order
    stage out model dropout zero-init-residual image-size epochs max-steps global-batch local-batch precision
    fp32-precision force-bf16 engine conv seed resume init-from workers on-bad label-smoothing log-trust-ratios
    ema-decay
    optim.name optim.variant optim.lr optim.lr-scaling optim.momentum optim.beta2 optim.weight-decay optim.decay-on
    optim.trust-coefficient optim.eps
    schedule.name schedule.warmup-epochs schedule.warmup-lr schedule.power schedule.end-lr schedule.milestones
    schedule.gamma schedule.image-sizes schedule.image-size-epochs schedule.batches schedule.batch-epochs
    augment.name augment.resize augment.min-area augment.pad augment.collapse-epochs
    comm.backend comm.dtype comm.bucket-mb comm.compression comm.powersgd-rank comm.timeout-s comm.start-timeout-s
    checkpoint.every checkpoint.keep
    health.policy health.max-skips health.max-rewinds health.rewind-factor health.divergence-steps health.compare-every
"""
FLAGS = {
    "train": {"recipe", "config", "json", "help", "no-strict-affinity", "allow-change", *FIELDS.split()},
    "eval": {
        "json",
        "help",
        "no-strict-affinity",
        "data",
        "classes",
        "class-order",
        "precision",
        "force-bf16",
        "workers",
        "on-bad",
        "model",
        "image-size",
        "augment.resize",
    },
    "export": {"json", "help", "format"},
    "bench": {
        "json",
        "help",
        "recipe",
        "model",
        "batch",
        "image-size",
        "precision",
        "fp32-precision",
        "force-bf16",
        "engine",
        "conv",
        "steps",
        "data",
        "on-bad",
        "compare",
        "profile",
        "batches",
        "threads",
        "out",
    },
    "tune": {"json", "help", "model", "batch", "precision", "steps", "budget"},
    "prepare": {"json", "help", "format", "size", "workers", "on-bad", "verify", "classes", "class-order"},
    "data": {
        "json",
        "help",
        "recipe",
        "sheet",
        "classes",
        "class-order",
        "image-size",
        "augment.name",
        "augment.resize",
    },
    "recipes": {"json", "help"},
    "launch": {"json", "help", "ppn", "hosts", "dry-run"},
    "plan": {"json", "help", "ranks-per-node", "topology", "format"},
    "doctor": {"json", "help", "data"},
    "sweep": {
        "recipe",
        "batches",
        "optimizers",
        "lr-factors",
        "seeds",
        "search-seeds",
        "out",
        "task",
        "dry-run",
        "json",
        "help",
        *(set(FIELDS.split()) - {"global-batch", "seed", "resume", "optim.name", "optim.lr", "optim.lr-scaling"}),
    },
    "report": {"json", "help", "out", "target-top1"},
    "predict": {
        "json",
        "help",
        "recipe",
        "nodes",
        "system",
        "batches",
        "network-factor",
        "algorithm",
        "no-overlap",
        "images",
        "layers",
        "out",
        "validate",
        "accounting",
        "calibrate",
        "bench",
        "allreduce",
        "model",
        "image-size",
        "epochs",
        "max-steps",
        "global-batch",
        "local-batch",
        "precision",
        "comm.dtype",
        "dtype",
        "comm.bucket-mb",
        "bucket-mb",
    },
}


SUBCOMMAND_FLAGS = {
    "validate": {"json", "help"},
    "accounting": {"json", "help", "recipe", "nodes", "batches", "images", "model", "image-size", "epochs",
                   "comm.dtype", "dtype"},
    "calibrate": {"json", "help", "bench", "allreduce", "out"},
}  # fmt: skip


def flags_of(command):
    return {flag.lstrip("-") for p in command.params for flag in p.opts if flag.startswith("--")} | {"help"}


def test_the_flag_set_is_frozen():
    runner = CliRunner()
    assert set(main.commands) == set(FLAGS)
    for name, command in main.commands.items():
        assert flags_of(command) == FLAGS[name], name
        result = runner.invoke(main, [name, "--help"])
        assert result.exit_code == 0
    assert {name: flags_of(command) for name, command in predict.commands.items()} == SUBCOMMAND_FLAGS


SWEPT = ("--recipe", "cifar-256", "--data", "synthetic")
PREDICTED = ("--nodes", "8", "--system", "knl7250-opa")


def invoke(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["train"], 2, "nothing to train"),
        (["train", "--recipe", "alexnet-bn-32"], 2, "did you mean alexnet-bn-32k?"),
        (["train", "--recipe", "quickstart", "--globl-batch", "3"], 2, "--global-batch"),
        (["train", "--recipe", "quickstart", "--global-batch", "many"], 2, "global_batch: 'many' will not do"),
        (["train", "--config", "/nowhere.toml"], 2, "/nowhere.toml: No such file"),
        (["train", "--recipe", "quickstart", "--allow-change", "optim.ls,seed"], 2, "did you mean optim.lr?"),
        (["train", "--recipe", "quickstart", "--allow-change", ""], 2, "unknown field ''"),
        (["train", "--recipe", "resnet50-256", "--max-steps", "1"], 2, "no data"),
        (["train", "--recipe", "resnet50-256", "--data", "/nowhere"], 1, "/nowhere/train: no such folder"),
        (["eval", "/nowhere", "--data", "synthetic"], 1, "/nowhere: no checkpoint"),
        (["eval", "/nowhere.pth", "--data", "synthetic", "--model", "resnet20"], 1, "/nowhere.pth: no such file"),
        (["bench", "--model", "lenet"], 2, "no 'lenet'"),
        (["bench", "--precision", "fp16"], 2, "fp16"),
        (["bench", "--recipe", "cifar-2"], 2, "did you mean cifar-2k?"),
        (["bench", "--data", "/nowhere"], 1, "/nowhere/train: no such folder"),
        (["bench", "--compare", "--model", "lenet"], 2, "no 'lenet'"),
        (["bench", "--batches", "8", "--model", "lenet"], 2, "no 'lenet'"),
        (["bench", "--compare", "--profile"], 2, "--compare with --profile"),
        (["bench", "--profile", "--threads", "1"], 2, "--profile with --threads"),
        (["bench", "--compare", "--batches", "2", "--threads", "1"], 2, "--compare with --batches --threads"),
        (["bench", "--compare", "--data", "shapes"], 2, "--compare with --data"),
        (["bench", "--profile", "--data", "shapes"], 2, "--profile with --data"),
        (["bench", "--compare", "--engine", "eager"], 2, "--compare with --engine"),
        (["bench", "--profile", "--engine", "compile"], 2, "compile merges the layers"),
        (["bench", "--batch", "8", "--batches", "8"], 2, "--batch with --batches"),
        (["bench", "--out", "somewhere"], 2, "--out"),
        (["bench", "--batches", "8,,16"], 2, "--batches 8,,16: give whole numbers from 1"),
        (["bench", "--threads", "0"], 2, "--threads 0: give whole numbers from 1"),
        (["bench", "--threads", "1,100000"], 2, "100000 threads: this process may use"),
        (["tune", "--model", "lenet"], 2, "no 'lenet'"),
        (["launch", "-n", "2"], 2, "nothing to launch"),
        (["launch", "-n", "2", "--", "recipes"], 2, "nothing to launch"),
        (["launch", "-n", "9", "--ppn", "2", "--hosts", "a,b", "--", "train"], 2, "-n 9 does not fit 2 node(s)"),
        (["launch", "--hosts", "a,,b", "--", "train"], 2, "--hosts 'a,,b'"),
        (["launch", "--json", "--", "train"], 2, "--json: only --dry-run"),
        (["plan", "--topology", "/nowhere"], 2, "/nowhere: no folder sys or proc in it"),
        (["plan", "--ranks-per-node", "0"], 2, "ranks-per-node"),
        (["sweep"], 2, "nothing to sweep: give --recipe NAME"),
        (["sweep", "--recipe", "cifar-25"], 2, "did you mean cifar-256?"),
        (["sweep", *SWEPT, "--batches", "256,,512"], 2, "--batches 256,,512: give whole numbers"),
        (
            ["sweep", *SWEPT, "--optimizers", "sgd,adam"],
            2,
            "no rule for the optimizer 'adam'; it has one for sgd, lars",
        ),
        (["sweep", *SWEPT, "--optimizers", "sgd,"], 2, "--optimizers sgd,: give names"),
        (["sweep", *SWEPT, "--lr-factors", "fast"], 2, "--lr-factors fast: give numbers"),
        (["sweep", *SWEPT, "--lr-factors", "sgd=1,2"], 2, "--lr-factors sgd=1,2: give METHOD:BATCH=FACTOR"),
        (["sweep", *SWEPT, "--lr-factors", f"sgd:{'9' * 5000}=1"], 2, "give METHOD:BATCH=FACTOR"),
        (["sweep", *SWEPT, "--lr-factors", "sgd:256=1", "--lr-factors", "sgd:256=2"], 2, "given twice for sgd:256"),
        (["sweep", *SWEPT, "--lr-factors", "1", "--lr-factors", "2"], 2, "given twice for all"),
        (["sweep", *SWEPT, "--lr-factors", "lars:256=1"], 2, "this sweep has no lars at 256"),
        (["sweep", *SWEPT, "--seeds", "0,1", "--search-seeds", "2"], 2, "--search-seeds 2 is not one of --seeds 0,1"),
        (["sweep", *SWEPT, "--batches", "256,300"], 2, "--batches 300: local-batch 256 does not divide"),
        (["sweep", *SWEPT, "--epochs", "1", "--batches", "2560000"], 2, "--batches 2560000: more images than 1 epochs"),
        (["sweep", *SWEPT, "--model", "lenet"], 2, "no 'lenet'"),
        (["sweep", *SWEPT, "--data", "/nowhere"], 1, "/nowhere/train: no such folder"),
        (["sweep", *SWEPT, "--dry-run", "--task", "1"], 2, "--task 1: this sweep has the tasks 0 to 0"),
        (["sweep", "--recipe", "cifar-256"], 2, "no data"),
        (["predict"], 2, "give --recipe NAME"),
        (["predict", "--recipe", "alexnet-bn-32k", "--nodes", "8"], 2, "--system: give cloud-100g"),
        (["predict", "--recipe", "alexnet-bn-32", *PREDICTED], 2, "did you mean alexnet-bn-32k?"),
        (
            ["predict", "--recipe", "alexnet-bn-32k", *PREDICTED, "--nodes", "0"],
            2,
            "--nodes 0: give whole numbers from 1",
        ),
        (["predict", "--recipe", "alexnet-bn-32k", *PREDICTED, "--nodes", "8,,9"], 2, "--nodes 8,,9"),
        (["predict", "--recipe", "alexnet-bn-32k", *PREDICTED, "--nodes", "many"], 2, "--nodes many"),
        (["predict", "--recipe", "alexnet-bn-32k", *PREDICTED, "--system", "knl"], 2, "no system 'knl'"),
        (["predict", "--recipe", "alexnet-bn-32k", *PREDICTED, "--system", "/nowhere.toml"], 2, "No such file"),
        (["predict", "--recipe", "alexnet-bn-32k", *PREDICTED, "--global-batch", "4"], 2, "smaller than the 8 ranks"),
        (["predict", "--recipe", "alexnet-bn-32k", *PREDICTED, "--batches", "32768,4"], 2, "smaller than the 8 ranks"),
        (["predict", "--recipe", "alexnet-bn-32k", *PREDICTED, "--network-factor", "-1"], 2, "network-factor -1"),
        (["predict", "--recipe", "alexnet-bn-32k", *PREDICTED, "--dtype", "fp16"], 2, "comm.dtype"),
        (["predict", "--recipe", "alexnet-bn-32k", *PREDICTED, "--bucket-mb", "0"], 2, "comm.bucket_mb"),
        (["predict", "--recipe", "alexnet-bn-32k", *PREDICTED, "--model", "lenet"], 2, "--layers FILE"),
        (["predict", "--recipe", "alexnet-bn-32k", *PREDICTED, "--layers", "/nowhere"], 2, "/nowhere: No such file"),
        (["predict", "--recipe", "alexnet-bn-32k", *PREDICTED, "--layers", __file__], 2, "not JSON"),
        (["predict", "--recipe", "alexnet-bn-32k", *PREDICTED, "--bench", "x"], 2, "--bench has no effect"),
        (["predict", "--recipe", "alexnet-bn-32k", *PREDICTED, "--epochs", "1e300"], 2, "epochs: '1e300' will not do"),
        (
            ["predict", "--recipe", "alexnet-bn-32k", *PREDICTED, "--batches", "8", "--global-batch", "8"],
            2,
            "--batches",
        ),
        (["predict", "--validate", "--nodes", "8"], 2, "--nodes has no effect with --validate"),
        (["predict", "--validate", "--calibrate"], 2, "--validate with --calibrate"),
        (["predict", "--calibrate"], 2, "calibrate: give --bench FILE"),
        (["predict", "--calibrate", "--recipe", "cifar-2k"], 2, "--recipe has no effect with --calibrate"),
        (["predict", "--accounting", "--system", "knl7250-opa"], 2, "--system has no effect with --accounting"),
        (["predict", "--accounting", "--nodes", "8"], 2, "give --recipe NAME"),
        (["predict", "validate", "--nodes", "8"], 2, "--nodes"),
        (["predict", "--nodes", "8", "validate"], 2, "--nodes before validate: give options after it"),
        (["predict", "accounting"], 2, "give --recipe NAME"),
        (
            ["predict", "accounting", "--recipe", "resnet50-ffcv-16", "--nodes", "8", "--batches", "8"],
            2,
            "the schedule of resnet50-ffcv-16 changes batch or image size",
        ),
        (["predict", "calibrate"], 2, "calibrate: give --bench FILE"),
        (["predict", "calibrate", "--bench", "b", "--allreduce", "a", "--out", "x.json"], 2, "ends in .toml"),
        (["predict", "validat"], 2, "validat"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(arguments, code, words):
    result = invoke(*arguments)
    assert result.exit_code == code
    last = result.stderr.strip().splitlines()[-1]
    assert words in last or words in result.stderr
    assert "Traceback" not in result.output + result.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train", "--batch-size", "256"], "--batch-size: here it is --global-batch"),
        (["train", "-b", "256"], "-b: here it is --global-batch"),
        (["train", "-b256"], "-b: here it is --global-batch"),
        (["train", "--lr=0.1"], "--lr: here it is --optim.lr"),
        (["train", "-lr", "0.1"], "-lr: here it is --optim.lr"),
        (["train", "--learning_rate", "0.1"], "--learning-rate: here it is --optim.lr"),
        (["train", "--weight-decay", "0"], "--weight-decay: here it is --optim.weight-decay"),
        (["train", "-j", "4"], "-j: here it is --workers"),
        (["train", "-a", "resnet50"], "-a: here it is --model"),
        (["train", "--opt", "sgd"], "--opt: here it is --optim.name"),
        (["train", "--output_dir", "x"], "--output-dir: here it is --out"),
        (["train", "--data-path", "x"], "--data-path: here it is --data"),
        (["train", "--pretrained"], "--pretrained: here it is --init-from"),
        (["train", "--amp"], "--amp: here it is --precision"),
        (["train", "--num-classes", "10"], "--num-classes: the folders of --data say"),
        (["train", "--print-freq", "10"], "--print-freq: every step is in OUT/metrics.jsonl"),
        (["train", "--test-only"], "--test-only: `knltrain eval CHECKPOINT` evaluates"),
        (["train", "--max_epochs", "3"], "--max-epochs: here it is --epochs"),
        (["train", "--train_micro_batch_size_per_gpu", "3"], "here it is --local-batch"),
        (["train", "--base_lr", "3"], "here it is --optim.lr"),
        (["train", "--world-size", "3"], "--world-size: the launcher says it"),
        (["sweep", "--batch-size", "256"], "--batch-size: here it is --batches"),
        (["sweep", "--lr", "256"], "--lr: here it is --lr-factors"),
        (["bench", "--batch-size", "256"], "--batch-size: here it is --batch"),
        (["eval", "x", "--batch-size", "256"], "--batch-size: `knltrain train` has --global-batch"),
        (["eval", "x", "--seed", "1"], "--seed: `knltrain train` has --seed"),
        (["recipes", "--lr", "1"], "--lr: `knltrain train` has --optim.lr"),
        (["predict", "accounting", "--batch-size", "1"], "--batch-size: here it is --batches"),
        (["--recipe", "quickstart"], "--recipe: `knltrain train` has --recipe"),
        (["train", "quickstart"], "a recipe is given with --recipe NAME"),
    ],
    ids=str,
)
def test_an_option_of_another_program_is_answered_with_ours(arguments, words):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "line, words",
    [("batch_size = 3", "'batch_size': here it is global_batch"), ("lr = 0.1", "'lr': here it is optim.lr"),
     ("[trainer]\nmax_epochs = 3", "'trainer.max_epochs': here it is epochs"),
     ("[optim]\nlearning_rate = 3", "'optim.learning_rate': here it is optim.lr"),
     ("num_classes = 3", "'num_classes': the folders of --data")],
)  # fmt: skip
def test_a_key_of_another_program_is_answered_with_ours(tmp_path, line, words):
    (tmp_path / "run.toml").write_text(line)
    result = invoke("train", "--config", tmp_path / "run.toml")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert f"unknown field {words}" in result.stderr


def test_aliases_name_fields_that_there_are():
    flags = {flag.replace("-", "_") for command in FLAGS.values() for flag in command} | set(FIELDS.split())
    names = {field.name for field in configuration.fields()}
    for name, alias in aliases._ALIASES.items():
        assert name not in names, name
        assert all(field in flags for field in alias.fields), name
        assert alias.fields or alias.note, name


def test_a_home_folder_after_an_equals_sign_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"--config {tmp_path}/none.toml: No such file" in invoke("train", "--config=~/none.toml").stderr
    (tmp_path / "run.toml").write_text('recipe = "resnet50-256"\ndata = "~/images"\n')
    assert f"{tmp_path}/images/train: no such folder" in invoke("train", "--config=~/run.toml").stderr


def test_recipes_can_be_named():
    rows = json.loads(invoke("recipes", "cifar-2k", "alexnet-bn-32k", "--json").stdout)
    assert [row["recipe"] for row in rows] == ["cifar-2k", "alexnet-bn-32k"]
    result = invoke("recipes", "cifar-2k", "cifar-25")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no recipe 'cifar-25'; did you mean cifar-256?" in result.stderr


def test_recipes_table_and_json():
    result = invoke("recipes")
    assert result.exit_code == 0
    line = next(line for line in result.output.splitlines() if "alexnet-bn-32k" in line)
    for word in ("alexnet_bn", "32,768", "100", "32", "10.2", "lars/paper", "crop-flip", "57.8", "not run"):
        assert word in line
    rows = json.loads(invoke("recipes", "--json").stdout)
    assert {"recipe", "model", "batch", "epochs", "lr", "published", "measured"} <= rows[0].keys()


def test_underscores_and_dashes_are_the_same_flag(image_folder, tmp_path):
    result = invoke("train", "--recipe", "cifar-256", "--data", image_folder, "--out", tmp_path, "--max_steps", 1,
                    "--global-batch", 16, "--local_batch", 8, "--optim.weight_decay", "1e-4", "--json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "config.json").read_text())
    assert (record["config"]["local_batch"], record["config"]["optim"]["weight_decay"]) == (8, 1e-4)


def test_train_from_a_file_and_flags_with_json_last(image_folder, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        f'recipe = "cifar-2k"\ndata = "{image_folder}"\nglobal_batch = 16\n[optim]\nlr = 2.0\nmomentum = 0.5\n'
    )
    result = invoke("train", "--config", file, "--optim.lr", 3, "--max-steps", 2, "--out", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    record = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (record["optim"]["lr"], record["optim"]["momentum"], record["recipe"]) == (3.0, 0.5, "cifar-2k")
    assert "top-1" in result.stderr


def test_warnings_of_what_changes_nothing_or_does_not_fit(image_folder, tmp_path):
    result = invoke("train", "--recipe", "cifar-2k", "--data", image_folder, "--out", tmp_path, "--max-steps", 1,
                    "--global-batch", 16, "--schedule.gamma", "0.5", "--comm.dtype", "bf16")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "schedule.gamma has no effect" in result.output
    assert "global batch 16 with the learning rate 6.4" in result.output
    assert "of comm.*, timeout-s alone has an effect on a single rank" in result.output


@pytest.mark.parametrize(
    "flags, warned",
    [
        (["--global-batch", 16], True),
        (["--global-batch", 16, "--optim.lr", 0.1], False),
        (["--global-batch", 16, "--optim.lr-scaling", "linear"], False),
        ([], False),
    ],
)
def test_another_batch_with_the_recipes_rate_is_said_unless_the_rate_follows(tmp_path, monkeypatch, flags, warned):
    monkeypatch.setattr(trainer, "train", lambda *_, **__: (None, True))
    result = invoke("train", "--recipe", "cifar-2k", "--data", "nowhere", "--out", tmp_path, *flags)
    assert result.exit_code == 0, result.stderr
    assert ("global batch 16 with the learning rate" in result.output) == warned


def test_a_run_goes_on_with_a_change_that_is_allowed(image_folder, tmp_path):
    command = ["train", "--recipe", "cifar-256", "--data", image_folder, "--out", tmp_path / "run",
               "--global-batch", 16, "--precision", "fp32"]  # fmt: skip
    assert invoke(*command, "--max-steps", 1).exit_code == 0
    changed = [*command, "--max-steps", 2, "--optim.weight-decay", "0.25"]
    refused = invoke(*changed)
    assert refused.exit_code == 2
    assert "optim.weight_decay: 0.0005 -> 0.25" in refused.stderr
    allowed = invoke(*changed, "--allow-change", "optim.weight-decay")
    assert allowed.exit_code == 0, allowed.stderr
    assert "from step 1 on, optim.weight_decay is 0.25 and no longer 0.0005" in allowed.output


def test_eval_gives_the_runs_accuracy(image_folder, tmp_path):
    out = tmp_path / "run"
    trained = invoke("train", "--recipe", "cifar-256", "--data", image_folder, "--out", out, "--max-steps", 3,
                     "--global-batch", 16, "--precision", "fp32", "--json")  # fmt: skip
    summary = json.loads(trained.stdout.splitlines()[-1])
    result = invoke("eval", out, "--data", image_folder, "--precision", "fp32", "--json")
    assert result.exit_code == 0, result.stderr
    accuracy = json.loads(result.stdout.splitlines()[-1])
    assert (accuracy["top1"], accuracy["top5"], accuracy["images"]) == (summary["top1"], summary["top5"], 13)
    refused = invoke("eval", out, "--data", "synthetic")
    assert refused.exit_code == 1
    assert "other classes" in refused.stderr


def test_eval_of_an_exported_file_is_that_of_its_checkpoint(image_folder, tmp_path):
    """The file says what it is of; of images of the usual 224 pixels it would make something else."""
    out, file = tmp_path / "run", tmp_path / "net.safetensors"
    common = ["--data", image_folder, "--precision", "fp32"]
    invoke("train", "--recipe", "cifar-256", "--out", out, "--max-steps", 3, "--global-batch", 16, *common)
    assert invoke("export", out, file).exit_code == 0
    found = []
    for what in (out, file):
        result = invoke("eval", what, *common, "--json")
        assert result.exit_code == 0, result.stderr
        assert "13 images of 32 pixels, cut out of 32" in result.stderr
        found.append(json.loads(result.stdout.splitlines()[-1]))
    assert found[0]["loss"] == found[1]["loss"]
    other = invoke("eval", file, *common, "--image-size", 48)
    assert "48 pixels, cut out of 55" in other.output
    bare = tmp_path / "bare.pth"
    torch.save(load_file(file), bare)
    usual = invoke("eval", bare, *common, "--model", "alexnet_bn_small")
    assert "32 pixels, cut out of 32" in usual.output
    refused = invoke("eval", file, *common, "--model", "resnet20")
    assert (refused.exit_code, "says that it is of alexnet_bn_small" in refused.stderr) == (2, True)
    renamed = tmp_path / "renamed"
    shutil.copytree(image_folder, renamed)
    (renamed / "val" / "class0").rename(renamed / "val" / "zebra")
    refused = invoke("eval", file, "--data", renamed)
    assert (refused.exit_code, "other classes than" in refused.stderr) == (1, True)


def test_eval_of_a_bare_file_on_folders_that_are_numbers(tmp_path):
    """The file's outputs are in the order of the numbers, and folders sort as text: 0, 1, 10, 11, 2."""
    for part in ("train", "val"):
        for number in range(12):
            for image in range(2):
                write_jpeg(tmp_path / "data" / part / str(number) / f"{image}.jpg", 32, 32, number)
    common = ["--data", tmp_path / "data", "--precision", "fp32"]
    run, bare = tmp_path / "run", tmp_path / "bare.pth"
    trained = invoke("train", "--recipe", "cifar-256", "--out", run, "--max-steps", 12, "--global-batch", 8,
                     "--class-order", "numeric", *common)  # fmt: skip
    assert "numbered in the order" not in trained.output
    state = json.loads((max((run / "checkpoints").glob("step-*")) / "state.json").read_text())
    assert state["classes"] == [str(number) for number in range(12)]
    assert state["config"]["class_order"] == "numeric"
    invoke("export", run, tmp_path / "net.safetensors")
    torch.save(load_file(tmp_path / "net.safetensors"), bare)

    def evaluated(what, *options):
        result = invoke("eval", what, *common, "--json", *options)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])["loss"], "--class-order numeric numbers them" in result.stderr

    right, said = evaluated(run)
    assert not said, "the checkpoint names its classes"
    assert evaluated(tmp_path / "net.safetensors") == (right, False)
    result = invoke("eval", run, *common, "--class-order", "name")
    assert "class-order has no effect" in result.output
    assert f"loss {right:.4f}" in result.output
    other, said = evaluated(bare, "--model", "alexnet_bn_small")
    assert (other != right, said) == (True, True)
    assert evaluated(bare, "--model", "alexnet_bn_small", "--class-order", "numeric") == (right, False)
    names = tmp_path / "names"
    names.write_text("".join(f"{number}\n" for number in range(12)))
    assert evaluated(bare, "--model", "alexnet_bn_small", "--class-order", names) == (right, False)


def test_a_run_of_some_classes_is_evaluated_on_them(image_folder, tmp_path):
    names, run = tmp_path / "names", tmp_path / "run"
    names.write_text("class2\nclass0\n")
    trained = invoke("train", "--recipe", "cifar-256", "--out", run, "--max-steps", 3, "--global-batch", 8,
                     "--precision", "fp32", "--data", image_folder, "--classes", names, "--json")  # fmt: skip
    assert trained.exit_code == 0, trained.stderr
    summary = json.loads(trained.stdout.splitlines()[-1])
    result = invoke("eval", run, "--data", image_folder, "--precision", "fp32", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["top1"], found["top5"]) == (summary["top1"], summary["top5"])
    assert found["images"] == sum(len(list((image_folder / "val" / name).iterdir())) for name in ("class0", "class2"))
    invoke("export", run, tmp_path / "net.safetensors")
    refused = invoke("eval", tmp_path / "net.safetensors", "--data", image_folder)
    assert refused.exit_code == 1
    assert "other classes than" in refused.stderr
    assert "'class1' more" in refused.stderr
    assert invoke("eval", tmp_path / "net.safetensors", "--data", image_folder, "--classes", names).exit_code == 0
    names.write_text("class7\n")
    refused = invoke("eval", run, "--data", image_folder, "--classes", names)
    assert (refused.exit_code, "'class7'" in refused.stderr) == (2, True)


def test_what_a_run_would_not_come_to_is_said(image_folder, tmp_path):
    short = ["train", "--recipe", "resnet50-8k-goyal", "--model", "alexnet_bn_small", "--zero-init-residual", "false",
             "--data", image_folder, "--out", tmp_path / "run", "--global-batch", 8, "--local-batch", 4,
             "--image-size", 32, "--max-steps", 1, "--epochs"]  # fmt: skip
    result = invoke(*short, 30)
    assert "schedule.milestones 30,60,80 are not before the end of 30 epochs: the rate never falls" in result.output
    shutil.rmtree(tmp_path / "run")
    result = invoke(*short, 5)
    assert "schedule.warmup-epochs 5 last to the end of 5 epochs: the rate only rises" in result.output
    shutil.rmtree(tmp_path / "run")
    assert "before the end" not in invoke(*short, 90).output


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_bench(precision):
    result = invoke(
        "bench", "--model", "alexnet_bn_small", "--batch", 16, "--steps", 4, "--precision", precision, "--json"
    )
    assert result.exit_code == 0, result.stderr
    measured = json.loads(result.stdout.splitlines()[-1])
    step = measured["step_s"]
    assert step["min"] <= step["quartile1"] <= step["median"] <= step["quartile3"] <= step["max"]
    assert measured["images_per_s"] == pytest.approx(16 / step["median"])
    assert measured["engine"] == ("eager" if load_error() else "fused")
    assert measured["versions"]["torch"]


def test_bench_takes_a_recipe(image_folder):
    result = invoke("bench", "--recipe", "cifar-2k", "--data", image_folder, "--batch", 8, "--steps", 2, "--json")
    assert result.exit_code == 0, result.stderr
    measured = json.loads(result.stdout.splitlines()[-1])
    expected = {"model": "alexnet_bn_small", "image_size": 32, "batch": 8, "augment": "pad-crop-flip"}
    assert measured.items() >= expected.items()
    assert "waiting for data" in result.stderr


def test_bench_warns_of_what_changes_nothing():
    result = invoke("bench", "--model", "alexnet_bn_small", "--batch", 2, "--steps", 1, "--force-bf16", "true")
    assert result.exit_code == 0, result.stderr
    assert "force-bf16 has no effect" in result.output


def test_the_module_is_the_command(knltrain):
    result = knltrain("--help")
    assert result.returncode == 0
    assert all(verb in result.stdout for verb in FLAGS)


def test_ctrl_c_ends_with_a_checkpoint_and_the_command_goes_on(image_folder, tmp_path):
    """In a process of its own, as a terminal sends it; exit code 75 says: try again."""
    command = [sys.executable, "-m", "knltrain", "train", "--recipe", "cifar-256", "--data", str(image_folder),
               "--out", str(tmp_path / "run"), "--global-batch", "16", "--epochs", "2000", "--json"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 5) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "the same command goes on from there" in errors
    assert "Traceback" not in errors
    step = int(max((tmp_path / "run" / "checkpoints").iterdir()).name.removeprefix("step-"))
    summary = json.loads(output.splitlines()[-1])
    assert (summary["finished"], summary["steps"]) == (False, step)
    result = invoke(*command[3:], "--max-steps", step + 2)
    assert result.exit_code == 0, result.stderr
    assert "resumed from" in result.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == step + 2


def test_predict_says_how_long_where_the_time_goes_and_what_to_change(tmp_path):
    result = invoke("predict", "--recipe", "alexnet-bn-32k", "--nodes", 512, "--system", "knl7250-opa", "--json",
                    "--out", tmp_path / "pictures")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["nodes"], found["steps"], found["local_batch"]) == (512, 3910, 64)
    step = found["step"]
    parts = ("input_s", "forward_s", "backward_s", "straggler_s", "exposed_s", "optimizer_s")
    assert sum(step[part] for part in parts) == pytest.approx(step["seconds"])
    for words in ("network bound beyond", "bf16 gradients (--comm.dtype bf16): saves", "node-hours", "3,910 steps"):
        assert words in result.stderr
    for name in ("step.png", "scaling.png"):
        assert (tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG")


def test_predict_over_nodes_and_batches_and_with_things_changed():
    common = ("predict", "--recipe", "alexnet-bn-32k", "--system", "knl7250-opa", "--json")
    grid = json.loads(invoke(*common, "--nodes", "64,512", "--batches", "8192,32768").stdout.splitlines()[-1])["grid"]
    assert [(one["nodes"], one["global_batch"]) for one in grid] == [(64, 8192), (512, 8192), (64, 32768), (512, 32768)]
    base = json.loads(invoke(*common, "--nodes", 512).stdout.splitlines()[-1])["total_s"]
    for change in (("--dtype", "bf16"), ("--comm.dtype", "bf16"), ("--network-factor", 2), ("--global-batch", 65536)):
        assert json.loads(invoke(*common, "--nodes", 512, *change).stdout.splitlines()[-1])["total_s"] < base
    assert json.loads(invoke(*common, "--nodes", 512, "--no-overlap").stdout.splitlines()[-1])["total_s"] > base
    buckets = json.loads(invoke(*common, "--nodes", 512, "--bucket-mb", 1).stdout.splitlines()[-1])["step"]["buckets"]
    assert len(buckets) > 5


@pytest.mark.parametrize("spelling", ["validate", "--validate"])
def test_predict_validates(spelling):
    rows = json.loads(invoke("predict", spelling, "--json").stdout.splitlines()[-1])
    assert {"run", "published_min", "predicted_min", "deviation", "role", "assumed", "source"} <= rows[0].keys()


@pytest.mark.parametrize("spelling", ["accounting", "--accounting"])
def test_predict_accounts(spelling):
    result = invoke("predict", spelling, "--recipe", "alexnet-bn-32k", "--nodes", 512, "--batches", "512",
                    "--dtype", "bf16", "--json")  # fmt: skip
    (row,) = json.loads(result.stdout.splitlines()[-1])
    assert (row["nodes"], row["iterations"]) == (512, 250_228)
    assert row["terabytes"] == pytest.approx(121.81 / 2, rel=1e-3)


def test_predicts_help_names_its_subcommands():
    text = invoke("predict", "--help").stdout
    for name in SUBCOMMAND_FLAGS:
        assert f"\n  {name} " in text
        assert f"--{name}" not in text
    assert "--allreduce" in invoke("predict", "calibrate", "--help").stdout
