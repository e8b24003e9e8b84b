"""The loss of a row: cross-entropy with soft labels, distillation from teachers, consistency of both orders.

Written out, because libraries silently choose another loss for float labels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from pairclf.config import Distill
from pairclf.task import Task


def smoothed(targets: Tensor, amount: float, task: Task) -> Tensor:
    """`(..., C)` targets with label smoothing, over all classes (multi-label: over yes and no)."""
    even = 0.5 if task.multi_label else 1 / len(task.classes)
    return (1 - amount) * targets + amount * even


def cross_entropy(logits: Tensor, targets: Tensor, task: Task) -> Tensor:
    """`(R, C)` logits and soft targets -> `(R,)` losses in nats (multi-label: summed over labels)."""
    if task.multi_label:
        return functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=-1)
    return -(targets * logits.log_softmax(dim=-1)).sum(dim=-1)


def over_vocabulary(logits: Tensor, targets: Tensor, task: Task) -> Tensor:
    """`(R, C)` log-probabilities of the labels over the vocabulary and soft targets -> `(R,)` losses in nats.

    Multi-label: `(R, C, 2)`, those of yes and no behind each label; the losses are summed over labels.
    """
    if task.multi_label:
        return -(torch.stack([targets, 1 - targets], dim=-1) * logits).sum(dim=(1, 2))
    return -(targets * logits).sum(dim=-1)


LOSSES: dict[str, Callable[[Tensor, Tensor, Task], Tensor]] = {"labels": cross_entropy, "vocabulary": over_vocabulary}
"""`train.loss`."""


def distillation(logits: Tensor, teachers: Tensor, settings: Distill) -> Tensor:
    """`kl * T^2 * KL(teacher || student) + cosine * (1 - cos(teacher, student))` of each row, `(R,)`.

    Args:
        logits: `(R, C)`, the student's.
        teachers: `(R, C)` probabilities; a row of NaN has no teacher, and loss 0.
        settings: weights, and the temperature `T` of the divergence.
    """
    has_teacher = teachers.isfinite().all(dim=-1)
    taught = torch.where(has_teacher[:, None], teachers, 1 / teachers.shape[-1])
    temperature = settings.temperature
    # Clipped: the logit of probability zero is -inf, and 0 * inf would be NaN.
    teacher = (taught.clamp_min(1e-9).log() / temperature).log_softmax(dim=-1)
    student = (logits / temperature).log_softmax(dim=-1)
    divergence = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
    angle = 1 - functional.cosine_similarity(logits.softmax(dim=-1), taught, dim=-1)
    return has_teacher * (settings.kl_weight * temperature**2 * divergence + settings.cosine_weight * angle)


def disagreement(ab: Tensor, ba: Tensor, task: Task) -> Tensor:
    """Symmetric KL between the predictions of two orders, `(R, C)` logits each, `ba` un-swapped first; `(R,)`.

    Half the sum of both directions, so that it is 0 where a swap changes nothing.
    """
    first = ab.log_softmax(dim=-1)
    second = ba[:, list(task.swapped_columns)].log_softmax(dim=-1)
    return 0.5 * ((first.exp() - second.exp()) * (first - second)).sum(dim=-1)
