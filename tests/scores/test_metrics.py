"""Metrics agree with scikit-learn where it has them, and refuse what can't be judged."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from pairclf.errors import ConfigError, DataError
from pairclf.scores.figures import METRICS, check_metric, measure, metrics_of, titled
from pairclf.scores.metrics import Floats, class_prior, entropy, likeliest, log_loss, way_to_best
from pairclf.task import LMSYS, WSDM, Task

SEVERAL = Task(name="tags", fields=("text",), classes=("x", "y", "z"), multi_label=True)


def figure(name: str, values: Any, targets: Any, weights: Any = None, *, multi_label: bool = False) -> float:
    """A metric of `METRICS`, for a task with as many classes as there are columns."""
    classes = tuple(f"class {place}" for place in range(np.shape(values)[1]))
    task = Task(name="t", fields=("text",), classes=classes, multi_label=multi_label)
    return measure(values, targets, task, weights, [name])[name]


accuracy = partial(figure, "accuracy")
expected_calibration_error = partial(figure, "expected_calibration_error")


def random_scores(n: int, classes: int, seed: int) -> tuple[Floats, Floats, Floats]:
    """Probabilities (some exactly 0 and 1), one-hot targets, weights."""
    generator = np.random.default_rng(seed)
    values = generator.dirichlet(np.full(classes, 0.3), size=n)
    values[: n // 4] = np.eye(classes)[generator.integers(classes, size=n // 4)]
    return values, np.eye(classes)[generator.integers(classes, size=n)], generator.uniform(0.1, 2, size=n)


@given(n=st.integers(1, 40), classes=st.integers(2, 5), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_log_loss_and_accuracy_are_scikit_learns(n: int, classes: int, seed: int) -> None:
    values, targets, weights = random_scores(n, classes, seed)
    labels, everyone = targets.argmax(axis=1), list(range(classes))
    expected = sklearn.metrics.log_loss(labels, values, labels=everyone)
    assert log_loss(values, targets) == pytest.approx(expected, rel=1e-12)
    weighted = sklearn.metrics.log_loss(labels, values, labels=everyone, sample_weight=weights)
    assert log_loss(values, targets, weights) == pytest.approx(weighted, rel=1e-12)
    assert accuracy(values, targets) == pytest.approx(sklearn.metrics.accuracy_score(labels, values.argmax(axis=1)))


def test_soft_targets_are_the_mean_of_hard_ones() -> None:
    values = np.array([[0.2, 0.3, 0.5]])
    hard = [log_loss(values, np.eye(3)[[place]]) for place in range(3)]
    assert log_loss(values, [[0.5, 0.25, 0.25]]) == pytest.approx(0.5 * hard[0] + 0.25 * hard[1] + 0.25 * hard[2])


@given(st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_nothing_beats_the_truth_nor_a_constant_the_prior(seed: int) -> None:
    truth, other = np.random.default_rng(seed).dirichlet(np.ones(3), size=(2, 20))
    assert log_loss(truth, truth) == pytest.approx(entropy(truth))
    assert log_loss(other, truth) >= entropy(truth)
    prior = np.tile(class_prior(truth), (20, 1))
    assert log_loss(np.tile(other[0], (20, 1)), truth) >= log_loss(prior, truth) - 1e-12


def test_prior_takes_weights() -> None:
    targets = np.eye(3)[[0, 0, 1]]
    assert class_prior(targets) == pytest.approx([2 / 3, 1 / 3, 0])
    assert class_prior(targets, [1, 1, 2]) == pytest.approx([0.5, 0.5, 0])


def test_entropy_in_nats() -> None:
    assert entropy([[0.5, 0.5], [1.0, 0.0]]) == pytest.approx(np.log(2) / 2)


def test_calibration_error_by_hand() -> None:
    values = [[0.8, 0.2]] * 4 + [[0.4, 0.6]] * 2 + [[1.0, 0.0]]
    targets = np.eye(2)[[0, 0, 0, 1, 1, 0, 0]]
    assert expected_calibration_error(values, targets) == pytest.approx((4 * 0.05 + 2 * 0.1) / 7)
    assert expected_calibration_error(targets, targets) == 0
    soft = [[0.7, 0.3]]
    assert expected_calibration_error(soft, soft) == pytest.approx(0)


def test_way_to_best() -> None:
    assert way_to_best(1.0, prior=1.0, best=0.5) == 0
    assert way_to_best(0.5, prior=1.0, best=0.5) == 1
    assert way_to_best(1.1, prior=1.0, best=0.5) < 0
    with pytest.raises(DataError, match="must be above"):
        way_to_best(0.5, prior=0.5, best=0.5)


@pytest.mark.parametrize(
    ("values", "targets", "weights", "expected"),
    [
        ([[0.5, 0.5]], [[1, 0, 0]], None, "must be alike"),
        ([0.5, 0.5], [1, 0], None, "must be \\(rows, classes\\)"),
        (np.ones((0, 3)), np.ones((0, 3)), None, "with one of each"),
        ([[np.nan, 0.5]], [[1, 0]], None, "probabilities of 1 row are not finite"),
        ([[0.5, 0.5]], [[np.inf, 0]], None, "targets of 1 row are not finite"),
        ([[0.5, 0.5]], [[1, 0]], [1, 1], "weights"),
        ([[0.5, 0.5]], [[1, 0]], [-1], "weights"),
        ([[0.5, 0.5]], [[1, 0]], [0], "weights"),
    ],
)
def test_what_cannot_be_judged_is_refused(values: Any, targets: Any, weights: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        log_loss(values, targets, weights)


def test_several_labels_are_judged_one_by_one() -> None:
    """Without it, saying yes to everything would cost nothing."""
    given, wanted = np.array([[0.9, 0.2], [0.6, 0.7]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    by_hand = -np.mean([np.log(0.9) + np.log(0.8), np.log(0.4) + np.log(0.7)])
    assert log_loss(given, wanted, multi_label=True) == pytest.approx(by_hand)
    assert log_loss(np.ones((2, 2)), wanted, multi_label=True) > 10
    assert accuracy(given, wanted, multi_label=True) == 0.75


@pytest.mark.parametrize("multi_label", [False, True])
def test_ties_favour_no_class(multi_label: bool) -> None:
    """A tied label is half right for always-A and for always-B, and so is a tied prediction for a label A."""
    tied, a, b = [[0.5, 0.5]], [[1.0, 0.0]], [[0.0, 1.0]]
    for predicted, wanted in ((a, tied), (b, tied), (tied, a), (tied, b), (tied, tied)):
        assert accuracy(predicted, wanted, multi_label=multi_label) == 0.5
    if not multi_label:
        third = [[1 / 3] * 3]
        assert accuracy(np.eye(3)[[1]], third) == pytest.approx(1 / 3)
        assert accuracy(np.eye(3)[[0, 1, 2]], [[0.4, 0.4, 0.2]] * 3) == pytest.approx(1 / 3)


@given(st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_the_order_of_the_classes_changes_no_figure(seed: int) -> None:
    """As an exchange of sides does; many ties among predictions and targets."""
    given_values, wanted = np.random.default_rng(seed).integers(1, 4, size=(2, 8, 3)).astype(float)
    given_values, wanted = (one / one.sum(axis=1, keepdims=True) for one in (given_values, wanted))
    for order in ([1, 0, 2], [2, 0, 1]):
        assert measure(given_values[:, order], wanted[:, order], LMSYS) == pytest.approx(
            measure(given_values, wanted, LMSYS)
        )


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_weight_of_two_is_a_row_that_stands_twice(seed: int) -> None:
    values, targets, _ = random_scores(12, 3, seed)
    twice = np.random.default_rng(seed).integers(1, 4, size=12)
    for task in (LMSYS, SEVERAL):
        expanded = measure(np.repeat(values, twice, axis=0), np.repeat(targets, twice, axis=0), task)
        assert measure(values, targets, task, twice) == pytest.approx(expanded)


def test_calibration_of_several_labels_is_each_labels_own() -> None:
    generator = np.random.default_rng(0)
    values, targets = generator.uniform(size=(50, 3)), generator.integers(2, size=(50, 3)).astype(float)
    both = [
        expected_calibration_error(np.stack([p, 1 - p], axis=1), np.stack([t, 1 - t], axis=1))
        for p, t in zip(values.T, targets.T, strict=True)
    ]
    assert expected_calibration_error(values, targets, multi_label=True) == pytest.approx(np.mean(both))
    assert expected_calibration_error(targets, targets, multi_label=True) == 0
    assert expected_calibration_error(np.ones((50, 3)), targets, multi_label=True) > 0.3  # yes to everything


def test_every_metric_is_measured_where_it_applies() -> None:
    """Some by every command; a task's own, such as F1, by every command too, and first."""
    everywhere = ["log_loss", "accuracy", "expected_calibration_error"]
    values, targets, _ = random_scores(9, 3, 0)
    targets = np.eye(3)[np.arange(9) % 3]
    assert list(measure(values, targets, LMSYS)) == everywhere
    assert next(iter(measure(values[:, :2], targets[:, :2], WSDM))) == WSDM.metric == "accuracy"
    for name, metric in METRICS.items():
        task = LMSYS.model_copy(update={"metric": name})
        if metric.applies(LMSYS):
            assert list(measure(values, targets, task)) == list(dict.fromkeys([name, *everywhere]))
            assert next(iter(titled(measure(values, targets, task), task))) == metric.title
        else:
            with pytest.raises(ConfigError, match=f"task.metric='{name}' is no metric of a multiclass task with 3"):
                measure(values, targets, task)


def test_a_metric_that_lacks_a_class_is_left_out() -> None:
    binary = WSDM.model_copy(update={"metric": "roc_auc"})
    values, targets, weights = random_scores(30, 2, 0)
    expected = sklearn.metrics.roc_auc_score(targets[:, 1], values[:, 1], sample_weight=weights)
    assert measure(values, targets, binary, weights)["roc_auc"] == pytest.approx(expected)
    absent = np.tile([1.0, 0.0], (30, 1))
    assert list(measure(values, absent, binary)) == ["log_loss", "accuracy", "expected_calibration_error"]


def test_a_metric_of_other_tasks_is_refused() -> None:
    for task in (WSDM, SEVERAL):
        assert "roc_auc_sides" not in metrics_of(task)
        with pytest.raises(ConfigError, match=f"best_model='roc_auc_sides' is no metric of a {task.kind} task"):
            check_metric("train.metric_for_best_model", "roc_auc_sides", task)


def test_which_figure_is_better() -> None:
    assert METRICS["log_loss"].is_better(0.9, 1.0)
    assert METRICS["accuracy"].is_better(0.9, 0.8)
    for metric in METRICS.values():
        assert not any(metric.is_better(*pair) for pair in ((0.5, 0.5), (float("nan"), 0.5), (0.5, float("nan"))))


def test_a_metric_that_nobody_knows_is_named() -> None:
    with pytest.raises(ConfigError, match="acuracy' is no metric of a multiclass task") as caught:
        metrics_of(LMSYS.model_copy(update={"metric": "acuracy"}))
    assert "accuracy" in str(caught.value.remedy)


@given(st.floats(-1.5e-7, 1.5e-7), st.sampled_from([0.1, 0.3, 0.4, 0.45]))
def test_equal_responses_have_one_verdict_on_every_machine(noise: float, chance: float) -> None:
    """Scores of one text in two batches differ in their last bits, and the swap does not cancel that."""
    tie = 1 - 2 * chance
    rows = np.array([[chance + noise, chance - noise, tie], [chance - noise, chance + noise, tie]])
    assert len(set(likeliest(rows).tolist())) == 1
    assert likeliest([[0.2, 0.5, 0.3], [0.5 - 1e-5, 0.5, 0.0]]).tolist() == [1, 1]
