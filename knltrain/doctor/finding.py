"""Findings of ``knltrain doctor``, and running checks so that errors and hangs do not affect other checks."""

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
_LABEL_WIDTH = 24  # columns of severity and name


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: name of the check.
        severity: error: training fails or is useless here; warning: it runs, with a cost or a risk; note: worth
            knowing; ok.
        cause: what the check found, with figures.
        symptom: what a user would see; empty if ok.
        remedy: a command or a setting; empty if ok.
        seconds: duration of the check.
    """

    name: str
    severity: Severity
    cause: str
    symptom: str = ""
    remedy: str = ""
    seconds: float = 0.0


def run_check(name: str, check: Callable[[], Finding], limit_s: float, on_timeout: Finding | None = None) -> Finding:
    """Runs a check on a thread of its own; an exception or a time-out becomes a finding.

    A check that hangs, for example in a system call on a dead file server, cannot be ended: its thread ends with the
    process.

    Args:
        name: name of the check.
        check: the check.
        limit_s: time-out, seconds.
        on_timeout: the finding after a time-out; by default, that this could not be examined.
    """
    answer: list[Finding] = []

    def run() -> None:
        try:
            answer.append(check())
        except Exception as error:  # any error, so that the other checks run
            answer.append(unanswered(name, f"the check failed: {type(error).__name__}: {error}"))

    started = time.monotonic()
    thread = threading.Thread(target=run, name=f"doctor-{name}", daemon=True)
    thread.start()
    thread.join(limit_s)
    found = answer[0] if answer else on_timeout or unanswered(name, f"no answer within {limit_s:g} s")
    return dataclasses.replace(found, seconds=round(time.monotonic() - started, 3))


def unanswered(name: str, cause: str) -> Finding:
    """Returns the finding for a check that failed or timed out."""
    return Finding(name, "warning", cause, "this could not be examined", "look for what the cause names; report it")


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Sorts by severity, stably."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def worst(findings: Iterable[Finding]) -> Severity:
    """Returns the worst severity; ok without findings."""
    return min((finding.severity for finding in findings), key=SEVERITIES.index, default="ok")


def as_row(finding: Finding) -> str:
    """Returns a finding's lines in the table, 80 columns wide: severity, name, and text."""
    texts = [finding.symptom, f"cause: {finding.cause}" if finding.symptom else finding.cause]
    texts += [f"remedy: {finding.remedy}"] if finding.remedy else []
    lines = [line for text in texts if text for line in _wrapped(text)]
    labels = f"{finding.severity:<8} {finding.name}"
    return "\n".join(f"{labels if index == 0 else '':<{_LABEL_WIDTH}}{line}" for index, line in enumerate(lines))


def _wrapped(text: str) -> list[str]:
    # Paths and commands are not broken, so that they can be copied, even beyond the last column.
    return textwrap.wrap(
        text, _WIDTH - _LABEL_WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
