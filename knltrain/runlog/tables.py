"""Tables that fit the terminal: on a terminal while they fill, once they are full anywhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from knltrain.errors import one_line
from knltrain.runlog.console import Console

# Characters between two columns, of a table that fits and of one that was made narrower; at the edges of the table.
_WIDE_GAP, _GAP, _EDGES = 3, 2, 2
# Text wraps in a column of at least this width before a column is left out.
_MIN_TEXT_WIDTH = 16


def new_table(title: str = "", *, names: Sequence[str] = (), numbers: Sequence[str] = ()) -> Table:
    """An empty table: columns of text to the left, then columns of numbers.

    Args:
        title: above it; none if empty.
        names: headers of the text columns.
        numbers: headers of the numeric columns, the most important first: a narrow terminal shows as many as fit.
    """
    return _table(title, [Column(name, no_wrap=True) for name in names] +
                  [Column(name, justify="right", no_wrap=True) for name in numbers])  # fmt: skip


def print_table(console: Console, table: Table) -> None:
    """Prints a table that is full: fitted to a terminal, and with one line a row anywhere else."""
    if console.rich.is_terminal:
        console.rich.print(fit(table, console.rich.width))
    else:
        console.rich.width = _width(table)
        console.rich.print(table)


def print_text(console: Console, text: str) -> None:
    """Prints a sentence: wrapped between words on a terminal, one line anywhere else."""
    console.rich.print(one_line(text), markup=False, soft_wrap=not console.rich.is_terminal)


@contextlib.contextmanager
def shown(console: Console) -> Iterator[Callable[[Table], None]]:
    """Gives a function that shows a table in place of the one before; off a terminal the last one is printed."""
    if console.rich.is_terminal:
        with Live(console=console.rich, auto_refresh=False) as live:
            yield lambda table: live.update(fit(table, console.rich.width), refresh=True)
        return
    last: list[Table] = []
    try:
        yield last.append
    finally:
        if last:
            print_table(console, last[-1])


def fit(table: Table, width: int) -> Table:
    """Makes a table narrow enough without cutting anything in it.

    Headers and text wrap first. Then columns are left out from the right, and a line below the table names them.

    Args:
        table: of cells that are strings.
        width: of the terminal, characters.

    Returns:
        The table itself where it fits.
    """
    columns = table.columns
    if _width(table) <= width:
        return table
    kept = len(columns)
    while kept > 1 and _EDGES + sum(_narrowest(column) + _GAP for column in columns[:kept]) - _GAP > width:
        kept -= 1
    widths = [_narrowest(column) for column in columns[:kept]]
    spare = width - _EDGES - sum(widths) - _GAP * (kept - 1)
    narrow = []
    for column, needed in zip(columns, widths, strict=False):
        grows = max(0, min(spare, _widest(column) - needed)) if column.justify != "right" else 0
        spare -= grows
        narrow.append(Column(column.header, justify=column.justify, width=needed + grows))
    fitted = _table(str(table.title or ""), narrow, padding=(0, _GAP - 1, 0, 0))
    rows = zip(*(column.cells for column in columns[:kept]), strict=True)
    for row, cells in zip(table.rows, rows, strict=True):
        fitted.add_row(*cells, style=row.style, end_section=row.end_section)
    if kept < len(columns):
        left_out = ", ".join(str(column.header) for column in columns[kept:])
        fitted.caption = f"too wide for {width} columns: {left_out}"
        fitted.caption_justify = "left"
    return fitted


def _table(title: str, columns: Sequence[Column], padding: tuple[int, int, int, int] = (0, 1, 0, 1)) -> Table:
    return Table(*columns, title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
                 padding=padding)  # fmt: skip


def _width(table: Table) -> int:
    """Characters of a line of the table in which nothing wraps."""
    return _EDGES + sum(_widest(column) + _WIDE_GAP for column in table.columns) - _WIDE_GAP


def _widest(column: Column) -> int:
    return max(_length(cell) for cell in (column.header, *column.cells))


def _narrowest(column: Column) -> int:
    """Characters without which a number or a word would be cut."""
    words = [word for cell in (column.header, *column.cells) for word in _plain(cell).split()]
    whole = max((_length(cell) for cell in column.cells), default=0)
    if column.justify != "right":
        whole = min(whole, _MIN_TEXT_WIDTH)
    return max([whole, *map(len, words)])


def _plain(cell: object) -> str:
    return Text.from_markup(str(cell)).plain


def _length(cell: object) -> int:
    return Text.from_markup(str(cell)).cell_len
