"""The rows of a report: which are shown, and each one's texts as the model saw them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from pairclf.config import SECTIONS
from pairclf.data.rows import to_rows
from pairclf.errors import ModelError
from pairclf.inputs.render import InputBuilder
from pairclf.reports.contents import Contents
from pairclf.runs.truncation import input_builders
from pairclf.scores.metrics import Floats, entropy_of
from pairclf.task import Row, Task

MOST = 60
"""Rows of each kind."""

KINDS = {
    "worst": "highest loss",
    "uncertain": "most uncertain",
    "orders": "most different in the other order",
    "suspect": "most suspect label",
    "random": "drawn at random",
}
"""The kinds of rows, with their titles. A row may be of several."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a field's text.

    Attributes:
        text: what stands there; empty: nothing.
        cut: tokens, if truncation cut them away; 0: the model saw the text.
        turn: number of the turn that begins here, from 1; 0: none does.
    """

    text: str
    cut: int = 0
    turn: int = 0


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row of a report.

    Attributes:
        row: as it was read.
        kinds: of `KINDS`.
        source: the file.
        fold: that held it out; None: not known.
        scores: its line of `Evaluation.by_row`.
        texts: the pieces of each field.
        suspicion: the probability that its label is wrong; None: not known.
        reasons: what speaks against the label.
    """

    row: Row
    kinds: Sequence[str]
    source: str
    fold: int | None
    scores: Mapping[str, Any]
    texts: Mapping[str, Sequence[Piece]]
    suspicion: float | None
    reasons: Sequence[str]


def pick_rows(contents: Contents, most: int = MOST) -> dict[str, list[str]]:
    """The kinds of each row that is shown, by id; the rows of a kind in its order, kind by kind."""
    by_row, task = contents.evaluation.by_row, contents.config.task
    ids = by_row["id"].to_list()
    predicted = matrix_of(by_row, "p", task)
    measures: dict[str, Floats] = {
        "worst": by_row["loss"].to_numpy(),
        "uncertain": entropy_of(predicted, multi_label=task.multi_label),
    }
    if contents.evaluation.orders is not None:
        first, second = (matrix_of(by_row, f"p_{order}", task) for order in ("ab", "ba"))
        measures["orders"] = np.abs(first - second).max(axis=1)
    if contents.suspicions:
        measures["suspect"] = np.array([contents.suspicions.get(row, 0.0) for row in ids])
    drawn = np.random.default_rng(contents.config.seed).permutation(len(ids))[:most]
    places = {
        name: [place for place in np.argsort(-values, kind="stable")[:most].tolist() if values[place] > 0]
        for name, values in measures.items()
    }
    kinds: dict[str, list[str]] = {}
    for name, chosen in (places | {"random": drawn.tolist()}).items():
        for place in chosen:
            kinds.setdefault(ids[place], []).append(name)
    return kinds


def matrix_of(by_row: pl.DataFrame, prefix: str, task: Task) -> Floats:
    """`(N, C)`: the columns `PREFIX_CLASS` of `Evaluation.by_row`."""
    return by_row.select(f"{prefix}_{name}" for name in task.classes).to_numpy()


def shown_rows(contents: Contents) -> tuple[list[ShownRow], str]:
    """The rows to show; and why their texts are whole and not as the model saw them, which is empty if they are."""
    kinds = pick_rows(contents)
    chosen = pl.DataFrame({"id": list(kinds)})
    frame = chosen.join(contents.labelled, on="id", how="left", maintain_order="left")
    scores = chosen.join(contents.evaluation.by_row, on="id", how="left", maintain_order="left").to_dicts()
    builders, why_whole = _builders(contents, list(kinds))
    shown = []
    for row, source, line in zip(to_rows(frame, contents.config.task), frame["file"], scores, strict=True):
        fold = contents.folds.get(row.id)
        builder = builders.get(fold)
        texts = whole_texts(row) if builder is None else seen_texts(row, builder)
        suspicion = contents.suspicions.get(row.id)
        reasons = contents.reasons.get(row.id, ())
        shown.append(ShownRow(row, kinds[row.id], source, fold, line, texts, suspicion, reasons))
    return shown, why_whole


def _builders(contents: Contents, ids: Sequence[str]) -> tuple[dict[int | None, InputBuilder], str]:
    """The recipe of each fold that held out one of the rows, or why there is none."""
    if contents.is_foreign:
        return {}, "a file of scores does not say what its models saw"
    if "inputs" not in SECTIONS[contents.config.approach]:
        return {}, f"approach={contents.config.approach} cuts nothing"
    folds = {contents.folds.get(row) for row in ids}
    if None in folds:
        return {}, "the run's folds.csv does not cover the rows"
    try:
        builders = input_builders(contents.config, sorted(fold for fold in folds if fold is not None))
        return dict(builders.items()), ""
    except (OSError, ModelError) as error:
        return {}, str(error)


def whole_texts(row: Row) -> dict[str, list[Piece]]:
    """Each field turn by turn, uncut."""
    return {
        name: [Piece(turn or "", turn=place * (len(turns) > 1)) for place, turn in enumerate(turns, 1)]
        for name, turns in row.fields.items()
    }


def seen_texts(row: Row, builder: InputBuilder) -> dict[str, list[Piece]]:
    """Each field in the words of the model's tokens, with what truncation cut in its place."""
    [tokens] = builder.tokenise([row])
    return {name: list(_pieces(parts, builder)) for name, parts in builder.kept(tokens, row.id).items()}


def _pieces(parts: Sequence[tuple[Any, Any]], builder: InputBuilder) -> Iterator[Piece]:
    for number, (ids, kept) in enumerate(parts, 1):
        begins = number * (len(parts) > 1)
        end = len(ids) - kept.tail
        for piece, dropped in ((ids[: kept.head], 0), (ids[kept.head : end], kept.dropped), (ids[end:], 0)):
            if len(piece):
                yield Piece(builder.tokenizer.text(piece), cut=dropped, turn=begins)
                begins = 0
