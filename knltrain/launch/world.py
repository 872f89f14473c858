"""Who this process is: rank and world size, as told by whichever launcher started it.

Launchers are asked innermost first: torchrun, Open MPI, Hydra (MPICH, Intel MPI), srun. Torchrun may run under srun,
mpiexec inside a batch script whose variables linger, and both start their helpers on other nodes through srun.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from knltrain.errors import ConfigError

# Of a list that is damaged, expanding would fill the memory.
_MOST_NODES = 1_000_000


@dataclass(frozen=True)
class Ranks:
    """This process among its peers.

    Attributes:
        launcher: torchrun, openmpi, hydra (MPICH, Intel MPI), slurm, or none.
        rank: this process.
        size: all processes.
        local_rank: this process among those of its node.
        local_size: those.
        init_method: where the process group meets, as torch.distributed takes it; empty when alone, and where ranks
            are on several nodes and have yet to find each other (:func:`knltrain.launch.rendezvous.meet`).
        hosts: names of the nodes, the first rank's first, where the launcher tells them.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    init_method: str = ""
    hosts: tuple[str, ...] = ()

    @property
    def on_several_nodes(self) -> bool:
        """Whether some rank runs elsewhere."""
        return self.local_size < self.size


# name, rank, size, local rank, local size
_LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    (
        "openmpi",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("hydra", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # SLURM_NTASKS is also there in a batch script that never called srun; the step's count is not.
    ("slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)


def discover(environ: Mapping[str, str] | None = None) -> Ranks:
    """Reads the launcher's variables, in the order torchrun, Open MPI, Hydra (MPICH, Intel MPI), Slurm.

    Raises:
        ConfigError: the launchers contradict each other (each of several processes has started a launcher of its
            own), a variable is no number, the launcher is unknown, or nothing says how many ranks are on this node
            or where they meet.
    """
    environ = os.environ if environ is None else environ
    found = [_read(environ, *keys) for keys in _LAUNCHERS if keys[1] in environ and keys[2] in environ]
    # With --mpi=pmi2, srun sets PMI_RANK and PMI_SIZE as well, but not what Hydra says of a node.
    if len(found) > 1 and found[0].launcher == "hydra" and "MPI_LOCALNRANKS" not in environ:
        found.pop(0)
    if not found:
        return Ranks("none", 0, 1, 0, 1)
    inner = found[0]
    for outer in found[1:]:
        same = (inner.rank, inner.size) == (outer.rank, outer.size)
        if outer.size > 1 and not same and (inner.size < outer.size or not inner.on_several_nodes):
            keys = next(keys for keys in _LAUNCHERS if keys[0] == inner.launcher)
            says = "this one is alone" if inner.size == 1 else f"these are all of {inner.size}, on one node"
            raise ConfigError(
                f"{outer.launcher} started {outer.size} processes, but {inner.launcher} says {says} "
                f"({keys[2]}={inner.size}): each would train a model of its own. Start knltrain with one launcher "
                f"only, or unset {keys[1]} and {keys[2]}"
            )
    if inner.size == 1:
        return Ranks(inner.launcher, 0, 1, 0, 1)
    if inner.launcher == "torchrun" and not {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= environ.keys():
        # A script between the launcher and knltrain has exported what it says, but not of the node.
        repeated = [outer for outer in found[1:] if (outer.rank, outer.size) == (inner.rank, inner.size)]
        if not repeated:
            raise ConfigError(
                f"RANK={inner.rank} and WORLD_SIZE={inner.size} leave open how many ranks share this node's cores; "
                "export LOCAL_RANK and LOCAL_WORLD_SIZE too"
            )
        inner = repeated[0]
    if inner.launcher == "hydra" and "MPI_LOCALNRANKS" not in environ:
        raise ConfigError(
            f"a launcher that is none of torchrun, Open MPI, Hydra and srun started {inner.size} processes (PMI_SIZE); "
            "export RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each"
        )
    return replace(inner, init_method=_meeting_point(environ, inner))


def rank_as_told(environ: Mapping[str, str] | None = None) -> str:
    """Which rank the innermost launcher says this process is, whatever else it says; empty where there is none.

    A single task of Slurm's is none: a job that takes no ranks is started so too.
    """
    environ = os.environ if environ is None else environ
    for name, rank, size, *_ in _LAUNCHERS:
        if environ.get(rank) and (name != "slurm" or environ.get(size, "1") != "1"):
            return environ[rank]
    return ""


def _read(
    environ: Mapping[str, str], name: str, rank_key: str, size_key: str, local_rank_key: str, local_size_key: str
) -> Ranks:
    """What one launcher says."""
    rank, size = _number(environ, rank_key), _number(environ, size_key)
    if not 0 <= rank < size:
        raise ConfigError(f"{rank_key}={rank} does not fit {size_key}={size}; start through {name} or unset both")
    hosts: tuple[str, ...] = ()
    local_rank = _number(environ, local_rank_key) if local_rank_key in environ else rank
    if name == "slurm":
        counts = expand_counts(environ.get(local_size_key, str(size)))
        node = _number(environ, "SLURM_NODEID") if "SLURM_NODEID" in environ else 0
        if not 0 <= node < len(counts):
            raise ConfigError(f"SLURM_NODEID={node} does not fit {local_size_key}={environ[local_size_key]}")
        local_size = counts[node]
        listed = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
        hosts = expand_hosts(listed) if listed else ()
    else:
        local_size = _number(environ, local_size_key) if local_size_key in environ else size
    if not 0 <= local_rank < local_size <= size:
        raise ConfigError(f"{name}: local rank {local_rank} of {local_size} does not fit rank {rank} of {size}")
    return Ranks(name, rank, size, local_rank, local_size, hosts=hosts)


def _number(environ: Mapping[str, str], key: str) -> int:
    try:
        return int(environ[key])
    except ValueError:
        raise ConfigError(f"{key}={environ[key]} is no number; the launcher's variables are damaged") from None


def _meeting_point(environ: Mapping[str, str], ranks: Ranks) -> str:
    given = [name for name in ("MASTER_ADDR", "MASTER_PORT") if environ.get(name)]
    if len(given) == 2:
        return "env://"
    if ranks.on_several_nodes:
        if given:
            raise ConfigError(f"{given[0]} is set alone: export both MASTER_ADDR and MASTER_PORT, or none of them")
        if ranks.launcher == "torchrun":
            raise ConfigError(
                "torchrun's MASTER_ADDR and MASTER_PORT are missing; the launcher's variables are damaged"
            )
        return ""
    folder = environ.get("TMPDIR", "/tmp")
    return f"file://{folder}/knltrain-{os.getuid()}-{_name_of_job(environ, ranks)}"


def _name_of_job(environ: Mapping[str, str], ranks: Ranks) -> str:
    """What all ranks of one node have in common, with no other job there and no earlier one."""
    if _says_rank(environ, ranks, "slurm") and "SLURM_JOB_ID" in environ:
        return "-".join(environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    try:
        process = _process_of_launcher(ranks)
        # Its start time sets it apart from an earlier one of the same number.
        return f"{process}-{_fields_of(process)[19]}"
    except OSError:
        raise ConfigError(
            f"rank {ranks.rank} of {ranks.size} does not see the process of {ranks.launcher} that started it, as in a "
            "container of its own; export MASTER_ADDR=127.0.0.1 and MASTER_PORT, a free port, for all ranks"
        ) from None


def cpus_of_launcher(ranks: Ranks) -> frozenset[int]:
    """What the launcher's process on this node may run on, and hands down unless it pins; none where it is not seen."""
    try:
        return frozenset(os.sched_getaffinity(_process_of_launcher(ranks)))
    except OSError:
        return frozenset()


def _process_of_launcher(ranks: Ranks) -> int:
    """The launcher's process on this node: of mpiexec, its proxy.

    It is above what may stand between it and this rank: a shell, numactl, a container's runtime, each with this rank's
    variables.

    Raises:
        OSError: it is not seen from here.
    """
    process = os.getppid()
    while _says_rank(_environment_of(process), ranks):
        process = int(_fields_of(process)[1])
    return process


def _says_rank(environ: Mapping[str, str], ranks: Ranks, *launchers: str) -> bool:
    """Whether variables of one of these launchers, by default of any, give a process the rank and size of this one."""
    return any(
        (environ.get(rank), environ.get(size)) == (str(ranks.rank), str(ranks.size))
        for name, rank, size, *_ in _LAUNCHERS
        if not launchers or name in launchers
    )


def _environment_of(process: int) -> dict[str, str]:
    """The variables that a process was started with."""
    with open(f"/proc/{process}/environ", encoding="utf-8", errors="replace") as file:
        entries = (entry.partition("=") for entry in file.read().split("\0"))
        return {name: value for name, _, value in entries}


def _fields_of(process: int) -> list[str]:
    """What /proc says of a process after its name, which may hold anything: its state, its parent, and so on."""
    with open(f"/proc/{process}/stat") as stat:
        return stat.read().rpartition(")")[2].split()


def expand_counts(text: str) -> list[int]:
    """Expands Slurm's ``2(x3),1`` to a number for each node.

    Raises:
        ConfigError: it is no such list.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:\(x(\d{1,6})\))?", part.strip())
        if not match or len(counts) > _MOST_NODES:
            raise ConfigError(f"{text[:200]!r} is no list of tasks per node; Slurm's variables are damaged")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def expand_hosts(text: str) -> tuple[str, ...]:
    """Expands Slurm's ``node[001-003,7],gpu-a`` to names, leading zeros kept.

    Raises:
        ConfigError: it is no such list.
    """
    names: list[str] = []
    # Commas inside brackets do not part names.
    for pattern in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        expanded = [""]
        for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", pattern):
            choices = [literal] if literal else _expand_ranges(ranges, text)
            if len(expanded) * len(choices) + len(names) > _MOST_NODES:
                raise ConfigError(f"{text[:200]!r} are more nodes than there can be; Slurm's variables are damaged")
            expanded = [prefix + choice for prefix in expanded for choice in choices]
        names += expanded
    if re.sub(r"\[[\d,-]+\]", "", text).count("[") or not names:
        raise ConfigError(f"{text[:200]!r} is no list of nodes; Slurm's variables are damaged")
    return tuple(names)


def _expand_ranges(ranges: str, text: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())
        if not match or (match[2] and not 0 <= int(match[2]) - int(match[1]) < _MOST_NODES):
            raise ConfigError(f"{text[:200]!r} is no list of nodes; Slurm's variables are damaged")
        first, last = match[1], match[2] or match[1]
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers
