"""Timing of a whole training step: waiting for images, forward, loss, backward, optimizer."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.profiler import record_function

from knltrain.bench.primitives import record_primitives, slow_convolutions
from knltrain.config import RunConfig
from knltrain.data.datasets import open_part
from knltrain.data.loader import Batch, Loader, RankBatch
from knltrain.errors import ConfigError
from knltrain.models import model_of, refuse_single_values
from knltrain.models.convolutions import choose
from knltrain.node.affinity import threads_per_rank
from knltrain.node.contention import CpuContentionMonitor
from knltrain.node.memory import keep_freed_memory, peak_resident_mb
from knltrain.node.topology import read_node
from knltrain.ops.native import isa
from knltrain.optim import build_optimizer
from knltrain.runlog.console import Console
from knltrain.runlog.provenance import provenance
from knltrain.training.engine import build_engine, choose_engine, choose_precision, set_fp32_precision

# The first steps allocate, choose primitives and compile.
_WARMUP_STEPS = 3
_CLASSES = 1000


class StepTime(NamedTuple):
    """Duration of one step, and of its wait for images, in seconds."""

    step_s: float
    data_s: float


class TrainingStep:
    """A model, its optimizer and its input: one synthetic batch, or batches of ``config.data``.

    Attributes:
        engine: model and optimizer, ready to train.
        threads: compute threads.
        settings: the measured settings, as JSON types; part of every result.

    Args:
        config: model, image size, global batch (as one micro-batch), precision, engine, optimizer, and for real images
            data and augmentation.
        threads: compute threads; by default those of a single rank on this node.

    Raises:
        ConfigError: this machine does not support the configuration.
        DataError: the data cannot be used.
    """

    def __init__(self, config: RunConfig, threads: int | None = None) -> None:
        malloc = keep_freed_memory()
        self.node = read_node()
        self.threads = threads or threads_per_rank(self.node, local_size=1)
        if threads and threads > len(self.node.cpus):
            raise ConfigError(f"{threads} threads: this process may use {len(self.node.cpus)} logical CPUs")
        torch.set_num_threads(self.threads)
        precision = choose_precision(config.precision, self.node, force=config.force_bf16)
        name = choose_engine(
            config.engine, model=config.model, precision=precision, node=self.node, threads=self.threads
        )
        set_fp32_precision(config.fp32_precision, precision=precision, engine=name, node=self.node)
        if config.global_batch == 1:
            refuse_single_values(config, [config.image_size], "give a larger --batch")
        dataset = open_part(config, "train") if config.data else None
        torch.manual_seed(config.seed)
        classes = len(dataset.classes) if dataset else _CLASSES
        model = model_of(config, classes)
        convolutions = choose(
            config, num_classes=classes, engine=name, precision=precision, node=self.node, threads=self.threads,
            images=config.global_batch,
        )  # fmt: skip
        optimizer = build_optimizer(model, config.optim)
        optimizer.carries_norms = True  # as in a run
        self.engine = build_engine(name, precision, model, optimizer, convolutions)
        self._config = config
        self._share = RankBatch(config.global_batch, config.global_batch, rank=0, world_size=1)
        self._loader: Loader | None = None
        self.settings: dict[str, Any] = {
            "model": config.model,
            "batch": config.global_batch,
            "image_size": config.image_size,
            "precision": precision,
            "fp32_precision": config.fp32_precision,
            "engine": name,
            "convolutions": convolutions,
            "optimizer": f"{config.optim.name}/{config.optim.variant}",
            "threads": self.threads,
            "kernels": isa(),
            "malloc": malloc,
        }
        if dataset:
            workers = self.threads if config.workers is None else config.workers
            self._loader = Loader(dataset, config, dtype=self.engine.dtype, workers=workers)
            self._batches: Iterator[Batch] = self._loader.training(self._share, 0, sys.maxsize)
            self.settings |= {"data": config.data, "augment": config.augment.name, "workers": workers}
        else:
            shape = (config.global_batch, 3, config.image_size, config.image_size)
            images = torch.randn(shape).to(self.engine.dtype, memory_format=torch.channels_last)
            self._batches = itertools.repeat(Batch(images, torch.randint(_CLASSES, (config.global_batch,))))

    def __str__(self) -> str:
        s = self.settings
        text = (f"{s['model']}, batch {s['batch']}, {s['image_size']} px, {s['precision']}, engine {s['engine']}, "
                f"{s['threads']} threads")  # fmt: skip
        return f"{text}, {s['workers']} decoders of {s['data']}" if "data" in s else text

    def input_alone(self, steps: int) -> float:
        """Returns images/s of reading, decoding and augmenting ``steps`` batches without training.

        Later steps continue with the next images, which are not cached either.
        """
        assert self._loader is not None, "synthetic images are not read"
        start = time.perf_counter()
        for _ in self._loader.training(self._share, 0, steps):
            pass
        seconds = time.perf_counter() - start
        self._batches = self._loader.training(self._share, steps, sys.maxsize)
        return steps * self._share.global_batch / seconds

    def __call__(self) -> StepTime:
        """Runs one step, with its parts marked for the profiler."""
        start = time.perf_counter()
        images, labels = next(self._batches)
        data_s = time.perf_counter() - start
        self.engine.optimizer.zero_grad(set_to_none=True)
        with record_function("forward"), self.engine.autocast():
            logits = self.engine.model(images)
        with record_function("loss"):
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=self._config.label_smoothing)
        with record_function("backward"):
            loss.backward()
        with record_function("optimizer"):
            self.engine.optimizer.step()
        return StepTime(time.perf_counter() - start, data_s)

    def warm_up(self) -> float:
        """Runs the first steps, which are slower, and returns their duration in seconds."""
        return sum(self().step_s for _ in range(_WARMUP_STEPS))

    def slow_convolutions(self) -> str:
        """Runs a step, and returns a warning if oneDNN has no fast code for a convolution; otherwise empty."""
        return slow_convolutions(record_primitives(self))

    def close(self) -> None:
        """Stops the decoders."""
        if self._loader:
            self._loader.close()


def bench(config: RunConfig, console: Console, *, steps: int, threads: int | None = None) -> dict[str, Any]:
    """Times training steps.

    Args:
        config: see :class:`TrainingStep`.
        console: for messages.
        steps: timed steps, after three that are not timed.
        threads: compute threads; by default those of a single rank on this node.

    Returns:
        Median, quartiles and extremes of the step time in seconds, images/s of the median step, provenance, and the
        CPU time, in CPUs, that others took meanwhile (``other_cpus``, ``stolen_cpus``). With data also the time spent
        waiting for images, its fraction of the steps (``data_fraction``), and images/s of the input alone
        (``input_images_per_s``).

    Raises:
        ConfigError: this machine does not support the configuration.
        DataError: the data cannot be used.
    """
    with contextlib.closing(TrainingStep(config, threads)) as step:
        console.line(f"{step}; {step.node.cpu_model}, {step.node.isa}")
        result: dict[str, Any] = {**step.settings, "steps": steps}
        if config.data:
            result["input_images_per_s"] = step.input_alone(steps)
        result["warmup_s"] = step.warm_up()
        slow = step.slow_convolutions()
        if slow:
            console.warn(slow)
        result["slow_convolutions"] = slow
        cpus, cores = len(step.node.cpus), len(step.node.cores)
        contention = CpuContentionMonitor(step.node.cpus, spare=max(0, cores - step.threads) * cpus // cores)
        times = [step() for _ in range(steps)]
        taken = contention.taken()
    if problem := contention.describe(taken):
        console.warn(problem)
    result |= {"other_cpus": taken.other, "stolen_cpus": taken.steal}
    return {**result, **summary(times, step.settings), "peak_rss_mb": peak_resident_mb(), **provenance(step.node)}


def summary(times: Sequence[StepTime], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the spread of step times, images/s of the median step, and with data the time spent waiting for it."""
    step_s = spread([time.step_s for time in times])
    result: dict[str, Any] = {"images_per_s": settings["batch"] / step_s["median"], "step_s": step_s}
    if "data" in settings:
        waits = [time.data_s for time in times]
        result |= {"data_s": spread(waits), "data_fraction": sum(waits) / sum(time.step_s for time in times)}
    return result


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns median, quartiles and extremes."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "median": statistics.median(values),
        "quartile1": quartiles[0],
        "quartile3": quartiles[2],
        "min": min(values),
        "max": max(values),
    }
