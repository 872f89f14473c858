"""What every verb's command has: --json, errors that are one line, exit codes."""

from __future__ import annotations

import atexit
import functools
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from knltrain.errors import ConfigError, KnltrainError, one_line

FAILED, BAD_USAGE, STOPPED = 1, 2, 75
_TOO_LARGE = "not enough memory ({}); take a smaller local-batch, image-size or number of workers"

JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, people's text on stderr.")


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turns the project's errors into one line and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
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


def fail(message: str, code: int) -> NoReturn:
    """Says what is wrong, and which rank says so, and ends the process."""
    rank = os.environ.get("RANK") or os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK")
    click.echo(f"knltrain: {f'rank {one_line(rank)}: ' if rank else ''}{one_line(message)}", err=True)
    if rank and "torch" in sys.modules:
        # Threads of libraries would meet an interpreter that ends, and abort: only what was registered for it is done.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
