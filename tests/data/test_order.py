import numpy as np

from knltrain.data import order

FROZEN_ORDER = [0, 8, 9, 4, 6, 3, 1, 7, 5, 2]
FROZEN_BITS = [5423257105290009525]


def test_every_epoch_holds_every_sample_once():
    count = 101
    stream = order.samples(3, count, 0, 3 * count)
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_differ():
    one, two = order.permutation(0, 0, 1000), order.permutation(0, 1, 1000)
    other = order.permutation(1, 0, 1000)
    # Two random orders of 1000 agree at one place on average; at ten with a probability of 1e-7.
    for a, b in ((one, two), (one, other), (one, np.arange(1000))):
        assert (a == b).sum() < 10


def test_the_order_is_what_it_was():
    """Frozen numbers: a change of them changes every run that is to be resumed or repeated."""
    assert order.permutation(0, 0, 10).tolist() == FROZEN_ORDER
    assert order.random_bits(1, 2, 3).tolist() == FROZEN_BITS


def test_any_cut_of_the_stream_is_the_same_stream():
    whole = order.samples(7, 50, 0, 240)
    pieces = [order.samples(7, 50, first, first + 16) for first in range(0, 240, 16)]
    assert np.array_equal(np.concatenate(pieces), whole)
    drawn = order.draws(7, 0, 240, 5)
    assert np.array_equal(np.concatenate([order.draws(7, f, f + 16, 5) for f in range(0, 240, 16)]), drawn)


def test_draws_are_uniform_and_independent():
    drawn = order.draws(0, 0, 20_000, 4)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert np.allclose(drawn.mean(0), 0.5, atol=0.01)
    assert np.allclose(np.corrcoef(drawn.T), np.eye(4), atol=0.03)
    assert abs(np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1]) < 0.03


def test_permutations_are_uniform():
    places = np.array([order.permutation(seed, 0, 5) for seed in range(4000)])
    for sample in range(5):
        counts = np.bincount(np.argwhere(places == sample)[:, 1], minlength=5)
        assert abs(counts - 800).max() < 120
