"""`data` and `folds`: which files are read, what is done about flawed rows, and how rows are split."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pairclf.config.section import Section, as_list
from pairclf.task import Label

Format = Literal[
    "arena-140k", "arena-100k", "chatbot-arena-33k", "helpsteer3", "helpsteer2", "ultrafeedback", "chosen-rejected"
]
"""The formats of public preference sets; `data.preferences.FORMATS` describes them."""


class Source(Section):
    """An entry of `data.train`: files whose columns have other names, or whose rows count otherwise."""

    files: Annotated[list[Path], BeforeValidator(as_list)] = Field(min_length=1, description="file names or globs")
    columns: dict[str, str | None] = Field(
        {}, description="maps our columns to the files', e.g. {prompt: question}; id: null uses the row number as id"
    )
    label_column: str | None = Field(
        None, description="column of the files that holds the class name; null: the task's label_column"
    )
    labels: dict[Label, Label] = Field({}, description="maps the files' labels to classes, e.g. {A: winner_model_a}")
    id_prefix: str = Field("", description="prefix for every id, which keeps ids of several data sets distinct")
    weight: float = Field(1.0, gt=0, description="weight of these rows in the loss and in metrics")
    ignore_columns: list[str] | Literal["all"] = Field(
        [], description="further columns that the files may have and that are not read; all: any column not in columns"
    )
    exclude_overlap: list[Path] = Field(
        [], description="files or globs; rows that share a folds.group, or (nearly) a prompt, with theirs are dropped"
    )
    train_only: bool = Field(
        False, description="train on these rows in every fold and never hold them out (pseudo-labels, extra data)"
    )
    escape: Literal["backslash"] | None = Field(
        None, description="escape character of the CSV files; null: quotes are doubled (RFC 4180)"
    )
    format: Format | None = Field(
        None,
        description="the files are a public preference set, which has columns and labels of its own; `pairclf check "
        "FILE` says which; null: the task's columns",
    )
    margin_scale: float = Field(
        1.0,
        gt=0,
        description="with a format that has margins: the preferred side's probability is 1 / (1 + exp(-margin / "
        "margin_scale)); near 0: one winner",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Source:
        if self.format is None and self.margin_scale != 1.0:
            raise ValueError("margin_scale is for files of a `format`; name one, or remove it")
        own = sorted({*self.columns} - {"id", "group", "weight"}) if self.format else []
        if self.format and (own or self.labels or self.label_column):
            raise ValueError(
                f"format {self.format} has columns and labels of its own: remove label_column, labels, and of columns "
                f"all but id, group and weight{f', here {own}' * bool(own)}; or convert the files (pairclf convert)"
            )
        return self


def as_source(value: Any) -> Any:
    """A file's name as a source; anything else is left to pydantic."""
    return {"files": [value]} if isinstance(value, str | Path) else value


class Unlabelled(Section):
    """`data.test`: the test file, and what test files call their columns."""

    file: Path | None = Field(None, description="unlabelled file to predict")
    columns: dict[str, str | None] = Field(
        {},
        description="maps our columns to the test files', e.g. {id: row_id, text: comment}; id: null: the files have "
        "none, and their rows are those of the sample submission in its order",
    )


def as_unlabelled(value: Any) -> Any:
    """A file's name, or null, as `Unlabelled`; anything else is left to pydantic."""
    return {"file": value} if value is None or isinstance(value, str | Path) else value


class Submission(Section):
    """`data.submission`: what the columns of a submission are called, and what they hold."""

    id: str | None = Field(None, description="column of the ids in the sample submission; null: data.test.columns.id")
    columns: dict[Label, str] = Field(
        {},
        description="maps classes, or the label_column, to columns of the sample submission, e.g. {ai: generated}; a "
        "class or label_column that is not named has a column of its own name",
    )
    values: Literal["auto", "probabilities", "labels"] = Field(
        "auto",
        description="what is written: probabilities, or the likeliest class; auto: as task.metric and the sample "
        "submission have it (docs/tasks.md)",
    )
    thresholds: dict[Label, Annotated[float, Field(gt=0, lt=1)]] = Field(
        {},
        description="several labels, written as 1 and 0: the probability from which a row gets a label, e.g. "
        "{software: 0.3}; a label that is not named has the threshold that its bundles were fitted, or else 0.5",
    )


Action = Literal["keep", "drop", "error"]
FixOrKeep = Literal["keep", "fix", "drop", "error"]
FixOrRefuse = Literal["error", "fix", "drop"]


class Rules(Section):
    """The action for each flaw that `pairclf check` finds.

    keep: use the row unchanged; fix: repair it as described; drop: remove it (training rows only); error: stop.
    Test rows are repaired where a repair exists and kept otherwise, but every test row needs a unique id.
    """

    missing_id: FixOrRefuse = Field("error", description="row without id; fix: the row number becomes the id")
    duplicate_id: FixOrRefuse = Field(
        "error", description="id of an earlier row; fix: #2, #3, ... is appended; drop: the later rows are removed"
    )
    bad_label: Literal["error", "drop"] = Field("error", description="label that is no class and no probabilities")
    undecodable: FixOrRefuse = Field(
        "error", description="cell that is not a list of turns; fix: its text becomes one turn"
    )
    missing_cell: Action = Field("keep", description="empty cell; kept as one turn without text")
    null_literal: Action = Field("keep", description="cell with the word null; kept as one turn without text")
    null_list: Action = Field("keep", description="cell with a list of nulls, such as [null]")
    null_turn: Action = Field("keep", description="null among a cell's turns; kept as a turn without text")
    no_turns: Action = Field("keep", description="cell with an empty list, []")
    empty_turn: Action = Field("keep", description='turn that is "" or white space')
    empty_prompt: Action = Field(
        "keep", description="first field without text; such rows are not grouped with each other in folds"
    )
    one_side_empty: Action = Field("keep", description="one response without text; it usually loses")
    both_sides_empty: Action = Field("keep", description="both responses without text")
    identical_with_winner: FixOrKeep = Field(
        "keep", description="equal responses with a winner; fix: both share the winner's probability"
    )
    identical_without_winner: Action = Field("keep", description="equal responses without a winner")
    surrogate: Literal["fix", "drop", "error"] = Field(
        "fix", description="unpaired UTF-16 surrogate, which UTF-8 can't encode; fix: U+FFFD replaces it"
    )
    control_character: FixOrKeep = Field(
        "keep", description="control character other than tab and line breaks; fix: it is removed"
    )
    turn_counts_differ: Action = Field("keep", description="fields with different numbers of turns")
    duplicate_row: Action = Field(
        "keep", description="row with the texts and label of an earlier row; drop: the later rows are removed"
    )
    conflicting_label: FixOrKeep = Field(
        "keep",
        description="same texts (of a pair: in either order) with different labels; fix: each row gets their weighted "
        "mean label (train_only rows count only if no other row has the texts)",
    )
    mirrored_pair: Action = Field(
        "keep", description="pair that also occurs with its responses exchanged; drop: the later rows are removed"
    )
    prompt_overlap: Action = Field(
        "keep", description="prompt that occurs in an earlier file; drop: the later file's rows are removed"
    )


class Data(Section):
    folder: Path = Field(Path("."), description="folder that the file names below are relative to")
    train: Annotated[list[Annotated[Source, BeforeValidator(as_source)]], BeforeValidator(as_list)] = Field(
        [],
        description="labelled files (.csv, .parquet, .jsonl), globs, or mappings with files, columns, label_column, "
        "labels, id_prefix, weight, ignore_columns, exclude_overlap, train_only, escape, format (docs/data.md)",
    )
    soft_labels: Path | None = Field(
        None,
        description="file of ids and a probability for each class (`pairclf suspects` and `pairclf distill` write it): "
        "the labels of training rows, in place of their own; rows that are held out keep theirs, and so do others",
    )
    test: Annotated[Unlabelled, BeforeValidator(as_unlabelled)] = Field(
        default_factory=Unlabelled, description="unlabelled file to predict, or a mapping with file, columns"
    )
    sample_submission: Path | None = Field(
        None, description="file that defines the ids, row order and columns of a submission"
    )
    submission: Submission = Field(
        default_factory=Submission, description="what the columns of a submission are called, and what they hold"
    )
    max_rows: int | None = Field(None, ge=1, description="use only N of the training rows; null: all")
    sampling: Literal["stratified", "head"] = Field(
        "stratified",
        description="which rows max_rows leaves: a sample drawn by seed with the shares of the classes, or the first N "
        "of the files, which alone are read",
    )
    ignore_columns: list[str] = Field([], description="further columns that training files may have; they are not read")
    rules: Rules = Field(default_factory=Rules, description="action for each flaw that `pairclf check` finds")
    cache_dir: Path | None = Field(None, description="folder of the token caches; null: tokens/ in the run folder")

    def path(self, name: Path) -> Path:
        return self.folder / name

    def name_of(self, path: Path) -> str:
        """The name of a file relative to `folder`, as the settings of this section have it."""
        return os.path.relpath(path.resolve(), self.folder.resolve())

    @property
    def test_file(self) -> Path | None:
        """The path of `test.file`; None: it is not set."""
        return None if self.test.file is None else self.path(self.test.file)

    @property
    def soft_label_file(self) -> Path | None:
        """The path of `soft_labels`; None: it is not set."""
        return None if self.soft_labels is None else self.path(self.soft_labels)

    @property
    def sample_file(self) -> Path | None:
        """The path of `sample_submission`; None: it is not set."""
        return None if self.sample_submission is None else self.path(self.sample_submission)

    def unlabelled(self, path: Path) -> Source:
        """A test file as a source, with the columns of `test`."""
        return Source(files=[path], columns=self.test.columns)

    @property
    def of_bundle(self) -> Data:
        """What a bundle keeps: the rules, and what test files and submissions call their columns; no file."""
        return Data(rules=self.rules, test=Unlabelled(columns=self.test.columns), submission=self.submission)

    @property
    def naming(self) -> list[str]:
        """`key=value` overrides that give a trained bundle the `test.columns` and `submission` of these settings."""
        trees = {"test.columns": self.test.columns, "submission": self.submission.model_dump(exclude_defaults=True)}
        return [
            f"data.{key}.{name}={json.dumps(value, ensure_ascii=False)}"
            for key, tree in trees.items()
            for name, value in tree.items()
        ]

    @property
    def settled_submission(self) -> Submission:
        """`submission`, with the test files' column of ids where it names none."""
        return self.submission.model_copy(update={"id": self.submission.id or self.test.columns.get("id")})

    @property
    def names(self) -> list[Path]:
        """The files and globs of `train`, as they are written."""
        return [name for source in self.train for name in source.files]

    @property
    def sources(self) -> list[Source]:
        """The entries of `train` with names relative to the working directory, and `ignore_columns` for each.

        `train_only` sources come last: of two equal rows the first one stays, and it may be held out.
        """

        def resolved(source: Source) -> Source:
            own = source.ignore_columns
            changes = {
                "files": [self.path(name) for name in source.files],
                "exclude_overlap": [self.path(name) for name in source.exclude_overlap],
                "ignore_columns": "all" if own == "all" else [*own, *self.ignore_columns],
            }
            return source.model_copy(update=changes)

        return sorted(map(resolved, self.train), key=lambda source: source.train_only)


class Folds(Section):
    n_splits: int = Field(5, ge=2, description="number of folds; rows with the same prompt share a fold")
    near_duplicate_threshold: float | None = Field(
        0.8,
        gt=0,
        le=1,
        description="prompts with at least this Jaccard similarity (character 5-grams) share a fold; null: equal "
        "prompts only",
    )
    stable: bool = Field(
        False, description="assign folds incrementally: appending rows never changes the fold of existing rows"
    )
    group: str | None = Field(
        None,
        description="column of the training files (author, patient, question id); rows with the same value share a "
        "fold, besides those with the same prompt",
    )
    run: list[int] | None = Field(None, min_length=1, description="folds that `cv` trains, counted from 0; null: all")

    @model_validator(mode="after")
    def _consistent(self) -> Folds:
        if self.group is not None and self.stable:
            raise ValueError(
                "folds.group and folds.stable can't go together: a row that is appended may join two groups, and would "
                "move the rows of one; set folds.stable=false"
            )
        return self
