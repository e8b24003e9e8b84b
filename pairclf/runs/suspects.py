"""Suspect labels: which labels of a run's rows are probably wrong, why, and soft labels to train on in their place."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from numpy.typing import NDArray
from rich.table import Table

from pairclf.config import Config
from pairclf.console import table
from pairclf.data.duplicates import same_rows
from pairclf.data.formats import TURNS
from pairclf.data.scores import scores_frame, write_scores
from pairclf.errors import ConfigError, DataError, cut
from pairclf.files import check_file_target
from pairclf.run import Paths, output_of
from pairclf.runs.held_out import CONFIG, SUFFIXES, CommonRows, open_runs
from pairclf.scores.calibration import temperature_of
from pairclf.scores.label_noise import label_noise
from pairclf.scores.metrics import Floats, class_prior, likeliest, log_loss
from pairclf.scores.probabilities import apply_temperature

SUSPECTED = 0.5
"""The probability from which a row is called a suspect in the summary."""

IDS = 3
"""Ids of other rows that a reason names."""


@dataclass(frozen=True, slots=True, eq=False)
class SuspectReport:
    """Rows by the probability that their label is wrong.

    Attributes:
        rows: the most suspicious first: the columns of `scores.scores_frame` with the soft labels, and `p_wrong`
            Float64, `label` and `likeliest` (class names), `reasons` List(String).
        rate: the estimated share of wrong labels among the most confident scores.
        config: of the run.
    """

    rows: pl.DataFrame
    rate: float
    config: Config

    @property
    def expected(self) -> float:
        """The expected number of wrong labels."""
        return float(self.rows["p_wrong"].sum())

    @property
    def suspected(self) -> int:
        """The number of rows whose label is probably wrong."""
        return int((self.rows["p_wrong"] >= SUSPECTED).sum())

    def as_dict(self, top: int) -> dict[str, Any]:
        """The figures and the first rows, as JSON has them."""
        shown = self.rows.head(top).select("id", "p_wrong", "label", "likeliest", "reasons")
        figures = {"rows": len(self.rows), "rate": self.rate, "expected": self.expected, "suspected": self.suspected}
        return {**figures, "first": shown.to_dicts()}


def check_out(out: Path, path: Path) -> None:
    """Fail before any work if `out` can't be written, or is the file of scores that is read.

    Raises:
        ConfigError: it is that file; or as `check_file_target`.
    """
    check_file_target(out, ".parquet")
    if out.resolve() == path.resolve():
        raise ConfigError(f"--out {out} is the file of scores that is read", remedy="give it a path of its own")


def find_suspects(path: Path, labels: Path | None = None, *, folds: list[int] | None = None) -> SuspectReport:
    """Judge each label by the run's held-out scores, and by the labels of rows with (nearly) the same texts.

    Args:
        path: a run folder, the config file of a run, or a file of scores.
        labels: config file whose `data.train` has the labels, for a file of scores.
        folds: folds whose rows are judged; empty or None: all that were scored.

    Raises:
        ConfigError: as `open_runs`; or the task has several labels a row.
        DataError: as `open_runs`; or the scores are no better than the class prior.
        LeakError: as `open_runs`.
    """
    return suspects_among(open_runs([path], labels, folds=folds or []))


def suspects_among(common: CommonRows) -> SuspectReport:
    """As `find_suspects`, by the scores of the first of these runs.

    Raises:
        ConfigError: the task has several labels a row.
        DataError: the scores are no better than the class prior.
    """
    task, run = common.task, common.runs[0]
    if task.multi_label:
        raise ConfigError("suspects need labels that exclude each other, and this task has several labels a row")
    _refuse_uninformed(run.path, common)
    nearly = _same(common, common.config.folds.near_duplicate_threshold)
    noise = label_noise(run.probabilities, common.targets, common.weights, task, *nearly)
    given, likely = likeliest(common.targets), likeliest(noise.expected)
    orders = 1 if run.flips is None else 2
    written = scores_frame(
        common.ids, noise.labels, task, orders, ["suspects"], seen=0, hashes=common.hashes
    ).with_columns(
        pl.Series("p_wrong", noise.wrong),
        pl.Series("label", [task.classes[place] for place in given]),
        pl.Series("likeliest", [task.classes[place] for place in likely]),
        pl.Series("reasons", _reasons(common, nearly), dtype=TURNS),
    )
    return SuspectReport(written.sort("p_wrong", descending=True, maintain_order=True), noise.rate, common.config)


def _refuse_uninformed(path: Path, common: CommonRows) -> None:
    """Refuse scores that are no better than the class prior, at their best temperature."""
    task, scores, targets, weights = common.task, common.runs[0].probabilities, common.targets, common.weights
    temperature = temperature_of(scores, targets, task, weights)
    loss = log_loss(apply_temperature(scores, temperature, task), targets, weights)
    prior = log_loss(np.tile(class_prior(targets, weights), (len(targets), 1)), targets, weights)
    if loss >= prior:
        raise DataError(
            f"the scores know no more than the class prior (log loss {loss:.4f}, prior {prior:.4f}): they can't tell "
            "which labels are wrong",
            where=path,
            remedy="give a better run; a classical one takes seconds (configs/demo/classical.yaml)",
        )


def _same(common: CommonRows, threshold: float | None) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """`same_rows`; only rows of one group of the folds can have the same prompt."""
    same, turned = np.arange(len(common.ids)), np.zeros(len(common.ids), dtype=np.bool_)
    rows = np.flatnonzero(pl.Series(common.groups).is_duplicated().to_numpy())
    if len(rows):
        number, exchanged = same_rows(common.frame[rows], common.task, threshold)
        same[rows], turned[rows] = number + len(same), exchanged
    return same, turned


def other_labels(
    common: CommonRows, nearly: tuple[NDArray[np.int64], NDArray[np.bool_]] | None = None
) -> list[list[str]]:
    """For each row, which rows with (nearly) the same texts have another label, in words; nothing for most rows.

    Args:
        common: rows with one label each.
        nearly: of `_same`, at the threshold of near duplicates; None: it is found.
    """
    nearly = nearly or _same(common, common.config.folds.near_duplicate_threshold)
    given, swapped = likeliest(common.targets), np.array(common.task.swapped_columns)
    labels, texts = np.where(nearly[1], swapped[given], given).tolist(), _same(common, None)[0].tolist()
    reasons: list[list[str]] = [[] for _ in common.ids]
    groups: dict[int, list[int]] = defaultdict(list)
    for row, group in enumerate(nearly[0].tolist()):
        groups[group].append(row)
    for rows in groups.values():
        for alike, words in _other_labels_of(rows, labels, texts, common.ids) if len(rows) > 1 else ():
            for row in alike:
                reasons[row] += words
    return reasons


def _other_labels_of(
    rows: Sequence[int], labels: Sequence[int], texts: Sequence[int], ids: Sequence[str]
) -> Iterator[tuple[Sequence[int], list[str]]]:
    """Rows of one group with equal texts and one label, and what the group's other labels say against theirs.

    A group can have thousands of rows: they are counted, and no two of them are compared.

    Args:
        rows: of the group.
        labels, texts: of all rows; equal texts have one number.
        ids: of all rows.
    """
    by_label: dict[int, list[int]] = defaultdict(list)
    by_texts: dict[int, list[int]] = defaultdict(list)
    by_both: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row in rows:
        by_label[labels[row]].append(row)
        by_texts[texts[row]].append(row)
        by_both[labels[row], texts[row]].append(row)
    for (label, text), alike in by_both.items():
        equal = [row for row in by_texts[text] if labels[row] != label]
        others = chain.from_iterable(by_label[other] for other in by_label if other != label)
        nearly = (row for row in others if texts[row] != text)
        count, total = len(rows) - len(by_label[label]) - len(equal), len(rows) - len(by_texts[text])
        words = []
        if equal:
            words.append(_contradiction(equal, len(equal), len(by_texts[text]) - 1, "the same texts", ids))
        if count:
            words.append(_contradiction(nearly, count, total, "nearly the same texts", ids))
        yield alike, words


def _contradiction(against: Iterable[int], count: int, total: int, texts: str, ids: Sequence[str]) -> str:
    """How many of the rows with these texts have another label, and the ids of the first."""
    named = ", ".join(ids[row] for row in islice(against, IDS))
    return f"another label in {count} of {total} rows with {texts}: {named}{', ...' * (count > IDS)}"


def _reasons(common: CommonRows, nearly: tuple[NDArray[np.int64], NDArray[np.bool_]]) -> list[list[str]]:
    """What speaks against each label, in words; nothing for most rows."""
    run, given, reasons = common.runs[0], likeliest(common.targets), other_labels(common, nearly)
    scored = likeliest(run.probabilities)
    for row in np.flatnonzero(scored != given).tolist():
        reasons[row].insert(0, _of_score(common, row, int(scored[row]), int(given[row])))
    return reasons


def _of_score(common: CommonRows, row: int, scored: int, given: int) -> str:
    run, classes = common.runs[0], common.task.classes
    who = "the scores give"
    if run.flips is not None:
        who = "the orders disagree; their mean gives" if run.flips[row] else "both orders give"
    values: Floats = run.probabilities[row]
    return f"{who} {classes[scored]} {values[scored]:.2f}, and the label {values[given]:.2f}"


def write_suspects(out: Path, report: SuspectReport) -> None:
    """Write the rows as parquet, atomically; `data.soft_labels` reads it."""
    write_scores(out, report.rows)


def next_command(path: Path, labels: Path | None, out: Path, config: Config) -> str:
    """The command that trains on the soft labels, in a run folder of its own."""
    run = output_of(config)
    file = labels or (path if path.suffix in SUFFIXES else None)
    if file is None:
        file = next(
            found for fold in range(config.folds.n_splits) if (found := Paths(run, fold).folder / CONFIG).exists()
        )
    settings = {
        "data.soft_labels": config.data.name_of(out),
        "output_dir": str(run.with_name(f"{run.name}-soft-labels")),
    }
    # The shell takes one layer of quotes away, and YAML reads the value: `[x].parquet` would be a list.
    return shlex.join(["pairclf", "cv", str(file), *(f"{key}={_as_yaml(value)}" for key, value in settings.items())])


def _as_yaml(text: str) -> str:
    """A text as YAML reads it back, on one line, in quotes where it needs them."""
    return yaml.safe_dump([text], default_flow_style=True, allow_unicode=True, width=len(text) + 100).strip()[1:-1]


def render(report: SuspectReport, top: int) -> Table:
    """The most suspicious rows."""
    suspects_table = table(
        f"{report.suspected:,} of {len(report.rows):,} labels are probably wrong", "id", "P(wrong)", "label", "reasons"
    )
    for column in suspects_table.columns[2:]:
        column.justify = "left"
    for row in report.rows.head(top).iter_rows(named=True):
        reasons = "; ".join(row["reasons"]) or "the score alone is against it"
        suspects_table.add_row(cut(row["id"]), f"{row['p_wrong']:.2f}", row["label"], reasons)
    suspects_table.caption = (
        f"{report.expected:,.0f} wrong labels are expected in all; {report.rate:.1%} of the labels contradict the most "
        "confident scores"
    )
    suspects_table.caption_justify = "left"
    return suspects_table
