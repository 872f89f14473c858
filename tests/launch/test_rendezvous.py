"""Ranks on several nodes find each other: with a process manager made of a socket, and with those there are."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from knltrain.errors import ConfigError, KnltrainError
from knltrain.launch import rendezvous
from knltrain.launch.pmi import Pmi
from knltrain.launch.rendezvous import Rendezvous, agree_on_address, find_rendezvous, interface_towards, own_addresses
from knltrain.launch.world import Ranks, discover


class Manager:
    """A PMI-1 server for so many ranks, each over a socket of its own, in threads that end with their client."""

    def __init__(self, size):
        self.values, self.lines = {}, defaultdict(list)
        self.barrier = threading.Barrier(size)
        self.clients, servers = zip(*(socket.socketpair() for _ in range(size)), strict=True)
        for rank, server in enumerate(servers):
            threading.Thread(target=self._serve, args=(rank, server), daemon=True).start()

    def _serve(self, rank, server):
        with server, server.makefile("rw") as stream:
            for line in stream:
                self.lines[rank].append(line.strip())
                fields = dict(part.split("=", 1) for part in line.split())
                stream.write(self._answer(fields) + "\n")
                stream.flush()

    def _answer(self, fields):
        match fields["cmd"]:
            case "init":
                return "cmd=response_to_init pmi_version=1 pmi_subversion=1 rc=0"
            case "get_my_kvsname":
                return "cmd=my_kvsname kvsname=kvs_1"
            case "put":
                assert len(fields["key"]) <= 64
                assert len(fields["value"]) <= 1024
                self.values[fields["key"]] = fields["value"]
                return "cmd=put_result rc=0 msg=success"
            case "get":
                if fields["key"] not in self.values:
                    return "cmd=get_result rc=-1 msg=key_not_found value=unknown"
                return f"cmd=get_result rc=0 msg=success value={self.values[fields['key']]}"
            case "barrier_in":
                self.barrier.wait(timeout=20)
                return "cmd=barrier_out"
            case "finalize":
                return "cmd=finalize_ack"

    def close(self):
        for client in self.clients:
            client.close()


@pytest.fixture
def manager():
    managers = []

    def make(size):
        managers.append(Manager(size))
        return managers[-1]

    yield make
    for one in managers:
        one.close()


def test_texts_go_round(manager):
    made = manager(3)

    def rank(number):
        with contextlib.closing(Pmi(made.clients[number].fileno(), 20)) as pmi:
            first = pmi.all_gather(number, f"first = {number} %\n")
            second = pmi.all_gather(number, f"second {number}")
            return [first(other) for other in range(3)] + [second(2)]

    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(rank, range(3)))
    assert all(os.get_blocking(client.fileno()) for client in made.clients), "an MPI library may talk over it later"
    assert answers == [["first = 0 %\n", "first = 1 %\n", "first = 2 %\n", "second 2"]] * 3


def test_a_manager_that_is_silent_or_gone_or_speaks_otherwise_is_an_error(manager):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(KnltrainError, match=r"no answer from mpiexec \(PMI\) in 0.1 s"):
            Pmi(ours.fileno(), 0.1)
        theirs.sendall(b"cmd=response_to_init rc=-1\n")
        with pytest.raises(KnltrainError, match="rc=-1"):
            Pmi(ours.fileno(), 20)
        theirs.close()
        with pytest.raises(KnltrainError, match=r"closed its connection|failed"):
            Pmi(ours.fileno(), 20)
    with pytest.raises(KnltrainError, match="PMI_FD=987"):
        Pmi(987, 20)
    made = manager(1)
    with contextlib.closing(Pmi(made.clients[0].fileno(), 20)) as pmi:
        of = pmi.all_gather(0, "x")
        with pytest.raises(KnltrainError, match="key_not_found"):
            of(1)


def test_an_answer_may_take_as_many_seconds_as_are_given():
    ours, theirs = socket.socketpair()
    said = b"cmd=response_to_init rc=0\ncmd=my_kvsname kvsname=kvs_1\n"
    with ours, theirs:
        late = threading.Timer(0.2, theirs.sendall, (said,))
        late.start()
        try:
            Pmi(ours.fileno(), 60).close()
        finally:
            late.join()


@pytest.fixture
def two_nodes(monkeypatch):
    """Makes threads named node-1 believe that they are on another node than the others, and sets all interfaces."""

    def elsewhere():
        return threading.current_thread().name == "node-1"

    interfaces = {False: [], True: []}
    monkeypatch.setattr(rendezvous, "_network_namespace", lambda: f"stack-{elsewhere()}")
    monkeypatch.setattr(rendezvous, "own_addresses", lambda: interfaces[elsewhere()])
    monkeypatch.setattr(rendezvous, "_PROBE_TIMEOUT_S", 0.2)
    return interfaces


def run(made, nodes):
    """Lets as many ranks agree_on_address as there are entries in nodes; returns what each found, or its error."""
    found = {}

    def one(rank):
        try:
            with contextlib.closing(Pmi(made.clients[rank].fileno(), 20)) as pmi:
                found[rank] = agree_on_address(pmi, Ranks("hydra", rank, len(nodes), 0, 1))
        except KnltrainError as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,), name=f"node-{node}") for rank, node in enumerate(nodes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return [found[rank] for rank in range(len(nodes))]


def test_the_first_address_that_answers_is_taken(manager, two_nodes):
    """Of three: one that no route leads to, a bridge that both nodes have, and the network between them."""
    two_nodes[False] = [("eno1", "198.51.100.7"), ("docker0", "127.0.0.9"), ("ib0", "127.0.0.2")]
    two_nodes[True] = [("docker0", "127.0.0.9"), ("ib0", "127.0.0.3")]
    first, second, third = run(manager(3), [0, 0, 1])
    assert third.address == "127.0.0.2"
    # The first node takes the address and the interface that the other came by, and no other one listens.
    assert first.init_method == second.init_method == third.init_method
    assert first.listen == ("127.0.0.2", int(third.init_method.rpartition(":")[2]))
    assert (first.interface, second.interface) == ("ib0", "ib0")


def test_ranks_that_come_by_several_addresses_find_the_first_at_all_of_them(manager, two_nodes, monkeypatch):
    two_nodes[False] = [("ib0", "127.0.0.2"), ("ib1", "127.0.0.3")]
    two_nodes[True] = []
    answers = iter(["127.0.0.2", "127.0.0.3"])
    monkeypatch.setattr(rendezvous, "_first_reachable", lambda offered, port: next(answers))
    first, *others = run(manager(3), [0, 1, 1])
    assert {one.address for one in others} == {"127.0.0.2", "127.0.0.3"}
    assert (first.address, first.listen) == ("127.0.0.1", None)


def test_more_ranks_come_than_wait_in_the_first_ones_queue(manager, two_nodes, monkeypatch):
    two_nodes[False] = [("ib0", "127.0.0.2")]
    create = socket.create_server
    monkeypatch.setattr(socket, "create_server", lambda address, backlog: create(address, backlog=1))
    monkeypatch.setattr(rendezvous, "_PROBE_TIMEOUT_S", 3)  # who comes at the same moment tries again after one
    first, *others = run(manager(5), [0, 1, 1, 1, 1])
    assert [one.address for one in others] == ["127.0.0.2"] * 4
    create(first.listen).close()  # it is free again
    assert not [thread for thread in threading.enumerate() if thread.name == "rendezvous"]


def test_ranks_under_flux_meet_through_its_process_manager(manager, two_nodes):
    two_nodes[False] = [("ib0", "127.0.0.2")]
    two_nodes[True] = [("ib0", "127.0.0.3")]
    made, found = manager(2), {}

    def one(rank):
        ranks = discover({"FLUX_TASK_RANK": str(rank), "FLUX_JOB_SIZE": "2", "FLUX_JOB_NNODES": "2",
                          "FLUX_TASK_LOCAL_ID": "0", "PMI_RANK": str(rank), "PMI_SIZE": "2"})  # fmt: skip
        found[rank] = find_rendezvous(ranks, {"PMI_FD": str(made.clients[rank].fileno())})

    threads = [threading.Thread(target=one, args=(rank,), name=f"node-{rank}") for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found[1].address == "127.0.0.2"
    assert found[0].init_method == found[1].init_method


def test_no_address_that_answers_is_an_error_that_lists_them(manager, two_nodes):
    two_nodes[False] = [("docker0", "127.0.0.9")]
    two_nodes[True] = [("docker0", "127.0.0.9")]
    _, second = run(manager(2), [0, 1])
    assert isinstance(second, KnltrainError)
    assert "reaches none of the addresses of rank 0" in str(second)
    assert "127.0.0.9" in str(second)


def test_addresses_of_this_machine():
    for name, address in own_addresses():
        assert name in dict(map(reversed, socket.if_nameindex()))
        assert not address.startswith("127.")
        assert interface_towards(address) == name
    assert interface_towards("127.0.0.1") == ""


def slurm(node, hosts):
    return Ranks("slurm", node, 2, 0, 1, hosts=hosts), {"SLURM_NODEID": str(node), "SLURM_JOB_ID": "17"}


def test_srun_names_the_first_node(monkeypatch):
    known = {"n1": ["10.0.0.1"], "n2": ["10.0.0.2"]}
    monkeypatch.setattr(rendezvous, "_resolve", lambda host: known.get(host, []))
    monkeypatch.setattr(rendezvous, "interface_towards", lambda address: f"to-{address}")
    monkeypatch.setattr(rendezvous, "_source_towards", lambda address: "10.0.0.1")
    monkeypatch.setattr(rendezvous, "own_addresses", lambda: [("eth0", "10.0.0.1")])
    first, second = (find_rendezvous(*slurm(node, ("n1", "n2"))) for node in (0, 1))
    port = 20000 + 17 * 31
    assert first == Rendezvous(f"tcp://10.0.0.1:{port}", "10.0.0.1", "to-10.0.0.2", ("10.0.0.1", port))
    assert second == Rendezvous(f"tcp://10.0.0.1:{port}", "10.0.0.1", "to-10.0.0.1")
    # Steps of one job may run beside each other, and so may jobs.
    ports = {
        find_rendezvous(ranks, {**environ, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step}).listen[1]
        for ranks, environ in [slurm(0, ("n1", "n2"))]
        for job, step in (("17", "0"), ("17", "1"), ("17", "2"), ("18", "0"))
    }
    assert len(ports) == 4
    assert port in ports
    # A name that is loopback's here leads to what the way to the second node starts from; one with several addresses,
    # or with one that is none of this node's, to all of them.
    for found, listen in (([], ("10.0.0.1", port)), (["10.0.0.1", "10.1.0.1"], None), (["192.0.2.7"], None)):
        known["n1"] = found
        first = find_rendezvous(*slurm(0, ("n1", "n2")))
        assert first.listen == listen
        assert first.address == (listen[0] if listen else "127.0.0.1")
    with pytest.raises(KnltrainError, match="node n3 of the job has no address"):
        find_rendezvous(*slurm(1, ("n3", "n1")))
    with pytest.raises(ConfigError, match="SLURM_STEP_NODELIST"):
        find_rendezvous(*slurm(1, ()))


def test_master_addr_wins_unless_it_is_loopback(monkeypatch):
    known = {"n1": ["10.0.0.1"], "localhost": ["127.0.0.1"], "127.0.0.1": ["127.0.0.1"]}
    monkeypatch.setattr(rendezvous, "_resolve_any", lambda host: known.get(host, []))
    monkeypatch.setattr(rendezvous, "interface_towards", lambda address: f"to-{address}")
    for launcher in ("torchrun", "hydra", "slurm", "openmpi"):
        ranks = Ranks(launcher, 3, 4, 1, 2, "env://", hosts=("elsewhere", "n2"))
        assert find_rendezvous(ranks, {"MASTER_ADDR": "n1"}) == Rendezvous("env://", "10.0.0.1", "to-10.0.0.1")
        for loopback in ("127.0.0.1", "localhost", "nowhere"):
            with pytest.raises(ConfigError, match=f"MASTER_ADDR={loopback} is not an address that other nodes"):
                find_rendezvous(ranks, {"MASTER_ADDR": loopback}, start_timeout_s=0)
    with pytest.raises(ConfigError, match="MASTER_ADDR=localhost is not an address"):
        find_rendezvous(Ranks("torchrun", 0, 4, 0, 2, "env://"), {"MASTER_ADDR": "localhost"})
    # On the first node itself its name may be loopback's.
    assert find_rendezvous(Ranks("torchrun", 1, 4, 1, 2, "env://"), {"MASTER_ADDR": "me"}).init_method == "env://"


def test_a_name_that_is_not_known_yet_is_waited_for(monkeypatch, capsys):
    """The other pod has not started: its name has no address for a while."""
    answers = iter([[], [], [], ["10.0.0.1"], ["10.0.0.1"]])
    slept = []
    monkeypatch.setattr(rendezvous, "_resolve_any", lambda host: next(answers))
    monkeypatch.setattr(rendezvous.time, "sleep", slept.append)
    monkeypatch.setattr(rendezvous, "interface_towards", lambda address: f"to-{address}")
    found = find_rendezvous(Ranks("torchrun", 1, 2, 0, 1, "env://"), {"MASTER_ADDR": "run-master-0"})
    assert (found.address, len(slept)) == ("10.0.0.1", 2)
    assert "MASTER_ADDR=run-master-0 has no address yet; waiting up to 600 s" in capsys.readouterr().err


def test_the_first_pod_may_be_told_that_it_is_at_localhost(monkeypatch):
    environ = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
               "KUBERNETES_SERVICE_HOST": "10.96.0.1"}  # fmt: skip
    monkeypatch.setattr(rendezvous, "interface_towards", lambda address: "eth0")
    found = find_rendezvous(discover(environ), environ)
    assert (found.init_method, found.interface, found.listen) == ("env://", "eth0", None)


def test_numbers_of_slurm_and_hydra_that_are_none_are_refused(monkeypatch):
    monkeypatch.setattr(rendezvous, "_resolve", lambda host: ["10.0.0.1"])
    ranks, environ = slurm(0, ("n1", "n2"))
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NODEID"):
        with pytest.raises(ConfigError, match=f"{name}=x is not a number"):
            find_rendezvous(ranks, {**environ, name: "x"})
    with pytest.raises(ConfigError, match="PMI_FD=x is not a number"):
        find_rendezvous(Ranks("hydra", 0, 2, 0, 1), {"PMI_FD": "x"})


def test_the_first_rank_listens_where_the_user_says_and_nowhere_else(monkeypatch):
    monkeypatch.setattr(rendezvous, "own_addresses", lambda: [("eth0", "10.0.0.1"), ("ib0", "10.1.0.1")])
    known = {"n1": ["10.0.0.1"], "both": ["10.0.0.1", "10.1.0.1"], "behind": ["192.0.2.7"], "me": ["127.0.1.1"]}
    monkeypatch.setattr(rendezvous, "_resolve_any", lambda host: known[host])
    first = Ranks("torchrun", 0, 4, 0, 2, "env://")
    port = {"MASTER_PORT": "29500"}
    assert find_rendezvous(first, {"MASTER_ADDR": "n1", **port}).listen == ("10.0.0.1", 29500)
    for host in ("both", "behind", "me"):  # where the others look for it cannot be known here
        assert find_rendezvous(first, {"MASTER_ADDR": host, **port}).listen is None
    assert find_rendezvous(first, {"MASTER_ADDR": "n1", **port, "TORCHELASTIC_USE_AGENT_STORE": "True"}).listen is None
    assert find_rendezvous(Ranks("torchrun", 1, 4, 1, 2, "env://"), {"MASTER_ADDR": "n1", **port}).listen is None
    for wrong in ("0", "65536", "-1", "many", "9" * 5000, "\u0662"):
        with pytest.raises(ConfigError, match="is not a port"):
            find_rendezvous(first, {"MASTER_ADDR": "n1", "MASTER_PORT": wrong})
    monkeypatch.undo()
    alone = Ranks("torchrun", 0, 2, 0, 2, "env://")
    assert find_rendezvous(alone, {"MASTER_ADDR": "localhost", **port}).listen == ("127.0.0.1", 29500)


def test_one_node_needs_loopback_alone():
    assert find_rendezvous(Ranks("hydra", 0, 2, 0, 2, "file:///tmp/x"), {}) == Rendezvous(
        "file:///tmp/x", interface="lo"
    )
    with pytest.raises(ConfigError, match=r"did not set PMI_FD.*MASTER_ADDR"):
        find_rendezvous(Ranks("hydra", 0, 2, 0, 1), {})


def test_interfaces_are_told_to_the_libraries_unless_the_user_has(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "CCL_KVS_IFACE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FI_TCP_IFACE", "mine")
    monkeypatch.setenv("CCL_KVS_IFACE", "")
    Rendezvous("env://", "10.0.0.1", "ib0").export()
    names = ("GLOO_SOCKET_IFNAME", "CCL_KVS_IFACE", "FI_TCP_IFACE")
    assert [os.environ[name] for name in names] == ["ib0", "ib0", "mine"]
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.delenv("CCL_KVS_IFACE")
    Rendezvous("file://").export()
    assert "GLOO_SOCKET_IFNAME" not in os.environ


SCRIPT = """
import dataclasses, json, os, sys
from knltrain.launch.world import discover
from knltrain.launch.rendezvous import find_rendezvous
ranks = discover()
line = json.dumps([dataclasses.asdict(ranks), dataclasses.asdict(find_rendezvous(ranks))])
os.write(1, (line + "\\n").encode())
"""


def mpiexec(*arguments):
    """Output of ranks of the mpiexec in this environment, a line each."""
    beside = Path(sys.executable).parent / "mpiexec"
    path = str(beside) if beside.exists() else shutil.which("mpiexec")
    version = "" if path is None else subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    if "Intel" not in version and "HYDRA" not in version:
        pytest.skip("no mpiexec of Intel MPI or MPICH: neither impi-rt in this environment nor one on the PATH")
    result = subprocess.run(
        [path, *arguments, sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=90
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("ranks, per_node", [(2, 1), (4, 2)])
def test_real_ranks_under_hydra_meet_through_its_process_manager(ranks, per_node):
    """Two nodes that are this one twice, each with a proxy of its own, started without ssh."""
    lines = mpiexec("-launcher", "fork", "-hosts", f"{socket.gethostname()},localhost", "-ppn", str(per_node),
                    "-n", str(ranks))  # fmt: skip
    assert sorted(who["rank"] for who, _ in lines) == list(range(ranks))
    assert all((who["size"], who["local_size"]) == (ranks, per_node) for who, _ in lines)
    (address,) = {where["init_method"] for _, where in lines}
    assert address.startswith("tcp://127.0.0.1:"), "all share one network stack"


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("between", [[], ["bash", "-c", '"$@"; exit $?', "script"]], ids=["", "script"])
def test_real_ranks_on_one_node_meet_in_a_file(between, ranks):
    """Also where a script starts each, whose process differs from rank to rank."""
    lines = mpiexec("-n", str(ranks), *between)
    (place,) = {where["init_method"] for _, where in lines}
    assert place.startswith("file://")
    assert sorted(who["local_rank"] for who, _ in lines) == list(range(ranks))
