"""Running statistics are lent to evaluation and checkpoints, and come back."""

import sys
from pathlib import Path

import pytest
from cluster.runs import ccl_is_here, mpiexec, start
from comm.ranks import results

RANK = Path(__file__).with_name("statistics_ranks.py")


@pytest.mark.parametrize("backend", ["gloo", "ccl"])
@pytest.mark.parametrize("size", [1, 3])
def test_the_mean_is_borrowed_and_the_first_rank_sees_all(size, backend, tmp_path):
    if backend == "ccl" and not ccl_is_here():
        pytest.skip("oneCCL does not load")
    result = start([*mpiexec("-n", size), sys.executable, RANK, tmp_path, backend], OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    first, *others = results(tmp_path, size)
    mean = (1 + size) / 2
    for rank in (first, *others):
        assert rank["averaged"] == pytest.approx([mean / 3, mean * 2 / 3, mean])
        assert rank["own again"]
        assert (rank["text"], rank["empty"]) == ("ü of rank 0", "")
    assert all(rank["rows"] == {} for rank in others)
    if size == 1:
        assert first["rows"] == {}
    else:
        assert first["rows"].keys() == {"0.running_mean", "0.running_var"}
        assert first["rows"]["0.running_var"] == [
            pytest.approx([part * (rank + 1) / 7 for part in (1, 2, 3)]) for rank in range(size)
        ]
