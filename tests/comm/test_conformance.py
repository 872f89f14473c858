"""What torch.distributed promises, asked of gloo and of ccl alike.

Ranks are started once for each back end and number of ranks; a test is one case of one such run.
"""

import pytest
import torch
from comm import conformance_ranks
from comm.ranks import outputs, results, start_by_mpiexec, start_ranks, wait_for


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """What came of each case on each rank, for a back end, its transport and a number of ranks; run once."""
    runs = {}

    def run(backend, transport, size):
        key, program = (backend, transport, size), conformance_ranks.__file__
        if key not in runs:
            folder = tmp_path_factory.mktemp("-".join(map(str, key)))
            if transport == "mpi":
                processes = start_by_mpiexec(program, size, folder, backend, CCL_ATL_TRANSPORT="mpi")
            else:
                processes = start_ranks(program, size, folder, backend)
            runs[key] = folder, wait_for(processes, 120), results(folder, size)
        return runs[key]

    return run


def need(backend):
    if backend == "ccl":
        from knltrain.comm import oneccl

        try:
            oneccl.find_library()
            oneccl.load()
        except oneccl.UnavailableError as error:
            pytest.skip(str(error))


RUNS = pytest.mark.parametrize(
    "backend, transport, size", [("gloo", "tcp", 2), ("ccl", "ofi", 2), ("ccl", "ofi", 3), ("ccl", "mpi", 2)]
)


@pytest.mark.parametrize("name", conformance_ranks.CASES)
@RUNS
def test_case(backend, transport, size, name, run_of):
    need(backend)
    folder, _, outcomes = run_of(backend, transport, size)
    for rank in range(size):
        got = outcomes[rank].get(name, "not reached") if rank < len(outcomes) else "not started"
        assert got == "passed", f"rank {rank}: {got}\n{outputs(folder)[-2000:]}"


@RUNS
def test_all_ranks_end(backend, transport, size, run_of):
    need(backend)
    folder, codes, _ = run_of(backend, transport, size)
    assert set(codes) == {0}, outputs(folder)


def test_training_is_the_same_over_both(run_of):
    need("ccl")
    weights = [torch.load(run_of(*run)[0] / "weights0.pt") for run in (("gloo", "tcp", 2), ("ccl", "ofi", 2))]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)
