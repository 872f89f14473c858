"""A system made of measurements gives these measurements back."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from knltrain.cli.main import main
from knltrain.config import RunConfig
from knltrain.errors import ConfigError, KnltrainError
from knltrain.predict.allreduce import all_reduce
from knltrain.predict.calibrate import calibrate
from knltrain.predict.run import Job, fabric_of, predict
from knltrain.predict.systems import load, parse

RESULTS = Path(__file__).parents[2] / "perf/results"
BENCH = {
    "model": "resnet50", "batch": 32, "image_size": 64, "precision": "fp32", "engine": "fused", "threads": 4,
    "images_per_s": 20.0, "cpu": "Some CPU", "cores": 4,
    "step_s": {"median": 1.6, "quartile1": 1.5, "quartile3": 1.7, "min": 1.4, "max": 2.0},
}  # fmt: skip
CEILINGS = {"ceilings": {"gflop_per_s": {"float32": 200.0, "bfloat16": 400.0}, "copy_gb_per_s": 40.0}}
START, RATE = 50e-6, 5e9


def allreduce(world_size=2, ranks_per_node=2, backend="ccl"):
    rows = [
        {"backend": backend, "dtype": dtype, "bytes": size, "median_s": START + size / RATE}
        for dtype in ("fp32", "bf16")
        for size in (4, 4096, 2**20, 2**24, 2**26)
    ]
    return {"world_size": world_size, "ranks_per_node": ranks_per_node, "backends": ["gloo", backend], "rows": rows}


@pytest.fixture
def write(tmp_path):
    def one(name, *objects):
        path = tmp_path / name
        path.write_text("\n".join(item if isinstance(item, str) else json.dumps(item) for item in objects))
        return path

    return one


def test_what_communication_takes_from_computing_is_measured(write):
    size, lost_s = 2**26, 0.05
    measured = {**allreduce(4, 1), "threads": 3, "beside_computing": {"bytes": size, "seconds": 0.2,
                                                                     "computing_lost_s": lost_s}}  # fmt: skip
    system = parse(calibrate([write("b.json", BENCH, CEILINGS)], write("a.json", measured), "here"), "here")
    # Each of 4 ranks sends and receives 1.5 times the bytes; three threads lose 0.05 s each.
    thread = system.network.thread_gb_per_s
    assert thread.value == pytest.approx(2e-9 * 1.5 * size / (3 * lost_s), rel=1e-3)
    assert thread.source.startswith("a.json: what products of matrices lost")
    measured["beside_computing"]["computing_lost_s"] = 0.0
    calibrate([write("b.json", BENCH, CEILINGS)], write("a.json", measured), "here")


def test_the_benchs_rate_comes_back(write):
    slower = {**BENCH, "images_per_s": 15.0}
    text = calibrate(
        [write("bench.jsonl", slower, BENCH), write("roofline.json", CEILINGS)], write("a.json", allreduce()), "here"
    )
    system = parse(text, "here")
    assert system.node.fp32_gflop_per_s.value == 200
    assert system.node.bf16_gflop_per_s.value == 400
    assert [rate.images_per_s for rate in system.rate] == [20.0]
    assert system.noise.spread.value == pytest.approx(0.2 / 1.349 / 1.6, rel=1e-3)
    alone = parse(text.replace("ranks = {value = 2", "ranks = {value = 1"), "here")
    config = RunConfig(model="resnet50", image_size=64, global_batch=32, precision="fp32")
    assert predict(Job(config=config, system=alone, nodes=1)).images_per_s == pytest.approx(20.0)


@pytest.mark.parametrize("algorithm", ["ring", "direct", "halving-doubling"])
@pytest.mark.parametrize("world_size, ranks_per_node, nodes", [(2, 2, 1), (4, 4, 1), (2, 1, 2), (4, 2, 2)])
def test_the_all_reduces_come_back(write, world_size, ranks_per_node, nodes, algorithm):
    measured = allreduce(world_size, ranks_per_node)
    system = parse(calibrate([write("b.json", BENCH, CEILINGS)], write("a.json", measured), "here"), "here")
    fabric = fabric_of(Job(config=RunConfig(), system=system, nodes=nodes))
    for size in (4, 2**24):
        seconds = all_reduce(fabric, size // 4, 4, algorithm).seconds
        assert seconds == pytest.approx(START + size / RATE, rel=0.03)


def test_what_input_costs_is_in_a_bench_that_read(write):
    read = {**BENCH, "data": "imagenet-raw", "input_images_per_s": 4000.0, "images_per_s": 19.0}
    text = calibrate([write("b.jsonl", BENCH, read, CEILINGS)], write("a.json", allreduce()), "here")
    assert parse(text, "here").input.images_per_core_s.value == 1000


def test_without_a_roofline_the_ceilings_are_measured(write):
    text = calibrate([write("b.json", {**BENCH, "precision": "bf16"})], write("a.json", allreduce(backend="gloo")), "x")
    system = parse(text, "x")
    assert system.node.fp32_gflop_per_s.value > 0
    assert system.node.bf16_gflop_per_s.source.startswith("assumption")
    assert system.network.algorithm == "ring"


@pytest.mark.parametrize(
    "bench, reduced, words",
    [
        ([{}], allreduce(), "no --bench file holds"),
        (["nothing"], allreduce(), "b.json: not JSON"),
        ([[1]], allreduce(), "b.json: not an object"),
        ([{**BENCH, "step_s": 3}], allreduce(), "a file is not what"),
        ([BENCH, {**BENCH, "cpu": "Other"}], allreduce(), "of different machines"),
        ([BENCH], {}, "a file is not what"),
        ([BENCH], allreduce(world_size=1, ranks_per_node=1), "measured with one rank"),
        ([BENCH], {**allreduce(), "rows": []}, "two sizes or more"),
    ],
)
def test_what_is_no_measurement_is_one_line(write, bench, reduced, words):
    with pytest.raises(ConfigError, match=words) as caught:
        calibrate([write("b.json", *bench)], write("a.json", reduced), "here")
    assert "\n" not in str(caught.value)


def test_measurements_that_make_no_sense(write):
    flat = allreduce()
    for row in flat["rows"]:
        row["median_s"] = 1e-3
    with pytest.raises(KnltrainError, match="measure again"):
        calibrate([write("b.json", BENCH)], write("a.json", flat), "here")
    with pytest.raises(KnltrainError, match="makes no system"):
        calibrate([write("b.json", {**BENCH, "images_per_s": -1.0}, CEILINGS)], write("a.json", allreduce()), "here")


@pytest.mark.parametrize("spelling", ["calibrate", "--calibrate"])
def test_this_machines_system_is_made_of_this_machines_results(tmp_path, spelling):
    """As docs/scaling.md has the command: the file that comes along and the results beside it do not part."""
    out = tmp_path / "epyc-2core.toml"
    benches = ("bench-2026-11-22.jsonl", "input-2026-11-22/bench.jsonl", "roofline-2026-11-22/roofline.json")
    flags = [word for name in benches for word in ("--bench", str(RESULTS / name))]
    command = ["predict", spelling, *flags, "--allreduce", str(RESULTS / "allreduce-2026-11-22/allreduce.json"),
               "--out", str(out)]  # fmt: skip
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.stderr
    assert load(str(out)) == load("epyc-2core")
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 2
    assert "is there already" in again.stderr
