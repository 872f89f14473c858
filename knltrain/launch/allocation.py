"""The nodes and tasks that a batch system has given to the job that this process is in."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from knltrain.errors import ConfigError
from knltrain.files import open_regular
from knltrain.launch.environment import number
from knltrain.launch.hosts import expand_hosts

_MAX_BYTES = 1 << 24
_FLUX_TIMEOUT_S = 10


class Allocation(NamedTuple):
    """What a job has.

    Attributes:
        system: the batch system.
        nodes: how many; 0 if it does not say.
        tasks: how many processes were asked for; 0 if it does not say: PBS's slots of one node, LSF's and SGE's are
            as often the cores of one process.
        hosts: names of the nodes, each once; empty if mpiexec is to find them, or if the system does not tell.
        launcher: how ranks are started in such a job.
    """

    system: str
    nodes: int
    tasks: int
    hosts: tuple[str, ...]
    launcher: str


def read_allocation(environ: Mapping[str, str]) -> Allocation | None:
    """Returns what the batch system says of this process's job; None outside of one.

    Args:
        environ: the environment, without empty variables.

    Raises:
        ConfigError: it names a file that cannot be read, or a number or host that is none.
    """
    # Slurm first: mpiexec reads its node list by itself.
    readers = (_slurm, _pbs, _lsf, _grid_engine, _flux)
    return next((found for reader in readers if (found := reader(environ))), None)


def forgotten_launcher(environ: Mapping[str, str]) -> str:
    """Returns a warning for a process without a launcher in a job of several nodes or tasks; otherwise ''."""
    with contextlib.suppress(ConfigError):
        job = read_allocation(environ)
        if job and (job.nodes > 1 or job.tasks > 1):
            has = " and ".join(f"{count} {what}s" for count, what in ((job.nodes, "node"), (job.tasks, "task"))
                               if count > 1)  # fmt: skip
            return (
                f"this {job.system} job has {has}, and no launcher started this process: it trains alone, on one "
                f"node; start the ranks of one run with {job.launcher}"
            )
    return ""


def _slurm(environ: Mapping[str, str]) -> Allocation | None:
    nodes, tasks = _count(environ, "SLURM_JOB_NUM_NODES", "SLURM_NNODES"), _count(environ, "SLURM_NTASKS")
    return Allocation("Slurm", nodes, tasks, (), "srun, as run/slurm.sbatch does") if nodes or tasks else None


def _count(environ: Mapping[str, str], *names: str) -> int:
    """Returns the number in the first of these variables that is set; 0 if none is."""
    name = next((name for name in names if name in environ), "")
    count = number(environ, name) if name else 0
    if count < 0:
        raise ConfigError(f"{name}={count} is less than nothing; the batch system's variables are damaged")
    return count


def _pbs(environ: Mapping[str, str]) -> Allocation | None:
    if "PBS_NODEFILE" not in environ:
        return None
    lines = [line.split()[0] for line in _lines(environ, "PBS_NODEFILE")]
    # OpenPBS has a line for each task (mpiprocs), Torque for each CPU.
    tasks = 0 if "PBS_NUM_PPN" in environ else len(lines)
    return _of_hosts("PBS", lines, "PBS_NODEFILE", tasks)


def _lsf(environ: Mapping[str, str]) -> Allocation | None:
    if "LSB_DJOB_HOSTFILE" in environ:
        return _of_hosts("LSF", [line.split()[0] for line in _lines(environ, "LSB_DJOB_HOSTFILE")], "LSB_DJOB_HOSTFILE")
    if "LSB_MCPU_HOSTS" in environ:  # host1 4 host2 4
        return _of_hosts("LSF", environ["LSB_MCPU_HOSTS"].split()[::2], "LSB_MCPU_HOSTS")
    if "LSB_HOSTS" in environ:
        return _of_hosts("LSF", environ["LSB_HOSTS"].split(), "LSB_HOSTS")
    return None


def _grid_engine(environ: Mapping[str, str]) -> Allocation | None:
    if "PE_HOSTFILE" not in environ:
        return None
    return _of_hosts("SGE", [line.split()[0] for line in _lines(environ, "PE_HOSTFILE")], "PE_HOSTFILE")


def _of_hosts(system: str, names: list[str], variable: str, tasks: int = 0) -> Allocation:
    hosts = expand_hosts(",".join(names), given_as=variable)
    return Allocation(system, len(hosts), tasks, hosts, "`knltrain launch -- train ...`")


def _lines(environ: Mapping[str, str], variable: str) -> Iterator[str]:
    """Yields the lines of the file that a variable names, without empty ones."""
    try:
        with open_regular(Path(environ[variable])) as file:
            text = file.read(_MAX_BYTES).decode("utf-8", "replace")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{variable}={environ[variable][:200]}: {reason}; give the nodes with --hosts") from None
    return (line for line in text.splitlines() if line.strip())


def _flux(environ: Mapping[str, str]) -> Allocation | None:
    launcher = "flux run -N NODES -n TASKS"
    nodes, tasks = _count(environ, "FLUX_JOB_NNODES"), _count(environ, "FLUX_JOB_SIZE")
    if nodes or tasks:
        return Allocation("Flux", nodes, tasks, (), launcher)
    if "FLUX_ENCLOSING_ID" not in environ:
        return None
    # A job script is not told how many nodes it has, but its Flux instance knows.
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        answer = subprocess.run(["flux", "getattr", "size"], capture_output=True, text=True, timeout=_FLUX_TIMEOUT_S,
                                check=True, stdin=subprocess.DEVNULL)  # fmt: skip
        return Allocation("Flux", int(answer.stdout), 0, (), launcher)
    return Allocation("Flux", 0, 0, (), launcher)
