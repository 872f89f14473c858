"""What a batch system has given to a job, and who trains alone in it."""

import pytest

from knltrain.errors import ConfigError
from knltrain.launch.allocation import read_allocation
from knltrain.launch.world import discover

SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}


@pytest.fixture
def nodefile(tmp_path):
    def write(text):
        path = tmp_path / "nodes"
        path.write_text(text)
        return str(path)

    return write


def test_the_nodes_of_each_batch_system(nodefile):
    pbs = read_allocation({"PBS_NODEFILE": nodefile("n1\nn1\nn2\nn2\n\n")})
    assert (pbs.system, pbs.nodes, pbs.tasks, pbs.hosts) == ("PBS", 2, 4, ("n1", "n2"))
    torque = read_allocation({"PBS_NODEFILE": nodefile("n1\n" * 64), "PBS_NUM_PPN": "64"})
    assert (torque.nodes, torque.tasks, torque.hosts) == (1, 0, ("n1",))
    sge = read_allocation({"PE_HOSTFILE": nodefile("n1.site 8 all.q@n1.site UNDEFINED\nn2.site 8 all.q@n2 <NULL>\n")})
    assert (sge.system, sge.hosts) == ("SGE", ("n1.site", "n2.site"))
    for lsf in ({"LSB_HOSTS": "n1 n1 n2 n2"}, {"LSB_MCPU_HOSTS": "n1 2 n2 2"},
                {"LSB_DJOB_HOSTFILE": nodefile("n1\nn1\nn2\nn2\n"), "LSB_HOSTS": "other"}):  # fmt: skip
        assert read_allocation(lsf)[:2] == ("LSF", 2)
        assert read_allocation(lsf).hosts == ("n1", "n2")
    assert read_allocation(SLURM)[:4] == ("Slurm", 2, 4, ())
    assert read_allocation({"FLUX_JOB_NNODES": "2", "FLUX_JOB_SIZE": "4"})[:3] == ("Flux", 2, 4)
    assert read_allocation({"PATH": "/bin"}) is None


def test_a_flux_instance_knows_its_size(tmp_path, monkeypatch):
    assert read_allocation({"FLUX_ENCLOSING_ID": "f1"})[:2] == ("Flux", 0), "no flux here"
    (tmp_path / "flux").write_text('#!/bin/sh\n[ "$*" = "getattr size" ] && echo 3\n')
    (tmp_path / "flux").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert read_allocation({"FLUX_ENCLOSING_ID": "f1"})[:2] == ("Flux", 3)


def test_what_is_damaged_is_named(nodefile, tmp_path):
    for damage, message in (
        ({"PBS_NODEFILE": str(tmp_path / "gone")}, r"PBS_NODEFILE=.*No such file.*--hosts"),
        ({"PE_HOSTFILE": str(tmp_path)}, "PE_HOSTFILE=.*Is a directory"),
        ({"PBS_NODEFILE": nodefile("-rf 1\n")}, "PBS_NODEFILE '-rf' is not a list of nodes"),
        ({"LSB_HOSTS": "a;b"}, "'a;b' is no host"),
        ({"SLURM_JOB_NUM_NODES": "many"}, "SLURM_JOB_NUM_NODES=many is not a number"),
        ({"SLURM_JOB_NUM_NODES": "-2"}, "SLURM_JOB_NUM_NODES=-2 is less than nothing"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_allocation(damage)
        assert discover(damage).warnings == (), "a run on one node needs none of it"


@pytest.mark.parametrize("job, says", [
    (SLURM, "this Slurm job has 2 nodes and 4 tasks, and no launcher started this process"),
    ({"SLURM_NNODES": "1", "SLURM_NTASKS": "2"}, "Slurm job has 2 tasks"),
    ({"LSB_HOSTS": "n1 n1 n2"}, "LSF job has 2 nodes"),
    ({"FLUX_JOB_NNODES": "2", "FLUX_JOB_SIZE": "2"}, "Flux job has 2 nodes and 2 tasks"),
    # The shell of salloc is a step of one task.
    ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "4294967290"}, "Slurm job has 2 nodes"),
])  # fmt: skip
def test_a_job_script_that_forgot_its_launcher_is_told(job, says):
    (warning,) = discover(job).warnings
    assert says in warning
    assert "it trains alone, on one node; start the ranks of one run with" in warning


@pytest.mark.parametrize("job", [
    {}, {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {"LSB_HOSTS": "n1 n1"},
    {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "0"},  # srun -n 1: as asked
    {"SLURM_JOB_NUM_NODES": "", "SLURM_NTASKS": ""},
])  # fmt: skip
def test_a_job_of_one_task_is_told_nothing(job):
    assert discover(job).warnings == ()


def test_train_and_doctor_say_it(knltrain, tmp_path, nodefile):
    job = {"PBS_NODEFILE": nodefile("n1\nn2\n")}
    result = knltrain("train", "--recipe", "quickstart", "--data", "/nowhere", "--out", tmp_path / "run", **job)
    assert "warning: this PBS job has 2 nodes and 2 tasks, and no launcher started this process" in result.stderr
    assert "knltrain launch -- train" in result.stderr
