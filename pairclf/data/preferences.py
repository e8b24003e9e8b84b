"""Public preference sets: a table of their formats, which of them a file has, and their rows as those of a task."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pairclf.config import Source
from pairclf.data.formats import (
    REPLACEMENT,
    SURROGATE,
    TURNS,
    Bits,
    Flaw,
    as_ids,
    as_text,
    mark,
    mended_texts,
    python_cells,
)
from pairclf.data.messages import (
    BROKEN_MESSAGES,
    Conversation,
    Message,
    conversation,
    decoded,
    has_question,
    is_messages,
    transcript,
)
from pairclf.errors import DataError
from pairclf.scores.metrics import Floats
from pairclf.task import Task

FIRST, SECOND, TIE = 0, 1, 2
ARENA = {"model_a": FIRST, "model_b": SECOND, "tie": TIE, "both_bad": TIE, "tie (bothbad)": TIE}
"""`winner` in the releases of LMSYS and LMArena. LMSYS's competition merged "both bad" into the tie, too."""


@dataclass(frozen=True, slots=True)
class PreferenceFormat:
    """The columns of a public set: a record of `FORMATS`. A column besides `marks` is read if the file has it.

    Attributes:
        page: where its schema stands.
        marks: the columns by which a file is recognised, all of them needed.
        sides: the columns of the two sides: lists of messages, or texts. Messages without a user's follow `prompt`.
        id: the column of ids; without one, rows are numbered.
        prompt: the column of what is asked, if the sides do not hold it: a text or a list of messages.
        winner: the column that names the winner; None: the first side won, and the sides are drawn by id.
        labels: what `winner` says: `FIRST`, `SECOND` or `TIE`.
        margin: the columns whose sum, with these factors, is how much better the first side is.
        raters: the column with a list of raters, and the name of their margin.
    """

    page: str
    marks: tuple[str, ...]
    sides: tuple[str, str]
    id: str | None = None
    prompt: str | None = None
    winner: str | None = None
    labels: Mapping[str, int] | None = None
    margin: Mapping[str, float] | None = None
    raters: tuple[str, str, float] | None = None

    @property
    def drawn(self) -> bool:
        """Whether the first side won in every row, so that its place must be drawn."""
        return self.sides == ("chosen", "rejected")


_HUB = "https://huggingface.co/datasets/"
_CONVERSATIONS = ("conversation_a", "conversation_b")

FORMATS: dict[str, PreferenceFormat] = {
    "arena-140k": PreferenceFormat(
        page=f"{_HUB}lmarena-ai/arena-human-preference-140k",
        marks=(*_CONVERSATIONS, "winner", "evaluation_order"),
        sides=_CONVERSATIONS,
        id="id",
        winner="winner",
        labels=ARENA,
    ),
    "arena-100k": PreferenceFormat(
        page=f"{_HUB}lmarena-ai/arena-human-preference-100k",
        marks=(*_CONVERSATIONS, "winner", "conv_metadata"),
        sides=_CONVERSATIONS,
        id="question_id",
        winner="winner",
        labels=ARENA,
    ),
    "chatbot-arena-33k": PreferenceFormat(
        page=f"{_HUB}lmsys/chatbot_arena_conversations",
        marks=(*_CONVERSATIONS, "winner"),
        sides=_CONVERSATIONS,
        id="question_id",
        winner="winner",
        labels=ARENA,
    ),
    "helpsteer3": PreferenceFormat(
        page=f"{_HUB}nvidia/HelpSteer3",
        marks=("context", "response1", "response2", "overall_preference"),
        sides=("response1", "response2"),
        prompt="context",
        margin={"overall_preference": -1.0},
        raters=("individual_preference", "score", -1.0),
    ),
    "helpsteer2": PreferenceFormat(
        page=f"{_HUB}nvidia/HelpSteer2",
        marks=("prompt", "response_1", "response_2", "preference_strength"),
        sides=("response_1", "response_2"),
        prompt="prompt",
        margin={"preference_strength": -1.0},
        raters=("all_preferences_unprocessed", "strength", -1.0),
    ),
    "ultrafeedback": PreferenceFormat(
        page=f"{_HUB}HuggingFaceH4/ultrafeedback_binarized",
        marks=("chosen", "rejected", "score_chosen", "score_rejected"),
        sides=("chosen", "rejected"),
        prompt="prompt",
        margin={"score_chosen": 1.0, "score_rejected": -1.0},
    ),
    "chosen-rejected": PreferenceFormat(
        page="https://huggingface.co/docs/trl/dataset_formats",
        marks=("chosen", "rejected"),
        sides=("chosen", "rejected"),
        id="id",
        prompt="prompt",
        margin={"margin": 1.0},
    ),
}
"""Formats by their name for `format`; a file has the first whose `marks` it has. A new one is a new record, and its
name in `config.data.Format`."""

_STRONGEST = 3.0
"""The largest margin in HelpSteer. Its files have -100 where a rater took neither response."""


def recognise(columns: Sequence[str]) -> str | None:
    """The format that a file with these columns has; None: none that is known.

    >>> recognise(["prompt", "chosen", "rejected"])
    'chosen-rejected'
    """
    return next((name for name, record in FORMATS.items() if {*record.marks} <= {*columns}), None)


def entry(path: Path, name: str) -> str:
    """The lines of a config that read a file of this format."""
    files = json.dumps(str(path), ensure_ascii=False)
    return f"data:\n  train:\n    - {{files: {files}, format: {name}, id_prefix: {name}-}}"


def why_not(task: Task) -> str | None:
    """Why preference sets can't be rows of a task; None: they can."""
    if task.swap_fields is None or task.swap_classes is None:
        return f"task {task.name!r} has no two sides (swap_fields)"
    if len(task.fields) != 3:
        return f"task {task.name!r} has the fields {list(task.fields)}, and not a prompt and two sides"
    if len(task.classes) > 3:
        return f"task {task.name!r} has the classes {list(task.classes)}, and not two winners and at most a tie"
    return None


@dataclass(frozen=True, slots=True)
class Converted:
    """Rows of a preference set with the columns of a task.

    Attributes:
        frame: `id`, the fields as lists of turns, a column of probabilities a class, and `group` and `weight` if the
            source maps them.
        flaws: `(N,)` bits of `Flaw`.
        parts: how many parts of messages are no text, by type.
        unequal: rows whose sides follow different questions.
        unknown: what names a winner and is none of the format's labels.
    """

    frame: pl.DataFrame
    flaws: Bits
    parts: Counter[str]
    unequal: int
    unknown: frozenset[str]


def convert(raw: pl.DataFrame, source: Source, task: Task, path: Path, before: int) -> Converted:
    """A chunk of a file in the format that the source names.

    Args:
        raw: the file's own columns.
        before: rows of the source before this chunk, for the numbers of rows without ids.

    Raises:
        DataError: the file lacks a column, or ids have a type that ids can't have.
    """
    assert source.format is not None
    record = FORMATS[source.format]
    id_column = source.columns.get("id", record.id)
    extra = {name: column for name in ("group", "weight") if (column := source.columns.get(name))}
    needed = [*record.marks, *extra.values(), *([id_column] if "id" in source.columns and id_column else [])]
    if missing := [name for name in needed if name not in raw.columns]:
        other = recognise(raw.columns)
        raise DataError(
            f"format {source.format!r} needs the columns {missing}; the file has {raw.columns}",
            where=path,
            remedy=f"it looks like format: {other}" if other else f"its schema stands on {record.page}",
        )
    numbers = pl.int_range(before + 1, before + len(raw) + 1, eager=True).cast(pl.String)
    known = id_column in raw.columns
    ids = raw[id_column] if known and id_column else numbers
    names = as_ids(ids, path).fill_null(numbers)
    exchanged = _drawn(names) if record.drawn else np.zeros(len(raw), dtype=bool)
    texts, flaws, parts, unequal = _texts(raw, record, exchanged)
    verdicts = _verdicts(raw, record, source.margin_scale)
    verdicts[exchanged] = verdicts[exchanged][:, [SECOND, FIRST, TIE]]
    columns = [
        ids.alias("id"),
        *(pl.Series(name, cells, dtype=TURNS) for name, cells in zip(_places(task), texts, strict=True)),
        *_label_columns(verdicts, task),
        *(raw[column].alias(name) for name, column in extra.items()),
    ]
    unknown = frozenset[str]()
    if record.winner is not None:
        unknown = frozenset(as_text(raw[record.winner]).drop_nulls()) - {*(record.labels or {})}
    return Converted(pl.DataFrame(columns), flaws, parts, unequal, unknown)


def _places(task: Task) -> tuple[str, str, str]:
    """The fields of the prompt and of either side."""
    assert task.swap_fields is not None  # why_not
    (prompt,) = (name for name in task.fields if name not in task.swap_fields)
    return prompt, *task.swap_fields


def _drawn(ids: pl.Series) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether the preferred response is the second side: one bit of each id's SHA-256."""
    return np.array([hashlib.sha256(str(name).encode()).digest()[0] & 1 for name in ids], dtype=bool)


# --- texts -----------------------------------------------------------------------------------------------------------


def _texts(
    raw: pl.DataFrame, record: PreferenceFormat, exchanged: np.ndarray[Any, np.dtype[np.bool_]]
) -> tuple[list[list[list[str | None] | None]], Bits, Counter[str], int]:
    """The turns of prompt, first and second side, each `(N,)`; flaws; parts that are no text; unequal questions."""
    nothing = [None] * len(raw)
    read = [record.prompt if record.prompt in raw.columns else None, *record.sides]
    contexts, firsts, seconds = (python_cells(raw[name]) if name else nothing for name in read)
    columns: list[list[list[str | None] | None]] = [[], [], []]
    parts, unequal = Counter[str](), 0
    odd, broken = np.zeros(len(raw), dtype=bool), np.zeros(len(raw), dtype=bool)
    for row, (context, *cells) in enumerate(zip(contexts, firsts, seconds, strict=True)):
        a, b = (_conversation(context, cell) for cell in (cells[::-1] if exchanged[row] else cells))
        parts += a.parts + b.parts
        differ = a.asked != b.asked
        unequal += differ
        odd[row] = differ or not (a.sound and b.sound)
        for column, turns in zip(columns, (a.asked, a.answered, b.answered), strict=True):
            mended = [None if turn is None else SURROGATE.sub(REPLACEMENT, turn) for turn in turns]
            broken[row] |= mended != turns
            column.append(mended or None)
    flaws: Bits = np.zeros(len(raw), dtype=np.uint32)
    mark(flaws, pl.Series(odd), Flaw.UNDECODABLE)
    mark(flaws, pl.Series(broken), Flaw.SURROGATE)
    for name in filter(None, read):
        mark(flaws, mended_texts(raw[name]), Flaw.SURROGATE)
    return columns, flaws, parts, unequal


def _conversation(context: Any, cell: Any) -> Conversation:
    """One side's conversation: its own messages, behind those of the prompt if no user is among them.

    A text that names a user is a transcript where the file has no prompt, or repeats it. Otherwise it is an answer that
    is written as a dialogue.
    """
    messages, sound = _messages(cell, "assistant")
    repeated = not context or (isinstance(context, str) and context.strip() in str(cell))
    if isinstance(decoded(cell), str) and not repeated and has_question(messages):
        messages = [{"role": "assistant", "content": cell}]
    if not has_question(messages):
        earlier, known = _messages(context, "user")
        messages, sound = [*earlier, *messages], sound and known
    turns = conversation(messages)
    turns.sound &= sound
    return turns


def _messages(cell: Any, role: str) -> tuple[Sequence[Message], bool]:
    """A cell as messages, and whether it is a text, a list of messages, or nothing. A text is one message of `role`.

    A list of messages that is no JSON, as pandas writes it to CSV files, is one text, too, and not sound.
    """
    cell = decoded(cell)
    if is_messages(cell):
        return cell, True
    if isinstance(cell, str):
        sound = not BROKEN_MESSAGES.match(cell)
        return transcript(cell, asked=role == "user") or [{"role": role, "content": cell}], sound
    if cell is None or cell == []:
        return [{"role": role, "content": None}], True
    return [{"role": role, "content": json.dumps(cell, ensure_ascii=False, default=str)}], False


# --- labels ----------------------------------------------------------------------------------------------------------


def _verdicts(raw: pl.DataFrame, record: PreferenceFormat, scale: float) -> Floats:
    """Probabilities `(N, 3)` that the first side wins, the second wins, neither does; NaN without a label."""
    if record.winner is not None:
        named = as_text(raw[record.winner])
        places = named.replace_strict(record.labels or {}, default=None, return_dtype=pl.Int64).fill_null(-1).to_numpy()
        return np.where(places[:, None] == np.arange(3), 1.0, np.where(places[:, None] < 0, np.nan, 0.0))
    margins = _margins(raw, record)
    if margins is None:
        return np.tile([1.0, 0.0, 0.0], (len(raw), 1))
    if record.raters is not None:
        margins[np.abs(margins) > _STRONGEST] = np.nan
    verdicts = _shares(margins, scale)
    if record.drawn:
        verdicts[np.isnan(margins)] = [1.0, 0.0, 0.0]
        verdicts[margins < 0] = np.nan  # the file says both that the response was chosen and that it is worse
    if record.raters is not None and record.raters[0] in raw.columns:
        column, key, factor = record.raters
        for row, cell in enumerate(python_cells(raw[column])):
            votes = _votes(cell, key)
            if len(votes):
                verdicts[row] = _shares(factor * votes, scale).mean(axis=0)
    return verdicts


def _margins(raw: pl.DataFrame, record: PreferenceFormat) -> Floats | None:
    """How much better the first side is, `(N,)`, NaN where a number is missing; None: the file has no margins."""
    factors = record.margin or {}
    if not factors or not {*factors} <= {*raw.columns}:
        return None
    margins: Floats = np.zeros(len(raw))
    for name, factor in factors.items():
        margins += factor * as_text(raw[name]).cast(pl.Float64, strict=False).fill_null(np.nan).to_numpy()
    return margins


def _shares(margins: Floats, scale: float) -> Floats:
    """Bradley-Terry's probabilities of margins that are differences of rewards; a margin of 0 is a tie.

    >>> _shares(np.array([0.0, 2.0]), 1.0).round(3).tolist()
    [[0.0, 0.0, 1.0], [0.881, 0.119, 0.0]]
    """
    first = 0.5 * (1.0 + np.tanh(margins / (2.0 * scale)))  # the logistic function, without overflow
    none = np.zeros_like(margins)
    return np.where((margins == 0)[:, None], [0.0, 0.0, 1.0], np.stack([first, 1.0 - first, none], axis=1))


def _votes(cell: Any, key: str) -> Floats:
    """The margins of a row's raters; one that is beyond the scale is no vote."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            return np.zeros(0)
    raters = [rater.get(key) for rater in cell if isinstance(rater, dict)] if isinstance(cell, list) else []
    numbers = [float(rater) for rater in raters if isinstance(rater, int | float)]
    return np.array([number for number in numbers if abs(number) <= _STRONGEST])


def _label_columns(verdicts: Floats, task: Task) -> list[pl.Series]:
    """A column of probabilities for each class; without a class for ties, either side gets half of a tie."""
    first, second = task.swap_classes or ("", "")
    ties = [name for name in task.classes if name not in (first, second)]
    shares = {first: verdicts[:, FIRST], second: verdicts[:, SECOND], **dict.fromkeys(ties, verdicts[:, TIE])}
    if not ties:
        shares = {name: share + verdicts[:, TIE] / 2 for name, share in shares.items()}
    return [pl.Series(name, shares[name]) for name in task.classes]
