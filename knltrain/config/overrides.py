"""Fields by dotted name: listing them, setting them from TOML or the command line, and conversion to JSON types.

All of it iterates over the dataclasses of schema.py, so that a field is declared once.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import stat
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from knltrain.config import aliases
from knltrain.config.schema import RunConfig
from knltrain.errors import ConfigError
from knltrain.files import resolved

# Characters of a text field: twice Linux's PATH_MAX.
_MAX_TEXT = 8192
_PATHS = ("data", "classes", "class_order", "stage", "out", "resume", "init_from")
_COMPARED_PATHS = ("resume", "init_from")
# All fields together take about 2,000 bytes.
_MAX_FILE_BYTES = 1 << 20


class Field(typing.NamedTuple):
    """A leaf of the configuration: its dotted name, its annotation and its help text."""

    name: str
    type: Any
    help: str


def fields(cls: type = RunConfig, prefix: str = "") -> Iterator[Field]:
    """Yields every leaf field, outer fields first, nested ones with dotted names."""
    hints = typing.get_type_hints(cls, include_extras=True)
    nested = []
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            nested.append((field.name, kind))
        else:
            yield Field(prefix + field.name, kind, field.metadata["help"])
    for name, kind in nested:
        yield from fields(typing.cast(type, kind), f"{prefix}{name}.")


def override(config: RunConfig, values: Mapping[str, object]) -> RunConfig:
    """Returns ``config`` with the fields named in ``values`` replaced.

    Args:
        config: the configuration to change.
        values: dotted field name -> value. Strings are converted to the field's type, for the command line.

    Raises:
        ConfigError: an unknown name (the message suggests the nearest), a value of the wrong type or out of bounds, or
            fields that contradict each other.
    """
    known = {field.name: field for field in fields()}
    groups = {name.rpartition(".")[0] for name in known}
    changes: dict[str, dict[str, object]] = {"": {}}
    for name, value in values.items():
        if value == {} and name in groups:  # a table's heading with nothing under it
            continue
        if name not in known:
            raise ConfigError(_unknown(name))
        kind = known[name].type
        try:
            converted = msgspec.convert(_stripped(value, kind), kind, strict=False)
        except (msgspec.ValidationError, RecursionError):
            raise ConfigError(f"{name}: {_short_repr(value)} will not do: it takes {_describe_type(kind)}") from None
        if isinstance(converted, str) and not _is_text(converted):
            raise ConfigError(f"{name}: {_short_repr(value)} will not do: it takes {_describe_type(kind)}")
        group, _, leaf = name.rpartition(".")
        changes.setdefault(group, {})[leaf] = _one_spelling(name, converted)
    top = changes.pop("")
    for group, leaves in changes.items():
        top[group] = dataclasses.replace(getattr(config, group), **leaves)
    return dataclasses.replace(config, **top)  # type: ignore[arg-type]


def comma_separated(text: str) -> list[str]:
    """Splits a list at its commas, on the command line and in TOML strings alike; spaces around values do not count.

    Returns:
        The values, of which some may be empty; none for an empty text.
    """
    return [word.strip() for word in text.split(",")] if text.strip() else []


def _stripped(value: object, kind: Any) -> object:
    """Returns a value without the spaces around its words, and a list of them as a list; a text as it is."""
    if isinstance(value, str) and _is_list(kind):
        return comma_separated(value)
    if isinstance(value, list):
        return [item.strip() if isinstance(item, str) else item for item in value]
    return value.strip() if isinstance(value, str) and _type_and_bounds(kind)[0] is not str else value


def _one_spelling(name: str, value: object) -> object:
    """Returns a path with its ``~`` expanded; of what a run begins with, absolute and without links, to be compared."""
    if name not in _PATHS or not isinstance(value, str):
        return value
    if name in _COMPARED_PATHS and value not in ("", "auto", "never"):
        return str(resolved(value))
    return os.path.expanduser(value)


def names(text: str) -> frozenset[str]:
    """Parses a comma-separated list of field names, with dashes or underscores.

    Raises:
        ConfigError: there is no such field; the message suggests the nearest.
    """
    asked = frozenset(name.replace("-", "_") for name in comma_separated(text) or [""])
    for name in sorted(asked - {field.name for field in fields()}):
        raise ConfigError(_unknown(name))
    return asked


def _unknown(name: str) -> str:
    if alias := aliases.find(name):
        here = f"here it is {alias.fields[0]}" if alias.fields else ""
        return f"unknown field {_short_repr(name)}: {'; '.join(filter(None, (here, alias.note)))}"
    near = difflib.get_close_matches(name, [field.name for field in fields()], n=1)
    hint = f"; did you mean {near[0]}?" if near else "; `knltrain train --help` lists the fields"
    return f"unknown field {_short_repr(name)}{hint}"


def _is_list(kind: Any) -> bool:
    return typing.get_origin(_type_and_bounds(kind)[0]) is tuple


def _type_and_bounds(kind: Any) -> tuple[Any, Meta]:
    """Returns a field's type without Optional and Annotated, and its bounds."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is Annotated:
        kind, bounds = typing.get_args(kind)[:2]
        return kind, bounds
    return kind, Meta()


def _describe_type(kind: Any) -> str:
    """Describes a field's values for a message: type, unit and bounds."""
    kind, bounds = _type_and_bounds(kind)
    if typing.get_origin(kind) is Literal:
        *most, last = typing.get_args(kind)
        return f"{', '.join(most)} or {last}"
    if typing.get_origin(kind) is tuple:
        item = _describe_type(typing.get_args(kind)[0])
        return f"at most {bounds.max_length} values with commas between them, each {item}"
    if kind is bool:
        return "true or false"
    if kind is str:
        return f"text in UTF-8 of at most {_MAX_TEXT} characters, none of them NUL"
    limits = ((">=", bounds.ge), (">", bounds.gt), ("<=", bounds.le), ("<", bounds.lt))
    bounds_text = " and ".join(f"{sign} {limit:,.12g}" for sign, limit in limits if limit is not None)
    unit = f" of {bounds.extra['unit']}" if bounds.extra else ""
    return f"a {'whole ' if kind is int else ''}number{unit} {bounds_text}"


def _is_text(value: str) -> bool:
    """Whether a value is valid text; command-line bytes that are not UTF-8 arrive as lone surrogates."""
    return len(value) <= _MAX_TEXT and "\0" not in value and not re.search("[\ud800-\udfff]", value)


def _short_repr(value: object) -> str:
    """Returns a value for a message, shortened."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # ValueError: an integer of thousands of digits
        return f"this {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]}..."


def read_toml(path: str | Path) -> dict[str, object]:
    """Reads a TOML file of fields and returns them by dotted name.

    Raises:
        ConfigError: the file is missing, unreadable or not TOML.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        state = os.stat(path)
        if os.path.samestat(state, os.stat(os.devnull)):  # empty, but not a regular file
            return {}
        if not stat.S_ISREG(state.st_mode):  # opening a pipe without a writer would block
            raise ConfigError(f"--config {path}: not a file")
        if state.st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"--config {path}: {state.st_size:,} bytes, too large for a file of fields; give another")
        return flatten(tomllib.loads(Path(path).read_text("utf-8-sig")))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"--config {path}: tables or lists nested a thousand deep") from None
    except ValueError as error:  # not UTF-8, not TOML, an integer of thousands of digits
        raise ConfigError(f"--config {path}: not TOML: {error}") from None


def as_typed(value: float) -> str:
    """Writes a number as a user does: every digit, and no ``.0`` after a whole one."""
    return str(value).removesuffix(".0")


def flatten(tree: Mapping[str, Any]) -> dict[str, object]:
    """Turns nested tables into dotted names."""
    flat: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update({f"{name}.{leaf}": inner for leaf, inner in flatten(value).items()})
        else:
            flat[name] = value
    return flat


def as_dict(config: RunConfig) -> dict[str, Any]:
    """Returns the configuration as nested dictionaries of JSON types."""
    return typing.cast(dict[str, Any], msgspec.json.decode(msgspec.json.encode(config)))
