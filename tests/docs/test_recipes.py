"""What docs/recipes.md says of budgets, and its commands."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from knltrain.cli.main import main
from knltrain.predict.accounting import accounting_by_phase
from knltrain.recipes import RECIPES

TEXT = (Path(__file__).parents[2] / "docs/recipes.md").read_text("utf-8")


@pytest.mark.parametrize("epochs", [16, 32, 88])
def test_budgets(epochs):
    rows = accounting_by_phase(RECIPES[f"resnet50-ffcv-{epochs}"].config(), nodes=8)
    small, large = (round(row["last_epoch"] - row["first_epoch"]) for row in rows)
    steps, images, flops = (sum(row[name] for row in rows) for name in ("iterations", "images", "flops"))
    line = f"| `resnet50-ffcv-{epochs}` | {small} | {large} | {steps:,} | {images:,} | {flops / 1e15:,.1f} |"
    assert line in TEXT


def test_commands_are_possible():
    """They get as far as the data, which is not there."""
    commands = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 3
    for command in commands:
        words = [word if word not in ("imagenet", "cifar10") else "/nowhere" for word in shlex.split(command)]
        result = CliRunner().invoke(main, [*words[1:], "--precision", "fp32", "--engine", "eager"])
        assert result.exit_code == 1, result.output
        assert "/nowhere/train: no such folder" in result.output
