"""The verbs about the machine: nothing but parsing and printing, and nothing that loads torch."""

from __future__ import annotations

import json
from pathlib import Path

import click

from knltrain.command import JSON, reports_errors
from knltrain.errors import ConfigError


@click.command()
@click.option("--ranks-per-node", type=click.IntRange(min=1), help="Default one per NUMA domain with cores.")
@click.option("--topology", metavar="DIR", help="Plan for another node: DIR holds copies of files of its sys and proc.")
@click.option(
    "--format", type=click.Choice(["text", "json", "env", "mpiexec", "slurm"]), default="text", show_default=True,
    help="text: a picture; env: lines for a shell; mpiexec: its arguments; slurm: lines of a batch script.",
)  # fmt: skip
@JSON
@reports_errors
def plan(ranks_per_node: int | None, topology: str | None, format: str, as_json: bool) -> None:
    """Show which rank gets which cores of this node, and where its threads, decoders and memory are."""
    from knltrain.node import picture
    from knltrain.node.affinity import plan_node
    from knltrain.node.topology import read_node

    root = Path(topology or "/")
    if not any((root / name).is_dir() for name in ("sys", "proc")):
        raise ConfigError(f"{root}: no folder sys or proc in it; docs/clusters.md says how to copy those of a node")
    node = read_node(root)
    planned = plan_node(node, ranks_per_node)
    if format == "text":
        click.echo(picture.as_text(node, planned), err=as_json)
    elif format == "env":
        click.echo(picture.as_env(planned), err=as_json)
    elif format == "mpiexec":
        click.echo(picture.as_mpiexec(planned), err=as_json)
        click.echo(f"with Open MPI: {picture.as_openmpi(len(planned.ranks))}", err=True)
    elif format == "slurm":
        click.echo(picture.as_slurm(node, planned), err=as_json)
    elif not as_json:
        click.echo(json.dumps(picture.as_dict(node, planned), indent=2))
    if as_json:
        click.echo(json.dumps(picture.as_dict(node, planned)))
