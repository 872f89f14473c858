"""Trust ratios as they are logged: those that LARS uses, at a price that is not seen in the weights."""

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from runs import newest, state
from small_networks import small_run, why_no_engine

from knltrain.cli.main import main
from knltrain.config import RunConfig, override
from knltrain.config.schedule import make_schedule
from knltrain.optim import LARS, parameter_groups
from knltrain.runlog.console import Console
from knltrain.runlog.metrics import MetricsLog, read_metrics
from knltrain.training import trainer
from knltrain.training.due import DueRules


def logged(out):
    return read_metrics(Path(out, "trust_ratios.jsonl"))


def norm(tensor):
    return math.sqrt(float(tensor.detach().double().square().sum()))


@pytest.mark.parametrize("variant, eps", [("paper", 0.0), ("paper", 0.5), ("mlperf", 0.0), ("larc", 0.0)])
def test_they_follow_the_published_formula(variant, eps):
    """Before the first step, when nothing is known of the weights, after it, and after somebody has written to them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.Linear(8, 5)
    )
    torch.nn.init.zeros_(model[3].bias)
    groups = parameter_groups(
        model, weight_decay=0.1, decay_on="all", adapt_on="weights" if variant == "mlperf" else "all"
    )
    optimizer = LARS(groups, lr=0.5, weight_decay=0.1, trust_coefficient=0.02, eps=eps, clip=variant == "larc")
    for turn in range(3):
        if turn == 2:
            with torch.no_grad():
                model[0].weight.mul_(3.0)
        optimizer.zero_grad()
        model(torch.randn(4, 3, 3, 3)).square().mean().backward()
        named = dict(model.named_parameters())
        ratios = optimizer.trust_ratios({name: norm(parameter.grad) for name, parameter in named.items()})
        assert set(ratios) == ({"weight"} if variant == "mlperf" else {"weight", "norm", "bias"})
        assert list(ratios["weight"]) == ["0.weight", "3.weight"]
        if variant != "mlperf":
            assert (ratios["bias"]["3.bias"] is None) == (turn == 0), "a norm of zero has no ratio"
        for name, ratio in (item for kind in ratios.values() for item in kind.items() if item[1] is not None):
            weight, gradient = norm(named[name]), norm(named[name].grad)
            decay = 0.0 if variant == "larc" else 0.1 * weight
            assert ratio == pytest.approx(0.02 * weight / (gradient + decay + eps), rel=1e-6)
        optimizer.step()


@pytest.mark.parametrize("engine, precision, tolerance", [("eager", "fp32", 1e-4), ("fused", "bf16", 5e-3)])
def test_a_run_logs_what_its_optimizer_uses_and_nothing_else_changes(
    image_folder, tmp_path, monkeypatch, engine, precision, tolerance
):
    if reason := why_no_engine(engine):
        pytest.skip(reason)
    used, update = [], LARS._update

    def watched(optimizer, params, grads, copies, groups):
        names = {
            id(p): name
            for group in optimizer.param_groups
            for name, p in zip(group["names"], group["params"], strict=True)
        }
        used.append({
            names[id(p)]: 0.001 * norm(p) / (norm(g) + 5e-4 * norm(p)) for p, g in zip(params, grads, strict=True)
        })  # fmt: skip
        update(optimizer, params, grads, copies, groups)

    config = small_run(image_folder, tmp_path / "off", engine=engine, precision=precision, local_batch=8)
    trainer.train(config, Console(silent=True))
    assert not (tmp_path / "off" / "trust_ratios.jsonl").exists()
    monkeypatch.setattr(LARS, "_update", watched)
    trainer.train(override(config, {"out": str(tmp_path / "on"), "log_trust_ratios": True}), Console(silent=True))
    off, on = state(tmp_path / "off"), state(tmp_path / "on")
    assert [name for name in off if not torch.equal(off[name], on[name])] == []
    rows = logged(tmp_path / "on")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[2]["epoch"] == 1.0
    for row, expected in zip(rows, used, strict=True):
        ratios = {name: ratio for kind in ("weight", "norm", "bias") for name, ratio in row[kind].items()}
        assert ratios.keys() == expected.keys()
        for name, ratio in ratios.items():
            assert ratio is None or ratio == pytest.approx(expected[name], rel=tolerance), name
    assert sum(ratio is not None for row in rows for ratio in row["weight"].values()) == 6 * len(rows[0]["weight"])


def test_a_run_that_was_stopped_has_each_step_once(image_folder, tmp_path):
    """Steps that are done again are written again, and so are those that were not asked for before."""
    config = small_run(image_folder, tmp_path / "run", local_batch=16, log_trust_ratios=True)
    trainer.train(override(config, {"max_steps": 2}), Console(silent=True))
    with (tmp_path / "run" / "trust_ratios.jsonl").open("a") as file:
        file.write('{"step": 3, "epoch": 1.0, "weight": {}}\n{"step": 4, "ep')
    trainer.train(override(config, {"max_steps": 4, "log_trust_ratios": False}), Console(silent=True))
    assert [row["step"] for row in logged(tmp_path / "run")] == [1, 2]
    trainer.train(config, Console(silent=True))
    assert [row["step"] for row in logged(tmp_path / "run")] == [1, 2, 5, 6]
    assert newest(tmp_path / "run").name == "step-00000006"


def test_a_long_run_logs_a_thousand():
    def due(total, **changes):
        config = override(RunConfig(), {"log_trust_ratios": True, "epochs": 1, "global_batch": 1, **changes})
        due = DueRules(config, make_schedule(config, total))
        return [step for step in range(1, total + 1) if due.trust_ratios(step)]

    assert len(due(450_360)) in range(900, 1002)
    assert len(due(1001)) in range(500, 1002)
    assert due(4000)[:4] == [1, 4, 8, 12], "the first is one of them"
    assert due(90) == [*range(1, 91)]
    assert due(90, log_trust_ratios=False) == []


def test_numbers_that_json_does_not_know(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write_trust_ratios(1, 0.5, {"weight": {"a": math.inf, "b": None, "c": 1 / 3}})
    (row,) = logged(tmp_path)
    assert row == {"step": 1, "epoch": 0.5, "weight": {"a": None, "b": None, "c": 0.33333}}


@pytest.mark.parametrize(
    "name, words", [("lars", ""), ("sgd", "log-trust-ratios has no effect without optim.name lars")]
)
def test_the_flag_stands_alone(image_folder, tmp_path, name, words):
    variant = {"lars": "paper", "sgd": "nesterov"}[name]
    command = ["train", "--recipe", "cifar-256", "--data", image_folder, "--out", tmp_path / "run", "--max-steps", 2,
               "--global-batch", 16, "--optim.name", name, "--optim.variant", variant, "--log-trust-ratios",
               "--optim.lr", "0.1"]  # fmt: skip
    result = CliRunner().invoke(main, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    assert words in result.output
    assert (tmp_path / "run" / "trust_ratios.jsonl").exists() == (name == "lars")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["log_trust_ratios"] is True
