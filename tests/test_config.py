import json

import pytest

from knltrain import config as configuration
from knltrain.config import RunConfig, ScheduleConfig, override
from knltrain.errors import ConfigError


def test_strings_become_the_fields_types():
    config = override(
        RunConfig(),
        {
            "global_batch": "64",
            "optim.lr": "2.5",
            "optim.variant": "larc",
            "zero_init_residual": "true",
            "schedule.milestones": "1,2.5",
            "workers": 3,
            "augment.resize": "null",
        },
    )
    assert (config.global_batch, config.optim.lr, config.optim.variant) == (64, 2.5, "larc")
    assert config.zero_init_residual is True
    assert config.schedule.milestones == (1.0, 2.5)
    assert config.workers == 3
    assert config.augment.resize is None


def test_nothing_else_changes():
    base = RunConfig(schedule=ScheduleConfig(power=3))
    changed = override(base, {"schedule.end_lr": "0.5"})
    assert changed.schedule == ScheduleConfig(power=3, end_lr=0.5)
    assert changed.optim == base.optim


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("optim.lr", "fast", ["optim.lr", "fast", "float"]),
        ("optim.lr", "0", ["optim.lr", "> 0"]),
        ("optim.lr", "nan", ["optim.lr"]),
        ("global_batch", "0", ["global_batch", ">= 1"]),
        ("global_batch", "2.5", ["global_batch", "int"]),
        ("optim.momentum", "1.0", ["optim.momentum", "< 1"]),
        ("precision", "fp16", ["precision", "fp16"]),
        ("glabal_batch", "1", ["unknown field", "global_batch"]),
        ("optim.nesterov", "1", ["unknown field"]),
        ("optim.variant", "nesterov", ["lars has no variant", "paper, mlperf, larc"]),
        ("seed", "-1", ["seed"]),
        ("epochs", "inf", ["epochs"]),
    ],
)
def test_refusals_name_the_field_and_the_reason(name, value, words):
    with pytest.raises(ConfigError) as raised:
        override(RunConfig(), {name: value})
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


def test_switching_the_optimizer_needs_its_variant():
    with pytest.raises(ConfigError, match="sgd has no variant 'paper'; it has heavy-ball, nesterov"):
        override(RunConfig(), {"optim.name": "sgd"})
    assert override(RunConfig(), {"optim.name": "sgd", "optim.variant": "nesterov"}).optim.name == "sgd"


def test_resize_default_follows_the_image_size():
    assert RunConfig(image_size=224).resize == 256
    assert override(RunConfig(image_size=32), {"augment.name": "pad-crop-flip"}).resize == 32
    assert override(RunConfig(), {"augment.resize": 300}).resize == 300


def test_crops_larger_than_the_resized_image_are_refused():
    with pytest.raises(ConfigError, match="image-size"):
        override(RunConfig(image_size=224), {"augment.resize": 200})


def test_toml_and_dict_round_trip(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('global_batch = 64\n[optim]\nlr = 3\n[schedule]\nmilestones = [1, 2]\nname = "step"\n')
    config = override(RunConfig(), configuration.read_toml(path))
    assert (config.global_batch, config.optim.lr, config.schedule.milestones) == (64, 3.0, (1.0, 2.0))
    stored = json.loads(json.dumps(configuration.as_dict(config)))
    assert override(RunConfig(), configuration.flatten(stored)) == config


@pytest.mark.parametrize("content, words", [(None, "No such file"), (b"a = ", "not TOML"), (b"\xff\xfe", "not TOML")])
def test_bad_files_are_one_line(tmp_path, content, words):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as raised:
        configuration.read_toml(path)
    assert "run.toml" in str(raised.value)


def test_fields_without_effect_are_named():
    config = override(RunConfig(), {"schedule.gamma": "0.5", "optim.eps": "1e-8"})
    assert configuration.without_effect(config, ["schedule.gamma", "optim.eps", "seed"]) == [
        "schedule.gamma has no effect without schedule.name step"
    ]


def test_every_field_has_a_default_that_is_valid():
    values = configuration.flatten(configuration.as_dict(RunConfig()))
    assert override(RunConfig(), values) == RunConfig()
    assert {field.name for field in configuration.fields()} == set(values)
