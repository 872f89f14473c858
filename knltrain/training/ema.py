"""The exponential moving average of a network's weights, which is what is evaluated and saved where it is asked for."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """A network whose weights and running statistics are means over the updates of a run; a skipped step makes none.

    After update t of a run, counted from 1, with d the decay and w a number of the network that trains::

        a = k a + (1 - k) w          k = min(d, (t - 1) / t)

    so that the first 1/(1 - d) updates all count alike, and the initial weights not at all. Batch norm's running
    statistics are averaged likewise, each rank's by itself: those of the network belong to its newest weights. What is
    no fraction (a counter of batches) is copied.

    Attributes:
        model: the network, in float32, plain whatever engine trains.

    Args:
        model: as it is before an engine takes it over; copied.
        decay: d, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Takes the weights after an update into the mean.

        Args:
            state: of the network that trains: float32 weights and buffers by name.
            updates: t, from 1.
        """
        kept = min(self._decay, (updates - 1) / updates)
        for name, mean in self.model.state_dict().items():
            if mean.is_floating_point():
                mean.lerp_(state[name], 1 - kept)
            else:
                mean.copy_(state[name])
