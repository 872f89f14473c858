from itertools import pairwise

import pytest

from knltrain.config import ScheduleConfig
from knltrain.schedule import learning_rate, total_steps

TOTAL = 100


def rate(step, *, peak=10.0, steps_per_epoch=10.0, **options):
    return learning_rate(
        ScheduleConfig(**options), peak=peak, step=step, total_steps=TOTAL, steps_per_epoch=steps_per_epoch
    )


def test_warmup_is_linear_from_its_start():
    rates = [rate(step, warmup_epochs=2, warmup_lr=1) for step in range(20)]
    assert rates[0] == 1.0
    increments = [b - a for a, b in pairwise(rates)]
    assert increments == pytest.approx([9 / 20] * 19)


def test_poly_counts_from_step_zero_and_drops_at_the_end_of_warmup():
    """400 of 4,000 iterations leave 0.81 of the rate."""
    assert rate(10, warmup_epochs=1) == pytest.approx(8.1)
    assert rate(0) == 10.0
    assert rate(99) == pytest.approx(10 * 0.01**2)
    assert rate(50, power=1, end_lr=2) == pytest.approx(6.0)


def test_poly_after_warmup_starts_at_the_peak():
    assert rate(10, name="poly-after-warmup", warmup_epochs=1) == 10.0
    assert rate(99, name="poly-after-warmup", warmup_epochs=1, end_lr=1e-4) == pytest.approx(
        1e-4 + (10 - 1e-4) * (1 - 89 / 91) ** 2
    )


def test_step_multiplies_at_milestones():
    rates = [rate(step, name="step", milestones=(3, 6), gamma=0.1) for step in (0, 29, 30, 59, 60, 99)]
    assert rates == pytest.approx([10, 10, 1, 1, 0.1, 0.1])


def test_constant():
    assert {rate(step, name="constant") for step in range(TOTAL)} == {10.0}


@pytest.mark.parametrize("name", ["poly", "poly-after-warmup", "step", "constant"])
@pytest.mark.parametrize("warmup", [0, 0.05, 2.5, 20])
def test_is_never_negative_and_never_above_the_peak(name, warmup):
    """Also where warm-up is shorter than a step or longer than the run."""
    rates = [rate(step, name=name, warmup_epochs=warmup) for step in range(TOTAL)]
    assert all(0 <= value <= 10 for value in rates)


@pytest.mark.parametrize("step", [-1, TOTAL])
def test_steps_outside_the_run_are_refused(step):
    with pytest.raises(ValueError, match="outside"):
        rate(step)


@pytest.mark.parametrize(
    "epochs, batch, steps",
    [(100, 512, 250_228), (90, 512, 225_205), (100, 32_768, 3_910), (90, 32_768, 3_519), (90, 8_192, 14_075)],
)
def test_total_steps_are_the_literatures(epochs, batch, steps):
    assert total_steps(epochs=epochs, num_images=1_281_167, global_batch=batch) == steps


def test_a_batch_larger_than_the_run_is_one_step():
    assert total_steps(epochs=1, num_images=200, global_batch=32_768) == 1
