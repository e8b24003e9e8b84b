"""What the model sees of a row, in both orders, with what was cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import polars as pl
from rich.text import Text

from pairclf.data.tables import to_rows
from pairclf.errors import DataError, visible
from pairclf.inputs.render import MARKER, TEMPLATE, Encoded
from pairclf.jobs.inputs import Opened
from pairclf.task import AB, Row, Task

_STYLES = {TEMPLATE: "bright_black", MARKER: "bold black on yellow"}
_FIELD_STYLES = ("cyan", "green", "magenta", "blue", "red")


def find_rows(chunks: Iterable[pl.DataFrame], ids: Sequence[str], task: Task) -> list[Row]:
    """The rows with these ids, in the order of the ids; the first of all rows where no id is given.

    Raises:
        DataError: an id is in none of the rows.
    """
    found: dict[str, Row] = {}
    for chunk in chunks:
        wanted = chunk.filter(pl.col("id").is_in(ids)) if ids else chunk.head(1)
        found |= {row.id: row for row in to_rows(wanted, task)}
        if len(found) == max(1, len(ids)):
            break
    if missing := [row_id for row_id in ids if row_id not in found]:
        raise DataError("no row has this id", rows=missing, remedy="look at the file's column id, or give --data FILE")
    return [found[row_id] for row_id in ids] if ids else list(found.values())


def show(opened: Opened, row: Row, *, coloured: bool) -> list[Text]:
    """A text an order: a line of figures, then the input, each segment in its colour (or behind its name).

    Colours belong to places: what is A's in order AB is B's in order BA. Control tokens, all
    special ones among them, are underlined.

    Args:
        opened: recipe and tokenizer.
        row: the row.
        coloured: whether colours will be seen; otherwise each segment stands behind `⟨its name⟩`.
    """
    task, tokenizer = opened.config.task, opened.tokenizer
    styles = _STYLES | dict(zip(task.fields, _FIELD_STYLES * len(task.fields), strict=False))
    specials = opened.builder.tokenizer.control
    encoded = opened.builder.encode([row])[0]
    texts = []
    for order, one in enumerate(encoded):
        text = Text(
            f"row {visible(row.id)}, order {'AB' if order == AB else 'BA'}: {_figures(opened, one)}\n", style="bold"
        )
        for place in (*task.fields, MARKER, TEMPLATE):
            text.append(f" {place} ", style=styles[place] if place == MARKER else f"{styles[place]} reverse")
        text.append("\n")
        for name, start, stop in one.spans:
            text.append("" if coloured else f"⟨{name}⟩", style="bold")
            for special, ids in groupby(one.ids[start:stop].tolist(), specials.__contains__):
                text.append(_decode(tokenizer, list(ids)), style=f"{styles[name]}{' underline' * special}")
        text.append("\n")
        texts.append(text)
    return texts


def _figures(opened: Opened, one: Encoded) -> str:
    lost = ", ".join(f"{place} {tokens:,}" for place, tokens in one.dropped.items() if tokens)
    limit = opened.config.inputs.max_length
    return f"{len(one.ids):,} of {limit:,} tokens; " + (f"tokens cut from {lost}" if lost else "nothing cut")


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return visible(text)
