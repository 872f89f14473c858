"""Numbers that go bad in a run of one rank: each policy, what it leaves behind, and that the run goes on exactly."""

import json
import math
from pathlib import Path

import pytest
import torch
from faults import LAYER, flip, inject
from runs import assert_same_run, computed, newest
from safetensors.torch import load_file

from knltrain.config import RunConfig, override
from knltrain.config.checks import unused_field_warnings
from knltrain.data.order import samples
from knltrain.errors import KnltrainError
from knltrain.ops.native import load_error
from knltrain.runlog.console import Console
from knltrain.runlog.metrics import read_metrics
from knltrain.training import failure_dump, setup, trainer
from knltrain.training import step as stepping
from knltrain.training.gradient_norm import norm_of
from knltrain.training.replica_check import fingerprint


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")


@pytest.fixture
def config(image_folder, tmp_path):
    """Three epochs of three steps of two micro-batches."""
    return override(
        RunConfig(),
        {
            "data": str(image_folder),
            "out": str(tmp_path / "run"),
            "model": "alexnet_bn_small",
            "image_size": 32,
            "global_batch": 16,
            "local_batch": 8,
            "epochs": 3,
            "optim.lr": 2.0,
            "precision": "fp32",
            "engine": "eager",
            "workers": 2,
            "dropout": 0.3,
        },
    )


def run(config, allow_change=(), **changes):
    return trainer.train(override(config, changes), Console(silent=True), allow_change=frozenset(allow_change))


def undisturbed(config, tmp_path, **changes):
    run(config, out=str(tmp_path / "undisturbed"), **changes)
    return tmp_path / "undisturbed"


def losses(out):
    return {row["step"]: row["loss"] for row in read_metrics(Path(out, "metrics.jsonl")) if "loss" in row}


@pytest.mark.parametrize("engine, precision", [("eager", "fp32"), ("fused", "bf16")])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_stop_ends_before_the_step_and_keeps_what_it_stood_on(kind, engine, precision, config, tmp_path, monkeypatch):
    if engine == "fused" and load_error():
        pytest.skip(f"no native kernels: {load_error()}")
    options = {"engine": engine, "precision": precision, "force_bf16": True, "local_batch": 8}
    expected = undisturbed(config, tmp_path, **options)
    run(config, out=str(tmp_path / "before"), max_steps=4, **options)
    with monkeypatch.context() as patch:
        inject(kind, 5, patch=patch.setattr)
        with pytest.raises(KnltrainError) as caught:
            run(config, **options)
    message, out = str(caught.value), Path(config.out)
    folder = out / "failed" / "step-00000005"
    assert "at step 5 (epoch 1.67, learning rate 0.6" in message
    assert ("the loss of rank 0 on " in message and "is nan" in message) == (kind == "loss")
    first = LAYER if kind == "gradient" else "features.conv1.weight"
    assert f"the first layer with a bad gradient is {first}, {'1' if kind == 'gradient' else '22'} of 22" in message
    assert f"its state is in {folder}" in message
    assert "lower optim.lr or lengthen schedule.warmup-epochs" in message
    assert sorted(losses(out)) == [1, 2, 3, 4]
    assert newest(out).name == "step-00000003"
    # What is kept: weights and momentum as they were before the step, and what it was made of.
    for file in ("model.safetensors", "optimizer.safetensors"):
        kept, before = load_file(folder / "state" / file), load_file(newest(tmp_path / "before") / file)
        assert kept.keys() == before.keys()
        for name in before:
            if name.split(".")[-1].startswith("running") or name.endswith("num_batches_tracked"):
                continue  # of its forward pass
            assert torch.equal(kept[name], before[name]), name
    report = json.loads((folder / "report.json").read_text())
    assert (report["step"], report["lr"]) == (5, pytest.approx(2 * (1 - 4 / 9) ** 2))
    bad = {name for name, norm in report["gradient_norms"].items() if norm in ("nan", "inf")}
    assert bad == ({LAYER} if kind == "gradient" else set(report["gradient_norms"]))
    rank = json.loads((folder / "rank-0000.json").read_text())
    assert rank["samples"] == [samples(0, 48, first, first + 8).tolist() for first in (64, 72)]
    assert (rank["losses"][0] == "nan") == (kind == "loss")
    # The same command, on a machine that is well again, ends as if nothing had been.
    run(config, **options)
    assert_same_run(config.out, expected)


def test_skip_leaves_the_step_out_and_goes_on_exactly(config, tmp_path, monkeypatch):
    """What one forward pass did to batch norm's statistics would otherwise spoil all evaluations to come."""
    options = {"health.policy": "skip", "local_batch": 8}
    inject("loss", 5, patch=monkeypatch.setattr)
    summary, finished = run(config, **options)
    assert finished
    assert (summary["skipped_steps"], summary["rewinds"], summary["steps"]) == (1, 0, 9)
    assert [step for step, loss in losses(config.out).items() if loss is None] == [5]
    assert all(math.isfinite(loss) for step, loss in losses(config.out).items() if step != 5)
    assert all(tensor.isfinite().all() for tensor in load_file(newest(config.out) / "model.safetensors").values())
    assert (Path(config.out) / "failed" / "step-00000005" / "report.json").exists()
    assert not (Path(config.out) / "failed" / "step-00000005" / "state").exists()
    for stop_at in (4, 5, 7):  # before, right after, and later
        out = str(tmp_path / f"stopped-at-{stop_at}")
        with monkeypatch.context() as patch:
            inject("loss", 5, patch=patch.setattr)
            run(config, out=out, max_steps=stop_at, **options)
            summary, _ = run(config, out=out, **options)
        assert summary["skipped_steps"] == 1
        assert_same_run(out, config.out, evaluations=False)


def test_the_weights_of_a_skipped_step_are_those_before_it(config, tmp_path, monkeypatch):
    run(config, out=str(tmp_path / "before"), max_steps=3)
    inject("gradient", 4, patch=monkeypatch.setattr)
    run(config, max_steps=4, **{"health.policy": "skip"})
    for file in ("model.safetensors", "optimizer.safetensors"):
        after, before = load_file(newest(config.out) / file), load_file(newest(tmp_path / "before") / file)
        assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_a_first_step_that_is_skipped_leaves_no_initial_weights_in_the_average(config, tmp_path, monkeypatch):
    """Nor does a run that stops and goes on in between: the mean is over the updates, here of steps 3 and 4."""
    options = {"health.policy": "skip", "ema_decay": 0.99}
    for name, stops in (("at once", (4,)), ("resumed", (2, 3, 4))):
        trained, out = {}, str(tmp_path / name)
        for stop in stops:
            with monkeypatch.context() as patch:
                inject("gradient", 1, patch=patch.setattr)
                inject("loss", 2, patch=patch.setattr)
                run(config, out=out, max_steps=stop, **options)
            trained[stop] = load_file(newest(out) / "trained.safetensors")
        average = load_file(newest(out) / "model.safetensors")
    for name in (name for name in average if name.endswith(("weight", "bias"))):
        torch.testing.assert_close(average[name], (trained[3][name] + trained[4][name]) / 2, rtol=1e-5, atol=1e-7)
    assert_same_run(out, tmp_path / "at once", evaluations=False)


def test_skip_ends_when_too_many_come_in_a_row(config, monkeypatch):
    for step in (3, 5, 6, 7):
        inject("loss", step, patch=monkeypatch.setattr)
    with pytest.raises(KnltrainError, match=r"at step 7 .*\. 2 steps in a row were skipped: lower optim\.lr"):
        run(config, **{"health.policy": "skip", "health.max_skips": 2})
    assert (Path(config.out) / "failed" / "step-00000007" / "state" / "model.safetensors").exists()


@pytest.mark.parametrize("engine, precision", [("eager", "fp32"), ("fused", "bf16")])
def test_rewind_is_a_run_that_went_on_from_the_checkpoint_with_a_lower_rate(
    engine, precision, config, tmp_path, monkeypatch
):
    if engine == "fused" and load_error():
        pytest.skip(f"no native kernels: {load_error()}")
    options = {"engine": engine, "precision": precision, "force_bf16": True, "local_batch": 8}
    expected = tmp_path / "expected"
    run(config, out=str(expected), max_steps=3, **options)
    run(config, ["optim.lr"], out=str(expected), **options, **{"optim.lr": 1.0})
    options["health.policy"] = "rewind"
    with monkeypatch.context() as patch:
        inject("gradient", 5, patch=patch.setattr)
        summary, finished = run(config, **options)
    assert finished
    assert (summary["rewinds"], summary["skipped_steps"]) == (1, 0)
    assert_same_run(config.out, expected)
    assert [row["step"] for row in computed(config.out) if "loss" in row] == list(range(1, 10))
    # Stopped after it, the factor is in the checkpoint.
    with monkeypatch.context() as patch:
        inject("gradient", 5, patch=patch.setattr)
        run(config, out=str(tmp_path / "stopped"), max_steps=7, **options)
    summary, _ = run(config, out=str(tmp_path / "stopped"), **options)
    assert summary["rewinds"] == 1
    assert_same_run(tmp_path / "stopped", expected, evaluations=False)


def test_rewind_before_the_first_checkpoint_begins_anew(config, tmp_path, monkeypatch):
    expected = undisturbed(config, tmp_path, **{"optim.lr": 1.0})
    inject("loss", 2, patch=monkeypatch.setattr)
    run(config, **{"health.policy": "rewind"})
    assert_same_run(config.out, expected)


def test_rewind_ends_when_it_does_not_help(config, monkeypatch):
    inject("loss", 5, times=9, patch=monkeypatch.setattr)
    with pytest.raises(KnltrainError, match=r"learning rate 0\.1543\).*\. gone back 2 times: lower optim\.lr"):
        run(config, local_batch=None, **{"health.policy": "rewind", "health.max_rewinds": 2})
    assert sorted(losses(config.out)) == [1, 2, 3, 4]


def test_a_step_whose_weights_are_no_numbers_makes_no_checkpoint(config, monkeypatch):
    """Loss and gradient may be numbers when what a step makes of them is not."""
    options = {"optim.name": "sgd", "optim.variant": "heavy-ball", "optim.lr": 1e6, "optim.weight_decay": 1e6}
    initial = setup.model_of

    def huge(*arguments, **options):
        model = initial(*arguments, **options)
        with torch.no_grad():
            model.features.conv1.weight.mul_(1e30)  # batch norm follows: the loss is a number all the same
        return model

    monkeypatch.setattr(setup, "model_of", huge)
    with pytest.raises(KnltrainError, match=r"step 1 made NaN or Inf of finite weights \(features\.conv1\.weight\)"):
        run(config, max_steps=1, **options)
    assert not Path(config.out, "checkpoints").exists()


def test_divergence_ends_the_run_with_advice(config):
    """Not in the first epoch, and not in the warm-up."""
    options = {"optim.lr": 300.0, "epochs": 10, "schedule.name": "constant", "health.divergence_steps": 4}
    with pytest.raises(KnltrainError, match=r"diverged: at step 7 .*above 1\.154, .* for 4 steps; lower optim\.lr"):
        run(config, **options)
    assert all(loss > 1.2 for step, loss in losses(config.out).items() if step > 3), "or this shows nothing"
    out = config.out + "-warm"
    with pytest.raises(KnltrainError, match=r"diverged: at step 10 "):
        run(config, out=out, **options, **{"schedule.warmup_epochs": 2, "schedule.warmup_lr": 300})
    run(config, out=config.out + "-on", max_steps=12, **options | {"health.divergence_steps": 0})


def test_a_resumed_run_counts_on_towards_divergence(config):
    options = {"optim.lr": 300.0, "epochs": 10, "schedule.name": "constant", "health.divergence_steps": 4}
    run(config, max_steps=5, **options)
    with pytest.raises(KnltrainError, match="diverged: at step 7 "):
        run(config, **options)


def test_smoothed_labels_do_not_change_what_chance_is():
    """The cross-entropy of equal probabilities is the logarithm of their number, whatever the target adds up to."""
    logits, labels = torch.zeros(8, 10), torch.arange(8)
    for smoothing in (0.0, 0.1, 0.5):
        loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        assert float(loss) == pytest.approx(math.log(10))


def test_the_gradients_norm_is_in_the_metrics(config, monkeypatch):
    """Over micro-batches it is the norm of their sum, as the optimizer takes it."""
    norms = []
    norms_of = stepping.norms_of

    def note_norm(gradients):
        found = list(gradients)
        norms.append(math.sqrt(sum(float(gradient.double().square().sum()) for gradient in found)))
        return norms_of(found)

    monkeypatch.setattr(stepping, "norms_of", note_norm)
    run(config, max_steps=3)
    logged = [row["grad_norm"] for row in read_metrics(Path(config.out, "metrics.jsonl")) if "loss" in row]
    assert logged == pytest.approx(norms, rel=1e-4)
    assert all(norm > 0 for norm in logged)


def test_bf16_gradients_of_micro_batches_are_one_gradient(config, tmp_path):
    """Their float32 sums are what the optimizer takes; the norm is of these and does not take anything away."""
    if load_error():
        pytest.skip(f"no native kernels: {load_error()}")
    options = {"engine": "fused", "precision": "bf16", "force_bf16": True, "max_steps": 2, "dropout": 0.0}
    run(config, **options)
    run(config, out=str(tmp_path / "whole"), **options, local_batch=16)
    rows = [read_metrics(Path(out, "metrics.jsonl"))[0] for out in (config.out, tmp_path / "whole")]
    # Batch norm normalises other micro-batches, so the two are only of a kind.
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=0.5)


def test_norm_of_many_tensors():
    """Large and small, in both formats and types, with squares that float32 does not hold, for any threads."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator) for size in (70_000, 3, 1, 2**15, 0)]
    tensors.append(torch.randn(8, 3, 5, 5, generator=generator).to(memory_format=torch.channels_last))
    tensors.append(torch.randn(90, 400, generator=generator).T)
    expected = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
    assert norm_of(tensors) == pytest.approx(expected, rel=1e-5)
    assert norm_of([tensor.bfloat16() for tensor in tensors]) == pytest.approx(expected, rel=4e-3)
    for scale in (1e30, 1e-15, 1e-18, 1e-21, 1e-25, 1e-30):
        assert norm_of([tensor * scale for tensor in tensors]) == pytest.approx(expected * scale, rel=1e-5)
    assert norm_of([torch.full((2**20,), 1e-25, dtype=torch.bfloat16)]) == pytest.approx(1024e-25, rel=4e-3)
    assert norm_of([torch.zeros(70_000)]) == 0
    threads = torch.get_num_threads()
    norms = set()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        norms.add(norm_of(tensors))
    torch.set_num_threads(threads)
    assert len(norms) == 1
    for bad in (math.nan, math.inf, -math.inf):
        tensors[0][69_999] = bad
        assert not math.isfinite(norm_of(tensors))


def test_every_bit_shows_in_a_fingerprint():
    generator = torch.Generator().manual_seed(0)
    for shape in ((3,), (1,), (8, 3, 3, 3), (5, 7, 1, 1)):
        weight = torch.randn(shape, generator=generator)
        if len(shape) == 4:
            weight = weight.to(memory_format=torch.channels_last)
        before = fingerprint([weight, weight])
        assert before.dtype == torch.int64
        for bit in range(32):
            changed = weight.clone()
            flip(changed, bit)
            assert not torch.equal(fingerprint([changed]), before[:1]), (shape, bit)


def test_what_only_other_policies_use_is_said():
    names = ["health.max_skips", "health.max_rewinds", "health.rewind_factor"]
    said = unused_field_warnings(RunConfig(), names)
    assert len(said) == 3
    skip = override(RunConfig(), {"health.policy": "skip"})
    assert len(unused_field_warnings(skip, names)) == 2


def test_record_of_a_bad_step_is_plain_json(tmp_path):
    failure_dump._write_json(tmp_path / "a.json", {"a": [math.nan, 1.0, (math.inf,)], "b": {"c": -math.inf}})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "a": ["nan", 1.0, ["inf"]], "b": {"c": "-inf"}}  # fmt: skip
