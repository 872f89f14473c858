"""The numbers of docs/scaling.md are those that the model gives."""

import dataclasses
import re
from pathlib import Path

import msgspec
import pytest
from foreseen import ALEXNET, replaced

from knltrain.config import CheckpointConfig, CommConfig
from knltrain.predict.accounting import accounting
from knltrain.predict.published import RUNS, validate
from knltrain.predict.run import Job, predict
from knltrain.predict.systems import Input, Sourced, load
from knltrain.recipes import RECIPES

TEXT = (Path(__file__).parents[2] / "docs/scaling.md").read_text("utf-8")


def row(begins):
    """The cells of the one row of a table that begins so."""
    (line,) = [line for line in TEXT.splitlines() if line.startswith(f"| {begins}")]
    return [cell.strip() for cell in line.strip("| ").split("|")]


@pytest.mark.parametrize("run", validate(), ids=lambda run: run["run"])
def test_published_runs(run):
    _, published, predicted, deviation, role = row(f"{run['run']} |")
    assert (float(published), predicted) == (run["published_min"], f"{run['predicted_min']:.1f}")
    assert float(deviation.removesuffix(" %").replace("−", "-")) == pytest.approx(100 * run["deviation"], abs=0.051)
    assert role.startswith(run["role"])


PHI = load("knl7250-opa")
RAW = msgspec.structs.replace(PHI, input=Input(images_per_core_s=Sourced(5000.0, "assumed")))
ONCE = dataclasses.replace(ALEXNET, checkpoint=CheckpointConfig(every=100))


def job(system=RAW, *, config=ONCE, overlap=True, **comm):
    config = dataclasses.replace(config, comm=CommConfig(**{"dtype": "bf16", **comm}))
    return Job(config=config, system=system, nodes=512, overlap=overlap)


def rate(factor):
    rates = tuple(msgspec.structs.replace(rate, images_per_s=rate.images_per_s * factor) for rate in RAW.rate)
    return msgspec.structs.replace(RAW, rate=rates)


SUM = PHI.network.sum_gb_per_s.value


@pytest.mark.parametrize(
    "begins, asked",
    [
        ("AlexNet-BN as the paper's", job(PHI, overlap=False, bucket_mb=1e-6, dtype="fp32")),
        ("gradients leave while", job(PHI, bucket_mb=1e-6, dtype="fp32")),
        ("in buckets of 25 MiB", job(PHI, dtype="fp32")),
        ("in bf16", job(PHI)),
        ("with images cut", job()),
        ("with a checkpoint", job(config=ALEXNET)),
        ("summing costs", job(replaced(RAW, network={"sum_gb_per_s": SUM / 2}))),
        ("a node adds up twice", job(replaced(RAW, network={"sum_gb_per_s": SUM * 2}))),
        ("a node adds up as fast", job(replaced(RAW, network={"sum_gb_per_s": 100 * SUM}))),
        ("the network is twice", dataclasses.replace(job(), network_factor=2.0)),
        ("messages have", job(replaced(RAW, network={"latency_us": 5.0}))),
        ("the ring that oneCCL", dataclasses.replace(job(), algorithm="oneccl")),
        ("a node trains half", job(rate(0.5))),
        ("a quarter", job(rate(0.25))),
        ("all ranks take", job(replaced(RAW, noise={"spread": 0.0}))),
        ("a spread of 8", job(replaced(RAW, noise={"spread": 0.08}))),
    ],
)
def test_what_this_package_would_need(begins, asked):
    one = predict(asked)
    cells = row(begins)
    assert cells[1] == f"{one.total_s / 60:.1f}"
    if len(cells) > 2:
        assert cells[2:] == [f"{1e3 * one.step.seconds:.0f}", f"{1e3 * one.step.exposed_s:.0f}"]


def test_the_other_assumption_and_the_other_reading():
    spread = {"noise": {"spread": 0.0}}
    for overlap, system, sum_rate, words in (
        (True, PHI, 0.86, "gives 54.1, 13.8 and 9.8 minutes"),
        (False, replaced(PHI, **spread), 1.08, "come out 8.3, 5.0 and 3.5 % too fast"),
    ):
        system = replaced(system, network={"sum_gb_per_s": sum_rate})
        minutes = [predict(dataclasses.replace(run.job(system), overlap=overlap)).total_s / 60 for run in RUNS[:4]]
        assert minutes[0] == pytest.approx(24, rel=0.01)
        said = [float(number) for number in re.findall(r"[\d.]+", words)[:3]]
        if overlap:
            assert minutes[1:] == pytest.approx(said, abs=0.1)
        else:
            late = [100 * (1 - one / run.minutes) for one, run in zip(minutes[1:], RUNS[1:4], strict=True)]
            assert late == pytest.approx(said, abs=0.2)
        assert words in TEXT.replace("\n", " ")
    sockets = next(run for run in RUNS if run.minutes == 48)
    assert predict(dataclasses.replace(sockets, nodes=512).job()).total_s / 60 == pytest.approx(62, abs=0.5)


@pytest.mark.parametrize("name", ["alexnet-bn-32k", "resnet50-32k"])
def test_accounting(name):
    config = RECIPES[name].config()
    rows = accounting(config.model, image_size=config.image_size, epochs=config.epochs, nodes=512)
    listed = [f"| {one['batch']:,} | {one['iterations']:,} | {one['images_per_node']:g} | {one['messages']:,} | "
              f"{one['terabytes']:,.2f} | {one['flops_per_byte']:,.0f} |" for one in rows]  # fmt: skip
    found = [line for line in listed if line in TEXT]
    assert len(found) == (8 if name == "alexnet-bn-32k" else 4)
