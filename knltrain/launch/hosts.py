"""Lists of nodes and of tasks per node, as Slurm writes them and as users do."""

from __future__ import annotations

import ipaddress
import re

from knltrain.errors import ConfigError

# Expanding a damaged list must not fill the memory.
_MAX_NODES = 1_000_000
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")


def expand_counts(text: str) -> list[int]:
    """Expands Slurm's ``2(x3),1`` to a number for each node.

    Raises:
        ConfigError: it is not such a list.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:\(x(\d{1,6})\))?", part.strip())
        if not match or len(counts) > _MAX_NODES:
            raise ConfigError(f"{text[:200]!r} is not a list of tasks per node; Slurm's variables are damaged")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def expand_hosts(text: str, *, given_as: str) -> tuple[str, ...]:
    """Expands ``node[001-003,7], gpu-a`` to names, leading zeros kept; each name counts once.

    Args:
        text: the list. Commas separate names; brackets hold numbers and ranges.
        given_as: the option or variable that it comes from, for the message.

    Raises:
        ConfigError: it is not such a list, or something in it cannot be the name or the IPv4 address of a host.
    """
    names: list[str] = []
    for pattern in re.split(r",(?![^\[\]]*\])", text):  # commas inside brackets do not separate names
        expanded = [""]
        for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", pattern.strip()):
            choices = [literal] if literal else _expand_ranges(ranges)
            if len(expanded) * len(choices) + len(names) > _MAX_NODES:
                raise ConfigError(f"{given_as} {text[:200]!r} has too many nodes")
            expanded = [prefix + choice for prefix in expanded for choice in choices]
        if not re.fullmatch(r"(?:[^\[\]]|\[[^\[\]]*\])*", pattern) or not all(map(_is_host, expanded)):
            raise ConfigError(
                f"{given_as} {text[:200]!r} is not a list of nodes: {pattern[:100]!r} is no host; give names as in "
                "n1,n2 or node[001-004]"
            )
        names += expanded
    return tuple(dict.fromkeys(names))


def _expand_ranges(ranges: str) -> list[str]:
    """Returns the numbers inside a pair of brackets; one that is no host name's part where they cannot be read."""
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())
        if not match or (match[2] and not 0 <= int(match[2]) - int(match[1]) < _MAX_NODES):
            return ["?"]
        first, last = match[1], match[2] or match[1]
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _is_host(name: str) -> bool:
    if re.fullmatch(r"[\d.]+", name):
        try:
            return bool(ipaddress.IPv4Address(name))
        except ValueError:
            return False
    return bool(_NAME.fullmatch(name))
