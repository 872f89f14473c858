"""The verb that foresees: nothing but parsing and printing, and nothing that loads torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from knltrain import config as configuration
from knltrain.cli.options import JSON, comma_list, field_options, given, positive, recipe_named, reports_errors
from knltrain.errors import ConfigError

if TYPE_CHECKING:
    from knltrain.predict.run import Job, Prediction
    from knltrain.runlog.console import Console

_ALGORITHMS = ("oneccl", "mpi", "ring", "direct", "halving-doubling", "recursive-doubling", "two-level")
_FIELDS = ("model", "image_size", "epochs", "max_steps", "global_batch", "local_batch", "precision", "comm.dtype",
           "comm.bucket_mb")  # fmt: skip


@click.command()
@click.option("--recipe", metavar="NAME", help="What to train; `knltrain recipes` lists them.")
@click.option("--nodes", metavar="N,...", help="How many nodes; several: a line for each.")
@click.option("--system", metavar="NAME|FILE", help="Of which machine: one that comes along, or a TOML file.")
@click.option("--batches", metavar="B,...", help="Global batches; a line for each with each number of nodes.")
@click.option("--network-factor", type=float, default=1.0, show_default=True, help="2: a network twice as fast.")
@click.option("--algorithm", type=click.Choice(_ALGORITHMS), help="Of the all-reduce; default the system's.")
@click.option("--no-overlap", is_flag=True, help="Gradients leave when the backward pass is over, as others have it.")
@click.option("--images", type=click.IntRange(min=1),
              help="Of the training set; default ImageNet's, or CIFAR-10's for networks of small images.")  # fmt: skip
@click.option("--layers", metavar="FILE", help="Times of layers: JSON of `knltrain bench --profile` on such a node.")
@click.option("--out", metavar="FILE|DIR", help="DIR for step.png and scaling.png; with --calibrate the TOML file.")
@click.option("--validate", is_flag=True, help="Show what the model says of published runs, and do nothing else.")
@click.option("--accounting", is_flag=True, help="Show iterations, messages and bytes against the batch instead.")
@click.option("--calibrate", is_flag=True, help="Write a system from --bench and --allreduce, measured here.")
@click.option("--bench", multiple=True, metavar="FILE", help="JSON of `knltrain bench` or perf/roofline.py.")
@click.option("--allreduce", metavar="FILE", help="JSON of perf/allreduce.py.")
@JSON
@field_options(*_FIELDS, short={"comm.dtype": "--dtype", "comm.bucket_mb": "--bucket-mb"})
@reports_errors
def predict(
    recipe: str | None, nodes: str | None, system: str | None, batches: str | None, out: str | None,
    validate: bool, accounting: bool, calibrate: bool, bench: tuple[str, ...], allreduce: str | None, as_json: bool,
    network_factor: float, algorithm: str | None, no_overlap: bool, images: int | None, layers: str | None,
    **values: str | None,
) -> None:  # fmt: skip
    """Say how long a run will take on so many nodes of a machine, where the time goes, and what to change."""
    from knltrain.runlog.console import Console

    console = Console(json=as_json)
    what = {"--recipe": recipe, "--nodes": nodes, "--system": system, "--batches": batches, "--algorithm": algorithm,
            "--images": images, "--layers": layers, "--out": out, "--bench": bench, "--allreduce": allreduce,
            "--network-factor": network_factor != 1, "--no-overlap": no_overlap,
            **{f"--{name.replace('_', '-')}": value for name, value in given(values).items()}}  # fmt: skip
    asked = {name for name, value in what.items() if value}
    mode = _mode(validate=validate, accounting=accounting, calibrate=calibrate)
    if useless := asked - _takes(mode):
        raise ConfigError(
            f"{' '.join(sorted(useless))} has no effect {f'with {mode}' if mode else 'without --calibrate'}"
        )
    if batches and values["global_batch"]:
        raise ConfigError("--batches with --global-batch: give the one or the other")
    result: Any
    if mode == "--validate":
        result = _validate(console)
    elif mode == "--calibrate":
        result = _calibrate(console, bench, allreduce, out)
    else:
        if recipe is None or nodes is None:
            raise ConfigError("give --recipe NAME (`knltrain recipes` lists them) and --nodes N")
        config = configuration.override(recipe_named(recipe), given(values))
        counts = list(comma_list("--nodes", nodes, positive))
        if mode == "--accounting":
            result = _accounting(
                console, config, counts, list(comma_list("--batches", batches, positive)) if batches else None, images
            )
        else:
            from knltrain.predict.run import Job
            from knltrain.predict.systems import load, names

            if system is None:
                raise ConfigError(f"--system: give {', '.join(names())} or a TOML file")
            job = Job(config=config, system=load(system), nodes=counts[0], network_factor=network_factor,
                      algorithm=algorithm, overlap=not no_overlap, images=images,
                      profile=_profile(layers) if layers else None)  # fmt: skip
            sizes = list(comma_list("--batches", batches, positive)) if batches else [config.global_batch]
            result = _predict(console, job, counts, sizes, Path(out) if out else None)
    if as_json:
        click.echo(json.dumps(result))


def _mode(**flags: bool) -> str:
    """The one of the modes that was asked for, or nothing."""
    chosen = [f"--{name}" for name, on in flags.items() if on]
    if len(chosen) > 1:
        raise ConfigError(f"{chosen[0]} with {' '.join(chosen[1:])}: ask for one at a time")
    return chosen[0] if chosen else ""


def _takes(mode: str) -> set[str]:
    fields = {f"--{name.replace('_', '-')}" for name in _FIELDS}
    return {
        "": {"--recipe", "--nodes", "--system", "--batches", "--algorithm", "--images", "--layers", "--out",
             "--network-factor", "--no-overlap", *fields},
        "--validate": set(),
        "--accounting": {"--recipe", "--nodes", "--batches", "--images", "--model", "--image-size", "--epochs",
                         "--comm.dtype"},
        "--calibrate": {"--bench", "--allreduce", "--out"},
    }[mode]  # fmt: skip


def _profile(path: str) -> dict[str, Any]:
    try:
        profile = json.loads(Path(path).read_text("utf-8"))
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


def _validate(console: Console) -> list[dict[str, Any]]:
    from knltrain.predict.published import RUNS, validate
    from knltrain.predict.systems import load
    from knltrain.predict.tables import validation_table
    from knltrain.runlog.tables import print_table, print_text

    rows = validate()
    print_table(console, validation_table(rows))
    for name in dict.fromkeys(run.system for run in RUNS):
        print_text(console, f"{name}: fitted {load(name).fitted}")
    for row in rows:
        print_text(console, f"{row['run']}: {row['source']}; assumed: {row['assumed']}")
    return rows


def _accounting(
    console: Console, config: configuration.RunConfig, nodes: Sequence[int], batches: Sequence[int] | None,
    images: int | None,
) -> list[dict[str, Any]]:  # fmt: skip
    from knltrain.predict.accounting import BATCHES, accounting, course
    from knltrain.predict.run import images_for
    from knltrain.predict.tables import accounting_table, course_table
    from knltrain.runlog.tables import print_table

    images = images or images_for(config.model)[0]
    found: list[dict[str, Any]] = []
    if config.schedule.image_sizes or config.schedule.batches:
        if batches:
            raise ConfigError(f"--batches: {config.recipe} changes batch or image size in its course; leave it out")
        for count in nodes:
            rows = course(config, nodes=count, images=images)
            title = f"{config.model}, {config.epochs:g} epochs on {count:,} nodes, gradients in {config.comm.dtype}"
            print_table(console, course_table(rows, title))
            found += [{"nodes": count, **row} for row in rows]
        return found
    itemsize = 2 if config.comm.dtype == "bf16" else 4
    for count in nodes:
        rows = accounting(config.model, image_size=config.image_size, epochs=config.epochs, nodes=count,
                          batches=batches or BATCHES, images=images, itemsize=itemsize)  # fmt: skip
        title = f"{config.model}, {config.epochs:g} epochs on {count:,} nodes, gradients in {config.comm.dtype}"
        print_table(console, accounting_table(rows, title))
        found += [{"nodes": count, **row} for row in rows]
    return found


def _calibrate(console: Console, bench: Sequence[str], allreduce: str | None, out: str | None) -> dict[str, Any]:
    if not bench or allreduce is None or out is None:
        raise ConfigError(
            "--calibrate: give --bench FILE of `knltrain bench --json`, --allreduce FILE of perf/allreduce.py and "
            "--out SYSTEM.toml"
        )
    from knltrain.predict.calibrate import calibrate

    path = Path(out)
    if path.suffix != ".toml":
        raise ConfigError(f"--out {out}: a system is a file that ends in .toml")
    if path.exists():
        raise ConfigError(f"--out {out} is there already; give another name, or delete it")
    text = calibrate([Path(one) for one in bench], Path(allreduce), path.stem)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    console.line(f"{out}: use it with --system {out}; the link's figures are yours to check")
    return {"out": out, "system": text}
