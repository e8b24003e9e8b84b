"""Blends have the optimum of a general solver, do not hang on the order of members, and are what `predict` computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from pairclf.scores import blend as module
from pairclf.scores.blend import (
    BLENDS,
    CALIBRATED,
    SMALLEST,
    Blend,
    HeldOutRows,
    arithmetic,
    arithmetic_calibrated,
    best_single,
    blends_of,
    cross_fit,
    gains,
    geometric,
    greedy,
    uniform,
    without_small,
)
from pairclf.scores.metrics import Floats
from pairclf.scores.probabilities import apply_temperature, logits_of, mean_of_models, probabilities, unswap
from pairclf.task import LMSYS, Task

TAGS = Task(name="tags", fields=("text",), classes=("x", "y", "z"), multi_label=True)
KINDS = {"one label": LMSYS, "several labels": TAGS}


def drawn(members: int = 3, n: int = 120, seed: int = 0, task: Task = LMSYS, noise: float = 0.8) -> HeldOutRows:
    """Members that err in ways of their own around the truth, soft targets in some rows, and weights."""
    generator = np.random.default_rng(seed)
    truth = generator.normal(size=(n, 3))
    spread = noise * generator.uniform(0.5, 1.5, size=(members, 1, 1))
    scores = probabilities(truth + spread * generator.normal(size=(members, n, 3)), task)
    held = generator.random((n, 3)) < probabilities(truth, task)
    one_hot = np.eye(3)[(probabilities(truth, task).cumsum(axis=1) < generator.random((n, 1))).sum(axis=1).clip(max=2)]
    targets = held.astype(float) if task.multi_label else one_hot
    targets[: n // 10] = 0.5 if task.multi_label else 1 / 3
    return HeldOutRows(scores, targets, generator.uniform(0.2, 2, size=n), task)


def by_slsqp(rows: HeldOutRows, of: Callable[[Floats], Floats], start: Floats, *, simplex: bool) -> float:
    """The lowest loss that scipy's SLSQP finds, from the losses alone."""
    constraints = [{"type": "eq", "fun": lambda weights: weights.sum() - 1}] if simplex else []
    bounds = [(0, 1 if simplex else 20)] * len(start)
    options = {"ftol": 1e-12, "maxiter": 500}
    result = minimize(
        lambda weights: rows.loss(of(weights)), start, method="SLSQP", bounds=bounds, constraints=constraints,
        options=options,
    )  # fmt: skip
    return float(result.fun)


def mean(rows: HeldOutRows, weights: Floats) -> Floats:
    return np.clip(np.einsum("m,mnc->nc", weights, rows.members), 0, 1)


def product(rows: HeldOutRows, exponents: Floats) -> Floats:
    return probabilities(
        np.einsum("m,mnc->nc", exponents, [logits_of(one, rows.task) for one in rows.members]), rows.task
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_the_convex_fits_reach_the_optimum_of_a_general_solver(kind: str, seed: int) -> None:
    rows = drawn(4, seed=seed, task=KINDS[kind])
    even = np.full(4, 0.25)
    fits = {
        "arithmetic": (arithmetic, by_slsqp(rows, lambda weights: mean(rows, weights), even, simplex=True)),
        "geometric": (geometric, by_slsqp(rows, lambda weights: product(rows, weights), even, simplex=False)),
    }
    for fit, reference in fits.values():
        loss = rows.loss(fit(rows).of(rows.members, rows.task))
        assert loss == pytest.approx(reference, abs=1e-6)
        assert loss < reference + 1e-8
        assert loss < rows.loss(uniform(rows).of(rows.members, rows.task)) - 1e-5, "the wrong weights would pass"


@pytest.mark.parametrize("seed", range(5))
def test_the_weights_satisfy_the_conditions_of_an_optimum(seed: int) -> None:
    """For no member does mass moved to it gain: the largest gradient bounds what is left to gain, in nats."""
    rows = drawn(8, seed=seed)
    terms, shares = module._labelled(rows)

    def gap(weights: Floats) -> float:
        return float((terms @ (shares / (weights @ terms))).max() - 1)

    assert gap(arithmetic(rows).weights) < 1e-7
    assert gap(uniform(rows).weights) > 1e-3


@given(st.permutations(range(5)), st.integers(0, 20))
def test_permuting_members_permutes_weights(order: list[int], seed: int) -> None:
    rows = drawn(5, n=60, seed=seed)
    permuted = HeldOutRows(rows.members[order], rows.targets, rows.weights, rows.task)
    for name, method in blends_of(LMSYS).items():
        fitted, other = method(rows), method(permuted)
        assert other.weights == pytest.approx(fitted.weights[order], abs=2e-4)
        assert rows.loss(other.of(permuted.members, LMSYS)) == pytest.approx(
            rows.loss(fitted.of(rows.members, LMSYS)), abs=1e-5
        )
        if name not in CALIBRATED:
            assert other.calibration.temperature == pytest.approx(fitted.calibration.temperature, rel=1e-3)


@pytest.mark.parametrize("name", blends_of(LMSYS))
def test_one_member_is_its_own_blend(name: str) -> None:
    rows = drawn(1)
    fitted = BLENDS[name](rows)
    assert fitted.weights.tolist() == [1.0]
    expected = probabilities(logits_of(rows.members[0], LMSYS), LMSYS, fitted.calibration)
    assert fitted.of(rows.members, LMSYS) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", blends_of(LMSYS))
def test_identical_members_count_as_one(name: str) -> None:
    """The loss is that of the blend without the copy; 20 members, two of them the same."""
    rows = drawn(19, n=80)
    doubled = HeldOutRows(np.concatenate([rows.members, rows.members[:1]]), rows.targets, rows.weights, rows.task)
    fitted, other = BLENDS[name](rows), BLENDS[name](doubled)
    losses = [blend.of(some.members, LMSYS) for blend, some in ((fitted, rows), (other, doubled))]
    if name != "uniform":
        assert rows.loss(losses[1]) == pytest.approx(rows.loss(losses[0]), abs=2e-3 if name == "greedy" else 1e-4)
    assert other.weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("name", blends_of(LMSYS))
@pytest.mark.parametrize("value", [1 / 3, 0.0], ids=["nothing is known", "all are certain"])
def test_equal_predictions_blend_to_themselves(name: str, value: float) -> None:
    rows = drawn(3)
    same = np.full_like(rows.members, value)
    same[:, :, 0] = 1 - 2 * value
    fitted = BLENDS[name](HeldOutRows(same, rows.targets, rows.weights, LMSYS))
    scores = fitted.of(same, LMSYS)
    assert np.isfinite(scores).all()
    assert scores.sum(axis=1) == pytest.approx(1)
    if value and name not in CALIBRATED:  # ties have a share of their own
        assert scores == pytest.approx(same[0])


@pytest.mark.parametrize("name", blends_of(LMSYS))
def test_a_perfect_member_and_absent_classes_give_finite_blends(name: str) -> None:
    """Certain and right in every row, of which there are ten, none of them a tie."""
    rows = drawn(2, n=10)
    targets = np.eye(3)[np.arange(10) % 2]
    members = np.stack([targets, rows.members[0]])
    fitted = BLENDS[name](HeldOutRows(members, targets, rows.weights, LMSYS))
    assert np.isfinite([*fitted.calibration, *fitted.weights]).all()
    assert fitted.weights[0] > 0.49


def test_greedy_selection_equals_a_written_out_search() -> None:
    rows = drawn(3, n=50)
    counts, best = np.zeros(3), (np.inf, np.zeros(3))
    for number in range(1, module.ROUNDS + 1):
        tried = [(counts + np.eye(3)[member]) / number for member in range(3)]
        losses = [rows.loss(mean(rows, weights)) for weights in tried]
        counts = counts + np.eye(3)[int(np.argmin(losses))]
        best = min(best, (min(losses), counts / number), key=lambda pair: pair[0])
    assert greedy(rows).weights == pytest.approx(best[1])


def test_small_weights_are_left_out_and_the_others_fitted_again() -> None:
    rows = drawn(12, n=2000, noise=0.5)
    whole, kept = arithmetic(rows), without_small(arithmetic, rows)
    assert (whole.weights < SMALLEST).any()
    used = kept.weights > 0
    assert (kept.weights[used] >= SMALLEST).all()
    again = arithmetic(HeldOutRows(rows.members[used], rows.targets, rows.weights, LMSYS))
    assert kept.weights[used] == pytest.approx(again.weights)
    cut = np.where(used, whole.weights, 0)
    of_cut = rows.loss(Blend(cut / cut.sum()).of(rows.members, LMSYS))
    assert rows.loss(kept.of(rows.members, LMSYS)) <= of_cut + 1e-12


def test_a_temperature_mends_members_that_are_too_sure() -> None:
    rows = drawn(3, n=1500)
    sharp = np.stack([apply_temperature(member, 0.4, LMSYS) for member in rows.members])
    rows = HeldOutRows(sharp, rows.targets, rows.weights, LMSYS)
    plain, tempered, pooled = (fit(rows) for fit in (arithmetic, arithmetic_calibrated, geometric))
    assert tempered.calibration.temperature > 1.2
    assert pooled.calibration.temperature > 1.5
    assert rows.loss(tempered.of(sharp, LMSYS)) < rows.loss(plain.of(sharp, LMSYS)) - 0.01


def of_rare_ties(task: Task, n: int = 600, seed: int = 2) -> HeldOutRows:
    """Members that think the tie, or the label in its place, likelier than it is, and all else right."""
    rows = drawn(2, n=n, seed=seed, task=task, noise=0.3)
    shifted = [probabilities(logits_of(member, task) * [1, 1, 0.4] + [0, 0, 1.5], task) for member in rows.members]
    return HeldOutRows(np.stack(shifted), rows.targets, rows.weights, task)


@pytest.mark.parametrize(
    ("task", "name"), [(LMSYS, "arithmetic, tied vector scaling"), (TAGS, "arithmetic, temperature per label")]
)
def test_a_calibration_at_the_end_is_judged_by_a_fit_to_other_folds(task: Task, name: str) -> None:
    """Fitted to all rows, which is what a deliberately wrong judge would do, it has the flattering figure."""
    rows, folds = of_rare_ties(task, n=90), np.arange(90) % 3
    fitted = BLENDS[name](rows)
    nested, flattering = (
        rows.loss(cross_fit(BLENDS[name], rows, folds, lambda: None)),
        rows.loss(fitted.of(rows.members, task)),
    )
    by_hand = np.empty_like(rows.targets)
    for fold in range(3):
        rest, held = rows.only(folds != fold), rows.members[:, folds == fold]
        part = BLENDS[name](rest)
        mean = Blend(part.weights).of(held, task)
        by_hand[folds == fold] = probabilities(logits_of(mean, task), task, part.calibration)
    wrong = rows.loss(cross_fit(lambda _: fitted, rows, folds, lambda: None))
    assert wrong == flattering
    assert nested == pytest.approx(rows.loss(by_hand), abs=1e-12)
    assert nested > wrong + 0.005


def test_each_task_has_the_calibrations_that_it_can_use() -> None:
    sides = Task(name="s", fields=("text",), classes=("x", "y", "z"))
    calibrated = {task.name: [name for name in blends_of(task) if name in CALIBRATED] for task in (LMSYS, TAGS, sides)}
    assert calibrated == {
        "lmsys": ["arithmetic, tied vector scaling"], "tags": ["arithmetic, temperature per label"], "s": []
    }  # fmt: skip


def test_a_calibrated_blend_keeps_the_swap_of_a_row() -> None:
    rows = of_rare_ties(LMSYS)
    fitted = BLENDS["arithmetic, tied vector scaling"](rows)
    assert fitted.calibration.tie_bias < -0.2
    swapped = fitted.of(np.stack([unswap(member, LMSYS) for member in rows.members]), LMSYS)
    assert swapped == pytest.approx(unswap(fitted.of(rows.members, LMSYS), LMSYS), abs=1e-12)


def test_cross_fitting_never_judges_a_row_by_a_blend_fitted_to_it() -> None:
    rows, folds = drawn(3, n=90), np.arange(90) % 3
    scores = cross_fit(arithmetic, rows, folds, lambda: None)
    for fold in range(3):
        fitted = arithmetic(rows.only(folds != fold))
        assert scores[folds == fold] == pytest.approx(fitted.of(rows.members[:, folds == fold], LMSYS))
    changed = rows.targets.copy()
    changed[folds == 0] = [0, 0, 1]
    others = HeldOutRows(rows.members, changed, rows.weights, LMSYS)
    again = cross_fit(arithmetic, others, folds, lambda: None)
    assert (again[folds == 0] == scores[folds == 0]).all()
    assert (again[folds == 1] != scores[folds == 1]).any()


def test_fitting_flatters_by_about_half_a_parameter_a_row() -> None:
    """(M - 1) / (2 N) nats on the rows of the fit, and as much lost on others."""
    optimism = []
    for seed in range(30):
        rows, folds = drawn(5, n=200, seed=seed), np.arange(200) % 5
        flattering = rows.loss(arithmetic(rows).of(rows.members, LMSYS))
        optimism.append(rows.loss(cross_fit(arithmetic, rows, folds, lambda: None)) - flattering)
    assert 0.002 < np.mean(optimism) < 0.03  # 2 * 4 / 400 = .02, less where a weight is at 0


def test_gains_add_up_to_the_blend() -> None:
    rows = drawn(4, n=300)
    fitted = arithmetic(rows)
    ordered = gains(fitted, rows)
    prior = np.tile(np.average(rows.targets, axis=0, weights=rows.weights), (300, 1))
    assert {member for member, _ in ordered} == set(np.flatnonzero(fitted.weights))
    assert sum(gain for _, gain in ordered) == pytest.approx(
        rows.loss(prior) - rows.loss(fitted.of(rows.members, LMSYS))
    )
    assert ordered[0][0] == best_single(rows).weights.argmax()


def test_a_geometric_mean_is_a_mean_of_logits() -> None:
    rows = drawn(3, n=20, task=TAGS)
    weights = np.array([0.2, 0.3, 0.5])
    expected = probabilities(mean_of_models([logits_of(one, TAGS) for one in rows.members], weights), TAGS, 1.3)
    assert Blend(weights, 1.3, "geometric").of(rows.members, TAGS) == pytest.approx(expected)
    assert Blend(weights, 1.3).of(rows.members, TAGS) != pytest.approx(expected)
