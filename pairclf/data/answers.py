"""Prompts with any number of answers each: read them, make rows to score of them, and write their ranking.

A file has one row a prompt, with a column `answers` that lists them (.jsonl, .parquet); or one row an answer, with a
column `answer` (.csv too), and a prompt's rows have its id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import polars as pl

from pairclf.config import Rules, Source
from pairclf.console import counted
from pairclf.data.audit import clean, note_changes
from pairclf.data.formats import TURNS, read_file
from pairclf.data.rows import read_rows, rows_in_memory
from pairclf.errors import DataError
from pairclf.files import atomic_file
from pairclf.task import REWARD, SIDE, Task

ANSWERS, ANSWER = "answers", "answer"
"""Columns of a file: a prompt's answers, or one of them."""

_COLUMNS = {ANSWERS, ANSWER, SIDE, "same_as", "first", "second"}

MAX_PAIRS = 2016
"""Most pairs of a prompt's answers that are scored unasked: those of 64 answers."""

RANK_DIGITS = 6
"""Decimal places of scores that ranks go by: what differs by rounding errors alone shares a rank."""

WRITERS: dict[str, Callable[[pl.DataFrame, Path], object]] = {
    ".csv": pl.DataFrame.write_csv,
    ".parquet": pl.DataFrame.write_parquet,
    ".jsonl": pl.DataFrame.write_ndjson,
}
"""By the ending of a ranking's file."""


def read_answers(
    source: Path | pl.DataFrame, task: Task, rules: Rules, columns: Mapping[str, str | None]
) -> pl.DataFrame:
    """Read a table of answers, repaired by the rules.

    Args:
        source: a .csv, .parquet or .jsonl file, or its rows.
        task: a prompt has the fields of a row that are not a side's.
        rules: `data.rules`.
        columns: `data.test.columns`; what it says of the sides is not needed.

    Returns:
        One row an answer: `id` and the prompt's fields, `group` and `answer` (numbers from 0: of the prompt in the
        file, of the answer in the prompt), `response` List(String), and `same_as`, the prompt's first answer with this
        text.

    Raises:
        DataError: the file can't be read, columns are missing, a prompt has no answer, an id stands for two prompts, or
            as `clean`.
    """
    shared = [name for name in task.fields if name not in (task.swap_fields or ())]
    if clashes := sorted(_COLUMNS & {*shared}):
        raise DataError(f"task {task.name!r} has fields {clashes}, which are columns of answers", remedy="rename them")
    names = {name: columns[name] for name in ("id", *shared) if name in columns}
    path = source if isinstance(source, Path) else Path("answers")
    header = (next(read_file(source, rows=1, lossy=True)) if isinstance(source, Path) else source).columns
    listed = ANSWERS in header
    if listed == (ANSWER in header) or (listed and path.suffix.lower() == ".csv"):
        raise DataError(
            f"the file has the columns {header}; it must have one of `{ANSWERS}` (not in a CSV) and `{ANSWER}`",
            where=path,
            remedy=f"write one row a prompt, with the list `{ANSWERS}`, as .jsonl or .parquet; or one row an answer, "
            f"with its text as `{ANSWER}` and the prompt's `id` (docs/approaches.md)",
        )
    if listed and names.get("id", "id") not in header:
        names["id"] = None
    column = ANSWERS if listed else ANSWER
    reading = Task(
        name=task.name, fields=(*shared, column), classes=(REWARD,), multi_turn=task.multi_turn, multi_label=True
    )
    if isinstance(source, Path):
        frame = read_rows([Source(files=[path], columns=names)], reading, labelled=False)
    else:
        frame = rows_in_memory(source, reading, {"id": "id", **names})
    ids = frame["id"]
    if not listed:  # ids may repeat
        frame = frame.with_columns(id="row " + pl.int_range(1, pl.len() + 1).cast(pl.String))
    frame, findings = clean(frame, reading, rules, labelled=False)
    note_changes(findings)
    frame = frame.select("id", *shared, column)
    by_answer = _of_lists(frame, path) if listed else _of_rows(frame.with_columns(ids), shared, path)
    by_answer = by_answer.with_columns(answer=pl.int_range(pl.len()).over("group"), key=_key(SIDE))
    same = pl.col("answer").first().over("group", "key").alias("same_as")
    return by_answer.select("id", *shared, "group", "answer", SIDE, same)


def _key(*columns: str) -> pl.Expr:
    """One text that is equal where the columns are."""
    return pl.struct(*columns).struct.json_encode()


def _of_lists(frame: pl.DataFrame, path: Path) -> pl.DataFrame:
    """One row an answer of a table with lists of them."""
    answers = pl.col(ANSWERS).list
    empty = frame.filter(answers.drop_nulls().list.len() == 0)["id"]
    if len(empty):
        raise DataError(
            f"{counted(len(empty), 'prompt has', 'prompts have')} no answers",
            where=path,
            rows=empty.to_list(),
            remedy=f"take these rows out, or list a text in their `{ANSWERS}`; an empty text is one, too",
        )
    exploded = frame.with_row_index("group").explode(ANSWERS)
    return exploded.with_columns(pl.concat_list(ANSWERS).alias(SIDE))


def _of_rows(frame: pl.DataFrame, shared: list[str], path: Path) -> pl.DataFrame:
    """A table of one row an answer, each prompt's rows in sequence."""
    different = frame.select("id", _key(*shared).alias("key")).unique(maintain_order=True)["id"]
    repeated = different.filter(different.is_duplicated()).unique(maintain_order=True)
    if len(repeated):
        raise DataError(
            f"{counted(len(repeated), 'id stands', 'ids stand')} for different prompts",
            where=path,
            rows=repeated.to_list(),
            remedy="give each prompt an id of its own, and all of its answers the same prompt",
        )
    numbers = different.to_frame().with_row_index("group")
    return frame.join(numbers, on="id", maintain_order="left").sort("group", maintain_order=True).rename({ANSWER: SIDE})


def pointwise_rows(answers: pl.DataFrame, task: Task) -> pl.DataFrame:
    """A row for each different answer: `group`, `answer`, `id`, and the fields of `task.pointwise`."""
    different = answers.filter(pl.col("answer") == pl.col("same_as"))
    row_id = pl.format("{}, answer {}", "id", "answer").alias("id")
    return different.select("group", "answer", row_id, *_fields(task.pointwise))


def pairwise_rows(answers: pl.DataFrame, task: Task, budget: int | None = None) -> pl.DataFrame:
    """A row for each pair of a prompt's different answers: `group`, `first`, `second`, `id`, and the task's fields.

    Args:
        answers: as `read_answers` has them.
        task: with two sides.
        budget: most pairs a prompt; each answer is then in about as many. None: all, as far as `MAX_PAIRS` goes.

    Raises:
        DataError: the answers of a prompt are too many.
    """
    different = answers.filter(pl.col("answer") == pl.col("same_as")).with_columns(key=_key(SIDE))
    counts = different.group_by("group", maintain_order=True).agg(pl.col("id").first(), n=pl.len())
    _check_counts(counts, budget)
    # In the order of their texts: which pairs a budget takes does not hang on the order of the answers.
    by_prompt = different.sort("group", "key").group_by("group", maintain_order=True).agg("answer")
    pairs = [
        (prompt, *sorted((numbers[one], numbers[other])))
        for prompt, numbers in by_prompt.iter_rows()
        for one, other in islice(_round_robin(len(numbers)), budget)
    ]
    table = pl.DataFrame(pairs, schema={"group": pl.UInt32, "first": pl.Int64, "second": pl.Int64}, orient="row")
    a, b = task.swap_fields or ("", "")
    left = different.rename({"answer": "first", SIDE: a})
    right = different.select("group", pl.col("answer").alias("second"), pl.col(SIDE).alias(b))
    on = ["group", "first"], ["group", "second"]
    joined = table.join(left, on=on[0], maintain_order="left").join(right, on=on[1], maintain_order="left")
    row_id = pl.format("{}, answers {} and {}", "id", "first", "second").alias("id")
    return joined.select("group", "first", "second", row_id, *_fields(task))


def _fields(task: Task) -> list[pl.Expr]:
    return [pl.col(name).cast(TURNS) for name in task.fields]


def _round_robin(count: int) -> Iterator[tuple[int, int]]:
    """All pairs of `count` numbers, in rounds in which each is about as often: neighbours in a circle first.

    >>> list(_round_robin(4))
    [(0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (1, 3)]
    """
    for distance in range(1, count // 2 + 1):
        half = 2 * distance == count
        yield from ((number, (number + distance) % count) for number in range(distance if half else count))


def _check_counts(counts: pl.DataFrame, budget: int | None) -> None:
    """Raise `DataError` for prompts with too many answers, or more than a budget connects."""
    pairs = counts["n"].cast(pl.Int64) * (counts["n"].cast(pl.Int64) - 1) // 2
    wrong = pairs > MAX_PAIRS if budget is None else counts["n"] > budget + 1
    if not wrong.any():
        return
    most = int(counts["n"].filter(wrong).max())  # type: ignore[arg-type]
    what = f"--pairs {budget} does not connect {most:,} different answers"
    if budget is None:
        inputs = most * (most - 1)
        what = (
            f"{most:,} different answers make {inputs // 2:,} pairs, {inputs:,} inputs in both orders; without --pairs "
            f"a prompt may have {MAX_PAIRS:,} pairs"
        )
    raise DataError(
        what,
        rows=counts["id"].filter(wrong).to_list(),
        remedy=f"give --pairs N, {most - 1:,} at least and several times as many for a good ranking; or a bundle with "
        "model.readout=reward, which scores each answer once",
    )


def ranking(answers: pl.DataFrame, scored: pl.DataFrame, name: str = REWARD) -> pl.DataFrame:
    """The answers with their scores: `id`, `answer`, the score, `rank` (1 is the best; equal ones share a rank).

    Args:
        answers: as `read_answers` has them.
        scored: `group`, `answer` and the column `name`, for each different answer; NaN: it could not be scored, and
            has neither score nor rank.
        name: of the score.
    """
    scored = scored.select("group", pl.col("answer").alias("same_as"), pl.col(name).fill_nan(None))
    joined = answers.join(scored, on=["group", "same_as"], how="left", maintain_order="left")
    rank = pl.col(name).round(RANK_DIGITS).rank("min", descending=True).over("group").cast(pl.UInt32).alias("rank")
    return joined.select("id", "answer", name, rank)


def write_ranking(path: Path, table: pl.DataFrame) -> None:
    """Write a ranking as its file's name says, a key of `WRITERS`, atomically."""
    with atomic_file(path) as temporary:
        WRITERS[path.suffix.lower()](table, temporary)


def write_rows(path: Path, rows: pl.DataFrame) -> None:
    """Write rows to score as parquet, without what says which answers they are of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        rows.drop("group", "answer", "first", "second", strict=False).write_parquet(temporary)
