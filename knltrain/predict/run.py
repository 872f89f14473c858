"""From a configuration, a machine and a number of nodes to the time, the cost and the energy of a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from knltrain.config import RunConfig, as_typed
from knltrain.config.schedule import make_schedule
from knltrain.errors import ConfigError
from knltrain.predict.allreduce import Fabric
from knltrain.predict.layers import Layer, LayerTime, gradients_of, layers_of, times_from_profile
from knltrain.predict.systems import Rate, System
from knltrain.predict.timeline import Step, expected_maximum, simulate
from knltrain.recipes import IMAGENET_IMAGES

# Bytes of memory that the update reads and writes for a parameter. Fused: momentum and float32 weights both ways, and
# the gradient; or a bf16 gradient and a bf16 copy of the weights. LAMB's is eleven passes over two or three tensors.
_UPDATE_BYTES = {"lars": 20, "sgd": 20, "lamb": 108}
_CHECKPOINT_BYTES = {"lars": 8, "sgd": 8, "lamb": 12}  # weights and moments in float32
# Moving average of the weights: bytes a parameter that it moves (two reads, one write), and adds to a checkpoint.
_AVERAGE_BYTES, _AVERAGE_CHECKPOINT_BYTES = 12, 4
_MIN_NETWORK_FACTOR, _MAX_STEPS = 1e-6, 1e15
# CIFAR-10, for the networks of small images, and ImageNet: images of train and val, and classes.
_CIFAR_MODELS = ("alexnet_bn_small", "resnet20")
_CIFAR, _IMAGENET = (50_000, 10_000), (IMAGENET_IMAGES, 50_000)
_CIFAR_CLASSES, _IMAGENET_CLASSES = 10, 1000


def images_for(model: str) -> tuple[int, int]:
    """Images of train and val that a network is usually trained on and evaluated with."""
    return _CIFAR if model in _CIFAR_MODELS else _IMAGENET


def classes_for(model: str) -> int:
    """Classes of what :func:`images_for` counts."""
    return _CIFAR_CLASSES if model in _CIFAR_MODELS else _IMAGENET_CLASSES


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be predicted.

    Attributes:
        config: what is trained.
        system: on what.
        nodes: how many of it.
        network_factor: how many times as fast the network is: bandwidth, and messages a second.
        algorithm: of the all-reduce; None: the system's.
        images: of the training set; None: those of :func:`images_for`.
        profile: JSON of ``knltrain bench --profile`` on a node of the system, in place of the system's ceilings.
        overlap: gradients are sent during the backward pass, as this package does.
    """

    config: RunConfig
    system: System
    nodes: int
    network_factor: float = 1.0
    algorithm: str | None = None
    images: int | None = None
    profile: Mapping[str, Any] | None = None
    overlap: bool = True

    @property
    def ranks(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.system.node.ranks.value

    @property
    def precision(self) -> str:
        """Arithmetic: the profile's; otherwise auto is bf16 where the processor has it."""
        if self.profile is not None:
            return str(self.profile.get("precision"))
        if self.config.precision != "auto":
            return self.config.precision
        return "bf16" if self.system.node.bf16_gflop_per_s else "fp32"

    @property
    def training_images(self) -> int:
        """Images of the training set."""
        return self.images or images_for(self.config.model)[0]


@dataclass(frozen=True)
class Prediction:
    """What a run is predicted to take.

    Attributes:
        job: what was asked.
        local_batch: images that a rank passes through the model at once.
        accumulate: micro-batches of a step.
        steps: of the whole run.
        step: one of them; where batch or image size change, one of the last.
        training_s: of all steps.
        images_per_s: of all nodes, training.
        one_node_images_per_s: of one node that trains the same images a step by itself.
        evaluation_s: of all evaluations.
        checkpoint_s: of all checkpoints.
        gradient_bytes: on the wire, of one rank's gradients.
    """

    job: Job
    local_batch: int
    accumulate: int
    steps: int
    step: Step
    training_s: float
    images_per_s: float
    one_node_images_per_s: float
    evaluation_s: float
    checkpoint_s: float
    gradient_bytes: float

    @property
    def efficiency(self) -> float:
        """Images/s over those of as many single nodes."""
        return self.images_per_s / (self.job.nodes * self.one_node_images_per_s)

    @property
    def total_s(self) -> float:
        """From the first step to the end."""
        return self.training_s + self.evaluation_s + self.checkpoint_s

    @property
    def node_hours(self) -> float:
        """Nodes times hours."""
        return self.job.nodes * self.total_s / 3600

    @property
    def usd(self) -> float | None:
        """Price of the node-hours, where the system has one."""
        price = self.job.system.node.usd_per_hour
        return self.node_hours * price.value if price else None

    @property
    def kwh(self) -> float | None:
        """Energy, where the system says what a node draws."""
        watts = self.job.system.node.watts
        return self.node_hours * watts.value / 1000 if watts else None


def predict(job: Job) -> Prediction:
    """Predicts a run.

    Raises:
        ConfigError: fewer than one node, a batch that the ranks cannot share, a network factor that is not positive, a
            network or a precision that the system knows nothing of.
    """
    config, system = job.config, job.system
    if job.nodes < 1:
        raise ConfigError(f"{job.nodes} nodes: give 1 or more")
    if not _MIN_NETWORK_FACTOR <= job.network_factor <= 1 / _MIN_NETWORK_FACTOR:
        raise ConfigError(f"network-factor {as_typed(job.network_factor)}: give a positive number, 2 for twice as fast")
    if config.epochs * job.training_images / min(config.global_batch, *config.schedule.batches, 10**9) > _MAX_STEPS:
        asked = f"epochs {as_typed(config.epochs)} of {job.training_images:,} images"
        raise ConfigError(f"{asked}: more steps than a run can take")
    schedule = make_schedule(config, job.training_images)
    steps = min(schedule.total_steps, config.max_steps or schedule.total_steps)
    kinds = {(phase.batch, phase.image_size): _step_of(_at(job, phase.batch, phase.image_size))
             for phase in schedule.phases if phase.first_step < steps}  # fmt: skip
    training_s = sum(
        (min(phase.last_step, steps) - phase.first_step) * kinds[phase.batch, phase.image_size].step.seconds
        for phase in schedule.phases
        if phase.first_step < steps
    )
    last = schedule.phase(steps - 1)
    final = kinds[last.batch, last.image_size]
    epochs = schedule.epoch(steps)
    elements = sum(gradient.elements for time in final.times for gradient in time.gradients)
    evaluations = max(1, math.floor(epochs + 1e-9))
    val_images = images_for(config.model)[1]
    seen = final.times if last.image_size == config.image_size else layer_times(job, final.local)[0]
    forward_s = sum(time.forward_s for time in seen) / final.local
    checkpoints = max(1, math.ceil(epochs / config.checkpoint.every - 1e-9))
    kept = _CHECKPOINT_BYTES[config.optim.name] + (_AVERAGE_CHECKPOINT_BYTES if config.ema_decay else 0)
    return Prediction(
        job=job,
        local_batch=final.local,
        accumulate=final.accumulate,
        steps=steps,
        step=final.step,
        training_s=training_s,
        images_per_s=last.batch / final.step.seconds,
        one_node_images_per_s=last.batch / job.nodes / final.alone_s,
        evaluation_s=evaluations * math.ceil(val_images / job.ranks) * forward_s * final.slowest,
        checkpoint_s=checkpoints * kept * elements / (1e9 * system.storage.write_gb_per_s.value),
        gradient_bytes=sum(final.step.sizes),
    )


def _at(job: Job, batch: int, image_size: int) -> Job:
    """The job with the steps of one phase."""
    return dataclasses.replace(job, config=dataclasses.replace(job.config.at_size(image_size), global_batch=batch))


class _Kind(NamedTuple):
    """A step of one batch and image size, and its parts."""

    local: int
    accumulate: int
    times: list[LayerTime]
    step: Step
    alone_s: float
    slowest: float


def _step_of(job: Job) -> _Kind:
    config, system = job.config, job.system
    local, accumulate = share(job)
    times, optimizer_s = layer_times(job, local)
    if config.ema_decay:
        elements = sum(gradient.elements for time in times for gradient in time.gradients)
        optimizer_s += _AVERAGE_BYTES * elements * _per_byte_s(job)
    slowest = 1 + system.noise.spread.value * expected_maximum(job.ranks)
    computing_s = accumulate * sum(time.forward_s + time.backward_s for time in times)
    reading_s = _reading_s(job, local * accumulate)
    threads = max(1, (system.node.cores.value - system.node.comm_cores.value) // system.node.ranks.value)
    step = simulate(
        times,
        fabric=fabric_of(job),
        algorithm=job.algorithm or system.network.algorithm,
        wire_itemsize=2 if config.comm.dtype == "bf16" else 4,
        bucket_mb=config.comm.bucket_mb_of(job.ranks),
        optimizer_s=optimizer_s,
        accumulate=accumulate,
        slowest=slowest,
        input_s=reading_s,
        memory_bytes_per_s=1e9 * system.node.memory_gb_per_s.value / system.node.ranks.value,
        thread_bytes_per_s=_thread_bytes_per_s(system),
        threads=threads,
        overlap=job.overlap,
    )
    if not math.isfinite(step.seconds):
        raise ConfigError(f"{system.name}: with its numbers a step never ends; look for one that is too small")
    return _Kind(local, accumulate, times, step, computing_s + reading_s + optimizer_s, slowest)


def share(job: Job) -> tuple[int, int]:
    """Images that a rank passes through the model at once, and how many times in a step, as the trainer divides them.

    Raises:
        ConfigError: it does not divide; the message names sizes that do.
    """
    batch, ranks = job.config.global_batch, job.ranks
    name = "schedule.batches" if batch in job.config.schedule.batches else "global-batch"
    if batch < ranks:
        raise ConfigError(
            f"{name} {batch} is smaller than the {ranks} ranks of {job.nodes} nodes; take {ranks} or more"
        )
    if batch % ranks:
        down = batch // ranks * ranks
        raise ConfigError(f"{name} {batch} is not a multiple of {ranks} ranks; take {down} or {down + ranks}")
    of_rank = batch // ranks
    local = min(job.config.local_batch or of_rank, of_rank)
    if of_rank % local:
        divisor = next(size for size in range(local, 0, -1) if of_rank % size == 0)
        raise ConfigError(
            f"local-batch {local} does not divide the {of_rank} images a rank has in a step of batch {batch}; take "
            f"{divisor}"
        )
    return local, of_rank // local


def fabric_of(job: Job) -> Fabric:
    """The network between the ranks of a job."""
    network, factor = job.system.network, job.network_factor
    return Fabric(
        nodes=job.nodes,
        ranks_per_node=job.system.node.ranks.value,
        latency_s=1e-6 * network.latency_us.value / factor,
        link_bytes_per_s=1e9 * network.link_gb_per_s.value * factor,
        shared_latency_s=1e-6 * network.shared_latency_us.value,
        shared_bytes_per_s=1e9 * network.shared_gb_per_s.value,
        sum_bytes_per_s=1e9 * network.sum_gb_per_s.value,
        call_s=1e-6 * network.call_us.value,
    )


def layer_times(job: Job, local_batch: int) -> tuple[list[LayerTime], float]:
    """Seconds of a rank for each layer of a micro-batch, and for the update.

    From the profile of a node, which has to be of this network, image size and precision; or from the ceilings of the
    system: a layer takes as long as its arithmetic or as what it moves, whichever is longer, over the part of the
    ceilings that a measured rate says a step reaches.

    Raises:
        ConfigError: the profile is of something else, or the system has no such ceiling or an impossible rate.
    """
    node = job.system.node
    computing = node.cores.value - node.comm_cores.value
    if job.profile is not None:
        _refuse_other(job.profile, job.config)
        times, batch, optimizer_s = times_from_profile(job.profile, "--layers")
        # Scales the profiled threads to the cores that compute in a rank.
        factor = int(job.profile.get("threads", node.cores.value)) * node.ranks.value / computing
        return [
            dataclasses.replace(
                time,
                forward_s=factor * time.forward_s * local_batch / batch,
                backward_s=factor * time.backward_s * local_batch / batch,
            )
            for time in times
        ], optimizer_s * factor
    config, precision = job.config, job.precision
    layers = layers_of(config.model, image_size=config.image_size, num_classes=classes_for(config.model))
    rate = _rate(job.system, config.model, precision)
    efficiency, cores = _efficiency(job.system, rate)
    factor = node.ranks.value * cores / computing / efficiency
    times = []
    for layer in layers:
        forward_s, backward_s = ceiling_s(layer, local_batch, job.system, precision)
        times.append(LayerTime(layer.name, factor * forward_s, factor * backward_s, gradients_of(layer, precision)))
    return times, node.ranks.value * _update_s(job.system, layers, config.optim.name)


def _refuse_other(profile: Mapping[str, Any], config: RunConfig) -> None:
    """Refuses a profile of something else than what is to be predicted."""
    for name, ours in (("model", config.model), ("image_size", config.image_size), ("precision", config.precision)):
        if profile.get(name) != ours and ours != "auto":
            raise ConfigError(f"--layers: {name.replace('_', '-')} of the profile is {profile.get(name)}, not {ours}")


def ceiling_s(layer: Layer, batch: int, system: System, precision: str) -> tuple[float, float]:
    """Seconds of a layer's forward and backward part if a whole node ran it at its ceilings.

    Raises:
        ConfigError: bf16 on a processor without.
    """
    node = system.node
    ceiling = node.bf16_gflop_per_s if precision == "bf16" else node.fp32_gflop_per_s
    if ceiling is None:
        raise ConfigError(f"precision bf16: {system.name} does not compute in it; use --precision fp32")
    flops, moved = 1e9 * ceiling.value, 1e9 * node.memory_gb_per_s.value
    itemsize = 2 if precision == "bf16" else 4
    weights = layer.num_parameters
    return (
        max(batch * layer.forward_flops / flops, itemsize * (batch * layer.forward_values + weights) / moved),
        # The weights are read for the input's gradient, and their own gradient is written.
        max(batch * layer.backward_flops / flops, itemsize * (batch * layer.backward_values + 2 * weights) / moved),
    )


def _rate(system: System, model: str, precision: str) -> Rate | None:
    """The measured rate that says most about a network: its own, else one of its precision, else any."""
    for fits in (lambda rate: model in rate.models and rate.precision == precision,
                 lambda rate: rate.precision == precision, lambda rate: True):  # fmt: skip
        for rate in system.rate:
            if fits(rate):
                return rate
    return None


def _efficiency(system: System, rate: Rate | None) -> tuple[float, int]:
    """The part of a node's ceilings that a step reaches, and of how many cores."""
    if rate is None:
        assert system.node.efficiency is not None
        return system.node.efficiency.value, system.node.cores.value
    try:
        # With a thousand classes, as bench has them on noise.
        layers = layers_of(rate.models[0], image_size=rate.image_size)
    except ConfigError as error:
        raise ConfigError(f"{system.name}: a rate of it: {error}") from None
    bound_s = sum(sum(ceiling_s(layer, rate.batch, system, rate.precision)) for layer in layers)
    took_s = rate.batch / rate.images_per_s - _update_s(system, layers)
    if took_s <= 0:
        raise ConfigError(
            f"{system.name}: {rate.images_per_s:g} images/s of {rate.models[0]} leave no time beside the optimizer; "
            "correct the rate, its batch, or node.memory_gb_per_s"
        )
    return bound_s / took_s, rate.cores or system.node.cores.value


def _update_s(system: System, layers: list[Layer], optimizer: str = "lars") -> float:
    """Seconds of the optimizer's update with the memory of a whole node."""
    elements = sum(layer.num_parameters for layer in layers)
    return _UPDATE_BYTES[optimizer] * elements / (1e9 * system.node.memory_gb_per_s.value)


def _per_byte_s(job: Job) -> float:
    """Seconds a byte at a rank's part of a node's memory bandwidth."""
    return job.system.node.ranks.value / (1e9 * job.system.node.memory_gb_per_s.value)


def _thread_bytes_per_s(system: System) -> float | None:
    thread = system.network.thread_gb_per_s
    return None if thread is None or system.node.comm_cores.value else 1e9 * thread.value


def _reading_s(job: Job, images: int) -> float:
    """Seconds that reading the images of a step takes from a rank's cores, which decode and compute alike."""
    if job.system.input is None:
        return 0.0
    cores = job.system.node.cores.value / job.system.node.ranks.value
    return images / (job.system.input.images_per_core_s.value * cores)
