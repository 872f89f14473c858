"""What every verb's command has: --json, errors that are one line, exit codes."""

from __future__ import annotations

import atexit
import difflib
import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import click

import knltrain
from knltrain import config as configuration
from knltrain.config import RunConfig
from knltrain.errors import ConfigError, KnltrainError, one_line
from knltrain.launch.world import launcher_rank
from knltrain.recipes import RECIPES

_T = TypeVar("_T")

FAILED, BAD_USAGE, STOPPED = 1, 2, 75
# Pixels of an image of a network, where nobody says.
USUAL_IMAGE_SIZE = {"alexnet": 227, "alexnet_bn": 227, "alexnet_bn_small": 32, "resnet20": 32}
_PACKAGE = os.path.dirname(knltrain.__file__) + os.sep
_TOO_LARGE = "not enough memory ({}); take a smaller local-batch, image-size or number of workers"

JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, people's text on stderr.")


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turns the project's errors into one line and an exit code, and its warnings into a line."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                command(*args, **kwargs)
        except KnltrainError as error:
            fail(str(error), BAD_USAGE if isinstance(error, ConfigError) else FAILED)
        except OSError as error:  # a folder that cannot be written, a disk that is full
            name = error.filename or "input or output"
            fail(f"{os.fsdecode(name) if isinstance(name, bytes) else name}: {error.strerror or error}", FAILED)
        except MemoryError as error:
            fail(_TOO_LARGE.format(str(error) or "no memory left"), FAILED)
        except RuntimeError as error:
            # torch has no exception of its own for it.
            reason = re.search(r"you tried to allocate \d+ bytes", str(error))
            if not reason:
                raise
            fail(_TOO_LARGE.format(reason[0]), FAILED)
        except KeyboardInterrupt:
            fail("interrupted", 130)

    return wrapped


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: object = None,
    line: str | None = None,
) -> None:  # fmt: skip
    """Ours without the line of code that gave it; those of other packages as Python shows them."""
    ours = category is UserWarning and filename.startswith(_PACKAGE)
    text = f"warning: {one_line(str(message))}" if ours else warnings.formatwarning(message, category, filename, lineno)
    click.echo(text.rstrip(), err=True)


def fail(message: str, code: int) -> NoReturn:
    """Says what is wrong, and which rank says so, and ends the process; of several ranks, all."""
    rank = launcher_rank()
    click.echo(f"knltrain: {f'rank {one_line(rank)}: ' if rank else ''}{one_line(message)}", err=True)
    if rank:
        from knltrain.launch.pmi import abort_job

        abort_job(code)  # the others may be waiting for this one
    if rank and "torch" in sys.modules:
        # Threads of libraries would abort in an interpreter that ends: run only the functions registered with atexit.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def field_options(
    *names: str, short: Mapping[str, str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Options for configuration fields: the named ones, or all; ``short`` has second names for some."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for field in reversed([f for f in configuration.fields() if not names or f.name in names]):
            if field.name != "recipe":
                flag = "--" + field.name.replace("_", "-")
                parameter = field.name.replace(".", "__")  # click wants identifiers
                flags = (flag, short[field.name]) if short and field.name in short else (flag,)
                # What is true or false may stand alone, and is true then.
                alone: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if field.type is bool else {}
                option = click.option(*flags, parameter, metavar=_metavar(field.type), help=field.help, **alone)
                command = option(command)
        return command

    return decorate


def _metavar(kind: Any) -> str:
    """What stands for a value in the help text: the choices, or the type."""
    if get_origin(kind) is Annotated:
        return _metavar(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) is tuple:
        return _metavar(get_args(kind)[0]) + ",..."
    if get_origin(kind) in (Union, UnionType):
        return _metavar(next(part for part in get_args(kind) if part is not type(None)))
    return {bool: "[true|false]", int: "INTEGER", float: "NUMBER"}.get(kind, "TEXT")


def given(values: dict[str, str | None]) -> dict[str, str]:
    """The fields that were set on the command line, by dotted name."""
    return {name.replace("__", "."): value for name, value in values.items() if value is not None}


def recipe_named(name: str) -> RunConfig:
    """The configuration of a recipe.

    Raises:
        ConfigError: there is none of that name; the nearest is offered.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}?" if near else "`knltrain recipes` lists them"
        raise ConfigError(f"no recipe {name!r}; {hint}")
    return RECIPES[name].config()


def positive(word: str) -> int:
    """A whole number of 1 or more; ValueError otherwise."""
    number = int(word)
    if number < 1:
        raise ValueError(word)
    return number


_KINDS: dict[Any, str] = {str: "names", int: "whole numbers", float: "numbers", positive: "whole numbers from 1"}


def comma_list(flag: str, text: str, kind: Callable[[str], _T]) -> tuple[_T, ...]:
    """The values of an option that takes several, separated by commas.

    Args:
        flag: the option, for the message.
        text: what was given.
        kind: ``str``, ``int``, ``float`` or :func:`positive`.

    Raises:
        ConfigError: a value is missing or not of this kind.
    """
    try:
        values = tuple(kind(word.strip()) for word in text.split(","))
    except ValueError:
        values = ()
    if not values or "" in values:
        raise ConfigError(f"{flag} {text}: give {_KINDS[kind]}, separated by commas")
    return values
