"""The list of recipes."""

from __future__ import annotations

import json
import sys

import click

from knltrain.cli.options import JSON
from knltrain.recipes import RECIPES, SOURCES


@click.command()
@JSON
def recipes(as_json: bool) -> None:
    """List the recipes with what each is known to reach."""
    rows = []
    for recipe in RECIPES.values():
        config = recipe.config()
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
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("recipe", "model", "batch", "epochs", "LR", "warm-up", "optimizer", "augmentation",
                 "published top-1, %", "run by this project"):  # fmt: skip
        number = name in ("batch", "epochs", "LR", "warm-up")
        table.add_column(name, justify="right" if number else "left", no_wrap=number or name == "recipe")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int)
                        else escape(str(value)) for value in row.values()))  # fmt: skip
    # A pipe has no width of its own; what reads it should get one line a recipe.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for key, source in SOURCES.items():
        console.print(f"[{key}] {source}", markup=False, highlight=False)
