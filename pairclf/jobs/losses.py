"""The loss of a row: cross-entropy with labels of any softness, distance from teachers, and from the other order.

Written out, because libraries turn float labels into another loss without saying so.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pairclf.config import Distill
from pairclf.task import Task


def smoothed(targets: Tensor, amount: float, task: Task) -> Tensor:
    """`(..., C)` targets of which a part is spread over all classes (over yes and no, where several may hold)."""
    even = 0.5 if task.multi_label else 1 / len(task.classes)
    return (1 - amount) * targets + amount * even


def cross_entropy(logits: Tensor, targets: Tensor, task: Task) -> Tensor:
    """`(R, C)` logits and soft targets -> `(R,)` losses in nats (summed over labels, if several may hold)."""
    if task.multi_label:
        return functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=-1)
    return -(targets * logits.log_softmax(dim=-1)).sum(dim=-1)


def distillation(logits: Tensor, teachers: Tensor, settings: Distill) -> Tensor:
    """`kl * T^2 * KL(teacher || student) + cosine * (1 - cos(teacher, student))` of each row, `(R,)`.

    Args:
        logits: `(R, C)`, the student's.
        teachers: `(R, C)` probabilities; a row of NaN has no teacher and costs nothing.
        settings: weights and the temperature `T`, at which both sides are compared in the divergence.
    """
    known = teachers.isfinite().all(dim=-1)
    taught = torch.where(known[:, None], teachers, 1 / teachers.shape[-1])
    heat = settings.temperature
    # A probability of zero has the logit -inf: clipped, so that no product of zero and infinity arises.
    teacher = (taught.clamp_min(1e-9).log() / heat).log_softmax(dim=-1)
    student = (logits / heat).log_softmax(dim=-1)
    divergence = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
    angle = 1 - functional.cosine_similarity(logits.softmax(dim=-1), taught, dim=-1)
    return known * (settings.kl * heat**2 * divergence + settings.cosine * angle)


def disagreement(ab: Tensor, ba: Tensor, task: Task) -> Tensor:
    """Symmetric KL between the predictions of two orders, `(R, C)` logits each, `ba` un-swapped first; `(R,)`.

    Half the sum of both directions, so that it is 0 where a swap changes nothing.
    """
    one = ab.log_softmax(dim=-1)
    other = ba[:, list(task.swapped_columns)].log_softmax(dim=-1)
    return 0.5 * ((one.exp() - other.exp()) * (one - other)).sum(dim=-1)
