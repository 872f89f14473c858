"""The launchers that knltrain knows, by the variables in which each gives a process its rank.

Flux: flux-environment(7). MVAPICH: its user guide, "Running Applications". jsrun: IBM JSM's environment variables.
PALS: mpiexec(1) of HPE Cray. The others are described by their own manuals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from knltrain.errors import ConfigError
from knltrain.launch.environment import given


class Launcher(NamedTuple):
    """A launcher, and the names of its variables.

    Attributes:
        name: for messages and result files.
        rank: the variable of the global rank.
        size: of the world size.
        local_rank: of the rank on the node.
        local_size: of the number of ranks on the node; of something that gives it, under Flux and Slurm.
        unpinned: how to start it so that it pins no rank; empty if it never does.
        passes_on_mask: whether ranks that it does not pin have the CPU mask of its own process.
    """

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    unpinned: str = ""
    passes_on_mask: bool = False


def _of_mpi(name: str, prefix: str, unpinned: str = "", *, passes_on_mask: bool = False) -> Launcher:
    """A launcher whose variables have a common prefix."""
    rank, size, local_rank, local_size = (prefix + part for part in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    return Launcher(name, rank, size, local_rank, local_size, unpinned, passes_on_mask)


# The innermost first: torchrun may run under srun or flux, mpiexec inside a batch script whose variables are still
# set, and mpiexec and torchrun start their daemons on other nodes with srun.
LAUNCHERS = (
    Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    _of_mpi("openmpi", "OMPI_COMM_WORLD_", "mpiexec --bind-to none", passes_on_mask=True),
    Launcher("hydra", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS",
             "mpiexec -genv I_MPI_PIN=0 (Intel MPI) or -bind-to none (MPICH)", passes_on_mask=True),
    _of_mpi("mvapich", "MV2_COMM_WORLD_"),  # MPI_Init pins, which knltrain does not call
    _of_mpi("mvapich", "MVP_COMM_WORLD_"),
    Launcher("pals", "PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE", "mpiexec --cpu-bind none"),
    _of_mpi("jsrun", "JSM_NAMESPACE_", "jsrun --bind none"),
    Launcher("flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", "FLUX_JOB_NNODES",
             "flux run -o cpu-affinity=off", passes_on_mask=True),
    # SLURM_NTASKS is also there in a batch script that never called srun; the step's count is not.
    Launcher("slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE",
             "srun --cpu-bind=none, with enough --cpus-per-task"),
)  # fmt: skip

# Variables of a rank whose launcher does not say enough for a run: who sets them, the rank, and the size if there is
# one.
_STRANGERS = (
    ("a launcher that speaks PMI", "PMI_RANK", "PMI_SIZE"),
    ("a PMIx launcher (prun, prterun)", "PMIX_RANK", ""),
    ("PALS (mpiexec of HPE Cray)", "PALS_RANKID", ""),
    ("ALPS (aprun)", "ALPS_APP_PE", ""),
    ("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE"),
    ("mpirun_rsh", "MPIRUN_RANK", "MPIRUN_NPROCS"),
    ("Platform MPI", "MPI_RANKID", "MPI_NRANKS"),
    ("poe", "MP_CHILD", "MP_PROCS"),
    ("blaunch", "LSF_PM_TASKID", ""),
    # Of a node alone, without the rank among all.
    ("mpiexec of MPICH or Intel MPI", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("a launcher", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("a launcher", "NODE_RANK", ""),
)
# Numbers of the steps that are no srun of the user: Slurm runs a job script, or the shell of salloc, in one.
_SCRIPT_STEPS = ("4294967290", "4294967291")


def in_job_script(environ: Mapping[str, str]) -> bool:
    """Whether Slurm's variables are those of a job script or of salloc's shell, which are no ranks."""
    return environ.get("SLURM_STEP_ID") in _SCRIPT_STEPS


def complete(environ: Mapping[str, str]) -> Iterator[Launcher]:
    """Yields the launchers whose variables give this process a rank among others, the innermost first."""
    for launcher in LAUNCHERS:
        needed = [launcher.rank, launcher.size]
        if launcher.name not in ("torchrun", "slurm") and environ.get(launcher.size) != "1":
            needed += [launcher.local_rank, launcher.local_size]
        if not (launcher.name == "slurm" and in_job_script(environ)) and all(name in environ for name in needed):
            yield launcher


def launcher_rank(environ: Mapping[str, str] | None = None) -> str:
    """Returns the rank in the innermost launcher's variables, unchecked; empty without a launcher.

    A single Slurm task does not count as a rank: commands that are not parallel are started so too.

    Args:
        environ: the environment, by default this process's.
    """
    environ = given(environ)
    for name, rank, size in (*((one.name, one.rank, one.size) for one in LAUNCHERS), *_STRANGERS):
        if rank in environ and (name != "slurm" or environ.get(size, "1") != "1"):
            return environ[rank]
    return ""


def refuse_strangers(environ: Mapping[str, str], known: Iterable[tuple[int, int]]) -> None:
    """Refuses a process that some launcher has started as one of several, if knltrain cannot tell of how many.

    Args:
        environ: the environment, without empty variables.
        known: rank and size by each launcher that is known; a variable that repeats one of them says nothing new.

    Raises:
        ConfigError: each process would train a model of its own.
    """
    ranks = [(str(rank), str(size)) for rank, size in known]
    # The variables of PMI and PALS are those of strangers as well.
    by_launchers = [(one.name, one.rank, one.size) for one in LAUNCHERS if one.name not in ("hydra", "pals")]
    for name, rank_key, size_key in (*by_launchers, *_STRANGERS):
        rank, size = environ.get(rank_key), environ.get(size_key)
        explained = any(rank in (None, its_rank) and size in (None, its_size) for its_rank, its_size in ranks)
        if name == "slurm" and (in_job_script(environ) or (rank in (None, "0") and size is None)):
            continue  # a job script, outside of any step
        if name == "flux" and rank is None:
            continue
        if (rank is None and size in (None, "1")) or (size == "1" and rank == "0") or explained:
            continue
        who = "a launcher" if name == "torchrun" else name
        claims = {key: value for key, value in ((rank_key, rank), (size_key, size)) if value}
        seen = ", ".join(f"{key}={value[:100]}" for key, value in claims.items())
        raise ConfigError(
            f"{who} seems to have started this process as one of several ({seen}) and does not say all that a run "
            "needs: each would train a model of its own. Export RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, "
            f"MASTER_ADDR and MASTER_PORT for each{_example(environ, rank_key, size_key)}; or unset "
            f"{' and '.join(claims)} if this process is alone"
        )


def _example(environ: Mapping[str, str], rank_key: str, size_key: str) -> str:
    known = {"RANK": rank_key, "WORLD_SIZE": size_key,
             "LOCAL_RANK": "PALS_LOCAL_RANKID", "LOCAL_WORLD_SIZE": "PALS_LOCAL_SIZE"}  # fmt: skip
    words = [f"{name}=${key}" for name, key in known.items() if key in environ and name != key]
    return f", as in {' '.join(words)}" if words else ""
