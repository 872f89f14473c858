"""Advice follows from predicting again: in cases where one thing clearly bounds the run."""

import dataclasses
import re

import pytest
from foreseen import ALEXNET, RESNET, job, replaced

from knltrain.config import CommConfig
from knltrain.predict.advice import advise, changes, doublings, largest_useful, network_bound
from knltrain.predict.run import predict
from knltrain.predict.systems import load


def advice(one):
    return advise(predict(one), doublings(one))


def test_doublings_go_on_while_every_rank_has_an_image():
    assert [one.job.nodes for one in doublings(job(dataclasses.replace(ALEXNET, global_batch=8)))] == [1, 2, 4, 8]
    assert [one.job.nodes for one in doublings(job(dataclasses.replace(ALEXNET, global_batch=12)))] == [1, 2, 4]


def test_network_bound_says_from_where_on():
    lines = advice(job(nodes=4096))
    (beyond,) = re.findall(r"network bound beyond ([\d,]+) nodes: 244 MB a step over 12.5 GB/s", lines[0])
    scan = {one.job.nodes: one for one in doublings(job())}
    last = int(beyond.replace(",", ""))
    assert not network_bound(scan[last])
    assert network_bound(scan[2 * last])


@pytest.mark.parametrize("exposed_s, bound", [(0.9, False), (2.5, False), (3.4, False), (3.6, True)])
def test_a_step_waits_longer_than_the_slowest_rank_computes_in_both_directions(exposed_s, bound):
    one = predict(job())
    parts = {"forward_s": 1.0, "backward_s": 2.0, "straggler_s": 0.5, "exposed_s": exposed_s}
    assert network_bound(dataclasses.replace(one, step=dataclasses.replace(one.step, **parts))) == bound


def test_compute_bound_says_so():
    lines = advice(job(RESNET, nodes=16))
    assert lines[0].startswith("compute bound")


def test_what_saves_most_comes_first_and_is_true():
    one = job(nodes=1024)
    lines = [line for line in advice(one) if ": saves " in line]
    saved = [int(re.search(r"saves (\d+)%", line)[1]) for line in lines]
    assert saved == sorted(saved, reverse=True)
    bf16 = dataclasses.replace(one, config=dataclasses.replace(ALEXNET, comm=CommConfig(dtype="bf16")))
    percent = 100 * (1 - predict(bf16).total_s / predict(one).total_s)
    assert any(line == f"bf16 gradients (--comm.dtype bf16): saves {percent:.0f}%" for line in lines)


def test_one_thing_is_changed_at_a_time():
    one = job(nodes=64)
    for words, changed in changes(one):
        different = [field.name for field in dataclasses.fields(one)
                     if getattr(one, field.name) != getattr(changed, field.name)]  # fmt: skip
        assert len(different) == 1, words


def test_nothing_is_advised_that_does_nothing():
    steady = replaced(load("knl7250-opa"), noise={"spread": 0.0})
    lines = advice(job(dataclasses.replace(RESNET, max_steps=1), steady, nodes=1))
    assert lines[-1] == "nothing that was tried saves 2 % or more"


@pytest.mark.parametrize("rate, expected", [(1e9, 32768), (1e-3, 1)])
def test_largest_useful_number_of_nodes(rate, expected):
    """A network that costs nothing: as many as there are images; one that costs everything: none but the first."""
    network = {"sum_gb_per_s": rate, "link_gb_per_s": rate, "latency_us": 0.0, "call_us": 0.0}
    system = replaced(load("knl7250-opa"), network=network, noise={"spread": 0.0}, storage={"write_gb_per_s": 1e9},
                      node={"memory_gb_per_s": 1e9})  # fmt: skip
    assert largest_useful(doublings(job(RESNET, system))) == expected
