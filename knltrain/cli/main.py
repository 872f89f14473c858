"""The command ``knltrain`` and its subcommands.

Only modules for parsing are imported here; subcommands that compute import torch when they run.
"""

from __future__ import annotations

import os

import click

import knltrain
from knltrain.cli.bench import bench, tune
from knltrain.cli.data import data, prepare
from knltrain.cli.node import doctor, launch, plan
from knltrain.cli.predict import predict
from knltrain.cli.recipes import recipes
from knltrain.cli.report import report
from knltrain.cli.sweep import sweep
from knltrain.cli.train import evaluate, export, train

_CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
    # Fields have underscores in files; on the command line both spellings are accepted.
    "token_normalize_func": lambda token: token.replace("_", "-"),
}


@click.group(context_settings=_CONTEXT)
@click.version_option(knltrain.__version__, prog_name="knltrain")
@click.pass_context
def main(context: click.Context) -> None:
    """Large-batch ImageNet training with LARS on clusters of many-core CPUs."""
    if os.environ.get("NO_COLOR"):  # rich reads it by itself
        context.color = False


for _command in (
    train,
    evaluate,
    export,
    prepare,
    data,
    bench,
    tune,
    plan,
    launch,
    doctor,
    predict,
    sweep,
    report,
    recipes,
):
    main.add_command(_command)
