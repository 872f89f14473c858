"""`knltrain predict`: parsing and printing only. Loads no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from knltrain import config as configuration
from knltrain.cli.options import (
    JSON,
    comma_list,
    config_of_recipe,
    field_options,
    given_fields,
    positive,
    reports_errors,
)
from knltrain.errors import ConfigError
from knltrain.files import naming

if TYPE_CHECKING:
    from knltrain.predict.run import Job, Prediction
    from knltrain.runlog.console import Console

_ALGORITHMS = ("oneccl", "mpi", "ring", "direct", "halving-doubling", "recursive-doubling", "two-level")
_FIELDS = ("model", "image_size", "epochs", "max_steps", "global_batch", "local_batch", "precision", "comm.dtype",
           "comm.bucket_mb")  # fmt: skip
_SHORT = {"comm.dtype": "--dtype", "comm.bucket_mb": "--bucket-mb"}
# Flags from before there were subcommands: --validate is `predict validate`, with the options of that subcommand.
_ALIASES = ("validate", "accounting", "calibrate")
_ALIAS_OPTIONS = (*_ALIASES, "bench", "allreduce")

_RECIPE = click.option("--recipe", metavar="NAME", help="What to train; `knltrain recipes` lists them.")
_NODES = click.option("--nodes", metavar="N,...", help="How many nodes; several: a line for each.")
_IMAGES = click.option("--images", type=click.IntRange(min=1), metavar="N",
                       help="Training images; default ImageNet's, of small networks CIFAR-10's.")  # fmt: skip


@click.group(invoke_without_command=True)
@_RECIPE
@_NODES
@click.option("--system", metavar="NAME|FILE", help="Machine to predict for: one of the package's, or a TOML file.")
@click.option("--batches", metavar="B,...", help="Global batches; a line for each with each number of nodes.")
@click.option("--network-factor", type=float, default=1.0, show_default=True, help="2: a network twice as fast.")
@click.option("--algorithm", type=click.Choice(_ALGORITHMS), help="All-reduce algorithm; default the system's.")
@click.option("--no-overlap", is_flag=True, help="Send gradients after the backward pass, not during it.")
@_IMAGES
@click.option("--layers", metavar="FILE", help="Times of layers: JSON of `knltrain bench --profile` on such a node.")
@click.option("--out", metavar="DIR", help="Folder for step.png and scaling.png.")
@click.option("--validate", is_flag=True, hidden=True)
@click.option("--accounting", is_flag=True, hidden=True)
@click.option("--calibrate", is_flag=True, hidden=True)
@click.option("--bench", multiple=True, hidden=True)
@click.option("--allreduce", hidden=True)
@JSON
@field_options(*_FIELDS, short=_SHORT)
@click.pass_context
@reports_errors
def predict(
    context: click.Context, recipe: str | None, nodes: str | None, system: str | None, batches: str | None,
    network_factor: float, algorithm: str | None, no_overlap: bool, images: int | None, layers: str | None,
    out: str | None, as_json: bool, **values: Any,
) -> None:  # fmt: skip
    """Say how long a run will take on so many nodes of a machine, where the time goes, and what to change."""
    if _run_subcommand(context):
        return
    fields = given_fields({name: value for name, value in values.items() if name not in _ALIAS_OPTIONS})
    if batches and "global_batch" in fields:
        raise ConfigError("--batches with --global-batch: give the one or the other")
    config, counts = _config_and_nodes(recipe, nodes, fields)

    from knltrain.predict.run import Job
    from knltrain.predict.systems import load, names
    from knltrain.runlog.console import Console

    if system is None:
        raise ConfigError(f"--system: give {', '.join(names())} or a TOML file")
    job = Job(config=config, system=load(system), nodes=counts[0], network_factor=network_factor,
              algorithm=algorithm, overlap=not no_overlap, images=images,
              profile=_profile(layers) if layers else None)  # fmt: skip
    sizes = comma_list("--batches", batches, positive) if batches else [config.global_batch]
    result = _predict(Console(json=as_json), job, counts, sizes, Path(out) if out else None)
    if as_json:
        click.echo(json.dumps(result))


@predict.command()
@JSON
@reports_errors
def validate(as_json: bool) -> None:
    """Compare the model with published runs."""
    from knltrain.predict.published import RUNS
    from knltrain.predict.published import validate as compare
    from knltrain.predict.systems import load
    from knltrain.predict.tables import validation_table
    from knltrain.runlog.console import Console
    from knltrain.runlog.tables import print_table, print_text

    console = Console(json=as_json)
    rows = compare()
    print_table(console, validation_table(rows))
    for name in dict.fromkeys(run.system for run in RUNS):
        print_text(console, f"{name}: fitted {load(name).fitted}")
    for row in rows:
        print_text(console, f"{row['run']}: {row['source']}; assumed: {row['assumed']}")
    if as_json:
        click.echo(json.dumps(rows))


@predict.command()
@_RECIPE
@_NODES
@click.option("--batches", metavar="B,...", help="Global batches; default 512 to 65,536.")
@_IMAGES
@JSON
@field_options("model", "image_size", "epochs", "comm.dtype", short=_SHORT)
@reports_errors
def accounting(
    recipe: str | None, nodes: str | None, batches: str | None, images: int | None, as_json: bool, **values: str | None
) -> None:
    """Count iterations, messages and bytes of a run against the batch."""
    from knltrain.predict.run import images_for
    from knltrain.runlog.console import Console

    config, counts = _config_and_nodes(recipe, nodes, given_fields(values))
    sizes = comma_list("--batches", batches, positive) if batches else None
    rows = _accounting(Console(json=as_json), config, counts, sizes, images or images_for(config.model)[0])
    if as_json:
        click.echo(json.dumps(rows))


@predict.command()
@click.option("--bench", multiple=True, metavar="FILE", help="JSON of `knltrain bench` or perf/roofline.py.")
@click.option("--allreduce", metavar="FILE", help="JSON of perf/allreduce.py.")
@click.option("--out", metavar="FILE", help="TOML file to write; its name becomes the system's.")
@JSON
@reports_errors
def calibrate(bench: tuple[str, ...], allreduce: str | None, out: str | None, as_json: bool) -> None:
    """Write a system file from measurements of this machine."""
    from knltrain.predict.calibrate import calibrate as fit
    from knltrain.runlog.console import Console

    if not bench or allreduce is None or out is None:
        raise ConfigError(
            "calibrate: give --bench FILE of `knltrain bench --json`, --allreduce FILE of perf/allreduce.py and "
            "--out SYSTEM.toml"
        )
    path = Path(out)
    if path.suffix != ".toml":
        raise ConfigError(f"--out {out}: a system is a file that ends in .toml")
    if path.exists():
        raise ConfigError(f"--out {out} is there already; give another name, or delete it")
    text = fit([Path(one) for one in bench], Path(allreduce), path.stem)
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        path.write_text(text, "utf-8")
    Console(json=as_json).line(f"{out}: use it with --system {out}; the link's figures are yours to check")
    if as_json:
        click.echo(json.dumps({"out": out, "system": text}))


def _run_subcommand(context: click.Context) -> bool:
    """Runs the subcommand that an alias such as --validate stands for; click runs one that is named.

    Returns:
        Whether there is a subcommand of either kind.

    Raises:
        ConfigError: an option that the subcommand does not take, or two aliases.
    """
    options = [
        option for option in predict.params
        if option.name and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
    ]  # fmt: skip
    flags = [option.opts[0] for option in options]
    if name := context.invoked_subcommand:
        if flags:
            raise ConfigError(f"{' '.join(flags)} before {name}: give options after it, `knltrain predict {name} ...`")
        return True
    aliases = [flag for flag in flags if flag.removeprefix("--") in _ALIASES]
    if len(aliases) > 1:
        raise ConfigError(f"{aliases[0]} with {' '.join(aliases[1:])}: ask for one at a time")
    command = predict.commands[aliases[0].removeprefix("--")] if aliases else predict
    known = {option.name for option in command.params} - (set() if aliases else set(_ALIAS_OPTIONS))
    useless = [option.opts[0] for option in options if option.name not in known and option.opts[0] not in aliases]
    if useless:
        why = f"with {aliases[0]}" if aliases else "without --calibrate"
        raise ConfigError(f"{' '.join(sorted(useless))} has no effect {why}")
    if aliases:
        context.invoke(command, **{name: value for name, value in context.params.items() if name in known})
    return bool(aliases)


def _config_and_nodes(
    recipe: str | None, nodes: str | None, fields: dict[str, str]
) -> tuple[configuration.RunConfig, Sequence[int]]:
    if recipe is None or nodes is None:
        raise ConfigError("give --recipe NAME (`knltrain recipes` lists them) and --nodes N")
    return configuration.override(config_of_recipe(recipe), fields), comma_list("--nodes", nodes, positive)


def _profile(path: str) -> dict[str, Any]:
    try:
        profile = json.loads(Path(path).read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"--layers {path}: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"--layers {path}: not JSON; `knltrain bench --profile --json` prints it last") from None
    if not isinstance(profile, dict):
        raise ConfigError(f"--layers {path}: not what `knltrain bench --profile --json` prints")
    return profile


def _predict(
    console: Console, job: Job, nodes: Sequence[int], batches: Sequence[int], out: Path | None
) -> dict[str, Any]:
    from knltrain.predict.advice import advise, doublings, largest_useful
    from knltrain.predict.run import predict as run
    from knltrain.predict.tables import scaling_table, step_table, summary
    from knltrain.runlog.tables import print_table, print_text

    grid = [
        run(dataclasses.replace(job, nodes=count, config=dataclasses.replace(job.config, global_batch=batch)))
        for batch in batches
        for count in nodes
    ]
    first = grid[0]
    scan = doublings(first.job)
    advice = advise(first, scan)
    for line in summary(first):
        print_text(console, line)
    print_table(console, step_table(first))
    around = [one for one in scan if one.job.nodes >= first.job.nodes / 8 and one.job.nodes <= 8 * first.job.nodes]
    several = grid if len(grid) > 1 else around or grid
    print_table(console, scaling_table(several))
    for line in advice:
        print_text(console, line)
    if out is not None:
        from knltrain.predict.draw import draw_scaling, draw_step

        out.mkdir(parents=True, exist_ok=True)
        draw_step(first, out / "step.png")
        draw_scaling(grid if len(grid) > 1 else scan or grid, out / "scaling.png")
        console.line(f"{out}/step.png, {out}/scaling.png")
    return {**_as_dict(first), "advice": advice, "largest_useful_nodes": largest_useful(scan) if scan else None,
            "grid": [_as_dict(one) for one in grid], "doublings": [_as_dict(one) for one in scan]}  # fmt: skip


def _as_dict(one: Prediction) -> dict[str, Any]:
    """A prediction as JSON types."""
    job, step = one.job, one.step
    return {
        "recipe": job.config.recipe, "model": job.config.model, "system": job.system.name, "nodes": job.nodes,
        "ranks": job.ranks, "global_batch": job.config.global_batch, "local_batch": one.local_batch,
        "accumulate": one.accumulate, "precision": job.precision, "comm_dtype": job.config.comm.dtype,
        "bucket_mb": job.config.comm.bucket_mb_of(job.ranks), "steps": one.steps, "total_s": one.total_s,
        "evaluation_s": one.evaluation_s, "checkpoint_s": one.checkpoint_s, "images_per_s": one.images_per_s,
        "one_node_images_per_s": one.one_node_images_per_s, "efficiency": one.efficiency,
        "node_hours": one.node_hours, "usd": one.usd, "kwh": one.kwh,
        "step": {"seconds": step.seconds, "input_s": step.input_s, "forward_s": step.forward_s,
                 "backward_s": step.backward_s, "straggler_s": step.straggler_s, "exposed_s": step.exposed_s,
                 "optimizer_s": step.optimizer_s, "on_wire_s": step.on_wire_s, "buckets": list(step.sizes),
                 "bytes_sent": step.bytes_sent, "messages": step.messages},
    }  # fmt: skip


def _accounting(
    console: Console, config: configuration.RunConfig, nodes: Sequence[int], batches: Sequence[int] | None, images: int
) -> list[dict[str, Any]]:
    from knltrain.predict.accounting import BATCHES, accounting_by_phase
    from knltrain.predict.accounting import accounting as accounting_by_batch
    from knltrain.predict.tables import accounting_table, phases_table
    from knltrain.runlog.tables import print_table

    changes = bool(config.schedule.image_sizes or config.schedule.batches)
    if changes and batches:
        raise ConfigError(f"--batches: the schedule of {config.recipe} changes batch or image size; leave it out")
    itemsize = 2 if config.comm.dtype == "bf16" else 4
    found: list[dict[str, Any]] = []
    for count in nodes:
        epochs = configuration.as_typed(config.epochs)
        title = f"{config.model}, {epochs} epochs on {count:,} nodes, gradients in {config.comm.dtype}"
        if changes:
            rows = accounting_by_phase(config, nodes=count, images=images)
            table = phases_table(rows, title)
        else:
            rows = accounting_by_batch(config.model, image_size=config.image_size, epochs=config.epochs, nodes=count,
                                       batches=batches or BATCHES, images=images, itemsize=itemsize)  # fmt: skip
            table = accounting_table(rows, title)
        print_table(console, table)
        found += [{"nodes": count, **row} for row in rows]
    return found
