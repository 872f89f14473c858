"""The commands about the node, ``plan``, ``doctor`` and ``launch``: parsing and printing only, without torch."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import sys
from pathlib import Path

import click

from knltrain.cli.options import JSON, reports_errors
from knltrain.errors import FAILED, ConfigError

_PARALLEL_COMMANDS = ("train", "eval")


@click.command()
@click.option(
    "--ranks-per-node", type=click.IntRange(min=1), help="Default: as measured by tune, or one per NUMA domain."
)
@click.option("--topology", metavar="DIR", help="Plan for another node, from copies of its sys and proc in DIR.")
@click.option(
    "--format", type=click.Choice(["text", "json", "env", "mpiexec", "slurm"]), default="text", show_default=True,
    help="text: a picture; env: lines for a shell; mpiexec: its arguments; slurm: lines of a batch script.",
)  # fmt: skip
@JSON
@reports_errors
def plan(ranks_per_node: int | None, topology: str | None, format: str, as_json: bool) -> None:
    """Show the placement of ranks on this node: their cores, threads, decoders and memory."""
    from knltrain.launch.mpiexec import openmpi_arguments
    from knltrain.launch.world import discover
    from knltrain.node import plan_formats
    from knltrain.node.topology import read_node, refuse_incomplete
    from knltrain.node.tuned_plan import tuned_plan

    root = Path(topology or "/")
    if not any((root / name).is_dir() for name in ("sys", "proc")):
        raise ConfigError(f"{root}: no folder sys or proc in it; docs/clusters.md says how to copy those of a node")
    node = read_node(root)
    if topology is not None:
        refuse_incomplete(root, node)
    planned = tuned_plan(node, ranks_per_node)
    ranks = discover() if topology is None else None  # a launcher here says nothing of another node
    launcher = {} if ranks is None else {"launcher": {"name": ranks.launcher, "rank": ranks.rank, "size": ranks.size}}
    result = {**plan_formats.as_dict(node, planned), **launcher}
    if format == "text":
        click.echo(plan_formats.as_text(node, planned), err=as_json)
        if ranks is not None:
            seen = f"{ranks.launcher}, rank {ranks.rank} of {ranks.size}" if ranks.size > 1 else ranks.launcher
            click.echo(f"launcher: {seen}", err=as_json)
    elif format == "env":
        click.echo(plan_formats.as_env(planned), err=as_json)
    elif format == "mpiexec":
        click.echo(plan_formats.as_mpiexec(planned), err=as_json)
        click.echo(f"with Open MPI: {' '.join(openmpi_arguments(len(planned.ranks)))}", err=True)
    elif format == "slurm":
        click.echo(plan_formats.as_slurm(node, planned), err=as_json)
    elif not as_json:
        click.echo(json.dumps(result, indent=2))
    if as_json:
        click.echo(json.dumps(result))


_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan", "ok": "green"}


@click.command()
@click.option("--data", metavar="DIR", help="Also check how fast this data folder opens, reads and decodes.")
@JSON
@reports_errors
def doctor(data: str | None, as_json: bool) -> None:
    """Check this node for problems, and show their effects and remedies.

    Exit code 1 if a finding is an error, 0 otherwise.
    """
    from knltrain.doctor import examine
    from knltrain.doctor.finding import SEVERITIES, as_row, worst, worst_first

    if sys.stderr.isatty():
        click.echo("checks with torch and two ranks take some seconds", err=True)
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
@click.option(
    "-n", "ranks", metavar="RANKS", type=click.IntRange(min=1), help="Total number of ranks; default --ppn per node."
)
@click.option("--ppn", type=click.IntRange(min=1), help="Ranks per node; default as in plan for this one.")
@click.option("--hosts", metavar="A,B,...", help="Nodes, also as node[001-004]; default those of the batch job, or "
                                                "this one.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only print the command.")
@JSON
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="-- train ...")
@reports_errors
def launch(
    ranks: int | None, ppn: int | None, hosts: str | None, dry_run: bool, as_json: bool, arguments: tuple[str, ...]
) -> None:
    """Start ranks with mpiexec (Intel MPI, MPICH or Open MPI); each binds itself according to the plan."""
    from knltrain.launch.allocation import read_allocation
    from knltrain.launch.environment import given
    from knltrain.launch.hosts import expand_hosts
    from knltrain.launch.mpiexec import command_line, count_ranks, find_mpiexec
    from knltrain.launch.world import discover
    from knltrain.node.topology import read_node
    from knltrain.node.tuned_plan import tuned_plan

    if not arguments or arguments[0] not in _PARALLEL_COMMANDS:
        raise ConfigError(
            "nothing to launch: end with -- and the command of every rank, as in `-- train --recipe NAME`"
        )
    if as_json and not dry_run:
        raise ConfigError("--json: only --dry-run has a result; for the result of training, give --json after `train`")
    started = discover()
    if started.size > 1:
        raise ConfigError(
            f"{started.launcher} has started {started.size} processes already, and each of them would start ranks: "
            f"have it start `knltrain {arguments[0]}` instead of `knltrain launch`"
        )
    if hosts is not None:
        job, names = None, list(expand_hosts(hosts, given_as="--hosts"))
    else:
        job = read_allocation(given())
        names = list(job.hosts) if job else []
    if job and not names and job.system == "Flux" and job.nodes != 1:
        raise ConfigError(
            f"mpiexec does not find the nodes of a Flux job: start ranks with {job.launcher} knltrain {arguments[0]} "
            "..., or name the nodes with --hosts"
        )
    mpiexec = find_mpiexec()
    nodes = len(names) or (job.nodes if job else 0) or 1
    ranks, ppn = count_ranks(ranks, ppn, nodes, len(tuned_plan(read_node()).ranks))
    program = [sys.executable, "-m", "knltrain", *arguments]
    environment = {**os.environ, **mpiexec.environment}
    line = command_line(mpiexec, ranks, ppn, names, program, environment)
    text = shlex.join([*(f"{name}={value}" for name, value in mpiexec.environment.items()), *line])
    # The started command may print JSON itself.
    click.echo(text, err=as_json or not dry_run)
    if as_json:
        click.echo(json.dumps({"command": line, "environment": dict(mpiexec.environment), "mpi": mpiexec.kind,
                               "ranks": ranks, "ranks_per_node": ppn, "hosts": names}))  # fmt: skip
    if not dry_run:
        # exec: signals reach mpiexec, which forwards them, and its exit code is that of this command.
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(line[0], line, environment)
