"""CPU lists and masks in the kernel's formats, and reading of sysfs files that may be missing or damaged."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from knltrain.files import open_regular

# More than any kernel is built for (NR_CPUS is at most 8192): a damaged list must not fill the memory.
_MAX_CPUS = 1 << 16
_MAX_BYTES = 1 << 16
# Digits of a 64-bit number.
_MAX_DIGITS = 20


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """Turns the kernel's "0-3,8,10-11" into numbers.

    Raises:
        ValueError: it is not such a list.
    """
    cpus: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            start, stop = as_number(first), as_number(last or first)
            if start is None or stop is None or not 0 <= start <= stop < _MAX_CPUS:
                raise ValueError(f"{part!r} is not a range of CPUs")
            cpus.extend(range(start, stop + 1))
            if len(cpus) > _MAX_CPUS:
                raise ValueError("more CPUs than there can be")
    return tuple(cpus)


def parse_cpu_mask(text: str) -> tuple[int, ...]:
    """Turns the kernel's "f,00000005", words of 32 bits in hex with the lowest one last, into numbers.

    Raises:
        ValueError: it is not such a mask.
    """
    if not re.fullmatch(r"[0-9a-fA-F]{1,8}(,[0-9a-fA-F]{8})*", text.strip()):
        raise ValueError(f"{text[:100]!r} is not a mask of CPUs")
    mask = int(text.strip().replace(",", ""), 16)
    if mask.bit_length() > _MAX_CPUS:
        raise ValueError("more CPUs than there can be")
    return tuple(cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1)


def format_cpu_list(cpus: Iterable[int]) -> str:
    """Writes numbers as the kernel does: "0-3,8,10-11"."""
    ranges: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def read_text(path: Path) -> str:
    """Returns the stripped text of a file, at most 64 KiB; empty if it cannot be read.

    Archives of sysfs have files of a page that end with zeros; these are stripped as well.
    """
    try:
        with open_regular(path) as file:
            return file.read(_MAX_BYTES).decode("utf-8", "replace").strip("\0 \t\r\n")
    except (OSError, ValueError):  # ValueError: a name with NUL in it
        return ""


def read_number(path: Path) -> int | None:
    """Returns the number in a file, or None."""
    return as_number(read_text(path).removeprefix("+"))


def as_number(text: str) -> int | None:
    """Returns the integer in a text, or None; the kernel writes at most 64 bits."""
    digits = text.removeprefix("-")
    return int(text) if digits.isdecimal() and len(digits) <= _MAX_DIGITS else None


def read_cpus(path: Path) -> tuple[int, ...]:
    """Returns the CPU list in a file; empty if there is none."""
    try:
        return parse_cpu_list(read_text(path))
    except ValueError:
        return ()


def read_cpu_mask(path: Path) -> tuple[int, ...]:
    """Returns the CPUs of the mask in a file; empty if there is none."""
    try:
        return parse_cpu_mask(read_text(path))
    except ValueError:
        return ()
