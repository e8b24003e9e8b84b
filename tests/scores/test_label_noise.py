"""P(the label is wrong): planted errors are found with honest probabilities, whichever side stands first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairclf.demo.arena import davidson
from pairclf.scores.label_noise import LabelNoise, label_noise, labels_of_others
from pairclf.scores.metrics import Floats
from pairclf.task import LMSYS, Task

SWAPPED = list(LMSYS.swapped_columns)
SENTIMENT = Task(name="sentiment", fields=("text",), classes=("bad", "good"))


def pairs(rows: int, seed: int = 0, flips: float = 0.1) -> tuple[Floats, Floats, np.ndarray]:
    """Probabilities of right verdicts, recorded ones of which some have their sides exchanged, and which."""
    generator = np.random.default_rng(seed)
    truth = davidson(generator.normal(0, 1.6, rows), generator.normal(0, 1.6, rows))
    labels = (truth.cumsum(axis=1)[:, :2] < generator.random((rows, 1))).sum(axis=1)
    flipped = (generator.random(rows) < flips) & (labels < 2)
    targets = np.eye(3)[np.where(flipped, 1 - labels, labels)]
    return truth, targets, flipped


def judged(
    scores: Floats, targets: Floats, task: Task = LMSYS, same: object = None, turned: object = None
) -> LabelNoise:
    rows = len(scores)
    same = np.arange(rows) if same is None else np.asarray(same)
    turned = np.zeros(rows, dtype=bool) if turned is None else np.asarray(turned)
    return label_noise(scores, targets, np.ones(rows), task, same, turned)


def test_planted_errors_are_found_with_honest_probabilities() -> None:
    truth, targets, flipped = pairs(20_000)
    recorded = 0.9 * truth + 0.1 * truth[:, SWAPPED]  # what a model learns that is trained on these labels
    noise = judged(recorded, targets)
    assert noise.rate == pytest.approx(0.11, abs=0.03)
    assert flipped[np.argsort(-noise.wrong)[:200]].mean() > 0.85
    for low, high in ((0.02, 0.1), (0.1, 0.3), (0.3, 0.6)):
        rows = (noise.wrong > low) & (noise.wrong <= high)
        assert flipped[rows].mean() == pytest.approx(noise.wrong[rows].mean(), abs=0.12)
    top = np.argsort(-noise.wrong)[:200]
    assert flipped[top].mean() >= noise.wrong[top].mean(), "what it calls likely is at least as likely"
    assert flipped.sum() == pytest.approx(noise.wrong.sum(), rel=0.5)


def test_right_labels_are_left_alone_though_people_disagree() -> None:
    """A third of these labels is not the likeliest one: confident learning as published calls most of them errors."""
    truth, targets, _ = pairs(20_000, flips=0.0)
    assert (truth.argmax(axis=1) != targets.argmax(axis=1)).mean() > 0.3
    assert judged(truth, targets).wrong.mean() < 0.04


def test_soft_labels_are_nearer_to_the_right_verdicts() -> None:
    truth, targets, flipped = pairs(20_000)
    right = np.where(flipped[:, None], targets[:, SWAPPED], targets)
    noise = judged(0.9 * truth + 0.1 * truth[:, SWAPPED], targets)
    assert noise.labels.sum(axis=1) == pytest.approx(1)
    assert ((noise.labels - right) ** 2).mean() < 0.85 * ((targets - right) ** 2).mean()


@given(st.integers(0, 10_000))
def test_exchanging_the_sides_of_rows_exchanges_their_soft_labels(seed: int) -> None:
    truth, targets, _ = pairs(80, seed)
    generator = np.random.default_rng(seed)
    turned, same = generator.random(80) < 0.5, generator.integers(0, 60, 80)
    before = judged(truth, targets, same=same)
    mirrored = [np.where(turned[:, None], values[:, SWAPPED], values) for values in (truth, targets)]
    after = judged(*mirrored, same=same, turned=turned)
    back = np.where(turned[:, None], after.labels[:, SWAPPED], after.labels)
    assert after.wrong == pytest.approx(before.wrong, abs=1e-5)
    assert back == pytest.approx(before.labels, abs=1e-5)


def test_other_labels_of_the_same_texts_count_in_the_own_order() -> None:
    targets = np.eye(3)[[0, 1, 0, 2]]
    same, turned = np.array([7, 7, 7, 9]), np.array([False, True, False, False])
    others = labels_of_others(targets, np.array([1.0, 1.0, 2.0, 4.0]) / 2, LMSYS, same, turned)
    # rows 0 and 2 call A better; row 1, whose sides are exchanged, calls B better: all three agree
    assert others.tolist() == [[1.5, 0, 0], [0, 1.5, 0], [1.0, 0, 0], [0, 0, 0]]
    blind = labels_of_others(targets, np.ones(4), LMSYS, same, np.zeros(4, dtype=bool))
    assert blind[0].tolist() == [1, 1, 0], "without the swap the mirror would contradict"


def test_a_label_that_all_others_of_its_texts_contradict_is_suspect() -> None:
    truth, targets, _ = pairs(400, 3, flips=0.0)
    same = np.repeat(np.arange(80), 5)
    first = np.arange(0, 400, 5)
    targets[:], truth[:] = np.repeat(targets[first], 5, axis=0), np.repeat(truth[first], 5, axis=0)
    odd = first[targets[first, 2] == 0][:8]
    targets[odd] = targets[odd][:, SWAPPED]
    together, alone = judged(truth, targets, same=same), judged(truth, targets)
    assert {*np.argsort(-together.wrong)[:8]} == {*odd}
    assert together.wrong[odd].min() > alone.wrong[odd].min()
    assert together.evidence < 10 < alone.evidence


@pytest.mark.parametrize("task", [LMSYS, SENTIMENT])
def test_few_rows_absent_classes_and_equal_scores_give_probabilities(task: Task) -> None:
    classes = len(task.classes)
    for rows, scores in ((10, None), (1, None), (60, np.full((60, classes), 1 / classes))):
        values = np.random.default_rng(0).dirichlet(np.ones(classes), rows) if scores is None else scores
        noise = judged(values, np.eye(classes)[np.zeros(rows, dtype=int)], task)  # the other classes are absent
        assert ((noise.wrong >= 0) & (noise.wrong <= 1)).all()
        assert noise.labels.sum(axis=1) == pytest.approx(1)
        assert np.isfinite(noise.expected).all()
    certain = np.eye(classes)[[0, 1] * 5]
    assert judged(certain, certain, task).wrong.max() < 0.5, "scores of 0 and 1"


def test_soft_targets_are_means_of_hard_ones() -> None:
    generator = np.random.default_rng(1)
    truth, targets, _ = pairs(500, 1)
    noise = judged(truth, targets)
    halves = targets.copy()
    halves[0] = [0.5, 0.5, 0]
    sides = []
    for column in (0, 1):
        one = targets.copy()
        one[0] = np.eye(3)[column]
        sides.append(judged(truth, one).wrong[0])
    assert judged(truth, halves).wrong[0] == pytest.approx(np.mean(sides), abs=0.02)
    order = generator.permutation(500)
    assert judged(truth[order], targets[order]).wrong == pytest.approx(noise.wrong[order], abs=1e-6)
