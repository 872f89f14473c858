"""Rendezvous: the address of rank 0, and the network interface that leads to it.

MASTER_ADDR and MASTER_PORT take precedence. Under srun the node list names rank 0's node. Under Hydra and Open MPI,
rank 0 sends its addresses through the launcher, and each rank uses the first that it can connect to: a name that
resolves to loopback, or a bridge that every node has with the same address, is not reachable. IPv4 only.

Rank 0 then listens at the one address that the other ranks use: loopback if all are on one node.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import ipaddress
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from knltrain.errors import ConfigError, KnltrainError
from knltrain.launch.environment import given, number
from knltrain.launch.openmpi import OpenMpi
from knltrain.launch.pmi import Pmi
from knltrain.launch.world import Ranks, discover, is_loopback

# The default of comm.start_timeout_s: enough for the slowest node to start Python from a parallel file system.
START_TIMEOUT_S = 600.0
_PROBE_TIMEOUT_S = 3.0
_RESOLVE_INTERVAL_S = 1.0
_SIOCGIFADDR = 0x8915
OUTSIDE_ADDRESS = "198.51.100.1"  # reserved for documentation (RFC 5737): the default route leads there
_MAX_ADDRESSES = 24  # fits into a kilobyte, the shortest value limit that PMI-1 allows


@dataclasses.dataclass(frozen=True)
class Rendezvous:
    """How the ranks of a process group connect to rank 0.

    Attributes:
        init_method: as for ``torch.distributed.init_process_group``.
        address: rank 0's, as this rank reaches it; empty on one node.
        interface: this rank's network interface that leads to the others; loopback on one node; empty if unknown.
        listen: on rank 0, the address and port to listen at. None on other ranks, if no port is opened (a file, or
            torchrun's agent), and if other ranks use more than one address: rank 0 then listens on all.
    """

    init_method: str
    address: str = ""
    interface: str = ""
    listen: tuple[str, int] | None = None

    def export(self) -> dict[str, str]:
        """Exports the interface for gloo, oneCCL and libfabric, unless the user has; returns the variables set."""
        names = ("GLOO_SOCKET_IFNAME", "CCL_KVS_IFACE", "FI_TCP_IFACE") if self.interface else ()
        exported = {name: self.interface for name in names if not os.environ.get(name)}
        os.environ.update(exported)
        return exported


class Exchange(Protocol):
    """A launcher's all-gather of short texts."""

    def all_gather(self, rank: int, text: str) -> Callable[[int], str]:
        """Sends a text to all ranks; returns a function from a rank to its text. All ranks call it at once."""


def find_rendezvous(
    ranks: Ranks, environ: Mapping[str, str] | None = None, *, start_timeout_s: float = START_TIMEOUT_S
) -> Rendezvous:
    """Finds rank 0's address from the launcher's variables. On several nodes all ranks call it, once.

    Args:
        ranks: this process among its peers.
        environ: the environment, by default this process's.
        start_timeout_s: how long the slowest rank may take to start, in seconds.

    Raises:
        ConfigError: MASTER_ADDR is loopback, or no variable tells where rank 0 is.
        KnltrainError: the ranks cannot reach each other.
    """
    environ = given(environ)
    if not ranks.on_several_nodes:
        return Rendezvous(ranks.init_method, interface=loopback(), listen=_listen_address(ranks, environ))
    if ranks.init_method:
        return dataclasses.replace(
            _from_master_addr(
                environ["MASTER_ADDR"], ranks, start_timeout_s, in_pod="KUBERNETES_SERVICE_HOST" in environ
            ),
            listen=_listen_address(ranks, environ),
        )
    if ranks.launcher == "slurm":
        return _from_slurm_node_list(ranks, environ)
    if ranks.launcher == "openmpi":
        return _in_subprocess(start_timeout_s)
    if "PMI_FD" not in environ:
        raise ConfigError(
            f"{ranks.launcher} started {ranks.size} ranks on several nodes and did not set PMI_FD for their "
            "rendezvous; export MASTER_ADDR, the address of rank 0's node, and MASTER_PORT, a free port there"
        )
    pmi = Pmi(number(environ, "PMI_FD"), start_timeout_s)
    try:
        rendezvous = agree_on_address(pmi, ranks)
    except BaseException:
        pmi.close()
        raise
    pmi.finalize_at_exit()
    return rendezvous


def agree_on_address(exchange: Exchange, ranks: Ranks) -> Rendezvous:
    """Sends rank 0's addresses to all ranks; each uses the first that it can connect to.

    Raises:
        KnltrainError: this rank can connect to none.
    """
    with contextlib.ExitStack() as until_chosen:
        offer = ""
        if ranks.rank == 0:
            port = until_chosen.enter_context(_accept_connections())  # until the others have tried
            addresses = [address for _, address in own_addresses()]
            named = [address for address in _resolve(socket.gethostname()) if address in addresses]
            first = list(dict.fromkeys([*named, *addresses]))[:_MAX_ADDRESSES]
            offer = json.dumps([socket.gethostname()[:64], _network_namespace(), port, first])
        host, namespace, port, offered = json.loads(exchange.all_gather(ranks.rank, offer)(0))
        # Ranks in rank 0's network namespace reach it over loopback.
        same_node = namespace == _network_namespace()
        address = "127.0.0.1" if same_node else _first_reachable(offered, port)
        # All ranks try before any raises: the others must know that one found no address.
        choices = exchange.all_gather(ranks.rank, address)
    # A barrier until rank 0 has closed its listener, whose port is used again: a connection to it would be reset.
    exchange.all_gather(ranks.rank, "")
    if not address:
        raise KnltrainError(
            f"rank {ranks.rank} on {socket.gethostname()} reaches none of the addresses of rank 0 on {host} "
            f"({', '.join(offered) or 'none'}), port {port}: a firewall, or no common network; export MASTER_ADDR and "
            "MASTER_PORT to name an address"
        )
    route_to, listen = address, None
    if same_node:  # the addresses by which ranks on other nodes reach this one
        chosen = {one: None for one in map(choices, range(1, ranks.size)) if one != "127.0.0.1"}
        route_to = next(iter(chosen), "")
        if len(chosen) < 2:  # a rank that reached none has chosen "", and raises
            address = route_to or address
            listen = (address, port)
    return Rendezvous(
        f"tcp://{address}:{port}", address, interface_towards(route_to) if route_to else loopback(), listen
    )


@contextlib.contextmanager
def _accept_connections() -> Iterator[int]:
    """Listens on all interfaces, and accepts and closes every connection; yields the port."""
    with socket.create_server(("", 0), backlog=1024) as listener:

        def take() -> None:
            # Without accept() the backlog fills (129 on some kernels), and later ranks could not connect.
            with contextlib.suppress(OSError):
                while True:
                    listener.accept()[0].close()

        thread = threading.Thread(target=take, name="rendezvous", daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # ends the wait in accept, which would keep the port
            thread.join()


def own_addresses() -> list[tuple[str, str]]:
    """Returns names and IPv4 addresses of the interfaces that are up, without loopback."""
    return [(name, address) for name, address in _addresses() if not ipaddress.ip_address(address).is_loopback]


def unknown_interface(variable: str, environ: Mapping[str, str]) -> str:
    """Says that a variable names no interface of this node; an empty string if it does, or is not set."""
    value = environ.get(variable, "")
    there = [name for _, name in socket.if_nameindex()]
    if not value or set(value.split(",")) & {*there}:
        return ""
    return f"{variable}={value}: {socket.gethostname()} has no such interface ({', '.join(there)}); correct or unset it"


def require_interface(variable: str) -> None:
    """Raises ConfigError if a variable names an interface that this node does not have."""
    if problem := unknown_interface(variable, os.environ):
        raise ConfigError(problem)


def loopback() -> str:
    """Returns the name of the loopback interface; empty if it is down."""
    return next((name for name, address in _addresses() if ipaddress.ip_address(address).is_loopback), "")


def _addresses() -> Iterator[tuple[str, str]]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # no IPv4 address
                answer = fcntl.ioctl(one.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                yield name, socket.inet_ntoa(answer[20:24])


def interface_towards(address: str) -> str:
    """Returns the interface of the route to an address, or that has it; empty for loopback and without a route."""
    own = {ip: name for name, ip in own_addresses()}
    return own[address] if address in own else own.get(_source_towards(address), "")


def _source_towards(address: str) -> str:
    """Returns this node's source address for a destination; empty without a route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.connect((address, 9))  # sends nothing: the kernel only looks up the route
            return str(one.getsockname()[0])
        except OSError:
            return ""


def _network_namespace() -> str:
    """Returns an id of kernel and network namespace: processes with the same id share all network interfaces."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}-{os.stat('/proc/self/ns/net').st_ino}"


def _resolve(host: str) -> list[str]:
    """Returns the IPv4 addresses of a name, without loopback; empty if it does not resolve."""
    return [address for address in _resolve_any(host) if not ipaddress.ip_address(address).is_loopback]


def _resolve_any(host: str) -> list[str]:
    try:
        found = [str(info[4][0]) for info in socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)]
    except (OSError, UnicodeError):  # UnicodeError: not a valid host name
        return []
    return list(dict.fromkeys(found))


def _listen_address(ranks: Ranks, environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Returns the address at which rank 0 listens if MASTER_ADDR is set; None to listen on all interfaces.

    None if the name resolves to loopback here, because it may not elsewhere; if it has several addresses, because each
    may be used; if its address is not one of this node's, because of address translation; and if torchrun listens.

    Raises:
        ConfigError: MASTER_PORT is not a port.
    """
    if ranks.rank or ranks.init_method != "env://":
        return None
    host, port = environ["MASTER_ADDR"], environ["MASTER_PORT"]
    if not (port.isdecimal() and port.isascii() and 0 < int(port[:6]) < 1 << 16):
        raise ConfigError(
            f"MASTER_PORT={port} is not a port; give a number from 1 to 65535 that is free on rank 0's node"
        )
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's agent listens
        return None
    found = _resolve_any(host)
    own = {address for _, address in (own_addresses() if ranks.on_several_nodes else _addresses())}
    return (found[0], int(port)) if len(found) == 1 and found[0] in own else None


def _first_reachable(addresses: list[str], port: int) -> str:
    own = {address for _, address in own_addresses()}
    for address in addresses:
        # An address that every node has, such as docker0's, leads to this node itself.
        if address not in own:
            with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=_PROBE_TIMEOUT_S):
                return address
    return ""


def _resolve_in_time(host: str, start_timeout_s: float, *, quiet: bool) -> list[str]:
    """Returns the addresses of a name as ``_resolve`` does; waits until it is known, or for the start's time-out."""
    deadline = time.monotonic() + start_timeout_s
    if not _resolve_any(host) and not quiet:
        said = f"MASTER_ADDR={host} has no address yet; waiting up to {start_timeout_s:g} s for it"
        print(said, file=sys.stderr, flush=True)
    while not _resolve_any(host) and time.monotonic() < deadline:
        time.sleep(_RESOLVE_INTERVAL_S)
    return _resolve(host)


def _from_master_addr(host: str, ranks: Ranks, start_timeout_s: float, *, in_pod: bool) -> Rendezvous:
    named = not host.replace(".", "").isdigit() and not is_loopback(host)
    first_node = ranks.rank == ranks.local_rank
    # The name of a pod is unknown until the pod has started, which may be later than this one.
    addresses = (
        _resolve(host)
        if first_node or not named
        else _resolve_in_time(host, start_timeout_s, quiet=ranks.local_rank > 0)
    )
    # On its own node a name may resolve to loopback, and a pod be told that it is at localhost; then the default route
    # gives the interface.
    if not addresses and first_node and (named or (is_loopback(host) and in_pod)):
        return Rendezvous(ranks.init_method, host, interface_towards(OUTSIDE_ADDRESS))
    if not addresses:
        raise ConfigError(
            f"MASTER_ADDR={host} is not an address that other nodes can reach (unknown, or loopback), and the "
            f"{ranks.size} ranks are on several; give the address of rank 0's node"
        )
    return Rendezvous(ranks.init_method, addresses[0], interface_towards(addresses[0]))


def _from_slurm_node_list(ranks: Ranks, environ: Mapping[str, str]) -> Rendezvous:
    if len(ranks.hosts) < 2:
        raise ConfigError(
            f"srun started {ranks.size} ranks on several nodes, and SLURM_STEP_NODELIST does not name them; "
            "export MASTER_ADDR and MASTER_PORT"
        )
    head = ranks.hosts[0]
    here = number(environ, "SLURM_NODEID") == 0 if "SLURM_NODEID" in environ else True
    # On rank 0's node its own name may resolve to loopback: use the route to the second node.
    addresses = _resolve(ranks.hosts[1] if here else head)
    if not addresses:
        name = ranks.hosts[1] if here else head
        raise KnltrainError(
            f"node {name} of the job has no address that {socket.gethostname()} can reach: its name is unknown or "
            "resolves to loopback; export MASTER_ADDR, the address of rank 0's node, and MASTER_PORT"
        )
    # All ranks derive the same port from the ids of job and step, so that jobs on shared nodes use different ones.
    job, step = (number(environ, name) if name in environ else 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = 20000 + (job * 31 + step) % 12000
    interface = interface_towards(addresses[0])
    if not here:
        return Rendezvous(f"tcp://{addresses[0]}:{port}", addresses[0], interface)
    # Other ranks resolve this node's name: to the same address as here, unless it is loopback here.
    named = _resolve(head) or [_source_towards(addresses[0])]
    listen = named[0] if len(named) == 1 and named[0] in {own for _, own in own_addresses()} else ""
    address = listen or "127.0.0.1"
    return Rendezvous(f"tcp://{address}:{port}", address, interface, (listen, port) if listen else None)


def _in_subprocess(start_timeout_s: float) -> Rendezvous:
    try:
        result = subprocess.run(
            [sys.executable, "-m", "knltrain.launch.rendezvous"],
            capture_output=True,
            text=True,
            timeout=start_timeout_s,
        )
    except subprocess.TimeoutExpired:
        raise KnltrainError(
            f"no rendezvous under Open MPI within {start_timeout_s:g} s: a rank has not started"
        ) from None
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise KnltrainError(f"no rendezvous under Open MPI: {last}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return Rendezvous(**found)


def _main() -> None:
    mpi = OpenMpi()
    try:
        rendezvous = agree_on_address(mpi, discover())
    finally:
        mpi.close()
    print(json.dumps(dataclasses.asdict(rendezvous)))


if __name__ == "__main__":
    try:
        _main()
    except KnltrainError as error:
        sys.exit(str(error))
