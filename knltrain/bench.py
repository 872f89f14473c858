"""How fast a training step is on this node, with synthetic input: warm-up, then median and spread."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F

from knltrain.config import RunConfig
from knltrain.console import Console
from knltrain.engine import build_engine, choose_engine, choose_precision
from knltrain.models import model_of
from knltrain.node.affinity import threads_per_rank
from knltrain.node.memory import keep_freed_memory, peak_resident_mb
from knltrain.node.topology import read_node
from knltrain.optim import build_optimizer
from knltrain.provenance import provenance

# The first steps allocate, choose primitives and compile.
_WARMUP_STEPS = 3
_CLASSES = 1000


def bench(config: RunConfig, console: Console, *, steps: int) -> dict[str, Any]:
    """Times whole training steps (forward, loss, backward, optimizer) on one batch of noise.

    Args:
        config: model, image size, global batch (all at once), precision, engine and optimizer.
        console: where to speak.
        steps: how many steps are timed, after three that are not.

    Returns:
        Median, quartiles and extremes of the step time in seconds, images/s of the median step, and where it ran.
    """
    malloc = keep_freed_memory()
    node = read_node()
    threads = threads_per_rank(node, local_size=1)
    torch.set_num_threads(threads)
    precision = choose_precision(config.precision, node, force=config.force_bf16)
    name = choose_engine(config.engine)
    torch.manual_seed(config.seed)
    model = model_of(config, _CLASSES)
    engine = build_engine(name, precision, model, build_optimizer(model, config.optim))
    shape = (config.global_batch, 3, config.image_size, config.image_size)
    images = torch.randn(shape).to(engine.dtype, memory_format=torch.channels_last)
    labels = torch.randint(_CLASSES, (config.global_batch,))
    console.line(f"{config.model}, batch {config.global_batch}, {config.image_size} px, {precision}, engine {name}, "
                 f"{threads} threads; {node.cpu_model}, {node.isa}")  # fmt: skip

    seconds = []
    for _ in range(_WARMUP_STEPS + steps):
        start = time.perf_counter()
        engine.optimizer.zero_grad(set_to_none=True)
        with engine.autocast():
            logits = engine.model(images)
        F.cross_entropy(logits.float(), labels).backward()
        engine.optimizer.step()
        seconds.append(time.perf_counter() - start)
    timed = sorted(seconds[_WARMUP_STEPS:])
    quartiles = statistics.quantiles(timed, n=4) if len(timed) > 1 else [timed[0]] * 3
    return {
        "model": config.model,
        "batch": config.global_batch,
        "image_size": config.image_size,
        "precision": precision,
        "engine": name,
        "optimizer": f"{config.optim.name}/{config.optim.variant}",
        "threads": threads,
        "steps": steps,
        "images_per_s": config.global_batch / statistics.median(timed),
        "step_s": {
            "median": statistics.median(timed),
            "quartile1": quartiles[0],
            "quartile3": quartiles[2],
            "min": timed[0],
            "max": timed[-1],
        },
        "warmup_s": sum(seconds[:_WARMUP_STEPS]),
        "peak_rss_mb": peak_resident_mb(),
        "malloc": malloc,
        **provenance(node),
    }
