"""How ranks on several nodes find the first of them, and which network they find it over.

MASTER_ADDR and MASTER_PORT win where they are set. Under srun the node list names the first rank's node. Under Hydra
and Open MPI the first rank tells the others its addresses, in the launcher's own way, and each takes the first that
answers: a name that resolves to loopback, or a bridge that every node has with the same address, does not. IPv4 only.

What the first rank then listens at is the one address that the others come by, loopback where all are on one node.
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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from knltrain.errors import ConfigError, KnltrainError
from knltrain.launch.openmpi import OpenMpi
from knltrain.launch.pmi import Pmi
from knltrain.launch.world import Ranks, discover

# Long enough for the slowest node to start Python from a parallel file system.
START_TIMEOUT_S = 600.0
_PROBE_TIMEOUT_S = 3.0
_SIOCGIFADDR = 0x8915
ANYWHERE = "198.51.100.1"  # of a network for documentation, which the default route leads to (RFC 5737)
_MOST_ADDRESSES = 24  # what fits into a kilobyte, the shortest value that PMI-1 allows


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Where the process group meets.

    Attributes:
        init_method: as torch.distributed takes it.
        address: the first rank's, as this rank reaches it; empty on one node.
        interface: of this rank's, the one that leads to the others, loopback on one node; empty where it is unknown.
        listen: of the first rank, address and port to listen at; None where it opens no port, which a file and
            torchrun's own agent spare it, and where the others may come by more than one address: then on all.
    """

    init_method: str
    address: str = ""
    interface: str = ""
    listen: tuple[str, int] | None = None

    def export(self) -> dict[str, str]:
        """Tells gloo, oneCCL and libfabric the interface, unless the user has; returns what was set."""
        names = ("GLOO_SOCKET_IFNAME", "CCL_KVS_IFACE", "FI_TCP_IFACE") if self.interface else ()
        told = {name: self.interface for name in names if name not in os.environ}
        os.environ.update(told)
        return told


class Exchange(Protocol):
    """A way to give every rank a text of every other."""

    def share(self, rank: int, text: str) -> Callable[[int], str]:
        """Gives a text to the other ranks and returns a function from a rank to its text. All ranks call it."""


def meet(ranks: Ranks, environ: Mapping[str, str] | None = None) -> Meeting:
    """Finds where the process group meets. On several nodes all ranks call it, once.

    Args:
        ranks: this process among its peers.
        environ: the environment, by default this process's.

    Raises:
        ConfigError: MASTER_ADDR is loopback, or nothing says where the first rank is.
        KnltrainError: the ranks do not find each other.
    """
    environ = os.environ if environ is None else environ
    if not ranks.on_several_nodes:
        return Meeting(ranks.init_method, interface=loopback(), listen=_at_own_address(ranks, environ))
    if ranks.init_method:
        return dataclasses.replace(_at_master(environ["MASTER_ADDR"], ranks), listen=_at_own_address(ranks, environ))
    if ranks.launcher == "slurm":
        return _by_node_list(ranks, environ)
    if ranks.launcher == "openmpi":
        return _in_a_process_of_its_own()
    if "PMI_FD" not in environ:
        raise ConfigError(
            f"{ranks.launcher} started {ranks.size} ranks on several nodes and left no PMI_FD to find each other by; "
            "export MASTER_ADDR, the address of rank 0's node, and MASTER_PORT, a free port there"
        )
    pmi = Pmi(int(environ["PMI_FD"]), START_TIMEOUT_S)
    try:
        meeting = agree(pmi, ranks)
    except BaseException:
        pmi.close()
        raise
    pmi.leave_at_exit()
    return meeting


def agree(exchange: Exchange, ranks: Ranks) -> Meeting:
    """Lets the first rank tell its addresses, and every other take the first that answers.

    Raises:
        KnltrainError: none answers a rank.
    """
    with contextlib.ExitStack() as until_chosen:
        offer = ""
        if ranks.rank == 0:
            port = until_chosen.enter_context(_answering())  # until the others have tried
            addresses = [address for _, address in own_addresses()]
            named = [address for address in _resolve(socket.gethostname()) if address in addresses]
            first = list(dict.fromkeys([*named, *addresses]))[:_MOST_ADDRESSES]
            offer = json.dumps([socket.gethostname()[:64], _stack(), port, first])
        host, stack, port, offered = json.loads(exchange.share(ranks.rank, offer)(0))
        # Ranks of one network stack reach the first over loopback, and have no interface to tell.
        together = stack == _stack()
        address = "127.0.0.1" if together else _first_that_answers(offered, port)
        # Nobody leaves before all have tried: who found nothing says so after the others know.
        choices = exchange.share(ranks.rank, address)
    # And nobody goes on to the port before it is free: a connection to this listener would be reset.
    exchange.share(ranks.rank, "")
    if not address:
        raise KnltrainError(
            f"rank {ranks.rank} on {socket.gethostname()} reaches none of the addresses of rank 0 on {host} "
            f"({', '.join(offered) or 'none'}), port {port}: a firewall, or no common network; export MASTER_ADDR and "
            "MASTER_PORT to name an address"
        )
    towards, listen = address, None
    if together:  # what the ranks elsewhere reach this node by
        chosen = {one: None for one in map(choices, range(1, ranks.size)) if one != "127.0.0.1"}
        towards = next(iter(chosen), "")
        if len(chosen) < 2:  # one that reached nothing has chosen "", and ends
            address = towards or address
            listen = (address, port)
    return Meeting(f"tcp://{address}:{port}", address, interface_towards(towards) if towards else loopback(), listen)


@contextlib.contextmanager
def _answering() -> Iterator[int]:
    """Holds a port on all interfaces that takes whoever connects, and closes the connection at once."""
    with socket.create_server(("", 0), backlog=1024) as listener:

        def take() -> None:
            # Left in the queue, connections fill it: some kernels hold 129, and whoever comes after finds nobody.
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
    """Names and IPv4 addresses of the interfaces that are up, loopback left out."""
    return [(name, address) for name, address in _addresses() if not ipaddress.ip_address(address).is_loopback]


def loopback() -> str:
    """The name of the loopback interface; empty where it is down."""
    return next((name for name, address in _addresses() if ipaddress.ip_address(address).is_loopback), "")


def _addresses() -> Iterator[tuple[str, str]]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # no IPv4 address
                answer = fcntl.ioctl(one.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                yield name, socket.inet_ntoa(answer[20:24])


def interface_towards(address: str) -> str:
    """The interface that the kernel's routes take to an address, or that has it; empty for loopback and no route."""
    own = {ip: name for name, ip in own_addresses()}
    return own[address] if address in own else own.get(_source_towards(address), "")


def _source_towards(address: str) -> str:
    """This node's address on the way to another; empty where no route leads there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.connect((address, 9))  # sends nothing: the route alone is looked up
            return str(one.getsockname()[0])
        except OSError:
            return ""


def _stack() -> str:
    """What two processes have in common if they share all network interfaces: kernel and network namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}-{os.stat('/proc/self/ns/net').st_ino}"


def _resolve(host: str) -> list[str]:
    """The IPv4 addresses of a name, loopback left out; none where it has none."""
    return [address for address in _resolve_all(host) if not ipaddress.ip_address(address).is_loopback]


def _resolve_all(host: str) -> list[str]:
    try:
        found = [str(info[4][0]) for info in socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)]
    except (OSError, UnicodeError):  # UnicodeError: of a name that no host can have
        return []
    return list(dict.fromkeys(found))


def _at_own_address(ranks: Ranks, environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Where the first rank listens if the user, or torchrun, names the place: at an address that only it can be.

    A name that is loopback's here may be another elsewhere, one with several addresses is reached by any of them, and
    one that is none of this node's is behind a translation: None.

    Raises:
        ConfigError: MASTER_PORT is no port.
    """
    if ranks.rank or ranks.init_method != "env://":
        return None
    host, port = environ["MASTER_ADDR"], environ["MASTER_PORT"]
    if not (port.isdecimal() and port.isascii() and 0 < int(port[:6]) < 1 << 16):
        raise ConfigError(f"MASTER_PORT={port} is no port; give a number from 1 to 65535 that is free on rank 0's node")
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun listens itself
        return None
    found = _resolve_all(host)
    own = {address for _, address in (own_addresses() if ranks.on_several_nodes else _addresses())}
    return (found[0], int(port)) if len(found) == 1 and found[0] in own else None


def _first_that_answers(addresses: list[str], port: int) -> str:
    own = {address for _, address in own_addresses()}
    for address in addresses:
        # A bridge that every node has with the same address (docker0) leads to this node itself.
        if address not in own:
            with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=_PROBE_TIMEOUT_S):
                return address
    return ""


def _at_master(host: str, ranks: Ranks) -> Meeting:
    addresses = _resolve(host)
    # On its own node a name may well be loopback's; then the route to anywhere tells the interface.
    named = not host.replace(".", "").isdigit() and host != "localhost"
    if not addresses and named and ranks.rank == ranks.local_rank:
        return Meeting(ranks.init_method, host, interface_towards(ANYWHERE))
    if not addresses:
        raise ConfigError(
            f"MASTER_ADDR={host} is no address that other nodes can reach (unknown, or loopback), and the "
            f"{ranks.size} ranks are on several; give the address of rank 0's node"
        )
    return Meeting(ranks.init_method, addresses[0], interface_towards(addresses[0]))


def _by_node_list(ranks: Ranks, environ: Mapping[str, str]) -> Meeting:
    if len(ranks.hosts) < 2:
        raise ConfigError(
            f"srun started {ranks.size} ranks on several nodes, and SLURM_STEP_NODELIST does not name them; "
            "export MASTER_ADDR and MASTER_PORT"
        )
    head = ranks.hosts[0]
    here = int(environ.get("SLURM_NODEID", "0")) == 0
    # On the first node its own name may well be loopback's: the way to the second node is what counts there.
    addresses = _resolve(ranks.hosts[1] if here else head)
    if not addresses:
        name = ranks.hosts[1] if here else head
        raise KnltrainError(
            f"node {name} of the job has no address that {socket.gethostname()} could reach: its name is unknown or "
            "resolves to loopback; export MASTER_ADDR, the address of rank 0's node, and MASTER_PORT"
        )
    # All ranks come to the same port without a word: one that differs from job to job and from step to step.
    port = 20000 + (int(environ.get("SLURM_JOB_ID", "0")) * 31 + int(environ.get("SLURM_STEP_ID", "0"))) % 12000
    interface = interface_towards(addresses[0])
    if not here:
        return Meeting(f"tcp://{addresses[0]}:{port}", addresses[0], interface)
    # The others come by this node's name, as they resolve it, which is what it is here too unless that is loopback.
    named = _resolve(head) or [_source_towards(addresses[0])]
    listen = named[0] if len(named) == 1 and named[0] in {own for _, own in own_addresses()} else ""
    address = listen or "127.0.0.1"
    return Meeting(f"tcp://{address}:{port}", address, interface, (listen, port) if listen else None)


def _in_a_process_of_its_own() -> Meeting:
    try:
        result = subprocess.run(
            [sys.executable, "-m", "knltrain.launch.rendezvous"],
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise KnltrainError(
            f"the ranks under Open MPI did not find each other in {START_TIMEOUT_S:.0f} s: one has not started"
        ) from None
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise KnltrainError(f"ranks under Open MPI did not find each other: {last}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return Meeting(**found)


def _main() -> None:
    mpi = OpenMpi()
    try:
        meeting = agree(mpi, discover())
    finally:
        mpi.close()
    print(json.dumps(dataclasses.asdict(meeting)))


if __name__ == "__main__":
    try:
        _main()
    except KnltrainError as error:
        sys.exit(str(error))
