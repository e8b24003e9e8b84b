"""Thresholds of several labels: the best F1 by exhaustive search, nested so that no row judges its own threshold."""

from __future__ import annotations

import json
import shlex
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from pairclf.config import Submission
from pairclf.data.submission import form_of, write_submission
from pairclf.errors import DataError
from pairclf.runs.thresholds import fit_labels, render_thresholds
from pairclf.scores.thresholds import apply_thresholds, fit_thresholds, nested_labels
from pairclf.task import LMSYS, Task

PATENTS = Task(name="patents", fields=("text",), classes=("x", "y"), multi_label=True)
FOUR = Task(name="four", fields=("text",), classes=tuple("abcd"), multi_label=True)
values = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=12)


@given(values)
def test_no_other_threshold_has_a_better_f1(rows: list[tuple[int, bool]]) -> None:
    probabilities, held = np.array([[p / 10] for p, _ in rows]), np.array([[float(label)] for _, label in rows])
    (fitted,) = fit_thresholds(probabilities, held, "macro")
    if held.all() or not held.any():
        assert fitted == 0.5
        return
    of = [f1_score(held, probabilities >= level, zero_division=0) for level in (fitted, *np.arange(-0.05, 1, 0.1))]
    assert of[0] == max(of)
    assert min(abs(fitted - p) for p, _ in np.column_stack([probabilities, held])) >= (0.05 - 1e-9 if fitted else 0)


def test_micro_has_one_threshold_and_macro_one_for_each_label() -> None:
    random = np.random.default_rng(0)
    probabilities = random.random((9, 2)) * [1.0, 0.4]
    targets = (random.random((9, 2)) < probabilities).astype(float)
    grid = [*np.unique(probabilities), 0.5]

    def f1(levels: tuple[float, float], average: str) -> float:
        return float(f1_score(targets, apply_thresholds(probabilities, levels), average=average, zero_division=0))

    micro, macro = (fit_thresholds(probabilities, targets, average) for average in ("micro", "macro"))
    assert micro[0] == micro[1]
    assert f1(tuple(micro), "micro") == max(f1((level, level), "micro") for level in grid)
    assert f1(tuple(macro), "macro") == max(f1(levels, "macro") for levels in product(grid, grid))
    assert macro[0] != macro[1]


def test_weights_move_a_threshold() -> None:
    probabilities, targets = np.array([[0.2], [0.4], [0.6], [0.8]]), np.array([[1.0], [0.0], [0.0], [1.0]])
    light, heavy = (fit_thresholds(probabilities, targets, "macro", np.array([w, 1, 1, 1])) for w in (0.01, 10.0))
    assert light > 0.6 > 0.2 > heavy


def test_a_rows_own_label_does_not_move_its_threshold() -> None:
    random = np.random.default_rng(1)
    probabilities, targets = random.random((60, 2)), random.integers(0, 2, (60, 2)).astype(float)
    folds = np.arange(60) % 3
    before = nested_labels(probabilities, targets, folds, "macro")
    changed = np.where((folds == 0)[:, None], 1 - targets, targets)
    after = nested_labels(probabilities, changed, folds, "macro")
    assert (before[folds == 0] == after[folds == 0]).all()
    wrong = apply_thresholds(probabilities, fit_thresholds(probabilities, targets, "macro"))
    wrong_after = apply_thresholds(probabilities, fit_thresholds(probabilities, changed, "macro"))
    assert (wrong[folds == 0] != wrong_after[folds == 0]).any(), "thresholds of all rows do see the labels"


def test_of_noise_the_nested_f1_is_lower_than_that_of_thresholds_fitted_on_the_rows() -> None:
    random = np.random.default_rng(2)
    probabilities, targets = random.random((60, 4)) * 0.2, (random.random((60, 4)) < 0.1).astype(float)
    folds, groups = np.arange(60) % 3, np.arange(60).astype(str)
    fitted = fit_labels(FOUR, probabilities, targets, folds, groups, np.ones(60), np.full(4, 0.5))
    flattered = f1_score(targets, apply_thresholds(probabilities, fitted.thresholds["macro"]), average="macro")
    assert fitted.means_nested is not None
    macro, micro = fitted.means_nested["macro"], fitted.means_nested["micro"]
    assert fitted.means_as_set["macro"] == 0 < macro.value < flattered
    for average, mean in (("macro", macro), ("micro", micro)):
        labels = nested_labels(probabilities, targets, folds, average)
        assert mean.value == pytest.approx(f1_score(targets, labels, average=average, zero_division=0))
        assert mean.low < mean.value < mean.high
    columns = [list(column.cells) for column in render_thresholds(fitted).columns]
    assert columns[0] == ["a", "b", "c", "d", "macro", "micro"]
    (line,) = [line for line in str(render_thresholds(fitted).caption).splitlines() if line.startswith("for macro F1")]
    (setting,) = shlex.split(line.removeprefix("for macro F1: "))  # one word to a shell
    assert json.loads(setting.partition("=")[2]) == fitted.setting("macro")
    tree = json.loads(json.dumps(fitted.as_dict()))
    assert tree["thresholds"]["macro"] == fitted.setting("macro")
    assert tree["f1_as_set"] == fitted.means_as_set
    assert tree["f1_nested"]["macro"] == {"value": macro.value, "low": macro.low, "high": macro.high}
    assert [line["name"] for line in tree["labels"]] == list("abcd")


def test_one_fold_has_no_nested_figure() -> None:
    one = Task(name="one", fields=("text",), classes=("a",), multi_label=True)
    p, t = np.array([[0.2], [0.7]]), np.array([[0.0], [1]])
    fitted = fit_labels(one, p, t, np.zeros(2, int), np.array(["x", "y"]), np.ones(2), np.full(1, 0.5))
    assert fitted.f1_nested is None
    assert list(render_thresholds(fitted).columns[4].cells) == ["-"] * 3
    assert fitted.setting("macro") == {"a": 0.45}
    assert fitted.as_dict()["labels"][0]["f1_nested"] is None


def test_a_submission_has_the_labels_of_its_thresholds(tmp_path: Path) -> None:
    scores = pl.DataFrame({"id": ["1", "2"], "x": [0.3, 0.6], "y": [0.3, 0.6]})
    settings = Submission(values="labels", thresholds={"y": 0.3})
    write_submission(tmp_path / "s.csv", scores, PATENTS, None, settings)
    assert pl.read_csv(tmp_path / "s.csv").rows() == [(1, 0, 1), (2, 1, 1)]
    assert "from a probability of 0.5 (y 0.3)" in str(form_of(PATENTS, settings, None))


@pytest.mark.parametrize(
    ("task", "thresholds", "message"),
    [
        (PATENTS, {"z": 0.3}, r"names \['z'\], which are no labels of task 'patents'"),
        (LMSYS, {"winner_tie": 0.3}, "task 'lmsys' has one: the likeliest class"),
    ],
)
def test_thresholds_that_change_nothing_are_refused(task: Task, thresholds: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        form_of(task, Submission(thresholds=thresholds), None)
