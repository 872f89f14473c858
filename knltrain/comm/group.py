"""The process group of a run, and the collectives that it needs beside the all-reduce of gradients."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import resource
import socket
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Imported before there is a process group: the defaults of its functions hold the default group of this moment, and a
# group that is held is never destroyed. Its threads would then outlive the interpreter.
import torch.distributed.nn.functional
from torch import Tensor

from knltrain.comm import oneccl
from knltrain.comm.backend import Backend, choose_backend, gloo
from knltrain.comm.ccl import ProcessGroupCCL
from knltrain.comm.liveness import SILENT, PeerLiveness
from knltrain.comm.segments import remove_own_segments
from knltrain.comm.store import open_store
from knltrain.errors import ConfigError, KnltrainError
from knltrain.launch.pmi import abort_job, kill_mpiexec_later
from knltrain.launch.rendezvous import START_TIMEOUT_S, find_rendezvous, require_interface
from knltrain.launch.world import Ranks

# Parts of the errors that gloo, oneCCL and the store raise when a peer is gone.
_LOST_PEER_MESSAGES = (
    "Connection closed", "Connection reset", "Connection refused", "Connection was likely closed", "Broken pipe",
    "Timed out", "timed out", "Wait timeout", "wait timeout", "oneCCL: ", "did not take part", "did not join",
    "did not end",
)  # fmt: skip

_MAX_NAMED_RANKS = 8
# Of fields that differ between two ranks.
_MAX_NAMED_FIELDS = 8


def _raise_open_file_limit() -> None:
    """Raises the soft limit of open files to the hard limit.

    With several hundred ranks, rank 0's connections for the store and gloo's to every other rank exceed the usual
    limit of 1,024.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a sandbox; starting the group reports what is missing
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Group:
    """All ranks of a run; with one rank, every call is a no-op that returns its input.

    As a context manager, it destroys the process group at the end of its block. Not after an error: that would wait for
    pending collectives, and so for the other ranks. They see this process end, or its launcher ends them.

    Args:
        ranks: this process among its peers.
        backend: auto, ccl or gloo; see ``backend.py``.
        cpus: logical CPUs reserved for this rank's communication.
        same: what must be the same on all ranks, by name, as for :meth:`require_same`; compared before anything that
            would wait for ranks that do otherwise.
        start_timeout_s: how long the slowest rank may take to start, and to end its first step, in seconds.

    Attributes:
        backend: the chosen back end, or None with one rank.
        interface: the network interface of this rank that leads to the others; loopback on one node.
        channel: the process group of all collectives, or None for the default group.
        hosts: the host name of each rank.
        last_step: the last step that all ranks have finished; each step ends with a sum over them.

    Raises:
        ConfigError: ccl was requested and is not available, an exported interface does not exist, or ranks differ in
            ``same`` or in CCL_WORKER_COUNT.
        KnltrainError: the rendezvous failed.
    """

    def __init__(
        self, ranks: Ranks, backend: str = "auto", cpus: Sequence[int] = (), *,
        same: Mapping[str, object] | None = None, start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:  # fmt: skip
        self.rank, self.world_size, self.local_size = ranks.rank, ranks.size, ranks.local_size
        self.backend: Backend | None = None
        self.interface = ""
        self.last_step: int | None = None
        self._store: Any = None
        self.channel: dist.ProcessGroup | None = None
        self.hosts = [socket.gethostname()]
        self._liveness: PeerLiveness | None = None
        self._exchanges, self._start_timeout = 0, timedelta(seconds=start_timeout_s)
        if ranks.size == 1:
            return
        _raise_open_file_limit()
        rendezvous = find_rendezvous(ranks, start_timeout_s=start_timeout_s)
        already_set = rendezvous.export()
        self.interface = rendezvous.interface
        try:
            self._store = store = open_store(rendezvous, ranks, start_timeout_s)
            store.set_timeout(self._start_timeout)
            self.hosts = [host for (host,) in self._all_gather_strings(socket.gethostname())]
            self._liveness = PeerLiveness(store, self.rank, self.hosts)
            self.require_same(same or {})
            if backend != "gloo":
                cpus = self._equal_worker_cpus(cpus)
            self.backend = self._agree_on_backend(backend, ranks, cpus, already_set)
            if self.backend.name == "gloo":
                require_interface("GLOO_SOCKET_IFNAME")
            dist.init_process_group(
                self.backend.name,
                store=dist.PrefixStore("ranks", store),  # type: ignore[attr-defined]
                rank=ranks.rank,
                world_size=ranks.size,
                timeout=self._start_timeout,
            )
        except (RuntimeError, ValueError) as error:
            raise KnltrainError(
                f"rank {ranks.rank} of {ranks.size} ({ranks.launcher}) could not connect to the others at "
                f"{rendezvous.address or rendezvous.init_method}: {str(error).splitlines()[0]}"
            ) from None

    def _all_gather_strings(self, *words: object) -> list[list[str]]:
        """Returns the strings of each rank, by rank. All ranks call it at once.

        Raises:
            KnltrainError: ranks did not call it before the time-out of the start; names them.
        """
        self._exchanges += 1
        keys = [f"exchange{self._exchanges}/{rank}" for rank in range(self.world_size)]
        self._store.set(keys[self.rank], json.dumps([str(word) for word in words]))
        try:
            self._store.wait(keys, self._start_timeout)
        except RuntimeError:
            absent = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            if not absent:
                raise
            who = " and ".join(f"rank {rank}" for rank in absent[:_MAX_NAMED_RANKS])
            raise KnltrainError(
                f"{who}{f' and {len(absent) - _MAX_NAMED_RANKS} more' if len(absent) > _MAX_NAMED_RANKS else ''} of "
                f"{self.world_size} did not start within {self._start_timeout.total_seconds():g} s; "
                "--comm.start-timeout-s allows more"
            ) from None
        return [json.loads(answer) for answer in self._store.multi_get(keys)]

    def require_same(self, values: Mapping[str, object], remedy: str = "start all ranks with the same command") -> None:
        """Raises on all ranks if they have different values. All ranks call it at once.

        Args:
            values: by name, what JSON can express; a list's first different element is named.
            remedy: what the user should do, for the message.

        Raises:
            ConfigError: ranks have different values; names ranks, hosts and values.
        """
        if self.world_size == 1:
            return
        text = json.dumps(values, sort_keys=True)
        digests = [digest for (digest,) in self._all_gather_strings(hashlib.sha256(text.encode()).hexdigest())]
        other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
        if other is None:
            return
        texts = self._all_gather_strings(text if self.rank in (0, other) else "")
        first, second = (json.loads(texts[rank][0]) for rank in (0, other))
        with contextlib.suppress(RuntimeError, KnltrainError):  # rank 0, with whose process the store ends, goes last
            self._all_gather_strings()
        names = [name for name in first | second if first.get(name) != second.get(name)]
        differ = "; ".join(_difference(name, first.get(name), second.get(name)) for name in names[:_MAX_NAMED_FIELDS])
        more = f"; and {len(names) - _MAX_NAMED_FIELDS} more" if len(names) > _MAX_NAMED_FIELDS else ""
        raise ConfigError(
            f"rank {other} on {self.hosts[other]} is not like rank 0 on {self.hosts[0]}: {differ}{more}; {remedy}"
        )

    def _equal_worker_cpus(self, cpus: Sequence[int]) -> Sequence[int]:
        """Returns as many of the CPUs reserved for communication as every rank has.

        oneCCL never returns where ranks have different numbers of workers.
        """
        exported = oneccl.exported_workers()
        answers = self._all_gather_strings(len(cpus), exported)
        numbers = {number: host for host, (_, number) in reversed([*zip(self.hosts, answers, strict=True)])}
        if len(numbers) > 1:
            each = ", ".join(f"{number or 'unset'} on {host}" for number, host in sorted(numbers.items()))
            raise ConfigError(
                f"CCL_WORKER_COUNT differs ({each}), and with different numbers of workers oneCCL does not start; "
                "export one for all nodes, or none"
            )
        return cpus[: min(int(kept) for kept, _ in answers)]

    def _agree_on_backend(
        self, requested: str, ranks: Ranks, cpus: Sequence[int], already_set: Mapping[str, str]
    ) -> Backend:
        """Makes all ranks use the same ccl, or none; where one cannot use what was asked for, all raise."""
        refused = ""
        try:
            chosen = choose_backend(requested, ranks, cpus, already_set)
        except ConfigError as error:
            chosen, refused = gloo(), str(error)
        answers = self._all_gather_strings(chosen.name, chosen.version.split()[0], chosen.note, refused)
        for host, (*_, why) in zip(self.hosts, answers, strict=True):
            if why:
                raise ConfigError(why if host == self.hosts[self.rank] else f"{host}: {why}")
        without = {host: note for host, (name, _, note, _) in zip(self.hosts, answers, strict=True) if name == "gloo"}
        libraries = {library: host for host, (_, library, *_) in zip(self.hosts, answers, strict=True)}
        if chosen.name == "gloo":
            return chosen
        if not without and len(libraries) == 1:
            notes = {note: host for host, (_, _, note, _) in zip(self.hosts, answers, strict=True) if note}
            others = [f"{host}: {note}" for note, host in notes.items() if note != chosen.note]
            return dataclasses.replace(chosen, note="; ".join(filter(None, [chosen.note, *others])))
        if without:
            host, why = next(iter(without.items()))
            problem = f"{host}{f' and {len(without) - 1} more' if len(without) > 1 else ''} cannot use ccl"
            return gloo(f"gradients are all-reduced over gloo, which is slower than ccl: {problem}: {why}")
        each = " and ".join(f"{library} on {host}" for library, host in sorted(libraries.items()))
        problem = f"ranks have different versions, {each}; install the same on all nodes"
        if requested == "ccl":
            raise ConfigError(f"comm.backend ccl: {problem}")
        return gloo(f"gradients are all-reduced over gloo, which is slower than ccl: {problem}")

    def __enter__(self) -> Group:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.close()
            return
        if self._liveness:
            self._liveness.end()
        if self.world_size > 1 and issubclass(error, Exception):
            remove_own_segments()  # now: once abort_job has told mpiexec, there is no time left
            atexit.register(abort_job)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the run's files and speaks to the user."""
        return self.rank == 0

    def count_collective(self) -> None:
        """Notes that this rank starts a collective; all ranks start the same ones.

        Where one does not answer, the liveness check compares how many each has started.
        """
        if self._liveness:
            self._liveness.count_collective()

    def sum(self, *values: float) -> list[float]:
        """Returns the sum of each value over the ranks, in double precision. All ranks call it at once."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        self.count_collective()
        dist.all_reduce(tensor, group=self.channel)
        return tensor.tolist()

    def count(self, flag: bool) -> int:
        """Returns on how many ranks the flag is set; the same number on all ranks. All ranks call it at once."""
        return int(self.sum(bool(flag))[0])

    def any(self, flag: bool) -> bool:
        """Returns whether the flag is set on any rank; the same answer on all ranks. All ranks call it at once."""
        return self.count(flag) > 0

    def gather(self, values: Tensor) -> Tensor:
        """Returns every rank's values, one row a rank. All ranks call it at once.

        Args:
            values: a vector of equal length and type on all ranks.
        """
        if self.world_size == 1:
            return values[None]
        rows = [torch.empty_like(values) for _ in range(self.world_size)]
        self.count_collective()
        dist.all_gather(rows, values, group=self.channel)
        return torch.stack(rows)

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.world_size > 1:
            self.count_collective()
            dist.barrier(group=self.channel)

    def broadcast_str(self, text: str) -> str:
        """Returns rank 0's text on every rank. All ranks call it at once."""
        if self.world_size == 1:
            return text
        data = list(os.fsencode(text)) if self.is_first else []
        (length,) = self.sum(len(data))
        if not length:
            return ""
        message = torch.tensor(data or [0] * int(length), dtype=torch.uint8)
        self.count_collective()
        dist.broadcast(message, 0, group=self.channel)
        return os.fsdecode(bytes(message.tolist()))

    @contextlib.contextmanager
    def report_lost_ranks(self) -> Iterator[None]:
        """Turns the transport's errors about a lost peer into one that names the rank.

        Raises:
            KnltrainError: another rank has ended or does not answer.
        """
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            is_lost_peer = isinstance(error, dist.DistError) or any(word in reason for word in _LOST_PEER_MESSAGES)
            if self.world_size == 1 or not is_lost_peer:
                raise
            kill_mpiexec_later()  # before any rank ends the job, and this one with it
            step = f"; all ranks finished step {self.last_step}" if self.last_step else ""
            if named := re.search(r"rank \d+ on .* did not take part.*", reason):
                raise KnltrainError(
                    f"{named[0].rstrip(')')}{step}; it has ended, hangs, or waits for its data"
                ) from None
            who = (self._liveness and self._liveness.lost()) or f"another rank {SILENT}"
            cause = "; what that rank printed is the cause" if who.endswith(SILENT) else ""
            raise KnltrainError(f"{who}{step}{cause} ({reason})") from None

    def names_of(self, ranks: Sequence[int]) -> str:
        """Names ranks and their hosts, for people; of many, the first ones."""
        named = [f"rank {rank} on {self.hosts[rank]}" for rank in ranks[:_MAX_NAMED_RANKS]]
        more = len(ranks) - len(named)
        return " and ".join(named) + (f" and {more} more" if more else "")

    def set_timeout(self, timeout_s: float) -> None:
        """Sets the time-out of all later collectives; until then the longer time-out of the start holds.

        All ranks call it at once.
        """
        if self.backend is None:  # one rank
            return
        timeout = timedelta(seconds=timeout_s)
        if isinstance(dist.group.WORLD, ProcessGroupCCL):
            dist.group.WORLD.set_timeout(timeout)
        else:
            # gloo's connections keep the time-out that they were made with.
            self.channel = dist.new_group(backend=self.backend.name, timeout=timeout)

    def close(self) -> None:
        """Destroys the process group; nothing else, such as a DistributedDataParallel, may still hold it."""
        if self._liveness:
            self._liveness.end()
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _difference(name: str, first: object, second: object) -> str:
    """Says how a value of another rank differs from rank 0's."""
    if isinstance(first, list) and isinstance(second, list):
        if len(first) != len(second):
            return f"{name}: {len(second):,}, not {len(first):,}"
        at = next(index for index, (one, two) in enumerate(zip(first, second, strict=True)) if one != two)
        return f"{name}: number {at} is {second[at]}, not {first[at]}"
    return f"{name}: {second}, not {first}"
