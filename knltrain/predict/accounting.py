"""Iterations, messages and bytes of a fixed number of epochs, against the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from knltrain.config import RunConfig
from knltrain.config.schedule import make_schedule, total_steps
from knltrain.errors import ConfigError
from knltrain.predict.layers import layers_of
from knltrain.predict.run import classes_for
from knltrain.recipes import IMAGENET_IMAGES

BATCHES = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


def accounting(
    model: str,
    *,
    image_size: int,
    epochs: float,
    nodes: int,
    batches: Sequence[int] = BATCHES,
    images: int = IMAGENET_IMAGES,
    itemsize: int = 4,
) -> list[dict[str, Any]]:
    """Counts what a run does: the same arithmetic whatever the batch, but fewer exchanges of the same size.

    Iterations are E N / B. Each sums the gradient over the nodes once: 2 log2 P messages a node by halving-doubling,
    and 2 (P-1)/P of its bytes (Goyal et al. 2017, section 4).

    Args:
        model: as a configuration names it.
        image_size: pixels.
        epochs: E.
        nodes: P, one rank each.
        batches: values of B.
        images: N.
        itemsize: bytes of a number on the wire.

    Returns:
        For each batch: ``batch``, ``iterations``, ``images_per_node``, ``messages`` and ``terabytes`` that a node
        sends in the whole run, and ``flops_per_byte``, what a node computes for each byte that it sends.

    Raises:
        ConfigError: a network that is not known, or no nodes.
    """
    if nodes < 1:
        raise ConfigError(f"{nodes} nodes: give 1 or more")
    layers = layers_of(model, image_size=image_size, num_classes=classes_for(model))
    elements = sum(layer.num_parameters for layer in layers)
    flops = sum(layer.forward_flops + layer.backward_flops for layer in layers)
    sent = 2 * (nodes - 1) / nodes * elements * itemsize
    rows = []
    for batch in batches:
        iterations = total_steps(epochs=epochs, num_images=images, global_batch=batch)
        rows.append(
            {
                "batch": batch,
                "iterations": iterations,
                "images_per_node": batch / nodes,
                "messages": iterations * 2 * math.ceil(math.log2(nodes)),
                "terabytes": iterations * sent / 1e12,
                "flops_per_byte": flops * batch / nodes / sent if sent else None,
            }
        )
    return rows


def accounting_by_phase(config: RunConfig, *, nodes: int, images: int = IMAGENET_IMAGES) -> list[dict[str, Any]]:
    """Counts what each phase of a schedule that changes batch, image size or augmentation does.

    Args:
        config: what is trained.
        nodes: P, one rank each.
        images: N.

    Returns:
        For each phase: ``first_epoch`` and ``last_epoch``, ``image_size``, ``batch``, ``iterations``, ``images`` that
        they see, ``flops`` of their forward and backward passes with 2 per multiply-add, and ``messages`` and
        ``terabytes`` as :func:`accounting` counts them.

    Raises:
        ConfigError: a network that is not known, or no nodes.
    """
    schedule = make_schedule(config, images)
    rows = []
    for phase in schedule.phases:
        steps = phase.last_step - phase.first_step
        (sent,) = accounting(
            config.model,
            image_size=phase.image_size,
            epochs=steps * phase.batch / images,
            nodes=nodes,
            batches=[phase.batch],
            images=images,
            itemsize=2 if config.comm.dtype == "bf16" else 4,
        )
        layers = layers_of(config.model, image_size=phase.image_size, num_classes=classes_for(config.model))
        flops = sum(layer.forward_flops + layer.backward_flops for layer in layers)
        rows.append(
            {
                "first_epoch": schedule.epoch(phase.first_step),
                "last_epoch": schedule.epoch(phase.last_step),
                "image_size": phase.image_size,
                "batch": phase.batch,
                "iterations": steps,
                "images": steps * phase.batch,
                "flops": steps * phase.batch * flops,
                "messages": sent["messages"],
                "terabytes": sent["terabytes"],
            }
        )
    return rows
