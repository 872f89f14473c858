"""All-reduces against the closed formulas of the sources, and against limits that any model must keep."""

import math
from collections import Counter
from typing import get_args, get_type_hints

import hypothesis.strategies as st
import pytest
from hypothesis import given

from knltrain.cli import predict
from knltrain.errors import ConfigError
from knltrain.predict import allreduce
from knltrain.predict.allreduce import ALGORITHMS, Fabric, all_reduce
from knltrain.predict.systems import Network

ALPHA, BETA, GAMMA, CALL = 2e-6, 1 / 12.5e9, 1 / 3e9, 30e-6
SIZE = 4 * 25_600_000


def fabric(nodes, ranks_per_node=1, **changes):
    return Fabric(nodes, ranks_per_node, ALPHA, 1 / BETA, 0.5e-6, 20e9, 1 / GAMMA, CALL)._replace(**changes)


@pytest.mark.parametrize("ranks", [2, 8, 64, 512])
def test_formulas_of_thakur_rabenseifner_and_gropp(ranks):
    p, n = ranks, SIZE
    steps = math.log2(p)
    expected = {
        "ring": (2 * (p - 1) * ALPHA + 2 * (p - 1) / p * n * BETA + (p - 1) / p * n * GAMMA),
        "halving-doubling": 2 * steps * ALPHA + 2 * (p - 1) / p * n * BETA + (p - 1) / p * n * GAMMA,
        "recursive-doubling": steps * (ALPHA + n * BETA + n * GAMMA),
        "direct": 2 * (p - 1) * ALPHA + 2 * (p - 1) / p * n * BETA + (p - 1) / p * n * GAMMA,
    }
    for name, seconds in expected.items():
        cost = all_reduce(fabric(ranks), n // 4, 4, name)
        assert cost.seconds == pytest.approx(CALL + seconds, rel=1e-12), name
    assert all_reduce(fabric(ranks), n // 4, 4, "mpi").seconds == pytest.approx(CALL + min(expected.values()))


@pytest.mark.parametrize("name", ["ring", "halving-doubling", "direct"])
def test_each_server_moves_what_goyal_says(name):
    for ranks in (2, 16, 256):
        assert all_reduce(fabric(ranks), 1000, 4, name).bytes_sent == pytest.approx(2 * (ranks - 1) / ranks * 4000)
    assert all_reduce(fabric(256), 1000, 4, "halving-doubling").messages == 2 * 8
    assert all_reduce(fabric(256), 1000, 4, "ring").messages == 2 * 255


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("nodes, local", [(1, 1), (1, 4), (3, 1), (16, 2), (5, 3)])
def test_limits(name, nodes, local):
    here = fabric(nodes, local)
    cost = all_reduce(here, 10**7, 4, name)
    if nodes * local == 1:
        assert cost == (0, 0, 0)
        return
    assert cost.seconds > CALL
    for better in ({"latency_s": 0.0, "shared_latency_s": 0.0}, {"link_bytes_per_s": 1e12, "shared_bytes_per_s": 1e12},
                   {"sum_bytes_per_s": math.inf}):  # fmt: skip
        assert all_reduce(here._replace(**better), 10**7, 4, name).seconds < cost.seconds
    free = here._replace(latency_s=0, shared_latency_s=0, link_bytes_per_s=math.inf, shared_bytes_per_s=math.inf,
                         sum_bytes_per_s=math.inf, call_s=0)  # fmt: skip
    assert all_reduce(free, 10**7, 4, name).seconds == 0
    assert all_reduce(here, 2 * 10**7, 4, name).seconds > cost.seconds
    assert all_reduce(here, 10**7, 2, name).seconds < cost.seconds, "half the bytes"


def test_a_node_alone_never_uses_its_link():
    for name in ALGORITHMS:
        slow = all_reduce(fabric(1, 4, link_bytes_per_s=1.0, latency_s=9.0), 10**6, 4, name)
        assert slow == all_reduce(fabric(1, 4), 10**6, 4, name), name


def test_ranks_of_a_node_share_its_link():
    """Doubling between nodes: two ranks a node, each with half the link, and one level less that leaves the node."""
    one, two = fabric(8), fabric(4, 2, shared_bytes_per_s=math.inf, shared_latency_s=0)
    n = 4e7
    near = GAMMA * n / 2  # the first halving stays in the node
    far = sum(2 * (ALPHA + n / 2**step * 2 * BETA) + n / 2**step * GAMMA for step in (2, 3))
    assert allreduce.halving_doubling(two, n).seconds == pytest.approx(near + far)
    assert allreduce.two_level(fabric(4, 8), n).seconds < allreduce.recursive_doubling(fabric(4, 8), n).seconds
    assert allreduce.ring(one, n).seconds == pytest.approx(allreduce.ring(one._replace(shared_latency_s=1), n).seconds)


def test_two_level_sums_in_the_node_first():
    nodes, local, n = 4, 2, 8e6
    inside = 2 * (0.5e-6 + n / 2 / 20e9) + n / 2 * GAMMA
    part, slow = n / 2, 2 * BETA
    between = 2 * 2 * ALPHA + 2 * 3 / 4 * part * slow + 3 / 4 * part * GAMMA
    assert allreduce.two_level(fabric(nodes, local), n).seconds == pytest.approx(inside + between)


@pytest.mark.parametrize("power, rest", [(4, 1), (8, 5)])
def test_ranks_beyond_a_power_of_two_hand_their_data_over(power, rest):
    n = 1e6
    extra = 2 * (ALPHA + n * BETA) + n * GAMMA
    for name in (allreduce.halving_doubling, allreduce.recursive_doubling):
        assert name(fabric(power + rest), n).seconds == pytest.approx(name(fabric(power), n).seconds + extra)


SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 20))


def rounds_one_by_one(nodes, local):
    """Each rank's partner in each round: the rule of MPICH's ranks beyond a power of two, written out."""
    ranks = nodes * local
    power = 1 << (ranks.bit_length() - 1)
    rest = ranks - power
    taking_part = [rank for rank in range(ranks) if rank >= 2 * rest or rank % 2]
    node = [rank // local for rank in taking_part]
    for step in range(power.bit_length() - 1):
        crossing = Counter(node[number] for number in range(power) if node[number] != node[number ^ 1 << step])
        yield max(crossing.values(), default=0), sum(crossing.values()) < power


@given(SHAPES)
def test_partners_are_on_one_node_where_their_ranks_are(shape):
    assert list(map(tuple, allreduce._exchanges(*shape))) == list(rounds_one_by_one(*shape))


@given(SHAPES, st.sampled_from(ALGORITHMS), st.floats(1, 1e10))
def test_no_algorithm_is_faster_than_the_link_of_a_node(shape, name, num_bytes):
    nodes, local = shape
    here = fabric(nodes, local, shared_bytes_per_s=math.inf, latency_s=0.0, shared_latency_s=0.0, call_s=0.0,
                  sum_bytes_per_s=math.inf)  # fmt: skip
    elements = math.ceil(num_bytes / 4)
    least = 2 * (nodes - 1) / nodes * 4 * elements * BETA
    assert all_reduce(here, elements, 4, name).seconds >= (least if shape != (1, 1) else 0)


def test_ranks_a_node_that_are_no_power_of_two():
    """Six on each of 16 nodes took 0.105 s where each link carries 1.875 GB at 12.5 GB/s."""
    here = fabric(16, 6, shared_bytes_per_s=math.inf, call_s=0.0)
    assert all_reduce(here, 250_000_000, 4, "halving-doubling").seconds > 0.15
    # Three ranks on each of two: ranks 1, 3, 4 and 5 take part, and 1 has no partner on its own node.
    assert [tuple(one) for one in allreduce._exchanges(2, 3)] == [(1, True), (1, True)]


def test_as_many_ranks_as_anyone_has_take_no_time_to_ask():
    assert len(allreduce._exchanges(10**7, 48)) == 28


def test_oneccl_takes_the_algorithm_of_its_table():
    for elements, name in ((8192, "recursive-doubling"), (8193, "direct"), (2**20, "direct"), (2**20 + 1, "ring")):
        assert all_reduce(fabric(16), elements, 2) == all_reduce(fabric(16), elements, 2, name)


def test_flag_and_files_know_the_same_algorithms():
    (flag,) = [parameter for parameter in predict.predict.params if parameter.name == "algorithm"]
    assert tuple(flag.type.choices) == ALGORITHMS
    assert get_args(get_type_hints(Network)["algorithm"]) == ALGORITHMS


def test_an_unknown_algorithm_is_one_line():
    with pytest.raises(ConfigError, match="there are oneccl, mpi, ring"):
        all_reduce(fabric(2), 10, 4, "magic")
