"""Ranks as threads of this process, which is what a liveness check cannot tell from processes."""

import re
import threading
import time

import pytest
import torch.distributed as dist

from knltrain.comm.liveness import PeerLiveness

HOSTS = ["node1", "node2", "node2"]
SILENT = "has ended or does not answer"


@pytest.fixture
def ranks(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), -1)
    ranks = [PeerLiveness(store, rank, HOSTS) for rank in range(3)]
    yield ranks
    for rank in ranks:
        rank.end()


def call(*ranks):
    """What each of several ranks, which call at once, is told."""
    said = {}
    threads = [threading.Thread(target=lambda rank=rank: said.update({rank: rank.lost()})) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [said[rank] for rank in ranks]


def test_one_that_does_not_answer_is_named(ranks):
    ranks[2].end()
    assert ranks[0].lost() == f"rank 2 on node2 {SILENT}", "rank 1 answers, though it has not noticed anything"
    assert ranks[1].lost() == f"rank 2 on node2 {SILENT}"


def test_several_that_do_not_answer_are_named(ranks):
    ranks[0].end()
    ranks[2].end()
    assert ranks[1].lost() == f"rank 0 on node1 and rank 2 on node2 {SILENT}"


def test_of_all_that_answer_the_one_that_is_behind_is_named(ranks):
    for rank in (0, 0, 1, 2, 2):
        ranks[rank].count_collective()
    behind = "rank 1 on node2 has not come to what the others wait for: it hangs, or waits for its data"
    assert call(ranks[0], ranks[2]) == [behind] * 2


def test_of_all_that_wait_for_the_same_the_one_that_came_last_is_named(ranks, monkeypatch):
    now = time.monotonic()
    for rank, since_s in zip(ranks, (100, 90, 3), strict=True):
        monkeypatch.setattr(rank, "_since", now - since_s)
    assert re.fullmatch(
        r"rank 2 on node2 came (9[67]|97\.\d) s after the first, which --comm.timeout-s does not allow", ranks[0].lost()
    )


def test_nobody_is_to_blame_where_all_wait_as_long(ranks, monkeypatch):
    now = time.monotonic()
    for rank in ranks:
        monkeypatch.setattr(rank, "_since", now - 100)
    assert call(*ranks) == [""] * 3


@pytest.mark.slow
def test_without_its_store_the_rank_that_keeps_it_is_named(tmp_path):
    path = tmp_path / "gone" / "store"
    path.parent.mkdir()
    rank = PeerLiveness(dist.FileStore(str(path), -1), 1, HOSTS)
    path.unlink(missing_ok=True)
    path.parent.rmdir()
    assert rank.lost() == f"rank 0 on node1 {SILENT}"
    rank.end()
