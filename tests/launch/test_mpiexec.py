"""Which mpiexec is found, what it is told, and what becomes of exit codes and signals."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from knltrain.cli.main import main
from knltrain.errors import ConfigError, KnltrainError
from knltrain.launch import mpiexec
from knltrain.launch.mpiexec import Mpiexec, command_line, count_ranks, find_mpiexec

VERSIONS = {
    "intel": "Intel(R) MPI Library for Linux* OS, Version 2021.18.1 Build 20260626",
    "mpich": "HYDRA build details:\n    Version:                                 4.0.2",
    "openmpi": "mpiexec.openmpi (OpenRTE) 4.1.4",
}


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A Python environment and a PATH with no mpiexec; returns a function that writes one that says something."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "environment/bin/python"))

    def write(folder, says, code=0):
        path = tmp_path / folder / "bin/mpiexec"
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\nexit {code}\n")
        path.chmod(0o755)
        return path

    return write


@pytest.mark.parametrize("kind", VERSIONS)
def test_whose_it_is(kind, bare):
    path = bare("site", VERSIONS[kind])
    found = find_mpiexec({"PATH": f"/nowhere:{path.parent}:/usr/bin:/bin"})
    assert (found.kind, found.path, found.environment) == (kind, path, {})


def test_the_environments_comes_first_and_is_told_where_its_parts_are(bare):
    path = bare("environment", VERSIONS["intel"])
    other = bare("site", VERSIONS["openmpi"])
    prefix = path.parent.parent
    (prefix / "lib").mkdir()
    (prefix / "lib/libmpi.so.12").touch()
    (prefix / "opt/mpi").mkdir(parents=True)
    found = find_mpiexec({"PATH": f"{other.parent}:/usr/bin:/bin", "LD_LIBRARY_PATH": "/opt/lib"})
    assert (found.kind, found.path) == ("intel", path)
    assert found.environment == {"I_MPI_ROOT": str(prefix), "FI_PROVIDER_PATH": f"{prefix}/lib",
                                 "LD_LIBRARY_PATH": f"/opt/lib:{prefix}/lib"}  # fmt: skip
    # What the user has set stays.
    own = {"PATH": "/usr/bin:/bin", "I_MPI_ROOT": "/mine", "FI_PROVIDER_PATH": "/mine/prov"}
    assert set(find_mpiexec(own).environment) == {"LD_LIBRARY_PATH"}


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "PBS_NODEFILE", "LSB_JOBID", "PE_HOSTFILE"])
def test_in_a_batch_job_intel_mpi_is_told_that_ppn_counts(name, bare):
    job = {"PATH": f"{bare('site', VERSIONS['intel']).parent}:/usr/bin:/bin", name: "1"}
    assert find_mpiexec({**job, name: ""}).environment == {}
    assert find_mpiexec(job).environment == {"I_MPI_JOB_RESPECT_PROCESS_PLACEMENT": "0"}
    assert find_mpiexec({**job, "I_MPI_JOB_RESPECT_PROCESS_PLACEMENT": "1"}).environment == {}, "the user's word"


def test_none_and_an_unknown_one_are_one_line_with_the_remedy(bare):
    with pytest.raises(KnltrainError, match=r"pip install 'impi-rt.*MPI module"):
        find_mpiexec({"PATH": "/nowhere"})
    path = bare("site", "srun wrapper 1.0")
    with pytest.raises(KnltrainError, match=r"none of Intel MPI's.*'srun wrapper 1.0'"):
        find_mpiexec({"PATH": f"{path.parent}:/usr/bin:/bin"})
    path.write_text("no program")
    with pytest.raises(KnltrainError, match="--version"):
        find_mpiexec({"PATH": str(path.parent)})


@pytest.mark.parametrize("ranks, per_node, nodes, planned, expected", [
    (None, None, 1, 4, (4, 4)), (None, None, 8, 2, (16, 2)), (2, None, 1, 4, (2, 2)), (6, None, 4, 8, (6, 2)),
    (None, 3, 2, 1, (6, 3)), (5, 3, 2, 1, (5, 3)), (1, 4, 1, 1, (1, 1)),
])  # fmt: skip
def test_how_many(ranks, per_node, nodes, planned, expected):
    assert count_ranks(ranks, per_node, nodes, planned) == expected


def test_too_many():
    with pytest.raises(ConfigError, match="-n 7 does not fit 2 node"):
        count_ranks(7, 3, 2, 1)


@pytest.mark.parametrize("kind, expected", [
    ("intel", "m -n 4 -ppn 2 -hosts a,b -genv I_MPI_PIN 0 p"),
    ("mpich", "m -n 4 -ppn 2 -hosts a,b -bind-to none p"),
    ("openmpi", "m -n 4 --map-by ppr:2:node --bind-to none --host a:2,b:2 -x CCL_X -x KNLTRAIN_ISA -x PATH p"),
])  # fmt: skip
def test_lines(kind, expected):
    environ = {"KNLTRAIN_ISA": "avx2", "CCL_X": "1", "HOME": "/root", "PATH": "/bin"}
    mpi = Mpiexec(Path("m"), kind, {})
    assert " ".join(command_line(mpi, 4, 2, ["a", "b"], ["p"], environ)) == expected
    alone = command_line(mpi, 2, 2, [], ["p"], {})
    assert not {"-hosts", "--host"} & set(alone)


def test_a_dry_run_prints_and_starts_nothing(knltrain, tmp_path):
    (tmp_path / "mpiexec").write_text(
        f"#!/bin/sh\necho '{VERSIONS['mpich']}'\n[ \"$1\" = --version ] || touch started\n"
    )
    (tmp_path / "mpiexec").chmod(0o755)
    if (Path(sys.executable).parent / "mpiexec").exists():
        pytest.skip("this environment has an mpiexec, which comes first")
    path = f"{tmp_path}:{os.environ['PATH']}"
    arguments = ("launch", "--ppn", "2", "--hosts", "n1,n2", "--dry-run")
    result = knltrain(*arguments, "--", "train", "--recipe", "quickstart", PATH=path)
    words = shlex.split(result.stdout)
    assert words[:8] == [str(tmp_path / "mpiexec"), "-n", "4", "-ppn", "2", "-hosts", "n1,n2", "-bind-to"]
    assert words[-5:] == ["-m", "knltrain", "train", "--recipe", "quickstart"]
    result = knltrain(*arguments, "--json", "--", "train", PATH=path)
    assert json.loads(result.stdout)["ranks"] == 4
    assert not (tmp_path / "started").exists()


@pytest.fixture
def dry_run(monkeypatch):
    """Runs a launch that only prints, with an mpiexec of MPICH; returns click's result."""
    monkeypatch.setattr(mpiexec, "find_mpiexec", lambda: Mpiexec(Path("/mpi/mpiexec"), "mpich", {}))

    def run(*options, **environ):
        arguments = ["launch", "--ppn", "2", "--dry-run", "--json", *options, "--", "train"]
        return CliRunner().invoke(main, arguments, env=environ)

    return run


def test_a_slurm_jobs_nodes_are_counted(dry_run):
    found = json.loads(dry_run(SLURM_JOB_NUM_NODES="3").stdout)
    assert (found["ranks"], found["hosts"]) == (6, []), "mpiexec reads Slurm's list by itself"
    assert json.loads(dry_run(SLURM_JOB_NUM_NODES="").stdout)["ranks"] == 2
    result = dry_run(SLURM_JOB_NUM_NODES="some")
    assert result.exit_code == 2
    assert "SLURM_JOB_NUM_NODES=some is not a number" in result.stderr


@pytest.mark.parametrize("given, hosts", [
    ("n1,n1,n2,n2", "n1,n2"), ("n1, n2", "n1,n2"), ("n[1-2]", "n1,n2"), ("node[001-003,7],gpu-a",
    "node001,node002,node003,node7,gpu-a"), ("10.0.0.1, a.site.org", "10.0.0.1,a.site.org"),
])  # fmt: skip
def test_hosts_are_expanded_and_counted_once(given, hosts, dry_run):
    found = json.loads(dry_run("--hosts", given).stdout)
    assert (",".join(found["hosts"]), found["ranks"]) == (hosts, 2 * len(hosts.split(",")))
    assert found["command"][found["command"].index("-hosts") + 1] == hosts


@pytest.mark.parametrize(
    "given", ["", "n1,", "n1:2", "n1 n2", "-rf", "4", "n[1-", "n[2-1]", "n1;n2", "10.0.0.999", "n[]"]
)
def test_what_is_no_host_is_refused(given, dry_run):
    result = dry_run("--hosts", given)
    assert result.exit_code == 2
    assert "is not a list of nodes" in result.stderr
    assert result.stdout == ""


def test_the_nodes_of_other_batch_systems_are_taken(dry_run, tmp_path):
    (tmp_path / "nodes").write_text("n1\nn1\nn2\nn2\n")
    (tmp_path / "pe").write_text("n1 2 all.q UNDEFINED\nn2 2 all.q UNDEFINED\n")
    for job in ({"PBS_NODEFILE": str(tmp_path / "nodes")}, {"PE_HOSTFILE": str(tmp_path / "pe")},
                {"LSB_MCPU_HOSTS": "n1 2 n2 2"}):  # fmt: skip
        found = json.loads(dry_run(**job).stdout)
        assert (found["hosts"], found["ranks"]) == (["n1", "n2"], 4)
        assert json.loads(dry_run("--hosts", "n3", **job).stdout)["hosts"] == ["n3"]
    result = dry_run(PBS_NODEFILE=str(tmp_path / "gone"))
    assert (result.exit_code, result.stdout) == (2, "")
    result = dry_run(FLUX_JOB_NNODES="2")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "start ranks with flux run -N NODES -n TASKS knltrain train" in result.stderr


def test_the_commands_agree_about_the_launcher(knltrain):
    """And a launcher does not start launchers."""
    unknown = "a PMIx launcher (prun, prterun) seems to have started this process as one of several (PMIX_RANK=1)"
    commands = (("launch", "--dry-run", "--", "train"), ("plan",), ("train", "--recipe", "quickstart"))
    for arguments in commands:
        result = knltrain(*arguments, PMIX_RANK="1")
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(f"knltrain: rank 1: {unknown}")
    step = {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_LOCAL_RANK": "1",
            "MV2_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
    assert knltrain("plan", **step).stdout.endswith("launcher: mvapich, rank 1 of 2\n")
    result = knltrain("plan", "--format", "json", **step)
    assert json.loads(result.stdout)["launcher"] == {"name": "mvapich", "rank": 1, "size": 2}
    result = knltrain(*commands[0], **step)
    assert (result.returncode, result.stdout) == (2, "")
    assert "mvapich has started 2 processes already" in result.stderr


def needs_mpiexec():
    if not (Path(sys.executable).parent / "mpiexec").exists() and shutil.which("mpiexec") is None:
        pytest.skip("no mpiexec: neither impi-rt in this environment nor one on the PATH")


def test_the_ranks_exit_code_and_their_words_come_through(knltrain, tmp_path):
    needs_mpiexec()
    result = knltrain("launch", "-n", "2", "--", "train", "--recipe", "cifar-256", "--data", "/nowhere", "--out",
                      tmp_path / "run", timeout=120)  # fmt: skip
    assert result.returncode == 1
    assert "/nowhere" in result.stderr
    assert "mpiexec -n 2" in result.stderr, "the line that was run"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_ranks_and_leaves_no_process(number, tmp_path):
    needs_mpiexec()
    if find_mpiexec().kind == "openmpi":
        pytest.skip("Open MPI kills ranks a second after the signal")
    out = tmp_path / "run"
    command = [sys.executable, "-m", "knltrain", "launch", "-n", "2", "--", "train", "--recipe", "quickstart",
               "--data", "shapes", "--out", str(out), "--global-batch", "64", "--epochs", "500"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                               start_new_session=True)  # fmt: skip
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 150
    while not (metrics.exists() and metrics.read_text().count("\n") > 3) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 75, errors
    assert list((out / "checkpoints").iterdir())
    assert not [entry for entry in Path("/proc").glob("[0-9]*") if str(out) in _command_of(entry)]


def _command_of(process):
    try:
        return (process / "cmdline").read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""
