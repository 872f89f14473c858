"""The process group: who takes part, and the few collectives a run needs beside its gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

# Before there is a process group: its functions have the default group as it is now for their defaults, and one that
# they hold never ends. Its threads would then meet an interpreter that does.
import torch.distributed.nn.functional
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from knltrain.errors import KnltrainError
from knltrain.node.ranks import Ranks
from knltrain.node.rendezvous import START_TIMEOUT_S, meet

_START_TIMEOUT = timedelta(seconds=START_TIMEOUT_S)
# What gloo says of a peer that is gone.
_LOST = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "Connection refused")


class Group:
    """All ranks of a run; with one rank, every call is a no-op that returns its input.

    As a context manager, it leaves the group at the end of its block. Not after an error: what is under way would then
    be waited for, and the other ranks with it; the end of this process tells them.

    Args:
        ranks: this process among its peers.

    Raises:
        KnltrainError: the ranks do not find each other.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.rank, self.world_size, self.local_size = ranks.rank, ranks.size, ranks.local_size
        self.backend = "none"
        if ranks.size == 1:
            return
        meeting = meet(ranks)
        meeting.export()
        try:
            dist.init_process_group(
                "gloo",
                init_method=meeting.init_method,
                rank=ranks.rank,
                world_size=ranks.size,
                timeout=_START_TIMEOUT,
            )
        except (RuntimeError, ValueError) as error:
            raise KnltrainError(
                f"rank {ranks.rank} of {ranks.size} ({ranks.launcher}) did not find the others at "
                f"{meeting.address or meeting.init_method}: {str(error).splitlines()[0]}"
            ) from None
        if dist.get_world_size() != ranks.size:
            raise KnltrainError(f"{ranks.launcher} started {ranks.size} ranks, the group has {dist.get_world_size()}")
        self.backend = dist.get_backend()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.close()

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the run's files and speaks to the user."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """The sums of each value over the ranks, in double precision."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.world_size > 1:
            dist.barrier()

    def average_running_statistics(self, model: nn.Module) -> None:
        """Averages batch norm's running means and variances over the ranks, in place.

        Training normalises with each rank's own batch, as Goyal et al. 2017 do; evaluation and checkpoints use the
        mean of what the ranks have seen.
        """
        if self.world_size == 1:
            return
        statistics = [
            buffer
            for module in model.modules()
            if isinstance(module, _BatchNorm)
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]
        if not statistics:
            return
        flat = torch.cat([buffer.flatten() for buffer in statistics])
        dist.all_reduce(flat)
        flat /= self.world_size
        for buffer, mean in zip(statistics, flat.split([buffer.numel() for buffer in statistics]), strict=True):
            buffer.copy_(mean.view_as(buffer))

    @contextlib.contextmanager
    def names_lost_ranks(self) -> Iterator[None]:
        """Turns the transport's errors about peers that are gone into one line.

        Raises:
            KnltrainError: another rank has ended or does not answer.
        """
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if self.world_size == 1 or not any(word in reason for word in _LOST):
                raise
            raise KnltrainError(
                f"another rank has ended or does not answer; what that rank printed is the cause ({reason})"
            ) from None

    def close(self) -> None:
        """Leaves the group; what holds it beside this, such as a DistributedDataParallel, must be gone."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
