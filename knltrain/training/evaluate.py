"""Top-1 and top-5 over every validation image, each counted exactly once at any world size."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from knltrain import checkpoint
from knltrain.comm.group import Group
from knltrain.config import RunConfig
from knltrain.data.classes import read_choice
from knltrain.data.convert import checksum
from knltrain.data.datasets import open_part, remarks_of
from knltrain.data.folder import DataError
from knltrain.data.loader import Batch, Loader, replaced
from knltrain.data.tar import Tar
from knltrain.errors import KnltrainError
from knltrain.launch.placement import RankPlacement
from knltrain.models import model_of
from knltrain.node.binding import running_on
from knltrain.node.memory import keep_freed_memory
from knltrain.runlog.console import Console
from knltrain.training.engine import DTYPES, autocast, choose_precision
from knltrain.training.ranks import require_same_data, same_fields
from knltrain.training.signals import InterruptError, StopRequest
from knltrain.weights.load import load as load_file
from knltrain.weights.load import require_same_file
from knltrain.weights.metadata import as_trained

_NOTHING = Batch(torch.empty(0), torch.empty(0, dtype=torch.int64))


class Accuracy(NamedTuple):
    """Percentages and the mean cross-entropy, and how many images they are of."""

    top1: float
    top5: float
    loss: float
    images: int


@torch.no_grad()
def evaluate(
    model: nn.Module, precision: str, loader: Loader, group: Group, *, batch: int, stop: StopRequest | None = None
) -> Accuracy:
    """Evaluates a model on a data set; every rank takes its part and returns the whole result.

    Running statistics must be equal on all ranks (averaged_running_statistics). With fewer than five classes, top-5
    counts them all.

    Args:
        model: what to evaluate; it is left in training mode.
        precision: bf16 or fp32.
        loader: of the validation images.
        group: the ranks that take part.
        batch: images at once.
        stop: looked at before every batch.

    Raises:
        InterruptError: any rank was asked to stop before it was through.
    """
    model.eval()
    correct = in_five = images = 0
    loss = 0.0
    batches = loader.evaluation(batch=batch, rank=group.rank, world_size=group.world_size)
    try:
        # Ranks differ by an image, and so perhaps by a batch; all look equally often whether to stop.
        for _ in range(-(-len(loader) // (group.world_size * batch))):
            if stop is not None and group.any(stop.requested):
                raise InterruptError
            pictures, labels = next(batches, _NOTHING)
            if not len(labels):
                continue
            with autocast(precision):
                logits = model(pictures)
            logits = logits.float()
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            best = logits.topk(min(5, logits.shape[1])).indices
            hits = best == labels[:, None]
            correct += int(hits[:, 0].sum())
            in_five += int(hits.sum())
            images += len(labels)
    finally:
        batches.close()
        model.train()
    all_correct, all_in_five, all_loss, all_images = group.sum(correct, in_five, loss, images)
    return Accuracy(
        100 * all_correct / all_images, 100 * all_in_five / all_images, all_loss / all_images, int(all_images)
    )


def _same_on_all_ranks(path: Path, group: Group, console: Console) -> Path:
    """What all ranks evaluate: the file, or the newest checkpoint as the first one sees it, which may be growing."""
    found = ""
    if group.is_first:
        found = str(path if path.is_file() else checkpoint.newest(path, console.warn))
    path = Path(group.broadcast_str(found))
    if unseen := group.count(not path.exists()):
        raise KnltrainError(f"{path}: {unseen} ranks do not see it; it must be where all nodes do")
    return path


def evaluate_checkpoint(
    path: Path, config: RunConfig, console: Console, placement: RankPlacement, *, classes: Sequence[str] | None = None
) -> dict[str, Any]:
    """Evaluates a checkpoint, or a file of weights, on the ``val`` part of a data set.

    Args:
        path: a checkpoint, or a run's folder, of which the newest is taken; or a file, as ``init_from`` takes it.
        config: names the data, the precision and the number of decode threads. A checkpoint says the rest; for a file,
            ``config`` names its network, image size and resize too.
        console: where to speak.
        placement: where this rank runs.
        classes: for a file, the names of its classes in the order of the logits, where they are known.

    Returns:
        Accuracy and what it was measured on.

    Raises:
        KnltrainError: no checkpoint there, or it is damaged, or the file is of another network, or ranks do not all see
            the same one.
        DataError: the data cannot be used, or has other classes than the checkpoint was trained on.
    """
    keep_freed_memory()
    ranks, node, threads = placement.ranks, placement.node, placement.plan.threads
    torch.set_num_threads(threads)
    precision = choose_precision(config.precision, node, force=config.force_bf16, warn=console.warn)
    same = {**same_fields(config), "precision": precision, "path": str(path), "classes": classes and [*classes]}
    with running_on(placement.plan.comm):
        group = Group(ranks, cpus=placement.plan.comm, same=same)
    with group, group.report_lost_ranks():
        path = _same_on_all_ranks(path, group, console)
        of_a_file = path.is_file()
        if of_a_file and group.world_size > 1:  # alone there is nothing to compare
            require_same_file(str(path), checksum(str(path)), group)
        choice = read_choice(config.class_order, config.classes)
        if not of_a_file:
            state = checkpoint.read_state(path)
            config, classes = as_trained(config, state), state["classes"]
            if state["config"].get("classes") and not config.classes:
                choice = dataclasses.replace(choice, only=frozenset(classes or ()), only_from=str(path))
                console.line(f"{config.data}: only the classes that {path} was trained on with --classes are used")
        if classes is not None:
            choice = dataclasses.replace(choice, numbers=tuple(classes), order_from=str(path))
        dataset = open_part(config, "val", choice)
        for remark in remarks_of(dataset):
            console.warn(remark)
        if classes is not None and choice.order and not (isinstance(dataset, Tar) and isinstance(choice.order, tuple)):
            console.warn(f"class-order has no effect: {path} names its classes in their order")
        require_same_data({"val": dataset}, config.data, group)
        model = model_of(config, len(dataset.classes))
        if not of_a_file:
            checkpoint.load_weights(path, model)
        elif load_file(path, model):
            raise DataError(f"{config.data}/val has {len(dataset.classes):,} classes, and {path} another number")
        workers = threads if config.workers is None else config.workers
        loader = Loader(dataset, config, dtype=DTYPES[precision], workers=workers, cpus=placement.plan.decode)
        console.line(
            f"{config.model} of {path} on {len(dataset):,} images of {config.image_size} pixels, cut out of "
            f"{config.resize}; {precision}, {threads} threads a rank"
        )
        with contextlib.closing(loader):
            start = time.perf_counter()
            accuracy = evaluate(model, precision, loader, group, batch=128)
            seconds = time.perf_counter() - start
        skipped = loader.skipped(group.sum)
    if skipped:
        console.warn(replaced(skipped))
    return {
        "checkpoint": str(path),
        "data": config.data,
        **accuracy._asdict(),
        "skipped_images": skipped,
        "images_per_s": accuracy.images / seconds,
        "precision": precision,
        "world_size": ranks.size,
    }
