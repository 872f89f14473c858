"""Clusters on this machine, for the tests that need one."""

import pytest
from cluster.hosts import Network, need
from cluster.runs import SMALL, train_here
from cluster.slurm import Slurm


@pytest.fixture(scope="session")
def alone(image_folder, tmp_path_factory):
    """The small run on one rank."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train_here(*SMALL, "--max-steps", 3, "--data", image_folder, "--out", out)
    return out


@pytest.fixture(scope="session")
def _slurm(tmp_path_factory):
    need("unshare", "nsenter", "setpriv", "ip", "munged", "slurmctld", "slurmd", "srun", "sbatch")
    slurm = Slurm(tmp_path_factory.mktemp("slurm") / "cluster")
    yield slurm
    slurm.stop()


@pytest.fixture
def slurm(_slurm):
    """A one-node Slurm without jobs."""
    yield _slurm
    _slurm.clear()


@pytest.fixture(scope="session")
def _network(tmp_path_factory):
    need("unshare", "nsenter", "setpriv", "ip", "sshd", "ssh", "ssh-keygen")
    network = Network(["node1", "node2", "node3", "node4"], tmp_path_factory.mktemp("hosts") / "net")
    yield network
    network.close()


@pytest.fixture
def network(_network):
    """Four hosts on which nothing runs, all links up."""
    yield _network
    _network.clear()
