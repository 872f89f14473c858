"""The noise scale, where it is known: by hand, for gradients drawn at will, and beside runs of the small batch."""

import json
import types

import numpy as np
import pytest
import torch
from runs import newest
from small_networks import small_run, why_no_engine

from knltrain.checkpoint import Progress
from knltrain.config import CommConfig, RunConfig, override
from knltrain.data.loader import RankBatch
from knltrain.runlog.console import Console
from knltrain.runlog.metrics import read_metrics
from knltrain.training import trainer
from knltrain.training.gradient_noise import NoiseScale, estimate

# Batches small enough that the mean gradient stands out from the noise.
QUIET = {"dropout": 0.0, "optim.lr": 1e-6, "schedule.warmup_epochs": 0.0, "optim.weight_decay": 0.0}


def test_by_hand():
    """|G|^2 = 4 and tr(Sigma) = 30: the squared norm is 4 + 30/2 = 19 at batch 2, and 4 + 30/8 = 7.75 at batch 8."""
    assert estimate(2, 19.0, 8, 7.75) == pytest.approx((4.0, 30.0))


@pytest.mark.parametrize("ranks, accumulate", [(2, 1), (8, 2), (1, 4)])
def test_of_a_quadratic(ranks, accumulate):
    """A loss |w - x|^2 / 2 has the gradient w - x: with x of covariance s^2 I, tr(Sigma) = D s^2 at any distance."""
    dimensions, deviation, distance, local = 4000, 0.5, 3.0, 8
    known = dimensions * deviation**2 / distance**2
    rng = np.random.default_rng(0)
    mean = np.zeros(dimensions)
    mean[0] = distance
    share = RankBatch(ranks * accumulate * local, local, 0, ranks)
    group = types.SimpleNamespace(world_size=ranks)
    noise = NoiseScale(RunConfig(), group)
    for _ in range(100):
        draws = rng.normal(scale=deviation, size=(ranks, accumulate, local, dimensions))
        micro_batches = torch.tensor(mean + draws.mean(2), dtype=torch.float32)
        squares = 0.0
        for rank in range(ranks):
            noise.begin_step(share)
            if ranks == 1:  # the loss of a micro-batch is divided by their number
                gradients = {"weight": micro_batches[0, 0] / accumulate}
                noise.end_micro_batch(0, types.SimpleNamespace(gradients=lambda of=gradients: of))
                noise.end_micro_batch(1, None)
            else:
                for bucket in micro_batches[rank].mean(0).split(1500):
                    noise.add(bucket)
            squares += noise.squares
        noise.update(squares, float(micro_batches.mean((0, 1)).norm()))
    assert noise.row()["noise_scale"] == pytest.approx(known, rel=0.05)


def begun(share, **comm):
    noise = NoiseScale(RunConfig(comm=CommConfig(**comm)), types.SimpleNamespace(world_size=share.world_size))
    noise.begin_step(share)
    return noise


def test_where_it_is_not_defined():
    def row(share, **comm):
        noise = begun(share, **comm)
        noise.update(3.0, 1.0)
        return noise.row()

    assert row(RankBatch(64, 64, 0, 1)) == {}
    assert row(RankBatch(64, 16, 0, 2), compression="powersgd") == {}
    assert row(RankBatch(64, 16, 0, 1))["noise_scale"] == pytest.approx(2 / (1 / 16 - 1 / 64) / ((64 - 48) / 48))
    # The small batch has the smaller norm: by chance, or where there is no noise.
    assert begun(RankBatch(64, 16, 0, 1)).row() == {"noise_scale": None}


def test_of_batches_that_grow():
    """Batches of 16 and 64 in micro-batches of 16: the first have nothing to be compared with."""
    noise = begun(RankBatch(16, 16, 0, 1))
    assert noise.row() == {}
    noise.begin_step(RankBatch(64, 16, 0, 1))
    noise.update(3.0, 1.0)
    assert noise.row()["noise_scale"] == pytest.approx(128)


def test_a_nan_does_not_stay():
    noise = begun(RankBatch(64, 16, 0, 1))
    noise.update(3.0, 1.0)
    before = noise.state()
    noise.update(float("nan"), 1.0)
    assert noise.state() == before


def test_a_checkpoint_has_its_averages():
    noise, resumed = begun(RankBatch(64, 16, 0, 1)), begun(RankBatch(64, 16, 0, 1))
    noise.update(3.0, 1.0)
    resumed.load(Progress(step=1, **noise.state()))
    assert resumed.row() == noise.row() != {"noise_scale": None}


def norms(folder):
    return [row["grad_norm"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize(
    "engine, precision, tolerance", [("eager", "fp32", 1e-4), ("fused", "bf16", 0.05), ("ipex", "bf16", 0.05)]
)
def test_one_rank_that_accumulates(image_folder, tmp_path, engine, precision, tolerance):
    """Its small batch is what a run of that batch begins with."""
    if reason := why_no_engine(engine, precision):
        pytest.skip(reason)
    config = small_run(image_folder, tmp_path, engine=engine, precision=precision, max_steps=1, **QUIET)
    for name, changes in {"large": {}, "small": {"global_batch": 4}, "whole": {"local_batch": 16}}.items():
        trainer.train(override(config, {"out": str(tmp_path / name), **changes}), Console(silent=True))
    (large,), (small,) = norms(tmp_path / "large"), norms(tmp_path / "small")
    signal, scatter = estimate(4, small**2, 16, large**2)
    kept = json.loads((newest(tmp_path / "large") / "state.json").read_text())
    assert kept["gradient_signal"] == pytest.approx(0.05 * signal, rel=tolerance, abs=0.05 * tolerance * small**2)
    assert kept["gradient_noise"] == pytest.approx(0.05 * scatter, rel=tolerance)
    assert "noise_scale" in read_metrics(tmp_path / "large" / "metrics.jsonl")[0]
    assert "noise_scale" not in read_metrics(tmp_path / "whole" / "metrics.jsonl")[0]
