"""Interfaces, names and providers, as other machines have them."""

import socket

import pytest
from node import trees
from node.trees import write

from knltrain.doctor import network
from knltrain.doctor.machine import read_machine


@pytest.fixture
def root(tmp_path):
    return trees.small(tmp_path)


@pytest.fixture
def net(monkeypatch):
    """Sets what this host has: interfaces, its default route, and where its name leads."""

    def set_up(addresses, default, resolved):
        monkeypatch.setattr(network, "own_addresses", lambda: list(addresses.items()))
        monkeypatch.setattr(network, "interface_towards", lambda address: default)

        def resolve(host, *_):
            if not resolved:
                raise socket.gaierror("unknown")
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in resolved]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)

    return set_up


def interface(root, **environ):
    return network.interface(read_machine(root, environ))


def test_one_interface_to_which_the_name_leads(root, net):
    net({"eth0": "10.0.0.5"}, "eth0", ["10.0.0.5"])
    finding = interface(root)
    assert (finding.severity, finding.cause) == ("ok", "eth0 10.0.0.5; eth0 by the default route")
    named = interface(root, GLOO_SOCKET_IFNAME="eth0")
    assert (named.severity, named.cause) == ("ok", "eth0 10.0.0.5; eth0 as GLOO_SOCKET_IFNAME says")


@pytest.mark.parametrize("resolved, words", [(["127.0.1.1"], "resolves to 127.0.1.1"), ([], "resolves to nothing")])
def test_a_name_that_leads_to_loopback(root, net, resolved, words):
    net({"eth0": "10.0.0.5"}, "eth0", resolved)
    finding = interface(root)
    assert finding.severity == "note"
    assert words in finding.cause
    assert finding.remedy.endswith(f"10.0.0.5 {socket.gethostname()}")


@pytest.mark.parametrize("variable", ["GLOO_SOCKET_IFNAME", "CCL_KVS_IFACE", "FI_TCP_IFACE"])
def test_interfaces_that_are_named_and_not_there(root, net, variable):
    net({"eth0": "10.0.0.5", "ib0": "10.1.0.5"}, "eth0", ["10.0.0.5"])
    wrong = interface(root, **{variable: "ib1"})
    assert (wrong.severity, wrong.cause) == (
        "error", f"{variable}=ib1, and the interfaces are: eth0 10.0.0.5, ib0 10.1.0.5")  # fmt: skip
    loopback = interface(root, **{variable: "lo"})
    assert (loopback.severity, loopback.remedy) == ("warning", f"unset {variable}")


def test_loopback_alone(root, net):
    net({}, "", ["127.0.0.1"])
    assert interface(root).severity == "note"
    assert interface(root, GLOO_SOCKET_IFNAME="lo").severity == "note"


def test_a_faster_interface_than_the_default(root, net):
    net({"eth0": "10.0.0.5", "ib0": "10.1.0.5"}, "eth0", ["10.0.0.5"])
    write(root, "sys/class/net/eth0/speed", 1000)
    write(root, "sys/class/net/ib0/speed", 100000)
    finding = interface(root)
    assert finding.severity == "note"
    assert "eth0 10.0.0.5 (1 Gbit/s), ib0 10.1.0.5 (100 Gbit/s); by default: eth0" in finding.cause
    assert "GLOO_SOCKET_IFNAME=ib0 CCL_KVS_IFACE=ib0 FI_TCP_IFACE=ib0" in finding.remedy
    assert interface(root, GLOO_SOCKET_IFNAME="ib0").severity == "ok"
    write(root, "sys/class/net/ib0/speed", -1)  # what drivers say that do not know
    assert interface(root).severity == "ok"


@pytest.fixture
def providers(tmp_path):
    folder = tmp_path / "prov"
    folder.mkdir()
    for name in ("libtcp-fi.so", "libverbs-1.12-fi.so", "libpsmx2-fi.so", "libfabric.so.1"):
        (folder / name).write_text("")
    return folder


def libfabric(root, **environ):
    return network.libfabric(read_machine(root, {name: str(value) for name, value in environ.items()}))


def test_providers_are_listed(root, providers):
    finding = libfabric(root, FI_PROVIDER_PATH=providers)
    assert (finding.severity, finding.cause) == ("ok", f"psm2, tcp, verbs in {providers}")
    oneapi = root / "mpi/opt/mpi/libfabric/lib"
    oneapi.mkdir(parents=True)
    (oneapi / "prov").symlink_to(providers)
    assert "psm2, tcp, verbs" in libfabric(root, I_MPI_ROOT=root / "mpi").cause


def test_a_provider_that_is_not_there(root, providers):
    finding = libfabric(root, FI_PROVIDER_PATH=providers, FI_PROVIDER="psm3")
    assert (finding.severity, finding.remedy) == ("warning", "unset FI_PROVIDER, or correct it")
    assert libfabric(root, FI_PROVIDER_PATH=providers, FI_PROVIDER="tcp;ofi_rxm").severity == "ok"
    finding = libfabric(root, FI_PROVIDER_PATH=providers, FI_PROVIDER="verbs;ofi_rxm")
    assert "this node has no card for it" in finding.cause
    assert libfabric(root, FI_PROVIDER_PATH=providers, FI_PROVIDER="^verbs").severity == "ok"
    write(root, "sys/class/infiniband/mlx5_0/node_type", "1: CA")
    assert libfabric(root, FI_PROVIDER_PATH=providers, FI_PROVIDER="verbs;ofi_rxm").severity == "ok"
    empty = libfabric(root, FI_PROVIDER_PATH=root / "nowhere")
    assert (empty.severity, empty.remedy) == ("warning", "unset FI_PROVIDER_PATH, or correct it")


def test_a_fast_network_that_nothing_drives(root, providers):
    write(root, "sys/class/infiniband/mlx5_0/node_type", "1: CA")
    assert "in this node: mlx5_0" in libfabric(root, FI_PROVIDER_PATH=providers).cause
    for name in ("libverbs-1.12-fi.so", "libpsmx2-fi.so"):
        (providers / name).unlink()
    finding = libfabric(root, FI_PROVIDER_PATH=providers)
    assert finding.severity == "warning"
    assert "mlx5_0 in this node" in finding.cause


def test_no_libfabric_at_all(root, monkeypatch):
    monkeypatch.setattr(network, "provider_folder", lambda environ: None)
    monkeypatch.setattr(network.ctypes.util, "find_library", lambda name: None)
    assert libfabric(root).severity == "note"
    monkeypatch.setattr(network.ctypes.util, "find_library", lambda name: "libfabric.so.1")
    assert libfabric(root).severity == "ok"
