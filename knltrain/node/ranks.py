"""Who this process is: rank and world size, as told by whichever launcher started it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from knltrain.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """This process among its peers.

    Attributes:
        launcher: torchrun, openmpi, hydra (MPICH, Intel MPI), slurm, or none.
        init_method: where the process group meets, as torch.distributed takes it; empty when alone.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    init_method: str = ""


# Innermost launcher first: torchrun may run under srun, and mpiexec inside an sbatch script whose variables linger.
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
        ConfigError: the launchers contradict each other (several processes were started, but the innermost
            launcher says there is one), a variable is no number, or several nodes have no rendezvous address.
    """
    environ = os.environ if environ is None else environ
    found = [launcher for launcher in _LAUNCHERS if launcher[1] in environ and launcher[2] in environ]
    if not found:
        return Ranks("none", 0, 1, 0, 1)
    name, *keys = found[0]
    rank, size = _number(environ, keys[0]), _number(environ, keys[1])
    if not 0 <= rank < size:
        raise ConfigError(f"{keys[0]}={rank} does not fit {keys[1]}={size}; start through {name} or unset both")
    for other, _, other_size, *_ in found[1:]:
        if size == 1 and _number(environ, other_size) > 1:
            raise ConfigError(
                f"{other} started {environ[other_size]} processes, but {name} says this one is alone "
                f"({keys[1]}=1): each would train a model of its own. Start knltrain with one launcher only, "
                f"or unset {keys[0]} and {keys[1]}"
            )
    if size == 1:
        return Ranks(name, 0, 1, 0, 1)
    # Slurm writes "2(x3),1": only the count on this node matters, and one node has one entry.
    local_size = int(environ.get(keys[3], str(size)).split("(")[0].split(",")[0])
    local_rank = _number(environ, keys[2]) if keys[2] in environ else rank
    return Ranks(name, rank, size, local_rank, local_size, _meeting_point(environ, name, size, local_size))


def _number(environ: Mapping[str, str], key: str) -> int:
    try:
        return int(environ[key])
    except ValueError:
        raise ConfigError(f"{key}={environ[key]} is no number; the launcher's variables are damaged") from None


def _meeting_point(environ: Mapping[str, str], launcher: str, size: int, local_size: int) -> str:
    if "MASTER_ADDR" in environ and "MASTER_PORT" in environ:
        return "env://"
    if local_size < size:
        raise ConfigError(
            f"{launcher} started {size} ranks on several nodes, and MASTER_ADDR and MASTER_PORT are not set: "
            "export the address of rank 0's node and a free port there"
        )
    # All ranks of a node have the same parent (mpiexec's proxy, slurmstepd), and its start time sets this job's
    # file apart from one left by an earlier process of the same number.
    parent = os.getppid()
    with open(f"/proc/{parent}/stat") as stat:
        started = stat.read().rpartition(")")[2].split()[19]
    folder = environ.get("TMPDIR", "/tmp")
    return f"file://{folder}/knltrain-{os.getuid()}-{parent}-{started}"
