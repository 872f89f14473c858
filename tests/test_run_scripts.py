"""What the scripts for clusters start, seen by programs that stand in for the real ones and note their arguments."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "run"


@pytest.fixture
def script(tmp_path):
    """Runs a copy of a script, so that no environment beside it is taken; returns its process and what it started."""
    log = tmp_path / "log"

    def stand_in(name, body=""):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\necho {name} "$@" >>{log}\n{body}\n')
        path.chmod(0o755)

    def run(name, *arguments, plan="", srun="", **environment):
        shutil.copytree(RUN, tmp_path / "run", dirs_exist_ok=True)
        stand_in("knltrain", plan)
        stand_in("srun", srun)
        stand_in("scontrol")
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        result = subprocess.run(
            ["bash", tmp_path / "run" / name, *arguments], capture_output=True, text=True, timeout=60,
            env={**os.environ, "PATH": path, **environment},
        )  # fmt: skip
        return result, log.read_text().splitlines() if log.exists() else []

    return run


def test_an_environment_is_made_once_and_its_kernels_built_once(tmp_path):
    """Other extras are installed into it without a build, and other kernels are built."""
    shutil.copytree(RUN, tmp_path / "run")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "env" / "bin").mkdir(parents=True)
    python, log = tmp_path / "env" / "bin" / "python", tmp_path / "log"
    python.write_text(f'#!/bin/sh\necho "$@" >>{log}\n')
    python.chmod(0o755)

    def make(kernel, *requirements):
        (tmp_path / "kernels" / "one.cpp").write_text(kernel)
        log.write_text("")
        subprocess.run(["bash", "-euc", '. run/environment.sh; make_environment "$@"', "-", "env", *requirements],
                       cwd=tmp_path, check=True, capture_output=True, timeout=60)  # fmt: skip
        return [line.removeprefix("-m pip install --quiet --disable-pip-version-check ")
                for line in log.read_text().splitlines()]  # fmt: skip

    assert make("1", "-e", ".[intel]") == ["-e .[intel]"]
    assert make("1", "-e", ".[intel]") == []
    assert make("1", "torch==2", "-e", ".[intel,test]") == ["torch==2 knltrain[intel,test]"]
    assert make("2", "-e", ".[intel]") == ["-e .[intel]"]
    assert make("2", "torch==2", "-e", ".[intel,test]") == ["torch==2 knltrain[intel,test]"]
    assert make("2", "torch==2", "-e", ".[intel,test]") == []


def test_single_node(script):
    two = 'case "$*" in *json*) printf \'"local_rank": 0\\n"local_rank": 1\\n\';; esac'
    result, started = script("single_node.sh", "--recipe", "a b", plan=two)
    assert result.returncode == 0, result.stderr
    assert started[-1] == "knltrain launch -n 2 -- train --recipe a b"
    one = 'case "$*" in *json*) echo \'"local_rank": 0\';; train*) exit 75;; esac'
    result, started = script("single_node.sh", "--recipe", "x", plan=one, RANKS_PER_NODE="1")
    assert started[-3:] == ["knltrain plan --ranks-per-node 1", "knltrain plan --ranks-per-node 1 --format json",
                            "knltrain train --recipe x"]  # fmt: skip
    assert result.returncode == 75


def test_mpiexec(script):
    result, started = script("mpiexec.sh", "n1,n2", "--recipe", "x", RANKS_PER_NODE="4")
    assert result.returncode == 0, result.stderr
    assert started == ["knltrain launch --hosts n1,n2 --ppn 4 -- train --recipe x"]
    result, _ = script("mpiexec.sh")
    assert result.returncode != 0
    assert "give the nodes first" in result.stderr


def test_xeon_phi(script):
    result, started = script("xeon_phi.sh", "--recipe", "x", HOSTS="p1,p2")
    assert result.returncode == 0, result.stderr
    assert started == ["knltrain plan", "knltrain launch --hosts p1,p2 -- train --precision fp32 --recipe x"]
    if "avx512er" not in Path("/proc/cpuinfo").read_text():
        assert script("xeon_phi.sh", "--recipe", "x")[0].returncode == 2


@pytest.mark.parametrize("code", [0, 1, 75])
def test_sweep(code, script, tmp_path):
    """Each task of the array trains a run of its own."""
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_CPUS_ON_NODE": "8", "SLURM_JOB_ID": "19",
           "SLURM_ARRAY_JOB_ID": "19"}  # fmt: skip
    result, started = script("sweep.sbatch", "--recipe", "x", "--data", "a b", srun=f"exit {code}",
                             SLURM_ARRAY_TASK_ID="4", **job)  # fmt: skip
    assert result.returncode == code
    assert started[0] == "srun --cpus-per-task=8 --cpu-bind=none knltrain sweep --recipe x --data a b --task 4"
    assert started[1:] == (["scontrol requeue 19_4"] if code == 75 else [])
    alone, _ = script("sweep.sbatch", "--recipe", "x", **job)
    assert alone.returncode == 1
    assert "give sbatch --array" in alone.stderr


@pytest.mark.parametrize("code", [0, 1, 75])
def test_slurm(code, script, tmp_path):
    """A run that was stopped after a checkpoint is queued again; one that failed is not."""
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_CPUS_ON_NODE": "272", "SLURM_NTASKS_PER_NODE": "4",
           "SLURM_JOB_ID": "17"}  # fmt: skip
    result, started = script("slurm.sbatch", "--recipe", "x", srun=f"exit {code}", **job)
    assert result.returncode == code
    assert started[0] == ("srun --cpus-per-task=68 --cpu-bind=none --kill-on-bad-exit=1 knltrain train --recipe x")
    assert started[1:] == (["scontrol requeue 17"] if code == 75 else [])
    _, started = script("slurm.sbatch", srun=f"exit {code}", SLURM_ARRAY_JOB_ID="17", SLURM_ARRAY_TASK_ID="3", **job)
    assert ("scontrol requeue 17_3" in started) == (code == 75)
