"""What is asked of a backbone by its kind is one record: another kind is another record."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from transformers import AutoConfig, BertConfig

from pairclf.config import Config, Model
from pairclf.errors import ModelError
from pairclf.model import isolation
from pairclf.model.backbone import empty_model
from pairclf.model.cost import cost_of_model
from pairclf.model.engine import build
from pairclf.model.families import ENCODER_DECODERS, FAMILIES, family_of
from pairclf.model.lm_head import lm_head_of
from pairclf.model.readout import POOLINGS
from pairclf.model.scoring import ClassifierScorer

CPU = torch.device("cpu")
BERT = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50)


def test_poolings_of_families_and_of_the_config_are_those_of_the_readout() -> None:
    assert {name for family in FAMILIES.values() for name in family.poolings} == POOLINGS.keys()
    literal, none = get_args(Model.model_fields["pooling"].annotation)
    assert (set(get_args(literal)), none) == (POOLINGS.keys(), type(None))


def test_each_kind_of_model_is_of_one_family_at_most() -> None:
    families = {
        "gemma2": "decoder",
        "gpt2": "decoder",
        "bert": "encoder",
        "modernbert": "encoder",
        "eurobert": "encoder",
        **dict.fromkeys(ENCODER_DECODERS, "encoder_decoder"),
    }
    for kind, name in families.items():
        settings = AutoConfig.for_model(kind)
        assert [other for other, family in FAMILIES.items() if family.matches(settings)] == [name]
    with pytest.raises(ModelError, match="is a bert, which is none of: decoder, encoder"):
        family_of(AutoConfig.for_model("bert", is_decoder=True))  # trained as an encoder, and looks back alone


def test_attention_of_an_encoder_costs_both_halves_of_all_pairs() -> None:
    assert cost_of_model(empty_model(BERT)).quadratic == 4 * 2 * 32


def test_relative_positions_of_deberta_cost_a_token_the_same_beside_any_others() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    plain, relative = (
        cost_of_model(empty_model(AutoConfig.for_model("deberta-v2", **sizes, share_att_key=True, **more)))
        for more in ({}, {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16})
    )
    assert relative.linear - plain.linear == 2 * 2 * 32 * (2 * 2 * 16)  # 2 layers, 32 wide, both ways, 32 positions
    assert relative.quadratic == plain.quadratic


def test_what_a_family_refuses_is_refused_with_its_reason(
    config_for: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses = {"shared": "tokens see those behind them", "trim": "a test's", "label_words": "it has no LM head"}
    changed = FAMILIES["decoder"]._replace(poolings=("last",), refuses=refuses)
    monkeypatch.setitem(FAMILIES, "decoder", changed)
    monkeypatch.setattr(isolation, "_RESULTS", {})  # what is measured now is of the changed family
    classifier = build(config_for("llama"), CPU)
    scorer = ClassifierScorer(classifier)
    assert (scorer.layout, scorer.trim) == ("packed", False)
    assert scorer.why == "packed (not shared, as tokens see those behind them); last layer whole, as a test's"
    with pytest.raises(ModelError, match=r"model\.pooling=mean is none of the base's: last"):
        build(config_for("llama", model={"pooling": "mean"}), CPU)
    with pytest.raises(ModelError, match=r"model\.label_words: it has no LM head"):
        lm_head_of("", classifier.backbone, "model.label_words")
