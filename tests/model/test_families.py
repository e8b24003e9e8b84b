"""What is asked of a backbone by its kind is one record: another kind is another record."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from transformers import AutoModel, BertConfig

from pairclf.config import Config, Model
from pairclf.errors import ModelError
from pairclf.model.backbone import empty_model
from pairclf.model.cost import cost_of_model
from pairclf.model.engine import build
from pairclf.model.families import FAMILIES, Family, family_of
from pairclf.model.lm_head import lm_head_of
from pairclf.model.readout import POOLINGS
from pairclf.model.scoring import ClassifierScorer

CPU = torch.device("cpu")
BERT = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50)


def test_poolings_of_families_and_of_the_config_are_those_of_the_readout() -> None:
    assert {name for family in FAMILIES.values() for name in family.poolings} == POOLINGS.keys()
    assert set(get_args(Model.model_fields["pooling"].annotation)) == POOLINGS.keys()


def test_an_encoder_is_one_more_record(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="a bert, not a decoder"):
        empty_model(BERT)
    encoder = Family(lambda one: one.model_type == "bert", AutoModel, False, ("mean",), {}, {"vllm": "it generates"})
    monkeypatch.setitem(FAMILIES, "encoder", encoder)
    assert family_of(BERT) is encoder
    cost = cost_of_model(empty_model(BERT))
    assert cost.quadratic == 4 * 2 * 32  # both halves: nothing is masked


def test_what_a_family_refuses_is_refused_with_its_reason(
    config_for: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses = {"shared": "tokens see those behind them", "trim": "a test's", "label_words": "it has no LM head"}
    changed = FAMILIES["decoder"]._replace(poolings=("last",), refuses=refuses)
    monkeypatch.setitem(FAMILIES, "decoder", changed)
    classifier = build(config_for("llama"), CPU)
    scorer = ClassifierScorer(classifier)
    assert (scorer.layout, scorer.trim) == ("packed", False)
    assert scorer.why == "packed (not shared, as tokens see those behind them); last layer whole, as a test's"
    with pytest.raises(ModelError, match=r"model\.pooling=mean is none of the base's: last"):
        build(config_for("llama", model={"pooling": "mean"}), CPU)
    with pytest.raises(ModelError, match=r"model\.label_words: it has no LM head"):
        lm_head_of("", classifier.backbone, "model.label_words")
