"""Every layout gives the logits of one row at a time, on every backbone; a wrong mask or a wrong place does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from pairclf.config import Config
from pairclf.errors import ModelError
from pairclf.jobs.scoring import score
from pairclf.model import attention
from pairclf.model.backbone import checkpoint_gradients
from pairclf.model.batch import Batch, Item
from pairclf.model.engine import LAYOUTS, Classifier, Layout, build, layout_of
from pairclf.model.layouts import packed, padded

CPU = torch.device("cpu")
BACKBONES = ["gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3"]


def items() -> list[Item]:
    """Lengths from one token to beyond the sliding window (32 here); pad's and eos's ids among the text."""
    random = np.random.default_rng(0)
    lengths = [1, 2, 9, 31, 32, 33, 70, 5]
    return [Item(row, row % 2, random.integers(0, 260, length, dtype=np.int32)) for row, length in enumerate(lengths)]


def as_built(config: Config) -> Classifier:
    """The same weights for the same config, all of which have a say in the logits, which are of order one."""
    made = build(config, CPU).eval()
    torch.manual_seed(1)
    for name, parameter in made.named_parameters():
        if "lora_B" in name or name == "head.weight":
            torch.nn.init.normal_(parameter, std=0.2 if name == "head.weight" else 0.02)
    return made


def with_attention(config_for: Callable[..., Config], kind: str, name: str, **model: object) -> Classifier:
    return as_built(config_for(kind, model={**model, "attention": name}, train={"layout": "padded"}))


@pytest.fixture(params=BACKBONES)
def classifier(request: pytest.FixtureRequest, config_for: Callable[..., Config]) -> Classifier:
    return as_built(config_for(request.param))


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
    return replace(batch, inputs={**batch.inputs, "cu_seq_lens_q": joined, "cu_seq_lens_k": joined})


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
    ],
)
def test_a_wrong_mask_place_or_position_shows(
    classifier: Classifier, layout: Layout, spoil: Callable[[Batch], Batch]
) -> None:
    batch = layout(items())
    right, wrong = logits_of(classifier, batch), logits_of(classifier, spoil(batch))
    assert (right - wrong).abs().max() > 1e-3


def test_stock_attention_finds_sequences_by_their_positions_and_ours_by_what_it_is_told(
    config_for: Callable[..., Config],
) -> None:
    """Rotary positions are relative: running on alone moves no logit of ours. It blinds the stock implementation."""
    ours, stock = (with_attention(config_for, "llama", name) for name in ("auto", "sdpa"))
    batch, expected = packed(items()), logits_of(ours, packed(items()))
    assert (logits_of(ours, _positions_run_on(batch)) - expected).abs().max() <= 1e-4
    assert (logits_of(stock, batch) - expected).abs().max() <= 1e-5
    assert (logits_of(stock, _positions_run_on(batch)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("window", [31, 33, 10_000])
@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "mistral", "qwen3"])
def test_a_window_that_is_wrong_or_ignored_shows(
    config_for: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, kind: str, window: int
) -> None:
    classifier = as_built(config_for(kind))
    right = logits_of(classifier, packed(items()))
    band = attention._band

    def wrong(tokens: int, asked: int, device: torch.device) -> torch.Tensor:
        return band(tokens, window if asked == 32 else asked, device)

    monkeypatch.setattr(attention, "_band", wrong)
    assert (logits_of(classifier, packed(items())) - right).abs().max() > 1e-3


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


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", ["gemma2", "llama"])
def test_packed_in_bfloat16(config_for: Callable[..., Config], kind: str, lora: dict[str, object] | None) -> None:
    classifier = as_built(config_for(kind, model={"dtype": "bfloat16", "lora": lora}))
    alone = torch.cat([logits_of(classifier, padded([item])) for item in items()])
    assert (logits_of(classifier, packed(items())) - alone).abs().max() <= 2e-2


def test_what_packing_would_mix_is_refused(config_for: Callable[..., Config]) -> None:
    classifier = as_built(config_for("llama"))
    for spoilt in ({"layer_types": ["conv", "full_attention"]}, {"layer_types": ["linear_attention"]}):
        config = AutoConfig.for_model("lfm2", num_hidden_layers=len(spoilt["layer_types"]), **spoilt)
        why = attention.why_not_packed(SimpleNamespace(config=config))  # type: ignore[arg-type]
        assert why is not None
        assert spoilt["layer_types"][0] in why
    classifier._why_not_packed = why
    with pytest.raises(ModelError, match="packed rows would see each other"):
        logits_of(classifier, packed(items()))
    assert logits_of(classifier, padded(items())).shape == (8, 3)


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
