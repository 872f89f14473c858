"""Rank and world size, from the variables of the launcher that started this process."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from knltrain.errors import ConfigError
from knltrain.launch.allocation import forgotten_launcher
from knltrain.launch.environment import given, number
from knltrain.launch.hosts import expand_counts, expand_hosts
from knltrain.launch.launchers import Launcher, complete, launcher_rank, refuse_strangers
from knltrain.launch.processes import has_rank_variables, launcher_id


@dataclass(frozen=True)
class Ranks:
    """This process among its peers.

    Attributes:
        launcher: a name of :data:`~knltrain.launch.launchers.LAUNCHERS`, or none.
        rank: global rank of this process.
        size: world size.
        local_rank: rank of this process on its node.
        local_size: number of ranks on its node.
        init_method: as for ``torch.distributed.init_process_group``; empty with one rank, and if
            :func:`knltrain.launch.rendezvous.find_rendezvous` has yet to find rank 0 on another node.
        hosts: names of the nodes, rank 0's first; empty if the launcher does not list them.
        warnings: about what the launcher says, for the user, one sentence each.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    init_method: str = ""
    hosts: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def on_several_nodes(self) -> bool:
        """Whether a rank runs on another node."""
        return self.local_size < self.size


def discover(environ: Mapping[str, str] | None = None) -> Ranks:
    """Reads the launcher's variables, those of the innermost launcher first (:data:`~knltrain.launch.launchers`).

    Raises:
        ConfigError: launchers contradict each other (each of several processes has started a launcher of its own), a
            variable is not a number, the launcher does not say enough, or no variable gives the ranks of this node or
            their rendezvous.
    """
    environ = given(environ)
    launchers = {launcher: _read(environ, launcher) for launcher in complete(environ)}
    found = list(launchers.values())
    # RANK and WORLD_SIZE are a user's own word, whatever else is set.
    if not found or (found[0].size == 1 and found[0].launcher != "torchrun"):
        refuse_strangers(environ, [(one.rank, one.size) for one in found])
    if not found:
        said = forgotten_launcher(environ)
        return Ranks("none", 0, 1, 0, 1, warnings=(said,) if said else ())
    _refuse_contradiction(launchers)
    inner = found[0]
    if inner.size == 1:
        return Ranks(inner.launcher, 0, 1, 0, 1)
    if inner.launcher == "torchrun" and not {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= environ.keys():
        # A script between launcher and knltrain has exported RANK and WORLD_SIZE, but not the local ones.
        repeated = [outer for outer in found[1:] if (outer.rank, outer.size) == (inner.rank, inner.size)]
        inner = repeated[0] if repeated else _one_per_node(environ, inner)
    return replace(inner, init_method=_init_method(environ, inner))


def _refuse_contradiction(launchers: Mapping[Launcher, Ranks]) -> None:
    """Refuses a launcher of several processes each of which has started a launcher of its own."""
    (names, inner), *others = launchers.items()
    for outer in (ranks for _, ranks in others):
        same = (inner.rank, inner.size) == (outer.rank, outer.size)
        if outer.size > 1 and not same and (inner.size < outer.size or not inner.on_several_nodes):
            says = "this one is alone" if inner.size == 1 else f"these are all of {inner.size}, on one node"
            raise ConfigError(
                f"{outer.launcher} started {outer.size} processes, but {inner.launcher} says {says} "
                f"({names.size}={inner.size}): each would train a model of its own. Start knltrain with one launcher "
                f"only, or unset {names.rank} and {names.size}"
            )


def _read(environ: Mapping[str, str], launcher: Launcher) -> Ranks:
    """Reads one launcher's variables."""
    name = launcher.name
    rank, size = number(environ, launcher.rank), number(environ, launcher.size)
    if not 0 <= rank < size:
        raise ConfigError(
            f"{launcher.rank}={rank} does not fit {launcher.size}={size}; start through {name} or unset both"
        )
    hosts: tuple[str, ...] = ()
    local_rank = number(environ, launcher.local_rank) if launcher.local_rank in environ else rank
    local_size = size
    if name == "slurm":
        local_size = _slurm_tasks_here(environ, launcher.local_size, size)
        variable = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in environ else "SLURM_JOB_NODELIST"
        hosts = expand_hosts(environ[variable], given_as=variable) if variable in environ else ()
    elif name == "flux" and size > 1:
        local_size = _flux_tasks_here(environ, launcher, size)
    elif launcher.local_size in environ:
        local_size = number(environ, launcher.local_size)
    if not 0 <= local_rank < local_size <= size:
        raise ConfigError(f"{name}: local rank {local_rank} of {local_size} does not fit rank {rank} of {size}")
    return Ranks(name, rank, size, local_rank, local_size, hosts=hosts)


def _slurm_tasks_here(environ: Mapping[str, str], variable: str, size: int) -> int:
    counts = expand_counts(environ.get(variable, str(size)))
    node = number(environ, "SLURM_NODEID") if "SLURM_NODEID" in environ else 0
    if not 0 <= node < len(counts):
        raise ConfigError(f"SLURM_NODEID={node} does not fit {variable}={environ[variable]}")
    return counts[node]


def _flux_tasks_here(environ: Mapping[str, str], launcher: Launcher, size: int) -> int:
    """Returns the tasks of a node. Flux tells only the number of nodes, and spreads tasks by the cores they get."""
    nodes, local_rank = number(environ, launcher.local_size), number(environ, launcher.local_rank)
    if nodes < 1 or size % nodes or local_rank >= size // nodes:
        raise ConfigError(
            f"flux started {size} tasks on {nodes} nodes, and not as many on each; give flux run "
            "--tasks-per-node, or export LOCAL_RANK and LOCAL_WORLD_SIZE with RANK, WORLD_SIZE, MASTER_ADDR and "
            "MASTER_PORT"
        )
    return size // nodes


def _one_per_node(environ: Mapping[str, str], ranks: Ranks) -> Ranks:
    """Returns a rank that has its node alone: what RANK, WORLD_SIZE and an address mean in a pod of Kubernetes.

    Raises:
        ConfigError: they may mean something else.
    """
    in_pod = "KUBERNETES_SERVICE_HOST" in environ
    address = environ.get("MASTER_ADDR", "")
    # The first pod of a PyTorchJob may be told that it is at localhost.
    elsewhere = bool(address) and (not is_loopback(address) or (in_pod and ranks.rank == 0))
    known = {name for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE") if name in environ}
    others = {name: value for name, value in environ.items() if name not in ("RANK", "WORLD_SIZE")}
    if not elsewhere or "MASTER_PORT" not in environ or known or launcher_rank(others):
        raise ConfigError(
            f"RANK={ranks.rank} and WORLD_SIZE={ranks.size} leave open how many ranks share this node's cores; "
            "export LOCAL_RANK and LOCAL_WORLD_SIZE too"
        )
    said = (
        "RANK and WORLD_SIZE are set without LOCAL_RANK and LOCAL_WORLD_SIZE: this rank takes its node for its own; "
        "export them too if ranks share a node"
    )
    return replace(ranks, local_rank=0, local_size=1, warnings=() if in_pod else (said,))


def is_loopback(address: str) -> bool:
    """Whether a host name or address is loopback by its spelling."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _init_method(environ: Mapping[str, str], ranks: Ranks) -> str:
    exported = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name in environ]
    if len(exported) == 2:
        return "env://"
    if ranks.on_several_nodes:
        if exported:
            raise ConfigError(f"{exported[0]} is set alone: export both MASTER_ADDR and MASTER_PORT, or none of them")
        if ranks.launcher == "torchrun":
            raise ConfigError(
                "torchrun's MASTER_ADDR and MASTER_PORT are missing; the launcher's variables are damaged"
            )
        return ""
    # A folder of the user's own: any account of the node can tell these names.
    folder = environ.get("TMPDIR") or "/tmp"
    return f"file://{folder}/knltrain-{os.geteuid()}/{_job_id(environ, ranks)}"


def _job_id(environ: Mapping[str, str], ranks: Ranks) -> str:
    """Returns an id that the ranks of a run on this node share, and no other run does, concurrent or earlier."""
    if has_rank_variables(environ, ranks.rank, ranks.size, "slurm") and "SLURM_JOB_ID" in environ:
        return "-".join(environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    return launcher_id(ranks.launcher, ranks.rank, ranks.size)
