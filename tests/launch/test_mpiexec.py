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

from knltrain.errors import ConfigError, KnltrainError
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


def test_in_a_slurm_job_intel_mpi_is_told_that_ppn_counts(bare):
    job = {"PATH": f"{bare('site', VERSIONS['intel']).parent}:/usr/bin:/bin", "SLURM_JOB_ID": "1"}
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


def test_a_slurm_jobs_nodes_are_counted(knltrain):
    needs_mpiexec()
    result = knltrain("launch", "--ppn", "2", "--dry-run", "--json", "--", "train", SLURM_JOB_NUM_NODES="3")
    assert json.loads(result.stdout)["ranks"] == 6


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
