"""Rationales: what is written is what transformers' generate writes, and the label is scored behind it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_support import with_lm_head
from tests_support import make_rows
from transformers import AutoModelForCausalLM

from pairclf.config import Config, resolve
from pairclf.errors import ConfigError, ModelError
from pairclf.inference.pending import PendingSequences
from pairclf.inputs.render import RATIONALE
from pairclf.inputs.sequences import Item, index_sequences
from pairclf.inputs.truncate import Ids
from pairclf.inspect.show import show
from pairclf.model.engine import Classifier, build_untrained
from pairclf.model.inputs import Opened, open_inputs
from pairclf.model.scoring import ClassifierScorer, items_of, score

CPU = torch.device("cpu")
WORDS = {"winner_model_a": "A", "winner_model_b": "B", "winner_tie": "t"}
TRIGGER = "\nSo it is:\n"
N = 12


@pytest.fixture(scope="module")
def lm_of(base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By its kind, a base with an LM head."""

    @cache
    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("rationale") / "base"
        return with_lm_head(base_of(kind), folder, tied=kind == "gemma2", initializer_range=0.3)

    return make


@pytest.fixture
def base(lm_of: Callable[[str], Path]) -> Path:
    return lm_of("llama")


def config_of(base: Path, rationale: int = N, **prompt: Any) -> Config:
    model = {"base": str(base), "quantization": "none", "readout": "label_tokens", "label_words": WORDS}
    prompt = {"k": 0, "rationale": rationale, **prompt} | ({"answer_trigger": TRIGGER} if rationale else {})
    return resolve({"approach": "prompt", "inputs": {"max_length": 200}, "model": model, "prompt": prompt})


def generated(lm: Any, text: Ids, most: int, stop: int | None) -> list[int]:
    """Without the token that ends it."""
    ids = torch.from_numpy(text).long()[None]
    ended = {"eos_token_id": stop, "pad_token_id": 0}
    options = {"max_new_tokens": most, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    out: list[int] = lm.generate(ids, **options, **ended)[0, len(text) :].tolist()
    return out[: out.index(stop)] if stop in out else out


class Case:
    """Rows in both orders, and the stock LM."""

    def __init__(self, base: Path, stop: int | None = None) -> None:
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}), encoding="utf-8")
        self.config = config_of(base)
        self.opened: Opened = open_inputs(self.config)
        self.classifier: Classifier = build_untrained(self.config, CPU).eval()
        self.items = items_of(self.opened.builder.encode(make_rows(3)), orders=2)
        self.lm: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.stop = stop

    def rationale(self, item: Item) -> list[int]:
        return generated(self.lm, item.ids[: int(np.argmax(item.ids == RATIONALE))], N, self.stop)

    def with_rationale(self, item: Item) -> list[int]:
        at = int(np.argmax(item.ids == RATIONALE))
        return [*item.ids[:at].tolist(), *self.rationale(item), *item.ids[at + N :].tolist()]

    def expected(self, ids: list[int]) -> torch.Tensor:
        tokens = [int(self.opened.builder.tokenizer([word], special=True)[0][0]) for word in WORDS.values()]
        with torch.inference_mode():
            return self.lm(torch.tensor([ids])).logits[0, -1, tokens].double()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_label_is_scored_behind_the_greedy_continuation_of_generate(
    lm_of: Callable[[str], Path], kind: str
) -> None:
    case = Case(lm_of(kind))
    texts = [case.with_rationale(item) for item in case.items]
    assert [item.ids.tolist() for item in case.classifier.with_rationales(case.items)] == texts
    assert all(case.opened.tokenizer.decode(text).endswith(TRIGGER) for text in texts)
    logits = torch.from_numpy(score(case.classifier, case.items, tokens_per_batch=2_000))
    expected = torch.stack([case.expected(text) for text in texts])
    assert (logits - expected).abs().max() <= 1e-5
    for spoil in (texts[1][:-1], [token for token in texts[0] if token != case.rationale(case.items[0])[0]]):
        assert (logits[0] - case.expected(spoil)).abs().max() > 1e-3
    scorer = ClassifierScorer(case.classifier)
    alone = torch.cat([torch.from_numpy(scorer([item])[0]) for item in case.items])
    assert (alone - logits).abs().max() <= 1e-5, "whatever stands beside it"
    backwards, _ = scorer(case.items[::-1])
    assert (torch.from_numpy(backwards[::-1].copy()) - logits).abs().max() <= 1e-5


def test_a_rationale_stops_where_the_turn_ends(base: Path) -> None:
    rationales = [case.rationale(item) for case in (Case(base),) for item in case.items]
    stop = rationales[0][4]
    case = Case(base, stop)
    shorter = [case.rationale(item) for item in case.items]
    assert len(shorter[0]) < 5
    assert [case.with_rationale(item) for item in case.items] == [
        item.ids.tolist() for item in case.classifier.with_rationales(case.items)
    ]
    first = Case(base, rationales[0][0])
    assert first.classifier.with_rationales(first.items)[0].ids.tolist() == first.with_rationale(first.items[0])
    assert first.rationale(first.items[0]) == [], "nothing is written, and the label is scored"


def test_what_ends_a_turn_is_in_generation_config_or_in_the_models_own(base: Path) -> None:
    case, path = Case(base, 7), base / "generation_config.json"
    assert case.classifier.writer is not None
    assert case.classifier.writer.stop == {7}
    path.write_text(json.dumps({"eos_token_id": [7, 9]}), encoding="utf-8")
    writer = build_untrained(case.config, CPU).writer
    assert writer is not None
    assert writer.stop == {7, 9}
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"generation_config\.json can't be used"):
        build_untrained(case.config, CPU)
    path.unlink()
    writer = build_untrained(case.config, CPU).writer
    assert writer is not None
    assert writer.stop == {2}, "a Llama's"


def test_without_a_rationale_nothing_changes(base: Path) -> None:
    without, plain = config_of(base, 0), config_of(base)
    plain.prompt = without.prompt
    plain.inputs.template.text = without.inputs.template.text
    assert plain == without
    classifier, builder = build_untrained(without, CPU), open_inputs(without).builder
    assert classifier.writer is None
    items = items_of(builder.encode(make_rows(2)), orders=2)
    assert all((item.ids >= 0).all() for item in items)
    assert classifier.with_rationales(items) == items


def test_a_rationale_has_room_in_the_budget_and_its_passes_are_counted(base: Path) -> None:
    case = Case(base)
    long = [replace(row, fields={name: (f"{name} " * 400,) for name in row.fields}) for row in make_rows(2)]
    encoded = case.opened.builder.encode(long)
    assert max(len(orders[0].ids) for orders in encoded) <= 200
    index = index_sequences(encoded)
    assert (index.rationale, index.padded(3, 2).rationale, index.of_rows(np.array([0])).rationale) == (N, N, N)
    pending = PendingSequences(index, (0, 1))
    sequences = int(pending.is_pending.sum())
    assert pending.workload_left(10_000).passes == pending.batches_left(10_000) + N * sequences == 1 + N * sequences
    assert pending.workload_of(pending.row_orders([0])).passes == 1 + 2 * N
    assert f"⟨rationale, at most {N} tokens⟩" in show(case.opened, long[0], coloured=False)[0].plain


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"prompt": {"rationale": 5}}, "k=4 shows examples without a rationale; set k=0, or rationale=0"),
        ({"prompt": {"k": 0, "answer_trigger": "x"}}, "answer_trigger changes nothing with rationale=0"),
        ({"approach": "finetune", "prompt": {"k": 0, "rationale": 5}}, "prompt.k, prompt.rationale change nothing"),
        (
            {
                "task": {"name": "t", "fields": ["text"], "classes": ["u"], "multi_label": True},
                "model": {"readout": "label_tokens", "label_words": {"yes": "Y", "no": "N"}},
                "prompt": {"k": 0, "rationale": 5},
            },
            "prompt.rationale=5 is written before one label word, and the task t is multi_label",
        ),
    ],
)
def test_what_can_not_have_a_rationale_is_refused(tree: dict[str, Any], message: str) -> None:
    model = {"readout": "label_tokens", "label_words": WORDS} if tree.get("approach") != "finetune" else {}
    with pytest.raises(ConfigError, match=message):
        resolve({"approach": "prompt", "model": model, **tree})


def test_a_label_word_is_checked_behind_the_trigger(base: Path) -> None:
    config = config_of(base)
    config.prompt.answer_trigger = "\nSo it is:"
    with pytest.raises(ConfigError, match=r"begins without a blank behind a text that ends in ':'[\s\S]*So it is:'"):
        open_inputs(config)
