"""The environment of a process. A variable that is set to nothing counts as unset, as scripts mean it."""

from __future__ import annotations

import os
from collections.abc import Mapping

from knltrain.errors import ConfigError


def given(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns the variables that have a value.

    Args:
        environ: the environment, by default this process's.
    """
    return {name: value for name, value in (os.environ if environ is None else environ).items() if value}


def number(environ: Mapping[str, str], key: str) -> int:
    """Returns a variable's whole number.

    Raises:
        ConfigError: it is none.
    """
    try:
        return int(environ[key])
    except ValueError:
        raise ConfigError(f"{key}={environ[key][:200]} is not a number; the launcher's variables are damaged") from None
