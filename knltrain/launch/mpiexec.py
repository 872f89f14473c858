"""Finding mpiexec, and the command line that starts ranks with it.

mpiexec is told not to pin ranks: they bind themselves by the topology of their own node (``placement.py``), so nodes
may differ from the one that starts them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from knltrain.errors import ConfigError, KnltrainError

# Variables that Open MPI should export to ranks on other nodes; Hydra exports all.
_EXPORTED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "MASTER_ADDR", "MASTER_PORT", "TMPDIR")
_EXPORTED_PREFIXES = ("KNLTRAIN_", "OMP_", "KMP_", "CCL_", "FI_", "GLOO_", "ONEDNN_", "TORCH_")
# Variables of the jobs of Slurm, PBS, LSF and SGE.
_BATCH_JOBS = ("SLURM_JOB_ID", "PBS_NODEFILE", "LSB_JOBID", "PE_HOSTFILE")


@dataclass(frozen=True)
class Mpiexec:
    """An mpiexec.

    Attributes:
        path: the program.
        kind: its MPI implementation, which decides its arguments.
        environment: additional variables that it needs.
    """

    path: Path
    kind: Literal["intel", "mpich", "openmpi"]
    environment: Mapping[str, str]


def find_mpiexec(environ: Mapping[str, str] | None = None) -> Mpiexec:
    """Finds mpiexec in the Python environment, where impi-rt installs it, or else on the PATH, and identifies it.

    Args:
        environ: the environment, by default this process's.

    Raises:
        KnltrainError: there is none, or it is not from Intel MPI, MPICH or Open MPI.
    """
    environ = os.environ if environ is None else environ
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec", path=environ.get("PATH", ""))
    if found is None:
        raise KnltrainError(
            "no mpiexec in this Python environment or on the PATH: pip install 'impi-rt>=2021.13,<2022', which the "
            "extra `intel` has, or load your site's MPI module"
        )
    path = Path(found)
    environment = _impi_rt_environment(path, environ)
    try:
        answer = subprocess.run(
            [found, "--version"], capture_output=True, text=True, timeout=60, env={**environ, **environment}
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KnltrainError(f"{path} --version: {error}") from None
    if "Intel(R) MPI" in answer.stdout:
        return Mpiexec(path, "intel", {**environment, **_batch_environment(environ)})
    if "HYDRA" in answer.stdout:
        return Mpiexec(path, "mpich", {})
    if "OpenRTE" in answer.stdout or "Open MPI" in answer.stdout:
        return Mpiexec(path, "openmpi", {})
    lines = (answer.stdout + answer.stderr).strip().splitlines()
    raise KnltrainError(
        f"{path} is none of Intel MPI's, MPICH's and Open MPI's mpiexec (it says "
        f"{lines[0] if lines else 'nothing'!r}); put one of these first on the PATH"
    )


def _impi_rt_environment(path: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that Intel MPI from the package impi-rt needs: its libraries are in the lib folder."""
    prefix = path.parent.parent
    library = prefix / "lib"
    if not (library / "libmpi.so.12").exists() or not (prefix / "opt/mpi").is_dir():
        return {}
    # Last: the folder's other libraries must not replace the system's.
    search = [*filter(None, environ.get("LD_LIBRARY_PATH", "").split(":")), str(library)]
    wanted = {"I_MPI_ROOT": str(prefix), "FI_PROVIDER_PATH": str(library)}
    return {name: value for name, value in wanted.items() if not environ.get(name)} | {
        "LD_LIBRARY_PATH": ":".join(dict.fromkeys(search))
    }


def _batch_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the variable without which Intel MPI may use a batch job's tasks per node instead of -ppn."""
    name = "I_MPI_JOB_RESPECT_PROCESS_PLACEMENT"
    return {name: "0"} if any(map(environ.get, _BATCH_JOBS)) and not environ.get(name) else {}


def count_ranks(ranks: int | None, per_node: int | None, num_nodes: int, planned_per_node: int) -> tuple[int, int]:
    """Returns the number of ranks, and of ranks per node, from what the user has given.

    Args:
        ranks: total number, or None.
        per_node: ranks per node, or None.
        num_nodes: number of nodes.
        planned_per_node: ranks per node in the plan for this node.

    Raises:
        ConfigError: more ranks than the nodes have room for.
    """
    if per_node is None:
        per_node = planned_per_node if ranks is None else -(-ranks // num_nodes)
    if ranks is None:
        ranks = per_node * num_nodes
    if ranks > per_node * num_nodes:
        raise ConfigError(f"-n {ranks} does not fit {num_nodes} node(s) x --ppn {per_node}; raise --ppn or add --hosts")
    return ranks, min(per_node, ranks)


def openmpi_arguments(ranks_per_node: int) -> list[str]:
    """Returns arguments for Open MPI's mpiexec: ranks per node, and no binding, because each rank binds itself."""
    return ["--map-by", f"ppr:{ranks_per_node}:node", "--bind-to", "none"]


def command_line(
    mpiexec: Mpiexec, ranks: int, per_node: int, hosts: Sequence[str], program: Sequence[str],
    environ: Mapping[str, str],
) -> list[str]:  # fmt: skip
    """Returns the command line that starts the ranks.

    Args:
        mpiexec: the launcher.
        ranks: total number of ranks.
        per_node: ranks per node.
        hosts: names of the nodes; empty for this node, or for those of the batch job.
        program: the command that each rank runs.
        environ: the environment, from which variables are exported by name with Open MPI.
    """
    line = [str(mpiexec.path), "-n", str(ranks)]
    if mpiexec.kind == "openmpi":
        line += openmpi_arguments(per_node)
        line += ["--host", ",".join(f"{host}:{per_node}" for host in hosts)] if hosts else []
        names = [n for n, value in environ.items() if value and (n in _EXPORTED or n.startswith(_EXPORTED_PREFIXES))]
        line += [word for name in sorted(names) for word in ("-x", name)]
    else:
        line += ["-ppn", str(per_node)]
        line += ["-hosts", ",".join(hosts)] if hosts else []
        line += ["-genv", "I_MPI_PIN", "0"] if mpiexec.kind == "intel" else ["-bind-to", "none"]
    return [*line, *program]
