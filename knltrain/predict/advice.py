"""Advice: what limits a run, and what a change would save. Each change is predicted by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import msgspec

from knltrain.errors import ConfigError
from knltrain.predict.run import Job, Prediction, predict
from knltrain.predict.systems import Noise, Sourced

# Doubling the nodes is worthwhile if it makes the run this many times as fast.
_MIN_DOUBLING_SPEEDUP = 1.5
# Smaller savings are below the accuracy of the model.
_MIN_SAVING = 0.02


def doublings(job: Job) -> list[Prediction]:
    """Predicts the job on 1, 2, 4, ... nodes, as long as every rank has an image and the batch divides."""
    found = []
    nodes = 1
    while nodes * job.system.node.ranks.value <= job.config.global_batch:
        try:
            found.append(predict(dataclasses.replace(job, nodes=nodes)))
        except ConfigError:  # the batch does not divide by so many ranks; by twice as many it does not either
            break
        nodes *= 2
    return found


def largest_useful(scan: list[Prediction]) -> int:
    """The number of nodes up to which each doubling makes the run at least 1.5 times as fast.

    Args:
        scan: as :func:`doublings` returns it.
    """
    useful = scan[0]
    for double in scan[1:]:
        if useful.total_s < _MIN_DOUBLING_SPEEDUP * double.total_s:
            break
        useful = double
    return useful.job.nodes


def network_bound(prediction: Prediction) -> bool:
    """Whether the communication that is not hidden takes longer than computing."""
    step = prediction.step
    return step.exposed_s > step.forward_s + step.backward_s + step.straggler_s


def changes(job: Job) -> Iterator[tuple[str, Job]]:
    """Yields what could be changed, in words, and the job with it."""
    config, system = job.config, job.system

    def with_comm(**fields: object) -> Job:
        comm = dataclasses.replace(config.comm, **fields)  # type: ignore[arg-type]
        return dataclasses.replace(job, config=dataclasses.replace(config, comm=comm))

    if job.ranks > 1:
        if config.comm.dtype == "fp32":
            yield "bf16 gradients (--comm.dtype bf16)", with_comm(dtype="bf16")
        if not job.overlap:
            yield (
                "communication during the backward pass (without --no-overlap)",
                dataclasses.replace(job, overlap=True),
            )
        for factor in (0.25, 4.0):
            size = config.comm.bucket_mb_of(job.ranks) * factor
            yield f"buckets of {size:g} MiB (--comm.bucket-mb {size:g})", with_comm(bucket_mb=size)
        if (job.algorithm or system.network.algorithm) == "oneccl":
            yield "MPI's choice of algorithm (CCL_ATL_TRANSPORT=mpi)", dataclasses.replace(job, algorithm="mpi")
        yield "a network twice as fast", dataclasses.replace(job, network_factor=2 * job.network_factor)
        rate = Sourced(2 * system.network.sum_gb_per_s.value, "twice")
        summing = msgspec.structs.replace(system, network=msgspec.structs.replace(system.network, sum_gb_per_s=rate))
        yield "gradients summed twice as fast (cores for communication)", dataclasses.replace(job, system=summing)
        steady = msgspec.structs.replace(system, noise=Noise(spread=Sourced(0.0, "none")))
        yield "ranks that all take the same time", dataclasses.replace(job, system=steady)
    if job.precision == "fp32" and system.node.bf16_gflop_per_s and job.profile is None:
        yield (
            "computing in bf16 (--precision bf16)",
            dataclasses.replace(job, config=dataclasses.replace(config, precision="bf16")),
        )
    if system.input is not None:
        yield (
            "images that cost nothing to read",
            dataclasses.replace(job, system=msgspec.structs.replace(system, input=None)),
        )
    yield (
        f"batch {2 * config.global_batch:,} in half the steps, which is another training",
        dataclasses.replace(job, config=dataclasses.replace(config, global_batch=2 * config.global_batch)),
    )


def advise(prediction: Prediction, scan: list[Prediction]) -> list[str]:
    """Says in words what bounds a run, how far more nodes help, and what saves how much.

    Args:
        prediction: of the run.
        scan: of the same on other numbers of nodes, as :func:`doublings` returns it.
    """
    job, step = prediction.job, prediction.step
    lines = []
    if job.ranks > 1:
        bound = [other.job.nodes for other in scan if network_bound(other)]
        # The job's number of nodes may lie between two powers of two.
        link = job.system.network.link_gb_per_s.value * job.network_factor
        traffic = f"{prediction.gradient_bytes / 1e6:.0f} MB a step over {link:g} GB/s"
        if network_bound(prediction) or (bound and bound[0] <= job.nodes):
            last = [other.job.nodes for other in scan if other.job.nodes < (bound[0] if bound else job.nodes)]
            beyond = f"network bound beyond {last[-1]:,} nodes" if last else "network bound"
            lines.append(f"{beyond}: {traffic}, of which {step.exposed_s / step.seconds:.0%} of the step is not hidden")
        else:
            ahead = f"network bound from {bound[0]:,} nodes on" if bound else "not network bound at any number of nodes"
            lines.append(f"compute bound: {traffic} take {step.exposed_s / step.seconds:.0%} of the step; {ahead}")
    if len(scan) > 1:
        useful = largest_useful(scan)
        end = " (the batch has no images for more)" if useful == scan[-1].job.nodes else ""
        lines.append(f"largest useful number of nodes: {useful:,}{end}; twice as many are less than 1.5 times as fast")
    savings = []
    for words, changed in changes(job):
        try:
            saved = 1 - predict(changed).total_s / prediction.total_s
        except ConfigError:
            continue
        if saved >= _MIN_SAVING:
            savings.append((saved, f"{words}: saves {saved:.0%}"))
    lines += [words for _, words in sorted(savings, key=lambda saving: -saving[0])]
    if not savings:
        lines.append("nothing that was tried saves 2 % or more")
    return lines
