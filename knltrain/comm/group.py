"""The process group: who takes part, and the few collectives a run needs beside its gradients."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import resource
import socket
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Before there is a process group: its functions have the default group as it is now for their defaults, and one that
# they hold never ends. Its threads would then meet an interpreter that does.
import torch.distributed.nn.functional
from torch import Tensor

from knltrain.comm import oneccl
from knltrain.comm.backend import Chosen, choose_backend, gloo
from knltrain.comm.ccl import ProcessGroupCCL
from knltrain.comm.liveness import PeerLiveness
from knltrain.comm.segments import remove_own_segments
from knltrain.comm.store import open_store
from knltrain.errors import ConfigError, KnltrainError
from knltrain.launch.pmi import end_the_job, see_mpiexec_end
from knltrain.launch.rendezvous import START_TIMEOUT_S, meet
from knltrain.launch.world import Ranks

_START_TIMEOUT = timedelta(seconds=START_TIMEOUT_S)
# What gloo, oneCCL and the store say of a peer that is gone.
_LOST = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "Connection refused", "oneCCL: ",
         "did not take part", "did not come", "did not end", "Connection was likely closed", "timed out")  # fmt: skip

_LONGEST_WORD = 32
_MAX_NAMED_RANKS = 8


def _allow_open_files() -> None:
    """Raises the limit of open files as far as this process may.

    With several hundred ranks, those that rank 0 has for its store and gloo's for every other rank are more than the
    1,024 that are usual.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a sandbox; the start says what is missing
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class Group:
    """All ranks of a run; with one rank, every call is a no-op that returns its input.

    As a context manager, it leaves the group at the end of its block. Not after an error: what is under way would then
    be waited for, and the other ranks with it; the end of this process tells them, or its launcher does.

    Args:
        ranks: this process among its peers.
        backend: auto, ccl or gloo; see ``backend.py``.
        cpus: logical CPUs that are kept for this rank's communication.

    Attributes:
        backend: what was chosen, or None with one rank.
        interface: of this rank's network interfaces, the one that leads to the others, loopback on one node.
        channel: the process group that collectives go through, or None for the default one.
        hosts: of each rank.
        last_step: the last step that this rank has finished, and so all ranks: each ends with a sum over them.

    Raises:
        ConfigError: ccl was asked for and cannot be had, or ranks were told different numbers of its workers.
        KnltrainError: the ranks do not find each other.
    """

    def __init__(self, ranks: Ranks, backend: str = "auto", cpus: Sequence[int] = ()) -> None:
        self.rank, self.world_size, self.local_size = ranks.rank, ranks.size, ranks.local_size
        self.backend: Chosen | None = None
        self.interface = ""
        self.last_step: int | None = None
        self.channel: dist.ProcessGroup | None = None
        self.hosts = [socket.gethostname()]
        self._liveness: PeerLiveness | None = None
        if ranks.size == 1:
            return
        _allow_open_files()
        meeting = meet(ranks)
        told = meeting.export()
        self.interface = meeting.interface
        try:
            store = open_store(meeting, ranks)
            store.set_timeout(_START_TIMEOUT)
            if backend != "gloo":
                cpus = self._as_many_on_all(cpus, store)
            self.backend = self._agree(choose_backend(backend, ranks, cpus, told), backend, store)
            dist.init_process_group(
                self.backend.name,
                store=dist.PrefixStore("ranks", store),  # type: ignore[attr-defined]
                rank=ranks.rank,
                world_size=ranks.size,
                timeout=_START_TIMEOUT,
            )
        except (RuntimeError, ValueError) as error:
            raise KnltrainError(
                f"rank {ranks.rank} of {ranks.size} ({ranks.launcher}) did not find the others at "
                f"{meeting.address or meeting.init_method}: {str(error).splitlines()[0]}"
            ) from None

    def _tell_all(self, store: Any, name: str, *words: object) -> list[list[str]]:
        """What each rank says; all call it at once."""
        keys = [f"{name}{rank}" for rank in range(self.world_size)]
        store.set(keys[self.rank], json.dumps([str(word) for word in words]))
        store.wait(keys, _START_TIMEOUT)
        return [json.loads(answer) for answer in store.multi_get(keys)]

    def _as_many_on_all(self, cpus: Sequence[int], store: Any) -> Sequence[int]:
        """Of the CPUs that are kept for communication, as many as every rank has.

        oneCCL waits for ever where ranks have different numbers of workers.
        """
        exported = oneccl.exported_workers()
        said = self._tell_all(store, "workers", socket.gethostname(), len(cpus), exported)
        numbers = {number: host for host, _, number in reversed(said)}
        if len(numbers) > 1:
            each = ", ".join(f"{number or 'unset'} on {host}" for number, host in sorted(numbers.items()))
            raise ConfigError(
                f"CCL_WORKER_COUNT differs ({each}), and with different numbers of workers oneCCL does not start; "
                "export one for all nodes, or none"
            )
        return cpus[: min(int(kept) for _, kept, _ in said)]

    def _agree(self, chosen: Chosen, asked: str, store: Any) -> Chosen:
        """All ranks take the same ccl, or none does; each learns the others' hosts."""
        said = self._tell_all(store, "backend", socket.gethostname(), chosen.name, chosen.version.split()[0])
        self.hosts = [host for host, _, _ in said]
        self._liveness = PeerLiveness(store, self.rank, self.hosts)
        without = sorted({host for host, name, _ in said if name == "gloo"})
        libraries = {library: host for host, _, library in reversed(said)}
        if chosen.name == "gloo" or len(libraries) == 1:
            return chosen
        if without:
            problem, advice = f"{', '.join(without)} cannot take ccl", "install oneCCL there"
        else:
            each = " and ".join(f"{library} on {host}" for library, host in sorted(libraries.items()))
            problem, advice = f"ranks have different ones, {each}", "install the same on all nodes"
        if asked == "ccl":
            raise ConfigError(f"comm.backend ccl: {problem}; {advice}, or take gloo")
        return gloo(f"gradients travel over gloo, which is slower than ccl: {problem}; {advice}")

    def __enter__(self) -> Group:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.close()
            return
        if self._liveness:
            self._liveness.end()
        if self.world_size > 1 and issubclass(error, Exception):
            remove_own_segments()  # now: mpiexec, once told, leaves no time for it
            atexit.register(end_the_job)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the run's files and speaks to the user."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """The sums of each value over the ranks, in double precision."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.channel)
        return tensor.tolist()

    def count(self, flag: bool) -> int:
        """Returns on how many ranks the flag is set; the same number on all ranks. All ranks call it at once."""
        return int(self.sum(bool(flag))[0])

    def any(self, flag: bool) -> bool:
        """Returns whether the flag is set on any rank; the same answer on all ranks. All ranks call it at once."""
        return self.count(flag) > 0

    def gather(self, values: Tensor) -> Tensor:
        """Every rank's values, one row a rank.

        Args:
            values: of equal length and type on all ranks.
        """
        if self.world_size == 1:
            return values[None]
        rows = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(rows, values, group=self.channel)
        return torch.stack(rows)

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.world_size > 1:
            dist.barrier(group=self.channel)

    def broadcast_str(self, text: str) -> str:
        """The first rank's text, on every rank."""
        if self.world_size == 1:
            return text
        data = list(os.fsencode(text)) if self.is_first else []
        (length,) = self.sum(len(data))
        if not length:
            return ""
        message = torch.tensor(data or [0] * int(length), dtype=torch.uint8)
        dist.broadcast(message, 0, group=self.channel)
        return os.fsdecode(bytes(message.tolist()))

    def require_same_on_all_ranks(self, what: str, chosen: str, remedy: str) -> None:
        """Sees that every rank has chosen the same. All ranks call it at once.

        Args:
            what: it is that was chosen, for people.
            chosen: by this rank; some bytes.
            remedy: for people.

        Raises:
            ConfigError: ranks have chosen differently; on all of them alike.
        """
        rows = self.gather(torch.tensor(list(chosen.encode().ljust(_LONGEST_WORD)), dtype=torch.uint8)).tolist()
        said = [bytes(row).decode().rstrip() for row in rows]
        if len(set(said)) > 1:
            each = " and ".join(
                f"{word} on rank {said.index(word)} ({self.hosts[said.index(word)]})" for word in dict.fromkeys(said)
            )
            raise ConfigError(f"ranks have chosen different {what}s, {each}; {remedy}")

    @contextlib.contextmanager
    def names_lost_ranks(self) -> Iterator[None]:
        """Turns the transport's errors about peers that are gone into one line.

        Raises:
            KnltrainError: another rank has ended or does not answer.
        """
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if self.world_size == 1 or not any(word in reason for word in _LOST):
                raise
            see_mpiexec_end()  # before any rank ends the job, and this one with it
            step = f"; all ranks finished step {self.last_step}" if self.last_step else ""
            if named := re.search(r"rank \d+ on .* did not take part.*", reason):
                raise KnltrainError(
                    f"{named[0].rstrip(')')}{step}; it has ended, hangs, or waits for its data"
                ) from None
            who = (self._liveness and self._liveness.lost()) or "another rank"
            raise KnltrainError(
                f"{who} has ended or does not answer{step}; what that rank printed is the cause ({reason})"
            ) from None

    def names_of(self, ranks: Sequence[int]) -> str:
        """Names ranks and their hosts, for people; of many, the first ones."""
        named = [f"rank {rank} on {self.hosts[rank]}" for rank in ranks[:_MAX_NAMED_RANKS]]
        more = len(ranks) - len(named)
        return " and ".join(named) + (f" and {more} more" if more else "")

    def expect_steps(self, timeout_s: float) -> None:
        """From now on no rank waits for another longer than this; a start takes longer than a step.

        All ranks call it at once.
        """
        if self.backend is None:  # alone
            return
        timeout = timedelta(seconds=timeout_s)
        if isinstance(dist.group.WORLD, ProcessGroupCCL):
            dist.group.WORLD.set_timeout(timeout)
        else:
            # Its connections keep the time-out that they were made with.
            self.channel = dist.new_group(backend=self.backend.name, timeout=timeout)

    def close(self) -> None:
        """Leaves the group; what holds it beside this, such as a DistributedDataParallel, must be gone."""
        if self._liveness:
            self._liveness.end()
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
