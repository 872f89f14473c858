"""Batch norm's running statistics across the ranks.

Training normalises with each rank's own batch, as Goyal et al. 2017 do, so every rank has running means and variances
of its own. Evaluation and checkpoints use their mean over the ranks, temporarily: each rank continues with its own, so
that a run does not depend on when it is evaluated or stopped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from knltrain.comm.group import Group


@contextlib.contextmanager
def averaged_running_statistics(model: nn.Module, group: Group) -> Iterator[None]:
    """Replaces batch norm's running statistics by their mean over the ranks inside the block, and restores them after.

    All ranks enter it at once.
    """
    buffers = list(_running_statistics(model).values())
    if group.world_size == 1 or not buffers:
        yield
        return
    own = torch.cat([buffer.flatten() for buffer in buffers])
    mean = own.clone()
    group.count_collective()
    dist.all_reduce(mean, group=group.channel)
    _copy_into(mean / group.world_size, buffers)
    try:
        yield
    finally:
        _copy_into(own, buffers)


def gather_running_statistics(model: nn.Module, group: Group) -> dict[str, Tensor]:
    """Gathers every rank's own running statistics on rank 0.

    All ranks call it at once.

    Returns:
        On rank 0 of several ranks: by buffer name, a tensor with a row for each rank. Empty elsewhere.
    """
    buffers = _running_statistics(model)
    if group.world_size == 1 or not buffers:
        return {}
    own = torch.cat([buffer.flatten() for buffer in buffers.values()])
    rows = torch.empty(group.world_size if group.is_first else 0, len(own), dtype=own.dtype)
    group.count_collective()
    dist.gather(own, list(rows) if group.is_first else None, dst=0, group=group.channel)
    if not group.is_first:
        return {}
    parts = rows.split([buffer.numel() for buffer in buffers.values()], dim=1)
    return dict(zip(buffers, parts, strict=True))


def _running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Returns the buffers by name, in module order."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for name, buffer in (("running_mean", module.running_mean), ("running_var", module.running_var))
        if buffer is not None
    }


def _copy_into(flat: Tensor, buffers: list[Tensor]) -> None:
    with torch.no_grad():
        for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))
