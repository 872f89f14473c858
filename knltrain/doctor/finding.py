"""What a check of ``knltrain doctor`` found, and checks that may fail or hang without taking the others with them."""

from __future__ import annotations

import dataclasses
import textwrap
import threading
import time
import typing
from collections.abc import Callable, Iterable
from typing import Literal

Severity = Literal["error", "warning", "note", "ok"]
# The worst first.
SEVERITIES: tuple[Severity, ...] = typing.get_args(Severity)

_WIDTH = 80
_LABELS = 24  # columns of severity and name


@dataclasses.dataclass(frozen=True)
class Finding:
    """The answer of one check.

    Attributes:
        name: of the check.
        severity: error: training fails or is useless here; warning: it runs, with a cost or a risk; note: worth
            knowing; ok.
        cause: what was found, with figures.
        symptom: what a user sees of it; empty where all is well.
        remedy: a command or a setting; empty where all is well.
        seconds: the check took.
    """

    name: str
    severity: Severity
    cause: str
    symptom: str = ""
    remedy: str = ""
    seconds: float = 0.0


def run_check(name: str, check: Callable[[], Finding], limit_s: float, late: Finding | None = None) -> Finding:
    """Runs a check on a thread of its own; one that raises or takes too long is a finding as well.

    A check that hangs, in a system call on a file server that is gone perhaps, cannot be ended: its thread is left
    behind and ends with the process.

    Args:
        name: of the check.
        check: what is run.
        limit_s: how long it may take.
        late: what it means that it took longer; by default, that this could not be examined.
    """
    answer: list[Finding] = []

    def ask() -> None:
        try:
            answer.append(check())
        except Exception as error:  # whatever it is, the other checks go on
            answer.append(unanswered(name, f"the check failed: {type(error).__name__}: {error}"))

    started = time.monotonic()
    thread = threading.Thread(target=ask, name=f"doctor-{name}", daemon=True)
    thread.start()
    thread.join(limit_s)
    found = answer[0] if answer else late or unanswered(name, f"no answer within {limit_s:g} s")
    return dataclasses.replace(found, seconds=round(time.monotonic() - started, 3))


def unanswered(name: str, cause: str) -> Finding:
    """The finding of a check that gave none."""
    return Finding(name, "warning", cause, "this could not be examined", "look for what the cause names; report it")


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Sorts by severity; what is equally bad stays in order."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def worst(findings: Iterable[Finding]) -> Severity:
    """The worst severity there is; ok without findings."""
    return min((finding.severity for finding in findings), key=SEVERITIES.index, default="ok")


def as_row(finding: Finding) -> str:
    """A finding's lines of the table, 80 columns wide: severity, name, and beside them what there is to say."""
    said = [finding.symptom, f"cause: {finding.cause}" if finding.symptom else finding.cause]
    said += [f"remedy: {finding.remedy}"] if finding.remedy else []
    lines = [line for text in said if text for line in _wrapped(text)]
    labels = f"{finding.severity:<8} {finding.name}"
    return "\n".join(f"{labels if index == 0 else '':<{_LABELS}}{line}" for index, line in enumerate(lines))


def _wrapped(text: str) -> list[str]:
    # Paths and commands stay whole, to be copied, if need be beyond the last column.
    return textwrap.wrap(text, _WIDTH - _LABELS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
