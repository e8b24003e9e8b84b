"""Every figure is scikit-learn's, or a written reference's; and its interval is that of drawn groups."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from pairclf.scores.figures import METRICS, TOP, estimates_as_json, judge, reliability, statistics_of, values_of
from pairclf.scores.intervals import estimate
from pairclf.scores.metrics import Floats
from pairclf.task import LMSYS, WSDM, Task

SEVERAL = Task(name="tags", fields=("text",), classes=("x", "y", "z"), multi_label=True)
TEN = Task(name="topics", fields=("text",), classes=tuple("abcdefghij"))


def drawn(task: Task, n: int = 60, seed: int = 0) -> tuple[Floats, Floats, Floats]:
    """Probabilities, hard targets and weights; of several labels, any number."""
    generator, classes = np.random.default_rng(seed), len(task.classes)
    weights = generator.uniform(0.2, 2, size=n)
    if task.multi_label:
        return generator.uniform(size=(n, classes)), generator.integers(2, size=(n, classes)).astype(float), weights
    labels = generator.integers(classes, size=n)
    labels[:classes] = np.arange(classes)  # of each one
    return generator.dirichlet(np.ones(classes), size=n), np.eye(classes)[labels], weights


def scikit_learn(p: Floats, t: Floats, w: Floats, task: Task) -> dict[str, float]:
    """The same figures by scikit-learn."""
    many = {"sample_weight": w, "zero_division": 0}
    if task.multi_label:
        truth: Any = t.astype(int)
        chosen: Any = (p > 0.5).astype(int)
        columns = range(t.shape[1])
        figures = {
            "roc_auc": sk.roc_auc_score(truth, p, average="macro", sample_weight=w),
            "brier": np.mean([sk.brier_score_loss(t[:, k], p[:, k], sample_weight=w) for k in columns]),
            "matthews": np.mean([sk.matthews_corrcoef(t[:, k], chosen[:, k], sample_weight=w) for k in columns]),
        }
    else:
        truth, chosen = t.argmax(axis=1), p.argmax(axis=1)
        auc = {"multi_class": "ovr", "average": "macro", "labels": range(t.shape[1])} if t.shape[1] > 2 else {}
        figures = {
            "roc_auc": sk.roc_auc_score(truth, p if auc else p[:, 1], sample_weight=w, **auc),
            "brier": np.average(((p - t) ** 2).sum(axis=1), weights=w),
            "matthews": sk.matthews_corrcoef(truth, chosen, sample_weight=w),
            "accuracy": sk.accuracy_score(truth, chosen, sample_weight=w),
        }
    return {
        **figures,
        **{f"{mean}_f1": sk.f1_score(truth, chosen, average=mean, **many) for mean in ("macro", "micro", "weighted")},
        "precision": sk.precision_score(truth, chosen, average="macro", **many),
        "recall": sk.recall_score(truth, chosen, average="macro", **many),
    }


@pytest.mark.parametrize("task", [WSDM, LMSYS, TEN, SEVERAL], ids=lambda task: task.name)
@given(seed=st.integers(0, 300))
@settings(max_examples=5, deadline=None)
def test_figures_are_scikit_learns(task: Task, seed: int) -> None:
    p, t, w = drawn(task, seed=seed)
    p = np.round(p, 2)  # ties of ranks, and none of classes, which scikit-learn does not know
    if task.multi_label:
        p[p == 0.5] = 0.51
    else:
        p += 1e-4 * np.arange(p.shape[1])
        p /= p.sum(axis=1, keepdims=True)
    figures = values_of(judge(p, t, task, w))
    with warnings.catch_warnings(action="ignore"):
        expected = scikit_learn(p, t, w, task)
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-9)


def test_a_class_that_nobody_holds_is_scikit_learns_too() -> None:
    p, t, w = drawn(TEN)
    t[:, 3], t[t.sum(axis=1) == 0, 4] = 0, 1
    for predicted in (p, np.where(np.arange(10) == 3, 0, p) / (1 - p[:, [3]])):  # predicted, and not even that
        figures = values_of(judge(predicted, t, TEN, w))
        truth, chosen = t.argmax(axis=1), predicted.argmax(axis=1)
        f1 = sk.f1_score(truth, chosen, average="macro", sample_weight=w, zero_division=0)
        assert figures["macro_f1"] == pytest.approx(f1)
        assert math.isnan(figures["roc_auc"])


def test_brier_is_scikit_learns_sum_over_classes() -> None:
    p, t, w = drawn(TEN)
    expected = sk.brier_score_loss(t.argmax(axis=1), p, sample_weight=w, labels=range(10), scale_by_half=False)
    assert values_of(judge(p, t, TEN, w))["brier"] == pytest.approx(expected)


@given(seed=st.integers(0, 300))
@settings(max_examples=10, deadline=None)
def test_log_loss_and_brier_of_soft_targets_are_expectations(seed: int) -> None:
    generator = np.random.default_rng(seed)
    p, t = generator.dirichlet(np.ones(3), size=(2, 5))
    hard = [values_of(judge(p, np.eye(3)[[place] * 5], LMSYS)) for place in range(3)]
    for row in range(5):
        by_class = [values_of(judge(p[[row]], np.eye(3)[[place]], LMSYS)) for place in range(3)]
        soft = values_of(judge(p[[row]], t[[row]], LMSYS))
        for name in ("log_loss", "brier"):
            assert soft[name] == pytest.approx(sum(t[row, place] * by_class[place][name] for place in range(3)))
    assert hard[0]["log_loss"] == pytest.approx(-np.log(p[:, 0]).mean())


def test_average_precision_at_k_by_hand() -> None:
    p = np.array([[0.4, 0.3, 0.2, 0.06, 0.04]] * 4)
    task = Task(name="five", fields=("text",), classes=tuple("abcde"))
    figures = values_of(judge(p, np.eye(5)[[0, 1, 2, 3]], task))
    assert figures["map_at_3"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 0) / 4)
    several = Task(name="tags", fields=("text",), classes=tuple("abcde"), multi_label=True)
    labels = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], dtype=float)
    expected = ((1 + 2 / 3) / 3 + 0) / 2  # the row without a label has none
    assert values_of(judge(p[:3], labels, several))["map_at_3"] == pytest.approx(expected)
    assert TOP == 3
    assert "map_at_3" not in values_of(judge(p[:, :3] / 0.9, np.eye(3)[[0, 1, 2, 0]], LMSYS))


def test_sides_are_ranked_among_rows_that_one_of_them_won() -> None:
    p, t, w = drawn(LMSYS, 200)
    won = t[:, 2] == 0
    expected = sk.roc_auc_score(t[won, 0], (p[:, 0] / (p[:, 0] + p[:, 1]))[won], sample_weight=w[won])
    assert values_of(judge(p, t, LMSYS, w))["roc_auc_sides"] == pytest.approx(expected)
    assert "roc_auc_sides" not in values_of(judge(p[:, :2] / p[:, :2].sum(axis=1, keepdims=True), t[:, :2] + 0, WSDM))


def test_the_debiased_error_of_calibrated_scores_is_near_nothing_and_the_plain_one_is_not() -> None:
    """1,000 rows whose labels are drawn from their very probabilities, 30 times; then a known error."""
    generator = np.random.default_rng(0)
    plain, debiased, skewed = [], [], []
    for _ in range(30):
        p = generator.dirichlet(np.ones(3), size=1000)
        t = np.eye(3)[(p.cumsum(axis=1) > generator.uniform(size=(1000, 1))).argmax(axis=1)]
        figures = values_of(judge(p, t, LMSYS))
        plain.append(figures["expected_calibration_error"])
        debiased.append(figures["calibration_error_debiased"])
        sure = 0.8 * p + 0.2 * np.eye(3)[p.argmax(axis=1)]  # too sure by 0.2 (1 - p)
        error = values_of(judge(sure, t, LMSYS))["calibration_error_debiased"]
        skewed.append((error, 0.2 * np.sqrt(((1 - p.max(axis=1)) ** 2).mean())))
    assert np.mean(plain) > 0.03
    assert np.mean(debiased) < 0.65 * np.mean(plain)  # although squares weigh large errors more
    found, expected = np.mean(skewed, axis=0)
    assert found == pytest.approx(expected, rel=0.05)


def test_errors_of_classes_are_those_of_each_class() -> None:
    """The tie alone is wrong, by 0.2 in each row, half of which each side has too little."""
    generator = np.random.default_rng(1)
    p = 0.2 + 0.4 * generator.dirichlet(np.ones(3), size=4000)
    t = np.eye(3)[(p.cumsum(axis=1) > generator.uniform(size=(4000, 1))).argmax(axis=1)]
    shifted = p + np.array([-0.1, -0.1, 0.2])
    figures = values_of(judge(shifted, t, LMSYS))
    assert figures["calibration_error_tie"] == pytest.approx(0.2, abs=0.02)
    assert figures["calibration_error_class_wise"] == pytest.approx(0.4 / 3, abs=0.02)


def test_debiased_errors_are_the_written_formula() -> None:
    """Bins of 20 rows in the order of the predictions: square of the mean residual less the variance of this mean."""
    p, t, _ = drawn(LMSYS, 300)

    def written(predicted: Floats, observed: Floats) -> float:
        terms = []
        for rows in np.split(np.argsort(predicted), 15):
            residual = predicted[rows] - observed[rows]
            terms.append(residual.mean() ** 2 - residual.var(ddof=1) / len(rows))
        return math.sqrt(max(0.0, float(np.mean(terms))))

    figures = values_of(judge(p, t, LMSYS))
    of_classes = [written(p[:, place], t[:, place]) for place in range(3)]
    expected = {
        "calibration_error_debiased": written(p.max(axis=1), (p.argmax(axis=1) == t.argmax(axis=1)).astype(float)),
        "calibration_error_class_wise": np.mean(of_classes),
        "calibration_error_tie": of_classes[2],
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert min(expected.values()) > 0.05


@pytest.mark.parametrize("name", [name for name in METRICS if name != "map_at_3"])
def test_intervals_are_those_of_drawn_groups(name: str) -> None:
    """Of drawn rows, by brute force. A calibration error has the noise of a draw beside its own, so its spread alone
    is compared."""
    p, t, w = drawn(LMSYS, 240)
    p = 0.5 * p + 0.5 * (0.6 * t + 0.4 / 3)
    groups = np.arange(240) // 2
    found = estimate({name: METRICS[name].statistic(judge(p, t, LMSYS, w))}, groups, w)[name]
    generator, brute = np.random.default_rng(5), []
    for _ in range(120):
        rows = (2 * generator.integers(120, size=120)[:, None] + [0, 1]).ravel()
        brute.append(METRICS[name].statistic(judge(p[rows], t[rows], LMSYS, w[rows])).value(w[rows]))
    lowest, highest = METRICS[name].limits
    assert lowest <= found.value <= highest
    assert found.draws.std() == pytest.approx(np.std(brute), rel=0.35)
    assert found.low <= found.value <= found.high


def test_no_figure_cares_for_the_order_of_rows_or_equal_classes() -> None:
    p, t, w = drawn(LMSYS, 90)
    order, sides = np.random.default_rng(2).permutation(90), list(LMSYS.swapped_columns)
    figures = values_of(judge(p, t, LMSYS, w))
    assert values_of(judge(p[order], t[order], LMSYS, w[order])) == pytest.approx(figures)
    assert values_of(judge(p[:, sides], t[:, sides], LMSYS, w)) == pytest.approx(figures)


@pytest.mark.parametrize("task", [WSDM, LMSYS, TEN, SEVERAL], ids=lambda task: task.name)
def test_equal_predictions_absent_classes_and_few_rows_have_figures(task: Task) -> None:
    classes = len(task.classes)
    for rows in (1, 2, 10):
        p, t = np.full((rows, classes), 1 / classes), np.tile(np.eye(classes)[0], (rows, 1))
        found = estimate(statistics_of(judge(p, t, task)), range(rows))
        numbers = estimates_as_json(found, {name: figure.limits for name, figure in METRICS.items()})
        for name, cells in numbers.items():
            assert all(value is None or np.isfinite(value) for value in cells.values())
            assert name.startswith("roc_auc") or cells["value"] is not None or name == "map_at_3"
        assert numbers["roc_auc"]["value"] is None


def test_bins_of_a_reliability_diagram_hold_all_rows_and_the_truth() -> None:
    generator = np.random.default_rng(3)
    p = generator.dirichlet(np.ones(3), size=3000)
    t = np.eye(3)[(p.cumsum(axis=1) > generator.uniform(size=(3000, 1))).argmax(axis=1)]
    lines = reliability(judge(p, t, LMSYS))
    for name in (None, *LMSYS.classes):
        bins = [line for line in lines if line["class"] == name]
        assert sum(line["rows"] for line in bins) == 3000
        assert len(bins) == 15
        assert sum(line["low"] <= line["predicted"] <= line["high"] for line in bins) >= 12
        assert all(line["low"] < line["observed"] < line["high"] for line in bins)
    (only,) = [line for line in reliability(judge(np.full((8, 3), 1 / 3), t[:8], LMSYS)) if line["class"] is None]
    assert only["rows"] == 8
    assert {line["class"] for line in reliability(judge(p, t, SEVERAL))} == set(SEVERAL.classes)
