"""The command: one subcommand per verb, nothing but parsing and printing.

Only what parsing needs is imported here; torch is loaded by the verb that computes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import click

import knltrain
from knltrain import config as configuration
from knltrain.cli.node import doctor, launch, plan
from knltrain.cli.options import JSON, STOPPED, reports_errors
from knltrain.cli.options import field_options as _field_options
from knltrain.cli.options import given as _given
from knltrain.cli.options import recipe_named as _recipe
from knltrain.cli.predict import predict
from knltrain.cli.report import report
from knltrain.cli.sweep import sweep
from knltrain.config import EngineName, Precision, RunConfig
from knltrain.config.checks import after_the_end, without_effect
from knltrain.errors import ConfigError
from knltrain.recipes import RECIPES, SOURCES

_CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
    # Fields are written with underscores in files; on the command line both spellings are the same option.
    "token_normalize_func": lambda token: token.replace("_", "-"),
}


@click.group(context_settings=_CONTEXT)
@click.version_option(knltrain.__version__, prog_name="knltrain")
def main() -> None:
    """Large-batch ImageNet training with LARS on clusters of many-core CPUs."""


main.add_command(plan)
main.add_command(doctor)
main.add_command(launch)
main.add_command(predict)
main.add_command(sweep)
main.add_command(report)

_NO_STRICT = click.option(
    "--no-strict-affinity", is_flag=True, help="Run on fewer cores than planned, where these are all there are."
)


def _take_place(*, strict: bool) -> Any:
    """Moves this rank to its cores, which must come before torch is loaded."""
    from knltrain.launch.placement import take_place

    place = take_place(strict=strict)
    for problem in place.warnings:
        # What is so of a node is said once on each, what is so of a rank by itself.
        if place.ranks.local_rank == 0 or f"rank {place.ranks.rank} " in problem:
            click.echo(f"warning: {problem}", err=True)
    return place


@main.command()
@click.option("--recipe", metavar="NAME", help="Recipe to start from; `knltrain recipes` lists them.")
@click.option("--config", "file", metavar="FILE", help="TOML file of fields; overrides the recipe.")
@click.option("--allow-change", metavar="FIELD,...",
              help="Go on with a run although these fields are others than it began with.")  # fmt: skip
@_NO_STRICT
@JSON
@_field_options()
@reports_errors
def train(
    recipe: str | None, file: str | None, allow_change: str | None, no_strict_affinity: bool, as_json: bool,
    **values: str | None,
) -> None:  # fmt: skip
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
    config = configuration.override(config, {**from_file, **flags})
    allowed = configuration.names(allow_change) if allow_change is not None else frozenset()

    place = _take_place(strict=not no_strict_affinity)

    from knltrain.runlog.console import Console

    console = Console(json=as_json, silent=place.ranks.rank != 0)
    changed = {*flags, *from_file}
    if recipe and "global_batch" in changed and "optim.lr" not in changed and config.optim.lr_scaling == "none":
        console.warn(
            f"global batch {config.global_batch:,} with the learning rate {config.optim.lr:g} that {recipe} gives for "
            f"{RECIPES[recipe].config().global_batch:,}; --optim.lr sets another"
        )

    for complaint in [*without_effect(config, changed), *after_the_end(config)]:
        console.warn(complaint)

    from knltrain.training.trainer import train as run

    summary, finished = run(config, console, place, allow_change=allowed)
    if not finished:
        when = f"after step {summary['steps']:,}" if summary else "before the first step"
        without = " without --resume never" if config.resume == "never" else ""
        console.line(f"stopped by a signal {when}; the same command{without} goes on from there")
        if as_json and place.ranks.rank == 0:
            click.echo(json.dumps(summary or {"finished": False}))
        sys.exit(STOPPED)
    if summary:
        console.line(
            f"top-1 {_percent(summary['top1'])} (best {_percent(summary['best_top1'])})"
            + (
                f", {summary['images_per_s']:.0f} img/s, {summary['data_fraction']:.1%} waiting for data"
                if summary["images_per_s"] is not None  # nothing was left but an evaluation
                else ""
            )
            + f"; {summary['out']}/curves.png"
        )
        if as_json:
            click.echo(json.dumps(summary))


# What a checkpoint says of itself, as does what `export` makes of it, but no other file of weights.
_OF_A_FILE = ("model", "image_size", "augment.resize")


@main.command(name="eval")
@click.argument("checkpoint")
@_NO_STRICT
@JSON
@_field_options("data", "precision", "force_bf16", "workers", "on_bad", *_OF_A_FILE)
@reports_errors
def evaluate(checkpoint: str, no_strict_affinity: bool, as_json: bool, **values: str | None) -> None:
    """Evaluate CHECKPOINT (or the newest one of a run's folder) on the val part of --data.

    CHECKPOINT may be a file of weights too: what `knltrain export` wrote as safetensors says what it is of; of another
    one, safetensors or a state dict as torchvision has it, --model names the network.
    """
    from pathlib import Path

    fields, classes = _given(values), None
    useless = [f"--{name.replace('_', '-')}" for name in _OF_A_FILE if name in fields]
    if Path(checkpoint).is_file():
        fields, classes = _of_a_file(checkpoint, fields)
    elif useless:
        raise ConfigError(f"{useless[0]} has no effect on {checkpoint}: a checkpoint says what it is of; leave it out")
    config = configuration.override(RunConfig(), fields)

    place = _take_place(strict=not no_strict_affinity)

    from knltrain.runlog.console import Console
    from knltrain.training.evaluate import evaluate_checkpoint

    first = place.ranks.rank == 0
    console = Console(json=as_json, silent=not first)
    result = evaluate_checkpoint(Path(checkpoint), config, console, place, classes=classes)
    console.line(
        f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f} over "
        f"{result['images']:,} images, {result['images_per_s']:.0f} img/s"
    )
    if as_json and first:
        click.echo(json.dumps(result))


def _of_a_file(path: str, given: dict[str, str]) -> tuple[dict[str, str], Sequence[str] | None]:
    """The fields with which a file of weights is evaluated, and the names of its classes where it has them."""
    from pathlib import Path

    from knltrain.weights.metadata import about

    said = about(Path(path))
    if said is None:
        if "model" not in given:
            raise ConfigError(f"{path}: --model must name the network that these weights are of")
        size = _USUAL_SIZE.get(given["model"], 224)
        # Pictures as small as these are not cropped when they are evaluated.
        whole = {"augment.resize": str(size)} if size <= 32 and "image_size" not in given else {}
        return {"image_size": str(size), **whole, **given}, None
    if given.get("model", said.model) != said.model:
        raise ConfigError(f"--model {given['model']}: {path} says that it is of {said.model}; leave it out")
    fields = {"model": said.model}
    if "image_size" not in given:
        fields |= {"image_size": str(said.image_size), "augment.resize": str(said.resize)}
    return {**fields, **given}, said.classes


@main.command()
@click.argument("checkpoint")
@click.argument("dst")
@click.option("--format", type=click.Choice(["safetensors", "pth", "onnx", "pt2"]),
              help="State dict, ONNX or torch.export; default what the suffix of DST says.")  # fmt: skip
@JSON
@reports_errors
def export(checkpoint: str, dst: str, format: str | None, as_json: bool) -> None:
    """Write the network of CHECKPOINT (or the newest one of a run's folder) to DST, for other programs.

    The file is read again before it is there: its logits have to be the network's.
    """
    from pathlib import Path

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


@main.command()
@click.argument("src", required=False)
@click.argument("dst", required=False)
@click.option("--format", type=click.Choice(["raw", "tar"]), default="raw", show_default=True,
              help="raw: pixels, read at memory speed; tar: JPEGs, a seventh of the size.")  # fmt: skip
@click.option("--size", type=click.IntRange(min=0, max=16384), default=256, show_default=True,
              help="Short side, pixels; raw images are squares of it. 0 with tar: images as they are.")  # fmt: skip
@click.option("--workers", type=click.IntRange(min=1, max=1024), help="Processes; default one per core.")
@click.option("--on-bad", type=click.Choice(["fail", "skip"]), default="fail", show_default=True,
              help="What an image that cannot be decoded means; DST/rejected.jsonl lists them.")  # fmt: skip
@click.option("--verify", metavar="DST", help="Compare a prepared folder with its checksums, and do nothing else.")
@JSON
@reports_errors
def prepare(
    src: str | None, dst: str | None, format: Literal["raw", "tar"], size: int, workers: int | None, on_bad: str,
    verify: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Pack the images of SRC into few large files in DST, as train's --data; decodes each once.

    SRC holds train/CLASS/IMAGE and val/CLASS/IMAGE, or WebDataset's train-*.tar and val-*.tar, or ImageNet's
    ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar with LOC_val_solution.csv or the devkit beside them.
    """
    from pathlib import Path

    from knltrain.data import prepare as preparing
    from knltrain.runlog.console import Console

    console = Console(json=as_json)
    if verify is not None:
        if src is not None:
            raise ConfigError("--verify with SRC: it reads what was written; give the one or the other")
        result = preparing.verify(Path(verify), console, workers=workers)
    else:
        if src is None or dst is None:
            raise ConfigError("give SRC, what to read, and DST, the folder to write; or --verify DST")
        result = preparing.prepare(
            Path(src), Path(dst), console, format=format, size=size, workers=workers, on_bad=on_bad
        )
        if result["images_per_s"]:
            counts = ", ".join(f"{count:,} {part}" for part, count in result["counts"].items())
            console.line(
                f"{dst}: {counts} images in {result['bytes'] / 1e9:.2f} GB, {result['rejected']:,} rejected; "
                f"{result['images_per_s']:,.0f} img/s"
            )
    if as_json:
        click.echo(json.dumps(result))


@main.command()
@click.argument("folder")
@click.option("--recipe", metavar="NAME", help="Show what this recipe's augmentation makes of the images.")
@click.option("--sheet", metavar="FILE", default="contact-sheet.png", show_default=True, help="The picture's file.")
@JSON
@_field_options("image_size", "augment.name", "augment.resize")
@reports_errors
def data(folder: str, recipe: str | None, sheet: str, as_json: bool, **values: str | None) -> None:
    """Say what a data FOLDER is, how fast it can be read, and draw a batch of it as the network sees it."""
    config = configuration.override(_recipe(recipe) if recipe else RunConfig(), _given(values))

    from pathlib import Path

    from knltrain.data.inspect import describe
    from knltrain.runlog.console import Console

    result = describe(Path(folder), Path(sheet), Console(json=as_json), config=config)
    if as_json:
        click.echo(json.dumps(result))


# What an image is to a network where nobody says: pixels, and images a step that are enough to keep it busy.
_USUAL_SIZE = {"alexnet": 227, "alexnet_bn": 227, "alexnet_bn_small": 32, "resnet20": 32}
_USUAL_BATCH = {"alexnet": 128, "alexnet_bn": 128, "alexnet_bn_small": 256, "resnet20": 256}


@main.command()
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
@_field_options("data", "conv", "fp32_precision", "force_bf16", "on_bad")
@JSON
@reports_errors
def bench(as_json: bool, steps: int, **options: Any) -> None:
    """Time training steps on this node, on noise or, with --data, through the whole input path."""
    swept = {name: _numbers(name, options.pop(name)) for name in ("batches", "threads")}
    out, compare, profile = (options.pop(name) for name in ("out", "compare", "profile"))
    _refuse_contradictions(options, swept, out=out, compare=compare, profile=profile)
    recipe, batch = options.pop("recipe"), options.pop("batch") or "32"
    config = _measured_config(recipe, global_batch=batch, **options)

    from pathlib import Path

    from knltrain.runlog.console import Console

    console = Console(json=as_json)
    for complaint in without_effect(config, _given(options)):
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


@main.command()
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


def _numbers(name: str, text: str | None) -> list[int]:
    """The positive numbers of a comma list; none where it was not given."""
    if text is None:
        return []
    numbers = [int(item) for item in text.split(",") if item.strip().isdecimal()]
    if len(numbers) < len(text.split(",")) or 0 in numbers:
        raise ConfigError(f"--{name} {text}: give positive numbers with commas between them, as in 8,16,32")
    return numbers


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
        config = _recipe(recipe)
        if "image_size" in fields:  # what images are scaled to before is not measured
            config = replace(config, augment=replace(config.augment, resize=None))
    else:
        fields = {"model": "resnet50", **fields}
        fields = {"image_size": str(_USUAL_SIZE.get(str(fields["model"]), 224)), **fields}
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


@main.command()
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


def _percent(value: float | None) -> str:
    return "not evaluated" if value is None else f"{value:.2f} %"
