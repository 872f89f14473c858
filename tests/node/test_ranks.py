import pytest

from knltrain.errors import ConfigError
from knltrain.node.ranks import discover

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}  # fmt: skip
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
OPENMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
           "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
SLURM = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2"}


def test_alone():
    ranks = discover({})
    assert (ranks.launcher, ranks.rank, ranks.size, ranks.local_size) == ("none", 0, 1, 1)


def test_torchrun():
    ranks = discover(TORCHRUN)
    assert (ranks.launcher, ranks.rank, ranks.size, ranks.local_rank, ranks.local_size) == ("torchrun", 3, 4, 1, 2)
    assert ranks.init_method == "env://"


@pytest.mark.parametrize("name, variables", [("hydra", HYDRA), ("openmpi", OPENMPI), ("slurm", SLURM)])
def test_mpi_and_slurm_on_one_node_meet_in_a_file(name, variables):
    ranks = discover(variables)
    assert (ranks.launcher, ranks.rank, ranks.size, ranks.local_size) == (name, 1, 2, 2)
    assert ranks.init_method.startswith("file://")
    assert discover(variables).init_method == ranks.init_method


def test_the_innermost_launcher_counts():
    assert discover({**SLURM, **OPENMPI}).launcher == "openmpi"
    assert discover({**SLURM, **TORCHRUN}).launcher == "torchrun"


def test_a_batch_script_is_not_a_rank():
    assert discover({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "1"}).size == 1


@pytest.mark.parametrize("outer", [HYDRA, OPENMPI, SLURM])
def test_many_processes_of_one_rank_each_are_refused(outer):
    with pytest.raises(ConfigError, match=r"started 2 processes.*this one is alone"):
        discover({**outer, "RANK": "0", "WORLD_SIZE": "1"})


def test_several_nodes_need_an_address():
    apart = {**HYDRA, "PMI_SIZE": "4"}
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        discover(apart)
    assert discover({**apart, "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}).init_method == "env://"
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        discover({**SLURM, "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"})


@pytest.mark.parametrize("change", [{"PMI_RANK": "2"}, {"PMI_RANK": "-1"}, {"PMI_SIZE": "two"}, {"PMI_RANK": ""}])
def test_damaged_variables_are_refused(change):
    with pytest.raises(ConfigError, match="PMI"):
        discover({**HYDRA, **change})
