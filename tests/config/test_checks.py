"""What of a configuration changes nothing, or would come after the end of the run."""

import pytest

from knltrain.config import RunConfig, override
from knltrain.config.checks import unreached_schedule_warnings, unused_field_warnings


@pytest.mark.parametrize(
    "milestones, late",
    [([10, 20], []), ([10, 30], ["30"]), ([30, 30.5], ["30", "30.5"]), ([29.9], [])],
)
def test_a_milestone_at_the_end_or_later_is_named(milestones, late):
    config = override(RunConfig(), {"schedule.name": "step", "schedule.milestones": milestones, "epochs": 30})
    said = unreached_schedule_warnings(config)
    assert len(said) == bool(late)
    if late:
        assert ",".join(late) in said[0].split()
        assert said[0].endswith("never falls") == (len(late) == len(milestones))


@pytest.mark.parametrize("warmup, rises", [(4.9, False), (5, True), (6, True)])
def test_a_warm_up_as_long_as_the_run_is_named(warmup, rises):
    config = override(RunConfig(), {"schedule.warmup_epochs": warmup, "epochs": 5})
    assert len(unreached_schedule_warnings(config)) == rises


@pytest.mark.parametrize(
    "name, variant, used",
    [
        ("sgd", "nesterov", []),
        ("lars", "paper", ["optim.trust_coefficient", "log_trust_ratios", "optim.eps"]),
        ("lamb", "paper", ["optim.eps", "optim.beta2"]),
    ],
)
def test_each_optimizer_says_which_of_the_others_fields_it_does_not_use(name, variant, used):
    fields = ["optim.trust_coefficient", "log_trust_ratios", "optim.eps", "optim.beta2"]
    config = override(RunConfig(), {"optim.name": name, "optim.variant": variant, "optim.eps": 1e-6})
    said = unused_field_warnings(config, fields)
    unused = [field.replace("_", "-") for field in fields if field not in used]
    assert [line.split(" has no effect")[0] for line in said] == unused
