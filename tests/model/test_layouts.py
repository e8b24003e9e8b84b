"""Every layout gives the logits of one row at a time, on every backbone; a wrong mask or a wrong place does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from pairclf.config import Config
from pairclf.errors import ModelError
from pairclf.jobs.scoring import score
from pairclf.model.batch import Batch, Item
from pairclf.model.engine import LAYOUTS, Classifier, build, layout_of
from pairclf.model.layouts import padded

CPU = torch.device("cpu")
BACKBONES = ["gemma2", "llama", "qwen2"]


def items() -> list[Item]:
    """Lengths from one token to beyond Gemma-2's sliding window (32 here); pad's and eos's ids among the text."""
    random = np.random.default_rng(0)
    lengths = [1, 2, 9, 31, 32, 33, 70, 5]
    return [Item(row, row % 2, random.integers(0, 260, length, dtype=np.int32)) for row, length in enumerate(lengths)]


@pytest.fixture(params=BACKBONES)
def classifier(request: pytest.FixtureRequest, config_for: Callable[..., Config]) -> Classifier:
    made = build(config_for(request.param), CPU).eval()
    torch.nn.init.normal_(made.head.weight, std=0.2)  # logits of order one, so that a difference shows
    return made


def logits_of(classifier: Classifier, batch: Batch) -> torch.Tensor:
    with torch.inference_mode():
        return classifier(batch.inputs, batch.read_at, batch.lengths)


@pytest.mark.parametrize("key", list(LAYOUTS), ids=" + ".join)
def test_every_layout_scores_as_one_row_at_a_time(classifier: Classifier, key: tuple[str, str, str]) -> None:
    alone = torch.cat([logits_of(classifier, padded([item])) for item in items()])
    batch = LAYOUTS[key](items())
    together = torch.empty_like(alone)
    together[batch.row_at] = logits_of(classifier, batch)
    assert (together - alone).abs().max() <= 1e-5
    assert batch.order.tolist() == [items()[row].order for row in batch.row_at.tolist()]
    assert batch.tokens == sum(len(item.ids) for item in items())


def _attend_to_padding(batch: Batch) -> Batch:
    mask = torch.ones_like(batch.inputs["attention_mask"])
    left = {name: tensor.flip(1) for name, tensor in batch.inputs.items() if name != "position_ids"}
    return replace(batch, inputs={**batch.inputs, **left, "attention_mask": mask}, read_at=_last_columns(batch))


def _last_columns(batch: Batch) -> torch.Tensor:
    rows, width = batch.inputs["input_ids"].shape
    return (torch.arange(rows) + 1) * width - 1


def _read_at_last_column(batch: Batch) -> Batch:
    return replace(batch, read_at=_last_columns(batch))


def _positions_from_the_end(batch: Batch) -> Batch:
    return replace(batch, inputs={**batch.inputs, "position_ids": batch.inputs["position_ids"].flip(1)})


@pytest.mark.parametrize("spoil", [_attend_to_padding, _read_at_last_column, _positions_from_the_end])
def test_a_wrong_mask_place_or_position_shows(classifier: Classifier, spoil: Callable[[Batch], Batch]) -> None:
    batch = padded(items())
    right, wrong = logits_of(classifier, batch), logits_of(classifier, spoil(batch))
    assert (right - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 10_000])
def test_scores_do_not_depend_on_the_batch_size(classifier: Classifier, tokens_per_batch: int) -> None:
    alone = torch.cat([logits_of(classifier, padded([item])) for item in items()]).numpy()
    assert np.abs(score(classifier, items(), tokens_per_batch=tokens_per_batch) - alone).max() <= 1e-5


def test_scores_come_back_in_the_order_of_the_items(classifier: Classifier) -> None:
    forwards = score(classifier, items(), tokens_per_batch=100)
    backwards = score(classifier, items()[::-1], tokens_per_batch=100)
    assert np.abs(forwards - backwards[::-1]).max() <= 1e-5


def test_a_logit_that_is_not_finite_is_an_error_that_names_the_row(classifier: Classifier) -> None:
    with torch.no_grad():
        classifier.head.bias.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        score(classifier, items(), tokens_per_batch=100)


def test_an_illegal_combination_is_refused_with_the_legal_ones() -> None:
    with pytest.raises(ModelError, match="decoder \\+ head \\+ padded"):
        layout_of("encoder", "head", "padded")


def test_nothing_is_scored_without_items(classifier: Classifier) -> None:
    nothing: Sequence[Item] = []
    assert score(classifier, nothing, tokens_per_batch=100).shape == (0, 3)
