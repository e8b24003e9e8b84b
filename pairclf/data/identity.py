"""The identity of rows: hashes of prompt and texts, fingerprints, and whether a model was trained on a prompt.

Scores carry both hashes. Whoever joins scores to rows on their id has the rows compared here. A bundle carries the
hashes of the prompts that it was trained on, and samples of them, which tell whether it has seen a row's prompt or one
that is nearly the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pairclf.console import counted
from pairclf.data.duplicates import near_samples, normalised_prompts, normalised_texts, samples
from pairclf.data.folds import prompt_hashes, text_hash
from pairclf.data.scores import HASHES
from pairclf.errors import DataError
from pairclf.task import Row, Task


def row_hashes(frame: pl.DataFrame, task: Task) -> pl.DataFrame:
    """Hashes `(N,)` of each row, UInt64, the same on every machine and in every run.

    `prompt` is `folds.prompt_hashes`; `row_hash` covers all fields in order, so that a row and its mirror (sides
    exchanged) differ. Texts are hashed in normal form: case, white space and control characters do not matter.
    """
    return pl.DataFrame([prompt_hashes(frame, task), _text_hashes(frame, task.fields)])


def _text_hashes(frame: pl.DataFrame, fields: tuple[str, ...]) -> pl.Series:
    texts = [normalised_texts(frame[name].list.join("\n").fill_null("")).to_list() for name in fields]
    hashes = [text_hash("\0".join(row)) for row in zip(*texts, strict=True)]  # \0: no text in normal form holds one
    return pl.Series("row_hash", hashes, dtype=pl.UInt64)


def refuse_other_rows(scores: pl.DataFrame, rows: pl.DataFrame, task: Task, where: Path) -> None:
    """Refuse scores that have the id of a row, but other hashes.

    Args:
        scores: `id` and the columns of `scores.HASHES`; nulls are not compared.
        rows: canonical table; other ids are skipped.
        task: whose fields are compared.
        where: file of the scores.

    Raises:
        DataError: it names the rows and the difference: the prompt, exchanged sides, or another text.
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
                f"{counted(int(unlike.sum()), 'row has', 'rows have')} the id of a row here and {what}",
                where=where,
                rows=joined["id"].filter(unlike).to_list(),
                remedy="give scores of these very rows; id_prefix of a source keeps ids of several files apart",
            )


def prompt_marks(frame: pl.DataFrame, task: Task) -> pl.DataFrame:
    """The marks by which a bundle recognises prompts `(N,)`: `prompt` (`folds.prompt_hashes`), `sample` (List(UInt32)).

    A sample has up to 1 KB, for prompts of 260 characters or more.
    """
    return pl.DataFrame([prompt_hashes(frame, task), samples(normalised_prompts(frame, task))])


def seen_by(
    marks: pl.DataFrame, trained_on: Sequence[pl.DataFrame | None], nears: Sequence[float | None]
) -> list[pl.Series]:
    """For each model, the mask `(N,)` of prompts that are (nearly) equal to one of its training prompts.

    Null means unknown: the bundle has no marks, or is an older one without samples, which can recognise equal prompts
    only.

    Args:
        marks: `prompt_marks` of the rows.
        trained_on: the marks in each model's bundle: `prompt_marks`, the column `prompt` alone, or None.
        nears: each model's `folds.near_duplicate_threshold`; None: equal prompts only.
    """
    unknown = pl.repeat(None, len(marks), dtype=pl.Boolean, eager=True)
    seen = [unknown if noted is None else marks["prompt"].is_in(noted["prompt"].to_list()) for noted in trained_on]
    for near in {near for near in nears if near is not None}:
        models = {place: noted for place, noted in enumerate(trained_on) if noted is not None and nears[place] == near}
        sampled = {place: noted for place, noted in models.items() if _has_samples(noted)}
        nearly = _near(marks, sampled, {place: seen[place] for place in sampled}, near)
        for place in models:
            seen[place] |= nearly.get(place, unknown)  # true or null is true, false or null is null
    return seen


def _has_samples(trained_on: pl.DataFrame) -> bool:
    return "sample" in trained_on.columns and trained_on["sample"].null_count() == 0


def _near(
    marks: pl.DataFrame, trained_on: dict[int, pl.DataFrame], equal: dict[int, pl.Series], near: float
) -> dict[int, pl.Series]:
    """By model, the mask of rows whose prompt is near to a training prompt; `equal` rows are skipped."""
    if not trained_on:
        return {}
    noted = pl.concat(trained_on.values()).unique("prompt", maintain_order=True)
    unequal = pl.select(pl.any_horizontal(~own for own in equal.values())).to_series()
    fresh = marks.filter(unequal).unique("prompt", maintain_order=True)
    searches = []
    for place, own in trained_on.items():
        asked = ~fresh["prompt"].is_in(marks["prompt"].filter(equal[place]).to_list())
        searches.append((noted["prompt"].is_in(own["prompt"].to_list()), asked))
    nearly = near_samples(fresh["sample"], noted["sample"], searches, near)
    return {
        place: marks["prompt"].is_in(fresh["prompt"].filter(own).to_list())
        for place, own in zip(trained_on, nearly, strict=True)
    }


def fingerprint(rows: Sequence[Row]) -> str:
    """Hex SHA-256 of rows: ids, texts, targets, weights, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        plain = [row.id, {name: list(turns) for name, turns in row.fields.items()}, row.target, row.weight]
        digest.update(json.dumps(plain, sort_keys=True).encode())
    return digest.hexdigest()


def fingerprint_of_examples(rows: Sequence[Row], teachers: NDArray[np.float64] | None) -> str:
    """`fingerprint` of training rows, and that of their teachers' probabilities `(N, C)` behind it."""
    teacher_bytes = b"" if teachers is None else np.ascontiguousarray(teachers).tobytes()
    return fingerprint(rows) + hashlib.sha256(teacher_bytes).hexdigest()
