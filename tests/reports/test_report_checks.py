"""Every check finds what it is for, is silent where there is nothing, and says what it could not look at."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from pairclf.reports.checks import CHECKS, MIN_BIAS, check
from pairclf.reports.contents import Contents
from pairclf.reports.report import summary
from pairclf.runs.evaluate import Baseline, Orders
from pairclf.runs.truncation import MADE_EQUAL
from pairclf.scores.intervals import Estimate
from pairclf.scores.slices import Slice

Change = Callable[[Contents], Contents]


def estimate(value: float, half: float = 0.01) -> Estimate:
    return Estimate(value, value + np.linspace(-half, half, 41))


def judged(contents: Contents, **changes: Any) -> Contents:
    return replace(contents, evaluation=replace(contents.evaluation, **changes))


def trained(contents: Contents, **settings: Any) -> Contents:
    """As if a fine-tuned run had these settings of `train`."""
    config = contents.config
    changed = {"approach": "finetune", "train": config.train.model_copy(update=settings)}
    return replace(contents, config=config.model_copy(update=changed))


def gain(value: float) -> Change:
    return lambda contents: judged(contents, gain=estimate(value))


def baseline(value: float) -> Change:
    return lambda contents: trained(judged(contents, baseline=Baseline("runs/classical", 1.0, estimate(value))))


def fold(adjusted_p: float) -> Change:
    return lambda contents: judged(
        contents, slices=[Slice("fold", f"fold {place}", 42, 0.9, estimate(0.1), adjusted_p) for place in (0, 1)]
    )


def first(bias: float, half: float = 0.01) -> Change:
    figures = {"first_position_bias": estimate(bias, half)}
    return lambda contents: judged(contents, orders=Orders(figures, {}, []))


def equal(value: bool) -> Change:
    def change(contents: Contents) -> Contents:
        by_row = contents.evaluation.by_row.with_row_index("place")
        return judged(contents, by_row=by_row.with_columns(((pl.col("place") == 0) & value).alias(MADE_EQUAL)))

    return change


def grouped(contents: Contents) -> Contents:
    """As if all rows had one prompt: the two files share it."""
    return judged(contents, by_row=contents.evaluation.by_row.with_columns(group=pl.lit("one")))


def of_one_file(contents: Contents) -> Contents:
    return replace(contents, labelled=contents.labelled.with_columns(file=pl.lit("train.csv")))


CASES: dict[str, tuple[list[Change], list[Change], list[Change]]] = {
    "R1": (
        [gain(-0.1), gain(0.005)],
        [gain(0.1)],
        [lambda contents: judged(contents, gain=Estimate(0.1, np.empty(0)))],
    ),
    "R2": ([baseline(-0.1), baseline(0.001)], [baseline(0.1)], [lambda contents: contents]),
    "R3": ([fold(0.01)], [fold(0.2)], [lambda contents: judged(contents, slices=[])]),
    "R4": (
        [first(0.1), first(-0.1)],
        [first(0.1, half=0.5), first(MIN_BIAS / 2, half=MIN_BIAS / 10)],
        [lambda contents: judged(contents, orders=None)],
    ),
    "R5": (
        [
            lambda contents: trained(contents, keep_weights="best"),
            lambda contents: trained(contents, early_stopping_patience=3),
        ],
        [trained, lambda contents: contents],
        [lambda contents: replace(contents, run=replace(contents.run, config=None))],
    ),
    "R6": (
        [lambda contents: replace(contents, label_mass={0: 0.9, 1: 0.3})],
        [lambda contents: replace(contents, label_mass={0: 0.9, 1: 0.8})],
        [lambda contents: contents],
    ),
    "R7": ([equal(True)], [equal(False)], [lambda contents: contents]),
    "R8": ([grouped], [of_one_file, lambda contents: contents], []),
}
"""By code: contents in which the check finds something, in which it does not, and in which it can't look."""


def test_every_check_is_listed_with_its_title_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs/report.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| (R\d+) \| ([^|]+) \|", page, re.MULTILINE)) == {
        code: record.title for code, record in CHECKS.items()
    }
    assert CASES.keys() == CHECKS.keys()


@pytest.mark.parametrize("code", CHECKS)
def test_a_check_fires_where_it_should_and_nowhere_else(code: str, contents: Contents) -> None:
    for changes, state in zip(CASES[code], ("found", "fine", "unknown"), strict=True):
        for change in changes:
            finding = check(change(contents))[code]
            assert finding.state == state, finding
            assert finding.text


def test_selection_says_how_many_evaluations_chose(contents: Contents) -> None:
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "held_out_log_loss": 0.9}, {"step": 4, "held_out_log_loss": 0.8}]
    chosen = replace(trained(contents, keep_weights="best"), curves={0: lines})
    assert "the weights of the training were chosen by log_loss on held-out rows, in up to 2 evaluations" in (
        check(chosen)["R5"].text
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (gain(0.18), "Better than the class prior by 0.180 (0.170 to 0.190)"),
        (gain(-0.18), "Worse than the class prior by 0.180"),
        (gain(0.001), "Not distinguishable from the class prior"),
        (baseline(0.1), "better than the classical baseline: gain 0.100"),
        (baseline(-0.1), "worse than the classical baseline: gain -0.100"),
        (baseline(0.001), "no better than the classical baseline"),
    ],
)
def test_the_verdict_says_what_the_figures_say(change: Change, words: str, contents: Contents) -> None:
    changed = change(contents)
    findings = check(changed)
    line = summary(changed, findings)
    assert words in line
    for code, finding in findings.items():
        assert (code in line) == (finding.state == "found")
