"""Which row is meant: hashes of its prompt and of all its texts, since an id alone may be another file's.

Scores carry both hashes. Whoever joins scores to rows on their id has the rows compared here. A bundle carries the
hashes of the prompts that it was trained on, and samples of them, which tell whether it has seen a row's prompt or one
that is nearly the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from pairclf.data.duplicates import near_samples, normalised_prompts, normalised_texts, samples
from pairclf.data.folds import prompt_hashes, text_hash
from pairclf.data.tables import HASHES
from pairclf.errors import DataError
from pairclf.task import Task


def row_hashes(frame: pl.DataFrame, task: Task) -> pl.DataFrame:
    """Hashes `(N,)` of each row, UInt64, the same on every machine and in every run.

    `prompt` as `folds.prompt_hashes` has it; `row_hash` of all fields in their places, so that a row and its mirror
    (sides exchanged) differ. Both are of texts in normal form: letters' case, white space and control characters do
    not count.
    """
    return pl.DataFrame([prompt_hashes(frame, task), _text_hashes(frame, task.fields)])


def _text_hashes(frame: pl.DataFrame, fields: tuple[str, ...]) -> pl.Series:
    texts = [normalised_texts(frame[name].list.join("\n").fill_null("")).to_list() for name in fields]
    hashes = [text_hash("\0".join(row)) for row in zip(*texts, strict=True)]  # \0: no text in normal form holds one
    return pl.Series("row_hash", hashes, dtype=pl.UInt64)


def refuse_other_rows(scores: pl.DataFrame, rows: pl.DataFrame, task: Task, where: Path) -> None:
    """Do nothing if scores that have the id of a row are of that very row, as far as they tell.

    Args:
        scores: `id` and the columns of `tables.HASHES`; what is null there is not compared.
        rows: canonical table; ids that it lacks are not looked at.
        task: whose fields are compared.
        where: file of the scores.

    Raises:
        DataError: names the rows, and what differs: the prompt, the sides' order, or another text.
    """
    met = rows.filter(pl.col("id").is_in(scores["id"].to_list()))
    own = pl.DataFrame([met["id"], *(hashes.alias(f"own_{hashes.name}") for hashes in row_hashes(met, task))])
    joined = scores.select("id", *HASHES).join(own, on="id", how="inner", maintain_order="left")
    prompt = (joined["prompt"] != joined["own_prompt"]).fill_null(value=False)
    text = (joined["row_hash"] != joined["own_row_hash"]).fill_null(value=False)
    odd = met.filter(pl.col("id").is_in(joined["id"].filter(text).to_list()))
    mirrors = pl.DataFrame([odd["id"], _text_hashes(odd, tuple(task.swapped_fields.values())).alias("mirror")])
    joined = joined.join(mirrors, on="id", how="left", maintain_order="left")
    mirrored = text & (joined["row_hash"] == joined["mirror"]).fill_null(value=False)
    for unlike, what in (
        (prompt, "another prompt: these are scores of other rows"),
        (mirrored & ~prompt, "its sides exchanged (A stands where B stood): these are scores of its mirror"),
        (text & ~prompt, "other texts: these are scores of other rows"),
    ):
        if unlike.any():
            raise DataError(
                f"{unlike.sum():,} rows have the id of a row here and {what}",
                where=where,
                rows=joined["id"].filter(unlike).to_list(),
                remedy="give scores of these very rows; id_prefix of a source keeps ids of several files apart",
            )


def prompt_marks(frame: pl.DataFrame, task: Task) -> pl.DataFrame:
    """What is kept of prompts `(N,)` to know them again: `prompt` (`folds.prompt_hashes`) and `sample` (List(UInt32)).

    A prompt's sample is as large as 1 KB, where the prompt has 260 characters or more.
    """
    return pl.DataFrame([prompt_hashes(frame, task), samples(normalised_prompts(frame, task))])


def seen_by(
    marks: pl.DataFrame, trained_on: Sequence[pl.DataFrame | None], nears: Sequence[float | None]
) -> list[pl.Series]:
    """For each model, which prompts are equal, or nearly equal, to one that it was trained on; Boolean `(N,)` each.

    Null says that nobody knows: the model's bundle notes no prompts, or is an older one that notes no samples of them,
    so that equal prompts alone are known again.

    Args:
        marks: `prompt_marks` of the rows asked about.
        trained_on: what each model's bundle notes: `prompt_marks`, an older one's `prompt` alone, or nothing.
        nears: each model's `folds.near`; None: prompts that are equal alone count.
    """
    unknown = pl.repeat(None, len(marks), dtype=pl.Boolean, eager=True)
    found = [unknown if one is None else marks["prompt"].is_in(one["prompt"].to_list()) for one in trained_on]
    for near in {near for near in nears if near is not None}:
        models = {place: one for place, one in enumerate(trained_on) if one is not None and nears[place] == near}
        sampled = {place: one for place, one in models.items() if _has_samples(one)}
        nearly = _near(marks, sampled, {place: found[place] for place in sampled}, near)
        for place in models:
            found[place] |= nearly.get(place, unknown)  # true or null is true, false or null is null
    return found


def _has_samples(trained_on: pl.DataFrame) -> bool:
    return "sample" in trained_on.columns and trained_on["sample"].null_count() == 0


def _near(
    marks: pl.DataFrame, trained_on: dict[int, pl.DataFrame], equal: dict[int, pl.Series], near: float
) -> dict[int, pl.Series]:
    """By model, which rows have a prompt that is near to one of its own; `equal` rows are not looked at any more."""
    if not trained_on:
        return {}
    known = pl.concat(trained_on.values()).unique("prompt", maintain_order=True)
    unequal = pl.select(pl.any_horizontal(~one for one in equal.values())).to_series()
    fresh = marks.filter(unequal).unique("prompt", maintain_order=True)
    searches = []
    for place, one in trained_on.items():
        asked = ~fresh["prompt"].is_in(marks["prompt"].filter(equal[place]).to_list())
        searches.append((known["prompt"].is_in(one["prompt"].to_list()), asked))
    nearly = near_samples(fresh["sample"], known["sample"], searches, near)
    return {
        place: marks["prompt"].is_in(fresh["prompt"].filter(one).to_list())
        for place, one in zip(trained_on, nearly, strict=True)
    }
