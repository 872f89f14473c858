"""Rank and world size, from the variables of the launcher that started this process.

Launchers are tried innermost first: torchrun, Open MPI, Hydra (MPICH, Intel MPI), srun. torchrun may run under srun,
mpiexec inside a batch script whose variables are still set, and both start their daemons on other nodes with srun.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from knltrain.errors import ConfigError

# Expanding a damaged node list must not fill the memory.
_MAX_NODES = 1_000_000


@dataclass(frozen=True)
class Ranks:
    """This process among its peers.

    Attributes:
        launcher: torchrun, openmpi, hydra (MPICH, Intel MPI), slurm, or none.
        rank: global rank of this process.
        size: world size.
        local_rank: rank of this process on its node.
        local_size: number of ranks on its node.
        init_method: as for ``torch.distributed.init_process_group``; empty with one rank, and if
            :func:`knltrain.launch.rendezvous.find_rendezvous` has yet to find rank 0 on another node.
        hosts: names of the nodes, rank 0's first; empty if the launcher does not list them.
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
        """Whether a rank runs on another node."""
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
        ConfigError: launchers contradict each other (each of several processes has started a launcher of its own), a
            variable is not a number, the launcher is unknown, or no variable gives the ranks of this node or their
            rendezvous.
    """
    environ = os.environ if environ is None else environ
    found = [_read(environ, *keys) for keys in _LAUNCHERS if keys[1] in environ and keys[2] in environ]
    # With --mpi=pmi2, srun sets PMI_RANK and PMI_SIZE as well, but not Hydra's variables of a node.
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
        # A script between launcher and knltrain has exported RANK and WORLD_SIZE, but not the local ones.
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
    return replace(inner, init_method=_init_method(environ, inner))


def launcher_rank(environ: Mapping[str, str] | None = None) -> str:
    """Returns the rank in the innermost launcher's variables, unchecked; empty without a launcher.

    A single Slurm task does not count as a rank: commands that are not parallel are started so too.
    """
    environ = os.environ if environ is None else environ
    for name, rank, size, *_ in _LAUNCHERS:
        if environ.get(rank) and (name != "slurm" or environ.get(size, "1") != "1"):
            return environ[rank]
    return ""


def _read(
    environ: Mapping[str, str], name: str, rank_key: str, size_key: str, local_rank_key: str, local_size_key: str
) -> Ranks:
    """Reads one launcher's variables."""
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
        raise ConfigError(f"{key}={environ[key]} is not a number; the launcher's variables are damaged") from None


def _init_method(environ: Mapping[str, str], ranks: Ranks) -> str:
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
    return f"file://{folder}/knltrain-{os.getuid()}-{_job_id(environ, ranks)}"


def _job_id(environ: Mapping[str, str], ranks: Ranks) -> str:
    """Returns an id that the ranks of a run on this node share, and no other run does, concurrent or earlier."""
    if _has_rank_variables(environ, ranks, "slurm") and "SLURM_JOB_ID" in environ:
        return "-".join(environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    try:
        process = _launcher_process(ranks)
        # The start time tells it from an earlier process with the same id.
        return f"{process}-{_fields_of(process)[19]}"
    except OSError:
        raise ConfigError(
            f"rank {ranks.rank} of {ranks.size} cannot see the process of {ranks.launcher} that started it, as in a "
            "container of its own; export MASTER_ADDR=127.0.0.1 and MASTER_PORT, a free port, for all ranks"
        ) from None


def launcher_cpus(ranks: Ranks) -> frozenset[int]:
    """Returns the CPU mask of the launcher's process on this node, which ranks inherit; empty if it is not visible."""
    try:
        return frozenset(os.sched_getaffinity(_launcher_process(ranks)))
    except OSError:
        return frozenset()


def _launcher_process(ranks: Ranks) -> int:
    """Returns the id of the launcher's process on this node; for mpiexec, of its proxy.

    It is the first ancestor without this rank's variables: a shell, numactl or a container runtime in between has them.

    Raises:
        OSError: it is not visible from here.
    """
    process = os.getppid()
    while _has_rank_variables(_environment_of(process), ranks):
        process = int(_fields_of(process)[1])
    return process


def _has_rank_variables(environ: Mapping[str, str], ranks: Ranks, *launchers: str) -> bool:
    """Whether variables of one of these launchers, by default of any, have the rank and size of this process."""
    return any(
        (environ.get(rank), environ.get(size)) == (str(ranks.rank), str(ranks.size))
        for name, rank, size, *_ in _LAUNCHERS
        if not launchers or name in launchers
    )


def _environment_of(process: int) -> dict[str, str]:
    """Returns the environment that a process was started with."""
    with open(f"/proc/{process}/environ", encoding="utf-8", errors="replace") as file:
        entries = (entry.partition("=") for entry in file.read().split("\0"))
        return {name: value for name, _, value in entries}


def _fields_of(process: int) -> list[str]:
    """Returns the fields of /proc/PID/stat after the name, which may contain anything: state, parent, and so on."""
    with open(f"/proc/{process}/stat") as stat:
        return stat.read().rpartition(")")[2].split()


def expand_counts(text: str) -> list[int]:
    """Expands Slurm's ``2(x3),1`` to a number for each node.

    Raises:
        ConfigError: it is not such a list.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:\(x(\d{1,6})\))?", part.strip())
        if not match or len(counts) > _MAX_NODES:
            raise ConfigError(f"{text[:200]!r} is not a list of tasks per node; Slurm's variables are damaged")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def expand_hosts(text: str) -> tuple[str, ...]:
    """Expands Slurm's ``node[001-003,7],gpu-a`` to names, leading zeros kept.

    Raises:
        ConfigError: it is not such a list.
    """
    names: list[str] = []
    # Commas inside brackets do not separate names.
    for pattern in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        expanded = [""]
        for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", pattern):
            choices = [literal] if literal else _expand_ranges(ranges, text)
            if len(expanded) * len(choices) + len(names) > _MAX_NODES:
                raise ConfigError(f"{text[:200]!r} has too many nodes; Slurm's variables are damaged")
            expanded = [prefix + choice for prefix in expanded for choice in choices]
        names += expanded
    if re.sub(r"\[[\d,-]+\]", "", text).count("[") or not names:
        raise ConfigError(f"{text[:200]!r} is not a list of nodes; Slurm's variables are damaged")
    return tuple(names)


def _expand_ranges(ranges: str, text: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())
        if not match or (match[2] and not 0 <= int(match[2]) - int(match[1]) < _MAX_NODES):
            raise ConfigError(f"{text[:200]!r} is not a list of nodes; Slurm's variables are damaged")
        first, last = match[1], match[2] or match[1]
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers
