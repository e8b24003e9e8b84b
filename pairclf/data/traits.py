"""Traits of rows: what slices an evaluation looks at, and which side of a pair is longer, has more markdown or refuses.

The patterns are coarse and cheap: they are there to find where a model is worse, not to classify texts. Refusals are
found in English alone; the script is that of most letters among the first `SCRIPT_CHARACTERS` of the prompt.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pairclf.task import Task

MARKDOWN = r"(?m)^\s*(?:[-*+]|\d+[.)])\s|^#{1,6}\s|\*\*[^*\n]+\*\*|```|^\s*\|.*\|"
CODE = "```"
REFUSAL = (
    r"(?i)\b(?:i['’]?m sorry|i am sorry|i apologi[sz]e|i can(?:['’]t|not)|i['’]m unable|i am unable|"
    r"as an ai\b|i won['’]t)"
)
REFUSAL_CHARACTERS, SCRIPT_CHARACTERS = 300, 300
"""How much of the last turn, and of the prompt, is searched."""

SCRIPTS = {
    "Latin": r"\p{Latin}",
    "Cyrillic": r"\p{Cyrillic}",
    "Chinese or Japanese": r"\p{Han}|\p{Hiragana}|\p{Katakana}",
    "Korean": r"\p{Hangul}",
    "Arabic": r"\p{Arabic}",
    "Devanagari": r"\p{Devanagari}",
    "Greek": r"\p{Greek}",
    "Hebrew": r"\p{Hebrew}",
    "Thai": r"\p{Thai}",
}
QUARTERS = ("shortest quarter", "second quarter", "third quarter", "longest quarter")
ALIKE, TWICE = 1.1, 2.0
"""Ratios of the two answers' lengths that part the slices."""


def traits(frame: pl.DataFrame, task: Task) -> pl.DataFrame:
    """`(N, T)`: one String column a trait, whose value names the row's slice; null: the row is in none.

    Args:
        frame: canonical table.
        task: names the fields; pairs have traits of their two sides.
    """
    texts = _texts(frame, task)
    shared = [name for name in task.fields if name not in (task.swap_fields or ())] or list(task.fields)
    length = pl.sum_horizontal(pl.col(name).str.len_chars() for name in task.fields)
    columns = texts.select(
        pl.any_horizontal(pl.col(name).str.contains(CODE, literal=True) for name in task.fields)
        .replace_strict({True: "code", False: "no code"}, return_dtype=pl.String)
        .alias("code"),
        _script(shared[0]).alias("script of the prompt" if len(task.fields) > 1 else "script"),
        length.alias("length"),
    )
    quarter = np.searchsorted(np.quantile(columns["length"], [0.25, 0.5, 0.75]), columns["length"], side="left")
    turns = frame.select(pl.col(shared[0]).list.len().fill_null(0).clip(1, 3))[shared[0]]
    names = {1: "1 turn", 2: "2 turns", 3: "3 turns or more"}
    columns = columns.with_columns(
        pl.Series("length", [QUARTERS[place] for place in quarter], dtype=pl.String),
        turns.replace_strict(names, return_dtype=pl.String).alias("turns"),
    )
    if frame["file"].n_unique() > 1:
        columns = columns.with_columns(frame["file"].alias("file"))
    return columns if task.swap_fields is None else columns.hstack(_of_pairs(texts, task))


def _of_pairs(texts: pl.DataFrame, task: Task) -> pl.DataFrame:
    a, b = (pl.col(name) for name in task.swap_fields or ())
    lengths = [side.str.len_chars() + 1 for side in (a, b)]
    ratio = pl.max_horizontal(lengths) / pl.min_horizontal(lengths)
    marked = [side.str.contains(MARKDOWN) for side in (a, b)]
    refused = [_refuses(name) for name in task.swap_fields or ()]
    return texts.select(
        pl.when(a == b)
        .then(pl.lit("equal answers"))
        .when(ratio < ALIKE)
        .then(pl.lit("answers as long as each other"))
        .when(ratio < TWICE)
        .then(pl.lit("one answer longer"))
        .otherwise(pl.lit("one answer twice as long"))
        .alias("lengths of the answers"),
        _count(marked, "markdown in").alias("markdown"),
        _count(refused, "refusal in").alias("refusals"),
    )


def preferred_sides(frame: pl.DataFrame, task: Task) -> dict[str, NDArray[np.int64]]:
    """By bias, `(N,)`: the side (0: A, 1: B) that a judge with this bias would favour; -1: the sides are alike in it.

    Empty for tasks without two sides.
    """
    if task.swap_fields is None:
        return {}
    texts = _texts(frame, task)
    sides = task.swap_fields
    measures = {
        "the longer answer": [pl.col(side).str.len_chars() for side in sides],
        "the answer with more markdown": [pl.col(side).str.count_matches(MARKDOWN) for side in sides],
        "the answer that refuses": [_refuses(side).cast(pl.Int64) for side in sides],
    }
    favoured: dict[str, NDArray[np.int64]] = {}
    for name, (first, second) in measures.items():
        values = texts.select(first.alias("a"), second.alias("b"))
        a, b = values["a"].to_numpy().astype(np.int64), values["b"].to_numpy().astype(np.int64)
        favoured[name] = np.where(a == b, -1, (b > a).astype(np.int64))
    return favoured


def _texts(frame: pl.DataFrame, task: Task) -> pl.DataFrame:
    """Each field's turns in one text, and the opening of its last turn as `FIELD opening`."""
    return frame.select(
        *(pl.col(name).list.join("\n").fill_null("") for name in task.fields),
        *(
            pl.col(name).list.last().str.head(REFUSAL_CHARACTERS).fill_null("").alias(f"{name} opening")
            for name in task.swap_fields or ()
        ),
    )


def _refuses(side: str) -> pl.Expr:
    return pl.col(f"{side} opening").str.contains(REFUSAL)


def _count(sides: list[pl.Expr], words: str) -> pl.Expr:
    count = sides[0].cast(pl.Int64) + sides[1].cast(pl.Int64)
    names = {0: f"{words} no answer", 1: f"{words} one answer", 2: f"{words} both answers"}
    return count.replace_strict(names, return_dtype=pl.String)


def _script(name: str) -> pl.Expr:
    """The script with the most letters; null without letters of any."""
    opening = pl.col(name).str.head(SCRIPT_CHARACTERS)
    counts = pl.concat_list(opening.str.count_matches(pattern) for pattern in SCRIPTS.values())
    names = dict(enumerate(SCRIPTS))
    return (
        pl.when(counts.list.max() > 0)
        .then(counts.list.arg_max().replace_strict(names, return_dtype=pl.String))
        .otherwise(None)
    )
