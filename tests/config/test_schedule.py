from itertools import pairwise

import pytest

from knltrain.config import RunConfig, ScheduleConfig, override
from knltrain.config.schedule import Phase, learning_rate, make_schedule, total_steps
from knltrain.errors import ConfigError

TOTAL = 100


def rate(step, *, peak=10.0, steps_per_epoch=10.0, **options):
    return learning_rate(
        ScheduleConfig(**options),
        peak=peak,
        step=step,
        epoch=step / steps_per_epoch,
        total_steps=TOTAL,
        steps_per_epoch=steps_per_epoch,
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


@pytest.mark.parametrize("milestone", [3, 0.12, 2.04, 14.4])
@pytest.mark.parametrize("images, batch", [(50_000, 48), (50_000, 24), (1_281_167, 96), (60_000, 7), (30, 3)])
def test_what_is_due_at_an_epoch_is_due_at_its_step(images, batch, milestone):
    """The first step before which so many images were seen, in whole numbers; a product of fractions may be beyond."""
    first = -(-round(milestone * images * 100) // (100 * batch))  # of at most two decimals, as are the milestones
    due = {"epochs": 16, "global_batch": batch, "optim.lr": 1.0}
    step = override(RunConfig(), {**due, "schedule.name": "step", "schedule.milestones": [milestone],
                                  "schedule.warmup_epochs": 0})  # fmt: skip
    course = make_schedule(step, images)
    assert (course.lr(step, first - 1), course.lr(step, first)) == (1.0, pytest.approx(0.1))
    poly = override(RunConfig(), {**due, "schedule.name": "poly", "schedule.warmup_epochs": milestone})
    assert course.lr(poly, first - 1) == pytest.approx((first - 1) * batch / (milestone * images))
    assert course.lr(poly, first) == pytest.approx((1 - first / (16 * images / batch)) ** 2, abs=1e-3)


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


# The course of a run -------------------------------------------------------------------------------------------------

CHANGING = {
    "epochs": 16,
    "global_batch": 4096,
    "image_size": 256,
    "schedule.image_sizes": (160, 192),
    "schedule.image_size_epochs": (12, 16),
    "schedule.batches": (1024, 2048),
    "schedule.batch_epochs": (2, 5),
    "augment.collapse_epochs": 1.5,
}


def test_a_run_that_does_not_change_is_one_phase():
    config = RunConfig(epochs=90, global_batch=8192)
    course = make_schedule(config, 1_281_167)
    assert course.phases == (Phase(0, 14_075, 0, 8192, 224, True),)
    assert course.images(14_075) == 14_075 * 8192
    assert not make_schedule(override(config, {"augment.name": "none"}), 1_281_167).phases[0].augmented
    assert make_schedule(RunConfig(epochs=0.5, global_batch=512), 10).total_steps == 1


@pytest.mark.parametrize("num_images", [1_281_167, 50_000, 4096])
def test_phases_follow_each_other_without_a_gap(num_images):
    course = make_schedule(override(RunConfig(), CHANGING), num_images)
    seen = 0
    for step in range(course.total_steps):
        phase = course.phase(step)
        assert phase.first_step <= step < phase.last_step
        assert course.images(step) == seen
        seen += phase.batch
    assert course.images(course.total_steps) == seen
    assert abs(seen / num_images - 16) <= 4096 / num_images / 2


def test_phases_change_at_their_epochs():
    course = make_schedule(override(RunConfig(), CHANGING), 1_281_167)
    found = [(phase.batch, phase.image_size, phase.augmented) for phase in course.phases]
    assert found == [(1024, 160, True), (2048, 160, True), (4096, 160, True), (4096, 192, True), (4096, 192, False)]
    ends = [course.epoch(phase.last_step) for phase in course.phases]
    for end, wanted, phase in zip(ends, (2, 5, 12, 14.5, 16), course.phases, strict=True):
        assert abs(end - wanted) * 1_281_167 <= phase.batch / 2
    assert course.phase(course.total_steps + 7) == course.phases[-1]


def test_a_phase_too_short_for_a_step_is_left_out():
    course = make_schedule(override(RunConfig(), CHANGING), 1000)
    assert len(course.phases) < 5
    assert all(phase.first_step < phase.last_step for phase in course.phases)
    assert course.phases[0].first_step == course.phases[0].first_image == 0


def test_all_steps_of_a_run_may_go_without_augmentation():
    (phase,) = make_schedule(
        override(RunConfig(), {"global_batch": 4096, "augment.collapse_epochs": 89.9}), 5000
    ).phases
    assert not phase.augmented


def test_the_rate_is_a_function_of_the_images_seen():
    """Where the batch changes, it is that of the steps of the last batch at the same number of images."""
    plain = override(RunConfig(), {"epochs": 8, "global_batch": 64, "schedule.warmup_epochs": 2, "optim.lr": 3.0})
    changing = override(plain, {"schedule.batches": [16], "schedule.batch_epochs": [4]})
    one, other = make_schedule(plain, 1024), make_schedule(changing, 1024)
    assert (one.total_steps, other.total_steps) == (128, 256 + 64)
    rates = {one.images(step): one.lr(plain, step) for step in range(one.total_steps)}
    shared = 0
    for step in range(other.total_steps):
        if other.images(step) in rates:
            assert other.lr(changing, step) == rates[other.images(step)]
            shared += 1
    assert shared == 128
    scaled = override(changing, {"optim.lr_scaling": "linear"})
    assert other.lr(scaled, 200) == pytest.approx(other.lr(changing, 200) * 16 / 256)
    assert other.lr(scaled, 300) == pytest.approx(other.lr(changing, 300) * 64 / 256)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"schedule.image_sizes": "128"}, "schedule.image-size-epochs: none; give 1 that rise"),
        ({"schedule.batch_epochs": "2"}, "schedule.batch-epochs: 2; give 0 that rise"),
        ({"schedule.batches": "8,16", "schedule.batch_epochs": "2,2"}, "schedule.batch-epochs: 2,2; give 2 that rise"),
        ({"schedule.image_sizes": "256", "schedule.image_size_epochs": "2"}, "256 is larger than image-size 224"),
    ],
)
def test_changes_that_contradict_each_other_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        override(RunConfig(), fields)
