"""`knltrain report`: parsing and printing only."""

from __future__ import annotations

import json
from pathlib import Path

import click

from knltrain.cli.options import JSON, reports_errors


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--out", metavar="DIR", default="report", show_default=True, help="Folder of the page and the figures.")
@click.option("--target-top1", type=click.FloatRange(0, 100), metavar="PERCENT",
              help="Say for each run how long it trained until an evaluation reached this.")  # fmt: skip
@JSON
@reports_errors
def report(runs: tuple[str, ...], out: str, target_top1: float | None, as_json: bool) -> None:
    """Draw what runs have logged, each RUN a folder that train left, as one page that opens offline and as figures.

    Accuracy, loss, learning rate, images/s, where the time goes, memory, trust ratios by layer (of runs with
    --log-trust-ratios) and the noise scale against the batch, with a table of results and of what differs.
    """
    from knltrain.report import report as write
    from knltrain.runlog.console import Console

    console = Console(json=as_json)
    result = write([Path(run) for run in runs], Path(out), console, target_top1)
    console.line(
        f"{result['page']}: {len(result['runs'])} run(s), {len(result['figures']) // 2} figures in {out}/figures"
    )
    if as_json:
        click.echo(json.dumps(result))
