"""The verbs about the machine: nothing but parsing and printing, and nothing that loads torch."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import sys
from pathlib import Path

import click

from knltrain.cli.options import FAILED, JSON, comma_list, reports_errors
from knltrain.errors import ConfigError

_RUN_BY_RANKS = ("train", "eval")


@click.command()
@click.option(
    "--ranks-per-node", type=click.IntRange(min=1), help="Default what tune measured, or one per NUMA domain."
)
@click.option("--topology", metavar="DIR", help="Plan for another node: DIR holds copies of files of its sys and proc.")
@click.option(
    "--format", type=click.Choice(["text", "json", "env", "mpiexec", "slurm"]), default="text", show_default=True,
    help="text: a picture; env: lines for a shell; mpiexec: its arguments; slurm: lines of a batch script.",
)  # fmt: skip
@JSON
@reports_errors
def plan(ranks_per_node: int | None, topology: str | None, format: str, as_json: bool) -> None:
    """Show which rank gets which cores of this node, and where its threads, decoders and memory are."""
    from knltrain.launch.mpiexec import openmpi_arguments
    from knltrain.node import plan_formats
    from knltrain.node.topology import read_node
    from knltrain.node.tuned_plan import tuned_plan

    root = Path(topology or "/")
    if not any((root / name).is_dir() for name in ("sys", "proc")):
        raise ConfigError(f"{root}: no folder sys or proc in it; docs/clusters.md says how to copy those of a node")
    node = read_node(root)
    planned = tuned_plan(node, ranks_per_node)
    if format == "text":
        click.echo(plan_formats.as_text(node, planned), err=as_json)
    elif format == "env":
        click.echo(plan_formats.as_env(planned), err=as_json)
    elif format == "mpiexec":
        click.echo(plan_formats.as_mpiexec(planned), err=as_json)
        click.echo(f"with Open MPI: {' '.join(openmpi_arguments(len(planned.ranks)))}", err=True)
    elif format == "slurm":
        click.echo(plan_formats.as_slurm(node, planned), err=as_json)
    elif not as_json:
        click.echo(json.dumps(plan_formats.as_dict(node, planned), indent=2))
    if as_json:
        click.echo(json.dumps(plan_formats.as_dict(node, planned)))


_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan", "ok": "green"}


@click.command()
@click.option("--data", metavar="DIR", help="Try this data folder as well: how fast it opens, reads and decodes.")
@JSON
@reports_errors
def doctor(data: str | None, as_json: bool) -> None:
    """Say what is wrong with this node, what it costs, and what to do about it.

    Exit code 1 with an error among the findings, 0 otherwise: a warning is no failure.
    """
    from knltrain.doctor import examine
    from knltrain.doctor.finding import SEVERITIES, as_row, worst, worst_first

    if sys.stderr.isatty():
        click.echo("trying torch and two ranks takes some seconds", err=True)
    findings = worst_first(examine(Path(data) if data else None))
    for finding in findings:
        row = as_row(finding)
        label = click.style(finding.severity, _COLOURS[finding.severity])
        click.echo(label + row.removeprefix(finding.severity), err=as_json)
    counts = [(sum(finding.severity == severity for finding in findings), severity) for severity in SEVERITIES]
    click.echo(f"{platform.node()}: {', '.join(f'{count} {severity}' for count, severity in counts)}", err=as_json)
    if as_json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        click.echo(json.dumps({"host": platform.node(), "worst": worst(findings), "findings": rows}))
    if worst(findings) == "error":
        sys.exit(FAILED)


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("-n", "ranks", metavar="RANKS", type=click.IntRange(min=1), help="Ranks in all; default --ppn per node.")
@click.option("--ppn", type=click.IntRange(min=1), help="Ranks per node; default what plan has for this one.")
@click.option("--hosts", metavar="A,B,...", help="Nodes; default this one, or those of the Slurm job.")
@click.option("--dry-run", is_flag=True, help="Print the line and start nothing.")
@JSON
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="-- train ...")
@reports_errors
def launch(
    ranks: int | None, ppn: int | None, hosts: str | None, dry_run: bool, as_json: bool, arguments: tuple[str, ...]
) -> None:
    """Start ranks with the mpiexec there is (Intel MPI, MPICH or Open MPI); each takes its place by the plan."""
    from knltrain.launch.mpiexec import command_line, count_ranks, find_mpiexec
    from knltrain.node.topology import read_node
    from knltrain.node.tuned_plan import tuned_plan

    if not arguments or arguments[0] not in _RUN_BY_RANKS:
        raise ConfigError("nothing to launch: end with -- and what every rank runs, as in `-- train --recipe NAME`")
    if as_json and not dry_run:
        raise ConfigError("--json: only --dry-run has a result; for that of the training, give --json after `train`")
    names = list(comma_list("--hosts", hosts, str)) if hosts else []
    mpiexec = find_mpiexec()
    nodes = len(names) or int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    ranks, ppn = count_ranks(ranks, ppn, nodes, len(tuned_plan(read_node()).ranks))
    program = [sys.executable, "-m", "knltrain", *arguments]
    environment = {**os.environ, **mpiexec.environment}
    line = command_line(mpiexec, ranks, ppn, names, program, environment)
    text = shlex.join([*(f"{name}={value}" for name, value in mpiexec.environment.items()), *line])
    # What is started may end its own output with JSON.
    click.echo(text, err=as_json or not dry_run)
    if as_json:
        click.echo(json.dumps({"command": line, "environment": dict(mpiexec.environment), "mpi": mpiexec.kind,
                               "ranks": ranks, "ranks_per_node": ppn, "hosts": names}))  # fmt: skip
    if not dry_run:
        # In our place: signals reach mpiexec, which passes them on, its exit code is ours, and nothing stays behind.
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(line[0], line, environment)
