"""Rationales: what is written is what transformers' generate writes, and the label is scored behind it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models_support import with_lm_head
from tests_support import make_rows
from transformers import AutoModelForCausalLM, DynamicCache

from pairclf.config import Config, resolve
from pairclf.errors import ConfigError, ModelError
from pairclf.inference.pending import PendingSequences
from pairclf.inputs.plan import DECIDED_ALONE, LAYOUTS
from pairclf.inputs.render import RATIONALE
from pairclf.inputs.sequences import Item, LargestPass, index_sequences
from pairclf.inputs.truncate import Ids
from pairclf.inspect.show import show
from pairclf.model import rationale
from pairclf.model.batch import BackboneInputs, Batch
from pairclf.model.engine import Classifier, build_untrained
from pairclf.model.inputs import Opened, open_inputs
from pairclf.model.prediction_memory import footprint
from pairclf.model.rationale import MAX_CACHED
from pairclf.model.scoring import ClassifierScorer, items_of, score

CPU = torch.device("cpu")
WORDS = {"winner_model_a": "A", "winner_model_b": "B", "winner_tie": "t"}
TRIGGER = "\nSo it is:\n"
N = 12


@pytest.fixture(scope="module")
def lm_of(base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By its kind, a base with an LM head, which is the embedding of Gemma-2 unless it is `untied`."""

    @cache
    def make(kind: str) -> Path:
        folder, name = tmp_path_factory.mktemp("rationale") / "base", kind.removesuffix(" untied")
        return with_lm_head(base_of(name), folder, tied=kind == "gemma2", initializer_range=0.3)

    return make


@pytest.fixture
def base(lm_of: Callable[[str], Path]) -> Path:
    return lm_of("llama")


def config_of(base: Path, rationale: int = N, attention: str = "auto", **prompt: Any) -> Config:
    model = {"base": str(base), "quantization": "none", "readout": "label_tokens", "label_words": WORDS}
    model["attn_implementation"] = attention
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

    def __init__(self, base: Path, stop: int | None = None, attention: str = "auto") -> None:
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}), encoding="utf-8")
        self.config = config_of(base, attention=attention)
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
    assert [item.ids.tolist() for item in case.classifier.with_rationales(case.items, "shared")] == texts
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


@contextmanager
def passes_counted(classifier: Classifier) -> Iterator[Counter[int]]:
    """How many forward passes of the base had so many rows of a batch."""
    counts = Counter[int]()
    hook = classifier.backbone.register_forward_hook(
        lambda module, args, named, out: counts.update([len(out.last_hidden_state)]), with_kwargs=True
    )
    try:
        yield counts
    finally:
        hook.remove()


class Mixed:
    """Sequences of many lengths, longer and shorter than a window, and the rationale that each is given by itself."""

    def __init__(self, base: Path) -> None:
        self.case = Case(base)
        rows = make_rows(4)
        long = [
            replace(row, id=f"long {row.id}", fields={name: (text[0] * 8,) for name, text in row.fields.items()})
            for row in rows[:2]
        ]
        self.items = items_of(self.case.opened.builder.encode([*rows, *long]), orders=2)
        self.scorer = ClassifierScorer(self.case.classifier)
        self.alone = [self.written([item], "padded")[0] for item in self.items]
        self.logits = np.concatenate([self.scorer([item])[0] for item in self.items])

    def written(self, items: Sequence[Item], layout: str) -> list[list[int]]:
        return [item.ids.tolist() for item in self.case.classifier.with_rationales(items, layout)]


@pytest.fixture(scope="module")
def mixed_of(lm_of: Callable[[str], Path]) -> Callable[[str], Mixed]:
    return cache(lambda kind: Mixed(lm_of(kind)))


@pytest.fixture(params=["llama", "gemma2 untied"])
def mixed(mixed_of: Callable[[str], Mixed], request: pytest.FixtureRequest) -> Mixed:
    return mixed_of(request.param)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members=st.lists(st.integers(0, 11), min_size=1, max_size=12, unique=True), layout=st.sampled_from([*LAYOUTS]))
def test_what_is_written_together_is_what_each_is_given_by_itself(
    mixed: Mixed, members: list[int], layout: str
) -> None:
    batch = [mixed.items[number] for number in members]
    assert mixed.written(batch, layout) == [mixed.alone[number] for number in members]
    logits, _ = ClassifierScorer(mixed.case.classifier, layout)(batch)
    assert np.abs(logits - mixed.logits[members]).max() <= 1e-5


def _without_mask(cache: DynamicCache, batch: Batch, device: torch.device) -> torch.Tensor:
    return torch.ones_like(pad_on_the_left(cache, batch, device))


def _from_the_wrong_place(cache: DynamicCache, batch: Batch, device: torch.device) -> torch.Tensor:
    """Pads on the right of each sequence: its window then ends too far to the right."""
    attended = pad_on_the_left(cache, batch, device)
    padding = (1 - attended).sum(dim=1).tolist()
    for layer in cache.layers:
        for row, moved in enumerate(padding):
            layer.keys[row], layer.values[row] = layer.keys[row].roll(-moved, 1), layer.values[row].roll(-moved, 1)
    return torch.stack([row.roll(-moved) for row, moved in zip(attended, padding, strict=True)])


def _places_as_positions(self: Classifier, inputs: BackboneInputs, states: Any) -> torch.Tensor:
    """Positions of the padded row, and not of the sequence."""
    mask, positions = inputs.get("attention_mask"), inputs["position_ids"]
    assert isinstance(positions, torch.Tensor)
    if isinstance(mask, torch.Tensor) and positions.shape[1] == 1:
        inputs = {**inputs, "position_ids": torch.full_like(positions, mask.shape[1] - 1)}
    return hidden(self, inputs, states)


pad_on_the_left, hidden = rationale._pad_on_the_left, Classifier._hidden
WRONG: dict[str, tuple[object, str, Any]] = {
    "no mask": (rationale, "_pad_on_the_left", _without_mask),
    "no shift of positions": (Classifier, "_hidden", _places_as_positions),
    "padded on the right": (rationale, "_pad_on_the_left", _from_the_wrong_place),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_batch_writes_something_else(mixed: Mixed, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    has_window = getattr(mixed.case.lm.config, "sliding_window", None) is not None
    monkeypatch.setattr(*WRONG[wrong])
    is_right = wrong == "padded on the right" and not has_window
    assert (mixed.written(mixed.items, "shared") == mixed.alone) == is_right


def _rounded(self: Classifier, inputs: BackboneInputs, states: Any) -> torch.Tensor:
    """Passes over several sequences round as 16 bits would."""
    exact = hidden(self, inputs, states)
    noise = torch.rand(exact.shape, generator=torch.Generator().manual_seed(exact.shape[1])) - 0.5
    return exact + 0.05 * exact.std() * noise if len(exact) > 1 else exact


def test_where_rounding_could_choose_a_token_a_pass_over_its_sequence_decides(
    mixed_of: Callable[[str], Mixed], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = mixed_of("llama")
    monkeypatch.setitem(rationale.TOLERANCE, torch.float32, 0.2)
    monkeypatch.setattr(Classifier, "_hidden", _rounded)
    with passes_counted(mixed.case.classifier) as counts:
        assert mixed.written(mixed.items, "shared") == mixed.alone
    assert 0 < counts[1] - 1 < len(mixed.items) * N / 2, "some tokens are decided alone, besides the first pass"
    monkeypatch.setitem(rationale.TOLERANCE, torch.float32, 0.0)
    assert mixed.written(mixed.items, "shared") != mixed.alone


def test_a_token_of_all_sequences_takes_one_pass_and_a_long_sequence_does_not_pad_many_short_ones(
    mixed_of: Callable[[str], Mixed], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed, cached = mixed_of("llama"), list[int]()

    def observed(cache: DynamicCache, batch: Batch, device: torch.device) -> torch.Tensor:
        attended = pad_on_the_left(cache, batch, device)
        cached.append(len(attended) * (attended.shape[1] + N))
        return attended

    monkeypatch.setattr(rationale, "_pad_on_the_left", observed)
    alike, length = mixed.items[:6], max(len(item.ids) for item in mixed.items)
    with passes_counted(mixed.case.classifier) as counts:
        mixed.scorer(alike)
    assert counts == {1: 2, len(alike): N - 1}, "one to read, one a token, and one for the labels"
    with passes_counted(mixed.case.classifier) as counts:
        for item in alike:
            mixed.scorer([item])
    assert counts == {1: len(alike) * (N + 1)}
    ids = mixed.items[0].ids[-N - 30 :]
    short = [Item(row, 0, np.concatenate([[100 + row], ids]).astype(np.int32)) for row in range(12)]
    uneven = [max(mixed.items, key=lambda item: len(item.ids)), *short]
    cached.clear()
    mixed.written(uneven, "packed")
    total = sum(len(item.ids) for item in uneven)
    assert len(cached) == 2
    assert max(cached) <= MAX_CACHED * total < len(uneven) * length


def test_a_base_that_can_not_pack_writes_one_after_the_other(lm_of: Callable[[str], Path]) -> None:
    case = Case(lm_of("llama"), attention="eager")
    texts = [case.with_rationale(item) for item in case.items]
    with passes_counted(case.classifier) as counts:
        assert [item.ids.tolist() for item in case.classifier.with_rationales(case.items, "padded")] == texts
    assert counts == {1: len(case.items) * N}


def test_keys_and_values_of_a_rationale_count_in_the_memory(base: Path) -> None:
    scorer = ClassifierScorer(Case(base).classifier)
    settings: Any = scorer.classifier.backbone.config
    numbers = settings.num_hidden_layers * settings.num_key_value_heads * settings.head_dim
    assert scorer.classifier.cached_bytes() == 2 * 4 * numbers
    largest = LargestPass(longest=100, tokens_per_batch=300, orders=2)
    written = footprint(scorer, largest).live
    scorer.classifier.writer = None
    assert written - footprint(scorer, largest).live == MAX_CACHED * 300 * 2 * 4 * numbers


def test_a_rationale_stops_where_the_turn_ends(base: Path) -> None:
    rationales = [case.rationale(item) for case in (Case(base),) for item in case.items]
    stop = rationales[0][4]
    case = Case(base, stop)
    shorter = [case.rationale(item) for item in case.items]
    assert len(shorter[0]) < 5
    assert [case.with_rationale(item) for item in case.items] == [
        item.ids.tolist() for item in case.classifier.with_rationales(case.items, "shared")
    ]
    first = Case(base, rationales[0][0])
    assert first.classifier.with_rationales(first.items, "shared")[0].ids.tolist() == first.with_rationale(
        first.items[0]
    )
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
    assert classifier.with_rationales(items, "shared") == items


def test_a_rationale_has_room_in_the_budget_and_its_passes_are_counted(base: Path) -> None:
    case = Case(base)
    long = [replace(row, fields={name: (f"{name} " * 400,) for name in row.fields}) for row in make_rows(2)]
    encoded = case.opened.builder.encode(long)
    assert max(len(orders[0].ids) for orders in encoded) <= 200
    index = index_sequences(encoded)
    assert (index.rationale, index.padded(3, 2).rationale, index.of_rows(np.array([0])).rationale) == (N, N, N)
    pending = PendingSequences(index, (0, 1))
    sequences = int(pending.is_pending.sum())
    assert pending.batches_left(10_000) == 1
    assert pending.workload_left(10_000).passes == pytest.approx(1 + N + DECIDED_ALONE * N * sequences)
    assert pending.workload_of(pending.row_orders([0])).passes == pytest.approx(1 + N + DECIDED_ALONE * N * 2)
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
