"""The little of PMI-1 that lets ranks under Hydra tell each other where they are.

The protocol is lines of ``key=value`` over a descriptor that mpiexec's proxy leaves in PMI_FD; it works on any number
of nodes, with no network but Hydra's own and no shared folder.
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
        fd: the descriptor, which stays open: an MPI library in this process may talk over it later.
        timeout: seconds that an answer may take; the last rank's arrival is waited for.

    Raises:
        KnltrainError: the process manager does not speak PMI-1.
    """

    def __init__(self, fd: int, timeout: float) -> None:
        try:
            self._socket = socket.socket(fileno=os.dup(fd))
        except OSError as error:
            raise KnltrainError(f"PMI_FD={fd}: {error.strerror}; mpiexec's connection is gone") from None
        # A time-out of the socket's own would keep it from blocking, and with it the descriptor that an MPI library in
        # this process talks over: both are one open file.
        self._timeout = timeout
        self._readable = select.poll()
        self._readable.register(self._socket, select.POLLIN)
        self._pending = b""
        self._phase = 0
        try:
            self._ask("cmd=init pmi_version=1 pmi_subversion=1", "response_to_init")
            self._name = self._ask("cmd=get_my_kvsname", "my_kvsname")["kvsname"]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes this end; the process manager does not notice."""
        self._socket.close()

    def share(self, rank: int, text: str) -> Callable[[int], str]:
        """Gives a text to the other ranks, and returns a function from a rank to its text. All ranks call it at once.

        Args:
            rank: this rank.
            text: some hundred bytes.
        """
        self._phase += 1
        key = f"knltrain-{self._phase}-"
        self._ask(f"cmd=put kvsname={self._name} key={key}{rank} value={quote(text, safe='')}", "put_result")
        self._ask("cmd=barrier_in", "barrier_out")

        def of(other: int) -> str:
            return unquote(self._ask(f"cmd=get kvsname={self._name} key={key}{other}", "get_result")["value"])

        return of

    def leave_at_exit(self) -> None:
        """Takes leave when the process ends as it should; ending without, it takes the job down.

        An MPI library that was started in this process takes leave itself, and only one may.
        """
        atexit.register(self._leave)

    def _leave(self) -> None:
        if not _mpi_was_started() and not _ending:
            with contextlib.suppress(KnltrainError):
                self._ask("cmd=finalize", "finalize_ack")
        self.close()

    def _ask(self, question: str, answer: str) -> dict[str, str]:
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


_ending = False
# For what was said to be on its way before mpiexec ends whoever passes it on.
_SAID_S = 0.5
_CLEANUP_S = 15
_SEE_TO_IT = 'for i in $(seq "$2"); do sleep 1; kill -0 "$1" || exit 0; done; kill -9 "$1"'


def end_the_job(code: int = 1) -> None:
    """Has Hydra's mpiexec, if that started this rank, end all ranks of the job.

    By itself it waits for a rank that is stopped, and for those that wait for this one.

    Args:
        code: that mpiexec exits with.
    """
    global _ending
    if _ending:
        return
    with contextlib.suppress(KeyError, ValueError, OSError):
        fd = int(os.environ["PMI_FD"])
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(_SAID_S)
        os.write(fd, f"cmd=abort exitcode={code}\n".encode())
        _ending = True


def see_mpiexec_end() -> None:
    """Leaves a process behind that ends Hydra's mpiexec in a while, if that is on this host and has not ended by then.

    A rank calls it when it has lost another. mpiexec then ends the job on every host, but does not end itself before
    each host has said so, which one that cannot be reached never does.
    """
    with contextlib.suppress(OSError):
        if "PMI_FD" in os.environ and (mpiexec := _mpiexec()):
            subprocess.Popen(
                ["sh", "-c", _SEE_TO_IT, "sh", str(mpiexec), str(_CLEANUP_S)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip


def _mpiexec() -> int:
    """The process id of mpiexec, where it is this rank's proxy's parent; 0 on the other hosts."""
    with open(f"/proc/{os.getppid()}/stat") as stat:
        parent = int(stat.read().rpartition(")")[2].split()[1])
    with open(f"/proc/{parent}/comm") as comm:
        return parent if comm.read().startswith("mpiexec") else 0


def _mpi_was_started() -> bool:
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if "/libmpi" in line}
    for path in paths:
        with contextlib.suppress(OSError, AttributeError):
            library, flag = ctypes.CDLL(path, os.RTLD_NOLOAD | os.RTLD_LAZY), ctypes.c_int(0)
            library.MPI_Initialized(ctypes.byref(flag))
            if flag.value:
                return True
    return False
