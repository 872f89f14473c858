"""A step's timeline against cases that were worked out by hand."""

import itertools

import numpy as np
import pytest

from knltrain.predict.allreduce import Fabric
from knltrain.predict.layers import Gradient, LayerTime
from knltrain.predict.timeline import expected_maximum, simulate

MIB = 2**20
# One rank on each of two nodes; a ring between two sends and adds each byte once: 1 s a MiB with 1 MiB/s.
PAIR = Fabric(2, 1, 0.0, MIB)
LAYERS = [
    LayerTime("first", 1.0, 4.0, (Gradient(MIB // 4, 4),)),
    LayerTime("second", 2.0, 3.0, (Gradient(MIB // 2, 4),)),
    LayerTime("loss", 0.5, 0.5),
]


def step(layers=LAYERS, fabric=PAIR, **options):
    settings = {"algorithm": "ring", "wire_itemsize": 4, "bucket_mb": 0.5, **options}
    return simulate(layers, fabric=fabric, **settings)


def parts(one):
    return one.input_s + one.forward_s + one.backward_s + one.straggler_s + one.exposed_s + one.optimizer_s


def spans(one, lane):
    return [(span.name, span.start, span.end) for span in one.spans if span.lane == lane]


# The sum of losses at the end of a step, 16 bytes.
SYNC = 16 / MIB


def test_a_rank_alone_communicates_nothing():
    alone = step(fabric=Fabric(1, 1, 1.0, 1.0), optimizer_s=0.25)
    assert (alone.seconds, alone.exposed_s, alone.sizes, alone.messages) == (11.25, 0, (), 0)


def test_buckets_are_sent_while_the_backward_pass_runs():
    one = step()
    # Forward until 3.5; loss 4.0; second until 7.0, its 2 MiB until 9.0; first until 11.0, its 1 MiB until 12.0.
    assert spans(one, "network") == [("bucket 0", 7.0, 9.0), ("bucket 1", 11.0, 12.0)]
    assert one.seconds == pytest.approx(12.0 + SYNC)
    assert one.exposed_s == pytest.approx(1.0 + SYNC)
    assert (one.on_wire_s, one.bytes_sent, one.sizes) == (3.0, 3 * MIB, (2 * MIB, MIB))


def test_a_bucket_waits_for_the_one_before_it():
    slow = step(fabric=PAIR._replace(link_bytes_per_s=MIB / 3))
    assert spans(slow, "network") == [("bucket 0", 7.0, 13.0), ("bucket 1", 13.0, 16.0)]


def test_one_bucket_leaves_when_its_last_gradient_is_ready():
    assert spans(step(bucket_mb=100.0), "network") == [("bucket 0", 11.0, 14.0)]


def test_without_overlap_all_leaves_at_the_end():
    one = step(overlap=False)
    assert spans(one, "network") == [("bucket 0", 11.0, 13.0), ("bucket 1", 13.0, 14.0)]
    assert one.exposed_s == pytest.approx(3.0 + SYNC)


def test_half_the_bytes_on_the_wire_take_half_the_time():
    assert step(wire_itemsize=2).on_wire_s == 1.5


def test_gradients_are_sent_in_the_last_micro_batch_only():
    one = step(accumulate=3)
    assert (one.forward_s, one.backward_s) == (10.5, 22.5)
    assert spans(one, "network")[0] == ("bucket 0", 22.0 + 7.0, 22.0 + 9.0)
    assert one.seconds == pytest.approx(22.0 + 12.0 + SYNC)


def test_the_slowest_rank_is_waited_for():
    one = step(slowest=2.0)
    assert one.straggler_s == pytest.approx(11.0)
    assert spans(one, "network")[0] == ("bucket 0", 14.0, 16.0)


def test_communication_on_a_computing_core_takes_its_time():
    # The 2 MiB of bucket 0 are sent and received: 4 MiB at 4 MiB/s are 1 s of computing within its 2 s on the wire.
    one = step(thread_bytes_per_s=4 * MIB)
    assert spans(one, "compute")[-2] == ("backward first", 7.0, 12.0)
    assert one.backward_s == 7.5
    # On two cores it is half of that.
    assert spans(step(thread_bytes_per_s=4 * MIB, threads=2), "compute")[-2] == ("backward first", 7.0, 11.5)
    # 4 s of work for 2 s on the wire: each has half of the core while both want it, and the wire waits too.
    slow = step(thread_bytes_per_s=MIB)
    assert spans(slow, "compute")[-2] == ("backward first", 7.0, 15.0)
    assert spans(slow, "network") == [("bucket 0", 7.0, 15.0), ("bucket 1", 15.0, 16.0)]
    # What is left of it when nobody computes any more goes at the wire's speed: 8 of 32 s have passed.
    slower = step(thread_bytes_per_s=MIB / 4)
    assert spans(slower, "network") == [("bucket 0", 7.0, 16.5), ("bucket 1", 16.5, 17.5)]


def test_buckets_are_divided_and_converted_at_the_speed_of_memory():
    # Divided in place: 8 bytes a number. To bf16 and back: 6 more each way.
    plain, converted = (step(wire_itemsize=size, memory_bytes_per_s=float(MIB)) for size in (4, 2))
    second, first = MIB // 2, MIB // 4
    assert spans(plain, "network")[0][1] == pytest.approx(7.0 + 8 * second / MIB)
    assert spans(converted, "network")[0][1] == pytest.approx(7.0 + 14 * second / MIB)
    arrived = spans(converted, "network")[1][2]
    assert converted.seconds == pytest.approx(arrived + 6 * first / MIB + SYNC)


def test_images_come_first():
    one = step(input_s=2.0)
    assert spans(one, "input") == [("images", 0.0, 2.0)]
    assert one.seconds == pytest.approx(step().seconds + 2.0)


def test_the_parts_add_up_and_nothing_overlaps_in_a_lane():
    rng = np.random.default_rng(3)
    for _ in range(60):
        layers = [
            LayerTime(str(i), *rng.random(2), tuple(Gradient(int(rng.integers(1, MIB)), 4) for _ in range(i % 3)))
            for i in range(int(rng.integers(1, 20)))
        ]
        one = simulate(
            layers, fabric=Fabric(int(rng.integers(1, 9)), int(rng.integers(1, 4)), 1e-3, 1e6 * rng.random() + 1e4),
            algorithm=str(rng.choice(["ring", "oneccl", "mpi"])), wire_itemsize=int(rng.choice([2, 4])),
            bucket_mb=float(rng.random() * 5 + 0.01), optimizer_s=rng.random(), accumulate=int(rng.integers(1, 4)),
            slowest=1 + rng.random(), input_s=rng.random(), memory_bytes_per_s=1e9,
            thread_bytes_per_s=rng.choice([None, 1e6]), overlap=bool(rng.integers(2)),
        )  # fmt: skip
        assert parts(one) == pytest.approx(one.seconds)
        for lane in ("compute", "network"):
            for (_, _, end), (_, start, _) in itertools.pairwise(spans(one, lane)):
                assert start >= end - 1e-9
        assert max(span.end for span in one.spans) == pytest.approx(one.seconds)


def test_expected_maximum_of_normals():
    assert expected_maximum(1) == 0
    rng = np.random.default_rng(0)
    for ranks in (2, 16, 512):
        drawn = rng.standard_normal((4000, ranks)).max(axis=1).mean()
        assert expected_maximum(ranks) == pytest.approx(drawn, rel=0.05)
    assert expected_maximum(4096) > expected_maximum(2048)
