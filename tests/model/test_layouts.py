"""Every layout gives the logits of one row at a time, on every backbone; a wrong mask or a wrong place does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, pairwise, product
from typing import get_args
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

from pairclf.approaches.finetune.resource_forecast import _sample_steps, measure_kept_bytes
from pairclf.config import Config, Predict, Train
from pairclf.errors import ModelError
from pairclf.inference.messages import RowOrders
from pairclf.inference.pending import PendingSequences
from pairclf.inputs.plan import LAYOUTS, micro_batches
from pairclf.inputs.plan import Layout as PlannedLayout
from pairclf.inputs.sequences import Ints, Item, LargestPass, SequenceIndex
from pairclf.model import attention, layouts
from pairclf.model.backbone import checkpoint_gradients
from pairclf.model.batch import Batch, end_to_end
from pairclf.model.engine import Classifier, build
from pairclf.model.layouts import BATCH_LAYOUTS, BatchLayout, MakeBatch, packed, padded, shared
from pairclf.model.prediction_memory import footprint
from pairclf.model.scoring import ClassifierScorer, score

BACKBONES = ["gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3"]
PACKED_ENCODERS = ["bert", "roberta", "modernbert", "eurobert"]
ENCODERS = [*PACKED_ENCODERS, "deberta-v2"]
WINDOWS = {"modernbert": 17}  # 16 tokens to either side; of the decoders 32


def items() -> list[Item]:
    """Lengths from one token to beyond the sliding window (32 here); pad's and eos's ids among the text."""
    random = np.random.default_rng(0)
    lengths = [1, 2, 9, 31, 32, 33, 70, 5]
    return [Item(row, row % 2, random.integers(0, 260, length, dtype=np.int32)) for row, length in enumerate(lengths)]


def with_attention(config_for: Callable[..., Config], kind: str, name: str, **model: object) -> Classifier:
    return as_built(config_for(kind, model={**model, "attn_implementation": name}, train={"layout": "padded"}))


@pytest.mark.parametrize("rows", [items, related_items], ids=["unrelated", "related"])
@pytest.mark.parametrize("kind", [*BACKBONES, *ENCODERS])
def test_layouts_score_each_row_as_alone(
    classifier_of: Callable[[str], Classifier], kind: str, rows: Callable[[], list[Item]]
) -> None:
    classifier, alone = classifier_of(kind), one_at_a_time(classifier_of(kind), rows())
    legal = [name for name in BATCH_LAYOUTS if classifier.why_not(name) is None]
    illegal = {"shared"} if kind in PACKED_ENCODERS else {"shared", "packed"} if kind in ENCODERS else set()
    assert {*legal} == BATCH_LAYOUTS.keys() - illegal
    for layout in map(BATCH_LAYOUTS.__getitem__, legal):
        batch = layout.lay_out(rows())
        assert (logits_of(classifier, batch) - alone).abs().max() <= 1e-5
        sequences = zip(batch.row_at.tolist(), batch.order.tolist(), batch.lengths.tolist(), strict=True)
        assert list(sequences) == [(item.row, item.order, len(item.ids)) for item in rows()]
        assert int(batch.lengths.sum()) == sum(len(item.ids) for item in rows())


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
    positions = torch.cat([torch.arange(one.stop - one.start) for one in topology_of(batch).segments])[None]
    return replace(batch, inputs={**batch.inputs, "position_ids": positions})


def _say_nothing_of_sequences(batch: Batch) -> Batch:
    return replace(batch, inputs={name: batch.inputs[name] for name in ("input_ids", "position_ids")})


@pytest.mark.parametrize(
    ("layout", "spoil"),
    [
        pytest.param(padded, _attend_to_padding, id="padded-mask"),
        pytest.param(padded, _read_one_too_early, id="padded-read_at"),
        pytest.param(padded, _positions_from_the_end, id="padded-positions"),
        pytest.param(packed, _join_the_first_two, id="packed-joined"),
        pytest.param(packed, _say_nothing_of_sequences, id="packed-no_topology"),
        pytest.param(packed, _read_one_too_early, id="packed-read_at"),
        pytest.param(packed, _positions_from_the_end, id="packed-positions"),
        pytest.param(shared, _positions_restart, id="shared-restarting_positions"),
        pytest.param(shared, _positions_from_the_end, id="shared-positions"),
        pytest.param(shared, forget_what_went_before, id="shared-no_prefix"),
        pytest.param(shared, see_the_siblings, id="shared-siblings"),
        pytest.param(shared, _say_nothing_of_sequences, id="shared-no_topology"),
        pytest.param(shared, _read_one_too_early, id="shared-read_at"),
    ],
)
def test_layouts_with_a_wrong_mask_place_or_position_change_logits(
    classifier_of: Callable[[str], Classifier], layout: MakeBatch, spoil: Callable[[Batch], Batch]
) -> None:
    batch = layout(related_items() if layout is shared else items())
    for classifier in map(classifier_of, ("gemma2", "llama")):
        right, wrong = logits_of(classifier, batch), logits_of(classifier, spoil(batch))
        assert (right - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_with_a_wrong_mask_place_or_position_change_logits(
    classifier_of: Callable[[str], Classifier], kind: str
) -> None:
    """The place read is the first one: it hangs on the lengths too."""
    classifier, by_layout = classifier_of(kind), {padded: [_attend_to_padding, _read_one_too_early]}
    if kind in PACKED_ENCODERS:
        by_layout[packed] = [_join_the_first_two, _say_nothing_of_sequences, _read_one_too_early]
    if kind in ("bert", "roberta"):  # the others' positions are relative
        by_layout[padded].append(_positions_from_the_end)
        by_layout[packed] += [_positions_from_the_end, _positions_run_on]
    for layout, variants in by_layout.items():
        batch = layout(items())
        for spoil in variants:
            assert (logits_of(classifier, batch) - logits_of(classifier, spoil(batch))).abs().max() > 1e-3, spoil


def test_attention_finds_packed_sequences_by_topology_and_the_stock_one_by_positions(
    config_for: Callable[..., Config],
) -> None:
    """Rotary positions are relative: running on alone moves no logit of ours. It blinds the stock implementation."""
    ours, stock = (with_attention(config_for, "llama", name) for name in ("auto", "sdpa"))
    stock.isolation = ours.isolation  # it is refused packed batches otherwise
    batch, expected = packed(items()), logits_of(ours, packed(items()))
    assert (logits_of(ours, _positions_run_on(batch)) - expected).abs().max() <= 1e-4
    assert (logits_of(stock, batch) - expected).abs().max() <= 1e-5
    assert (logits_of(stock, _positions_run_on(batch)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "window", "layout"),
    [
        *product(["gemma2"], [31, 33, None], [packed, shared]),
        ("gemma3_text", None, shared),
        ("mistral", 31, packed),
        ("qwen3", 33, shared),
        *product(["modernbert"], [16, 18, None], [packed]),
    ],
)
def test_attention_with_a_wrong_window_changes_logits(
    classifier_of: Callable[[str], Classifier],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    window: int | None,
    layout: MakeBatch,
) -> None:
    classifier, right_window = classifier_of(kind), WINDOWS.get(kind, 32)
    right = logits_of(classifier, layout(related_items()))
    sequence = attention._sequence

    def wrong(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: attention.ScoreOptions
    ) -> torch.Tensor:
        return sequence(query, key, value, scores._replace(window=window) if scores.window == right_window else scores)

    monkeypatch.setattr(attention, "_sequence", wrong)
    assert (logits_of(classifier, layout(related_items())) - right).abs().max() > 1e-3


SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=8)


@given(SEQUENCES, st.integers(1, 4))
def test_shared_holds_every_sequence_at_its_positions(texts: list[list[int]], worth: int) -> None:
    made = [Item(row, 0, np.array(text, dtype=np.int32)) for row, text in enumerate(texts)]
    with mock.patch.object(layouts, "MIN_SHARED_TOKENS", worth):
        batch = shared(made)
    ids, positions = (batch.inputs[name][0].tolist() for name in ("input_ids", "position_ids"))  # type: ignore[index]
    topology = topology_of(batch)
    for text, path, read_at in zip(texts, topology.paths, batch.read_at.tolist(), strict=True):
        places = [place for span in path for place in range(*span)]
        assert [ids[place] for place in places] == text
        assert [positions[place] for place in places] == list(range(len(text)))
        assert places[-1] == read_at
    assert len(set(batch.read_at.tolist())) == len(texts)
    assert {piece.sees for piece in topology.segments} == set(topology.paths)
    ends = [(piece.start, piece.stop) for piece in topology.segments]
    assert ends[0][0] == 0
    assert ends[-1][1] == len(ids)
    assert all(stop == start for (_, stop), (start, _) in pairwise(ends))
    assert all(piece.sees[-1][0] <= piece.start < piece.stop == piece.sees[-1][1] for piece in topology.segments)
    if worth == 1:  # every beginning once, but for last tokens, which each has for itself
        beginnings = {tuple(text[:length]) for text in texts for length in range(1, len(text) + 1)}
        assert len(beginnings) <= len(ids) <= len(beginnings) + len(texts)


def test_shared_computes_long_beginnings_once_and_leaves_short_ones_packed() -> None:
    random = np.random.default_rng(0)
    instruction, prompt = random.integers(0, 99, 150), random.integers(0, 99, 40)
    rows = [np.concatenate([instruction, row + prompt]) for row in range(3)]
    made = [Item(row, order, np.append(begin, [order] * 9)) for row, begin in enumerate(rows) for order in (0, 1)]
    assert shared(made).inputs["input_ids"].numel() == 150 + 3 * (40 + 2 * 9)  # type: ignore[union-attr]
    short = [Item(0, order, np.append(instruction[: layouts.MIN_SHARED_TOKENS - 1], [order])) for order in (0, 1)]
    assert topology_of(shared(short)).segments == topology_of(packed(short)).segments


def test_shared_batch_is_refused_with_stock_attention(config_for: Callable[..., Config]) -> None:
    stock = with_attention(config_for, "llama", "sdpa")
    with pytest.raises(ModelError, match=r"shared: model\.attn_implementation=sdpa would let"):
        logits_of(stock, shared(related_items()))


def gradients(
    classifier: Classifier, batches: Sequence[Batch], *, trim: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss (mean over all rows) and gradients of what trains, accumulated over the batches."""
    classifier.train()
    targets = torch.eye(3)[torch.arange(8) % 3]
    loss = torch.zeros(())
    for batch in batches:
        logits = classifier(batch.inputs, batch.read_at, batch.lengths, trim=trim)
        part = torch.nn.functional.cross_entropy(logits, targets[batch.row_at], reduction="sum") / 8
        part.backward()
        loss += part.detach()
    found = {name: one.grad for name, one in classifier.named_parameters() if one.requires_grad}
    return float(loss), {name: grad for name, grad in found.items() if grad is not None}


def assert_same_training(
    one: Classifier, other: Classifier, batches: Sequence[Batch], others: Sequence[Batch], *, trim: bool = False
) -> None:
    (loss, grads), (other_loss, other_grads) = gradients(one, batches, trim=trim), gradients(other, others)
    assert abs(loss - other_loss) <= 1e-5
    assert grads.keys() == other_grads.keys()
    assert max(float((grads[name] - other_grads[name]).abs().max()) for name in grads) <= 1e-5
    assert min(float(grad.abs().max()) for grad in grads.values()) > 0


LORA = {"r": 4, "lora_dropout": 0.0}


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        *(pytest.param(kind, None, id=f"{kind}-whole") for kind in (*BACKBONES, *PACKED_ENCODERS)),
        *(pytest.param(kind, LORA, id=f"{kind}-lora") for kind in ("gemma2", "llama", "modernbert")),
    ],
)
def test_packed_trains_as_stock_attention_row_by_row(
    config_for: Callable[..., Config], kind: str, lora: dict[str, object] | None
) -> None:
    ours, stock = (with_attention(config_for, kind, name, lora=lora) for name in ("auto", "eager"))
    assert_same_training(ours, stock, [packed(items())], [padded([item]) for item in items()])


@pytest.mark.parametrize(("kind", "lora"), [("bert", None), ("modernbert", LORA), ("eurobert", None), ("gemma2", LORA)])
def test_trimmed_trains_as_stock_attention_row_by_row(
    config_for: Callable[..., Config], kind: str, lora: dict[str, object] | None
) -> None:
    """With the last layer at the read tokens alone; the wrong variant reads another token."""
    ours, stock = (with_attention(config_for, kind, name, lora=lora) for name in ("auto", "eager"))
    batch, alone = packed(items()), [padded([item]) for item in items()]
    assert_same_training(ours, stock, [batch], alone, trim=True)
    for classifier in (ours, stock):
        classifier.zero_grad()
    with pytest.raises(AssertionError):
        assert_same_training(ours, stock, [replace(batch, read_at=batch.read_at - 1)], alone, trim=True)


@pytest.mark.parametrize("kind", ["gemma2", "modernbert"])
def test_packed_with_joined_sequences_changes_gradients(config_for: Callable[..., Config], kind: str) -> None:
    config = config_for(kind)
    batch = packed(items())
    with pytest.raises(AssertionError):
        assert_same_training(as_built(config), as_built(config), [batch], [_join_the_first_two(batch)])


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_checkpoint_gradients_keeps_gradients(config_for: Callable[..., Config], quantization: str) -> None:
    config = config_for("gemma2", model={"quantization": quantization})
    plain, recomputing = as_built(config), as_built(config)
    checkpoint_gradients(recomputing.backbone)
    assert_same_training(plain, recomputing, [packed(items())], [packed(items())])


@pytest.mark.parametrize(
    ("kind", "stock"), [*product([*BACKBONES, *PACKED_ENCODERS], ["eager"]), ("llama", "sdpa"), ("mistral", "sdpa")]
)
def test_padded_trains_as_stock_attention(config_for: Callable[..., Config], kind: str, stock: str) -> None:
    ours, theirs = (with_attention(config_for, kind, name) for name in ("auto", stock))
    assert ours.backbone.config._attn_implementation == attention.NAME  # type: ignore[union-attr]
    assert_same_training(ours, theirs, [padded(items())], [padded(items())])


@pytest.mark.parametrize(
    ("kind", "lora", "dtype"),
    [
        pytest.param("gemma2", None, "bfloat16", id="gemma2-whole-bfloat16"),
        pytest.param("gemma2", LORA, "float16", id="gemma2-lora-float16"),
        pytest.param("llama", LORA, "bfloat16", id="llama-lora-bfloat16"),
        pytest.param("llama", None, "float16", id="llama-whole-float16"),
    ],
)
def test_packed_and_shared_score_each_row_as_alone_in_half_precision(
    config_for: Callable[..., Config], kind: str, lora: dict[str, object] | None, dtype: str
) -> None:
    classifier = as_built(config_for(kind, model={"dtype": dtype, "lora": lora}))
    alone = one_at_a_time(classifier, related_items())
    for layout, trim in product((packed, shared), (False, True)):
        assert (logits_of(classifier, layout(related_items()), trim=trim) - alone).abs().max() <= 2e-2


def test_packed_is_refused_where_layers_mix_rows(config_for: Callable[..., Config]) -> None:
    classifier = as_built(config_for("llama"))
    for spoilt in ({"layer_types": ["conv", "full_attention"]}, {"layer_types": ["linear_attention"]}):
        config = AutoConfig.for_model("lfm2", num_hidden_layers=len(spoilt["layer_types"]), **spoilt)
        why = attention.why_not_packed(None, config)
        assert why is not None
        assert spoilt["layer_types"][0] in why
    classifier.isolation = classifier.isolation._replace(packed=why)
    with pytest.raises(ModelError, match="layout packed: has layers of the kind linear_attention"):
        logits_of(classifier, packed(items()))
    assert logits_of(classifier, padded(items())).shape == (8, 3)


def test_both_tables_and_the_config_name_the_same_layouts() -> None:
    assert LAYOUTS.keys() == BATCH_LAYOUTS.keys()
    assert set(get_args(Predict.model_fields["layout"].annotation)) == {"auto", *LAYOUTS}
    assert set(get_args(Train.model_fields["layout"].annotation)) == LAYOUTS.keys()


def _rounded(lengths: Ints, shared: Ints) -> tuple[Ints, Ints]:
    """Each sequence costs as much as one of a multiple of 8 tokens."""
    return np.zeros_like(lengths), -(-lengths // 8) * 8


def test_a_new_layout_is_a_record_for_planning_scoring_and_estimates(
    config_for: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LAYOUTS, "rounded", PlannedLayout(_rounded, pads=False, together=True))
    monkeypatch.setitem(BATCH_LAYOUTS, "rounded", BatchLayout(padded, lambda *_: None, topology=False))
    config = config_for("llama", train={"tokens_per_batch": 32, "swap": "none"})
    config.train.layout = "rounded"  # type: ignore[assignment]
    lengths = np.array([[5, 5], [9, 9], [17, 17]])

    backlog = PendingSequences(SequenceIndex(lengths, np.array([3, 0, 0]), np.arange(6).reshape(3, 2)), (0, 1))
    backlog.layout = "rounded"
    assert backlog.workload_left(100) == (2 * (8 + 16 + 24), 2 * (8**2 + 16**2 + 24**2), 1)
    assert backlog.workload_of([RowOrders(0, (0, 1)), RowOrders(2, (1,))]) == (2 * 8 + 24, 2 * 8**2 + 24**2, 1)
    assert backlog.batches(48) == [[2], [1, 0]]
    assert backlog.tokens_left(1).tolist() == [8, 16, 24]

    assert micro_batches(np.arange(3), [5, 9, 17], 8, process=0, processes=1, tokens_per_batch=32,
                         layout=LAYOUTS["rounded"]) == [[2], [1, 0]]  # fmt: skip
    sample = _sample_steps(config, [5, 9, 17], 3, 1)
    assert sorted(chain.from_iterable(sample.batches)) == [8, 16, 24]

    classifier = build(config, torch.device("cpu")).eval()
    scorer = ClassifierScorer(classifier, "rounded")
    assert (scorer.layout, scorer.trim) == ("rounded", False)
    assert "last layer whole, as rows are rounded" in scorer.why
    scores = score(classifier, items(), tokens_per_batch=64, layout="rounded", visible=False)
    assert np.abs(scores - one_at_a_time(classifier, items()).numpy()).max() <= 1e-5
    assert footprint(scorer, LargestPass(30, 60, 2)).live > 0
    assert measure_kept_bytes(config, classifier, 20)[0] == [24, 24]
