import pytest

from knltrain.errors import ConfigError
from knltrain.node.affinity import threads_per_rank
from knltrain.node.topology import Node


def node(cores, threads=1, online=None):
    siblings = tuple(tuple(core + cores * t for t in range(threads)) for core in range(cores))
    cpus = tuple(sorted(cpu for core in siblings for cpu in core))
    return Node("CPU", frozenset(), cpus, siblings, online or len(cpus))


def test_one_thread_a_physical_core():
    assert threads_per_rank(node(68, threads=4), 1, {}) == 68


def test_ranks_that_nobody_pinned_share_the_cores():
    assert threads_per_rank(node(8), 2, {}) == 4
    assert threads_per_rank(node(2), 4, {}) == 1


def test_a_pinned_rank_uses_all_it_was_given():
    assert threads_per_rank(node(4, online=8), 2, {}) == 4


def test_torchruns_default_of_one_is_not_obeyed_and_a_users_number_is():
    assert threads_per_rank(node(8), 2, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}) == 4
    assert threads_per_rank(node(8), 2, {"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "x"}) == 3
    assert threads_per_rank(node(8), 1, {"OMP_NUM_THREADS": "1"}) == 1
    assert threads_per_rank(node(8), 1, {"OMP_NUM_THREADS": "6,1"}) == 6


@pytest.mark.parametrize("value", ["0", "many", "-2"])
def test_nonsense_is_refused(value):
    with pytest.raises(ConfigError, match="OMP_NUM_THREADS"):
        threads_per_rank(node(8), 1, {"OMP_NUM_THREADS": value})
