"""The commands ``bench`` and ``tune``: parsing and printing only."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from knltrain import config as configuration
from knltrain.cli.options import (
    DEFAULT_IMAGE_SIZE,
    JSON,
    comma_list,
    config_of_recipe,
    field_options,
    given_fields,
    positive,
    reports_errors,
)
from knltrain.config import EngineName, Precision, RunConfig
from knltrain.config.checks import unused_field_warnings
from knltrain.errors import ConfigError

# Default images per step, enough to keep a node busy; 32 for other networks.
_DEFAULT_BATCH = {"alexnet": 128, "alexnet_bn": 128, "alexnet_bn_small": 256, "resnet20": 256}


@click.command()
@click.option("--recipe", metavar="NAME", help="Use model, image size, optimizer and augmentation of a recipe.")
@click.option("--model", help="Network, as in train; default resnet50.")
@click.option("--batch", help="Images per step; default 32.")
@click.option("--image-size", help="Pixels; default 224, 227 for AlexNet, 32 for alexnet_bn_small and resnet20.")
@click.option("--precision", type=click.Choice(Precision.__args__), help="Default auto.")  # type: ignore[attr-defined]
@click.option("--engine", type=click.Choice(EngineName.__args__), help="How a step executes; default auto.")  # type: ignore[attr-defined]
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Steps timed.")
@click.option("--compare", is_flag=True, help="Measure all engines alternately, each in its own process.")
@click.option("--profile", is_flag=True, help="Show the time of every layer, forward and backward.")
@click.option("--batches", metavar="B,...", help="Measure at each of these batches.")
@click.option("--threads", metavar="T,...", help="Measure with each of these numbers of threads.")
@click.option("--out", metavar="DIR", help="Folder for table and plot of --batches and --threads; default runs/bench.")
@field_options("data", "conv", "fp32_precision", "force_bf16", "on_bad")
@JSON
@reports_errors
def bench(as_json: bool, steps: int, **options: Any) -> None:
    """Time training steps on this node, on synthetic images or, with --data, with the whole input pipeline."""
    given_lists = {name: options.pop(name) for name in ("batches", "threads")}
    swept = {name: list(comma_list(f"--{name}", text, positive)) if text is not None else []
             for name, text in given_lists.items()}  # fmt: skip
    out, compare, profile = (options.pop(name) for name in ("out", "compare", "profile"))
    _refuse_contradictions(options, swept, out=out, compare=compare, profile=profile)
    recipe, batch = options.pop("recipe"), options.pop("batch") or "32"
    config = _measured_config(recipe, global_batch=batch, **options)

    from knltrain.runlog.console import Console

    console = Console(json=as_json)
    for complaint in unused_field_warnings(config, given_fields(options)):
        console.warn(complaint)
    if config.schedule.image_sizes or config.schedule.batches or config.ema_decay:
        console.warn(
            f"steps of {config.global_batch:,} images of {config.image_size} pixels are measured, without {recipe}'s"
            " changes of batch and image size, and without its moving average of the weights"
        )
    if profile:
        # torch's profiler logs to stderr that there is no GPU, unless this is set before torch is loaded.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        from knltrain.bench.layers import profile as profile_layers

        result = profile_layers(config, console, steps=steps)
    elif compare:
        from knltrain.bench.compare import compare as compare_engines

        result = compare_engines(config, console, steps=steps)
    elif any(swept.values()):
        from knltrain.bench.sweep import sweep

        result = sweep(config, console, **swept, steps=steps, out=Path(out or "runs/bench"))
        console.line(f"{result['out']}/sweep.png")
    else:
        from knltrain.bench import bench as measure

        result = measure(config, console, steps=steps)
        _print_bench(console, result)
    if as_json:
        click.echo(json.dumps(result))


@click.command()
@click.option("--model", default="resnet50", show_default=True, help="Network, as in train.")
@click.option("--batch", help="Images per step; default 32, 128 for AlexNet, 256 for the small networks.")
@click.option("--precision", type=click.Choice(Precision.__args__), default="auto", show_default=True)  # type: ignore[attr-defined]
@click.option(
    "--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Steps timed of each engine and layout."
)
@click.option("--budget", type=click.IntRange(min=0), default=600, show_default=True,
              help="Time limit for the layouts of ranks, seconds; 0 skips them.")  # fmt: skip
@JSON
@reports_errors
def tune(model: str, batch: str | None, precision: str, steps: int, budget: int, as_json: bool) -> None:
    """Find the fastest engine and layout of ranks on this node, for --engine auto, plan and launch."""
    batch = batch or str(_DEFAULT_BATCH.get(model, 32))
    config = _measured_config(model=model, global_batch=batch, precision=precision)

    from knltrain.bench.tune import tune as measure
    from knltrain.runlog.console import Console

    console = Console(json=as_json)
    result = measure(config, console, steps=steps, budget_s=budget)
    console.line(f"{result['fastest']} is the fastest engine here, stored in {result['stored']} for --engine auto")
    if best := result["layout"]:
        console.line(
            f"{best['ranks_per_node']} x {best['threads']} threads, local batch {best['local_batch']}, is the fastest "
            "measured layout; knltrain plan and launch use it"
        )
    if as_json:
        click.echo(json.dumps(result))


def _refuse_contradictions(
    options: dict[str, Any], swept: dict[str, list[int]], *, out: str | None, compare: bool, profile: bool
) -> None:
    """Raises ConfigError for options that contradict each other or have no effect."""
    sweep = " ".join(f"--{name}" for name, numbers in swept.items() if numbers)
    modes = [flag for flag, given in (("--compare", compare), ("--profile", profile), (sweep, sweep)) if given]
    if len(modes) > 1:
        raise ConfigError(f"{modes[0]} with {modes[1]}: these are separate measurements; run one after the other")
    if options["data"] and (compare or profile):
        raise ConfigError(f"{modes[0]} with --data: input is not part of this measurement; omit one of them")
    if compare and options["engine"]:
        raise ConfigError("--compare with --engine: all engines are measured; omit one of them")
    if options["batch"] and swept["batches"]:
        raise ConfigError("--batch with --batches: omit one of them")
    if out and not sweep:
        raise ConfigError("--out: only --batches and --threads write files; --json prints other results")


def _measured_config(recipe: str | None = None, **fields: str | None) -> RunConfig:
    """Returns the configuration for bench and tune: a recipe or resnet50, overridden by the given fields."""
    config, fields = RunConfig(), {name: value for name, value in fields.items() if value is not None}
    if recipe:
        config = config_of_recipe(recipe)
        if "image_size" in fields:  # the recipe's resize does not matter
            config = replace(config, augment=replace(config.augment, resize=None))
    else:
        fields = {"model": "resnet50", **fields}
        fields = {"image_size": str(DEFAULT_IMAGE_SIZE.get(str(fields["model"]), 224)), **fields}
    return configuration.override(config, fields)


def _print_bench(console: Any, result: dict[str, Any]) -> None:
    step = result["step_s"]
    console.line(
        f"{result['images_per_s']:.1f} img/s: step {1e3 * step['median']:.1f} ms median, "
        f"{1e3 * step['quartile1']:.1f}-{1e3 * step['quartile3']:.1f} quartiles, {result['steps']} steps; "
        f"warm-up {result['warmup_s']:.1f} s, peak memory {result['peak_rss_mb']:.0f} MiB"
    )
    if "data_s" in result:
        console.line(
            f"waiting for data: {1e3 * result['data_s']['median']:.1f} ms a step median, "
            f"{result['data_fraction']:.1%} of the time; input alone: {result['input_images_per_s']:.1f} img/s"
        )
