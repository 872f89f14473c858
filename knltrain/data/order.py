"""Order of samples and random draws, as functions of (seed, epoch, position) only.

They do not depend on the number of ranks, on worker threads, on where a run was interrupted, or on the version of a
random number library: the numbers come from the finaliser of SplitMix64 (Steele, Lea and Flood 2014), applied to
counters.

Training reads an endless stream of positions p = 0, 1, 2, …; position p is index ``p % N`` of epoch ``p // N``. Step t
has the positions [t B, (t+1) B), so an epoch need not be a whole number of steps, no batch is short, and resuming needs
only the step.

``python -m knltrain.data.order SEED IMAGES EPOCHS`` prints the stream, one sample per line.
"""

from __future__ import annotations

import functools
import sys

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ORDER, _DRAWS = 0, 1


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_bits(*counters: NDArray[np.int64] | int) -> NDArray[np.uint64]:
    """Hashes counters, broadcast against each other, to 64 random bits each."""
    state = np.zeros(1, np.uint64)
    for counter in counters:
        word = np.asarray(counter, np.int64).astype(np.uint64)
        state = _mix(state * np.uint64(3) + word * _GOLDEN + _GOLDEN)
    return state


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Returns the order of the samples 0 … count-1 in one epoch, read-only."""
    keys = random_bits(seed, _ORDER, epoch, np.arange(count))
    order = np.argsort(keys, kind="stable")
    order.setflags(write=False)
    return order


def samples(seed: int, count: int, first: int, stop: int) -> NDArray[np.int64]:
    """Returns the samples at the stream positions [first, stop), for a data set of ``count`` samples."""
    positions = np.arange(first, stop)
    epochs, places = np.divmod(positions, count)
    chosen = np.empty(stop - first, np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        inside = epochs == epoch
        chosen[inside] = permutation(seed, epoch, count)[places[inside]]
    return chosen


def draws(seed: int, first: int, stop: int, num_draws: int) -> NDArray[np.float64]:
    """Returns uniform numbers in [0, 1) for the augmentation at stream positions [first, stop): positions x draws."""
    positions = np.arange(first, stop)[:, None]
    bits = random_bits(seed, _DRAWS, positions, np.arange(num_draws))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


if __name__ == "__main__":
    _seed, _images, _epochs = map(int, sys.argv[1:])
    for _sample in samples(_seed, _images, 0, _images * _epochs):
        print(_sample)
