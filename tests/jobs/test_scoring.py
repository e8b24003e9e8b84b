"""From sequences to logits: the layout that is chosen, what batches hold, and what a row's score does not depend on."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from models_support import as_built, one_at_a_time, related_items
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pairclf.config import Config
from pairclf.errors import ModelError
from pairclf.inputs.plan import by_token_budget, token_budget
from pairclf.jobs.scoring import Scorer, _batches, score
from pairclf.model.attention import attend, mask
from pairclf.model.batch import Item
from pairclf.model.engine import Classifier
from pairclf.model.isolation import probe


@pytest.fixture(params=["gemma2", "llama"])
def classifier(request: pytest.FixtureRequest, config_for: Callable[..., Config]) -> Classifier:
    return as_built(config_for(request.param))


@pytest.mark.parametrize("layout", ["auto", "padded", "packed", "shared"])
def test_one_at_a_time_or_together_is_the_same(classifier: Classifier, layout: str) -> None:
    items, scorer = related_items(), Scorer(classifier, layout)
    alone = one_at_a_time(classifier, items).numpy()
    singly = np.concatenate([scorer([item])[0] for item in items])
    together, rescued = scorer(items)
    backwards, _ = scorer(items[::-1])
    halves = np.concatenate([scorer(items[:7])[0], scorer(items[7:])[0]])
    assert rescued == 0
    assert together.dtype == np.float64
    for found in (singly, together, backwards[::-1], halves):
        assert np.abs(found - alone).max() <= 1e-5


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 400, 10_000, None])
def test_scores_do_not_depend_on_the_batch_size_and_keep_the_items_order(
    classifier: Classifier, tokens_per_batch: int | None
) -> None:
    alone = one_at_a_time(classifier, related_items()).numpy()
    forwards = score(classifier, related_items(), tokens_per_batch=tokens_per_batch)
    backwards = score(classifier, related_items()[::-1], tokens_per_batch=tokens_per_batch)
    assert np.abs(forwards - alone).max() <= 1e-5
    assert np.abs(backwards[::-1] - alone).max() <= 1e-5


def test_a_second_run_gives_the_same_bits(classifier: Classifier) -> None:
    first, second = (score(classifier, related_items(), tokens_per_batch=300) for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("model", "layout", "trim", "why"),
    [
        ({}, "shared", True, "cheapest"),
        ({"pooling": "mean"}, "packed", False, "pooling=mean"),
        ({"attention": "eager"}, "padded", False, "attention=eager"),
    ],
    ids=["ours", "mean", "stock"],
)
def test_the_layout_is_what_the_model_allows(
    config_for: Callable[..., Config], model: dict[str, object], layout: str, trim: bool, why: str
) -> None:
    classifier = as_built(config_for("gemma2", model=model, train={"layout": "padded"}))
    scorer = Scorer(classifier)
    assert (scorer.layout, scorer.trim) == (layout, trim)
    assert why in scorer.why
    assert np.abs(scorer(related_items())[0] - one_at_a_time(classifier, related_items()).numpy()).max() <= 1e-5
    if layout != "shared":
        with pytest.raises(ModelError, match=f"predict.layout=shared: .*{why}"):
            Scorer(classifier, "shared")


def test_flash_attention_of_transformers_packs_and_shares_nothing(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our attention stands in for it where it can't run: it is told of packed rows by the same keywords."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", attend)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "flash_attention_2", mask)
    classifier.backbone.config._attn_implementation = "flash_attention_2"  # type: ignore[union-attr]
    backbone: nn.Module = classifier.backbone.get_base_model()  # type: ignore[operator]
    flash = Classifier(backbone, classifier.head, torch.float32)
    scorer = Scorer(flash)
    assert (scorer.layout, scorer.trim) == ("packed", False)
    with pytest.raises(ModelError, match="flash_attention_2 knows no tokens"):
        Scorer(flash, "shared")

    def deaf(*given: Any, softcap: object = None, **named: Any) -> object:
        return sdpa_attention_forward(*given, **named)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", deaf)
    assert "differ from those of the row alone" in str(probe(backbone, torch.float32).packed)


def test_a_backbone_that_mixes_rows_is_padded(classifier: Classifier) -> None:
    why = "carries a state from token to token"
    classifier.isolation = classifier.isolation._replace(packed=why, shared=why)
    assert Scorer(classifier).layout == "padded"
    with pytest.raises(ModelError, match="carries a state"):
        Scorer(classifier, "packed")


def test_training_goes_on_as_it_was(classifier: Classifier) -> None:
    classifier.train()
    Scorer(classifier)(related_items())
    assert classifier.training
    assert all(module.training for module in classifier.modules())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_not_finite_in_float32_either_is_nan_and_an_error_that_names_the_row(
    config_for: Callable[..., Config], dtype: str
) -> None:
    classifier, items = as_built(config_for("llama", model={"dtype": dtype})), related_items()
    poisoned = items[4]._replace(ids=np.append(items[4].ids, np.int32(299)))  # it begins as others do
    with torch.no_grad():
        classifier.backbone.get_input_embeddings().weight[299] = float("nan")  # type: ignore[operator]
    calm, _ = Scorer(classifier)(items)
    logits, _ = Scorer(classifier)([*items[:4], poisoned, *items[5:]])
    assert np.isnan(logits[4]).all()
    assert np.abs(np.delete(logits - calm, 4, axis=0)).max() <= (1e-5 if dtype == "float32" else 2e-2)
    with pytest.raises(ModelError, match=r"not finite for 1 of 10 rows, in float32 either\n.*number 2"):
        score(classifier, [*items[:4], poisoned, *items[5:]], tokens_per_batch=300)


def test_orders_of_a_row_share_a_batch_and_the_longest_come_first() -> None:
    items = related_items()
    for layout in ("packed", "shared"):
        batches = _batches(items, layout, 200)
        assert sorted(chain.from_iterable(batches)) == list(range(len(items)))
        sizes = [[len(items[index].ids) for index in members] for members in batches]
        assert all(sum(one) <= 200 or len({items[index].row for index in members}) == 1
                   for one, members in zip(sizes, batches, strict=True))  # fmt: skip
        homes: dict[int, set[int]] = {}
        for number, members in enumerate(batches):
            for index in members:
                homes.setdefault(items[index].row, set()).add(number)
        assert all(len(numbers) == 1 for numbers in homes.values())
        rows = [items[index].row for index in chain.from_iterable(batches)]
        totals = [sum(len(item.ids) for item in items if item.row == row) for row in dict.fromkeys(rows)]
        assert totals == sorted(totals, reverse=True)


def test_tokens_without_padding_fill_a_batch() -> None:
    assert by_token_budget([3, 8, 2, 8], 16, padded=False) == [[1, 3], [0, 2]]
    assert by_token_budget([3, 8, 2, 5], 18, padded=False) == [[1, 3, 0, 2]]
    assert by_token_budget([3, 8, 2, 5], 18) == [[1, 3], [0, 2]]
    assert (token_budget(None, gpu=True), token_budget(None, gpu=False), token_budget(7, gpu=True)) == (16384, 2048, 7)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_memory_that_is_freed_is_not_asked_for_again() -> None:
    code = """
import resource, torch
from pairclf.jobs.scoring import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (4, 9, 20):
        torch.ones(size * 1_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults() and faults(), keep_freed_memory(), faults() and faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    stock, _, ours = done.stdout.splitlines()[-1].split()
    assert int(stock) > 10_000
    assert int(ours) < 100


def test_nothing_is_scored_without_items(classifier: Classifier) -> None:
    nothing: Sequence[Item] = []
    assert score(classifier, nothing, tokens_per_batch=100).shape == (0, 3)
