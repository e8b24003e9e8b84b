"""A row whose activations leave float16 gets the logits of float32, from the weights that are there."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from models_support import as_built, logits_of, one_at_a_time, related_items

from pairclf.config import Config
from pairclf.inputs.sequences import Item
from pairclf.model.engine import Classifier
from pairclf.model.layouts import shared
from pairclf.model.precision import in_float32
from pairclf.model.scoring import ClassifierScorer

LOUD = 300
"""An id that `related_items` has not, and whose embedding stands at float16's edge."""


def overflowing(config: Config) -> Classifier:
    """Weights in float16, of which some are so large that the sequences with `LOUD` in them overflow."""
    classifier = as_built(config)
    with torch.no_grad():
        embedding = classifier.backbone.get_input_embeddings()  # type: ignore[operator]
        embedding.weight[LOUD] = embedding.weight[1].sign() * 65_000
        for name, weight in classifier.backbone.named_parameters():
            if "down_proj" in name and weight.dtype == torch.float16 and weight.dim() == 2:
                weight *= 500_000
    return classifier


def items() -> list[Item]:
    """The second and the last go wrong in their midst; the second begins as others do."""
    made = related_items()
    for index in (1, len(made) - 1):
        ids = made[index].ids.copy()
        ids[len(ids) // 2 :: 9] = LOUD
        made[index] = made[index]._replace(ids=ids)
    return made


def as_float32(classifier: Classifier) -> Classifier:
    """The same weights, all of them float32."""
    whole = copy.deepcopy(classifier).float()
    whole.dtype = torch.float32
    return whole


@pytest.mark.parametrize("kind", ["gemma2", "llama", "qwen2"])
def test_scorer_gives_rescued_rows_the_logits_of_float32(config_for: Callable[..., Config], kind: str) -> None:
    classifier = overflowing(config_for(kind, model={"dtype": "float16"}))
    sound, loud = [item for item in items() if LOUD not in item.ids], [LOUD in item.ids for item in items()]
    expected = one_at_a_time(as_float32(classifier), items()).numpy()
    assert not logits_of(classifier, shared(items())).isfinite().all()
    for layout in ("padded", "packed", "shared"):
        calm, none = ClassifierScorer(classifier, layout)(sound)
        assert (np.isfinite(calm).all(), none) == (True, 0)
        logits, rescored = ClassifierScorer(classifier, layout)(items())
        assert rescored >= 2
        assert np.abs(logits - expected)[loud].max() <= 1e-5
        assert np.abs(logits[np.logical_not(loud)] - calm).max() <= 2e-2  # neighbours do not suffer
        if layout != "shared":  # where a block of queries is masked, nothing times infinity reaches what is shared
            assert rescored == 2
        assert classifier.dtype == torch.float16
        assert np.array_equal(ClassifierScorer(classifier, layout)(sound)[0], calm)
    assert {one.dtype for one in classifier.backbone.parameters() if not one.requires_grad} == {torch.float16}


def test_scorer_keeps_soft_capping_in_the_rescue(config_for: Callable[..., Config]) -> None:
    classifier = overflowing(config_for("gemma2", model={"dtype": "float16"}))
    for module in classifier.backbone.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = 0.02
    expected = one_at_a_time(as_float32(classifier), items()).numpy()
    found, _ = ClassifierScorer(classifier)(items())
    assert np.abs(found - expected)[1].max() <= 1e-5
    for module in classifier.backbone.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = None
    assert np.abs(ClassifierScorer(classifier)(items())[0] - expected)[1].max() > 1e-4


def test_computing_in_float32_leaves_quantised_layers_as_before(config_for: Callable[..., Config]) -> None:
    classifier = as_built(config_for("llama", model={"dtype": "float16", "quantization": "nf4"}))
    batch, seen = shared(related_items()), []
    handles = [
        module.register_forward_hook(lambda _module, given, out: seen.append((given[0].dtype, out.dtype)))
        for module in classifier.backbone.modules()
        if isinstance(module, Linear4bit)
    ]
    before = logits_of(classifier, batch)
    seen.clear()
    with classifier.computing_in_float32():
        rescored = logits_of(classifier, batch)
        assert {m.compute_dtype for m in classifier.modules() if isinstance(m, Linear4bit)} == {torch.float32}
    assert set(seen) == {(torch.float32, torch.float32)}
    for handle in handles:
        handle.remove()
    assert 0 < (rescored - before).abs().max() <= 2e-2
    assert torch.equal(logits_of(classifier, batch), before)
    assert {m.compute_dtype for m in classifier.modules() if isinstance(m, Linear4bit)} == {torch.float16}


def test_computing_in_float32_dequantises_int8(config_for: Callable[..., Config]) -> None:
    classifier = as_built(config_for("llama", model={"dtype": "float16", "quantization": "int8"}))
    plain = as_built(config_for("llama", model={"dtype": "float32"}))
    batch = shared(related_items())
    before = logits_of(classifier, batch)
    with classifier.computing_in_float32():
        rescored = logits_of(classifier, batch)
    assert (rescored - logits_of(plain, batch)).abs().max() < 0.1  # int8 is that rough
    assert (rescored - before).abs().max() > 0
    assert torch.equal(logits_of(classifier, batch), before)
    linear = next(module for module in classifier.modules() if isinstance(module, Linear8bitLt))
    with in_float32(linear):
        assert linear(torch.full((5, 64), 1e6)).isfinite().all()  # beyond float16
    assert "forward" not in linear.__dict__


def test_in_float32_copies_the_rows_an_embedding_looks_up(config_for: Callable[..., Config]) -> None:
    embedding = torch.nn.Embedding(320, 8, padding_idx=319).half()
    ids, sizes = torch.tensor([[5, 7, 5, 319]]), []
    with in_float32(embedding):
        embedding.register_forward_pre_hook(lambda module, _given: sizes.append(tuple(module.weight.shape)))
        found = embedding(ids)
    assert sizes == [(3, 8)]
    assert torch.equal(found, embedding.weight[ids].float())
    assert (embedding.weight.shape, embedding.padding_idx) == ((320, 8), 319)


def test_in_float32_gives_weights_back_after_an_error() -> None:
    linear = torch.nn.Linear(8, 8).half()
    with in_float32(linear), pytest.raises(RuntimeError):
        linear(torch.zeros(1, 9))
    assert linear.weight.dtype == torch.float16
    assert "weight" not in linear.__dict__
