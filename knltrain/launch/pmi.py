"""A client of PMI-1, for the exchange of addresses between ranks under Hydra (MPICH, Intel MPI).

The protocol is lines of ``key=value`` over the descriptor PMI_FD, which mpiexec's proxy opens. It works on any number
of nodes, and needs no network beside Hydra's own and no shared folder.
https://flux-framework.readthedocs.io/projects/flux-rfc/en/latest/spec_13.html describes it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from urllib.parse import quote, unquote

from knltrain.errors import KnltrainError


class Pmi:
    """A connection to the process manager.

    Args:
        fd: the descriptor. It stays open: an MPI library in this process may use it later.
        timeout: for an answer, in seconds; barriers wait for the last rank to start.

    Raises:
        KnltrainError: the process manager does not speak PMI-1.
    """

    def __init__(self, fd: int, timeout: float) -> None:
        try:
            self._socket = socket.socket(fileno=os.dup(fd))
        except OSError as error:
            raise KnltrainError(f"PMI_FD={fd}: {error.strerror}; mpiexec's connection is gone") from None
        # settimeout() would make the socket non-blocking, and with it the descriptor of an MPI library in this
        # process: both are one open file description.
        self._timeout = timeout
        self._readable = select.poll()
        self._readable.register(self._socket, select.POLLIN)
        self._pending = b""
        self._phase = 0
        try:
            self._request("cmd=init pmi_version=1 pmi_subversion=1", "response_to_init")
            self._name = self._request("cmd=get_my_kvsname", "my_kvsname")["kvsname"]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the connection without finalizing it."""
        self._socket.close()

    def all_gather(self, rank: int, text: str) -> Callable[[int], str]:
        """Sends a text to all ranks; returns a function from a rank to its text. All ranks call it at once.

        Args:
            rank: this rank.
            text: at most some hundred bytes, the limit of a PMI-1 value.
        """
        self._phase += 1
        key = f"knltrain-{self._phase}-"
        self._request(f"cmd=put kvsname={self._name} key={key}{rank} value={quote(text, safe='')}", "put_result")
        self._request("cmd=barrier_in", "barrier_out")

        def of(other: int) -> str:
            return unquote(self._request(f"cmd=get kvsname={self._name} key={key}{other}", "get_result")["value"])

        return of

    def finalize_at_exit(self) -> None:
        """Sends ``finalize`` when this process ends normally; without it, mpiexec ends the job.

        An MPI library that was initialized in this process sends it itself, and it may be sent only once.
        """
        atexit.register(self._finalize)

    def _finalize(self) -> None:
        if not _mpi_initialized() and not _abort_sent:
            with contextlib.suppress(KnltrainError):
                self._request("cmd=finalize", "finalize_ack")
        self.close()

    def _request(self, question: str, answer: str) -> dict[str, str]:
        try:
            self._socket.sendall(question.encode() + b"\n")
            while b"\n" not in self._pending:
                if not self._readable.poll(self._timeout * 1000):
                    raise KnltrainError(f"no answer from mpiexec (PMI) in {self._timeout:g} s: a rank has not started")
                received = self._socket.recv(65536)
                if not received:
                    raise KnltrainError("mpiexec closed its connection (PMI); another rank has ended")
                self._pending += received
        except OSError as error:
            raise KnltrainError(f"mpiexec's connection (PMI) failed: {error.strerror}; a rank has ended") from None
        line, _, self._pending = self._pending.partition(b"\n")
        fields = dict(part.partition("=")[::2] for part in line.decode("utf-8", "replace").split())
        if fields.get("cmd") != answer or fields.get("rc", "0") != "0":
            raise KnltrainError(f"mpiexec answered {line.decode('utf-8', 'replace')!r} to {question!r} (PMI-1)")
        return fields


_abort_sent = False
# For the output of this rank to be forwarded before mpiexec ends its proxies.
_OUTPUT_DELAY_S = 0.5
_MPIEXEC_EXIT_TIMEOUT_S = 15
_KILL_AFTER_TIMEOUT = 'for i in $(seq "$2"); do sleep 1; kill -0 "$1" || exit 0; done; kill -9 "$1"'


def abort_job(code: int = 1) -> None:
    """Makes Hydra's mpiexec, if it started this rank, end all ranks of the job.

    Otherwise mpiexec would wait for a stopped rank, and for the ranks that wait for this one.

    Args:
        code: exit code of mpiexec.
    """
    global _abort_sent
    if _abort_sent:
        return
    with contextlib.suppress(KeyError, ValueError, OSError):
        fd = int(os.environ["PMI_FD"])
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(_OUTPUT_DELAY_S)
        os.write(fd, f"cmd=abort exitcode={code}\n".encode())
        _abort_sent = True


def kill_mpiexec_later() -> None:
    """Starts a process that kills Hydra's mpiexec after a time-out, if it runs on this host and has not ended by then.

    A rank calls it when it has lost another. mpiexec then ends the job on every host, but exits only after each host
    has confirmed it, which an unreachable one never does.
    """
    with contextlib.suppress(OSError):
        if os.environ.get("PMI_FD") and (mpiexec := _local_mpiexec()):
            subprocess.Popen(
                ["sh", "-c", _KILL_AFTER_TIMEOUT, "sh", str(mpiexec), str(_MPIEXEC_EXIT_TIMEOUT_S)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip


def _local_mpiexec() -> int:
    """Returns the process id of mpiexec, the parent of this rank's proxy; 0 on the other hosts."""
    with open(f"/proc/{os.getppid()}/stat") as stat:
        parent = int(stat.read().rpartition(")")[2].split()[1])
    with open(f"/proc/{parent}/comm") as comm:
        return parent if comm.read().startswith("mpiexec") else 0


def _mpi_initialized() -> bool:
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if "/libmpi" in line}
    for path in paths:
        with contextlib.suppress(OSError, AttributeError):
            library, flag = ctypes.CDLL(path, os.RTLD_NOLOAD | os.RTLD_LAZY), ctypes.c_int(0)
            library.MPI_Initialized(ctypes.byref(flag))
            if flag.value:
                return True
    return False
