"""Tasks and competitions: the fields of a row, the classes and their order, and the swap of the two sides.

The swap is defined here and nowhere else. `Task.swap_row` exchanges the texts, `Task.swapped_columns` the columns
of probabilities or logits; both are involutions, and a class that is no side's victory (a tie) stays in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pairclf.errors import quoted

AB, BA = 0, 1
"""The two orders in which a pair is shown: as it stands in the file, and swapped."""

_OWN_WORDS = {
    "id",
    "target",
    "weight",
    "group",
    "file",
    "flaws",
    "train_only",
    "template",
    "marker",
    "rounds",
    "examples",
}
_BESIDE_CLASSES = {"orders", "models", "seen", "prompt", "row_hash", "fold"}  # columns of scores

_OF_ORDERS = ("ab_{}", "ba_{}", "{}_AB", "{}_BA")  # of columns with a class's probability in one order

SIDE = "response"
"""The place of either side's text in a template that shows one side."""

REWARD = "reward"
"""The one class of `Task.pointwise`."""

Kind = Literal["binary", "multiclass", "multilabel"]
"""The kind of a task: one of two classes, one of several, or any number of labels. A metric applies to some kinds."""


def _as_label(value: Any) -> Any:
    """A number or boolean of a YAML file as the text that files have: `0`, `true`; whole floats lose their `.0`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, int | float) else value


Label = Annotated[str, BeforeValidator(_as_label)]
"""A class or a label of a file, which YAML may hold as a number or a boolean."""

Turns = tuple[str | None, ...]
"""The turns of one field; `None` (the file had a null) is kept apart from `""`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison, or one text, as read from the tables.

    `target` holds a probability per class, in the task's class order, or is `None` without a label.
    `weight` is the row's weight in the loss.
    """

    id: str
    fields: Mapping[str, Turns]
    target: tuple[float, ...] | None = None
    weight: float = 1.0


class Task(BaseModel):
    """A classification task. `TASKS` holds those of Kaggle's competitions; a config may define its own.

    >>> LMSYS.swapped_columns
    (1, 0, 2)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="name of the task")
    fields: tuple[str, ...] = Field(
        min_length=1, description="text columns, in the order in which the model reads them"
    )
    classes: tuple[Label, ...] = Field(min_length=1, description="class names; the order of every score column")
    label_column: str | None = Field(
        default=None, description="column with the class name; null: a column with the probability of each class"
    )
    multi_turn: bool = Field(default=False, description="cells contain JSON lists of turns instead of plain text")
    multi_label: bool = Field(
        default=False, description="a row can have several classes (sigmoid, no softmax, no swap)"
    )
    metric: str = Field(default="log_loss", description="metric of the leaderboard: one of docs/training.md")
    swap_fields: tuple[str, str] | None = Field(
        default=None, description="the two fields that a swap exchanges; null: the task has no two sides"
    )
    swap_classes: tuple[Label, Label] | None = Field(default=None, description="the two classes that a swap exchanges")
    extra_columns: tuple[str, ...] = Field(
        default=(), description="further columns of the competition's files; they are not read"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        for name in ("fields", "classes", "swap_fields", "swap_classes"):
            values = getattr(self, name) or ()
            if len(set(values)) != len(values):
                raise ValueError(f"{name} {list(values)} name one thing twice")
        of_orders = {form.format(name) for form in _OF_ORDERS for name in self.classes}
        if taken := (_OWN_WORDS & {*self.fields, *self.classes}) | ((_BESIDE_CLASSES | of_orders) & {*self.classes}):
            raise ValueError(f"{sorted(taken)} are words of pairclf's own; name fields and classes otherwise")
        if (self.swap_fields is None) != (self.swap_classes is None):
            raise ValueError("swap_fields and swap_classes must be given together or not at all")
        if self.swap_fields is not None and not set(self.swap_fields) <= set(self.fields):
            raise ValueError(f"swap_fields {list(self.swap_fields)} must be among fields {list(self.fields)}")
        if self.swap_classes is not None and not set(self.swap_classes) <= set(self.classes):
            raise ValueError(f"swap_classes {list(self.swap_classes)} must be among classes {list(self.classes)}")
        if self.multi_label and (self.label_column or self.swap_fields):
            raise ValueError("multi_label needs one column a class, and knows no swap")
        if len(self.classes) == 1 and not self.multi_label:
            raise ValueError(
                f"classes {list(self.classes)} name one class, which every row would have; for a label with yes and no "
                "name two classes (such as classes: [no, yes]) and the label_column; or, for one column of 0 and 1 "
                "with the name of the label, set multi_label: true"
            )
        if len(self.fields) > 1 and not self.multi_label and "swap_fields" not in self.model_fields_set:
            raise ValueError(
                f"fields {list(self.fields)} are several, and swap_fields is not set. If two of them are the sides of "
                "a comparison, name these and the classes of their victories (such as swap_fields: [answer_1, "
                "answer_2], swap_classes: [first, second]); otherwise set swap_fields: null: rows then share a fold "
                "where all fields are nearly equal, or where the column folds.group is equal (docs/tasks.md)"
            )
        return self

    @property
    def kind(self) -> Kind:
        if self.multi_label:
            return "multilabel"
        return "binary" if len(self.classes) <= 2 else "multiclass"

    @property
    def swappable(self) -> bool:
        return self.swap_fields is not None

    def places(self, *, one_sided: bool) -> tuple[str, ...]:
        """What a template has a place for: the fields, or one side (`SIDE`) after those that are no side's."""
        sides = self.swap_fields or ()
        return (*(name for name in self.fields if name not in sides), SIDE) if one_sided else self.fields

    @property
    def pointwise(self) -> Task:
        """The task of scoring either side's text alone, in the place `SIDE`: one number a row, and no swap."""
        return Task(
            name=f"{self.name}, pointwise",
            fields=self.places(one_sided=True),
            classes=(REWARD,),
            multi_turn=self.multi_turn,
            multi_label=True,
        )

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
        """The target `(C,)` of the row in the other order."""
        return tuple(target[column] for column in self.swapped_columns)

    def swap_row(self, row: Row) -> Row:
        """The same comparison in the other order: `swap_row(swap_row(row)) == row`."""
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

HIDDEN_ROWS, HOURS = 25_000, 9.0
"""Rows of a hidden test and hours of a notebook if they are unknown; about those of LMSYS."""


@dataclass(frozen=True, slots=True)
class Competition:
    """A competition on Kaggle: a record of `TASKS`.

    Attributes:
        slug: its name in Kaggle's addresses.
        task: its files and its metric.
        hours: the time limit of a notebook.
        hidden_rows: approximate number of rows in the hidden test; None: unknown.
        public_share: part of the hidden rows that the public leaderboard has; None: unknown.
    """

    slug: str
    task: Task
    hours: float
    hidden_rows: int | None = None
    public_share: float | None = None


TASKS: dict[str, Competition] = {
    # https://www.kaggle.com/competitions/lmsys-chatbot-arena, 2024: code requirements and data. The public share is the
    # leaderboard's, as the discussion "Clarification on the number of chats that need to be processed" quotes it.
    "lmsys": Competition("lmsys-chatbot-arena", LMSYS, hours=9, hidden_rows=HIDDEN_ROWS, public_share=0.26),
    # https://www.kaggle.com/competitions/wsdm-cup-multilingual-chatbot-arena, 2025. Competitors report 12 hours and
    # 4 h 45 min: the shorter is safe. Look at the competition's page. The private rows were collected after its end.
    "wsdm": Competition("wsdm-cup-multilingual-chatbot-arena", WSDM, hours=4.75),
    # https://www.kaggle.com/competitions/llm-classification-finetuning, Getting Started, since 2024-10-16, no end;
    # LMSYS's files and metric. Hours and rows: README of https://github.com/restful3/ds4th_study
    "llm-classification-finetuning": Competition("llm-classification-finetuning", LMSYS, 9, HIDDEN_ROWS),
}
"""Kaggle's competitions, by the name for `task` in a config. A new competition is a new record."""


def competition(slug: str) -> Competition | None:
    """The record of the competition with this slug, or None."""
    return next((record for record in TASKS.values() if record.slug == slug), None)


def hidden_rows(slug: str) -> int:
    """Approximate number of rows in a competition's hidden test; `HIDDEN_ROWS` if it is unknown."""
    record = competition(slug)
    return HIDDEN_ROWS if record is None or record.hidden_rows is None else record.hidden_rows


def hidden_rows_of(task: Task) -> int:
    """Approximate number of rows in the hidden test of a preset task's competition; `HIDDEN_ROWS` if it is unknown."""
    return hidden_rows(TASKS[task.name].slug) if task.name in TASKS else HIDDEN_ROWS


def as_task(value: Any) -> Any:
    """A name of `TASKS` as its task; anything else is left to pydantic (a mapping spells out a task)."""
    if isinstance(value, str):
        if value not in TASKS:
            raise ValueError(f"task {quoted(value)} is no preset; give one of {sorted(TASKS)} or spell out its fields")
        return TASKS[value].task
    return value
