"""`knltrain sweep`: parsing and printing only."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from knltrain import config as configuration
from knltrain.cli.options import (
    JSON,
    comma_list,
    config_of_recipe,
    field_options,
    given_fields,
    reports_errors,
)
from knltrain.errors import STOPPED, ConfigError
from knltrain.sweep.plan import OWN_FIELDS, Cell, Sweep

if TYPE_CHECKING:
    from knltrain.runlog.console import Console


@click.command()
@click.option("--recipe", metavar="NAME", help="What to train; `knltrain recipes` lists them.")
@click.option("--batches", metavar="B,...", help="Global batches; default the recipe's.")
@click.option("--optimizers", metavar="NAME,...", help="Methods, each with its own rule; default the recipe's.")
@click.option("--lr-factors", metavar="[NAME:B=]F,...", multiple=True,
              help="Learning rates to try, as factors of the rule's for each batch (default 1); again with NAME:B= for "
                   "a method at a batch that needs others.")  # fmt: skip
@click.option("--seeds", metavar="S,...", default="0", show_default=True, help="A run for each.")
@click.option("--search-seeds", metavar="S,...",
              help="Try all learning rates with these seeds, only the best with the others; default all.")  # fmt: skip
@click.option("--out", metavar="DIR", help="Folder of the sweep; default runs/sweep-RECIPE.")
@click.option("--task", type=click.IntRange(min=0), metavar="N", help="Train only the run with this number, from 0.")
@click.option("--dry-run", is_flag=True, help="Check all runs, list them with their numbers, and train nothing.")
@JSON
@field_options(*(field.name for field in configuration.fields() if field.name not in OWN_FIELDS))
@reports_errors
def sweep(
    recipe: str | None, batches: str | None, optimizers: str | None, lr_factors: tuple[str, ...], seeds: str,
    search_seeds: str | None, out: str | None, task: int | None, dry_run: bool, as_json: bool, **values: str | None,
) -> None:  # fmt: skip
    """Train a recipe at many batches by several methods, search their learning rates, and draw accuracy against batch.

    Runs go one after another, each in OUT/runs. The same command goes on where it was stopped, and adds what is new.
    """
    if recipe is None:
        raise ConfigError("nothing to sweep: give --recipe NAME (`knltrain recipes` lists them)")
    base = config_of_recipe(recipe)
    everywhere, at = _factors(lr_factors)
    all_seeds = comma_list("--seeds", seeds, int)
    plan = Sweep(
        recipe,
        given_fields(values),
        comma_list("--batches", batches or str(base.global_batch), int),
        comma_list("--optimizers", optimizers or base.optim.name, str),
        everywhere,
        all_seeds,
        comma_list("--search-seeds", search_seeds, int) if search_seeds is not None else all_seeds,
        at,
    )
    folder = Path(out or f"runs/sweep-{recipe}")

    from knltrain.runlog.console import Console

    console = Console(json=as_json)
    if dry_run:
        _list(plan, folder, console, task, as_json=as_json)
        return
    if task is not None:
        from knltrain.sweep.runner import train_task

        result, finished = train_task(plan, folder, console, task)
    else:
        from knltrain.sweep.runner import sweep as run

        result, finished = run(plan, folder, console)
        console.line(f"{folder}/report.md")
    if as_json:
        click.echo(json.dumps(result))
    if not finished:
        console.line("stopped by a signal; the same command goes on from there")
        sys.exit(STOPPED)


def _factors(texts: Sequence[str]) -> tuple[tuple[float, ...], dict[Cell, tuple[float, ...]]]:
    """Reads factors of the learning rate: for all methods and batches, and for one method at one batch.

    Raises:
        ConfigError: what they are for cannot be read, or is given twice.
    """
    found: dict[Cell | None, tuple[float, ...]] = {}
    for text in texts:
        own = re.fullmatch(r"\s*(\S+):(\d{1,18})\s*=(.*)", text)
        if "=" in text and not own:
            raise ConfigError(f"--lr-factors {text}: give METHOD:BATCH=FACTOR,... as in sgd:8192=0.125,0.25")
        cell = (own[1], int(own[2])) if own else None
        if cell in found:
            raise ConfigError(f"--lr-factors {text}: it is given twice for {f'{cell[0]}:{cell[1]}' if cell else 'all'}")
        found[cell] = comma_list("--lr-factors", own[3] if own else text, float)
    everywhere = found.pop(None, (1.0,))
    return everywhere, {cell: factors for cell, factors in found.items() if cell}


def _list(plan: Sweep, out: Path, console: Console, task: int | None, *, as_json: bool) -> None:
    """Shows the numbers of the runs, or the command of one."""
    from knltrain.sweep.results import Results
    from knltrain.sweep.runner import check, task_of

    results = Results(plan, out, check(plan, console))
    if task is not None:
        command = ["knltrain", *task_of(results, task).words(out)]
        click.echo(json.dumps({"task": task, "command": command}) if as_json else shlex.join(command))
        return
    points = [*plan.search(), *results.later()]
    rows = [{"task": number, "run": point.name if point else None,
             "status": results.outcome(point).status if point else "waiting"}
            for number, point in enumerate(points)]  # fmt: skip
    for row in rows:
        console.line(f"{row['task']:4} {row['run'] or 'a later seed, at the best learning rate':40} {row['status']}")
    search = len(plan.search())
    later = f"; tasks {search} to {len(points) - 1} when these have ended" if len(points) > search else ""
    console.line(f"{len(points)} runs: tasks 0 to {search - 1}{later}")
    if as_json:
        click.echo(json.dumps({"tasks": rows, "search": search}))
