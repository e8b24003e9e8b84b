"""The words of a task: the fields of a row, its classes and their order, and what a swap exchanges.

Swap is defined here and nowhere else. `Task.swap_row` exchanges the texts, `Task.swapped_columns` the columns
of probabilities or logits; both are involutions, and a class that is no side's victory (a tie) stays in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pairclf.errors import quoted

AB, BA = 0, 1
"""The two orders in which a pair is shown: as it stands in the file, and swapped."""

_OWN_WORDS = {"id", "target", "weight", "group", "file", "flaws", "train_only", "template", "marker", "rounds"}
_BESIDE_CLASSES = {"orders", "models", "seen", "prompt", "row_hash"}  # columns of scores

Turns = tuple[str | None, ...]
"""The turns of one field; `None` (the file had a null) is kept apart from `""`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison (or one text) as the tables hand it on.

    `target` holds a probability a class, in the task's class order, or is `None` where no label is known.
    `weight` is the row's share in the loss; `group` names the rows that must stay in one fold.
    """

    id: str
    fields: Mapping[str, Turns]
    target: tuple[float, ...] | None = None
    weight: float = 1.0
    group: str | None = None


class Task(BaseModel):
    """What is judged. `PRESETS` holds the competitions' tasks; a config may spell out its own.

    >>> LMSYS.swapped_columns
    (1, 0, 2)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="name of the task; shown, and kept in bundles")
    fields: tuple[str, ...] = Field(min_length=1, description="columns with text, in reading order")
    classes: tuple[str, ...] = Field(min_length=1, description="class names; the order of every score column")
    label_column: str | None = Field(
        default=None, description="column that names the winning class; null: one column a class, with probabilities"
    )
    multi_turn: bool = Field(default=False, description="cells hold JSON lists of turns rather than plain text")
    multi_label: bool = Field(default=False, description="several classes may hold at once (no softmax, no swap)")
    metric: Literal["log_loss", "accuracy"] = Field(default="log_loss", description="what the leaderboard counts")
    swap_fields: tuple[str, str] | None = Field(default=None, description="the two fields that a swap exchanges")
    swap_classes: tuple[str, str] | None = Field(default=None, description="the two classes that a swap exchanges")
    extra_columns: tuple[str, ...] = Field(
        default=(), description="further columns that the competition's files hold and that are not read"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        for name, values in (("fields", self.fields), ("classes", self.classes)):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} {list(values)} name one thing twice")
        if taken := (_OWN_WORDS & {*self.fields, *self.classes}) | (_BESIDE_CLASSES & {*self.classes}):
            raise ValueError(f"{sorted(taken)} are words of pairclf's own; name fields and classes otherwise")
        if (self.swap_fields is None) != (self.swap_classes is None):
            raise ValueError("swap_fields and swap_classes must be given together or not at all")
        if self.swap_fields is not None and not set(self.swap_fields) <= set(self.fields):
            raise ValueError(f"swap_fields {list(self.swap_fields)} must be among fields {list(self.fields)}")
        if self.swap_classes is not None and not set(self.swap_classes) <= set(self.classes):
            raise ValueError(f"swap_classes {list(self.swap_classes)} must be among classes {list(self.classes)}")
        if self.multi_label and (self.label_column or self.swap_fields):
            raise ValueError("multi_label needs one column a class, and knows no swap")
        return self

    @property
    def swappable(self) -> bool:
        return self.swap_fields is not None

    @property
    def swapped_fields(self) -> dict[str, str]:
        """`{place: field whose text stands there}` in order BA; the identity where nothing swaps."""
        a, b = self.swap_fields or (self.fields[0], self.fields[0])
        exchange = {a: b, b: a}
        return {name: exchange.get(name, name) for name in self.fields}

    @property
    def swapped_columns(self) -> tuple[int, ...]:
        """Permutation of the class columns: `swapped = scores[..., swapped_columns]`, and back the same way."""
        if self.swap_classes is None:
            return tuple(range(len(self.classes)))
        a, b = (self.classes.index(name) for name in self.swap_classes)
        exchange = {a: b, b: a}
        return tuple(exchange.get(column, column) for column in range(len(self.classes)))

    def swap_target(self, target: Sequence[float]) -> tuple[float, ...]:
        """The target of the row seen in the other order; shape `(C,)` in, `(C,)` out."""
        return tuple(target[column] for column in self.swapped_columns)

    def swap_row(self, row: Row) -> Row:
        """The same comparison told in the other order: `swap_row(swap_row(row)) == row`."""
        fields = {place: row.fields[source] for place, source in self.swapped_fields.items()}
        target = None if row.target is None else self.swap_target(row.target)
        return replace(row, fields=fields, target=target)


LMSYS = Task(
    name="lmsys",
    fields=("prompt", "response_a", "response_b"),
    classes=("winner_model_a", "winner_model_b", "winner_tie"),
    multi_turn=True,
    metric="log_loss",
    swap_fields=("response_a", "response_b"),
    swap_classes=("winner_model_a", "winner_model_b"),
    extra_columns=("model_a", "model_b"),
)

WSDM = Task(
    name="wsdm",
    fields=("prompt", "response_a", "response_b"),
    classes=("model_a", "model_b"),
    label_column="winner",
    metric="accuracy",
    swap_fields=("response_a", "response_b"),
    swap_classes=("model_a", "model_b"),
    extra_columns=("model_a", "model_b", "language", "scored"),
)

PRESETS: dict[str, Task] = {task.name: task for task in (LMSYS, WSDM)}


def as_task(value: Any) -> Any:
    """A preset's name as the preset; anything else is left to pydantic (a mapping spells out a task)."""
    if isinstance(value, str):
        if value not in PRESETS:
            raise ValueError(
                f"task {quoted(value)} is no preset; give one of {sorted(PRESETS)} or spell out its fields"
            )
        return PRESETS[value]
    return value
