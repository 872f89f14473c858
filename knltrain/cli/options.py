"""Common parts of the commands: --json, one-line errors, exit codes, options for fields."""

from __future__ import annotations

import atexit
import difflib
import errno
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
from knltrain.errors import BAD_USAGE, FAILED, INTERRUPTED, ConfigError, KnltrainError, one_line
from knltrain.files import free_space, is_full
from knltrain.launch.launchers import launcher_rank
from knltrain.recipes import RECIPES

_T = TypeVar("_T")

# Default image sizes of networks, pixels; 224 for others.
DEFAULT_IMAGE_SIZE = {"alexnet": 227, "alexnet_bn": 227, "alexnet_bn_small": 32, "resnet20": 32}
_PACKAGE = os.path.dirname(knltrain.__file__) + os.sep
_TOO_LARGE = "not enough memory ({}); use a smaller local-batch, image-size or number of workers"

JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, people's text on stderr.")


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Decorates a command: errors become one line and an exit code, and knltrain's warnings one line."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        from knltrain.launch.signals import ActAtOnce, end_soon

        try:
            with warnings.catch_warnings(), ActAtOnce():
                warnings.showwarning = _show_warning
                command(*args, **kwargs)
        except KnltrainError as error:
            fail(str(error), BAD_USAGE if isinstance(error, ConfigError) else FAILED)
        except OSError as error:  # a folder that cannot be written, a disk that is full
            fail(_of_a_file(error), FAILED)
        except MemoryError as error:
            fail(_TOO_LARGE.format(str(error) or "no memory left"), FAILED)
        except RuntimeError as error:
            # torch has no exception class for it.
            reason = re.search(r"you tried to allocate \d+ bytes", str(error))
            if not reason:
                raise
            fail(_TOO_LARGE.format(reason[0]), FAILED)
        except KeyboardInterrupt:
            end_soon(INTERRUPTED)  # libraries that wait for other ranks may not let go
            fail("interrupted", INTERRUPTED)

    return wrapped


# What to do where the system's own words do not say it.
_REMEDIES = {
    errno.EACCES: "give this user access to it",
    errno.EPERM: "give this user access to it",
    errno.EROFS: "that file system cannot be written; give a place elsewhere",
    errno.ENOSPC: "free space, or give a place elsewhere",
    errno.EDQUOT: "your quota there is used up; free space, or give a place elsewhere",
    errno.ESTALE: "its file server has restarted or moved it; when it is there again, give the same command",
    errno.EIO: "its disk or network fails (dmesg may say how); when it can be read again, give the same command",
    errno.EMFILE: "too many for ulimit -n; raise it",
    errno.EFBIG: "too large for ulimit -f or for the file system",
}


def _of_a_file(error: OSError) -> str:
    """Returns the message for an error of the system: the file, what is wrong, and what to do."""
    name = error.filename if error.filename is not None else "standard output, or another file being written"
    name = os.fsdecode(name) if isinstance(name, bytes) else str(name)
    remedy = _REMEDIES.get(error.errno or 0)
    free = free_space(os.path.dirname(os.path.abspath(name))) if error.filename and is_full(error) else ""
    return f"{name}: {error.strerror or error}{free}{f'; {remedy}' if remedy else ''}"


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: object = None,
    line: str | None = None,
) -> None:  # fmt: skip
    """Shows knltrain's warnings without their source line, and others as Python does."""
    ours = category is UserWarning and filename.startswith(_PACKAGE)
    text = f"warning: {one_line(str(message))}" if ours else warnings.formatwarning(message, category, filename, lineno)
    click.echo(text.rstrip(), err=True)


def fail(message: str, code: int) -> NoReturn:
    """Prints an error with this rank's number, and ends the process; under a launcher, the whole job."""
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
    """Returns a decorator that adds options for fields: the named ones, or all; ``short`` has short names."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for field in reversed([f for f in configuration.fields() if not names or f.name in names]):
            if field.name != "recipe":
                flag = "--" + field.name.replace("_", "-")
                parameter = field.name.replace(".", "__")  # click needs identifiers
                flags = (flag, short[field.name]) if short and field.name in short else (flag,)
                # A boolean option without a value is true.
                alone: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if field.type is bool else {}
                option = click.option(*flags, parameter, metavar=_metavar(field.type), help=field.help, **alone)
                command = option(command)
        return command

    return decorate


def _metavar(kind: Any) -> str:
    """Returns the placeholder of a value in the help text: its choices or type."""
    if get_origin(kind) is Annotated:
        return _metavar(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) is tuple:
        return _metavar(get_args(kind)[0]) + ",..."
    if get_origin(kind) in (Union, UnionType):
        return _metavar(next(part for part in get_args(kind) if part is not type(None)))
    return {bool: "[true|false]", int: "INTEGER", float: "NUMBER"}.get(kind, "TEXT")


def given_fields(values: dict[str, str | None]) -> dict[str, str]:
    """Returns the fields set on the command line, by dotted name."""
    return {name.replace("__", "."): value for name, value in values.items() if value is not None}


def config_of_recipe(name: str) -> RunConfig:
    """Returns the configuration of a recipe.

    Raises:
        ConfigError: unknown name; the message suggests the nearest.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}?" if near else "`knltrain recipes` lists them"
        raise ConfigError(f"no recipe {name!r}; {hint}")
    return RECIPES[name].config()


def positive(word: str) -> int:
    """Parses a whole number of 1 or more; raises ValueError otherwise."""
    number = int(word)
    if number < 1:
        raise ValueError(word)
    return number


_KINDS: dict[Any, str] = {str: "names", int: "whole numbers", float: "numbers", positive: "whole numbers from 1"}


def comma_list(flag: str, text: str, kind: Callable[[str], _T]) -> tuple[_T, ...]:
    """Parses an option's comma-separated values.

    Args:
        flag: the option, for the message.
        text: the option's value.
        kind: ``str``, ``int``, ``float`` or :func:`positive`.

    Raises:
        ConfigError: a value is missing or not of this kind.
    """
    try:
        values = tuple(kind(word) for word in configuration.comma_separated(text))
    except ValueError:
        values = ()
    if not values or "" in values:
        raise ConfigError(f"{flag} {text}: give {_KINDS[kind]}, separated by commas")
    return values
