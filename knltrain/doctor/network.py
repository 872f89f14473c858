"""What ``knltrain doctor`` sees of the network: interfaces, the host's own name, libfabric's providers."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from knltrain.doctor.finding import Finding
from knltrain.doctor.machine import Machine
from knltrain.launch.rendezvous import ANYWHERE, interface_towards, own_addresses
from knltrain.node.cpulist import read_number

_VARIABLES = ("GLOO_SOCKET_IFNAME", "CCL_KVS_IFACE", "FI_TCP_IFACE")
# Providers that drive something faster than TCP.
_FAST = ("mlx", "verbs", "psm2", "psm3", "opx", "efa", "cxi")
_LOOPBACK = "lo"


def interface(machine: Machine) -> Finding:
    """Which interface would be used, and where this host's name leads."""
    addresses = dict(own_addresses())
    shown = ", ".join(f"{name} {address}{_speed(machine.root, name)}" for name, address in addresses.items())
    named = {name: machine.environ[name] for name in _VARIABLES if machine.environ.get(name)}
    for variable, value in named.items():
        if not set(value.split(",")) & {*addresses, _LOOPBACK}:
            return Finding(
                "interface",
                "error",
                f"{variable}={value}, and the interfaces are: {shown or 'none'}",
                "ranks do not find each other",
                f"unset {variable}, or name one of these",
            )
        if value == _LOOPBACK and addresses:
            return Finding(
                "interface",
                "warning",
                f"{variable}={_LOOPBACK}: loopback; the interfaces are: {shown}",
                "ranks on other nodes do not find those on this one",
                f"unset {variable}",
            )
    if not addresses:
        return Finding(
            "interface",
            "note",
            "loopback alone has an IPv4 address",
            "ranks of this node alone can train together",
            "none needed on one node",
        )
    chosen = named.get("GLOO_SOCKET_IFNAME") or interface_towards(ANYWHERE)
    speeds = {name: _mbits(machine.root, name) for name in addresses}
    fastest = max(speeds, key=speeds.__getitem__)
    if chosen in speeds and speeds[fastest] > speeds[chosen]:
        sets = " ".join(f"{variable}={fastest}" for variable in _VARIABLES)
        return Finding(
            "interface",
            "note",
            f"{shown}; by default: {chosen}",
            f"gradients may travel over {chosen}, which is the slower one, where the routes to the other "
            "nodes lead over it",
            f"export {sets}, if the other nodes have it too",
        )
    host = socket.gethostname()
    leads = _resolve(host)
    if all(ipaddress.ip_address(address).is_loopback for address in leads):
        where = ", ".join(leads) or "nothing"
        return Finding(
            "interface",
            "note",
            f"host name {host} resolves to {where} here; {shown}",
            f"MASTER_ADDR={host} does not lead from here to this node's network; ranks that mpiexec starts "
            "find each other all the same",
            f"a line in /etc/hosts: {addresses.get(chosen, fastest)} {host}",
        )
    by = "as GLOO_SOCKET_IFNAME says" if chosen in named.values() else "by the default route"
    return Finding("interface", "ok", f"{shown}; {chosen or 'none'} {by}")


def _mbits(root: Path, name: str) -> int:
    """The speed of a link, Mbit/s; 0 where the driver does not know it."""
    return max(0, read_number(root / f"sys/class/net/{name}/speed") or 0)


def _speed(root: Path, name: str) -> str:
    mbits = _mbits(root, name)
    return f" ({mbits / 1000:g} Gbit/s)" if mbits else ""


def _resolve(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(info[4][0]) for info in found))


def libfabric(machine: Machine) -> Finding:
    """Which providers libfabric has, through which oneCCL and Intel MPI reach the network."""
    folder = provider_folder(machine.environ)
    if folder is None and not ctypes.util.find_library("fabric"):
        return Finding(
            "libfabric",
            "note",
            "neither impi-rt nor a libfabric of the system was found",
            "oneCCL has no transport, and gradients travel over gloo",
            "pip install 'knltrain[intel]'",
        )
    if folder is None:
        return Finding("libfabric", "ok", "the system's, with its providers built in; fi_info -l lists them")
    providers = _providers(folder)
    where = f"{', '.join(providers) or 'no provider'} in {folder}"
    asked = machine.environ.get("FI_PROVIDER", "").lstrip("^")
    unknown = [name for name in re.split(r"[,;]", asked) if name and not name.startswith(("ofi_", *providers))]
    if not providers or unknown:
        told = f"FI_PROVIDER={asked}, and there is: " if unknown else ""
        variable = "FI_PROVIDER" if unknown else "FI_PROVIDER_PATH"
        return Finding(
            "libfabric",
            "warning",
            told + where,
            "oneCCL and Intel MPI do not start",
            f"unset {variable}, or correct it",
        )
    cards = sorted(path.name for path in _entries(machine.root / "sys/class/infiniband"))
    if cards and not set(providers) & set(_FAST):
        return Finding(
            "libfabric",
            "warning",
            f"{', '.join(cards)} in this node, and libfabric has {where}",
            "gradients travel over TCP beside a faster network",
            "the site's own libfabric: export FI_PROVIDER_PATH, or load its module",
        )
    return Finding("libfabric", "ok", where + (f"; in this node: {', '.join(cards)}" if cards else ""))


def provider_folder(environ: Mapping[str, str]) -> Path | None:
    """Where libfabric's providers are: as told, of the oneAPI that is set up, or of the package impi-rt."""
    if told := environ.get("FI_PROVIDER_PATH"):
        return Path(told.split(":")[0])
    if root := environ.get("I_MPI_ROOT"):
        for below in ("opt/mpi/libfabric/lib/prov", "libfabric/lib/prov"):
            if (folder := Path(root, below)).is_dir():
                return folder
    try:
        files = importlib.metadata.files("impi-rt") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = next((file for file in files if file.name == "libtcp-fi.so"), None)
    return Path(os.path.normpath(found.locate())).parent if found else None


def _providers(folder: Path) -> list[str]:
    """The names in libNAME-fi.so and libNAME-VERSION-fi.so."""
    matches = (re.fullmatch(r"lib(\w+)(?:-[\d.]+)?-fi\.so", path.name) for path in _entries(folder))
    return sorted({match[1].replace("psmx2", "psm2") for match in matches if match})


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
