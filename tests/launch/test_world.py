import os

import pytest

from knltrain.errors import ConfigError
from knltrain.launch.hosts import expand_counts, expand_hosts
from knltrain.launch.launchers import launcher_rank
from knltrain.launch.world import discover

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}  # fmt: skip
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
OPENMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
           "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
SLURM = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2"}
ONE_TASK = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"}


MVAPICH2 = {name.replace("OMPI", "MV2"): value for name, value in OPENMPI.items()}
MVAPICH4 = {name.replace("OMPI", "MVP"): value for name, value in OPENMPI.items()}
JSRUN = {name.replace("OMPI_COMM_WORLD", "JSM_NAMESPACE"): value for name, value in OPENMPI.items()}
PALS = {"PALS_RANKID": "1", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "2", "PALS_NODEID": "0", "PMI_RANK": "1",
        "PMI_SIZE": "2", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"}  # fmt: skip
FLUX = {"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "2", "FLUX_TASK_LOCAL_ID": "1", "FLUX_JOB_NNODES": "1",
        "PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "7", "FLUX_ENCLOSING_ID": "f1"}  # fmt: skip
POD = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "run-master-0", "MASTER_PORT": "23456"}


def test_alone():
    ranks = discover({})
    assert (ranks.launcher, ranks.rank, ranks.size, ranks.local_size) == ("none", 0, 1, 1)


def test_torchrun():
    ranks = discover(TORCHRUN)
    assert (ranks.launcher, ranks.rank, ranks.size, ranks.local_rank, ranks.local_size) == ("torchrun", 3, 4, 1, 2)
    assert ranks.init_method == "env://"


@pytest.mark.parametrize("name, variables", [
    ("hydra", HYDRA), ("openmpi", OPENMPI), ("slurm", SLURM), ("mvapich", MVAPICH2), ("mvapich", MVAPICH4),
    ("jsrun", JSRUN), ("jsrun", {**JSRUN, "PMIX_RANK": "1"}), ("pals", PALS), ("flux", FLUX),
    ("openmpi", {**OPENMPI, "PMIX_RANK": "1"}), ("slurm", {**SLURM, "PMIX_RANK": "1"}),
    ("hydra", {**HYDRA, **MVAPICH2}),
])  # fmt: skip
def test_mpi_and_slurm_on_one_node_meet_in_a_file(name, variables):
    ranks = discover(variables)
    assert (ranks.launcher, ranks.rank, ranks.size, ranks.local_size) == (name, 1, 2, 2)
    assert ranks.init_method.startswith("file://")
    assert discover(variables).init_method == ranks.init_method


def test_srun_tells_its_ranks_the_name_of_their_file_whatever_stands_between():
    step = {**SLURM, "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "3", "TMPDIR": "/here"}
    assert discover(step).init_method == f"file:///here/knltrain-{os.geteuid()}/7-3-0"
    assert discover({**step, "SLURM_RESTART_COUNT": "1"}).init_method.endswith("/7-3-1")
    by_hand = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert discover({**step, **by_hand}).init_method == discover(step).init_method
    # mpiexec of one rank a task, or of others than these, has files of its own.
    assert "-7-3" not in discover({**step, **ONE_TASK, **HYDRA}).init_method


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_task_of_another_size_names_no_file(rank):
    """Two mpiexec in two tasks of one each: the first rank of either has the task's rank, 0, and not its size."""
    task = {**ONE_TASK, "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "3"}
    assert "-7-3" not in discover({**task, **HYDRA, "PMI_RANK": rank, "MPI_LOCALRANKID": rank}).init_method


def test_ranks_that_do_not_see_their_launcher_are_told_to_name_a_port(monkeypatch):
    """The first process of a PID namespace has no parent there."""
    monkeypatch.setattr(os, "getppid", lambda: 0)
    with pytest.raises(ConfigError, match="rank 1 of 2 cannot see the process of hydra"):
        discover(HYDRA)


def test_what_a_script_repeats_of_its_launcher_is_the_launchers():
    """srun bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS knltrain train ...' says nothing of the node."""
    for name, outer in (("hydra", HYDRA), ("openmpi", OPENMPI), ("slurm", SLURM)):
        found = discover({**outer, "RANK": "1", "WORLD_SIZE": "2"})
        assert (found.launcher, found.rank, found.local_rank, found.local_size) == (name, 1, 1, 2)
    for unknown in ({}, {"LOCAL_RANK": "1"}, ONE_TASK):
        with pytest.raises(ConfigError, match=r"RANK=1 and WORLD_SIZE=2 leave open.*LOCAL_WORLD_SIZE"):
            discover({"RANK": "1", "WORLD_SIZE": "2", **unknown})


@pytest.mark.parametrize("variables", [
    {"PMIX_RANK": "1"}, {"PMIX_RANK": "0"}, {"ALPS_APP_PE": "1"}, {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2"},
    {"PALS_RANKID": "1", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "2"}, {"PMI_RANK": "1", "PMI_SIZE": "2"},
    {"MPIRUN_RANK": "1", "MPIRUN_NPROCS": "2"}, {"FLUX_TASK_RANK": "1"}, {"SLURM_PROCID": "1"}, {"RANK": "0"},
    {"WORLD_SIZE": "2"}, {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2"}, {"OMPI_COMM_WORLD_RANK": "0"},
    {**ONE_TASK, "PMI_RANK": "1", "PMI_SIZE": "4"}, {**ONE_TASK, "PMIX_RANK": "1"}, {"LSF_PM_TASKID": "2"},
    {"MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, {"NODE_RANK": "1"},
])  # fmt: skip
def test_what_looks_like_a_launcher_and_does_not_say_enough_is_refused(variables):
    with pytest.raises(ConfigError, match=r"as one of several .*each would train a model of its own\. Export RANK"):
        discover(variables)
    # What the message asks for is enough.
    by_hand = {**TORCHRUN, "RANK": "1", "WORLD_SIZE": "2"}
    assert discover({**variables, **by_hand}).size == 2


@pytest.mark.parametrize("variables", [
    {"PMI_RANK": "0", "PMI_SIZE": "1"}, {"WORLD_SIZE": "1"}, {**ONE_TASK, "PMIX_RANK": "0"},
    {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
    {"PMIX_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}, {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
])  # fmt: skip
def test_one_process_of_any_launcher_is_alone(variables):
    assert discover(variables).size == 1


def test_the_message_says_which_variables_are_meant():
    with pytest.raises(
        ConfigError, match=r"RANK=\$PALS_RANKID LOCAL_RANK=\$PALS_LOCAL_RANKID LOCAL_WORLD_SIZE=\$PALS_"
    ):
        discover({"PALS_RANKID": "1", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "2"})
    with pytest.raises(
        ConfigError, match=r"unset MV2_COMM_WORLD_RANK and MV2_COMM_WORLD_SIZE if this process is alone"
    ):
        discover({"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2"})


@pytest.mark.parametrize("variables", [TORCHRUN, HYDRA, OPENMPI, SLURM, MVAPICH2, PALS, FLUX])
def test_variables_that_are_empty_are_not_set(variables):
    assert discover(dict.fromkeys(variables, "")) == discover({})
    assert launcher_rank(dict.fromkeys(variables, "")) == ""
    for outer in (HYDRA, OPENMPI, SLURM):
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TMPDIR")
        found = discover({**outer, **dict.fromkeys(names, "")})
        assert found == discover(outer)
        assert found.init_method.startswith("file:///tmp/")


def test_flux_tells_nodes_and_not_tasks_of_a_node():
    four = {
        **FLUX,
        "FLUX_TASK_RANK": "3",
        "FLUX_JOB_SIZE": "4",
        "FLUX_JOB_NNODES": "2",
        "PMI_RANK": "3",
        "PMI_SIZE": "4",
    }
    found = discover(four)
    assert (found.rank, found.local_rank, found.local_size, found.init_method) == (3, 1, 2, "")
    for uneven in ({"FLUX_JOB_SIZE": "5", "PMI_SIZE": "5"}, {"FLUX_TASK_LOCAL_ID": "2"}, {"FLUX_JOB_NNODES": "0"}):
        with pytest.raises(ConfigError, match=r"not as many on each.*LOCAL_WORLD_SIZE"):
            discover({**four, **uneven})
    assert discover({**four, **TORCHRUN}).launcher == "torchrun"


def test_a_pod_has_its_node_alone():
    for pod in (POD, {**POD, "KUBERNETES_SERVICE_HOST": "10.96.0.1"}):
        found = discover(pod)
        assert (found.rank, found.size, found.local_rank, found.local_size) == (1, 3, 0, 1)
        assert found.init_method == "env://"
        assert bool(found.warnings) == (pod is POD), "elsewhere ranks may share a node"
    first = {**POD, "RANK": "0", "MASTER_ADDR": "localhost"}
    assert discover({**first, "KUBERNETES_SERVICE_HOST": "10.96.0.1"}).local_size == 1
    for more in ({"LOCAL_RANK": "1"}, {"MASTER_PORT": ""}, {"MASTER_ADDR": "127.0.1.1"}, {"PMIX_RANK": "1"}):
        with pytest.raises(ConfigError, match="leave open"):
            discover({**POD, **more})
    with pytest.raises(ConfigError, match="leave open"):
        discover(first)


def test_the_innermost_launcher_counts():
    assert discover({**SLURM, **OPENMPI}).launcher == "openmpi"
    assert discover({**SLURM, **TORCHRUN}).launcher == "torchrun"


def test_errors_name_the_rank_under_each_launcher(knltrain):
    told = [launcher_rank(one) for one in ({}, TORCHRUN, HYDRA, OPENMPI, SLURM, ONE_TASK, {"SLURM_PROCID": "0"})]
    assert told == ["", "3", "1", "1", "1", "", ""]
    assert launcher_rank({**SLURM, **TORCHRUN}) == "3"
    result = knltrain("launch", **SLURM)
    assert result.stderr.startswith("knltrain: rank 1: ")


def test_a_batch_script_is_not_a_rank():
    assert discover({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "1"}).size == 1


@pytest.mark.parametrize("outer", [HYDRA, OPENMPI, SLURM])
def test_many_processes_of_one_rank_each_are_refused(outer):
    with pytest.raises(ConfigError, match=r"started 2 processes.*this one is alone"):
        discover({**outer, "RANK": "0", "WORLD_SIZE": "1"})


def test_ranks_on_several_nodes_have_yet_to_meet():
    apart = {**HYDRA, "PMI_SIZE": "4"}
    assert discover(apart).on_several_nodes
    assert discover(apart).init_method == ""
    assert discover({**apart, "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}).init_method == "env://"
    for alone in ({"MASTER_ADDR": "node1"}, {"MASTER_PORT": "29500"}):
        with pytest.raises(ConfigError, match="set alone: export both"):
            discover({**apart, **alone})


def test_tasks_per_node_are_those_of_this_node():
    step = {"SLURM_PROCID": "7", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "0", "SLURM_NODEID": "3",
            "SLURM_STEP_TASKS_PER_NODE": "2(x2),3,1", "SLURM_STEP_NODELIST": "node[001-003,7]"}  # fmt: skip
    ranks = discover(step)
    assert (ranks.local_size, ranks.hosts) == (1, ("node001", "node002", "node003", "node7"))
    assert discover({**step, "SLURM_PROCID": "6", "SLURM_LOCALID": "2", "SLURM_NODEID": "2"}).local_size == 3
    with pytest.raises(ConfigError, match="SLURM_NODEID=4"):
        discover({**step, "SLURM_NODEID": "4"})


def test_srun_with_pmi2_is_srun():
    """It sets PMI_RANK and PMI_SIZE, and nothing else that Hydra sets."""
    step = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
            "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "PMI_RANK": "5", "PMI_SIZE": "8", "PMI_FD": "14"}  # fmt: skip
    assert (discover(step).launcher, discover(step).local_rank, discover(step).local_size) == ("slurm", 1, 4)


def test_a_launcher_that_says_nothing_of_its_nodes_is_refused():
    with pytest.raises(
        ConfigError, match=r"speaks PMI seems .*\(PMI_RANK=1, PMI_SIZE=4\).*RANK=\$PMI_RANK WORLD_SIZE=\$PMI_SIZE"
    ):
        discover({"PMI_RANK": "1", "PMI_SIZE": "4"})


def test_a_launcher_in_each_task_of_another_is_refused():
    tasks = {
        "SLURM_PROCID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    }
    alone = {**TORCHRUN, "RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    with pytest.raises(ConfigError, match="slurm started 2 processes, but torchrun says these are all of 4, on one"):
        discover({**tasks, **alone})
    assert discover({**tasks, **TORCHRUN}).size == 4, "one torchrun a node, together"
    # mpiexec starts its helpers on other nodes through srun, one a node.
    helpers = {**HYDRA, "PMI_SIZE": "4"}
    assert discover({**tasks, **helpers}).launcher == "hydra"
    with pytest.raises(ConfigError, match="slurm started 8 processes"):
        discover({**tasks, "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", **helpers})


@pytest.mark.parametrize("text, names", [
    ("vm", "vm"), ("a,b-2", "a b-2"), ("node[001-003,7],gpu-a", "node001 node002 node003 node7 gpu-a"),
    ("n[9-11]", "n9 n10 n11"), ("rack[0-1]n[08-09]-ib", "rack0n08-ib rack0n09-ib rack1n08-ib rack1n09-ib"),
    ("login.site.org,n[1]", "login.site.org n1"),
])  # fmt: skip
def test_compressed_node_lists(text, names):
    assert expand_hosts(text, given_as="--hosts") == tuple(names.split())


@pytest.mark.parametrize("text", ["n[1-", "n[3-1]", "n[a]", "n[1-99999999]", "[", "", "n[]"])
def test_damaged_node_lists(text):
    with pytest.raises(ConfigError, match="not a list of nodes"):
        expand_hosts(text, given_as="--hosts")


def test_counts():
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    for text in ("", "2(x)", "many", "2(3)"):
        with pytest.raises(ConfigError, match="not a list of tasks"):
            expand_counts(text)


@pytest.mark.parametrize("change", [{"PMI_RANK": "2"}, {"PMI_RANK": "-1"}, {"PMI_SIZE": "two"}, {"PMI_RANK": ""}])
def test_damaged_variables_are_refused(change):
    with pytest.raises(ConfigError, match="PMI"):
        discover({**HYDRA, **change})
