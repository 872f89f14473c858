"""The command ``knltrain`` and its subcommands.

Only modules for parsing are imported here; subcommands that compute import torch when they run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import click

import knltrain
from knltrain.cli.bench import bench, tune
from knltrain.cli.data import data, prepare
from knltrain.cli.node import doctor, launch, plan
from knltrain.cli.options import fail
from knltrain.cli.predict import predict
from knltrain.cli.recipes import recipes
from knltrain.cli.report import report
from knltrain.cli.sweep import sweep
from knltrain.cli.train import evaluate, export, train
from knltrain.config import aliases
from knltrain.errors import INTERRUPTED

_CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
    # Fields have underscores in files; on the command line both spellings are accepted.
    "token_normalize_func": lambda token: token.replace("_", "-"),
}


class Commands(click.Group):
    """The commands; an option that they lack, but other programs have, is answered with ours."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        context.meta[_WORDS] = args = [_at_home(word) for word in args]
        try:
            return super().parse_args(context, args)
        except click.NoSuchOption as error:
            raise _explained(error, args) from None

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except click.NoSuchOption as error:
            raise _explained(error, context.meta[_WORDS]) from None
        except click.UsageError as error:
            command = error.ctx.command if error.ctx else self
            if "unexpected extra argument" in error.message and any(p.name == "recipe" for p in command.params):
                raise click.UsageError(f"{error.message}; a recipe is given with --recipe NAME", error.ctx) from None
            raise
        except KeyboardInterrupt:
            fail("interrupted", INTERRUPTED)


_WORDS = "knltrain.words"


def _at_home(word: str) -> str:
    """Expands the ``~`` of ``--out=~/runs``, which a shell expands only at the beginning of a word."""
    found = re.fullmatch(r"(--[\w.-]+=)(~.*)", word, re.DOTALL)
    return found[1] + os.path.expanduser(found[2]) if found else word


def _explained(error: click.NoSuchOption, words: Sequence[str]) -> click.UsageError:
    """Returns the error for an option that a command lacks; it names ours where another program's is known."""
    flag, command = error.option_name, error.ctx.command if error.ctx else main
    if not flag.startswith("--"):  # click has read -lr as -l
        flag = next((word.partition("=")[0].rstrip("0123456789") for word in words if word.startswith(flag)), flag)
    alias = aliases.find(flag) or aliases.find(error.option_name)
    if alias is None and flag in _flags(train):
        alias = aliases.Alias((flag.removeprefix("--"),))
    if alias is None:
        return error
    ours = [f"--{field.replace('_', '-')}" for field in alias.fields]
    here = [option for option in ours if option in _flags(command)]
    name = f"here it is {here[0]}" if here else f"`knltrain train` has {ours[0]}" if ours else ""
    return click.UsageError(f"No such option: {flag}: {'; '.join(filter(None, (name, alias.note)))}", error.ctx)


def _flags(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


@click.group(cls=Commands, context_settings=_CONTEXT)
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
