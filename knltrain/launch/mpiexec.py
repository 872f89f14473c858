"""The mpiexec there is, and the line that starts ranks with it.

Ranks are left unpinned: each node looks at itself and its ranks place themselves (``binding.py``), so nodes may differ
from the one that starts them.
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

# What Open MPI should hand to ranks on other nodes; Hydra hands over everything.
_HANDED_OVER = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "MASTER_ADDR", "MASTER_PORT", "TMPDIR")
_HANDED_OVER_PREFIXES = ("KNLTRAIN_", "OMP_", "KMP_", "CCL_", "FI_", "GLOO_", "ONEDNN_", "TORCH_")


@dataclass(frozen=True)
class Mpiexec:
    """A launcher.

    Attributes:
        path: of the program.
        kind: whose it is; each has arguments of its own.
        environment: variables that it needs beside those that are set.
    """

    path: Path
    kind: Literal["intel", "mpich", "openmpi"]
    environment: Mapping[str, str]


def find_mpiexec(environ: Mapping[str, str] | None = None) -> Mpiexec:
    """Finds mpiexec in the Python environment, where impi-rt puts it, or else on the PATH, and asks whose it is.

    Args:
        environ: the environment, by default this process's.

    Raises:
        KnltrainError: there is none, or it is none of Intel MPI's, MPICH's and Open MPI's.
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
    environment = _of_a_python_environment(path, environ)
    try:
        answer = subprocess.run(
            [found, "--version"], capture_output=True, text=True, timeout=60, env={**environ, **environment}
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KnltrainError(f"{path} --version: {error}") from None
    if "Intel(R) MPI" in answer.stdout:
        return Mpiexec(path, "intel", {**environment, **_of_a_slurm_job(environ)})
    if "HYDRA" in answer.stdout:
        return Mpiexec(path, "mpich", {})
    if "OpenRTE" in answer.stdout or "Open MPI" in answer.stdout:
        return Mpiexec(path, "openmpi", {})
    said = (answer.stdout + answer.stderr).strip().splitlines()
    raise KnltrainError(
        f"{path} is none of Intel MPI's, MPICH's and Open MPI's mpiexec (it says {said[0] if said else 'nothing'!r}); "
        "put one of these first on the PATH"
    )


def _of_a_python_environment(path: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """What Intel MPI from the package impi-rt has to be told: its libraries are in the environment's lib folder."""
    prefix = path.parent.parent
    library = prefix / "lib"
    if not (library / "libmpi.so.12").exists() or not (prefix / "opt/mpi").is_dir():
        return {}
    # Last: the folder has other libraries too, which must not stand in for the system's.
    search = [*filter(None, environ.get("LD_LIBRARY_PATH", "").split(":")), str(library)]
    wanted = {"I_MPI_ROOT": str(prefix), "FI_PROVIDER_PATH": str(library)}
    return {name: value for name, value in wanted.items() if not environ.get(name)} | {
        "LD_LIBRARY_PATH": ":".join(dict.fromkeys(search))
    }


def _of_a_slurm_job(environ: Mapping[str, str]) -> dict[str, str]:
    """What Intel MPI has to be told in a Slurm job, whose tasks per node it otherwise may take for what -ppn says."""
    name = "I_MPI_JOB_RESPECT_PROCESS_PLACEMENT"
    return {name: "0"} if "SLURM_JOB_ID" in environ and not environ.get(name) else {}


def count_ranks(ranks: int | None, per_node: int | None, num_nodes: int, planned_per_node: int) -> tuple[int, int]:
    """Completes how many ranks there are, and how many on each node.

    Args:
        ranks: in all, or None.
        per_node: on each node, or None.
        num_nodes: nodes.
        planned_per_node: what the plan has for a node like this one.

    Raises:
        ConfigError: more ranks than fit the nodes.
    """
    if per_node is None:
        per_node = planned_per_node if ranks is None else -(-ranks // num_nodes)
    if ranks is None:
        ranks = per_node * num_nodes
    if ranks > per_node * num_nodes:
        raise ConfigError(f"-n {ranks} does not fit {num_nodes} node(s) x --ppn {per_node}; raise --ppn or add --hosts")
    return ranks, min(per_node, ranks)


def openmpi_arguments(ranks_per_node: int) -> list[str]:
    """Arguments of Open MPI's mpiexec: ranks per node, unbound, so that each places itself."""
    return ["--map-by", f"ppr:{ranks_per_node}:node", "--bind-to", "none"]


def command_line(
    mpiexec: Mpiexec, ranks: int, per_node: int, hosts: Sequence[str], program: Sequence[str],
    environ: Mapping[str, str],
) -> list[str]:  # fmt: skip
    """Returns the arguments that start the ranks.

    Args:
        mpiexec: which launcher.
        ranks: in all.
        per_node: on each node.
        hosts: names of the nodes; none for this one, or those of the job that this is part of.
        program: what each rank runs.
        environ: what of it Open MPI hands over is named.
    """
    line = [str(mpiexec.path), "-n", str(ranks)]
    if mpiexec.kind == "openmpi":
        line += openmpi_arguments(per_node)
        line += ["--host", ",".join(f"{host}:{per_node}" for host in hosts)] if hosts else []
        names = [n for n in environ if n in _HANDED_OVER or n.startswith(_HANDED_OVER_PREFIXES)]
        line += [word for name in sorted(names) for word in ("-x", name)]
    else:
        line += ["-ppn", str(per_node)]
        line += ["-hosts", ",".join(hosts)] if hosts else []
        line += ["-genv", "I_MPI_PIN", "0"] if mpiexec.kind == "intel" else ["-bind-to", "none"]
    return [*line, *program]
