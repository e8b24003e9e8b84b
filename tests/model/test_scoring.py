"""From sequences to logits: the layout that is chosen, what batches hold, and what a row's score does not depend on."""

from __future__ import annotations

import platform
import resource
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_support import as_built, one_at_a_time, related_items
from support.forked import forked
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pairclf.config import Config
from pairclf.errors import ModelError
from pairclf.inputs.plan import by_token_budget, token_budget
from pairclf.inputs.sequences import Item, common_starts
from pairclf.model.attention import attend, mask
from pairclf.model.batch import Batch
from pairclf.model.engine import Classifier
from pairclf.model.isolation import probe
from pairclf.model.layouts import BATCH_LAYOUTS
from pairclf.model.scoring import ClassifierScorer, _batches, keep_freed_memory, score


@pytest.fixture
def classifier(config_for: Callable[..., Config]) -> Classifier:
    """One to change."""
    return as_built(config_for("gemma2"))


KINDS = pytest.mark.parametrize("kind", ["gemma2", "llama"])


@KINDS
def test_scorer_scores_alike_one_at_a_time_and_together(classifier_of: Callable[[str], Classifier], kind: str) -> None:
    items, alone = related_items(), one_at_a_time(classifier_of(kind), related_items()).numpy()
    for layout in ("auto", "padded", "packed", "shared"):
        scorer = ClassifierScorer(classifier_of(kind), layout)
        singly = np.concatenate([scorer([item])[0] for item in items])
        together, rescored = scorer(items)
        backwards, _ = scorer(items[::-1])
        halves = np.concatenate([scorer(items[:7])[0], scorer(items[7:])[0]])
        assert rescored == 0
        assert together.dtype == np.float64
        for logits in (singly, together, backwards[::-1], halves):
            assert np.abs(logits - alone).max() <= 1e-5


@KINDS
def test_score_does_not_depend_on_the_batch_size_and_keeps_the_items_order(
    classifier_of: Callable[[str], Classifier], kind: str
) -> None:
    classifier = classifier_of(kind)
    alone = one_at_a_time(classifier, related_items()).numpy()
    for tokens_per_batch in (1, 40, 400, None):
        forwards = score(classifier, related_items(), tokens_per_batch=tokens_per_batch)
        backwards = score(classifier, related_items()[::-1], tokens_per_batch=tokens_per_batch)
        assert np.abs(forwards - alone).max() <= 1e-5
        assert np.abs(backwards[::-1] - alone).max() <= 1e-5


def test_score_gives_the_same_bits_again(classifier_of: Callable[[str], Classifier]) -> None:
    first, second = (score(classifier_of("gemma2"), related_items(), tokens_per_batch=300) for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("model", "layout", "trim", "why"),
    [
        ({}, "shared", True, "cheapest"),
        ({"pooling": "mean"}, "packed", False, "pooling=mean"),
        ({"attn_implementation": "eager"}, "padded", False, "attn_implementation=eager"),
    ],
    ids=["ours", "mean", "stock"],
)
def test_scorer_takes_the_layout_that_the_model_allows(
    config_for: Callable[..., Config], model: dict[str, object], layout: str, trim: bool, why: str
) -> None:
    classifier = as_built(config_for("gemma2", model=model, train={"layout": "padded"}))
    scorer = ClassifierScorer(classifier)
    assert (scorer.layout, scorer.trim) == (layout, trim)
    assert why in scorer.why
    assert np.abs(scorer(related_items())[0] - one_at_a_time(classifier, related_items()).numpy()).max() <= 1e-5
    if layout != "shared":
        with pytest.raises(ModelError, match=f"predict.layout=shared: .*{why}"):
            ClassifierScorer(classifier, "shared")


def test_scorer_packs_and_does_not_share_with_flash_attention_of_transformers(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our attention stands in for it where it can't run: it is told of packed rows by the same keywords."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", attend)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "flash_attention_2", mask)
    classifier.backbone.config._attn_implementation = "flash_attention_2"  # type: ignore[union-attr]
    backbone: nn.Module = classifier.backbone.get_base_model()  # type: ignore[operator]
    flash = Classifier(backbone, classifier.head, torch.float32)
    scorer = ClassifierScorer(flash)
    assert (scorer.layout, scorer.trim) == ("packed", False)
    with pytest.raises(ModelError, match="flash_attention_2 knows no tokens"):
        ClassifierScorer(flash, "shared")

    def deaf(*given: Any, softcap: object = None, **named: Any) -> object:
        return sdpa_attention_forward(*given, **named)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", deaf)
    assert "differ from those of the row alone" in str(probe(backbone, torch.float32).packed)


def test_scorer_pads_for_a_backbone_that_mixes_rows(classifier: Classifier) -> None:
    why = "carries a state from token to token"
    classifier.isolation = classifier.isolation._replace(packed=why, shared=why)
    assert ClassifierScorer(classifier).layout == "padded"
    with pytest.raises(ModelError, match="carries a state"):
        ClassifierScorer(classifier, "packed")


def test_scorer_leaves_training_mode_as_it_was(classifier: Classifier) -> None:
    classifier.train()
    ClassifierScorer(classifier)(related_items())
    assert classifier.training
    assert all(module.training for module in classifier.modules())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_scorer_gives_nan_for_logits_not_finite_in_float32_and_score_names_the_row(
    config_for: Callable[..., Config], dtype: str
) -> None:
    classifier, items = as_built(config_for("llama", model={"dtype": dtype})), related_items()
    poisoned = items[4]._replace(ids=np.append(items[4].ids, np.int32(299)))  # it begins as others do
    with torch.no_grad():
        classifier.backbone.get_input_embeddings().weight[299] = float("nan")  # type: ignore[operator]
    calm, _ = ClassifierScorer(classifier)(items)
    logits, _ = ClassifierScorer(classifier)([*items[:4], poisoned, *items[5:]])
    assert np.isnan(logits[4]).all()
    assert np.abs(np.delete(logits - calm, 4, axis=0)).max() <= (1e-5 if dtype == "float32" else 2e-2)
    with pytest.raises(ModelError, match=r"not finite for 1 of 10 rows, in float32 either\n.*number 2"):
        score(classifier, [*items[:4], poisoned, *items[5:]], tokens_per_batch=300)


def test_batches_hold_both_orders_of_a_row_and_begin_with_the_longest() -> None:
    items = related_items()
    for layout in ("packed", "shared"):
        batches = _batches(items, layout, 200)
        assert sorted(chain.from_iterable(batches)) == list(range(len(items)))
        for members in batches:
            tokens = _tokens(BATCH_LAYOUTS[layout].lay_out([items[index] for index in members]))
            assert tokens <= 200 or len({items[index].row for index in members}) == 1
        homes: dict[int, set[int]] = {}
        for number, members in enumerate(batches):
            for index in members:
                homes.setdefault(items[index].row, set()).add(number)
        assert all(len(numbers) == 1 for numbers in homes.values())
        rows = [items[index].row for index in chain.from_iterable(batches)]
        totals = [sum(len(item.ids) for item in items if item.row == row) for row in dict.fromkeys(rows)]
        assert totals == sorted(totals, reverse=True) or layout == "shared"


def _tokens(batch: Batch) -> int:
    ids = batch.inputs["input_ids"]
    assert isinstance(ids, torch.Tensor)
    return ids.numel()


def test_examples_before_all_rows_are_computed_once_a_pass_and_leave_room_for_more_rows(
    classifier_of: Callable[[str], Classifier],
) -> None:
    """Two sets of them, one before each order of a row, that begin alike; and rows that have none."""
    random, classifier = np.random.default_rng(0), classifier_of("llama")
    first, second, own = (random.integers(3, 290, count).astype(np.int32) for count in (100, 60, 500))
    second[0] = first[40] + 1
    before = [first, np.concatenate([first[:40], second])]
    items = [
        Item(row, order, np.concatenate([before[order], own[20 * row : 20 * row + 12 + row % 8]]))
        for row in range(24)
        for order in (0, 1)
    ]
    items += [Item(24 + row, order, own[20 * row + order :][:9]) for row in range(3) for order in (0, 1)]
    starts, once = common_starts([item.ids for item in items])
    assert {(item.row < 24, start) for item, start in zip(items, starts.tolist(), strict=True)} == {
        (True, 100),
        (False, 0),
    }
    assert once == 100 + 60
    batches = {layout: _batches(items, layout, 500) for layout in ("shared", "packed")}
    shown = [BATCH_LAYOUTS["shared"].lay_out([items[index] for index in members]) for members in batches["shared"]]
    assert max(map(_tokens, shown)) <= 500
    assert len(batches["shared"]) < len(batches["packed"]) / 2
    lengths = sum(len(item.ids) for item in items)
    assert sum(map(_tokens, shown)) == lengths - 48 * 100 + len(shown) * once
    passes: list[int] = []
    hook = classifier.backbone.register_forward_hook(lambda *_: passes.append(1))
    logits = score(classifier, items, tokens_per_batch=500)
    hook.remove()
    assert len(passes) == len(shown)
    assert np.abs(logits - one_at_a_time(classifier, items).numpy()).max() <= 1e-5


def test_by_token_budget_fills_batches_without_padding() -> None:
    assert by_token_budget([3, 8, 2, 8], 16, padded=False) == [[1, 3], [0, 2]]
    assert by_token_budget([3, 8, 2, 5], 18, padded=False) == [[1, 3, 0, 2]]
    assert by_token_budget([3, 8, 2, 5], 18) == [[1, 3], [0, 2]]
    assert (token_budget(None, gpu=True), token_budget(None, gpu=False), token_budget(7, gpu=True)) == (16384, 2048, 7)


def count_page_faults() -> None:
    """Of allocations that are repeated, before and after `keep_freed_memory`."""

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for size in (4, 9):  # millions of numbers, of which the second go beyond what malloc ever keeps by itself
            torch.ones(size * 1_000_000)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    stock = faults()
    keep_freed_memory()
    faults()
    print(stock, faults())  # noqa: T201


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_keep_freed_memory_asks_for_it_once(tmp_path: Path) -> None:
    process = forked(count_page_faults, output=tmp_path / "output")
    process.join()
    stock, ours = (tmp_path / "output").read_text().splitlines()[-1].split()
    assert int(stock) > 8_000
    assert int(ours) < 100


def test_score_of_no_items_is_empty(classifier_of: Callable[[str], Classifier]) -> None:
    nothing: Sequence[Item] = []
    assert score(classifier_of("llama"), nothing, tokens_per_batch=100).shape == (0, 3)
