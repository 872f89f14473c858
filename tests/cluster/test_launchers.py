"""Training under every launcher, with nothing exported by hand, is training on one rank."""

import json

import pytest
from cluster.runs import GLOO, KNLTRAIN, SMALL, assert_same_training, mpiexec, need_program, plan, start

# launcher, ranks, what the product calls it; two ranks of torchrun and of Intel MPI are in test_ranks_together.py
LAUNCHERS = [("Intel MPI", 4, "hydra"), ("MPICH", 2, "hydra"), ("Open MPI", 2, "openmpi")]


def command(launcher, ranks):
    if launcher == "Intel MPI":
        return [*mpiexec("-n", ranks), *KNLTRAIN]
    if launcher == "MPICH":
        return [need_program("mpiexec.mpich"), "-n", ranks, *KNLTRAIN]
    # It refuses root, and more ranks than cores.
    more = ["--allow-run-as-root", "--oversubscribe"]
    return [need_program("mpiexec.openmpi"), *more, "-n", ranks, *KNLTRAIN]


@pytest.mark.parametrize(("launcher", "ranks", "known_as"), LAUNCHERS)
def test_ranks_together_train_what_one_trains(launcher, ranks, known_as, alone, image_folder, tmp_path):
    out = tmp_path / "run"
    more = ["--max-steps", 3, "--data", image_folder, "--out", out, "--json"]
    result = start([*command(launcher, ranks), "train", *SMALL, *GLOO, *more])
    assert result.returncode == 0, result.stderr
    check(result.stdout, out, ranks, known_as)
    assert_same_training(out, alone)


@pytest.mark.parametrize("way", [["--mpi=pmi2"], ["--mpi=none", "--cpu-bind=none"]], ids=" ".join)
def test_ranks_under_srun_train_what_one_trains(way, slurm, alone, image_folder, tmp_path):
    out = tmp_path / "run"
    more = ["--max-steps", 3, "--data", image_folder, "--out", out, "--json"]
    result = slurm.run("srun", "-n2", *way, *KNLTRAIN, "train", *SMALL, *GLOO, *more, timeout=120)
    check(result.stdout, out, 2, "slurm")
    assert_same_training(out, alone)


@pytest.mark.parametrize("launcher", ["Intel MPI", "MPICH", "Open MPI"])
def test_a_rank_that_refuses_ends_those_that_wait_for_it(launcher, image_folder, tmp_path):
    good = [*command(launcher, 1), "train", *SMALL, *GLOO, "--data", image_folder, "--out", tmp_path / "run"]
    result = start([*good, ":", "-n", 1, *KNLTRAIN, "train", "--recipe", "nosuch"], timeout=60)
    assert "knltrain: rank 1: no recipe 'nosuch'" in result.stderr
    assert result.returncode == 2
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def check(stdout, out, ranks, known_as):
    summary = json.loads(stdout.strip().splitlines()[-1])
    assert (summary["world_size"], summary["steps"], summary["finished"]) == (ranks, 3, True)
    assert stdout.count('"top1"') == 1, "rank 0 alone speaks"
    assert plan(out)["launcher"] == known_as
    assert plan(out)["ranks_per_node"] == ranks
