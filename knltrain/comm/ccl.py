"""The process group ``ccl``: oneCCL's collectives as a ``torch.distributed`` back end.

After :func:`register`, ``torch.distributed.init_process_group("ccl")`` works as with any other back end. Synchronous
collectives run on the caller's thread, asynchronous ones on one thread for all groups: ``work.py``.
"""

# No "from __future__ import annotations": torch binds some of these methods by their signatures.

import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from knltrain.comm import oneccl
from knltrain.comm.segments import remove_dead_segments, remove_own_segments
from knltrain.comm.tensors import (
    chain,
    check_exchange,
    check_pieces,
    check_whole,
    contiguous_out,
    data_args,
    name_of,
    reduce_args,
    reduction,
    root_of,
    rows_of,
    split,
)
from knltrain.comm.work import POLL_INTERVAL_S, Work, waiter
from knltrain.launch.signals import run_before_end

# If the rank that serves the store is the lost one, a request to the store blocks.
_STORE_TIMEOUT_S = 5.0

_ProcessGroup: Any = dist.ProcessGroup  # annotated with overloads of which torch calls one each
_Options = Any  # torch's options of a collective: timeout, asyncOp, and for some reduceOp and rootRank
_Start = Callable[[bool], list[Any]]


def register() -> None:
    """Registers the back end ``ccl`` with ``torch.distributed``."""
    if "CCL" not in dist.Backend._plugins:
        dist.Backend.register_backend("ccl", ProcessGroupCCL, devices=["cpu"])


def _call_with_timeout(seconds: float, call: Callable[[], Any]) -> Any:
    """Returns the result of a call that may block for ever; after the time-out, it is left running on its thread.

    Raises:
        futures.TimeoutError: it took longer; before Python 3.11 this is not the built-in TimeoutError.
    """
    result: futures.Future[Any] = futures.Future()

    def run() -> None:
        try:
            result.set_result(call())
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=run, name="ccl-timeout", daemon=True).start()
    return result.result(seconds)


class ProcessGroupCCL(_ProcessGroup):  # type: ignore[misc]
    """A process group over oneCCL; created by ``torch.distributed``.

    Args:
        store: the store of the rendezvous.
        rank: this process.
        size: the number of ranks.
        timeout: for the other ranks to join, and for every collective.

    Raises:
        RuntimeError: a rank did not join, or oneCCL could not connect them.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._store, self._rank, self._size = store, rank, size
        self.timeout = timeout
        self._name, self._description = "ccl", "undefined"
        self._collectives = 0
        self._unusable = ""
        self._batch: list[Work] | None = None
        shim = oneccl.load()
        self._hosts = self._exchange_hosts()
        remove_dead_segments()
        run_before_end(remove_own_segments)  # oneCCL does not clean up after an abandoned group
        with oneccl.quiet():
            if rank == 0:
                kvs = shim.open_meeting_point()
                store.set("address", kvs.address.hex())
            else:
                kvs = shim.join_meeting_point(bytes.fromhex(store.get("address").decode()))
            self._comm: Any = self._connect(lambda: shim.connect(size, rank, kvs))
        waiter.join()

    def _exchange_hosts(self) -> list[str]:
        """Waits for all ranks to join and returns their host names."""
        keys = [f"host{rank}" for rank in range(self._size)]
        self._store.set(keys[self._rank], socket.gethostname())
        try:
            self._store.wait(keys, self.timeout)
            return [host.decode() for host in self._store.multi_get(keys)]
        except RuntimeError as error:
            absent = self._ask_store(lambda: [rank for rank, key in enumerate(keys) if not self._store.check([key])])
            who = ", ".join(f"rank {rank}" for rank in absent or ()) or "another rank"
            raise RuntimeError(f"{who} did not join within {self.timeout.total_seconds():g} s ({error})") from None

    def _connect(self, connect: Callable[[], Any]) -> Any:
        """Connects with a time-out, which oneCCL itself does not have."""
        limit = self.timeout.total_seconds()
        try:
            return _call_with_timeout(limit, connect)
        except futures.TimeoutError:
            raise RuntimeError(
                f"oneCCL did not connect the ranks within {limit:g} s; exported variables may differ between "
                "them (CCL_WORKER_COUNT, CCL_ATL_TRANSPORT, FI_PROVIDER)"
            ) from None

    def _ask_store(self, question: Callable[[], Any]) -> Any:
        """Returns the store's answer, or None if it does not answer in time."""
        try:
            return _call_with_timeout(_STORE_TIMEOUT_S, question)
        except (RuntimeError, futures.TimeoutError):
            return None

    def overdue(self, work: Work) -> RuntimeError | None:
        """Checks a pending collective; after the time-out, returns an error that names the missing ranks.

        After that the group is unusable: messages of that collective may still arrive.
        """
        if not self._unusable:
            waited, limit = time.monotonic() - work.started, self.timeout.total_seconds()
            if not work.noticed and waited >= min(POLL_INTERVAL_S, limit / 4):
                # Ranks that time out look for this key to name those that are missing.
                work.noticed = True
                self._ask_store(lambda: self._store.set(f"{work.mark}/{self._rank}", "1"))
            if waited < limit:
                return None
            self._unusable = f"{self._missing_ranks(work)} within {limit:g} s"
            self._comm.abandon()
        return RuntimeError(f"{work.what}: {self._unusable}")

    def _missing_ranks(self, work: Work) -> str:
        if work.peer is not None:
            return f"rank {work.peer} on {self._hosts[work.peer]} did not take part"
        others = [rank for rank in range(self._size) if rank != self._rank]
        time.sleep(2 * POLL_INTERVAL_S)  # those that have come a moment ago record it
        absent = self._ask_store(lambda: [rank for rank in others if not self._store.check([f"{work.mark}/{rank}"])])
        if absent is None:
            return "another rank did not take part, and the store of the rendezvous does not answer,"
        if not absent:
            return "all ranks took part, but oneCCL did not end"
        return " and ".join(f"rank {rank} on {self._hosts[rank]}" for rank in absent) + " did not take part"

    def _run(
        self,
        what: str,
        options: _Options,
        start: _Start,
        result: list[Tensor],
        *keep: object,
        finish: Callable[[], None] | None = None,
        peer: int | None = None,
    ) -> Work:
        """Starts a collective; if it is synchronous, returns it completed."""
        if self._unusable:
            raise RuntimeError(f"{what}: {self._unusable}")
        if peer is None:
            self._collectives += 1
        work = Work(self, what, mark=f"{self._collectives}", peer=peer, result=result, keep=keep, finish=finish)
        if getattr(options, "asyncOp", True):
            waiter.start(work, lambda: start(True))
        else:
            work.requests = start(False)
            work.run()
        if self._batch is not None:
            self._batch.append(work)
        return work

    # The collectives, with the signatures that torch.distributed and DistributedDataParallel call.

    def broadcast(self, tensors: list[Tensor], opts: _Options = None) -> Work:
        (tensor,) = tensors
        root = root_of(opts, self._size)
        flat, finish = contiguous_out(tensor)
        data, count, dtype = data_args(flat)

        def start(asynchronous: bool) -> list[Any]:
            return [self._comm.broadcast(data, count, dtype, root, asynchronous)] if count else []

        return self._run("broadcast", opts, start, tensors, flat, finish=finish)

    def allreduce(self, tensors: list[Tensor], opts: _Options = None) -> Work:
        return self.allreduce_coalesced(tensors, opts)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: _Options = None) -> Work:
        op, divide = reduction("all_reduce", opts, tensors, self._size)
        placed = [contiguous_out(tensor) for tensor in tensors]
        for flat, _ in placed:
            divide(flat)
        calls = [reduce_args(flat, op) for flat, _ in placed]

        def start(asynchronous: bool) -> list[Any]:
            return [
                self._comm.all_reduce(data, data, count, dtype, of, asynchronous)
                for data, count, dtype, of in calls
                if count
            ]

        return self._run("all_reduce", opts, start, tensors, placed, finish=chain(finish for _, finish in placed))

    def reduce(self, tensors: list[Tensor], opts: _Options = None) -> Work:
        (tensor,) = tensors
        op, divide = reduction("reduce", opts, tensors, self._size)
        root = root_of(opts, self._size)
        flat, finish = contiguous_out(tensor)
        divide(flat)
        data, count, dtype, op = reduce_args(flat, op)

        def start(asynchronous: bool) -> list[Any]:
            return [self._comm.reduce(data, data, count, dtype, op, root, asynchronous)] if count else []

        return self._run("reduce", opts, start, tensors, flat, finish=finish)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: _Options = None) -> Work:
        (pieces,), (local,) = outputs, inputs
        check_pieces("all_gather", pieces, local, self._size)
        return self._gather_all(opts, [pieces], [local], pieces)

    def _allgather_base(self, output: Tensor, input: Tensor, opts: _Options = None) -> Work:
        return self.allgather_into_tensor_coalesced([output], [input], opts)

    def allgather_into_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: _Options = None
    ) -> Work:
        for output, local in zip(outputs, inputs, strict=True):
            check_whole("all_gather_into_tensor", output, local, self._size)
        return self._gather_all(opts, [list(split(output, self._size)) for output in outputs], inputs, outputs)

    all_gather_single = _allgather_base
    all_gather_single_coalesced = allgather_into_tensor_coalesced

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: _Options = None) -> Work:
        for pieces, local in zip(outputs, inputs, strict=True):
            check_pieces("all_gather_coalesced", pieces, local, self._size)
        return self._gather_all(opts, outputs, inputs, [piece for pieces in outputs for piece in pieces])

    def _gather_all(
        self, opts: _Options, outputs: Sequence[list[Tensor]], inputs: list[Tensor], result: list[Tensor]
    ) -> Work:
        placed = [[contiguous_out(piece) for piece in pieces] for pieces in outputs]
        sent = [local.contiguous() for local in inputs]
        calls = [
            (data_args(local), [data_args(flat)[0] for flat, _ in pieces])
            for local, pieces in zip(sent, placed, strict=True)
        ]

        def start(asynchronous: bool) -> list[Any]:
            return [
                self._comm.all_gather(data, count, to, [count] * self._size, dtype, asynchronous)
                for (data, count, dtype), to in calls
                if count
            ]

        finish = chain(finish for pieces in placed for _, finish in pieces)
        return self._run("all_gather", opts, start, result, sent, placed, finish=finish)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: _Options = None) -> Work:
        (output,), (pieces,) = outputs, inputs
        check_pieces("reduce_scatter", pieces, output, self._size)
        return self._reduce_scatter(opts, outputs, [torch.cat([piece.reshape(-1) for piece in pieces])])

    def _reduce_scatter_base(self, output: Tensor, input: Tensor, opts: _Options = None) -> Work:
        return self.reduce_scatter_tensor_coalesced([output], [input], opts)

    def reduce_scatter_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: _Options = None
    ) -> Work:
        for output, whole in zip(outputs, inputs, strict=True):
            check_whole("reduce_scatter_tensor", whole, output, self._size)
        return self._reduce_scatter(opts, outputs, inputs)

    reduce_scatter_single = _reduce_scatter_base
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced

    def _reduce_scatter(self, opts: _Options, outputs: list[Tensor], inputs: list[Tensor]) -> Work:
        op, divide = reduction("reduce_scatter", opts, inputs, self._size)
        sent = [whole.contiguous() for whole in inputs]
        if name_of(opts) == "AVG":
            sent = [divide(whole.clone()) for whole in sent]
        placed = [contiguous_out(output) for output in outputs]
        calls = [
            (reduce_args(whole, op)[0], *reduce_args(flat, op)) for whole, (flat, _) in zip(sent, placed, strict=True)
        ]

        def start(asynchronous: bool) -> list[Any]:
            return [
                self._comm.reduce_scatter(data, to, count, dtype, of, asynchronous)
                for data, to, count, dtype, of in calls
                if count
            ]

        return self._run(
            "reduce_scatter", opts, start, outputs, sent, placed, finish=chain(finish for _, finish in placed)
        )

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: _Options = None) -> Work:
        return self._exchange("all_to_all", opts, outputs, inputs, outputs)

    def alltoall_base(
        self, output: Tensor, input: Tensor, output_sizes: list[int], input_sizes: list[int], opts: _Options = None
    ) -> Work:
        received, sent = rows_of(output, output_sizes, self._size), rows_of(input, input_sizes, self._size)
        return self._exchange("all_to_all_single", opts, received, sent, [output], whole=(output, input))

    all_to_all_single = alltoall_base

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: _Options = None) -> Work:
        (local,), root = inputs, root_of(opts, self._size)
        nothing = [local.new_empty(0)] * self._size
        if self._rank == root:
            check_pieces("gather", outputs[0], local, self._size)
        pieces = outputs[0] if self._rank == root else nothing
        to_root = [local if rank == root else nothing[0] for rank in range(self._size)]
        return self._exchange("gather", opts, pieces, to_root, pieces)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: _Options = None) -> Work:
        (local,), root = outputs, root_of(opts, self._size)
        nothing = [local.new_empty(0)] * self._size
        if self._rank == root:
            check_pieces("scatter", inputs[0], local, self._size)
        pieces = inputs[0] if self._rank == root else nothing
        from_root = [local if rank == root else nothing[0] for rank in range(self._size)]
        return self._exchange("scatter", opts, from_root, pieces, outputs)

    def _exchange(
        self,
        what: str,
        opts: _Options,
        outputs: list[Tensor],
        inputs: list[Tensor],
        result: list[Tensor],
        whole: tuple[Tensor, Tensor] | None = None,
    ) -> Work:
        """Sends inputs[r] to each rank r, and receives outputs[r] from it.

        Args:
            what: its name, for messages.
            opts: torch's options.
            outputs: tensors by rank.
            inputs: tensors by rank.
            result: the tensors of the future.
            whole: outputs and inputs as one tensor each, if they are contiguous parts of one.
        """
        check_exchange(what, outputs, inputs, self._size)
        if whole is None:
            received = torch.empty(sum(output.numel() for output in outputs), dtype=outputs[0].dtype)
            sent = torch.cat([tensor.reshape(-1) for tensor in inputs])
        else:
            received, sent = whole
        (to, _, dtype), (data, _, _) = data_args(received), data_args(sent)
        arguments = (
            data,
            [data_args(tensor)[1] for tensor in inputs],
            to,
            [data_args(tensor)[1] for tensor in outputs],
            dtype,
        )

        def start(asynchronous: bool) -> list[Any]:
            return [self._comm.all_to_all(*arguments, asynchronous)]

        def finish() -> None:
            parts = received.split([output.numel() for output in outputs])
            for output, part in zip(outputs, parts, strict=True):
                output.copy_(part.view(output.shape))

        return self._run(what, opts, start, result, sent, received, finish=finish if whole is None else None)

    def barrier(self, opts: _Options = None) -> Work:
        # Not oneCCL's barrier, whose start blocks until the other ranks arrive, and so has no time-out.
        return self.allreduce([torch.zeros(1, dtype=torch.uint8)], opts)

    def send(self, tensors: list[Tensor], to: int, tag: int = 0) -> Work:
        (tensor,) = tensors
        self._check_peer("send", to, tag)
        flat = tensor.contiguous()
        data, count, dtype = data_args(flat)

        def start(asynchronous: bool) -> list[Any]:
            return [self._comm.send(data, count, dtype, to, asynchronous)] if count else []

        return self._run(f"send to rank {to}", None, start, tensors, flat, peer=to)

    def recv(self, tensors: list[Tensor], source: int, tag: int = 0) -> Work:
        (tensor,) = tensors
        self._check_peer("recv", source, tag)
        flat, finish = contiguous_out(tensor)
        data, count, dtype = data_args(flat)

        def start(asynchronous: bool) -> list[Any]:
            return [self._comm.recv(data, count, dtype, source, asynchronous)] if count else []

        return self._run(f"recv from rank {source}", None, start, tensors, flat, finish=finish, peer=source)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> Work:
        raise ValueError("recv: oneCCL cannot receive from any source; name the rank")

    def _check_peer(self, what: str, peer: int, tag: int) -> None:
        if tag:
            raise ValueError(f"{what}: tag {tag}: oneCCL has no tags; messages between two ranks arrive in order")
        if not 0 <= peer < self._size or peer == self._rank:
            raise ValueError(f"{what}: rank {peer} is no other rank of this group of {self._size}")

    def _start_coalescing(self, device: object = None) -> None:
        self._batch = []

    def _end_coalescing(self, device: object = None) -> Work:
        batch, self._batch = self._batch or [], None
        work = Work(self, "coalesced", mark="", peer=None, result=[], keep=batch, finish=lambda: _wait_for(batch))
        work.complete()
        return work

    def shutdown(self) -> None:
        """Waits for pending work and leaves the group."""
        if self._comm is None:
            return
        comm, self._comm = self._comm, None
        if not self._unusable:
            for work in waiter.outstanding(self):
                work.wait()
            comm.close()
        self._unusable = self._unusable or "this process group has been destroyed"
        waiter.leave()

    def abort(self) -> None:
        """Leaves the group without waiting for pending work."""
        if self._comm is not None and not self._unusable:
            self._unusable = "this process group has been aborted"
            self._comm.abandon()
        self.shutdown()

    def set_timeout(self, timeout: timedelta) -> None:
        """Sets the time-out of later collectives, and of pending ones."""
        self.timeout = timeout

    def _get_backend(self, device: object) -> object:
        """Returns the back end of a device; torch 2.14's batch_isend_irecv asks it whether it coalesces."""
        return self

    # Names and sizes. The base class would ask a C++ back end for them, which this group does not have.

    def getBackendName(self) -> str:  # noqa: N802
        return "ccl"

    def name(self) -> str:
        return "ccl"

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def getRank(self) -> int:  # noqa: N802
        return self._rank

    def getSize(self) -> int:  # noqa: N802
        return self._size

    def getGroupName(self) -> str:  # noqa: N802
        return self._name

    def setGroupName(self, name: str) -> None:  # noqa: N802
        self._name = name

    def getGroupDesc(self) -> str:  # noqa: N802
        return self._description

    def setGroupDesc(self, description: str) -> None:  # noqa: N802
        self._description = description

    _set_group_name = setGroupName
    _set_group_desc = setGroupDesc

    @property
    def group_name(self) -> str:
        return self._name

    @property
    def group_desc(self) -> str:
        return self._description


def _wait_for(works: list[Work]) -> None:
    for work in works:
        work.wait()
