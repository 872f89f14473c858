"""The command: one subcommand per verb, nothing but parsing and printing.

Only what parsing needs is imported here; torch is loaded by the verb that computes.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

import click

import knltrain
from knltrain import config as configuration
from knltrain.config import EngineName, Precision, RunConfig
from knltrain.errors import ConfigError, KnltrainError
from knltrain.recipes import RECIPES, SOURCES

FAILED, BAD_USAGE, STOPPED = 1, 2, 75

_CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
    # Fields are written with underscores in files; on the command line both spellings are the same option.
    "token_normalize_func": lambda token: token.replace("_", "-"),
}
_JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout, people's text on stderr."
)


def _field_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Options for configuration fields: the named ones, or all."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for field in reversed([f for f in configuration.fields() if not names or f.name in names]):
            if field.name != "recipe":
                flag = "--" + field.name.replace("_", "-")
                parameter = field.name.replace(".", "__")  # click wants identifiers
                command = click.option(flag, parameter, metavar=_metavar(field.type), help=field.help)(command)
        return command

    return decorate


def _metavar(kind: Any) -> str:
    """What stands for a value in the help text: the choices, or the type."""
    if get_origin(kind) is Annotated:
        return _metavar(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) is tuple:
        return _metavar(get_args(kind)[0]) + ",..."
    if get_origin(kind) in (Union, UnionType):
        return _metavar(next(part for part in get_args(kind) if part is not type(None)))
    return {bool: "true|false", int: "INTEGER", float: "NUMBER"}.get(kind, "TEXT")


def _reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turns the project's errors into one line and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KnltrainError as error:
            _fail(str(error), BAD_USAGE if isinstance(error, ConfigError) else FAILED)
        except OSError as error:  # a folder that cannot be written, a disk that is full
            _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", FAILED)
        except KeyboardInterrupt:
            _fail("interrupted", 130)

    return wrapped


def _fail(message: str, code: int) -> NoReturn:
    rank = os.environ.get("RANK") or os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK")
    click.echo(f"knltrain: {f'rank {rank}: ' if rank else ''}{message}", err=True)
    sys.exit(code)


def _given(values: dict[str, str | None]) -> dict[str, str]:
    """The fields that were set on the command line, by dotted name."""
    return {name.replace("__", "."): value for name, value in values.items() if value is not None}


@click.group(context_settings=_CONTEXT)
@click.version_option(knltrain.__version__, prog_name="knltrain")
def main() -> None:
    """Large-batch ImageNet training with LARS on clusters of many-core CPUs."""


@main.command()
@click.option("--recipe", metavar="NAME", help="Recipe to start from; `knltrain recipes` lists them.")
@click.option("--config", "file", metavar="FILE", help="TOML file of fields; overrides the recipe.")
@_JSON
@_field_options()
@_reports_errors
def train(recipe: str | None, file: str | None, as_json: bool, **values: str | None) -> None:
    """Train a network: alone, or as one rank under torchrun, mpiexec or srun.

    Fields come from the recipe, then from the file, then from the options below.
    """
    config = RunConfig()
    from_file = configuration.read_toml(file) if file else {}
    recipe = recipe or str(from_file.pop("recipe", "")) or None
    if recipe is None and not file:
        raise ConfigError("nothing to train: give --recipe NAME (`knltrain recipes` lists them) or --config FILE")
    if recipe is not None:
        config = _recipe(recipe)
    from_file.pop("recipe", None)
    flags = _given(values)
    config = configuration.override(configuration.override(config, from_file), flags)

    from knltrain.console import Console
    from knltrain.node.ranks import discover

    console = Console(json=as_json, silent=discover().rank != 0)
    changed = {*flags, *from_file}
    if recipe and "global_batch" in changed and "optim.lr" not in changed and config.optim.lr_scaling == "none":
        console.warn(
            f"global batch {config.global_batch:,} with the learning rate {config.optim.lr:g} that {recipe} gives for "
            f"{RECIPES[recipe].config().global_batch:,}; --optim.lr sets another"
        )

    for complaint in configuration.without_effect(config, changed):
        console.warn(complaint)

    from knltrain.train import train as run

    summary, finished = run(config, console)
    if not finished:
        if summary:
            console.line(f"stopped by a signal after step {summary['steps']:,}; the same command goes on from there")
        sys.exit(STOPPED)
    if summary:
        console.line(
            f"top-1 {_percent(summary['top1'])} (best {_percent(summary['best_top1'])}), "
            f"{summary['images_per_s']:.0f} img/s, {summary['data_fraction']:.1%} waiting for data; "
            f"{summary['out']}/curves.png"
        )
        if as_json:
            click.echo(json.dumps(summary))


@main.command(name="eval")
@click.argument("checkpoint")
@_JSON
@_field_options("data", "precision", "force_bf16", "workers")
@_reports_errors
def evaluate(checkpoint: str, as_json: bool, **values: str | None) -> None:
    """Evaluate CHECKPOINT (or the newest one of a run's folder) on the val part of --data."""
    config = configuration.override(RunConfig(), _given(values))

    from pathlib import Path

    from knltrain.console import Console
    from knltrain.evaluate import evaluate_checkpoint
    from knltrain.node.ranks import discover

    first = discover().rank == 0
    console = Console(json=as_json, silent=not first)
    result = evaluate_checkpoint(Path(checkpoint), config, console)
    console.line(
        f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f} over "
        f"{result['images']:,} images, {result['images_per_s']:.0f} img/s"
    )
    if as_json and first:
        click.echo(json.dumps(result))


@main.command()
@click.option("--model", default="resnet50", show_default=True, help="Network, as train names it.")
@click.option("--batch", default="32", show_default=True, help="Images a step.")
@click.option("--image-size", help="Pixels; default 224, 227 for AlexNet, 32 for alexnet_bn_small.")
@click.option("--precision", type=click.Choice(Precision.__args__), default="auto", show_default=True)  # type: ignore[attr-defined]
@click.option("--engine", type=click.Choice(EngineName.__args__), default="auto", show_default=True)  # type: ignore[attr-defined]
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Steps timed.")
@_field_options("force_bf16")
@_JSON
@_reports_errors
def bench(
    model: str,
    batch: str,
    image_size: str | None,
    precision: str,
    engine: str,
    steps: int,
    as_json: bool,
    **values: str | None,
) -> None:
    """Time training steps on this node, on synthetic input."""
    if image_size is None:
        image_size = {"alexnet": "227", "alexnet_bn": "227", "alexnet_bn_small": "32"}.get(model, "224")
    fields = {"model": model, "global_batch": batch, "image_size": image_size, "precision": precision, "engine": engine}
    config = configuration.override(RunConfig(), {**fields, **_given(values)})

    from knltrain.bench import bench as measure
    from knltrain.console import Console

    console = Console(json=as_json)
    result = measure(config, console, steps=steps)
    step = result["step_s"]
    console.line(
        f"{result['images_per_s']:.1f} img/s: step {1e3 * step['median']:.1f} ms median, "
        f"{1e3 * step['quartile1']:.1f}-{1e3 * step['quartile3']:.1f} quartiles, {steps} steps; "
        f"warm-up {result['warmup_s']:.1f} s, peak memory {result['peak_rss_mb']:.0f} MiB"
    )
    if as_json:
        click.echo(json.dumps(result))


@main.command()
@_JSON
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


def _recipe(name: str) -> RunConfig:
    if name not in RECIPES:
        import difflib

        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}?" if near else "`knltrain recipes` lists them"
        raise ConfigError(f"no recipe {name!r}; {hint}")
    return RECIPES[name].config()


def _percent(value: float | None) -> str:
    return "not evaluated" if value is None else f"{value:.2f} %"
