"""The program of the ranks that test_conformance.py starts: what torch.distributed promises, a case each.

A rank goes through all cases and writes down what came of each: ``conformance_ranks.py FOLDER BACKEND``.
"""

import contextlib
import copy
import datetime
import json
import os
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.uint8, torch.int8, torch.int32, torch.int64)
SIZES = ((0,), (1,), (7,), (3, 5), (1000,), (40_001,))
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def of_rank(rank, shape, dtype, low=1):
    """Small whole numbers, different everywhere, whose sums every type holds exactly."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) + rank) % 3 + low).to(dtype).reshape(shape)


def more_types():
    """What ccl moves as bytes; gloo knows some of them in some releases."""
    return (torch.bool, torch.complex64) if dist.get_backend() == "ccl" else ()


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def refused(*errors):
    return pytest.raises(errors or (RuntimeError, ValueError, TypeError))


@case
def all_reduce(rank, size):
    reductions = {dist.ReduceOp.SUM: lambda x: x.sum(0), dist.ReduceOp.PRODUCT: lambda x: x.prod(0),
                  dist.ReduceOp.MIN: lambda x: x.amin(0), dist.ReduceOp.MAX: lambda x: x.amax(0)}  # fmt: skip
    for dtype in (*FLOATS, *INTEGERS):
        for shape in SIZES:
            parts = torch.stack([of_rank(r, shape, torch.float64) for r in range(size)])
            for op, reduce in reductions.items():
                tensor = of_rank(rank, shape, dtype)
                dist.all_reduce(tensor, op)
                same(tensor, reduce(parts).to(dtype))


@case
def all_reduce_average(rank, size):
    if dist.get_backend() == "gloo":
        return  # not in every release
    for dtype in FLOATS:
        tensor = torch.full((5,), float(size * (rank + 1)), dtype=dtype)
        dist.all_reduce(tensor, dist.ReduceOp.AVG)
        same(tensor, torch.full((5,), float(sum(range(1, size + 1))), dtype=dtype))
    with refused():
        dist.all_reduce(torch.ones(3, dtype=torch.int64), dist.ReduceOp.AVG)


@case
def all_reduce_of_truth_values(rank, size):
    tensor = torch.tensor([rank == 0, True, False])
    if dist.get_backend() == "gloo":
        return  # not in every release
    either, both = torch.tensor([True, True, False]), torch.tensor([False, True, False])
    expected = {dist.ReduceOp.SUM: either, dist.ReduceOp.MAX: either,
                dist.ReduceOp.PRODUCT: both, dist.ReduceOp.MIN: both}  # fmt: skip
    for op, result in expected.items():
        got = tensor.clone()
        dist.all_reduce(got, op)
        same(got, result)


@case
def reductions_that_are_not_there(rank, size):
    with refused():
        dist.all_reduce(torch.ones(3), dist.ReduceOp.BAND)  # bits of floating-point numbers
    if dist.get_backend() == "ccl":
        for op in (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR):
            with pytest.raises(ValueError, match="oneCCL has no reduction B"):
                dist.all_reduce(torch.ones(3, dtype=torch.int32), op)


@case
def all_reduce_of_what_is_not_contiguous(rank, size):
    base = torch.zeros(6, 4)
    view = base.t()
    view.copy_(of_rank(rank, (4, 6), torch.float32))
    if dist.get_backend() == "gloo":
        return  # refuses or not by layout and release
    dist.all_reduce(view)
    same(view, sum(of_rank(r, (4, 6), torch.float32) for r in range(size)))
    strided = torch.zeros(10)[::2]
    dist.broadcast(strided.fill_(rank), 1)
    same(strided, torch.ones(5))


@case
def broadcast(rank, size):
    for dtype in (*FLOATS, *INTEGERS, *more_types()):
        for shape in SIZES:
            for root in range(size):
                tensor = of_rank(rank, shape, dtype)
                dist.broadcast(tensor, root)
                same(tensor, of_rank(root, shape, dtype))


@case
def reduce(rank, size):
    for dtype in (*FLOATS, torch.int64):
        for shape in SIZES:
            for root in range(size):
                tensor = of_rank(rank, shape, dtype)
                dist.reduce(tensor, root)
                if rank == root:
                    same(tensor, sum(of_rank(r, shape, torch.float64) for r in range(size)).to(dtype))


@case
def all_gather(rank, size):
    for dtype in (*FLOATS, *INTEGERS, *more_types()):
        for shape in SIZES:
            pieces = [torch.empty(shape, dtype=dtype) for _ in range(size)]
            dist.all_gather(pieces, of_rank(rank, shape, dtype))
            for r, piece in enumerate(pieces):
                same(piece, of_rank(r, shape, dtype))


@case
def all_gather_into_tensor(rank, size):
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        for shape in ((1,), (7,), (3, 5)):
            whole = torch.empty((size * shape[0], *shape[1:]), dtype=dtype)
            dist.all_gather_into_tensor(whole, of_rank(rank, shape, dtype))
            same(whole, torch.cat([of_rank(r, shape, dtype) for r in range(size)]))


@case
def reduce_scatter(rank, size):
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        for shape in ((1,), (7,), (3, 5), (4001,)):
            pieces = [of_rank(rank + r, shape, dtype) for r in range(size)]
            expected = sum(of_rank(r + rank, shape, torch.float64) for r in range(size)).to(dtype)
            output = torch.empty(shape, dtype=dtype)
            dist.reduce_scatter_tensor(output, torch.cat(pieces))
            same(output, expected)
            if dist.get_backend() == "ccl":  # gloo has it in some releases only
                output = torch.empty(shape, dtype=dtype)
                dist.reduce_scatter(output, pieces)
                same(output, expected)


@case
def gather_and_scatter(rank, size):
    for shape in SIZES:
        for root in range(size):
            pieces = [torch.empty(shape) for _ in range(size)] if rank == root else None
            dist.gather(of_rank(rank, shape, torch.float32), pieces, dst=root)
            for r, piece in enumerate(pieces or ()):
                same(piece, of_rank(r, shape, torch.float32))
            output = torch.empty(shape)
            dist.scatter(
                output, [of_rank(r, shape, torch.float32) for r in range(size)] if rank == root else None, root
            )
            same(output, of_rank(rank, shape, torch.float32))


@case
def all_to_all_single(rank, size):
    output = torch.empty(2 * size, 3)
    dist.all_to_all_single(output, torch.cat([of_rank(rank + r, (2, 3), torch.float32) for r in range(size)]))
    same(output, torch.cat([of_rank(r + rank, (2, 3), torch.float32) for r in range(size)]))
    sent = [rank + r for r in range(size)]  # rank 0 sends nothing to itself
    output = torch.empty(sum(sent), dtype=torch.int64)
    dist.all_to_all_single(output, torch.full((sum(sent),), rank), sent, sent)
    same(output, torch.cat([torch.full((rank + r,), r) for r in range(size)]))


@case
def all_to_all_of_lists(rank, size):
    if dist.get_backend() == "gloo":
        return  # has it in some releases only
    outputs = [torch.empty(r + rank + 1) for r in range(size)]
    dist.all_to_all(outputs, [torch.full((rank + r + 1,), float(rank)) for r in range(size)])
    for r, output in enumerate(outputs):
        same(output, torch.full((r + rank + 1,), float(r)))


@case
def send_and_receive(rank, size):
    for dtype in (torch.float32, torch.bfloat16, torch.uint8, *more_types()):
        for count in (1, 7, 100_001):
            if rank == 0:
                dist.send(of_rank(1, (count,), dtype), 1)
            elif rank == 1:
                tensor = torch.empty(count, dtype=dtype)
                dist.recv(tensor, 0)
                same(tensor, of_rank(1, (count,), dtype))
    other = torch.empty(5)
    works = [dist.isend(torch.full((5,), float(rank)), (rank + 1) % size), dist.irecv(other, (rank - 1) % size)]
    for work in works:
        work.wait()
    same(other, torch.full((5,), float((rank - 1) % size)))
    operations = [dist.P2POp(dist.isend, torch.full((5,), float(rank)), (rank + 1) % size),
                  dist.P2POp(dist.irecv, other.zero_(), (rank - 1) % size)]  # fmt: skip
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    same(other, torch.full((5,), float((rank - 1) % size)))


@case
def what_is_under_way(rank, size):
    """Any order of waiting; futures hold the tensors; callbacks run once, also on what is done."""
    tensors = [torch.full((10_000 + i,), float(i + rank)) for i in range(12)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for i in (11, 3, 0, 7, 1, 2, 4, 5, 6, 8, 9, 10):
        works[i].wait()
        assert works[i].is_completed()
        same(tensors[i], torch.full((10_000 + i,), float(sum(i + r for r in range(size)))))
    calls = []
    work = dist.all_reduce(tensors[0].fill_(1), async_op=True)
    future = work.get_future().then(lambda done: calls.append(1) or done.value()[0] * 2)
    same(future.wait(), torch.full((10_000,), 2.0 * size))
    same(work.get_future().then(lambda done: done.value()[0] + 1).wait(), torch.full((10_000,), 1.0 + size))
    assert calls == [1]
    works = [dist.broadcast(tensors[1], 0, async_op=True), dist.barrier(async_op=True)]
    dist.all_reduce(tensors[2])  # one that is waited for at once, while others are under way
    for work in works:
        work.wait()


@case
def an_error_in_a_callback_is_its_futures(rank, size):
    def fail(_):
        raise ValueError("on purpose")

    future = dist.all_reduce(torch.ones(3), async_op=True).get_future().then(fail)
    with refused():
        future.wait()
    dist.all_reduce(torch.ones(3))


@case
def groups(rank, size):
    pairs = [dist.new_group([0, 1]), dist.new_group(list(range(size)))]
    alone = [dist.new_group([r]) for r in range(size)]
    reverse = dist.new_group([size - 1, 0])
    for _ in range(3):
        if rank < 2:
            tensor = torch.ones(9)
            dist.all_reduce(tensor, group=pairs[0])
            same(tensor, torch.full((9,), 2.0))
        tensor = torch.ones(9)
        works = [dist.all_reduce(tensor, group=pairs[1], async_op=True)]
        other = torch.ones(5)
        dist.all_reduce(other, group=alone[rank])
        same(other, torch.ones(5))
        for work in works:
            work.wait()
        same(tensor, torch.full((9,), float(size)))
        if rank in (0, size - 1):
            tensor = torch.full((3,), float(rank))
            dist.broadcast(tensor, size - 1, group=reverse)
            same(tensor, torch.full((3,), size - 1.0))
    if rank < 2:
        assert dist.get_rank(pairs[0]) == rank
        dist.destroy_process_group(pairs[0])
    dist.barrier()


@case
def two_groups_at_once_in_different_orders(rank, size):
    first, second = dist.new_group(list(range(size))), dist.new_group(list(range(size)))
    tensors = torch.ones(50_000), torch.ones(50_000)
    order = ((first, tensors[0]), (second, tensors[1]))
    works = [dist.all_reduce(t, group=g, async_op=True) for g, t in (order if rank == 0 else reversed(order))]
    for work in works:
        work.wait()
    for tensor in tensors:
        same(tensor, torch.full((50_000,), float(size)))


@case
def objects(rank, size):
    everyone = [None] * size
    dist.all_gather_object(everyone, {"rank": rank, "text": "x" * (10 * rank + 1)})
    assert [one["rank"] for one in everyone] == list(range(size))
    one = [("hello", 3)] if rank == 1 else [None]
    dist.broadcast_object_list(one, 1)
    assert one == [("hello", 3)]
    gathered = [None] * size if rank == 0 else None
    dist.gather_object(rank, gathered)
    assert gathered in (None, list(range(size)))
    received = [None]
    dist.scatter_object_list(received, [f"for {r}" for r in range(size)] if rank == 0 else [None] * size)
    assert received == [f"for {rank}"]


@case
def shapes_that_do_not_go_together(rank, size):
    with refused():
        dist.all_gather([torch.empty(3) for _ in range(size - 1)], torch.empty(3))
    with refused():
        dist.all_gather([torch.empty(4) for _ in range(size)], torch.empty(3))
    with refused():
        dist.all_gather([torch.empty(3, dtype=torch.int64) for _ in range(size)], torch.empty(3))
    with refused():
        dist.all_to_all_single(torch.empty(size), torch.empty(size), [1] * (size + 1), [1] * size)
    with refused():
        dist.all_gather_into_tensor(torch.empty(3 * size + 1), torch.empty(3))
    if dist.get_backend() == "ccl":  # with gloo these are aborts, or nothing
        with refused():
            dist.reduce_scatter_tensor(torch.empty(3), torch.empty(3 * size + 1))
        with refused():
            dist.scatter(torch.empty(3), [torch.empty(2) for _ in range(size)], src=rank)
        with refused():
            dist.all_reduce(torch.ones(3, dtype=torch.uint16))
        with refused():
            dist.send(torch.ones(3), (rank + 1) % size, tag=3)
    dist.barrier()


@case
def coalesced(rank, size):
    tensors = [torch.full((n,), float(rank + 1)) for n in (3, 0, 1000)]
    with pytest.warns(FutureWarning):
        dist.all_reduce_coalesced(tensors)
    for tensor in tensors:
        same(tensor, torch.full_like(tensor, float(sum(range(1, size + 1)))))


def network():
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 36, 300),
        torch.nn.Linear(300, 10),
    )


@case
def data_parallel_training(rank, size):
    """Twenty steps: equal parameters on all ranks to the last bit. What they are is compared between the back ends."""
    model = torch.nn.parallel.DistributedDataParallel(network(), bucket_cap_mb=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(20):
        optimizer.zero_grad()
        for micro in range(2):
            torch.manual_seed(1000 * step + 10 * micro + rank)
            images, labels = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
            with model.no_sync() if micro == 0 else contextlib.nullcontext():
                torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    flat = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    everyone = [torch.empty_like(flat) for _ in range(size)]
    dist.all_gather(everyone, flat)
    for other in everyone:
        assert torch.equal(other, flat)
    torch.save(flat, FOLDER / f"weights{rank}.pt")


@case
def hooks_and_micro_batches(rank, size):
    """Only the last micro-batch of an accumulation is all-reduced."""
    calls = []

    def hook(state, bucket):
        calls.append(bucket.index())
        future = dist.all_reduce(bucket.buffer().div_(size), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    model = torch.nn.parallel.DistributedDataParallel(network(), bucket_cap_mb=0.1)
    model.register_comm_hook(None, hook)
    alone = copy.deepcopy(network())
    for micro in range(3):
        for r in range(size):
            torch.manual_seed(10 * micro + r)
            images = torch.randn(2, 3, 8, 8)
            (alone(images).square().mean() / size).backward()
            if r == rank:
                mine = images
        with model.no_sync() if micro < 2 else contextlib.nullcontext():
            model(mine).square().mean().backward()
        assert bool(calls) == (micro == 2)
    for got, expected in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)


def run_rank(backend):
    """Runs all cases as one rank, and writes what came of each."""
    from knltrain.comm import ccl, oneccl
    from knltrain.launch.rendezvous import find_rendezvous
    from knltrain.launch.world import discover

    torch.set_num_threads(1)
    if "RANK" in os.environ:
        os.environ |= {"MASTER_ADDR": "unused", "MASTER_PORT": "1"}
    started = discover()
    if started.on_several_nodes:
        find_rendezvous(started).export()  # which interface leads to the others
    rank, size = started.rank, started.size
    if backend == "ccl":
        oneccl.configure(started)
        ccl.register()
    store = dist.FileStore(str(FOLDER / "store"), size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=20))
    outcome = {}
    for name, run in CASES.items():
        try:
            run(rank, size)
            outcome[name] = "passed"
        except BaseException:
            outcome[name] = traceback.format_exc()
        (FOLDER / f"rank{rank}.json").write_text(json.dumps(outcome))
        if outcome[name] != "passed":
            os._exit(1)  # the others are not where this rank is
    del run
    dist.destroy_process_group()


if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    run_rank(sys.argv[2])
