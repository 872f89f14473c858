"""Checks of the network: interfaces, this host's name, libfabric's providers."""

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
from knltrain.launch.rendezvous import OUTSIDE_ADDRESS, interface_towards, own_addresses
from knltrain.node.cpulist import read_number

_VARIABLES = ("GLOO_SOCKET_IFNAME", "CCL_KVS_IFACE", "FI_TCP_IFACE")
# Providers of networks faster than TCP.
_FAST_PROVIDERS = ("mlx", "verbs", "psm2", "psm3", "opx", "efa", "cxi")
# Those that need a card that the kernel lists under infiniband.
_NEED_CARDS = {"mlx", "verbs", "psm2", "opx"}
_LOOPBACK = "lo"


def interface(machine: Machine) -> Finding:
    """Checks the interface that would be used, and the addresses of this host's name."""
    addresses = dict(own_addresses())
    shown = ", ".join(f"{name} {address}{_speed(machine.root, name)}" for name, address in addresses.items())
    named = {name: machine.environ[name] for name in _VARIABLES if machine.environ.get(name)}
    for variable, value in named.items():
        if not set(value.split(",")) & {*addresses, _LOOPBACK}:
            return Finding(
                "interface",
                "error",
                f"{variable}={value}, and the interfaces are: {shown or 'none'}",
                "ranks cannot connect to each other",
                f"unset {variable}, or name one of these",
            )
        if value == _LOOPBACK and addresses:
            return Finding(
                "interface",
                "warning",
                f"{variable}={_LOOPBACK}: loopback; the interfaces are: {shown}",
                "ranks on other nodes cannot connect to those on this one",
                f"unset {variable}",
            )
    if not addresses:
        return Finding(
            "interface",
            "note",
            "only loopback has an IPv4 address",
            "only ranks on this node can train together",
            "none needed on one node",
        )
    chosen = named.get("GLOO_SOCKET_IFNAME") or interface_towards(OUTSIDE_ADDRESS)
    speeds = {name: _mbits(machine.root, name) for name in addresses}
    fastest = max(speeds, key=speeds.__getitem__)
    if chosen in speeds and speeds[fastest] > speeds[chosen]:
        sets = " ".join(f"{variable}={fastest}" for variable in _VARIABLES)
        return Finding(
            "interface",
            "note",
            f"{shown}; by default: {chosen}",
            f"gradients are sent over {chosen}, which is slower, if the routes to the other nodes lead there",
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
            f"MASTER_ADDR={host} does not work on this node; ranks that mpiexec starts exchange their "
            "addresses and are not affected",
            f"a line in /etc/hosts: {addresses.get(chosen, fastest)} {host}",
        )
    by = "as GLOO_SOCKET_IFNAME says" if chosen in named.values() else "by the default route"
    return Finding("interface", "ok", f"{shown}; {chosen or 'none'} {by}")


def _mbits(root: Path, name: str) -> int:
    """Returns the speed of a link, Mbit/s; 0 if the driver does not report it."""
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
    """Checks the providers of libfabric, through which oneCCL and Intel MPI use the network."""
    folder = provider_folder(machine.environ)
    if folder is None and not ctypes.util.find_library("fabric"):
        return Finding(
            "libfabric",
            "note",
            "neither impi-rt nor a libfabric of the system was found",
            "oneCCL has no transport, and gradients are all-reduced over gloo",
            "pip install 'knltrain[intel]'",
        )
    if folder is None:
        return Finding("libfabric", "ok", "the system's, with its providers built in; fi_info -l lists them")
    providers = _providers(folder)
    where = f"{', '.join(providers) or 'no provider'} in {folder}"
    asked = machine.environ.get("FI_PROVIDER", "").lstrip("^")
    unknown = [name for name in re.split(r"[,;]", asked) if name and not name.startswith(("ofi_", *providers))]
    if not providers or unknown:
        configured = f"FI_PROVIDER={asked}, and there is: " if unknown else ""
        variable = "FI_PROVIDER" if unknown else "FI_PROVIDER_PATH"
        return Finding(
            "libfabric",
            "warning",
            configured + where,
            "oneCCL and Intel MPI do not start",
            f"unset {variable}, or correct it",
        )
    cards = sorted(path.name for path in _entries(machine.root / "sys/class/infiniband"))
    if not cards and set(re.split(r"[,;]", asked)) & _NEED_CARDS and not machine.environ["FI_PROVIDER"].startswith("^"):
        return Finding(
            "libfabric",
            "warning",
            f"FI_PROVIDER={asked}, and this node has no card for it (/sys/class/infiniband); {where}",
            "oneCCL and Intel MPI do not start",
            "unset FI_PROVIDER, or name tcp",
        )
    if cards and not set(providers) & set(_FAST_PROVIDERS):
        return Finding(
            "libfabric",
            "warning",
            f"{', '.join(cards)} in this node, and libfabric has {where}",
            "gradients are sent over TCP although there is a faster network",
            "the site's own libfabric: export FI_PROVIDER_PATH, or load its module",
        )
    return Finding("libfabric", "ok", where + (f"; in this node: {', '.join(cards)}" if cards else ""))


def provider_folder(environ: Mapping[str, str]) -> Path | None:
    """Returns the folder of libfabric's providers: FI_PROVIDER_PATH, oneAPI's, or that of the package impi-rt."""
    if configured := environ.get("FI_PROVIDER_PATH"):
        return Path(configured.split(":")[0])
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
    """Returns the names in libNAME-fi.so and libNAME-VERSION-fi.so."""
    matches = (re.fullmatch(r"lib(\w+)(?:-[\d.]+)?-fi\.so", path.name) for path in _entries(folder))
    return sorted({match[1].replace("psmx2", "psm2") for match in matches if match})


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
