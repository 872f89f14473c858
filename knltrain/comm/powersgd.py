"""PowerSGD gradient compression, for interconnects that are slow compared with the processors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]

# A matrix is compressed if its factors have at most half of its elements.
_MIN_SAVING = 2
# Seed of the initial factors, the same on all ranks.
_SEED = 20190531


@dataclasses.dataclass
class _Layer:
    """State of a compressed parameter, a matrix of N outputs by M inputs of its layer.

    Attributes:
        error: N x M float32; this rank's accumulated compression error.
        q: M x R float32; the right factor of the previous step, the same on every rank.
    """

    error: Tensor
    q: Tensor


class PowerSGD:
    """PowerSGD with error feedback and warm start (Vogels, Karimireddy and Jaggi, arXiv 1905.13727, algorithms 1, 2).

    For an N x M gradient, R (N + M) numbers are communicated. Each rank adds its compression error to its gradient M;
    with Q of the previous step, the ranks average P = M Q, orthogonalize it, average Q = M^T P, and use P Q^T as the
    mean. Each rank keeps M - P Q^T as its error for the next step. Parameters for which this saves little are
    communicated uncompressed, together with P.

    All buckets are reduced when the last one is ready, in two all-reduces: in the same order on every rank.

    Args:
        rank: R, the number of columns of the factors.
        mean: averages a contiguous float32 tensor over the ranks, in place.
    """

    def __init__(self, rank: int, mean: Callable[[Tensor], None]) -> None:
        self._rank, self._mean = rank, mean
        self._layers: dict[Tensor, _Layer] = {}
        self._gradients: dict[Tensor, Tensor] = {}
        self._waiting: list[tuple[torch.futures.Future[Tensor], Tensor]] = []

    def all_reduce(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Queues a bucket; its future completes once the last bucket of the step has been reduced.

        Args:
            bucket: this rank's own gradients.

        Returns:
            A future of the bucket's buffer, which then holds the mean over the ranks.
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

    def reset(self) -> None:
        """Discards factors and errors: the next step starts from random factors."""
        self._layers.clear()

    def _average(self, gradients: dict[Tensor, Tensor]) -> None:
        compressed = {
            parameter: _matrix(gradient) for parameter, gradient in gradients.items() if self._saves(gradient)
        }
        whole = [gradient for parameter, gradient in gradients.items() if parameter not in compressed]
        for parameter, matrix in compressed.items():
            layer = self._layers.get(parameter) or self._begin(parameter, matrix)
            layer.error += matrix  # what is not communicated remains in it below
        layers = [self._layers[parameter] for parameter in compressed]
        ps = self._all_reduce_mean(
            [layer.error @ layer.q for layer in layers] + [gradient.float() for gradient in whole]
        )
        for gradient, mean in zip(whole, ps[len(layers) :], strict=True):
            gradient.copy_(mean)
        ps = [torch.linalg.qr(p).Q for p in ps[: len(layers)]]
        qs = self._all_reduce_mean([layer.error.T @ p for layer, p in zip(layers, ps, strict=True)])
        # NaN or Inf reaches every rank through the factors; in the error it would stay for good.
        finite = math.isfinite(sum(float(q.sum()) for q in qs))
        for layer, matrix, p, q in zip(layers, compressed.values(), ps, qs, strict=True):
            matrix.copy_(torch.mm(p, q.T))
            if finite:
                layer.error.addmm_(p, q.T, alpha=-1)
                layer.q = q
            else:
                layer.error.zero_()

    def _saves(self, gradient: Tensor) -> bool:
        if gradient.dim() < 2:
            return False
        rows, columns = gradient.shape[0], gradient[0].numel()
        return _MIN_SAVING * self._rank * (rows + columns) <= rows * columns

    def _begin(self, parameter: Tensor, matrix: Tensor) -> _Layer:
        generator = torch.Generator().manual_seed(_SEED + len(self._layers))
        q = torch.randn(matrix.shape[1], self._rank, generator=generator)
        layer = self._layers[parameter] = _Layer(torch.zeros(matrix.shape), q)
        return layer

    def _all_reduce_mean(self, tensors: list[Tensor]) -> list[Tensor]:
        """Returns the means over the ranks, of one all-reduce."""
        if not tensors:
            return []
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self._mean(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _matrix(gradient: Tensor) -> Tensor:
    """Returns a view of a gradient as a matrix, outputs by inputs."""
    if gradient.dim() == 4 and not gradient.is_contiguous():
        gradient = gradient.permute(0, 2, 3, 1)  # the memory order of channels-last
    return gradient.view(gradient.shape[0], -1)
