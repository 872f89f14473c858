"""The commands ``train``, ``eval`` and ``export``. They import torch after this rank is bound."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from knltrain import config as configuration
from knltrain.cli.options import (
    DEFAULT_IMAGE_SIZE,
    JSON,
    config_of_recipe,
    field_options,
    given_fields,
    reports_errors,
)
from knltrain.config import RunConfig
from knltrain.config.checks import unreached_schedule_warnings, unused_field_warnings
from knltrain.errors import STOPPED, ConfigError, KnltrainError
from knltrain.recipes import RECIPES

_NO_STRICT = click.option("--no-strict-affinity", is_flag=True, help="Run even on fewer cores than planned.")


def _bind_rank(*, strict: bool) -> Any:
    """Binds this rank to its cores, before torch is imported."""
    from knltrain.launch.placement import bind_rank

    placement = bind_rank(strict=strict)
    for problem in placement.warnings:
        # Warnings about a node are printed once per node, those about a rank by that rank.
        if placement.ranks.local_rank == 0 or f"rank {placement.ranks.rank} " in problem:
            click.echo(f"warning: {problem}", err=True)
    return placement


@click.command()
@click.option("--recipe", metavar="NAME", help="Recipe to start from; `knltrain recipes` lists them.")
@click.option("--config", "file", metavar="FILE", help="TOML file of fields; overrides the recipe.")
@click.option("--allow-change", metavar="FIELD,...",
              help="Resume a run although these fields have changed.")  # fmt: skip
@_NO_STRICT
@JSON
@field_options()
@reports_errors
def train(
    recipe: str | None, file: str | None, allow_change: str | None, no_strict_affinity: bool, as_json: bool,
    **values: str | None,
) -> None:  # fmt: skip
    """Train a network, as a single process or as one rank under torchrun, mpiexec or srun.

    Fields come from the recipe, then from the file, then from the options below.
    """
    config = RunConfig()
    from_file = configuration.read_toml(file) if file else {}
    recipe = recipe or str(from_file.pop("recipe", "")) or None
    if recipe is None and not file:
        raise ConfigError("nothing to train: give --recipe NAME (`knltrain recipes` lists them) or --config FILE")
    if recipe is not None:
        config = config_of_recipe(recipe)
    from_file.pop("recipe", None)
    flags = given_fields(values)
    config = configuration.override(config, {**from_file, **flags})
    allowed = configuration.names(allow_change) if allow_change is not None else frozenset()

    placement = _bind_rank(strict=not no_strict_affinity)

    from knltrain.runlog.console import Console

    console = Console(json=as_json, silent=placement.ranks.rank != 0)
    changed = {*flags, *from_file}
    if recipe and "global_batch" in changed and "optim.lr" not in changed and config.optim.lr_scaling == "none":
        console.warn(
            f"global batch {config.global_batch:,} with the learning rate {config.optim.lr:g} that {recipe} gives for "
            f"{RECIPES[recipe].config().global_batch:,}; --optim.lr sets another"
        )

    for complaint in [*unused_field_warnings(config, changed), *unreached_schedule_warnings(config)]:
        console.warn(complaint)

    from knltrain.training.trainer import train as run

    summary, finished = run(config, console, placement, allow_change=allowed)
    if not finished:
        when = f"after step {summary['steps']:,}" if summary else "before the first step"
        without = " without --resume never" if config.resume == "never" else ""
        console.line(f"stopped by a signal {when}; the same command{without} goes on from there")
        if as_json and placement.ranks.rank == 0:
            click.echo(json.dumps(summary or {"finished": False}))
        sys.exit(STOPPED)
    if summary:
        console.line(
            f"top-1 {_percent(summary['top1'])} (best {_percent(summary['best_top1'])})"
            + (
                f", {summary['images_per_s']:.0f} img/s, {summary['data_fraction']:.1%} waiting for data"
                if summary["images_per_s"] is not None  # only an evaluation was left
                else ""
            )
            + f"; {summary['out']}/curves.png"
        )
        if as_json:
            click.echo(json.dumps(summary))


# Fields that checkpoints and files by `export` contain, but other files of weights do not.
_NETWORK_FIELDS = ("model", "image_size", "augment.resize")


@click.command(name="eval")
@click.argument("checkpoint")
@_NO_STRICT
@JSON
@field_options("data", "classes", "class_order", "precision", "force_bf16", "workers", "on_bad", *_NETWORK_FIELDS)
@reports_errors
def evaluate(checkpoint: str, no_strict_affinity: bool, as_json: bool, **values: str | None) -> None:
    """Evaluate CHECKPOINT (or the newest one of a run's folder) on the val part of --data.

    CHECKPOINT may also be a file of weights. Safetensors by `knltrain export` name their network; for other
    safetensors, or a state dict like torchvision's, --model names it.
    """
    fields, classes = given_fields(values), None
    unused = [f"--{name.replace('_', '-')}" for name in _NETWORK_FIELDS if name in fields]
    if Path(checkpoint).is_file():
        fields, classes = _fields_of_file(checkpoint, fields)
    elif unused and not Path(checkpoint).exists():
        raise KnltrainError(f"{checkpoint}: no such file, and no checkpoint or run")
    elif unused:
        raise ConfigError(f"{unused[0]} has no effect on {checkpoint}: a checkpoint names its network; omit the option")
    config = configuration.override(RunConfig(), fields)

    placement = _bind_rank(strict=not no_strict_affinity)

    from knltrain.runlog.console import Console
    from knltrain.training.evaluate import evaluate_checkpoint

    first = placement.ranks.rank == 0
    console = Console(json=as_json, silent=not first)
    result = evaluate_checkpoint(Path(checkpoint), config, console, placement, classes=classes)
    console.line(
        f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f} over "
        f"{result['images']:,} images, {result['images_per_s']:.0f} img/s"
    )
    if as_json and first:
        click.echo(json.dumps(result))


def _fields_of_file(path: str, given: dict[str, str]) -> tuple[dict[str, str], Sequence[str] | None]:
    """Returns the fields for the evaluation of a file of weights, and its class names if it has them."""
    from knltrain.weights.metadata import about

    said = about(Path(path))
    if said is None:
        if "model" not in given:
            raise ConfigError(f"{path}: --model must name the network of these weights")
        size = DEFAULT_IMAGE_SIZE.get(given["model"], 224)
        # Such small images are not cropped in evaluation.
        whole = {"augment.resize": str(size)} if size <= 32 and "image_size" not in given else {}
        return {"image_size": str(size), **whole, **given}, None
    if given.get("model", said.model) != said.model:
        raise ConfigError(f"--model {given['model']}: {path} says that it is of {said.model}; leave it out")
    fields = {"model": said.model}
    if "image_size" not in given:
        fields |= {"image_size": str(said.image_size), "augment.resize": str(said.resize)}
    return {**fields, **given}, said.classes


@click.command()
@click.argument("checkpoint")
@click.argument("dst")
@click.option("--format", type=click.Choice(["safetensors", "pth", "onnx", "pt2"]),
              help="State dict, ONNX or torch.export; default: the suffix of DST.")  # fmt: skip
@JSON
@reports_errors
def export(checkpoint: str, dst: str, format: str | None, as_json: bool) -> None:
    """Write the network of CHECKPOINT (or the newest one of a run's folder) to DST, for other programs.

    The file is verified before it gets its name: it is read again, and its logits must be the network's.
    """
    from knltrain.runlog.console import Console
    from knltrain.weights.export import export as write

    console = Console(json=as_json)
    result = write(Path(checkpoint), Path(dst), console, format=format)
    console.line(
        f"{dst}: {result['model']} of {result['checkpoint']}, {result['bytes'] / 1e6:.1f} MB; logits differ by "
        f"{result['max_difference']:.2g} at most, of {result['largest_logit']:.3g}"
    )
    if as_json:
        click.echo(json.dumps(result))


def _percent(value: float | None) -> str:
    return "not evaluated" if value is None else f"{value:.2f} %"
