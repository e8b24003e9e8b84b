"""What the user reads while a job works: one console, one kind of table, one progress bar with an ETA.

Everything goes to standard error, so that standard output stays free for what a command is asked to print.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Task as ProgressTask
from rich.table import Column, Table

# Ids, paths and class names come from users and may hold brackets: nothing printed here is read as markup.
console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
output = Console(highlight=False, markup=False, soft_wrap=True)

LOG_SECONDS = 60.0
"""Between two lines of progress where the output is no terminal: a notebook's log, a file."""


class Advance(Protocol):
    """Called with the work done since the last call, and what to show beside the bar."""

    def __call__(self, step: float = 1, *, note: str = "") -> None: ...


@contextmanager
def progress(title: str, total: float, *, done: int = 0, visible: bool = True) -> Iterator[Advance]:
    """A bar with count, time elapsed and ETA; in a log, where nothing can move, a line every minute."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
    )
    # The note takes what the others leave: in a narrow terminal it is cut, and not the count or the ETA.
    with Progress(*columns, console=console, disable=not visible, expand=True) as bar:
        job = bar.add_task(title, total=total, completed=done, note="")

        printed = time.monotonic()

        def advance(step: float = 1, *, note: str = "") -> None:
            nonlocal printed
            bar.update(job, advance=step, note=note or bar.tasks[0].fields["note"])
            if visible and not console.is_terminal and time.monotonic() - printed > LOG_SECONDS:
                printed = time.monotonic()
                console.print(_line(bar.tasks[0]))

        yield advance


def _line(task: ProgressTask) -> str:
    left = "?" if task.time_remaining is None else f"{task.time_remaining / 60:.0f} min"
    done = f"{task.completed:,.0f}/{task.total or 0:,.0f}"
    return f"{task.description} {done} after {(task.elapsed or 0) / 60:.0f} min, eta {left} {task.fields['note']}"


def table(title: str, *columns: str) -> Table:
    """An empty table in the house's look; the first column is left-aligned, the others right-aligned."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    return made
