import itertools
import json
import os
import re

import numpy as np
import pytest
import torch

from knltrain import config as configuration
from knltrain.config import CommConfig, RunConfig, ScheduleConfig, override
from knltrain.config.checks import unused_field_warnings
from knltrain.data.augment import NUM_DRAWS, training_box, training_boxes
from knltrain.errors import ConfigError
from knltrain.ops.crops import crop_flip_normalize
from knltrain.recipes import RECIPES


@pytest.mark.parametrize("ranks, mib", [(1, 4), (2, 4), (64, 4), (128, 8), (256, 16), (400, 25), (4096, 25)])
def test_buckets_are_larger_the_more_ranks_there_are(ranks, mib):
    assert CommConfig().bucket_mb_of(ranks) == mib
    assert CommConfig(bucket_mb=1.5).bucket_mb_of(ranks) == 1.5


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


@pytest.mark.parametrize(
    "value", ["30,60", "30, 60", " 30 ,60 ", "30,\t60", [30, 60], ["30", " 60"], (30, 60.0)], ids=itertools.count()
)
def test_lists_are_read_alike_with_spaces_and_from_toml(tmp_path, value):
    assert override(RunConfig(), {"schedule.milestones": value}).schedule.milestones == (30.0, 60.0)
    path = tmp_path / "run.toml"
    path.write_text(f"[schedule]\nmilestones = {json.dumps(value)}\n")
    assert override(RunConfig(), configuration.read_toml(path)).schedule.milestones == (30.0, 60.0)


@pytest.mark.parametrize("value", ["30,,60", "30,60,", ",", "30 60", "30;60"])
def test_lists_with_a_gap_are_refused(value):
    with pytest.raises(ConfigError, match=r"schedule.milestones: .* values with commas between them"):
        override(RunConfig(), {"schedule.milestones": value})


def test_an_empty_list_is_none():
    assert override(RunConfig(), {"schedule.milestones": " "}).schedule.milestones == ()


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    """Windows editors write one."""
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbfepochs = 3\n")
    assert override(RunConfig(), configuration.read_toml(path)).epochs == 3


def test_nothing_else_changes():
    base = RunConfig(schedule=ScheduleConfig(power=3))
    changed = override(base, {"schedule.end_lr": "0.5"})
    assert changed.schedule == ScheduleConfig(power=3, end_lr=0.5)
    assert changed.optim == base.optim


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("optim.lr", "fast", ["optim.lr: 'fast' will not do: it takes a number > 0 and <= 1,000,000"]),
        ("optim.lr", "0", ["optim.lr", "> 0"]),
        ("optim.lr", "nan", ["optim.lr"]),
        ("global_batch", "0", ["global_batch", ">= 1"]),
        ("global_batch", "2.5", ["global_batch", "a whole number of images"]),
        ("global_batch", "1000000000000000000", ["a whole number of images >= 1 and <= 10,000,000"]),
        ("global_batch", 10**400, ["global_batch", "images"]),
        ("global_batch", 16**5000, ["global_batch: this int will not do"]),
        ("image_size", 10**9, ["image_size: 1000000000 will not do", "pixels >= 8 and <= 8,192"]),
        ("epochs", 1e300, ["epochs: 1e+300", "number of epochs", "<= 1,000,000"]),
        ("workers", "1000000", ["threads >= 0 and <= 1,024"]),
        ("comm.bucket_mb", "1e300", ["number of MiB", "<= 100,000"]),
        ("comm.timeout_s", "1e300", ["number of seconds", ">= 0.1 and <= 2,592,000"]),
        ("schedule.milestones", "1,nan", ["schedule.milestones: '1,nan'", "each a number of epochs"]),
        ("schedule.milestones", [1.0] * 101, ["at most 100 values"]),
        ("data", "a\0b", [r"data: 'a\x00b'", "none of them NUL"]),
        ("out", "caf\udce9", ["UTF-8"]),
        ("model", "x" * 10**6, ["model: 'xxx", "... will not do", "8192 characters"]),
        ("x" * 10**6, "1", ["unknown field 'xxx", "..."]),
        ("data", {}, ["data: {} will not do"]),
        ("nothing", {}, ["unknown field 'nothing'"]),
        ("optim.lr", [[1]], ["optim.lr: [[1]]"]),
        ("optim.momentum", "1.0", ["optim.momentum", "< 1"]),
        ("precision", "fp16", ["precision: 'fp16' will not do: it takes auto, bf16 or fp32"]),
        ("force_bf16", "perhaps", ["true or false"]),
        ("glabal_batch", "1", ["unknown field", "global_batch"]),
        ("optim.nesterov", "1", ["unknown field"]),
        ("optim.variant", "heavy-ball", ["lars has no variant", "paper, mlperf, larc, nesterov"]),
        ("seed", "-1", ["seed"]),
        ("epochs", "inf", ["epochs"]),
    ],
    ids=itertools.count(),
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
    with pytest.raises(ConfigError, match=r"augment\.resize 256 is smaller than image-size 288.*--augment\.resize 329"):
        override(RECIPES["resnet50-8k"].config(), {"image_size": 288})
    assert override(RECIPES["resnet50-8k"].config(), {"image_size": 288, "augment.resize": 329}).resize == 329


@pytest.mark.parametrize(
    "fields, most",
    [({}, 32), ({"augment.resize": 40}, 40),
     ({"schedule.image_sizes": [16], "schedule.image_size_epochs": [1], "augment.resize": 40}, 20)],
)  # fmt: skip
def test_a_border_wider_than_the_image_is_refused_and_one_as_wide_is_drawn(fields, most):
    fields = {"image_size": 32, "augment.name": "pad-crop-flip", **fields}
    with pytest.raises(ConfigError, match=f"augment.pad {most + 1} is more than the {most} pixels .* {most} or less"):
        override(RunConfig(), {**fields, "augment.pad": most + 1})
    config = override(RunConfig(), {**fields, "augment.pad": most})
    for size in (32, *config.schedule.image_sizes):
        draws = np.array([[0, x, x] + [0] * (NUM_DRAWS - 3) for x in (0, 1 - 2**-40)])  # the outermost corners
        boxes, flips = training_boxes(config.at_size(size), 48, draws)
        out = torch.empty(2, 3, size, size).contiguous(memory_format=torch.channels_last)
        crop_flip_normalize(
            torch.zeros(2, 48, 48, 3, dtype=torch.uint8), torch.from_numpy(boxes), torch.from_numpy(flips), out
        )
    first, last = (training_box(config.at_size(size), 37, 90, row) for row in draws)  # of the smallest
    assert (first.top, last.bottom) == (-37, 2 * 37)
    assert first.left >= -90
    assert last.right <= 2 * 90


@pytest.mark.parametrize(
    "recipe, epochs, longer, words",
    [
        ("cifar-8k-batches", 2, 2.1, r"batch-epochs 2 is not before the end of 2 epochs.*8,192 images of global-batch"),
        ("cifar-2k-resizing", 9.9, 10, "image-size-epochs 10 is after the end of 9.9 epochs"),
        ("cifar-2k-collapse", 1, 1.1, "collapse-epochs 1 leaves no epoch of 1 epochs augmented"),
    ],
)
def test_what_a_run_would_not_come_to_is_refused(recipe, epochs, longer, words):
    config = RECIPES[recipe].config()
    with pytest.raises(ConfigError, match=words):
        override(config, {"epochs": epochs})
    assert override(config, {"epochs": longer}).epochs == longer


def test_toml_and_dict_round_trip(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('global_batch = 64\n[optim]\nlr = 3\n[schedule]\nmilestones = [1, 2]\nname = "step"\n')
    config = override(RunConfig(), configuration.read_toml(path))
    assert (config.global_batch, config.optim.lr, config.schedule.milestones) == (64, 3.0, (1.0, 2.0))
    stored = json.loads(json.dumps(configuration.as_dict(config)))
    assert override(RunConfig(), configuration.flatten(stored)) == config


# Numbers without a unit: rates, factors and fractions.
WITHOUT_UNIT = {
    "dropout", "label_smoothing", "ema_decay", "seed", "optim.lr", "optim.momentum", "optim.weight_decay",
    "optim.trust_coefficient", "optim.eps", "optim.beta2", "schedule.warmup_lr", "schedule.power", "schedule.end_lr",
    "schedule.gamma",
    "augment.min_area", "health.rewind_factor",
}  # fmt: skip


@pytest.mark.parametrize("field", list(configuration.fields()), ids=lambda field: field.name)
def test_every_number_has_two_bounds_and_a_unit(field):
    """Below and above all that makes sense, and past what a float or 64 bits hold."""
    _, reason = refusal(field.name, object())
    if "number" not in reason:
        return
    assert ("number of " in reason) == (field.name not in WITHOUT_UNIT)
    for value in (-1e-9, -(10**30), 10**30, 1e300, float("inf"), float("-inf"), float("nan"), "1e400", "-1"):
        assert refusal(field.name, value)[1] == reason
    assert re.search(r"(>=?) [\d.e-]+ and (<=?) [\d.,e+]+$", reason)


def refusal(name, value):
    """Value and reason of the line that refuses it."""
    with pytest.raises(ConfigError) as raised:
        override(RunConfig(), {name: value})
    line = str(raised.value)
    assert line.startswith(f"{name}: ")
    assert "\n" not in line
    return line.removeprefix(f"{name}: ").split(" will not do: ", 1)


def test_a_heading_with_nothing_under_it_is_no_field(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[optim]\n[comm]\n")
    assert override(RunConfig(), configuration.read_toml(path)) == RunConfig()


@pytest.mark.parametrize(
    "content, words",
    [(None, "No such file"), (b"a = ", "not TOML"), (b"\xff\xfe", "not TOML"), (b"a = " + b"[" * 5000, "deep"),
     (b"a" + b".a" * 5000 + b" = 1", "deep"), (b"a = " + b"9" * 5000, "not TOML"),
     (b"#" * (1 << 21), "2,097,152 bytes")],
    ids=range(7),
)  # fmt: skip
def test_bad_files_are_one_line(tmp_path, content, words):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as raised:
        configuration.read_toml(path)
    assert "run.toml" in str(raised.value)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ConfigError, match="not a file"):
            configuration.read_toml(path)
    assert configuration.read_toml(os.devnull) == {}


def test_fields_without_effect_are_named():
    config = override(RunConfig(), {"schedule.gamma": "0.5", "optim.eps": "1e-8"})
    assert unused_field_warnings(config, ["schedule.gamma", "optim.eps", "seed"]) == [
        "schedule.gamma has no effect without schedule.name step"
    ]


def test_every_field_has_a_default_that_is_valid():
    values = configuration.flatten(configuration.as_dict(RunConfig()))
    assert override(RunConfig(), values) == RunConfig()
    assert {field.name for field in configuration.fields()} == set(values)
