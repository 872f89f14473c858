"""Four hosts: started by mpiexec over ssh with nothing exported by hand, and what happens when one of them is lost."""

import os
import re
import signal
import subprocess
import sys

import pytest
from cluster.hosts import until
from cluster.runs import GLOO, KNLTRAIN, SMALL, assert_same_training, losses, mpiexec, plan

TIMEOUT_S = 4
# What is left to do after the time-out: to find out who is lost, to tell it, and for mpiexec to clean up.
ENDING_S = 45


def on_all(network):
    """mpiexec on the first host, which starts a rank on each."""
    hosts = ",".join(host.name for host in network.hosts)
    command = mpiexec("-bootstrap-exec", network.ssh, "-hosts", hosts, "-ppn", 1, "-n", len(network.hosts))
    return network.hosts[0].inside(*command, *KNLTRAIN)


def ranks_of(host):
    return [pid for pid, line in host.guests("knltrain train").items() if line.startswith(sys.executable)]


@pytest.fixture
def environment():
    """One thread a rank: the hosts share the cores of this machine, and none of them knows."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def test_ranks_on_four_hosts_train_what_one_trains(network, environment, alone, image_folder, tmp_path):
    out = tmp_path / "run"
    command = [*on_all(network), "train", *SMALL, *GLOO, "--max-steps", "3", "--data", image_folder, "--out", out]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    assert_same_training(out, alone)
    who = plan(out)
    assert (who["launcher"], who["world_size"], who["ranks_per_node"]) == ("hydra", 4, 1)
    assert who["interface"] == "fab0", "neither the one of the default route nor the one that all hosts have"
    assert "Connection reset" not in result.stderr, "nobody comes to the first rank before it listens"


def stop(network, host):
    (pid,) = ranks_of(host)
    os.kill(pid, signal.SIGSTOP)


def kill(network, host):
    (pid,) = ranks_of(host)
    os.kill(pid, signal.SIGKILL)


def cut(network, host):
    network.cut(host)


@pytest.mark.parametrize("fault", [kill, stop, cut], ids=lambda fault: fault.__name__)
def test_a_lost_rank_ends_the_job_and_is_named(fault, network, environment, image_folder, tmp_path):
    out, said, lost = tmp_path / "run", tmp_path / "said", network.hosts[2]
    endless = ["--global-batch", "16", "--local-batch", "4", "--epochs", "1e5", "--checkpoint.every", "1e5"]
    command = [*on_all(network), "train", *SMALL, *GLOO, *endless, "--comm.timeout-s", TIMEOUT_S,
               "--data", image_folder, "--out", out]  # fmt: skip
    with said.open("w") as file:
        job = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, env=environment)
    try:
        until(lambda: job.poll() is not None or trained(out) >= 3, 120, "three steps")
        assert job.poll() is None, said.read_text()
        fault(network, lost)
        until(lambda: job.poll() is not None, TIMEOUT_S + ENDING_S, lambda: f"mpiexec ends: {said.read_text()}")
        for host in network.hosts:
            until(lambda host=host: not ranks_of(host), ENDING_S, lambda host=host: f"ranks are left: {host.guests()}")
        network.mend()
        for host in network.hosts:
            until(lambda host=host: not host.guests(), ENDING_S, lambda host=host: f"left: {host.guests()}")
    finally:
        job.kill()
        job.wait()
    assert job.returncode != 0
    text = said.read_text()
    if fault is kill:  # mpiexec is the first to know, and ends the others before they can say so
        assert re.search(r"RANK 2 PID \d+ RUNNING AT node3", text)
    else:
        step = len(losses(out))
        assert f"rank 2 on node3 has ended or does not answer; all ranks finished step {step}" in text
    assert "Traceback" not in text


def trained(out):
    return len(losses(out)) if (out / "metrics.jsonl").exists() else 0
