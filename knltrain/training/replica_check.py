"""All ranks have the same weights, to the last bit; a rank that has others has a fault in its processor or memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from knltrain.comm.group import Group
from knltrain.errors import SharedError
from knltrain.ops.native import isa
from knltrain.training.engine import Engine
from knltrain.training.gradient_norm import flat_in_memory


class ReplicaCheck:
    """Compares the ranks' weights.

    A bit that flips in a momentum buffer is in the weights a step later, and bf16 copies are written anew from the
    weights at every step; so the weights are enough. Batch norm's running statistics differ by design.

    Args:
        group: the ranks.
        engine: has the weights.
    """

    def __init__(self, group: Group, engine: Engine) -> None:
        self._group, self._engine = group, engine

    def check(self, step: int) -> None:
        """Compares them; all ranks call it at once.

        Args:
            step: steps done.

        Raises:
            SharedError: weights differ; names the ranks, their hosts, and the first layer that differs.
        """
        if self._group.world_size == 1:
            return
        weights = self._engine.weights()
        rows = self._group.gather(fingerprint(weights.values()))
        if not (rows == rows[0]).all():
            raise SharedError(self._difference(step, rows, list(weights)))

    def _difference(self, step: int, rows: Tensor, names: Sequence[str]) -> str:
        by_row: dict[tuple[int, ...], list[int]] = {}
        for rank, row in enumerate(rows.tolist()):
            by_row.setdefault(tuple(row), []).append(rank)
        groups = sorted(by_row.values(), key=len, reverse=True)
        majority = groups[0] if len(groups[0]) > len(groups[1]) else []
        others = [rank for ranks in groups for rank in ranks if ranks is not majority]
        first = next(name for column, name in zip(rows.T, names, strict=True) if not (column == column[0]).all())
        where = f"in {first}" if (rows != rows[0]).any(0).sum() == 1 else f"first in {first}"
        who = self._group.names_of(others)
        if majority:
            what = f"the weights of {who} differ from the others' ({where})"
        else:
            what = f"the weights of {who} differ ({where}), and which are right cannot be told"
        return (
            f"after step {step} {what}: a processor or memory there is at fault, unless nodes have other processors "
            f"(this one computes with {isa()}; KNLTRAIN_ISA makes all the same). Leave the host out; the same command "
            "goes on from the last checkpoint, before which the weights were compared"
        )


def fingerprint(weights: Iterable[Tensor]) -> Tensor:
    """One 64-bit integer a tensor: the sum of its bits, eight bytes at a time, modulo 2^64.

    Any one bit that differs shows. It reads at the speed of memory, which a checksum does not.

    Args:
        weights: float32, dense.
    """
    return torch.stack([_sum_of_bits(weight) for weight in weights])


def _sum_of_bits(weight: Tensor) -> Tensor:
    flat = flat_in_memory(weight)
    even = flat.numel() // 2 * 2
    return flat[:even].view(torch.int64).sum() + flat[even:].view(torch.int32).sum()
