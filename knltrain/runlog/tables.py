"""Tables on a terminal while they fill, and once they are full anywhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.live import Live
from rich.table import Table

from knltrain.runlog.console import Console

# A pipe has no width of its own; what reads it should get one line a row.
_PIPE_WIDTH = 110


def new_table(title: str, *, names: Sequence[str] = (), numbers: Sequence[str]) -> Table:
    """An empty table: columns of names to the left, then columns of numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def print_table(console: Console, table: Table) -> None:
    """Prints a table that is full."""
    if not console.rich.is_terminal:
        console.rich.width = _PIPE_WIDTH
    console.rich.print(table)


@contextlib.contextmanager
def shown(console: Console) -> Iterator[Callable[[Table], None]]:
    """Gives a function that shows a table in place of the one before; off a terminal the last one is printed."""
    if console.rich.is_terminal:
        with Live(console=console.rich, auto_refresh=False) as live:
            yield lambda table: live.update(table, refresh=True)
        return
    last: list[Table] = []
    try:
        yield last.append
    finally:
        if last:
            print_table(console, last[-1])
