"""Terminal output: the consoles, tables, numbers and the progress bar.

Progress and notes go to standard error; standard output holds only what a command is asked to print.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from io import StringIO
from typing import IO, Any, Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Task as ProgressTask
from rich.table import Column, Table


class CopiedConsole(Console):
    """A console whose lines can go to a file too.

    Attributes:
        copy: the file's console; None: there is no file.
    """

    copy: Console | None = None

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **options)
        if self.copy is not None:
            self.copy.print(*objects, **options)


# Ids, paths and class names come from users and may hold brackets, so markup is off.
console = CopiedConsole(stderr=True, highlight=False, markup=False, soft_wrap=True)
# A file or a pipe has no width; rich takes 80 for it, where tables with paths break.
stdout = Console(
    highlight=False, markup=False, soft_wrap=True,
    width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120,
)  # fmt: skip

LOG_SECONDS = 60.0
"""Seconds between two progress lines if the output is not a terminal: the log of a notebook, a file."""


@contextmanager
def copied_to(file: IO[str]) -> Iterator[None]:
    """Write to the file what goes to `console`."""
    console.copy = Console(file=file, width=120, highlight=False, markup=False, soft_wrap=True)
    try:
        yield
    finally:
        console.copy = None


class Advance(Protocol):
    """A callback that gets the work done since the last call, and a note to show beside the bar."""

    def __call__(self, step: float = 1, *, note: str = "") -> None: ...


@contextmanager
def progress(title: str, total: float | None, *, done: int = 0, visible: bool = True) -> Iterator[Advance]:
    """A progress bar with count, elapsed time and ETA; in a log, one line per minute. `total` may be unknown (None)."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
    )
    drawn = visible and not (console.is_jupyter and _widgets_are_missing())
    # The note takes the remaining width: a narrow terminal truncates it, and not the count or the ETA.
    with Progress(*columns, console=console, disable=not drawn, expand=True) as bar:
        job = bar.add_task(title, total=total, completed=done, note="")

        printed = time.monotonic()

        def advance(step: float = 1, *, note: str = "") -> None:
            nonlocal printed
            bar.update(job, advance=step, note=note or bar.tasks[0].fields["note"])
            if visible and not console.is_terminal and time.monotonic() - printed > LOG_SECONDS:
                printed = time.monotonic()
                console.print(_line(bar.tasks[0]))

        yield advance


@cache
def _widgets_are_missing() -> bool:
    """Whether Jupyter can't draw a bar; a note says so once."""
    missing = find_spec("ipywidgets") is None
    if missing:
        console.print("note: progress is a line a minute; for a bar, pip install 'pairclf[jupyter]'")
    return missing


def _line(task: ProgressTask) -> str:
    left = "?" if task.time_remaining is None else f"{task.time_remaining / 60:.0f} min"
    done = f"{task.completed:,.0f}/{'?' if task.total is None else f'{task.total:,.0f}'}"
    return f"{task.description} {done} after {(task.elapsed or 0) / 60:.0f} min, eta {left} {task.fields['note']}"


def counted(count: int, one: str, more: str = "") -> str:
    """A number with its noun, in the singular or plural.

    >>> counted(1, "row"), counted(25_000, "row"), counted(1, "row has", "rows have")
    ('1 row', '25,000 rows', '1 row has')
    """
    return f"{count:,} {one if count == 1 else more or f'{one}s'}"


def number(value: float | None, digits: int = 4) -> str:
    """A number for a table; a hyphen for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def table(title: str, *columns: str) -> Table:
    """An empty table in pairclf's style; the first column is left-aligned, the others right-aligned."""
    empty_table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        empty_table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    return empty_table


class Tables:
    """Shows as tables, in Jupyter and where it is printed: a class says which."""

    __slots__ = ()

    def tables(self) -> Iterable[RenderableType]:
        """The tables, as the command line prints them."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self._printed().export_text()

    def _repr_html_(self) -> str:
        code_format = '<pre style="line-height: normal">{code}</pre>'
        return self._printed().export_html(inline_styles=True, code_format=code_format)

    def _printed(self) -> Console:
        page = Console(record=True, file=StringIO(), width=120, highlight=False, markup=False, soft_wrap=True)
        for part in self.tables():
            page.print(part, "")
        return page


@contextmanager
def silenced(silent: bool = True) -> Iterator[None]:
    """Within, `console` prints nothing; errors are exceptions, and are not affected."""
    before, console.quiet = console.quiet, console.quiet or silent
    try:
        yield
    finally:
        console.quiet = before
