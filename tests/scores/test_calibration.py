"""Calibration: found again where it is known, worth on rows of other folds what it is worth on new ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairclf.errors import DataError
from pairclf.scores.calibration import (
    RANGE,
    SAMPLE,
    FittedCalibration,
    NestedCalibration,
    Rows,
    Scores,
    at_bound,
    fit,
    fit_nested,
    fit_temperature,
    methods_of,
    temperature_of,
)
from pairclf.scores.figures import judge
from pairclf.scores.intervals import Estimate, difference
from pairclf.scores.metrics import Floats, log_loss
from pairclf.scores.probabilities import Calibration, apply_temperature, mean_of_orders, probabilities, unswap
from pairclf.task import LMSYS, WSDM, Task

SEVERAL = Task(name="tags", fields=("text",), classes=("x", "y", "z"), multi_label=True)


def fitted(values: Floats, targets: Floats, task: Task = LMSYS) -> float:
    return fit_temperature(lambda temperature: apply_temperature(values, temperature, task), targets, task)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 1.7, 5.0])
def test_a_known_temperature_is_found(temperature: float) -> None:
    truth = np.random.default_rng(0).dirichlet(np.ones(3), size=200)
    unsure = apply_temperature(truth, 1 / temperature, LMSYS)  # soft targets: the truth itself
    assert fitted(unsure, truth) == pytest.approx(temperature, rel=1e-3)
    np.testing.assert_allclose(apply_temperature(unsure, temperature, LMSYS), truth, atol=1e-9)


@given(seed=st.integers(0, 500), sharpness=st.floats(-4, 4), task=st.sampled_from([LMSYS, WSDM, SEVERAL]))
@settings(max_examples=40, deadline=None)
def test_the_root_of_the_slope_is_the_temperature_that_the_search_finds(
    seed: int, sharpness: float, task: Task
) -> None:
    """At the bounds of the range, too; and where scores know nothing, any temperature is as good."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(60, len(task.classes)))
    classes = random.integers(0, len(task.classes), 60)
    targets = np.eye(len(task.classes))[np.where(random.random(60) < 0.6, logits.argmax(axis=1), classes)]
    values, weights = probabilities(np.exp(sharpness) * logits, task), random.uniform(0.1, 2, 60)
    losses = [
        log_loss(apply_temperature(values, temperature, task), targets, weights, multi_label=task.multi_label)
        for temperature in (
            temperature_of(values, targets, task, weights),
            fit_temperature(lambda own: apply_temperature(values, own, task), targets, task, weights),
        )
    ]
    assert losses[0] <= losses[1] + 1e-9


@given(seed=st.integers(0, 500), temperature=st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_verdicts_stay_and_rows_sum_to_one(seed: int, temperature: float) -> None:
    given_values = np.random.default_rng(seed).dirichlet(np.ones(3), size=10)
    scaled = apply_temperature(given_values, temperature, LMSYS)
    np.testing.assert_array_equal(scaled.argmax(axis=1), given_values.argmax(axis=1))
    np.testing.assert_allclose(scaled.sum(axis=1), 1)
    surer = scaled.max(axis=1) - given_values.max(axis=1)
    assert (surer * (1 - temperature) >= -1e-12).all()


def test_a_fit_never_hurts_on_its_own_rows() -> None:
    generator = np.random.default_rng(1)
    values, targets = generator.dirichlet(np.ones(3), size=100), np.eye(3)[generator.integers(3, size=100)]
    temperature = fitted(values, targets)
    assert log_loss(apply_temperature(values, temperature, LMSYS), targets) <= log_loss(values, targets) + 1e-9


def test_certain_scores_stay_finite() -> None:
    values = np.eye(3)
    assert np.isfinite(apply_temperature(values, 0.05, LMSYS)).all()
    assert fitted(values, np.eye(3)[[1, 2, 0]]) == pytest.approx(RANGE[1], rel=1e-3)  # always wrong: unsure


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(DataError, match="temperature="):
        apply_temperature([[0.5, 0.5]], temperature, LMSYS)


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="not finite"):
        fitted(np.array([[np.nan, 0.5]]), np.array([[1, 0]]))


def scores_of(logits: Floats, task: Task) -> Scores:
    """Of logits `(N, O, C)`, or `(N, C)` in one order."""

    def at(calibration: Calibration | float, rows: Rows | None = None, /) -> Floats:
        chosen = logits if rows is None else logits[rows]
        return (
            mean_of_orders(chosen, task, calibration) if logits.ndim == 3 else probabilities(chosen, task, calibration)
        )

    return at


def test_methods_fit_the_task() -> None:
    assert methods_of(LMSYS) == ["temperature", "tied vector scaling"]
    assert methods_of(WSDM) == ["temperature"]
    assert methods_of(SEVERAL) == ["temperature", "temperature per label"]


@pytest.mark.parametrize("orders", [1, 2])
@pytest.mark.parametrize("known", [Calibration(1.7, 0.6, 0.3), Calibration(0.5, 1.4, -0.7), Calibration(2.0)])
def test_a_known_tied_vector_scaling_is_found(known: Calibration, orders: int) -> None:
    """Soft targets: the very probabilities that the calibration gives."""
    logits = np.random.default_rng(0).normal(size=(300, orders, 3)) * 2
    truth = mean_of_orders(logits, LMSYS, known)
    found = fit("tied vector scaling", scores_of(logits, LMSYS), truth, LMSYS, np.ones(300))
    assert found == pytest.approx(known, abs=0.01)


def test_a_temperature_for_each_label_is_found() -> None:
    logits = np.random.default_rng(0).normal(size=(300, 3)) * 2
    known = Calibration((0.6, 1.0, 3.0))
    truth = probabilities(logits, SEVERAL, known)
    found = fit("temperature per label", scores_of(logits, SEVERAL), truth, SEVERAL, np.ones(300))
    assert found.temperature == pytest.approx(known.temperature, rel=1e-3)
    one = fit("temperature", scores_of(logits, SEVERAL), truth, SEVERAL, np.ones(300))
    losses = [log_loss(probabilities(logits, SEVERAL, it), truth, multi_label=True) for it in (found, one)]
    assert losses[0] < losses[1] - 0.01


@given(
    seed=st.integers(0, 500),
    calibration=st.builds(Calibration, st.floats(0.2, 5), st.floats(0.2, 5), st.floats(-3, 3)),
    constant=st.floats(-20, 20),
)
@settings(max_examples=40, deadline=None)
def test_tied_vector_scaling_keeps_the_swap_and_knows_no_constant(
    seed: int, calibration: Calibration, constant: float
) -> None:
    """Plain vector scaling, with a scale for each side, breaks the first; scaling the tie's raw logit the second."""
    logits = np.random.default_rng(seed).normal(size=(6, 3))
    found = probabilities(logits, LMSYS, calibration)
    np.testing.assert_allclose(probabilities(unswap(logits, LMSYS), LMSYS, calibration), unswap(found, LMSYS))
    np.testing.assert_allclose(probabilities(logits + constant, LMSYS, calibration), found, atol=1e-9)
    np.testing.assert_allclose(
        (found[:, 0] > found[:, 1]), (logits[:, 0] > logits[:, 1])
    )  # which side is likelier stays the same
    plain = logits * np.array([1.5, 1.0, 1.0])
    if seed == 0:
        wrong = probabilities(plain, LMSYS)
        other = probabilities(unswap(logits, LMSYS) * np.array([1.5, 1.0, 1.0]), LMSYS)
        assert np.abs(other - unswap(wrong, LMSYS)).max() > 0.01


def test_a_scale_of_one_and_no_bias_are_the_temperature_to_the_last_bit() -> None:
    logits = np.random.default_rng(0).normal(size=(20, 2, 3))
    np.testing.assert_array_equal(
        mean_of_orders(logits, LMSYS, 1.3), mean_of_orders(logits, LMSYS, Calibration(1.3, 1.0, 0.0))
    )
    with pytest.raises(DataError, match="task 'wsdm' has no tie"):
        probabilities([[0.1, 0.2]], WSDM, Calibration(1.0, 2.0))


def test_a_fit_that_starts_on_a_sample_ends_where_one_of_all_rows_does() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(3 * SAMPLE, 3)) * 3
    truth = probabilities(logits / 2.2, LMSYS)
    labels = np.eye(3)[(truth.cumsum(axis=1) > generator.uniform(size=(len(truth), 1))).argmax(axis=1)]
    labels[np.linspace(0, len(labels) - 1, SAMPLE).astype(int)] = np.eye(3)[0]  # the sample misleads
    scores, weights = scores_of(logits, LMSYS), np.ones(len(logits))
    everywhere = fit_temperature(lambda temperature: scores(Calibration(temperature)), labels, LMSYS)
    found = fit("temperature", scores, labels, LMSYS, weights)
    assert found.temperature == pytest.approx(everywhere, rel=1e-4)


def overconfident(rows: int, heat: float, seed: int = 0) -> tuple[Floats, Floats]:
    generator = np.random.default_rng(seed)
    truth = generator.normal(size=(rows, 3))
    chances = probabilities(truth, LMSYS)
    labels = np.eye(3)[(chances.cumsum(axis=1) > generator.uniform(size=(rows, 1))).argmax(axis=1)]
    return heat * truth, labels


def worth(logits: Floats, labels: Floats, folds: int = 5) -> tuple[NestedCalibration, FittedCalibration]:
    scores = scores_of(logits, LMSYS)
    judged = judge(scores(Calibration()), labels, LMSYS)
    fitted = fit_nested("temperature", scores, judged, np.arange(len(labels)) % folds)
    raw = -np.log((judged.predicted * labels).sum(axis=1))
    gain = difference(raw, fitted.losses, np.arange(len(labels)))
    return NestedCalibration(fitted, float(raw.mean()), float(fitted.losses.mean()), gain), fitted


def test_a_nested_loss_is_that_of_calibrations_that_did_not_see_the_row() -> None:
    logits, labels = overconfident(60, 2.0)
    nested, fitted = worth(logits, labels, folds=3)
    for fold in range(3):
        inside = np.arange(60) % 3 == fold
        of_others = fit("temperature", scores_of(logits[~inside], LMSYS), labels[~inside], LMSYS, np.ones(40))
        expected = probabilities(logits[inside], LMSYS, of_others)[labels[inside] == 1]
        np.testing.assert_allclose(fitted.losses[inside], -np.log(expected), atol=1e-6)
    assert fitted.flattering < nested.nested
    assert nested.gain.value == pytest.approx(nested.raw - nested.nested)


def test_calibration_is_worth_it_where_scores_are_too_sure_and_hardly_ever_where_they_are_right() -> None:
    assert worth(*overconfident(400, 2.5))[0].is_worth_it
    accepted = [worth(*overconfident(200, 1.0, seed))[0].is_worth_it for seed in range(20)]
    flattered = [(found := worth(*overconfident(200, 1.0, seed))[0]).fitted.flattering < found.raw for seed in range(5)]
    assert sum(accepted) <= 2
    assert all(flattered)  # the wrong variant: judged on its own rows, a calibration always gains


def test_a_calibration_at_its_bound_is_not_worth_it() -> None:
    draws = np.full(100, 0.1)
    for calibration, bound in (
        (Calibration(RANGE[1]), True), (Calibration((1.0, RANGE[0])), True), (Calibration(1.0, 1.0, 10.0), True),
        (Calibration(1.0, RANGE[0]), True), (Calibration(1.1, 0.9, 0.1), False),
    ):  # fmt: skip
        assert at_bound(calibration) == bound
        fitted = FittedCalibration("temperature", calibration, draws, 0.8, np.zeros((0, 3)))
        assert NestedCalibration(fitted, 1.0, 0.9, Estimate(0.1, draws)).is_worth_it != bound


def test_one_gain_is_better_than_another_by_their_paired_draws() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, size=500)
    fitted = FittedCalibration("temperature", Calibration(1.1), noise, 0.8, np.zeros((0, 3)))
    small, large = (NestedCalibration(fitted, 1.0, 1.0 - gain, Estimate(gain, gain + noise)) for gain in (0.01, 0.02))
    assert large.is_better_than(small)
    assert not small.is_better_than(large)
    assert not small.is_better_than(small)
