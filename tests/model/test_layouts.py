"""Every layout gives the logits of one row at a time, on every backbone; a wrong mask or a wrong place does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models_support import (
    as_built,
    forget_what_went_before,
    logits_of,
    one_at_a_time,
    related_items,
    see_the_siblings,
    topology_of,
)
from transformers import AutoConfig

from pairclf.config import Config
from pairclf.errors import ModelError
from pairclf.model import attention, layouts
from pairclf.model.backbone import checkpoint_gradients
from pairclf.model.batch import Batch, Item, end_to_end
from pairclf.model.engine import LAYOUTS, Classifier, Layout, layout_of
from pairclf.model.layouts import packed, padded, shared

BACKBONES = ["gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3"]


def items() -> list[Item]:
    """Lengths from one token to beyond the sliding window (32 here); pad's and eos's ids among the text."""
    random = np.random.default_rng(0)
    lengths = [1, 2, 9, 31, 32, 33, 70, 5]
    return [Item(row, row % 2, random.integers(0, 260, length, dtype=np.int32)) for row, length in enumerate(lengths)]


def with_attention(config_for: Callable[..., Config], kind: str, name: str, **model: object) -> Classifier:
    return as_built(config_for(kind, model={**model, "attention": name}, train={"layout": "padded"}))


@pytest.fixture(params=BACKBONES)
def classifier(request: pytest.FixtureRequest, config_for: Callable[..., Config]) -> Classifier:
    return as_built(config_for(request.param))


@pytest.mark.parametrize("made", [items, related_items])
@pytest.mark.parametrize("key", list(LAYOUTS), ids=" + ".join)
def test_every_layout_scores_as_one_row_at_a_time(
    classifier: Classifier, key: tuple[str, str, str], made: Callable[[], list[Item]]
) -> None:
    batch = LAYOUTS[key](made())
    assert (logits_of(classifier, batch) - one_at_a_time(classifier, made())).abs().max() <= 1e-5
    told = zip(batch.row_at.tolist(), batch.order.tolist(), batch.lengths.tolist(), strict=True)
    assert list(told) == [(item.row, item.order, len(item.ids)) for item in made()]
    assert batch.tokens == sum(len(item.ids) for item in made())


def _attend_to_padding(batch: Batch) -> Batch:
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    assert isinstance(ids, torch.Tensor)
    assert isinstance(mask, torch.Tensor)
    inputs = {**batch.inputs, "input_ids": ids.flip(1), "attention_mask": torch.ones_like(mask)}
    return replace(batch, inputs=inputs, read_at=_last_columns(ids))


def _last_columns(ids: torch.Tensor) -> torch.Tensor:
    rows, width = ids.shape
    return (torch.arange(rows) + 1) * width - 1


def _read_one_too_early(batch: Batch) -> Batch:
    return replace(batch, read_at=(batch.read_at - 1).clamp(min=0))


def _with_positions(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Batch], Batch]:
    def spoil(batch: Batch) -> Batch:
        positions = batch.inputs["position_ids"]
        assert isinstance(positions, torch.Tensor)
        return replace(batch, inputs={**batch.inputs, "position_ids": change(positions)})

    return spoil


_positions_from_the_end = _with_positions(lambda positions: positions.flip(1))
_positions_run_on = _with_positions(lambda positions: torch.arange(positions.shape[1])[None])


def _join_the_first_two(batch: Batch) -> Batch:
    starts = batch.inputs["cu_seq_lens_q"]
    assert isinstance(starts, torch.Tensor)
    joined = torch.cat([starts[:1], starts[2:]])
    topology = end_to_end(joined.diff().tolist())
    inputs = {**batch.inputs, "cu_seq_lens_q": joined, "cu_seq_lens_k": joined, "topology": topology}
    return replace(batch, inputs=inputs)


def _positions_restart(batch: Batch) -> Batch:
    """In every piece, as if nothing went before it."""
    positions = torch.cat([torch.arange(one.stop - one.start) for one in topology_of(batch).pieces])[None]
    return replace(batch, inputs={**batch.inputs, "position_ids": positions})


def _say_nothing_of_sequences(batch: Batch) -> Batch:
    return replace(batch, inputs={name: batch.inputs[name] for name in ("input_ids", "position_ids")})


@pytest.mark.parametrize(
    ("layout", "spoil"),
    [
        (padded, _attend_to_padding),
        (padded, _read_one_too_early),
        (padded, _positions_from_the_end),
        (packed, _join_the_first_two),
        (packed, _say_nothing_of_sequences),
        (packed, _read_one_too_early),
        (packed, _positions_from_the_end),
        (shared, _positions_restart),
        (shared, _positions_from_the_end),
        (shared, forget_what_went_before),
        (shared, see_the_siblings),
        (shared, _say_nothing_of_sequences),
        (shared, _read_one_too_early),
    ],
)
def test_a_wrong_mask_place_or_position_shows(
    classifier: Classifier, layout: Layout, spoil: Callable[[Batch], Batch]
) -> None:
    batch = layout(related_items() if layout is shared else items())
    right, wrong = logits_of(classifier, batch), logits_of(classifier, spoil(batch))
    assert (right - wrong).abs().max() > 1e-3


def test_stock_attention_finds_sequences_by_their_positions_and_ours_by_what_it_is_told(
    config_for: Callable[..., Config],
) -> None:
    """Rotary positions are relative: running on alone moves no logit of ours. It blinds the stock implementation."""
    ours, stock = (with_attention(config_for, "llama", name) for name in ("auto", "sdpa"))
    stock.isolation = ours.isolation  # it is refused packed batches otherwise
    batch, expected = packed(items()), logits_of(ours, packed(items()))
    assert (logits_of(ours, _positions_run_on(batch)) - expected).abs().max() <= 1e-4
    assert (logits_of(stock, batch) - expected).abs().max() <= 1e-5
    assert (logits_of(stock, _positions_run_on(batch)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("layout", [packed, shared])
@pytest.mark.parametrize("window", [31, 33, None])
@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "mistral", "qwen3"])
def test_a_window_that_is_wrong_or_ignored_shows(
    config_for: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, kind: str, window: int | None, layout: Layout
) -> None:
    classifier = as_built(config_for(kind))
    right = logits_of(classifier, layout(related_items()))
    sequence = attention._sequence

    def wrong(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: attention.Scores) -> torch.Tensor:
        return sequence(query, key, value, scores._replace(window=window) if scores.window == 32 else scores)

    monkeypatch.setattr(attention, "_sequence", wrong)
    assert (logits_of(classifier, layout(related_items())) - right).abs().max() > 1e-3


SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=8)


@given(SEQUENCES, st.integers(1, 4))
def test_a_shared_row_holds_every_sequence_at_its_positions(texts: list[list[int]], worth: int) -> None:
    made = [Item(row, 0, np.array(text, dtype=np.int32)) for row, text in enumerate(texts)]
    with mock.patch.object(layouts, "WORTH", worth):
        batch = shared(made)
    ids, positions = (batch.inputs[name][0].tolist() for name in ("input_ids", "position_ids"))  # type: ignore[index]
    topology = topology_of(batch)
    for text, path, read_at in zip(texts, topology.paths, batch.read_at.tolist(), strict=True):
        places = [place for span in path for place in range(*span)]
        assert [ids[place] for place in places] == text
        assert [positions[place] for place in places] == list(range(len(text)))
        assert places[-1] == read_at
    assert len(set(batch.read_at.tolist())) == len(texts)
    assert {piece.sees for piece in topology.pieces} == set(topology.paths)
    ends = [(piece.start, piece.stop) for piece in topology.pieces]
    assert ends[0][0] == 0
    assert ends[-1][1] == len(ids)
    assert all(stop == start for (_, stop), (start, _) in pairwise(ends))
    assert all(piece.sees[-1][0] <= piece.start < piece.stop == piece.sees[-1][1] for piece in topology.pieces)
    if worth == 1:  # every beginning once, but for last tokens, which each has for itself
        beginnings = {tuple(text[:length]) for text in texts for length in range(1, len(text) + 1)}
        assert len(beginnings) <= len(ids) <= len(beginnings) + len(texts)


def test_what_is_shared_is_computed_once_and_less_than_that_is_not_shared() -> None:
    random = np.random.default_rng(0)
    instruction, prompt = random.integers(0, 99, 150), random.integers(0, 99, 40)
    rows = [np.concatenate([instruction, row + prompt]) for row in range(3)]
    made = [Item(row, order, np.append(begin, [order] * 9)) for row, begin in enumerate(rows) for order in (0, 1)]
    assert shared(made).inputs["input_ids"].numel() == 150 + 3 * (40 + 2 * 9)  # type: ignore[union-attr]
    short = [Item(0, order, np.append(instruction[: layouts.WORTH - 1], [order])) for order in (0, 1)]
    assert topology_of(shared(short)).pieces == topology_of(packed(short)).pieces


def test_stock_attention_is_given_no_shared_batch(config_for: Callable[..., Config]) -> None:
    stock = with_attention(config_for, "llama", "sdpa")
    with pytest.raises(ModelError, match=r"shared: model\.attention=sdpa would let"):
        logits_of(stock, shared(related_items()))


def gradients(classifier: Classifier, batches: Sequence[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss (mean over all rows) and gradients of what trains, accumulated over the batches."""
    classifier.train()
    targets = torch.eye(3)[torch.arange(8) % 3]
    loss = torch.zeros(())
    for batch in batches:
        logits = classifier(batch.inputs, batch.read_at, batch.lengths)
        part = torch.nn.functional.cross_entropy(logits, targets[batch.row_at], reduction="sum") / 8
        part.backward()
        loss += part.detach()
    found = {name: one.grad for name, one in classifier.named_parameters() if one.requires_grad}
    return float(loss), {name: grad for name, grad in found.items() if grad is not None}


def assert_same_training(one: Classifier, other: Classifier, batches: Sequence[Batch], others: Sequence[Batch]) -> None:
    (loss, grads), (other_loss, other_grads) = gradients(one, batches), gradients(other, others)
    assert abs(loss - other_loss) <= 1e-5
    assert grads.keys() == other_grads.keys()
    assert max(float((grads[name] - other_grads[name]).abs().max()) for name in grads) <= 1e-5
    assert min(float(grad.abs().max()) for grad in grads.values()) > 0


@pytest.mark.parametrize("lora", [None, {"rank": 4, "dropout": 0.0}], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_packed_trains_as_stock_attention_does_row_by_row(
    config_for: Callable[..., Config], kind: str, lora: dict[str, object] | None
) -> None:
    ours, stock = (with_attention(config_for, kind, name, lora=lora) for name in ("auto", "eager"))
    assert_same_training(ours, stock, [packed(items())], [padded([item]) for item in items()])


def test_a_joined_sequence_shows_in_the_gradients(config_for: Callable[..., Config]) -> None:
    config = config_for("gemma2")
    batch = packed(items())
    with pytest.raises(AssertionError):
        assert_same_training(as_built(config), as_built(config), [batch], [_join_the_first_two(batch)])


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_recomputed_activations_give_the_same_gradients(config_for: Callable[..., Config], quantization: str) -> None:
    config = config_for("gemma2", model={"quantization": quantization})
    plain, recomputing = as_built(config), as_built(config)
    checkpoint_gradients(recomputing.backbone)
    assert_same_training(plain, recomputing, [packed(items())], [packed(items())])


@pytest.mark.parametrize("stock", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_padded_attention_is_the_stock_one(config_for: Callable[..., Config], kind: str, stock: str) -> None:
    if (kind, stock) == ("gemma2", "sdpa"):
        pytest.skip("transformers refuses it: SDPA knows no soft-capping")
    ours, theirs = (with_attention(config_for, kind, name) for name in ("auto", stock))
    assert ours.backbone.config._attn_implementation == attention.NAME  # type: ignore[union-attr]
    assert_same_training(ours, theirs, [padded(items())], [padded(items())])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("layout", [packed, shared])
@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", ["gemma2", "llama"])
def test_packed_and_shared_in_half_precision(
    config_for: Callable[..., Config], kind: str, lora: dict[str, object] | None, layout: Layout, dtype: str
) -> None:
    classifier = as_built(config_for(kind, model={"dtype": dtype, "lora": lora}))
    alone = one_at_a_time(classifier, related_items())
    for trim in (False, True):
        assert (logits_of(classifier, layout(related_items()), trim=trim) - alone).abs().max() <= 2e-2


def test_what_packing_would_mix_is_refused(config_for: Callable[..., Config]) -> None:
    classifier = as_built(config_for("llama"))
    for spoilt in ({"layer_types": ["conv", "full_attention"]}, {"layer_types": ["linear_attention"]}):
        config = AutoConfig.for_model("lfm2", num_hidden_layers=len(spoilt["layer_types"]), **spoilt)
        why = attention.why_not_packed(SimpleNamespace(config=config))  # type: ignore[arg-type]
        assert why is not None
        assert spoilt["layer_types"][0] in why
    classifier.isolation = classifier.isolation._replace(packed=why)
    with pytest.raises(ModelError, match="layout packed: has layers of the kind linear_attention"):
        logits_of(classifier, packed(items()))
    assert logits_of(classifier, padded(items())).shape == (8, 3)


def test_an_illegal_combination_is_refused_with_the_legal_ones() -> None:
    with pytest.raises(ModelError, match="decoder \\+ head \\+ padded"):
        layout_of("encoder", "head", "padded")
