"""Ranks take their places; a rank that is given less than its share says by whom."""

import dataclasses
import functools
import os
import subprocess
import sys

import pytest
from node import trees

from knltrain.errors import KnltrainError
from knltrain.launch import placement
from knltrain.launch.placement import RankPlacement, binding_drift, plan_placement
from knltrain.launch.world import Ranks
from knltrain.node.binding import running_on
from knltrain.node.topology import read_node


@pytest.fixture(scope="module")
def xeon(tmp_path_factory):
    return trees.xeon(tmp_path_factory.mktemp("xeon"))


def place(root, cpus, ranks, **options):
    whole = read_node(root)
    node = whole if cpus is None else read_node(root, allowed=set(cpus))
    return plan_placement(ranks, node, whole, environ={}, **options)


def rank(launcher, local_rank=0, local_size=2, size=None):
    return Ranks(launcher, local_rank, size or local_size, local_rank, local_size)


def test_ranks_that_nobody_pinned_take_their_shares(xeon):
    for launcher in ("torchrun", "hydra", "openmpi", "slurm"):
        one, two = (place(xeon, None, rank(launcher, local_rank)).plan for local_rank in (0, 1))
        assert (one.compute[0], two.compute[0]) == (0, 28)
        assert len(one.compute) == len(two.compute) == 26
    # A rank on each of several nodes communicates as well.
    assert len(place(xeon, None, rank("hydra", 0, 1, size=4)).plan.comm) == 4


def test_a_pinned_rank_keeps_to_what_it_was_given(xeon):
    given = [*range(28, 56), *range(84, 112)]
    found = place(xeon, given, rank("hydra", 1))
    assert {*found.plan.compute, *found.plan.comm} == set(range(28, 56))
    assert (found.plan.local_rank, len(found.plan.comm), found.warnings) == (1, 2, ())
    # The launcher's own idea of which rank is where is kept, too.
    assert place(xeon, given, rank("hydra", 0)).plan.compute[0] == 28


@pytest.mark.parametrize("launcher, remedy", [("slurm", "--cpu-bind=none"), ("openmpi", "--bind-to none"),
                                              ("hydra", "I_MPI_PIN=0")])  # fmt: skip
def test_a_rank_with_fewer_cores_than_its_share_refuses(launcher, remedy, xeon):
    for local_size in (1, 2):
        with pytest.raises(KnltrainError) as refused:
            place(xeon, [5], rank(launcher, 0, local_size))
        share = 56 // local_size
        assert f"{launcher} pinned rank 0 to 1 core (CPUs 5), and its share of this node is {share} cores" in str(
            refused.value
        )
        assert remedy in str(refused.value)
        assert "--no-strict-affinity" in str(refused.value)
        found = place(xeon, [5], rank(launcher, 0, local_size), strict=False)
        assert found.plan.compute == (5,)
        assert remedy in found.warnings[0]


def test_a_little_less_than_its_share_is_a_warning(tmp_path):
    """Intel MPI cuts 68 cores into 17s; the plan follows the domains of 18 and 16."""
    trees.xeon_phi(tmp_path, "SNC-4/flat")
    given = [cpu for core in range(17) for cpu in range(core, 272, 68)]
    found = place(tmp_path, given, rank("hydra", 0, 4))
    assert len(found.plan.compute) == 16
    assert "17 cores" in found.warnings[0]
    assert "18 cores" in found.warnings[0]


def test_ranks_that_were_pinned_together_divide_what_they_have(tmp_path, xeon):
    package = [*range(28), *range(56, 84)]
    second = place(xeon, package, rank("openmpi", 1, 4))
    assert second.plan.compute[0] == 14, "the second quarter of the machine is in the first package"
    assert len(second.plan.compute) == 13
    with pytest.raises(KnltrainError, match=r"together with other ranks.*28-.*--bind-to none"):
        place(xeon, package, rank("openmpi", 2, 4))


def test_more_ranks_than_cores_are_no_reason_to_refuse(tmp_path):
    trees.small(tmp_path)
    for local_rank in range(4):
        found = place(tmp_path, [local_rank % 2], rank("hydra", local_rank, 4))
        assert found.plan.compute == (local_rank % 2,)


def test_a_user_who_confines_a_process_is_obeyed(xeon):
    found = place(xeon, range(4), Ranks("none", 0, 1, 0, 1))
    assert found.plan.compute == (0, 1, 2, 3)
    assert "may run on 4 of 112 CPUs" in found.warnings[0]
    shares = [place(xeon, range(4), rank("torchrun", local_rank)).plan.compute for local_rank in (0, 1)]
    assert shares == [(0, 1), (2, 3)]


@pytest.mark.parametrize("given, part", [("16", True), ("16(x2),8", True), ("56", False), ("16,112", False),
                                         ("", False), ("many", False)])  # fmt: skip
def test_a_job_that_slurm_does_not_confine_to_its_part_of_the_node_says_so(given, part, xeon):
    node = read_node(xeon)
    found = plan_placement(rank("slurm"), node, node, environ={"SLURM_JOB_CPUS_PER_NODE": given})
    said = "Slurm gave this job 16 CPUs of this node and does not confine it to them: it takes all 56 cores"
    assert [said in warning for warning in found.warnings] == ([True] if part else [])


def test_a_rank_that_srun_gives_its_part_of_a_part_of_a_node_has_all_it_should(xeon):
    """Where Slurm binds tasks and makes no control groups for them: sbatch -n 2 -c 8 on a node of 56 cores."""

    def place(cpus, given):
        node, whole = read_node(xeon, allowed=set(cpus)), read_node(xeon)
        return plan_placement(rank("slurm"), node, whole, environ={"SLURM_JOB_CPUS_PER_NODE": given})

    # Where the parts are not equal, that of this node is not known: the smallest is asked for.
    for given in ("16", "16,112", "112(x2),16"):
        found = place(range(8), given)
        assert ({*found.plan.compute, *found.plan.comm}, found.warnings) == (set(range(8)), ())
    # The job has more than srun, which gives a task one CPU unless told otherwise, has passed on.
    for given in ("16", "112(x2)"):
        with pytest.raises(KnltrainError, match=r"slurm pinned rank 0 to 1 core .*--cpus-per-task"):
            place([0], given)


def test_a_job_that_is_confined_is_warned_of_nothing(xeon):
    few = read_node(xeon, allowed=set(range(8)))
    (said,) = plan_placement(rank("none", 0, 1), few, few, environ={"SLURM_JOB_CPUS_PER_NODE": "8"}).warnings
    assert said == "this process may run on 8 of 112 CPUs"


@pytest.mark.parametrize("launcher", ["hydra", "openmpi"])
def test_ranks_divide_the_cpus_that_their_launcher_was_confined_to(launcher, xeon, monkeypatch):
    """As torchrun's do: `taskset -c 0-31 mpiexec` has pinned nobody."""
    monkeypatch.setattr(placement, "read_node", functools.partial(read_node, xeon))

    def compute(mine, launchers, local_rank, local_size=2):
        monkeypatch.setattr(placement, "launcher_cpus", lambda rank, size: frozenset(launchers))
        ranks, node = rank(launcher, local_rank, local_size), read_node(xeon, allowed=set(mine))
        return plan_placement(ranks, node, placement.node_before_pinning(ranks, node), environ={})

    mask = (*range(16), *range(28, 44))
    both = [compute(mask, mask, local_rank).plan for local_rank in (0, 1)]
    assert [{*plan.compute, *plan.comm} for plan in both] == [set(range(16)), set(range(28, 44))]
    four = [compute(range(16), range(16), local_rank, 4).plan for local_rank in range(4)]
    assert sorted(cpu for plan in four for cpu in (*plan.compute, *plan.comm)) == list(range(16))
    assert "may run on 16 of 112 CPUs" in compute(range(16), range(16), 1).warnings[0]
    # What a launcher pins within such a mask is a rank's own.
    half = compute(range(8, 16), range(16), 1)
    assert ({*half.plan.compute, *half.plan.comm}, half.warnings) == (set(range(8, 16)), ())
    for mine, launchers in (([5], range(112)), ([5], [5]), ([5], ())):  # pinned; one core for two ranks; not seen
        with pytest.raises(KnltrainError, match="pinned rank 0 to 1 core"):
            compute(mine, launchers, 0)


def test_a_place_is_taken_before_torch_and_read_back(monkeypatch):
    code = """
import os, sys
from knltrain.launch.placement import bind_rank
place = bind_rank()
assert os.sched_getaffinity(0) == set(place.plan.compute)
assert os.environ["OMP_NUM_THREADS"] == str(place.plan.threads)
assert "torch" not in sys.modules
import torch
assert torch.get_num_threads() == place.plan.threads
torch.ones(1000, 1000) @ torch.ones(1000, 1000)
assert os.sched_getaffinity(0) == set(place.plan.compute), "no library has moved the first thread"
"""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "KMP_", "GOMP_"))}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert result.returncode == 0, result.stderr


def test_cpus_that_the_kernel_does_not_give_are_missed(monkeypatch, xeon):
    """As when the cpuset has shrunk since it was read: the kernel takes what is left without a word."""
    found = place(xeon, None, rank("torchrun", 0, 1))
    monkeypatch.setattr(placement, "find_placement", lambda *, strict: found)
    asked = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, cpus: asked.append(cpus))
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: {0, 1})
    with pytest.raises(KnltrainError, match=r"should compute on CPUs 0-55 and got 0-1: the control group"):
        placement.bind_rank()
    assert asked == [set(range(56))]
    (warning,) = placement.bind_rank(strict=False).warnings
    assert "got 0-1" in warning


def test_threads_that_were_moved_are_noticed(monkeypatch):
    mine = os.sched_getaffinity(0)
    if len(mine) < 2:
        pytest.skip("one CPU: nowhere to move")
    node = read_node()
    here = RankPlacement(node, Ranks("none", 0, 1, 0, 1), placement.plan_node(node, 1, environ={}).ranks[0])
    os.sched_setaffinity(0, here.plan.compute)
    assert binding_drift(here) == ""
    os.sched_setaffinity(0, {min(mine)})
    assert f"and is on {min(mine)} now" in binding_drift(here)
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    assert binding_drift(here) == "", "this user binds threads by other means"


def test_threads_are_born_where_their_maker_is_for_a_while():
    before = os.sched_getaffinity(0)
    with running_on((min(before),)):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ZeroDivisionError), running_on((min(before),)):
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == before
    with running_on(()):
        assert os.sched_getaffinity(0) == before


def test_memory_policy():
    """In a process of its own: the policy is read back from the kernel's own list of it."""
    code = """
import sys
from knltrain.node.binding import prefer_memory
problem = prefer_memory((0,))
if problem:
    sys.exit(f"refused: {problem}")
lines = open("/proc/self/numa_maps").read()
assert "prefer:0" in lines or "prefer (many):0" in lines, lines[:200]
assert prefer_memory(()) == ""
assert "prefer" not in open("/proc/self/numa_maps").read()
assert prefer_memory((1000,)) != "", "no such node"
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "refused: " in result.stderr or "numa_maps" in result.stderr:
        pytest.skip(f"this kernel or sandbox: {result.stderr.strip().splitlines()[-1]}")
    assert result.returncode == 0, result.stderr


def test_the_command_refuses_with_one_line(knltrain, tmp_path):
    cpus = sorted(os.sched_getaffinity(0))
    if len(read_node().cores) < 2 or len(cpus) < len(read_node().group_cpus):
        pytest.skip("needs two cores that nobody has taken")
    environment = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    arguments = ("train", "--recipe", "quickstart", "--data", "/nowhere", "--out", tmp_path / "run")
    result = knltrain(*arguments, cpus={cpus[0]}, **environment)
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert f"openmpi pinned rank 0 to 1 core (CPUs {cpus[0]})" in line
    result = knltrain(*arguments, "--no-strict-affinity", cpus={cpus[0]}, **environment)
    assert "warning: openmpi pinned rank 0" in result.stderr
    assert "/nowhere" in result.stderr.splitlines()[-1], "it went on to what is wrong next"
    os.sched_setaffinity(0, {cpus[0]})
    result = knltrain(*arguments, **environment)
    assert f"warning: this process may run on 1 of {len(cpus)} CPUs" in result.stderr
    assert "/nowhere" in result.stderr.splitlines()[-1], "the process that started it was confined, and pinned nobody"


def test_a_place_is_json_types(xeon):
    found = place(xeon, None, rank("hydra"))
    assert found.as_dict()["compute"] == found.plan.compute
    assert dataclasses.is_dataclass(found)
