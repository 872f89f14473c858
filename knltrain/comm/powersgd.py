"""Gradients as products of two thin matrices, for networks that are slow beside the processor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]

# A matrix travels as factors if these have at most half of its elements.
_LEAST_SAVING = 2
# Of the random numbers that all ranks begin their factors with.
_SEED = 20190531


@dataclasses.dataclass
class _Layer:
    """What is kept of a compressed parameter: a row for each output, a column for each input of the layer.

    Attributes:
        error: N x M float32; what this rank's products have left out so far.
        q: M x R float32; the right factor of the step before, the same on every rank.
    """

    error: Tensor
    q: Tensor


class PowerSGD:
    """PowerSGD with error feedback and warm start (Vogels, Karimireddy and Jaggi, arXiv 1905.13727, algorithms 1, 2).

    Of an N x M gradient, R (N + M) numbers travel. Each rank adds what it left out before to its gradient M; with Q of
    the step before, the ranks average P = M Q, orthogonalize it, average Q = M^T P, and take P Q^T for the mean. What a
    rank's M has beyond that, it keeps for the next step. Parameters for which this saves little travel whole, with P.

    It is done for all buckets when the last one is there, in two all-reduces: in this order on every rank.

    Args:
        rank: R, the number of columns of the factors.
        mean: averages a contiguous float32 tensor over the ranks, in place.
    """

    def __init__(self, rank: int, mean: Callable[[Tensor], None]) -> None:
        self._rank, self._mean = rank, mean
        self._layers: dict[Tensor, _Layer] = {}
        self._gradients: dict[Tensor, Tensor] = {}
        self._waiting: list[tuple[torch.futures.Future[Tensor], Tensor]] = []

    def take(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Takes a bucket; its future is done when the last bucket of the step has come, and travelled.

        Args:
            bucket: with this rank's own gradients.

        Returns:
            The bucket's buffer, then with the mean over the ranks.
        """
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        self._gradients.update(zip(bucket.parameters(), bucket.gradients(), strict=True))
        self._waiting.append((future, bucket.buffer()))
        if bucket.is_last():
            self._average(self._gradients)
            for done, buffer in self._waiting:
                done.set_result(buffer)
            self._gradients, self._waiting = {}, []
        return future

    def forget(self) -> None:
        """Begins anew: with random factors, and nothing left out so far."""
        self._layers.clear()

    def _average(self, gradients: dict[Tensor, Tensor]) -> None:
        thin = {parameter: _matrix(gradient) for parameter, gradient in gradients.items() if self._saves(gradient)}
        whole = [gradient for parameter, gradient in gradients.items() if parameter not in thin]
        for parameter, matrix in thin.items():
            layer = self._layers.get(parameter) or self._begin(parameter, matrix)
            layer.error += matrix  # what is to travel now; what does not is left in it below
        layers = [self._layers[parameter] for parameter in thin]
        ps = self._averaged([layer.error @ layer.q for layer in layers] + [gradient.float() for gradient in whole])
        for gradient, mean in zip(whole, ps[len(layers) :], strict=True):
            gradient.copy_(mean)
        ps = [torch.linalg.qr(p).Q for p in ps[: len(layers)]]
        qs = self._averaged([layer.error.T @ p for layer, p in zip(layers, ps, strict=True)])
        # Numbers that are none reach every rank through the factors; kept, they would stay for good.
        sound = math.isfinite(sum(float(q.sum()) for q in qs))
        for layer, matrix, p, q in zip(layers, thin.values(), ps, qs, strict=True):
            matrix.copy_(torch.mm(p, q.T))
            if sound:
                layer.error.addmm_(p, q.T, alpha=-1)
                layer.q = q
            else:
                layer.error.zero_()

    def _saves(self, gradient: Tensor) -> bool:
        if gradient.dim() < 2:
            return False
        rows, columns = gradient.shape[0], gradient[0].numel()
        return _LEAST_SAVING * self._rank * (rows + columns) <= rows * columns

    def _begin(self, parameter: Tensor, matrix: Tensor) -> _Layer:
        generator = torch.Generator().manual_seed(_SEED + len(self._layers))
        q = torch.randn(matrix.shape[1], self._rank, generator=generator)
        layer = self._layers[parameter] = _Layer(torch.zeros(matrix.shape), q)
        return layer

    def _averaged(self, tensors: list[Tensor]) -> list[Tensor]:
        """The means over the ranks, in one message."""
        if not tensors:
            return []
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self._mean(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _matrix(gradient: Tensor) -> Tensor:
    """A gradient as a matrix, outputs by inputs, in the gradient's own memory."""
    if gradient.dim() == 4 and not gradient.is_contiguous():
        gradient = gradient.permute(0, 2, 3, 1)  # as channels-last lies in memory
    return gradient.view(gradient.shape[0], -1)
