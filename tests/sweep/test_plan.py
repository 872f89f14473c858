"""Which runs a sweep has, and that their command lines say all of it."""

import shlex

import pytest
from sweeps import sweep_of

from knltrain import config as configuration
from knltrain.errors import ConfigError
from knltrain.recipes import RECIPES
from knltrain.sweep.plan import removed_values


def test_the_runs_of_a_search():
    plan = sweep_of()
    assert [point.name for point in plan.search()] == [
        "sgd-b256-lr0.05-seed0", "sgd-b256-lr0.1-seed0", "lars-b256-lr0.565685-seed0", "lars-b256-lr1.13137-seed0",
        "sgd-b1024-lr0.2-seed0", "sgd-b1024-lr0.4-seed0", "lars-b1024-lr1.13137-seed0", "lars-b1024-lr2.26274-seed0",
    ]  # fmt: skip
    assert (plan.num_tasks, plan.later_seeds) == (8 + 4 * 2, (1, 2))
    assert sweep_of(search_seeds=(0, 1, 2)).num_tasks == 24


def test_seeds_and_fields_are_those_of_the_run():
    config = sweep_of(fields={"epochs": "3", "precision": "fp32"}).point("lars", 1024, 0.5, 2).config
    assert (config.seed, config.epochs, config.precision, config.global_batch) == (2, 3, "fp32", 1024)
    assert config.optim.lr == pytest.approx(3.2 * (1024 / 2048) ** 0.5 / 2)


@pytest.mark.parametrize(
    "recipe, optimizer",
    [(name, opt) for name, one in RECIPES.items() for opt in dict.fromkeys((one.config().optim.name, *one.methods))],
)
def test_a_command_line_is_the_whole_configuration(recipe, optimizer, tmp_path):
    point = sweep_of(recipe, optimizers=(optimizer,), fields={"data": "a b", "dropout": "0.25"}).point(
        optimizer, 1024, 0.5, 3
    )
    words = point.words(tmp_path)
    assert words[:3] == ["train", "--recipe", recipe]
    flags = {
        name.removeprefix("--").replace("-", "_"): value for name, value in zip(words[3::2], words[4::2], strict=True)
    }
    assert flags.pop("out") == str(tmp_path / "runs" / point.name)
    assert configuration.override(RECIPES[recipe].config(), flags) == point.config


def test_the_command_of_a_sweep_says_what_it_is(tmp_path):
    words = shlex.split(sweep_of(fields={"data": "my data"}).command(tmp_path))
    assert words == ["knltrain", "sweep", "--recipe", "cifar-256", "--batches", "256,1024", "--optimizers", "sgd,lars",
                     "--lr-factors", "0.5,1", "--seeds", "0,1,2", "--search-seeds", "0", "--data", "my data",
                     "--out", str(tmp_path)]  # fmt: skip


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"optimizers": ("sgd", "adam")}, "cifar-256 has no rule for the optimizer 'adam'; it has one for sgd, lars"),
        ({"batches": (256, 256)}, "--batches: 256 is given twice"),
        ({"lr_factors": (1.0, 1.0000001)}, "two of them give the same learning rate"),
        ({"lr_factors_at": {("sgd", 1024): (0.1, 0.2, 0.3)}}, "at 1024, sgd has 3, lars has 2; a comparison is fair"),
        ({"lr_factors_at": {("sgd", 512): (0.1, 0.2)}}, "--lr-factors sgd:512: this sweep has no sgd at 512"),
        ({"lr_factors": (-1.0,)}, "optim.lr: -0.1 will not do"),
        ({"lr_factors": (float("nan"),)}, "optim.lr: nan will not do"),
        ({"batches": (0,)}, "global_batch: 0 will not do"),
        ({"seeds": (-1,), "search_seeds": (-1,)}, "seed: -1 will not do"),
        ({"search_seeds": (0, 3)}, "--search-seeds 3 is not one of --seeds 0,1,2"),
        ({"fields": {"optim.variant": "heavy-ball"}}, "lars has no variant 'heavy-ball'"),
    ],
)
def test_what_cannot_be_is_refused_at_once(changes, words):
    with pytest.raises(ConfigError, match=words):
        sweep_of(**changes)


def test_a_sweep_may_grow_and_not_shrink():
    small, large = sweep_of(), sweep_of(batches=(256, 512, 1024), lr_factors=(0.25, 0.5, 1.0, 2.0))
    assert removed_values(large, small.as_dict()) == []
    assert removed_values(small, large.as_dict()) == [
        "--batches without 512", *(f"--lr-factors for {name}:{batch} without 0.25,2"
                                   for batch in (256, 1024) for name in ("sgd", "lars")),
    ]  # fmt: skip
    other = sweep_of(lr_factors_at={("sgd", 1024): (0.25, 0.5), ("lars", 1024): (1.0, 2.0)})
    assert removed_values(other, small.as_dict()) == [
        "--lr-factors for sgd:1024 without 1", "--lr-factors for lars:1024 without 0.5",
    ]  # fmt: skip
    assert removed_values(small, other.as_dict()) == [
        "--lr-factors for sgd:1024 without 0.25", "--lr-factors for lars:1024 without 2",
    ]  # fmt: skip


def test_a_method_at_a_batch_may_have_learning_rates_of_its_own(tmp_path):
    own = {("sgd", 1024): (0.125, 0.25, 0.5), ("lars", 1024): (0.5, 1.0, 2.0)}
    plan = sweep_of(lr_factors_at=own)
    assert [point.name for point in plan.search()] == [
        "sgd-b256-lr0.05-seed0", "sgd-b256-lr0.1-seed0", "lars-b256-lr0.565685-seed0", "lars-b256-lr1.13137-seed0",
        "sgd-b1024-lr0.05-seed0", "sgd-b1024-lr0.1-seed0", "sgd-b1024-lr0.2-seed0",
        "lars-b1024-lr1.13137-seed0", "lars-b1024-lr2.26274-seed0", "lars-b1024-lr4.52548-seed0",
    ]  # fmt: skip
    assert plan.num_tasks == 10 + 4 * 2
    words = shlex.split(plan.command(tmp_path))
    assert words[6:12] == ["--optimizers", "sgd,lars", "--lr-factors", "0.5,1", "--seeds", "0,1,2"]
    assert words[14:18] == ["--lr-factors", "sgd:1024=0.125,0.25,0.5", "--lr-factors", "lars:1024=0.5,1,2"]
