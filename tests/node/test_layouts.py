"""Which layouts are worth measuring, and what becomes of the fastest."""

import dataclasses
import importlib.metadata
import json

import pytest
from click.testing import CliRunner
from node import trees

from knltrain.cli.main import main
from knltrain.launch import placement
from knltrain.node.affinity import plan_node
from knltrain.node.layouts import Layout, layouts
from knltrain.node.plan_formats import as_text
from knltrain.node.topology import read_node
from knltrain.node.tuned_plan import tuned_plan, tuned_threads
from knltrain.node.tuning_cache import check_writable, layout_settings, measured_file, settings_of, store, stored_layout


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KNLTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    check_writable()


@pytest.fixture
def xeon(tmp_path):
    """Two domains of 28 cores."""
    return read_node(trees.xeon(tmp_path / "xeon"))


def as_tuples(found):
    return [dataclasses.astuple(layout) for layout in found]


def test_layouts_of_two_cores(tmp_path):
    node = read_node(trees.small(tmp_path / "small"))
    assert as_tuples(layouts(node, 32)) == [(1, 2, 0, 32), (2, 1, 0, 16), (1, 2, 0, 16), (2, 1, 0, 8)]
    assert as_tuples(layouts(node, 8)) == [(1, 2, 0, 8), (2, 1, 0, 4)], "halves of 4 keep nobody busy"
    assert as_tuples(layouts(node, 9)) == [(1, 2, 0, 9)], "an odd batch does not divide"


def test_layouts_of_a_node_with_domains(xeon):
    found = as_tuples(layouts(xeon, 64))
    # The rule's own comes first; each with and without cores for communication, but for a rank that is alone.
    assert found[:5] == [(2, 26, 2, 32), (2, 28, 0, 32), (1, 56, 0, 64), (4, 13, 1, 16), (4, 14, 0, 16)]
    assert found[5:] == [(2, 26, 2, 16), (2, 28, 0, 16), (1, 56, 0, 32), (4, 13, 1, 8), (4, 14, 0, 8)]


def test_layouts_fit_what_ranks_would_take(xeon, tmp_path):
    """With so many threads the plan leaves so many cores: that is how a layout is started."""
    for node in (
        xeon,
        read_node(trees.xeon_snc3(tmp_path / "snc")),
        read_node(trees.xeon_phi(tmp_path / "phi", "SNC-4")),
    ):
        for layout in layouts(node, 96):
            plan = plan_node(node, layout.ranks_per_node, environ={"OMP_NUM_THREADS": str(layout.threads)})
            assert {rank.threads for rank in plan.ranks} == {layout.threads}
            assert {len(rank.comm) for rank in plan.ranks} == {layout.comm_cores}


def test_ragged_domains_have_what_the_smallest_has(tmp_path):
    node = read_node(trees.xeon_snc3(tmp_path / "snc"))
    assert as_tuples(layouts(node, 96))[0] == (3, 39, 3, 32)


def keep(node, layout, model="resnet50"):
    result = {"fastest": "fused", "layout": dataclasses.asdict(layout), "time": "2026-11-22T00:00:00"}
    store({**layout_settings(model, "bf16", node, layout), "batch": 32}, result)


FOUR = Layout(4, 14, 0, 8)


def test_the_newest_layout_of_such_a_node_is_found_and_no_other(xeon, monkeypatch):
    assert stored_layout(xeon) is None
    keep(xeon, Layout(2, 26, 2, 16))
    keep(xeon, FOUR, model="alexnet_bn")
    found = stored_layout(xeon)
    assert (found.layout, found.of) == (FOUR, "alexnet_bn at batch 32 (2026-11-22)")
    store({**settings_of("resnet50", "bf16", xeon, 56), "batch": 32}, {"fastest": "eager"})
    assert stored_layout(xeon).layout == FOUR, "engines alone say nothing of layouts"
    assert stored_layout(dataclasses.replace(xeon, cpu_model="Other CPU")) is None
    assert stored_layout(dataclasses.replace(xeon, cores=xeon.cores[:-1])) is None
    assert stored_layout(dataclasses.replace(xeon, domains=xeon.domains[:1])) is None
    with monkeypatch.context() as patch:
        patch.setattr("knltrain.__version__", "99")
        assert stored_layout(xeon) is None

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert stored_layout(xeon) is None, "no torch in this environment"


@pytest.mark.parametrize("layout", [3, {}, {"ranks_per_node": 2}, {**dataclasses.asdict(FOUR), "threads": 0},
                                    {**dataclasses.asdict(FOUR), "threads": "14"},
                                    {**dataclasses.asdict(FOUR), "ranks_per_node": -1},
                                    {**dataclasses.asdict(FOUR), "sockets": 2}])  # fmt: skip
def test_a_layout_that_is_none_is_passed_over(xeon, layout):
    keep(xeon, Layout(2, 26, 2, 16))
    settings = layout_settings("vgg", "bf16", xeon, FOUR)
    if isinstance(layout, dict):  # settings that agree with it
        settings |= {name: layout[name] for name in ("threads", "ranks_per_node") if name in layout}
    store({**settings, "batch": 32}, {"fastest": "fused", "layout": layout})
    assert stored_layout(xeon).layout == Layout(2, 26, 2, 16)


def sizes(plan):
    return [(rank.threads, len(rank.comm)) for rank in plan.ranks]


def test_plan_goes_by_what_was_measured_and_says_so(xeon):
    assert sizes(tuned_plan(xeon, environ={})) == [(26, 2)] * 2
    assert "one rank per NUMA domain by rule; threads by rule" in as_text(xeon, tuned_plan(xeon, environ={}))
    keep(xeon, FOUR)
    plan = tuned_plan(xeon, environ={})
    assert sizes(plan) == [(14, 0)] * 4
    text = " ".join(as_text(xeon, plan).split())
    assert "ranks and threads measured by knltrain tune with resnet50 at batch 32 (2026-11-22)" in text
    assert "--local-batch 8 was fastest" in text


def test_explicit_numbers_win(xeon):
    keep(xeon, FOUR)
    two = tuned_plan(xeon, 2, environ={})
    assert (sizes(two), two.origin) == ([(26, 2)] * 2, "number of ranks asked for; threads by rule")
    four = tuned_plan(xeon, 4, environ={})
    assert (sizes(four), four.origin.split(" measured")[0]) == ([(14, 0)] * 4, "number of ranks asked for; threads")
    threads = tuned_plan(xeon, environ={"OMP_NUM_THREADS": "5"})
    assert (sizes(threads), threads.origin.split("; ")[-1]) == ([(5, 1)] * 4, "threads as OMP_NUM_THREADS says")


def test_ranks_take_the_threads_that_were_measured(xeon, monkeypatch):
    """Those of torchrun, which tells everybody 1, as well."""
    keep(xeon, FOUR)
    assert tuned_threads(xeon, 4, {})["OMP_NUM_THREADS"] == "14"
    by_torchrun = {"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}
    assert tuned_threads(xeon, 4, by_torchrun)["OMP_NUM_THREADS"] == "14"
    assert tuned_threads(xeon, 4, {"OMP_NUM_THREADS": "3"}) == {"OMP_NUM_THREADS": "3"}
    assert tuned_threads(xeon, 2, {}) == {}
    monkeypatch.setattr(placement, "read_node", lambda allowed=None: xeon)
    for name, value in (("RANK", 3), ("WORLD_SIZE", 4), ("LOCAL_RANK", 3), ("LOCAL_WORLD_SIZE", 4),
                        ("MASTER_ADDR", "localhost"), ("MASTER_PORT", 1)):  # fmt: skip
        monkeypatch.setenv(name, str(value))
    place = placement.find_placement()
    assert (place.plan.threads, place.plan.comm) == (14, ())


def test_a_rank_that_was_measured_alone_says_nothing_of_communication(xeon):
    keep(xeon, Layout(1, 56, 0, 32))
    assert sizes(tuned_plan(xeon, environ={})) == [(56, 0)]
    assert tuned_threads(xeon, 1, {}) == {}


def test_the_command_plans_by_the_measurement(tmp_path):
    root = trees.xeon(tmp_path / "xeon")
    keep(read_node(root), FOUR)
    result = CliRunner().invoke(main, ["plan", "--topology", str(root), "--format", "json"])
    plan = json.loads(result.stdout)
    assert len(plan["ranks"]) == 4
    assert "measured by knltrain tune" in plan["origin"]
    slurm = CliRunner().invoke(main, ["plan", "--topology", str(root), "--format", "slurm"]).stdout
    assert "--ntasks-per-node=4" in slurm
    assert json.loads(measured_file().read_text())
