"""The verbs that measure this node: nothing but parsing and printing."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from knltrain import config as configuration
from knltrain.cli.options import (
    JSON,
    USUAL_IMAGE_SIZE,
    comma_list,
    field_options,
    given,
    positive,
    recipe_named,
    reports_errors,
)
from knltrain.config import EngineName, Precision, RunConfig
from knltrain.config.checks import unused_field_warnings
from knltrain.errors import ConfigError

# Images a step that are enough to keep a node busy, where nobody says.
_USUAL_BATCH = {"alexnet": 128, "alexnet_bn": 128, "alexnet_bn_small": 256, "resnet20": 256}


@click.command()
@click.option("--recipe", metavar="NAME", help="Take model, image size, optimizer and augmentation from a recipe.")
@click.option("--model", help="Network, as train names it; default resnet50.")
@click.option("--batch", help="Images a step; default 32.")
@click.option("--image-size", help="Pixels; default 224, 227 for AlexNet, 32 for alexnet_bn_small and resnet20.")
@click.option("--precision", type=click.Choice(Precision.__args__), help="Default auto.")  # type: ignore[attr-defined]
@click.option("--engine", type=click.Choice(EngineName.__args__), help="How a step executes; default auto.")  # type: ignore[attr-defined]
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Steps timed.")
@click.option("--compare", is_flag=True, help="Measure all engines, in turns, each in a process of its own.")
@click.option("--profile", is_flag=True, help="Show the time of every layer, forward and backward.")
@click.option("--batches", metavar="B,...", help="Measure at each of these batches.")
@click.option("--threads", metavar="T,...", help="Measure with each of these numbers of threads.")
@click.option("--out", metavar="DIR", help="Folder for table and plot of --batches and --threads; default runs/bench.")
@field_options("data", "conv", "fp32_precision", "force_bf16", "on_bad")
@JSON
@reports_errors
def bench(as_json: bool, steps: int, **options: Any) -> None:
    """Time training steps on this node, on noise or, with --data, through the whole input path."""
    given_lists = {name: options.pop(name) for name in ("batches", "threads")}
    swept = {name: list(comma_list(f"--{name}", text, positive)) if text is not None else []
             for name, text in given_lists.items()}  # fmt: skip
    out, compare, profile = (options.pop(name) for name in ("out", "compare", "profile"))
    _refuse_contradictions(options, swept, out=out, compare=compare, profile=profile)
    recipe, batch = options.pop("recipe"), options.pop("batch") or "32"
    config = _measured_config(recipe, global_batch=batch, **options)

    from knltrain.runlog.console import Console

    console = Console(json=as_json)
    for complaint in unused_field_warnings(config, given(options)):
        console.warn(complaint)
    if config.schedule.image_sizes or config.schedule.batches or config.ema_decay:
        console.warn(
            f"steps of {config.global_batch:,} images of {config.image_size} pixels are measured, without what {recipe}"
            " changes in the course of a run, and without an average of the weights"
        )
    if profile:
        # What torch records with complains on stderr where there is no GPU, unless told before torch is loaded.
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
@click.option("--model", default="resnet50", show_default=True, help="Network, as train names it.")
@click.option("--batch", help="Images a step; default 32, 128 for AlexNet, 256 for the small networks.")
@click.option("--precision", type=click.Choice(Precision.__args__), default="auto", show_default=True)  # type: ignore[attr-defined]
@click.option(
    "--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Steps timed of each engine and layout."
)
@click.option("--budget", type=click.IntRange(min=0), default=600, show_default=True,
              help="Seconds for the layouts of ranks, after the engines; 0 leaves them out.")  # fmt: skip
@JSON
@reports_errors
def tune(model: str, batch: str | None, precision: str, steps: int, budget: int, as_json: bool) -> None:
    """Measure the fastest engine and layout of ranks on this node; --engine auto, plan and launch go by them then."""
    batch = batch or str(_USUAL_BATCH.get(model, 32))
    config = _measured_config(model=model, global_batch=batch, precision=precision)

    from knltrain.bench.tune import tune as measure
    from knltrain.runlog.console import Console

    console = Console(json=as_json)
    result = measure(config, console, steps=steps, budget_s=budget)
    console.line(f"{result['fastest']} is the fastest engine here; {result['stored']} has it for --engine auto")
    if best := result["layout"]:
        console.line(
            f"{best['ranks_per_node']} x {best['threads']} threads, local batch {best['local_batch']}, is the fastest "
            "layout measured; knltrain plan and launch go by it"
        )
    if as_json:
        click.echo(json.dumps(result))


def _refuse_contradictions(
    options: dict[str, Any], swept: dict[str, list[int]], *, out: str | None, compare: bool, profile: bool
) -> None:
    """Refuses what bench cannot do at once, or what would change nothing."""
    sweep = " ".join(f"--{name}" for name, numbers in swept.items() if numbers)
    modes = [flag for flag, given in (("--compare", compare), ("--profile", profile), (sweep, sweep)) if given]
    if len(modes) > 1:
        raise ConfigError(f"{modes[0]} with {modes[1]}: each is a measurement of its own; run them one after the other")
    if options["data"] and (compare or profile):
        raise ConfigError(
            f"{modes[0]} with --data: engines and layers have the same input; it is measured without {modes[0]}"
        )
    if compare and options["engine"]:
        raise ConfigError("--compare with --engine: all engines are measured; leave one of the two away")
    if options["batch"] and swept["batches"]:
        raise ConfigError("--batch with --batches: leave one of the two away")
    if out and not sweep:
        raise ConfigError("--out: only --batches and --threads leave files; --json prints the result of the others")


def _measured_config(recipe: str | None = None, **fields: str | None) -> RunConfig:
    """What bench and tune measure: a recipe, or resnet50 as it comes, with the fields given in its place."""
    config, fields = RunConfig(), {name: value for name, value in fields.items() if value is not None}
    if recipe:
        config = recipe_named(recipe)
        if "image_size" in fields:  # what images are scaled to before is not measured
            config = replace(config, augment=replace(config.augment, resize=None))
    else:
        fields = {"model": "resnet50", **fields}
        fields = {"image_size": str(USUAL_IMAGE_SIZE.get(str(fields["model"]), 224)), **fields}
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
            f"{result['data_fraction']:.1%} of the time; the input alone gives {result['input_images_per_s']:.1f} img/s"
        )
