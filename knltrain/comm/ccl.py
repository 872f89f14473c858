"""The process group ``ccl``: collectives of oneCCL under ``torch.distributed``.

:func:`register` makes the name known; ``torch.distributed.init_process_group("ccl")`` then takes it like any other.
What a caller waits for at once is done on its own thread, everything else on one thread for all groups: ``work.py``.
"""

# No "from __future__ import annotations": torch binds some of these methods by their signatures.

import atexit
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
    all_of,
    check_exchange,
    check_pieces,
    check_whole,
    in_place,
    moved,
    name_of,
    reduced,
    reduction,
    root_of,
    rows_of,
    split,
)
from knltrain.comm.work import LOOK_UP_S, Work, waiter

# Where the rank that keeps the store is the one that is gone, asking it is in vain.
_STORE_PATIENCE_S = 5.0

_ProcessGroup: Any = dist.ProcessGroup  # annotated with overloads of which torch calls one each
_Options = Any  # torch's options of a collective: timeout, asyncOp, and where it has them reduceOp and rootRank
_Start = Callable[[bool], list[Any]]


def register() -> None:
    """Makes ``ccl`` a name that ``torch.distributed`` knows."""
    if "CCL" not in dist.Backend._plugins:
        dist.Backend.register_backend("ccl", ProcessGroupCCL, devices=["cpu"])


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What a call returns or raises that may never end; it is left alone on its thread where it takes longer.

    Raises:
        futures.TimeoutError: it did; before Python 3.11 that is not the built-in one.
    """
    came: futures.Future[Any] = futures.Future()

    def run() -> None:
        try:
            came.set_result(call())
        except Exception as error:
            came.set_exception(error)

    threading.Thread(target=run, name="ccl-patience", daemon=True).start()
    return came.result(seconds)


class ProcessGroupCCL(_ProcessGroup):  # type: ignore[misc]
    """Ranks that oneCCL connects; made by ``torch.distributed``.

    Args:
        store: where the ranks meet.
        rank: this process.
        size: ranks.
        timeout: the longest wait: for the others to come, and for every collective.

    Raises:
        RuntimeError: a rank did not come, or oneCCL could not connect them.
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
        self._hosts = self._meet()
        remove_dead_segments()
        atexit.register(remove_own_segments)  # the clean-up of a group that was given up is not oneCCL's
        with oneccl.quiet():
            if rank == 0:
                point = shim.open_meeting_point()
                store.set("address", point.address.hex())
            else:
                point = shim.join_meeting_point(bytes.fromhex(store.get("address").decode()))
            self._comm: Any = self._connect(lambda: shim.connect(size, rank, point))
        waiter.join()

    def _meet(self) -> list[str]:
        """Waits for all ranks and returns their hosts."""
        keys = [f"host{rank}" for rank in range(self._size)]
        self._store.set(keys[self._rank], socket.gethostname())
        try:
            self._store.wait(keys, self.timeout)
            return [host.decode() for host in self._store.multi_get(keys)]
        except RuntimeError as error:
            absent = self._ask_store(lambda: [rank for rank, key in enumerate(keys) if not self._store.check([key])])
            who = ", ".join(f"rank {rank}" for rank in absent or ()) or "another rank"
            raise RuntimeError(f"{who} did not come within {self.timeout.total_seconds():g} s ({error})") from None

    def _connect(self, connect: Callable[[], Any]) -> Any:
        """Connects, or gives up after the time-out, which oneCCL knows none of."""
        limit = self.timeout.total_seconds()
        try:
            return _within(limit, connect)
        except futures.TimeoutError:
            raise RuntimeError(
                f"oneCCL did not connect the ranks within {limit:g} s; they may differ in what is exported for it "
                "(CCL_WORKER_COUNT, CCL_ATL_TRANSPORT, FI_PROVIDER)"
            ) from None

    def _ask_store(self, question: Callable[[], Any]) -> Any:
        """Returns the answer, or None where the store does not give one soon."""
        try:
            return _within(_STORE_PATIENCE_S, question)
        except (RuntimeError, futures.TimeoutError):
            return None

    def overdue(self, work: Work) -> RuntimeError | None:
        """Looks at a collective that is not done; past its time, returns an error that names who has not come.

        After that the group is of no use: the other ranks' part of that collective may still come.
        """
        if not self._unusable:
            waited, limit = time.monotonic() - work.started, self.timeout.total_seconds()
            if not work.noticed and waited >= min(LOOK_UP_S, limit / 4):
                # For whoever will have to name those who did not come.
                work.noticed = True
                self._ask_store(lambda: self._store.set(f"{work.mark}/{self._rank}", "1"))
            if waited < limit:
                return None
            self._unusable = f"{self._who_is_missing(work)} within {limit:g} s"
            self._comm.abandon()
        return RuntimeError(f"{work.what}: {self._unusable}")

    def _who_is_missing(self, work: Work) -> str:
        if work.peer is not None:
            return f"rank {work.peer} on {self._hosts[work.peer]} did not take part"
        others = [rank for rank in range(self._size) if rank != self._rank]
        absent = self._ask_store(lambda: [rank for rank in others if not self._store.check([f"{work.mark}/{rank}"])])
        if absent is None:
            return "another rank did not take part, and the store over which the ranks met does not answer,"
        if not absent:
            return "all ranks came, but oneCCL did not come to an end"
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
        """Starts a collective; where the caller waits at once, returns it done."""
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

    # The collectives, as torch.distributed and DistributedDataParallel call them.

    def broadcast(self, tensors: list[Tensor], opts: _Options = None) -> Work:
        (tensor,) = tensors
        root = root_of(opts, self._size)
        flat, finish = in_place(tensor)
        data, count, dtype = moved(flat)

        def start(behind: bool) -> list[Any]:
            return [self._comm.broadcast(data, count, dtype, root, behind)] if count else []

        return self._run("broadcast", opts, start, tensors, flat, finish=finish)

    def allreduce(self, tensors: list[Tensor], opts: _Options = None) -> Work:
        return self.allreduce_coalesced(tensors, opts)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: _Options = None) -> Work:
        op, divide = reduction("all_reduce", opts, tensors, self._size)
        placed = [in_place(tensor) for tensor in tensors]
        for flat, _ in placed:
            divide(flat)
        calls = [reduced(flat, op) for flat, _ in placed]

        def start(behind: bool) -> list[Any]:
            return [
                self._comm.all_reduce(data, data, count, dtype, of, behind) for data, count, dtype, of in calls if count
            ]

        return self._run("all_reduce", opts, start, tensors, placed, finish=all_of(finish for _, finish in placed))

    def reduce(self, tensors: list[Tensor], opts: _Options = None) -> Work:
        (tensor,) = tensors
        op, divide = reduction("reduce", opts, tensors, self._size)
        root = root_of(opts, self._size)
        flat, finish = in_place(tensor)
        divide(flat)
        data, count, dtype, op = reduced(flat, op)

        def start(behind: bool) -> list[Any]:
            return [self._comm.reduce(data, data, count, dtype, op, root, behind)] if count else []

        return self._run("reduce", opts, start, tensors, flat, finish=finish)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: _Options = None) -> Work:
        (pieces,), (mine,) = outputs, inputs
        check_pieces("all_gather", pieces, mine, self._size)
        return self._gather_all(opts, [pieces], [mine], pieces)

    def _allgather_base(self, output: Tensor, input: Tensor, opts: _Options = None) -> Work:
        return self.allgather_into_tensor_coalesced([output], [input], opts)

    def allgather_into_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: _Options = None
    ) -> Work:
        for output, mine in zip(outputs, inputs, strict=True):
            check_whole("all_gather_into_tensor", output, mine, self._size)
        return self._gather_all(opts, [list(split(output, self._size)) for output in outputs], inputs, outputs)

    all_gather_single = _allgather_base
    all_gather_single_coalesced = allgather_into_tensor_coalesced

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: _Options = None) -> Work:
        for pieces, mine in zip(outputs, inputs, strict=True):
            check_pieces("all_gather_coalesced", pieces, mine, self._size)
        return self._gather_all(opts, outputs, inputs, [piece for pieces in outputs for piece in pieces])

    def _gather_all(
        self, opts: _Options, outputs: Sequence[list[Tensor]], inputs: list[Tensor], result: list[Tensor]
    ) -> Work:
        placed = [[in_place(piece) for piece in pieces] for pieces in outputs]
        sent = [mine.contiguous() for mine in inputs]
        calls = [
            (moved(mine), [moved(flat)[0] for flat, _ in pieces]) for mine, pieces in zip(sent, placed, strict=True)
        ]

        def start(behind: bool) -> list[Any]:
            return [
                self._comm.all_gather(data, count, to, [count] * self._size, dtype, behind)
                for (data, count, dtype), to in calls
                if count
            ]

        finish = all_of(finish for pieces in placed for _, finish in pieces)
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
        placed = [in_place(output) for output in outputs]
        calls = [(reduced(whole, op)[0], *reduced(flat, op)) for whole, (flat, _) in zip(sent, placed, strict=True)]

        def start(behind: bool) -> list[Any]:
            return [
                self._comm.reduce_scatter(data, to, count, dtype, of, behind)
                for data, to, count, dtype, of in calls
                if count
            ]

        return self._run(
            "reduce_scatter", opts, start, outputs, sent, placed, finish=all_of(finish for _, finish in placed)
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
        (mine,), root = inputs, root_of(opts, self._size)
        nothing = [mine.new_empty(0)] * self._size
        if self._rank == root:
            check_pieces("gather", outputs[0], mine, self._size)
        pieces = outputs[0] if self._rank == root else nothing
        to_root = [mine if rank == root else nothing[0] for rank in range(self._size)]
        return self._exchange("gather", opts, pieces, to_root, pieces)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: _Options = None) -> Work:
        (mine,), root = outputs, root_of(opts, self._size)
        nothing = [mine.new_empty(0)] * self._size
        if self._rank == root:
            check_pieces("scatter", inputs[0], mine, self._size)
        pieces = inputs[0] if self._rank == root else nothing
        from_root = [mine if rank == root else nothing[0] for rank in range(self._size)]
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
            what: its name.
            opts: torch's.
            outputs: by rank.
            inputs: by rank.
            result: of the future.
            whole: outputs and inputs as one tensor each, where they are that.
        """
        check_exchange(what, outputs, inputs, self._size)
        if whole is None:
            received = torch.empty(sum(output.numel() for output in outputs), dtype=outputs[0].dtype)
            sent = torch.cat([tensor.reshape(-1) for tensor in inputs])
        else:
            received, sent = whole
        (to, _, dtype), (data, _, _) = moved(received), moved(sent)
        arguments = data, [moved(tensor)[1] for tensor in inputs], to, [moved(tensor)[1] for tensor in outputs], dtype

        def start(behind: bool) -> list[Any]:
            return [self._comm.all_to_all(*arguments, behind)]

        def finish() -> None:
            parts = received.split([output.numel() for output in outputs])
            for output, part in zip(outputs, parts, strict=True):
                output.copy_(part.view(output.shape))

        return self._run(what, opts, start, result, sent, received, finish=finish if whole is None else None)

    def barrier(self, opts: _Options = None) -> Work:
        # Not oneCCL's own, which waits for the others inside the call that starts it, and so without a time-out.
        return self.allreduce([torch.zeros(1, dtype=torch.uint8)], opts)

    def send(self, tensors: list[Tensor], to: int, tag: int = 0) -> Work:
        (tensor,) = tensors
        self._check_peer("send", to, tag)
        flat = tensor.contiguous()
        data, count, dtype = moved(flat)

        def start(behind: bool) -> list[Any]:
            return [self._comm.send(data, count, dtype, to, behind)] if count else []

        return self._run(f"send to rank {to}", None, start, tensors, flat, peer=to)

    def recv(self, tensors: list[Tensor], source: int, tag: int = 0) -> Work:
        (tensor,) = tensors
        self._check_peer("recv", source, tag)
        flat, finish = in_place(tensor)
        data, count, dtype = moved(flat)

        def start(behind: bool) -> list[Any]:
            return [self._comm.recv(data, count, dtype, source, behind)] if count else []

        return self._run(f"recv from rank {source}", None, start, tensors, flat, finish=finish, peer=source)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> Work:
        raise ValueError("recv: oneCCL does not receive from whichever rank comes first; name the rank")

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
        work.settle()
        return work

    def shutdown(self) -> None:
        """Leaves the group, once what is under way is done."""
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
        """Leaves the group as it is."""
        if self._comm is not None and not self._unusable:
            self._unusable = "this process group has been aborted"
            self._comm.abandon()
        self.shutdown()

    def set_timeout(self, timeout: timedelta) -> None:
        """Sets the longest wait of later collectives, and of those under way."""
        self.timeout = timeout

    def _get_backend(self, device: object) -> object:
        """What has the operations of a device; torch 2.14's batch_isend_irecv asks it whether it coalesces."""
        return self

    # Names. The base class asks a torch backend for them, of which there is none here.

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
