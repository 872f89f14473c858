"""How noisy the gradient is: the batch beyond which larger ones bring little.

The simple noise scale of McCandlish, Kaplan, Amodei et al. 2018 (arXiv 1812.06162), B = tr(Sigma) / |G|^2, with G the
gradient over all images and Sigma the covariance of one image's. Neither is known, but a batch of b images has a
gradient of which E |G_b|^2 = |G|^2 + tr(Sigma) / b; so the norms of the gradients of a small and of a large batch give
both (appendix A.1). With several ranks the small batch is a rank's share of the step, and the large one the step's.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from knltrain.checkpoint import Progress
from knltrain.comm.group import Group
from knltrain.config import RunConfig
from knltrain.data.loader import RankBatch
from knltrain.training.engine import Engine
from knltrain.training.gradient_norm import norm_of

# The moving averages look back over the last twenty steps or so.
_DECAY = 0.95


class NoiseScale:
    """Measures it from the gradients of a run's steps, at the price of one more norm of each.

    It is defined with several ranks, and on one that accumulates: there the small batch is the first micro-batch. With
    PowerSGD it is not, as what the ranks end with is not the mean of their gradients.

    Args:
        config: of the run.
        group: the ranks.

    Attributes:
        squares: the squared norm of the gradient of this rank's small batch, in the step under way.
        signal: moving average of estimates of the squared norm of the noiseless gradient.
        noise: moving average of estimates of the trace of the covariance of one image's gradient.
    """

    def __init__(self, config: RunConfig, group: Group) -> None:
        self._ranks, self._compressed = group.world_size, config.comm.compression != "none"
        self.squares = self.signal = self.noise = 0.0

    def begin_step(self, share: RankBatch) -> None:
        """Forgets the step before.

        Args:
            share: this rank's part of the step's batch.
        """
        self._accumulate, self._large = share.accumulate, share.global_batch
        self._small = share.local_batch if self._ranks == 1 else share.global_batch // self._ranks
        self.squares = 0.0

    @property
    def is_defined(self) -> bool:
        """Whether the step has two sizes of batches to compare."""
        return self._accumulate > 1 if self._ranks == 1 else not self._compressed

    def add(self, gradient: Tensor) -> None:
        """Takes a part of this rank's own gradient, before the ranks' are averaged."""
        self.squares += norm_of([gradient]) ** 2

    def end_micro_batch(self, index: int, engine: Engine) -> None:
        """Looks at the gradient of a rank's first micro-batch, where that is the small batch."""
        if self._ranks == 1 and index == 0:
            # The loss, and so the gradient, is divided by the number of micro-batches.
            self.squares = (norm_of(engine.gradients().values()) * self._accumulate) ** 2

    def update(self, squares: float, norm: float) -> None:
        """Averages a step in; does nothing where the noise scale is not defined, or with NaN or Inf.

        Args:
            squares: the sum of :attr:`squares` over the ranks.
            norm: the norm of the step's gradient.
        """
        if not self.is_defined or not math.isfinite(squares):
            return
        signal, noise = estimate(self._small, squares / self._ranks, self._large, norm**2)
        self.signal = _DECAY * self.signal + (1 - _DECAY) * signal
        self.noise = _DECAY * self.noise + (1 - _DECAY) * noise

    def row(self) -> dict[str, float | None]:
        """The noise scale for metrics.jsonl, in images: None where the averages do not tell yet, nothing if undefined.

        Both averages began at zero and lack the same fraction, so their ratio lacks nothing.
        """
        if not self.is_defined:
            return {}
        return {"noise_scale": self.noise / self.signal if self.signal > 0 and self.noise > 0 else None}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"gradient_signal": self.signal, "gradient_noise": self.noise}

    def load(self, progress: Progress) -> None:
        """Takes over what a checkpoint holds of it."""
        self.signal, self.noise = progress.gradient_signal, progress.gradient_noise


def estimate(small: int, small_squares: float, large: int, large_squares: float) -> tuple[float, float]:
    """Unbiased estimates of |G|^2 and tr(Sigma) (appendix A.1 of arXiv 1812.06162).

    Each is noisy and may be negative, and a ratio of unbiased estimates is biased: they are averaged before they are
    divided.

    Args:
        small: images of the small batch.
        small_squares: the squared norm of its gradient, or the mean of several such batches.
        large: images of the large batch.
        large_squares: the squared norm of its gradient.
    """
    signal = (large * large_squares - small * small_squares) / (large - small)
    noise = (small_squares - large_squares) / (1 / small - 1 / large)
    return signal, noise
