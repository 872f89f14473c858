"""The list of recipes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from knltrain.cli.options import JSON, config_of_recipe, reports_errors
from knltrain.recipes import RECIPES, SOURCES

if TYPE_CHECKING:
    from rich.table import Table

# Header, field of the JSON, and whether it is a number; what a narrow terminal can do without stands last.
_COLUMNS = (
    ("recipe", "recipe", False),
    ("batch", "batch", True),
    ("epochs", "epochs", True),
    ("published top-1, %", "published", False),
    ("run by this project", "measured", False),
    ("model", "model", False),
    ("LR", "lr", True),
    ("optimizer", "optimizer", False),
    ("warm-up", "warmup_epochs", True),
    ("augmentation", "augmentation", False),
)


@click.command()
@click.argument("names", metavar="[NAME...]", nargs=-1)
@JSON
@reports_errors
def recipes(names: tuple[str, ...], as_json: bool) -> None:
    """List the recipes, or those named, with what each is known to reach."""
    rows = []
    for name in dict.fromkeys(names) or RECIPES:
        config = config_of_recipe(name)
        recipe = RECIPES[name]
        rows.append(
            {
                "recipe": recipe.name,
                "model": config.model,
                "batch": config.global_batch,
                "epochs": config.epochs,
                "lr": config.peak_lr,
                "warmup_epochs": config.schedule.warmup_epochs,
                "optimizer": f"{config.optim.name}/{config.optim.variant}",
                "augmentation": config.augment.name,
                "published": recipe.published,
                "measured": recipe.measured,
            }
        )
    if as_json:
        click.echo(json.dumps(rows))
        return
    from knltrain.runlog.console import Console
    from knltrain.runlog.tables import print_table, print_text

    console = Console()
    print_table(console, _table(rows))
    for key, source in SOURCES.items():
        print_text(console, f"[{key}] {source}")


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    from rich.markup import escape

    from knltrain.runlog.tables import new_table

    def text(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.3g}"
        return f"{value:,}" if isinstance(value, int) else escape(str(value))

    table = new_table()
    for header, _, is_number in _COLUMNS:
        table.add_column(header, justify="right" if is_number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(text(row[key]) for _, key, _ in _COLUMNS))
    return table
