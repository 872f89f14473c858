"""Runs whose batch, image size and augmentation change, and whose weights are averaged."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import assert_same_run, newest, state
from safetensors.torch import load_file
from small_networks import (
    CHANGES,
    CHANGING_STEPS,
    PRECISIONS,
    add_small_networks,
    marked,
    network_of,
    small_run,
    whole_and_in_parts,
    why_no_engine,
)

from knltrain import checkpoint
from knltrain.config import RunConfig, override
from knltrain.config.checks import unused_field_warnings
from knltrain.config.schedule import make_schedule
from knltrain.data.folder import Folder
from knltrain.data.loader import Loader
from knltrain.errors import ConfigError, KnltrainError
from knltrain.models import model_of
from knltrain.runlog.console import Console
from knltrain.runlog.metrics import read_metrics
from knltrain.training import step as stepping
from knltrain.training import trainer
from knltrain.training.batching import rank_batches_by_size, rank_batches_of
from knltrain.training.ema import WeightAverage
from knltrain.training.evaluate import evaluate
from knltrain.training.step_guard import RewindError
from knltrain.weights.export import export


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")


@pytest.fixture
def config(image_folder, tmp_path):
    return small_run(image_folder, tmp_path / "run", **CHANGES)


def run(config, **changes):
    return trainer.train(override(config, changes), Console(silent=True))


# What a step sees ----------------------------------------------------------------------------------------------------


def batches(image_folder, config, world_size=1, part="train"):
    """Images and labels of every step, those of the ranks one after the other."""
    loader = Loader(Folder(image_folder / part), config, dtype=torch.float32, workers=2)
    course = make_schedule(config, len(loader))
    steps = []
    for phase, *shares in zip(
        course.phases,
        *(rank_batches_of(rank_batches_by_size(config, rank, world_size), course) for rank in range(world_size)),
        strict=True,
    ):
        of_ranks = [list(loader.training(share, phase.first_step, phase.last_step)) for share in shares]
        for index in range(phase.last_step - phase.first_step):
            parts = [
                batch
                for share, made in zip(shares, of_ranks, strict=True)
                for batch in made[index * share.accumulate : (index + 1) * share.accumulate]
            ]
            steps.append(tuple(torch.cat([batch[i] for batch in parts]) for i in (0, 1)))
    loader.close()
    return course, steps


def test_every_image_of_the_stream_comes_once_whatever_the_batch(image_folder, config):
    """The labels are those of a run of one batch size, in the same order; sizes are as asked for."""
    course, steps = batches(image_folder, config)
    assert [(len(labels), images.shape[-1]) for images, labels in steps] == [
        (phase.batch, phase.image_size) for phase in map(course.phase, range(course.total_steps))
    ]
    assert {images.shape[-1] for images, _ in steps} == {16, 32}
    assert {len(labels) for _, labels in steps} == {8, 16}
    plain = override(config, {"schedule.batches": [], "schedule.batch_epochs": [], "global_batch": 8})
    _, others = batches(image_folder, plain)
    seen = course.images(course.total_steps)
    assert torch.equal(*(torch.cat([labels for _, labels in run])[:seen] for run in (steps, others)))


def test_two_ranks_see_what_one_does(image_folder, config):
    for one, two in zip(batches(image_folder, config)[1], batches(image_folder, config, 2)[1], strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])


def test_the_last_epochs_see_what_evaluation_does(image_folder, config):
    course, steps = batches(image_folder, config)
    loader = Loader(Folder(image_folder / "train"), config, dtype=torch.float32, workers=2)
    (crops, _), *_ = loader.evaluation(batch=48, rank=0, world_size=1)
    loader.close()
    evaluated = {image.numpy().tobytes() for image in crops}
    for step, (images, _) in enumerate(steps):
        same = [image.contiguous().numpy().tobytes() in evaluated for image in images]
        assert all(same) if not course.phase(step).augmented else not any(same)
    assert {course.phase(step).augmented for step in range(len(steps))} == {True, False}


def test_smaller_images_show_the_same_part(image_folder, config):
    """A crop of half the size is that part of the image, at half the scale."""
    config = override(config, {"augment.name": "rrc", "schedule.batches": [], "schedule.batch_epochs": []})
    _, small = batches(image_folder, config)
    _, large = batches(image_folder, override(config, {"schedule.image_sizes": [], "schedule.image_size_epochs": []}))
    assert small[0][0].shape[-1] == 16
    shrunk = torch.nn.functional.avg_pool2d(large[0][0], 2)
    assert np.corrcoef(shrunk.flatten(), small[0][0].flatten())[0, 1] > 0.98


# The run -------------------------------------------------------------------------------------------------------------


# Every shape is compiled by itself: in bf16 alone.
WAYS = [
    marked(engine, kind)
    for engine in PRECISIONS
    for kind in PRECISIONS[engine]
    if (engine, kind) != ("compile", "fp32")
]


@pytest.mark.parametrize("engine, precision", WAYS)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(image_folder, tmp_path, monkeypatch, engine, precision):
    add_small_networks(monkeypatch.setitem)
    network = network_of(engine) if engine == "compile" else {}
    if reason := why_no_engine(engine, precision):
        pytest.skip(reason)
    whole_and_in_parts(run, image_folder, tmp_path, {**CHANGES, "engine": engine, "precision": precision, **network})
    assert newest(tmp_path / "parts").name == f"step-{CHANGING_STEPS:08}"
    assert_same_run(tmp_path / "parts", tmp_path / "whole", evaluations=False)
    kept = state(tmp_path / "whole")
    assert any(name.startswith("trained.safetensors") for name in kept)
    assert any(name.endswith("exp_avg_sq") for name in kept)


def test_the_folder_says_what_was_done(config):
    class Said(Console):
        lines = ()

        def line(self, text):
            self.lines = (*self.lines, text)

    console = Said(silent=True)
    summary, _ = trainer.train(config, console)
    assert summary["steps"] == CHANGING_STEPS
    assert summary["epochs"] == 2
    said = [line for line in console.lines if line.startswith("epochs ")]
    assert said[0] == "epochs 0 to 0.3333: batch 8, 16 pixels"
    assert said[-1] == "epochs 1.333 to 2: batch 16, 32 pixels, no augmentation"
    steps = [row for row in read_metrics(Path(config.out, "metrics.jsonl")) if "loss" in row]
    assert [row["epoch"] * 48 for row in steps] == pytest.approx([8, 16, 32, 48, 64, 80, 96])
    assert [round(row["images_per_s"] * row["step_s"]) for row in steps] == [8, 8, 16, 16, 16, 16, 16]


def test_a_run_from_before_there_were_these_fields_goes_on(image_folder, tmp_path):
    """At their defaults they change nothing."""
    config = small_run(image_folder, tmp_path / "run")
    run(config, max_steps=1)
    path = Path(config.out, "config.json")
    record = json.loads(path.read_text())
    for group, names in ((None, ["ema_decay"]), ("optim", ["beta2"]), ("augment", ["collapse_epochs"]),
                         ("schedule", ["image_sizes", "image_size_epochs", "batches", "batch_epochs"])):  # fmt: skip
        for name in names:
            del (record["config"][group] if group else record["config"])[name]
    path.write_text(json.dumps(record))
    assert run(config, max_steps=2)[0]["steps"] == 2
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"\(ema_decay: None -> 0\.9\)"):
        run(config, max_steps=3, ema_decay=0.9)


# The average ---------------------------------------------------------------------------------------------------------


def test_the_average_is_the_formula():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    average, decay = WeightAverage(model, 0.75), 0.75
    mean = {name: np.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    for step in range(1, 12):
        made = {name: torch.randn(tensor.shape) if tensor.is_floating_point() else torch.tensor(step)
                for name, tensor in model.state_dict().items()}  # fmt: skip
        average.update(made, step)
        kept = min(decay, (step - 1) / step)
        mean = {name: kept * mean[name] + (1 - kept) * tensor.double().numpy() for name, tensor in made.items()}
    for name, tensor in average.model.state_dict().items():
        wanted = 11 if name.endswith("num_batches_tracked") else mean[name]
        np.testing.assert_allclose(tensor.numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_the_average_is_what_is_evaluated_saved_and_exported(config, tmp_path):
    """And what training goes on with is not, but is there."""
    summary, _ = run(config)
    folder = newest(config.out)
    average, trained = (load_file(folder / f"{name}.safetensors") for name in ("model", "trained"))
    assert average.keys() == trained.keys()
    assert not any(torch.equal(average[name], trained[name]) for name in average if name.endswith("weight"))
    export(folder, tmp_path / "out.safetensors", Console(silent=True))
    exported = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(exported[name], average[name]) for name in average)
    model = model_of(config, 3)
    checkpoint.load_weights(folder, model)
    loader = Loader(Folder(Path(config.data, "val")), config, dtype=torch.float32, workers=1)

    class Alone:
        rank, world_size = 0, 1

        def sum(self, *numbers):
            return list(numbers)

    accuracy = evaluate(model, "fp32", loader, Alone(), batch=4)
    loader.close()
    assert accuracy.top1 == summary["top1"]
    (row,) = [row for row in read_metrics(Path(config.out, "metrics.jsonl")) if row.get("step") == 7 and "top1" in row]
    assert row["val_loss"] == pytest.approx(accuracy.loss, rel=1e-5)


def test_an_average_may_begin_and_end_in_a_runs_course(config):
    """Where a checkpoint has none it begins with the weights as they are."""
    plain = override(config, {"ema_decay": None})
    allow = {"allow_change": frozenset({"ema_decay"})}
    for steps, fields in ((2, plain), (3, config), (4, plain)):
        trainer.train(override(fields, {"max_steps": steps}), Console(silent=True), **(allow if steps > 2 else {}))
        names = {path.name for path in newest(config.out).iterdir()}
        assert ("trained.safetensors" in names) == (steps == 3)


def test_a_run_that_goes_back_takes_its_average_along(config, monkeypatch, tmp_path):
    original, calls = stepping.seed_dropout, []

    def spoil(seed, step, micro):
        original(seed, step, micro)
        if step == 6 and not calls:  # two after the checkpoint
            calls.append(step)
            raise RewindError("as if a number were bad")

    run(config, out=str(tmp_path / "expected"), **{"health.rewind_factor": 0.999999})
    monkeypatch.setattr(stepping, "seed_dropout", spoil)
    run(config, **{"health.policy": "rewind", "health.rewind_factor": 0.999999})
    assert calls
    got, wanted = (load_file(newest(out) / "model.safetensors") for out in (config.out, tmp_path / "expected"))
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-3, atol=1e-4, msg=name)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"model": "alexnet_bn", "image_size": 99, "schedule.image_sizes": [67]}, "made for one image-size"),
        ({"model": "resnet50", "dropout": None, "schedule.image_sizes": [16]}, "at least 32"),
        ({"schedule.batches": [10]}, "schedule.batches"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(config, fields, words):
    with pytest.raises(ConfigError, match=words):
        run(config, **fields)
    assert not Path(config.out, "config.json").exists()


def test_batches_are_divided_over_ranks():
    config = override(RunConfig(), {"global_batch": 64, "schedule.batches": [30], "schedule.batch_epochs": [1]})
    with pytest.raises(ConfigError, match=r"schedule.batches 30 is not a multiple of 4 ranks; take 28 or 32"):
        rank_batches_by_size(config, 0, 4)


def test_no_augmentation_cannot_end():
    config = override(RunConfig(), {"augment.name": "none", "augment.collapse_epochs": 2})
    (line,) = unused_field_warnings(config, ["augment.collapse_epochs"])
    assert line.startswith("augment.collapse-epochs has no effect")


def test_a_checkpoints_state_names_all_its_files(config):
    run(config, max_steps=1)
    listed = json.loads((newest(config.out) / "state.json").read_text())["files"]
    assert set(listed) == {"model.safetensors", "optimizer.safetensors", "trained.safetensors"}
    (newest(config.out) / "trained.safetensors").write_bytes(b"x")
    with pytest.raises(KnltrainError, match=r"trained\.safetensors"):
        checkpoint.verify(newest(config.out))
