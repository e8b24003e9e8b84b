"""The losses: those of torch where torch has them, zero where they should be, and unmoved by a swap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn import functional

from pairclf.approaches.finetune.losses import cross_entropy, disagreement, distillation, smoothed
from pairclf.config import Distill
from pairclf.task import LMSYS, Task

SEVERAL = Task(name="t", fields=("text",), classes=("x", "y", "z"), multi_label=True)
LOGITS = arrays(np.float64, (4, 3), elements=st.floats(-30, 30))


def softly(seed: int) -> torch.Tensor:
    return torch.softmax(torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_the_loss_is_that_of_torch_for_hard_soft_and_several_labels() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    hard, soft = functional.one_hot(labels, 3).float(), softly(1)
    for targets, expected in ((hard, labels), (soft, soft)):
        torchs = functional.cross_entropy(logits, expected, reduction="none")
        assert torch.allclose(cross_entropy(logits, targets, LMSYS), torchs)
    by_hand = -(hard * logits.sigmoid().log() + (1 - hard) * (-logits).sigmoid().log()).sum(dim=1)
    assert torch.allclose(cross_entropy(logits, hard, SEVERAL), by_hand, atol=1e-6)


def test_smoothing_is_that_of_torch() -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    targets = smoothed(functional.one_hot(labels, 3).float(), 0.2, LMSYS)
    expected = functional.cross_entropy(logits, labels, label_smoothing=0.2, reduction="none")
    assert torch.allclose(cross_entropy(logits, targets, LMSYS), expected, atol=1e-6)
    assert smoothed(torch.tensor([[1.0, 0.0, 0.0]]), 0.2, SEVERAL).tolist() == [pytest.approx([0.9, 0.1, 0.1])]


@pytest.mark.parametrize("heat", [0.5, 1.0, 4.0])
def test_distillation_is_hintons_and_nothing_where_both_agree(heat: float) -> None:
    logits, teachers = torch.randn(6, 3), softly(2)
    expected = heat**2 * functional.kl_div(
        (logits / heat).log_softmax(-1), (teachers.log() / heat).softmax(-1), reduction="none"
    ).sum(-1)
    assert torch.allclose(distillation(logits, teachers, Distill(temperature=heat)), expected, atol=1e-5)
    settings = Distill(temperature=heat, cosine_weight=1.0)
    assert distillation(teachers.log() + 3, teachers, settings).abs().max() < 1e-5
    assert distillation(logits, teachers, settings).min() > 0


def test_a_row_without_a_teacher_costs_nothing_and_gives_no_gradient() -> None:
    logits, teachers = torch.randn(6, 3, requires_grad=True), softly(3)
    teachers[2] = torch.nan
    losses = distillation(logits, teachers, Distill(cosine_weight=1.0))
    losses.sum().backward()
    assert losses[2] == 0
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[2].abs().max() == 0 < logits.grad[0].abs().max()


def test_a_teacher_that_is_certain_gives_finite_losses_and_gradients() -> None:
    logits = torch.randn(3, 3, requires_grad=True)
    losses = distillation(logits, torch.eye(3), Distill(temperature=2.0, cosine_weight=1.0))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@given(LOGITS, LOGITS)
def test_disagreement_is_symmetric_never_negative_and_zero_for_a_mirrored_pair(
    left: np.ndarray, right: np.ndarray
) -> None:
    ab, ba = torch.from_numpy(left), torch.from_numpy(right)
    apart = disagreement(ab, ba, LMSYS)
    assert apart.min() >= -1e-9
    assert torch.allclose(apart, disagreement(ba, ab, LMSYS), atol=1e-6)
    mirrored = ab[:, list(LMSYS.swapped_columns)]
    assert disagreement(ab, mirrored, LMSYS).abs().max() < 1e-9


def test_disagreement_is_half_of_both_divergences() -> None:
    ab, ba = torch.randn(5, 3), torch.randn(5, 3)
    one, other = ab.log_softmax(-1), ba[:, [1, 0, 2]].log_softmax(-1)
    both = [functional.kl_div(q, p, reduction="none", log_target=True).sum(-1) for p, q in ((one, other), (other, one))]
    assert torch.allclose(disagreement(ab, ba, LMSYS), (both[0] + both[1]) / 2, atol=1e-6)
    not_unswapped = functional.kl_div(ba.log_softmax(-1), one, reduction="none", log_target=True).sum(-1)
    assert not torch.allclose(disagreement(ab, ba, LMSYS), not_unswapped, atol=1e-2)
