"""Label noise: the probability that a label is wrong, from out-of-sample scores and other labels of the same texts.

Confident learning (Northcutt, Jiang and Chuang, 2021, arXiv 1911.00068) has three steps: count how often labels
contradict confident scores, estimate the noise from the counts, and rank the rows. All three are here, with soft
labels and for pairs. The first is changed. There a score is confident if it reaches the mean of its class, which suits
classes that nobody disagrees about. People's verdicts differ without being wrong, and that would be counted as noise.
So contradictions are counted among the most confident scores alone, where right labels differ least: anchor points, as
in Liu and Tao, Classification with noisy labels by importance reweighting (2016, arXiv 1411.7718).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pairclf.scores.calibration import fit_temperature
from pairclf.scores.metrics import Floats, class_prior, likeliest
from pairclf.scores.probabilities import apply_temperature
from pairclf.task import Task

ANCHORS = 0.1
"""The share of the rows, those with the most confident scores, among which contradictions are counted."""

FEWEST = 50
"""Anchors at least, or all rows: a rate of fewer is luck."""

MOST = 0.5
"""The largest rate: beyond it the scores are wrong and not the labels."""

EVIDENCE = (0.5, 200.0)
"""The range of `LabelNoise.evidence`."""


@dataclass(frozen=True, slots=True, eq=False)
class LabelNoise:
    """What is known of the labels of `N` rows.

    Attributes:
        wrong: `(N,)`, the probability that the label is wrong.
        labels: `(N, C)`, the probability of each class as the right label: soft labels to train on.
        expected: `(N, C)`, the probability of each class without the row's own label, from scores and other rows.
        rate: the estimated share of wrong labels. It is too high rather than too low: the scores' own errors count.
        evidence: how many labels of the same texts weigh as much as the score.
    """

    wrong: Floats
    labels: Floats
    expected: Floats
    rate: float
    evidence: float


def label_noise(
    probabilities: Floats, targets: Floats, weights: Floats, task: Task, same: ArrayLike, turned: ArrayLike
) -> LabelNoise:
    """Estimate which labels are wrong.

    Args:
        probabilities: `(N, C)`, of models that were trained neither on the row nor on others with its texts.
        targets: `(N, C)`, hard or soft labels; rows sum to one.
        weights: `(N,)`, above 0.
        task: its classes, and their swap.
        same: `(N,)`, equal for rows of the same texts.
        turned: `(N,)`, which rows have their sides exchanged beside others of the same texts.
    """
    prior = class_prior(targets, weights)
    rate = _rate(probabilities, targets, weights, task)
    confusion = rate * _errors((prior + prior[list(task.swapped_columns)]) / 2, task)
    np.fill_diagonal(confusion, 1 - rate)
    # The scores foretell recorded labels. Behind the noise, the right ones are as much surer as makes these likeliest.
    temperature = fit_temperature(
        lambda value: apply_temperature(probabilities, value, task) @ confusion.T, targets, task, weights
    )
    own = apply_temperature(probabilities, temperature, task)
    others = labels_of_others(targets, weights, task, np.asarray(same), np.asarray(turned))
    evidence = _evidence(own, others, confusion, targets, weights)
    expected = _joined(own, others, evidence)
    joint = targets[:, :, None] * confusion[None] * expected[:, None, :]  # (N, recorded, right)
    by_label = joint.sum(axis=2, keepdims=True)
    share = np.divide(joint, by_label, out=np.zeros_like(joint), where=by_label > 0) * targets[:, :, None]
    labels = share.sum(axis=1)
    kept = np.trace(share, axis1=1, axis2=2)
    return LabelNoise(1 - kept, labels / labels.sum(axis=1, keepdims=True), expected, rate, evidence)


def labels_of_others(
    targets: Floats, weights: Floats, task: Task, same: NDArray[np.int64], turned: NDArray[np.bool_]
) -> Floats:
    """`(N, C)`: the sum of the labels of the other rows with a row's texts, in its own columns; weighted, of mean 1."""
    swapped = list(task.swapped_columns)
    votes = np.where(turned[:, None], targets[:, swapped], targets) * (weights / weights.mean())[:, None]
    _, place = np.unique(same, return_inverse=True)
    sums = np.zeros((place.max() + 1, targets.shape[1]))
    np.add.at(sums, place, votes)
    others = np.maximum(sums[place] - votes, 0)
    own: Floats = np.where(turned[:, None], others[:, swapped], others)
    return own


def _joined(own: Floats, others: Floats, evidence: float) -> Floats:
    """The mean of a Dirichlet distribution that begins with the score, as so many labels, and has seen the others."""
    counts = evidence * own + others
    joined: Floats = counts / counts.sum(axis=1, keepdims=True)
    return joined


def _evidence(own: Floats, others: Floats, confusion: Floats, targets: Floats, weights: Floats) -> float:
    """The number of labels that the score is worth, by which labels of the same texts foretell each other best."""
    from scipy.optimize import minimize_scalar  # slow to import, and most commands fit nothing

    rows = others.sum(axis=1) > 0
    if not rows.any():
        return EVIDENCE[1]

    def loss(logarithm: float) -> float:
        expected = _joined(own[rows], others[rows], float(np.exp(logarithm))) @ confusion.T
        return -float(weights[rows] @ (targets[rows] * np.log(np.maximum(expected, 1e-12))).sum(axis=1))

    return float(np.exp(minimize_scalar(loss, bounds=tuple(np.log(EVIDENCE)), method="bounded").x))


def _rate(own: Floats, targets: Floats, weights: Floats, task: Task) -> float:
    """The share of labels that contradict the most confident scores; half a label more on either side, for few rows.

    Of a pair these are the scores that favour a side most, and labels for a side: ties contradict nobody.
    """
    if task.swap_classes is None:
        confidence, sides = own.max(axis=1), list(range(own.shape[1]))
    else:
        sides = [task.classes.index(name) for name in task.swap_classes]
        logs = np.log(np.maximum(own[:, sides], np.finfo(np.float64).tiny))
        confidence = np.abs(logs[:, 0] - logs[:, 1])
    labels = targets[:, sides] * (weights / weights.mean())[:, None]
    anchors = np.argsort(-confidence, kind="stable")[: max(FEWEST, round(ANCHORS * len(own)))]
    agreed = labels[anchors, likeliest(own[:, sides])[anchors]].sum()
    return min(MOST, float((labels[anchors].sum() - agreed + 0.5) / (labels[anchors].sum() + 1)))


def _errors(prior: Floats, task: Task) -> Floats:
    """`(recorded, right)`: the probability of each wrong label, given the right one; the diagonal is 0.

    An error is a random label, or, as often, an exchange of the sides, where the right label is a side's.
    """
    weights = np.tile(np.maximum(prior, 1e-6)[:, None], (1, len(prior)))
    np.fill_diagonal(weights, 0)
    errors: Floats = weights / np.maximum(weights.sum(axis=0), 1e-12)
    for right, recorded in enumerate(task.swapped_columns):
        if recorded != right:
            errors[:, right] /= 2
            errors[recorded, right] += 0.5
    return errors
