"""`show`: print the model's input for a row, in both orders, with the number of tokens cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from rich.text import Text

from pairclf.config import Config
from pairclf.data.rows import to_rows
from pairclf.errors import DataError, visible
from pairclf.inputs.examples import pick_examples, with_examples
from pairclf.inputs.render import BRANCH, MARKER, RATIONALE, TEMPLATE, Encoded, InputBuilder
from pairclf.run import chunks_of, labelled_rows
from pairclf.task import AB, Row, Task

if TYPE_CHECKING:
    from pairclf.model.inputs import Opened

_STYLES = {TEMPLATE: "bright_black", MARKER: "bold black on yellow"}
_FIELD_STYLES = ("cyan", "green", "magenta", "blue", "red")


def show_rows(config: Config, ids: Sequence[str], data: Path | None, *, coloured: bool) -> Iterator[Text]:
    """`show` of the rows with these ids, or of the first row, in `data.train` or an unlabelled file."""
    config.require("inputs", "show")
    rows = find_rows(chunks_of(config, data)(), ids, config.task)
    from pairclf.model.inputs import open_inputs  # torch: a mistyped id shows before it
    from pairclf.model.positions import exceeded_limit

    opened = open_inputs(config)
    if config.num_examples:
        yield Text(f"note: {config.num_examples} examples of all labelled rows; a fold has its own\n", style="yellow")
        opened = opened._replace(builder=with_all_rows_examples(opened.config, opened.builder))
    if limit := exceeded_limit(opened.settings, config.inputs.max_length):
        yield Text(f"note: inputs.max_length={config.inputs.max_length}, and {limit}\n", style="yellow")
    for row in rows:
        yield from show(opened, row, coloured=coloured)


def with_all_rows_examples(config: Config, builder: InputBuilder) -> InputBuilder:
    """The recipe with the examples of a model on all labelled rows, for a few-shot prompt."""
    if not config.num_examples:
        return builder
    return with_examples(config, builder, pick_examples(labelled_rows(config), config))


def find_rows(chunks: Iterable[pl.DataFrame], ids: Sequence[str], task: Task) -> list[Row]:
    """The rows with these ids, in the order of the ids; the first of all rows where no id is given.

    Raises:
        DataError: an id is in none of the rows.
    """
    rows: dict[str, Row] = {}
    for chunk in chunks:
        matches = chunk.filter(pl.col("id").is_in(ids)) if ids else chunk.head(1)
        rows |= {row.id: row for row in to_rows(matches, task)}
        if len(rows) == max(1, len(ids)):
            break
    if missing := [row_id for row_id in ids if row_id not in rows]:
        raise DataError("no row has this id", rows=missing, remedy="look at the file's column id, or give --data FILE")
    return [rows[row_id] for row_id in ids] if ids else list(rows.values())


def show(opened: Opened, row: Row, *, coloured: bool) -> list[Text]:
    """One text per order: a line of figures, then the input, with each segment in its colour (or after its name).

    Colours belong to places: A's colour in order AB is B's in order BA. Control tokens, including all special tokens,
    are underlined.

    Args:
        opened: recipe and tokenizer.
        row: the row.
        coloured: use colours; otherwise each segment follows `⟨its name⟩`.
    """
    task, tokenizer = opened.config.task, opened.tokenizer
    styles = _STYLES | dict(zip(task.fields, _FIELD_STYLES * len(task.fields), strict=False))
    specials = opened.builder.tokenizer.control
    encoded = opened.builder.encode([row])[0]
    texts = []
    for order, order_input in enumerate(encoded):
        named = f", order {'AB' if order == AB else 'BA'}" if len(encoded) > 1 else ""
        text = Text(f"row {visible(row.id)}{named}: {_figures(opened, order_input)}\n", style="bold")
        for place in (*task.fields, MARKER, TEMPLATE):
            text.append(f" {place} ", style=styles[place] if place == MARKER else f"{styles[place]} reverse")
        text.append("\n")
        for name, start, stop in order_input.spans:
            text.append("" if coloured else f"⟨{name}⟩", style="bold")
            for special, ids in groupby(order_input.ids[start:stop].tolist(), specials.__contains__):
                text.append(_decode(tokenizer, list(ids)), style=f"{styles[name]}{' underline' * special}")
        text.append("\n")
        texts.append(text)
    return texts


def _figures(opened: Opened, order_input: Encoded) -> str:
    lost = ", ".join(f"{place} {tokens:,}" for place, tokens in order_input.dropped.items() if tokens)
    limit = opened.config.inputs.max_length
    return f"{len(order_input.ids):,} of {limit:,} tokens; " + (f"tokens cut from {lost}" if lost else "nothing cut")


def _decode(tokenizer: Any, ids: list[int]) -> str:
    if BRANCH in ids:  # the text of each side begins after one
        return "\n⟨branch⟩"
    if RATIONALE in ids:
        return f"⟨rationale, at most {len(ids)} tokens⟩"
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return visible(text)
