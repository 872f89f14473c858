"""Norms of gradients: the same for any number of threads, finite where every number is, and 0 where every number is."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

# Numbers that one thread sums up; rows of so many are shared out among threads.
_ROW = 2**15
# Below this root mean square, enough squares underflow float32, or are cut to 0 there, to be missed in a norm.
_SMALL = 1e-15


def norm_of(gradients: Iterable[Tensor]) -> float:
    """The Euclidean norm of many tensors together.

    Args:
        gradients: float32 or bf16, dense.
    """
    return math.hypot(*norms_of(gradients))


def norms_of(gradients: Iterable[Tensor]) -> list[float]:
    """The norm of each tensor, likewise."""
    return [_norm(gradient) for gradient in gradients]


def exact_norms(gradients: dict[str, Tensor]) -> dict[str, float]:
    """The norm of each tensor, summed in float64: slower, for what is looked at once."""
    return {name: float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for name, tensor in gradients.items()}


def flat_in_memory(tensor: Tensor) -> Tensor:
    """A dense tensor's numbers in the order in which they lie in memory."""
    dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    return (tensor if dense else tensor.contiguous()).as_strided((tensor.numel(),), (1,))


def _norm(gradient: Tensor) -> float:
    norm = math.sqrt(_sum_of_squares(gradient))
    if math.isfinite(norm) and norm >= _SMALL * math.sqrt(gradient.numel()):
        return norm
    # Squares may overflow or underflow float32 although no number does.
    return float(torch.linalg.vector_norm(gradient, dtype=torch.float64))


def _sum_of_squares(gradient: Tensor) -> float:
    flat = flat_in_memory(gradient)
    whole = flat.numel() // _ROW * _ROW
    squares = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1).double().square().sum()
    return float(squares) + float(torch.linalg.vector_norm(flat[whole:])) ** 2
