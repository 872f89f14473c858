"""What follows a step: of three epochs of four steps, and of a run that is stopped."""

import pytest

from knltrain.config import RunConfig, override
from knltrain.config.schedule import make_schedule
from knltrain.training.due import Due, DueRules

NOTHING = Due(evaluate=False, save=False, last=False, check_finite=False, compare=False)


def rules(**changes):
    config = override(RunConfig(global_batch=4, epochs=3), {"health.compare_every": 0, **changes})
    return DueRules(config, make_schedule(config, num_images=16))


def names(due):
    return {name for name in Due.__dataclass_fields__ if getattr(due, name)}


def test_an_evaluation_and_a_checkpoint_end_each_epoch():
    due = {step: names(rules().after(step)) for step in range(1, 13)}
    assert {step for step, found in due.items() if found} == {4, 8, 12}
    assert due[4] == due[8] == {"evaluate", "save", "check_finite"}
    assert due[12] == {"evaluate", "save", "check_finite", "last"}


def test_rarer_and_more_frequent_checkpoints():
    rarer = rules(**{"checkpoint.every": 2.0})
    assert names(rarer.after(4)) == {"evaluate", "check_finite"}
    assert [step for step in range(1, 13) if rarer.after(step).save] == [8, 12]
    assert [step for step in range(1, 13) if rules(**{"checkpoint.every": 0.5}).after(step).save] == [
        2,
        4,
        6,
        8,
        10,
        12,
    ]


def test_a_run_that_is_cut_short_evaluates_and_saves_at_its_end():
    short = rules(max_steps=6)
    assert short.last_step == 6
    assert names(short.after(6)) == {"evaluate", "save", "check_finite", "last"}
    assert short.after(5) == NOTHING


@pytest.mark.parametrize("step", [3, 4])
def test_a_signal_leaves_time_for_a_checkpoint_alone(step):
    assert names(rules().after(step, interrupted=True)) == {"save", "check_finite", "last"}


def test_replicas_are_compared_every_so_often_and_before_checkpoints():
    often = rules(**{"health.compare_every": 3})
    assert [step for step in range(1, 13) if often.after(step).compare] == [3, 4, 6, 8, 9, 12]
    assert often.after(7, interrupted=True).compare
    assert not any(rules().after(step).compare for step in range(1, 13)), "0 is never"
