"""Four hosts: started by mpiexec over ssh with nothing exported by hand, and what happens when one of them is lost."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import listening
from cluster.hosts import need, until
from cluster.runs import GLOO, KNLTRAIN, SMALL, assert_same_training, losses, mpiexec, plan

LISTENER = [sys.executable, listening.__file__]
TIMEOUT_S = 4
# What is left to do after the time-out: to find out who is lost, to tell it, and for mpiexec to clean up.
ENDING_S = 45


def on_all(network, *program):
    """mpiexec on the first host, which starts a rank of a program on each."""
    hosts = ",".join(host.name for host in network.hosts)
    command = mpiexec("-bootstrap-exec", network.ssh, "-hosts", hosts, "-ppn", 1, "-n", len(network.hosts))
    return [str(word) for word in network.hosts[0].inside(*command, *program)]


def ranks_of(host):
    return [pid for pid, line in host.guests("knltrain train").items() if line.startswith(sys.executable)]


@pytest.fixture
def environment():
    """One thread a rank: the hosts share the cores of this machine, and none of them knows."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


@pytest.mark.parametrize("backend", ["gloo", "ccl"])
def test_ranks_on_four_hosts_train_what_one_trains(backend, network, environment, alone, image_folder, tmp_path):
    out = tmp_path / "run"
    train = ["train", *SMALL, "--comm.backend", backend, "--max-steps", 3, "--data", image_folder, "--out", out]
    command = on_all(network, *KNLTRAIN, *train)
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    assert_same_training(out, alone)
    who = plan(out)
    assert (who["launcher"], who["world_size"], who["ranks_per_node"]) == ("hydra", 4, 1)
    assert who["interface"] == "fab0", "neither the one of the default route nor the one that all hosts have"
    assert "Connection reset" not in result.stderr, "nobody comes to the first rank before it listens"


def test_ccl_keeps_its_promises_between_four_hosts(network, environment, tmp_path):
    """What tests/comm asks of ranks on one host."""
    script = Path(__file__).parents[1] / "comm" / "conformance_ranks.py"
    command = on_all(network, sys.executable, script, tmp_path, "ccl")
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    outcomes = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank*.json"))]
    wrong = {name: text for outcome in outcomes for name, text in outcome.items() if text != "passed"}
    assert not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())
    assert result.returncode == 0, result.stderr
    assert len(outcomes) == len(network.hosts)


@pytest.mark.parametrize("backend", ["gloo", "ccl"])
def test_ranks_listen_on_the_network_between_the_hosts_alone(backend, network, environment):
    command = on_all(network, *LISTENER, backend)
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    found = listening.of_ranks(result.stdout)
    assert found.keys() == set(range(len(network.hosts)))
    for rank, host in enumerate(network.hosts):
        assert set(found[rank]) - {"127.0.0.1"} == {host.address}  # oneCCL speaks to itself over loopback


# As srun tells it, the first host's own name being loopback's there; and as a user does.
@pytest.mark.parametrize("told", ["slurm", "user"])
def test_the_first_rank_listens_where_the_others_look_for_it_alone(told, network, environment):
    processes = []
    try:
        for rank, host in enumerate(network.hosts[:2]):
            if told == "slurm":
                words = {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": 2, "SLURM_LOCALID": 0, "SLURM_NODEID": rank,
                         "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "node[1-2]"}  # fmt: skip
            else:
                words = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 29512,
                         "MASTER_ADDR": network.hosts[0].address}  # fmt: skip
            given = {name: str(value) for name, value in words.items()}
            processes.append(
                subprocess.Popen(host.inside(*LISTENER, "gloo"), stdout=subprocess.PIPE, text=True,
                                 env={**environment, **given})
            )  # fmt: skip
        output = "".join(process.communicate(timeout=120)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert listening.of_ranks(output) == {rank: [host.address] for rank, host in enumerate(network.hosts[:2])}


def stop(network, host):
    (pid,) = ranks_of(host)
    os.kill(pid, signal.SIGSTOP)


def kill(network, host):
    (pid,) = ranks_of(host)
    os.kill(pid, signal.SIGKILL)


def cut(network, host):
    network.cut(host)


# The first rank keeps what the others ask who is there.
@pytest.mark.parametrize(("fault", "victim"), [(kill, 2), (stop, 2), (stop, 0), (cut, 2)])
def test_a_lost_rank_ends_the_job_and_is_named(fault, victim, network, environment, image_folder, tmp_path):
    out, said, lost = tmp_path / "run", tmp_path / "said", network.hosts[victim]
    endless = ["--global-batch", "16", "--local-batch", "4", "--epochs", "1e5", "--checkpoint.every", "1e5"]
    train = ["train", *SMALL, *GLOO, *endless, "--comm.timeout-s", TIMEOUT_S, "--data", image_folder, "--out", out]
    with said.open("w") as file:
        job = subprocess.Popen(on_all(network, *KNLTRAIN, *train), stdout=file, stderr=file, env=environment)
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
        assert re.search(rf"RANK {victim} PID \d+ RUNNING AT {lost.name}", text)
    else:
        step = len(losses(out))
        assert f"rank {victim} on {lost.name} has ended or does not answer; all ranks finished step {step}" in text
    assert "Traceback" not in text


def trained(out):
    return len(losses(out)) if (out / "metrics.jsonl").exists() else 0


def test_hosts_end_with_the_process_that_made_them(tmp_path):
    need("unshare", "nsenter", "setpriv", "ip")
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom cluster.hosts import Host\n"
        "print(Host('lonely', Path(sys.argv[1])).pid, flush=True)\ntime.sleep(300)\n"
    )
    tests = str(Path(__file__).parents[1])
    maker = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "host"], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": tests},
    )  # fmt: skip
    first = Path("/proc", maker.stdout.readline().strip())
    assert (first / "ns").exists()
    maker.kill()
    maker.communicate()
    until(lambda: not first.exists(), 20, f"{first} is gone")
