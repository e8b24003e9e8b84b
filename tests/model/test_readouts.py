"""Readouts other than a head: logits of label tokens are the LM's own, in every layout, and labels that can't be."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles_support import write_model
from models_support import as_built, logits_of, related_items, see_the_siblings, with_lm_head
from safetensors.torch import load_file
from scipy.special import logsumexp
from tests_support import make_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from pairclf.approaches.finetune.losses import LOSSES
from pairclf.approaches.finetune.step import batch_loss, make_examples
from pairclf.bundles.bundle import Bundle, open_bundle
from pairclf.bundles.probes import pick_probes
from pairclf.config import Config, override, resolve
from pairclf.errors import BundleError, ConfigError, ModelError
from pairclf.inference.verify import verify
from pairclf.inputs.sequences import Item, branches_of, index_sequences
from pairclf.inspect.show import show
from pairclf.model import lm_head, vocabulary
from pairclf.model.engine import Classifier, build
from pairclf.model.inputs import open_inputs
from pairclf.model.layouts import BATCH_LAYOUTS, padded, shared
from pairclf.model.lm_head import lm_head_of
from pairclf.model.readout import LabelTokenHead, over_vocabulary
from pairclf.model.scoring import ClassifierScorer, by_order, items_of, score
from pairclf.model.weights import load_classifier
from pairclf.scores.probabilities import probabilities
from pairclf.task import Row

CPU = torch.device("cpu")
WORDS = {"winner_model_a": "A", "winner_model_b": "B", "winner_tie": "t"}
TOKENS = {"readout": "label_tokens", "label_words": WORDS, "quantization": "none"}

MakeConfig = Callable[..., Config]
BaseOf = Callable[[str], Path]


@pytest.fixture
def label_config(config_for: MakeConfig, base_of: BaseOf, tmp_path: Path) -> MakeConfig:
    """`label_config("gemma2", tied=True, final_logit_softcapping=3.0, train={...})`: a base with an LM head."""

    def make(kind: str = "llama", *, tied: bool = False, train: Any = None, **changes: Any) -> Config:
        base = with_lm_head(base_of(kind), tmp_path / "base", tied=tied, **changes)
        return config_for(kind, model={**TOKENS, "base": str(base)}, train=train or {})

    return make


def lm_logits(config: Config) -> torch.Tensor:
    """The LM's own logits `(R, V)` behind each of `related_items`, alone."""
    lm = AutoModelForCausalLM.from_pretrained(config.model.base, dtype=torch.float32).eval()
    with torch.inference_mode():
        return torch.cat([lm(torch.from_numpy(one.ids).long()[None]).logits[:, -1] for one in related_items()])


def token_ids(config: Config) -> list[int]:
    builder = open_inputs(config).builder
    return [int(builder.tokenizer([word], special=False)[0][0]) for word in WORDS.values()]


@pytest.mark.parametrize("layout", BATCH_LAYOUTS)
@pytest.mark.parametrize(
    ("kind", "tied", "changes"), [("llama", False, {}), ("gemma2", True, {"final_logit_softcapping": 0.3})]
)
def test_label_tokens_have_the_logits_of_the_lm_in_every_layout(
    label_config: MakeConfig, layout: str, kind: str, tied: bool, changes: dict[str, Any]
) -> None:
    config = label_config(kind, tied=tied, **changes)
    classifier = build(config, CPU).eval()
    expected = lm_logits(config)[:, token_ids(config)]
    batch = BATCH_LAYOUTS[layout].lay_out(related_items())
    for trim in {False, classifier.why_not_trim(layout) is None}:
        assert (logits_of(classifier, batch, trim=trim) - expected).abs().max() <= 1e-5
    assert logits_of(classifier, batch).dtype == torch.float32


@pytest.mark.thorough
def test_every_decoder_has_the_logits_of_its_lm_or_is_refused() -> None:
    """With its cap, scale and bias: those that do something else are in `UNLIKE`."""
    from decoders_support import DECODERS, lm_difference

    differences = {kind: apart for kind in DECODERS if (apart := lm_difference(kind)) is not None}
    assert len(differences) > 100
    assert {kind: apart for kind, apart in differences.items() if not apart <= 1e-4} == {}


def test_log_probabilities_over_the_vocabulary_and_their_gradients_are_those_of_log_softmax(
    label_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_head, "BLOCK", 100)  # of 320 tokens
    config = label_config("gemma2", tied=True, final_logit_softcapping=0.3)
    classifier, ids = build(config, CPU).eval(), token_ids(config)
    head, lm = classifier.head, lm_head_of(config.model.base, classifier.backbone, "a test")
    assert isinstance(head, LabelTokenHead)
    state = torch.randn(5, 64, requires_grad=True)
    logits = head(state)
    with over_vocabulary(head, lm):
        ours = head(state)
    scores = 0.3 * torch.tanh(state @ lm.weight.detach().T / 0.3)
    theirs = scores.log_softmax(dim=-1)[:, ids]
    assert (ours - theirs).abs().max() <= 1e-6
    assert (logits.log_softmax(dim=-1) - ours.log_softmax(dim=-1)).abs().max() <= 1e-6
    assert torch.equal(head(state), logits), "the vocabulary is gone"
    targets = torch.eye(3)[[0, 1, 2, 0, 1]]
    losses = LOSSES["vocabulary"](ours, targets, config.task)
    assert (losses - torch.nn.functional.nll_loss(theirs, targets.argmax(dim=1), reduction="none")).abs().max() <= 1e-6
    assert (losses - LOSSES["labels"](ours, targets, config.task)).min() > 0.1, "other tokens count"
    (gradient,) = torch.autograd.grad(ours.sum(), state, retain_graph=True)
    (expected,) = torch.autograd.grad(theirs.sum(), state)
    assert (gradient - expected).abs().max() <= 1e-6


# --- words that can't be labels --------------------------------------------------------------------------------------


def ends_in(config: Config, ending: str, **words: Any) -> Config:
    text = f"{{prompt}} {{response_a}} {{response_b}}{ending}"
    inputs = {"max_length": 160, "template": {"text": text}}
    return resolve({"inputs": inputs, "model": {**config.model.model_dump(), "label_words": {**WORDS, **words}}})


def test_all_words_that_can_not_be_labels_are_in_one_message(label_config: MakeConfig) -> None:
    words: dict[str, Any] = {"winner_model_a": " A", "winner_model_b": ["no", "x"], "winner_tie": "not"}
    config = ends_in(label_config(), "\nVerdict\n", **words)
    with pytest.raises(ConfigError) as error:
        open_inputs(config)
    text = str(error.value)
    assert "winner_model_a=' A' begins with a blank behind a text that ends in white space; give 'A'" in text
    assert "winner_model_b='no' has the first tokens of 'not', the word of winner_tie; end both in a sign" in text
    assert "winner_model_b='x'" not in text
    assert "label_words.winner_tie" not in text
    assert "whose text ends in '\\nVerdict\\n'" in text
    with pytest.raises(ConfigError, match="begins with a blank"):
        build(config, CPU)


@pytest.mark.parametrize(
    ("ending", "words", "message"),
    [
        ("\nVerdict:", {}, r"winner_tie='t' begins without a blank behind a text that ends in ':'; give ' t'"),
        ("\nVerdict\n", {"winner_tie": "  "}, r"winner_tie='  ' is blank"),
    ],
)
def test_a_word_follows_the_text_as_words_do(label_config: MakeConfig, ending: str, words: Any, message: str) -> None:
    config = ends_in(label_config(), ending, **words)
    with pytest.raises(ConfigError, match=message):
        open_inputs(config)


LABELS = {"task": {"name": "t", "fields": ["text"], "classes": ["u", "v"], "multi_label": True}}
YES_NO = {"readout": "label_tokens", "label_words": {"yes": "yes", "no": "no"}}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": {"readout": "label_tokens"}}, "needs label_words, a word for each class"),
        ({"model": {**TOKENS, "pooling": "mean"}}, "not pooling=mean; set pooling=last"),
        ({"model": {**TOKENS, "label_words": {**WORDS, "winner_tie": []}}}, "needs label_words, a word for each class"),
        ({"model": {**TOKENS, "label_scoring": "joint", "lora": None}}, "trains the base away"),
        ({"model": TOKENS, "train": {"head_learning_rate": 0.1}}, "has no trained head"),
        ({"train": {"loss": "vocabulary"}}, "model.readout=head gives none"),
        ({"train": {"max_steps": 0}}, "leaves the head of model.readout=head at random"),
        (
            {**LABELS, "model": {"readout": "label_tokens", "label_words": {"u": "a", "v": "b"}}},
            r"it must name each answer: \['yes', 'no'\]",
        ),
        ({**LABELS, "model": YES_NO, "train": {"layout": "padded"}}, "text once for all labels: set train.layout"),
        (
            {**LABELS, "model": YES_NO, "approach": "prompt", "prompt": {"template": "{text}\n"}},
            r"prompt.template must contain \{label\} exactly once",
        ),
        (
            {**LABELS, "model": YES_NO, "inputs": {"template": {"text": "{label}: {text}!"}}},
            r"must have \{label\} behind the other fields: .* once for all labels",
        ),
        (
            {**LABELS, "model": YES_NO, "inputs": {"template": {"text": "{text}!"}}},
            r"must contain \{label\} exactly once",
        ),
        ({**LABELS, "model": YES_NO, "inputs": {"template": {"labels": {"u": "a"}}}}, "must give each class a text"),
        ({**LABELS, "model": YES_NO, "inputs": {"template": {"labels": {"u": "a", "v": "a"}}}}, "a text of its own"),
        ({"inputs": {"template": {"labels": {"u": "a"}}}}, "inputs.template.labels changes nothing"),
        ({"task": {**LABELS["task"], "fields": ["label"]}, "model": YES_NO}, r"\{label\} is a label's place"),
    ],
)
def test_settings_that_contradict_the_readout_are_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(tree)


def test_an_lm_head_that_is_quantised_or_unknown_is_refused(label_config: MakeConfig) -> None:
    config = label_config()
    backbone = build(config, CPU).backbone
    backbone.config.vocab_size, embedding = 300, backbone.get_input_embeddings()  # type: ignore[operator, union-attr]
    embedding.weight = torch.nn.Parameter(embedding.weight[:300].detach(), requires_grad=False)
    with pytest.raises(ModelError, match=r"its shape is \[320, 64\], that of the embedding \[300, 64\]"):
        lm_head_of(config.model.base, backbone, "model.readout")
    backbone.config.model_type = "xlnet"  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="what a xlnet does to the scores of its LM head is not known"):
        lm_head_of(config.model.base, backbone, "model.readout")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("readout", ["head", "label_tokens"])
def test_a_word_that_the_base_has_no_embedding_for_is_refused(
    label_config: MakeConfig, readout: str, tied: bool
) -> None:
    config = label_config(tied=tied)
    tokenizer = AutoTokenizer.from_pretrained(config.model.base)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<{n}>" for n in range(len(tokenizer), 321)]})
    tokenizer.save_pretrained(config.model.base)
    config = ends_in(config, "\n", winner_tie="<320>")
    open_inputs(config)  # no text has a control token
    config.model.readout = readout  # type: ignore[assignment]
    with pytest.raises(ModelError, match="'<320>' is a token that the base has no embedding for"):
        build(config, CPU)


# --- labels of several tokens ----------------------------------------------------------------------------------------

LONGER: dict[str, Any] = {"winner_model_a": ["ab", "B"], "winner_model_b": "acd", "winner_tie": ["tie", "ae"]}


def brute_force(config: Config, ids: np.ndarray[Any, np.dtype[np.int32]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Log-probabilities `(C,)` of the labels behind a text, each word's tokens fed to the LM one after the other."""
    lm = AutoModelForCausalLM.from_pretrained(config.model.base, dtype=torch.float32).eval()
    tokenizer = open_inputs(config).builder.tokenizer
    given = config.model.label_words
    words = {name: [ids.tolist() for ids in tokenizer(given[name], special=False)] for name in given}
    every = [word for synonyms in words.values() for word in synonyms]

    def log_probability(word: list[int]) -> float:
        total = 0.0
        for place, token in enumerate(word):
            with torch.inference_mode():
                scores = lm(torch.tensor([[*ids.tolist(), *word[:place]]])).logits[0, -1].double()
            if config.model.label_scoring == "trie":
                children = {other[place] for other in every if other[:place] == word[:place]}
                scores = scores.where(torch.isin(torch.arange(len(scores)), torch.tensor([*children])), -torch.inf)
            total += float(scores.log_softmax(dim=-1)[token])
        return total

    return np.array([logsumexp([log_probability(word) for word in words[name]]) for name in config.task.classes])


@pytest.mark.parametrize("scoring", ["trie", "joint"])
def test_words_of_several_tokens_are_as_likely_as_all_of_them_in_sequence(
    label_config: MakeConfig, tmp_path: Path, scoring: str
) -> None:
    config = label_config("gemma2", tied=True, final_logit_softcapping=0.5, initializer_range=0.3)
    model = {**config.model.model_dump(), "label_words": LONGER, "label_scoring": scoring, "lora": None}
    config = resolve({"model": model, "inputs": {"max_length": 160}, "train": {"max_steps": 0, "layout": "shared"}})
    classifier, builder = build(config, CPU).eval(), open_inputs(config).builder
    encoded = builder.encode(make_rows(3))
    assert max(len(orders[0].ids) for orders in encoded) <= 160
    items = items_of(encoded, orders=1)
    logits = score(classifier, items, tokens_per_batch=2_000)
    expected = np.stack([brute_force(config, branches_of(item.ids)[0]) for item in items])
    assert np.ptp(expected, axis=1).min() > 0.05
    assert np.abs(logits - expected).max() <= 1e-5
    if scoring == "trie":
        assert np.abs(np.exp(logits).sum(axis=1) - 1).max() <= 1e-6
    batch = shared(items)
    assert (logits_of(classifier, batch) - logits_of(classifier, batch, trim=True)).abs().max() <= 1e-5
    loaded = load_classifier(bundle_of(config, classifier, tmp_path / "bundle"), CPU)
    assert np.array_equal(score(loaded, items, tokens_per_batch=2_000), logits)


def test_labels_of_several_tokens_are_laid_out_as_branches_alone(label_config: MakeConfig) -> None:
    config = ends_in(label_config(), "\n", **LONGER)
    with pytest.raises(ModelError, match=r"a row has 5 branches[\s\S]*set train.layout=shared"):
        build(config, CPU)
    assert build(override(config, ["train.layout=shared"]), CPU).head.branches == 5


# --- untrained, and the label mass -----------------------------------------------------------------------------------


def bundle_of(config: Config, classifier: Classifier, folder: Path, rows: Sequence[Row] | None = None) -> Bundle:
    settled, tokenizer, builder, _ = open_inputs(config)
    rows = rows or make_rows(4)
    items = items_of(builder.encode(rows), orders=2)
    probes = pick_probes(rows, by_order(items, score(classifier, items, tokens_per_batch=2_000), len(rows)))
    write_model(folder, classifier, settled, tokenizer, probes=probes)
    return open_bundle(folder)


def test_untrained_label_tokens_are_a_bundle_without_weights(label_config: MakeConfig, tmp_path: Path) -> None:
    config = label_config(train={"max_steps": 0})
    assert config.model.lora is None
    classifier = build(config, CPU).eval()
    bundle = bundle_of(config, classifier, tmp_path / "bundle")
    assert bundle.manifest.weights == "base"
    assert bundle.manifest.needs_base
    assert {path.name for path in bundle.folder.rglob("*.safetensors")} == {"head.safetensors"}
    assert load_file(bundle.files.head)["weight"].shape == (3, 64)
    loaded = load_classifier(bundle, CPU)
    batch = BATCH_LAYOUTS["packed"].lay_out(related_items())
    assert torch.equal(logits_of(loaded, batch), logits_of(classifier, batch))
    ((_, verified),) = verify([bundle.folder], None, None)
    assert verified["rows"] == 4
    with pytest.raises(BundleError, match=r"weights: base, and config.yaml says .* train.max_steps: 9"):
        load_classifier(Bundle(bundle.folder, bundle.manifest, override(bundle.config, ["train.max_steps=9"])), CPU)


@pytest.mark.parametrize("low", [0.0, 0.5])
def test_label_mass_is_the_labels_share_of_the_vocabulary(
    label_config: MakeConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, low: float
) -> None:
    monkeypatch.setattr(vocabulary, "LOW_MASS", low)
    monkeypatch.setattr(vocabulary, "ROWS", 4)
    config = label_config(train={"max_steps": 0})
    encoded = open_inputs(config).builder.encode(make_rows(4))
    mass = vocabulary.label_mass(config, build(config, CPU), encoded)
    lm = AutoModelForCausalLM.from_pretrained(config.model.base, dtype=torch.float32).eval()
    with torch.inference_mode():
        shares = [lm(torch.from_numpy(row[0].ids).long()[None]).logits[0, -1].softmax(-1) for row in encoded]
    assert mass == pytest.approx(float(torch.stack(shares)[:, token_ids(config)].sum(dim=1).mean()), rel=1e-5)
    printed = capsys.readouterr().err
    assert "on 4 rows" in printed
    assert ("warning: the label mass" in printed) == (low > 0)
    plain = config.model_copy(update={"model": config.model.model_copy(update={"readout": "head"})})
    assert vocabulary.label_mass(plain, build(plain, CPU), encoded) is None


# --- several labels at once ------------------------------------------------------------------------------------------


def yes_no_config(base: str, text: str, words: dict[str, Any], *, max_steps: int | None = 0, **model: Any) -> Config:
    """Of three labels, each with a text of its own; or of the question about one of them, which `text` spells out."""
    task: dict[str, Any] = {"name": "topics", "fields": ["text"], "classes": ["yes", "no"], "label_column": "l"}
    template: dict[str, Any] = {"text": text}
    if "{label}" in text:
        task |= {"classes": list(TOPICS), "label_column": None, "multi_label": True}
        template["labels"] = TOPICS
    tokens = {"base": base, "quantization": "none", "readout": "label_tokens", "label_words": words, "lora": None}
    inputs = {"max_length": 220, "template": template}
    train = {"max_steps": max_steps, "layout": "shared"}
    return resolve({"task": task, "inputs": inputs, "model": {**tokens, **model}, "train": train})


TOPICS = {"a_b": "the sea", "c": "sky", "d": "law { and order"}
QUESTION = "{text}\n\nIs it about {label}?\n"
TEXTS = [Row(str(number), {"text": (text,)}) for number, text in enumerate(["So it is.", "a b " * 300, "", "Why not?"])]


@pytest.mark.parametrize(
    ("words", "scoring"),
    [
        ({"no": "N", "yes": ["yes", "Y"]}, "trie"),
        ({"yes": "yes!", "no": ["no", "N"]}, "joint"),
        ({"yes": "Y", "no": "N"}, "joint"),
    ],
)
def test_yes_or_no_for_each_label_is_what_each_label_has_alone(
    label_config: MakeConfig, tmp_path: Path, words: dict[str, Any], scoring: str
) -> None:
    base = label_config("gemma2", tied=True, final_logit_softcapping=0.5, initializer_range=0.3).model.base
    config = yes_no_config(base, QUESTION, words, label_scoring=scoring)
    classifier, builder = build(config, CPU).eval(), open_inputs(config).builder
    encoded = builder.encode(TEXTS)
    assert len(encoded[1][0].ids) <= 220
    assert encoded[1][0].dropped["text"]
    items = items_of(encoded, orders=2)
    nodes, expected = classifier.head.branches // 3, np.zeros((len(items), 3, 2))
    for column, topic in enumerate(TOPICS.values()):
        alone = yes_no_config(base, QUESTION.replace("{label}", topic), words, label_scoring=scoring)
        texts = open_inputs(alone).builder.encode(TEXTS)
        for item in items:
            ids = branches_of(item.ids)[column * nodes]
            assert item.row == 1 or np.array_equal(ids, branches_of(texts[item.row][0].ids)[0])
            expected[item.row, column] = brute_force(alone, ids)
    apart = expected[..., 0] - expected[..., 1]
    assert np.ptp(apart, axis=0).min() > 0.05
    assert np.ptp(apart, axis=1).min() > 0.01
    logits = score(classifier, items, tokens_per_batch=2_000)
    assert np.abs(logits - apart).max() <= 1e-5
    if scoring == "joint":
        head, lm = classifier.head, lm_head_of(base, classifier.backbone, "a test")
        assert isinstance(head, LabelTokenHead)
        with over_vocabulary(head, lm, mass=True):
            mass = score(classifier, items, tokens_per_batch=2_000)
        assert np.abs(np.exp(mass) - np.exp(expected).sum(axis=2)).max() <= 1e-5
        assert vocabulary.label_mass(config, classifier, encoded) == pytest.approx(np.exp(mass).mean())
        targets, batch = torch.rand(len(items), 3), shared(items)
        with over_vocabulary(head, lm):
            assert np.abs(score(classifier, items, tokens_per_batch=2_000) - apart).max() <= 1e-5, "in evaluations"
            head.train()
            losses = LOSSES["vocabulary"](logits_of(classifier, batch), targets, config.task)
            head.eval()
        wanted = -(targets * expected[..., 0] + (1 - targets) * expected[..., 1]).sum(dim=1)
        assert (losses - wanted).abs().max() <= 1e-4
        assert (losses - LOSSES["labels"](logits_of(classifier, batch), targets, config.task)).min() > 0.1
    batch = shared(items)
    assert (logits_of(classifier, see_the_siblings(batch)) - torch.from_numpy(apart)).abs().max() > 0.001
    loaded = load_classifier(bundle_of(config, classifier, tmp_path / "bundle", TEXTS), CPU)
    assert np.array_equal(score(loaded, items, tokens_per_batch=2_000), logits)


def test_gradients_of_labels_are_those_of_each_label_alone(label_config: MakeConfig) -> None:
    config = yes_no_config(label_config().model.base, QUESTION, {"yes": "Y", "no": "N"}, max_steps=1, lora={"r": 2})
    classifier = as_built(config)
    items = items_of(open_inputs(config).builder.encode(TEXTS), orders=1)
    alone = [Item(0, 0, branch) for item in items for branch in branches_of(item.ids)]
    targets = torch.tensor([[1, 0, 1], [0, 0, 1], [0, 1, 0], [0, 0, 0.5]])
    weights = [weight for weight in classifier.parameters() if weight.requires_grad]
    batch = shared(items)
    loss = LOSSES["labels"](classifier(batch.inputs, batch.read_at, batch.lengths), targets, config.task).sum()
    states = [classifier.backbone(input_ids=torch.from_numpy(one.ids).long()[None]) for one in alone]
    edges = torch.cat([state.last_hidden_state[:, -1] for state in states]) @ classifier.head.get_parameter("weight").T
    tokens = open_inputs(config).builder.tokenizer(["Y", "N"], special=True)
    yes, no = (edges[:, int(rank)] for rank in np.argsort(np.argsort([int(ids[0]) for ids in tokens])))
    logits = (yes - no).view(-1, 3)
    expected = torch.nn.BCEWithLogitsLoss(reduction="sum")(logits, targets)
    assert float((loss - expected).abs()) <= 1e-4
    pairs = list(zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True))
    largest = max(float(theirs.abs().max()) for _, theirs in pairs)
    assert largest > 1e-3
    assert max(float((ours - theirs).abs().max()) for ours, theirs in pairs) <= 1e-5 * max(1.0, largest)


def test_one_label_is_asked_for_without_branches(label_config: MakeConfig) -> None:
    config = yes_no_config(label_config().model.base, QUESTION, {"yes": "Y", "no": "N"})
    one = config.model_dump(exclude={"classical", "prompt"})
    one["task"]["classes"], one["inputs"]["template"]["labels"] = ["c"], {"c": "sky"}
    shown = show(open_inputs(config), TEXTS[0], coloured=False)[0].plain
    assert shown.count("⟨branch⟩") == 3
    assert all(f"{topic}?\n" in shown for topic in TOPICS.values())
    (encoded,) = open_inputs(resolve(one)).builder.encode(TEXTS[:1])
    assert branches_of(encoded[0].ids)[0] is encoded[0].ids
    assert np.array_equal(encoded[0].ids, branches_of(open_inputs(config).builder.encode(TEXTS)[0][0].ids)[1])


def test_a_word_is_checked_behind_each_labels_text(label_config: MakeConfig) -> None:
    config = yes_no_config(label_config().model.base, "{text} It is {label}.", {"yes": " yes", "no": "No"})
    with pytest.raises(
        ConfigError, match=r"label_words.no='No' begins without a blank behind a text that ends in '\.'"
    ):
        open_inputs(config)


# --- rewards ---------------------------------------------------------------------------------------------------------


def reward_config(config_for: MakeConfig, kind: str = "llama", task: str = "lmsys", **model: Any) -> Config:
    config = config_for(kind, model={"readout": "reward", **model}).model_dump(exclude={"classical", "task"})
    return resolve({**config, "task": task, "inputs": {"max_length": 160}})


def reward_classifier(config: Config) -> Classifier:
    classifier = as_built(config)
    with torch.no_grad():
        classifier.head.get_parameter("tie").fill_(0.4)
    return classifier


def rows_of(config: Config) -> list[Row]:
    """Short and long ones: a side that is cut, an empty one, two equal ones."""
    texts = [("How?", "So.", "Or so, at length."), ("x" * 30, "a" * 300, "b" * 9), ("", "", "b"), ("Why" * 9, "c", "c")]
    sides = [dict(zip(config.task.fields, ((text,) for text in row), strict=True)) for row in texts]
    return [Row(str(number), fields) for number, fields in enumerate(sides)]


def rewards_alone(config: Config, classifier: Classifier, rows: list[Row]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`(N, 2)`: the head's product with the last state of prompt and one side, in a forward pass of its own."""
    builder = open_inputs(config).builder
    states = []
    for (sequence,) in builder.encode(rows):
        for ids in branches_of(sequence.ids):
            batch = padded([Item(0, 0, ids)])
            inputs = {name: part for name, part in batch.inputs.items() if isinstance(part, torch.Tensor)}
            with torch.inference_mode():
                states.append(classifier.backbone(**inputs).last_hidden_state[0, -1])
    weight = classifier.head.get_parameter("weight").detach()[0]
    return (torch.stack(states).float() @ weight).double().numpy().reshape(-1, 2)


def tied(rewards: Any, model: str, tie: float) -> Any:
    """Probabilities of A, B and a tie, `(N, 3)`, as the papers write them."""
    a, b = np.exp(rewards[:, 0]), np.exp(rewards[:, 1])
    if model == "davidson":
        strengths = np.stack([a, b, np.exp(tie) * np.sqrt(a * b)], axis=1)
        return strengths / strengths.sum(axis=1, keepdims=True)
    theta = 1 + np.exp(tie)
    ties = (theta**2 - 1) * a * b / ((a + theta * b) * (b + theta * a))
    return np.stack([a / (a + theta * b), b / (b + theta * a), ties], axis=1)


@pytest.mark.parametrize(("kind", "ties"), [("llama", "davidson"), ("gemma2", "rao_kupper")])
def test_one_pass_over_both_sides_gives_the_rewards_of_each_alone(config_for: MakeConfig, kind: str, ties: str) -> None:
    config = reward_config(config_for, kind, tie_model=ties)
    classifier, rows = reward_classifier(config), rows_of(config)
    rewards = rewards_alone(config, classifier, rows)
    assert np.ptp(rewards) > 0.1
    items = items_of(open_inputs(config).builder.encode(rows), orders=2)
    logits = score(classifier, items, tokens_per_batch=2_000)
    assert np.abs(probabilities(logits, config.task) - tied(rewards, ties, 0.4)).max() <= 1e-5
    assert np.abs(logits[:, :2].sum(axis=1) - rewards.sum(axis=1)).max() <= 1e-4
    batch = shared(items)
    assert (logits_of(classifier, batch) - logits_of(classifier, batch, trim=True)).abs().max() <= 1e-5


@pytest.mark.parametrize(("task", "ties"), [("lmsys", None), ("lmsys", "rao_kupper"), ("wsdm", None)])
def test_swapped_rows_permute_the_logits_in_one_pass(config_for: MakeConfig, task: str, ties: str | None) -> None:
    config = reward_config(config_for, task=task, tie_model=ties)
    classifier, rows, builder = reward_classifier(config), rows_of(config), open_inputs(config).builder
    assert [len(orders) for orders in builder.encode(rows)] == [1] * len(rows)
    logits, swapped = (
        score(classifier, items_of(builder.encode(shown), orders=2), tokens_per_batch=2_000)
        for shown in (rows, [config.task.swap_row(row) for row in rows])
    )
    assert np.ptp(logits, axis=0).max() > 0.1
    assert np.abs(swapped - logits[:, list(config.task.swapped_columns)]).max() <= 1e-6
    expected = tied(rewards_alone(config, classifier, rows), ties or "davidson", -np.inf if task == "wsdm" else 0.4)
    assert np.abs(probabilities(logits, config.task) - expected[:, : len(config.task.classes)]).max() <= 1e-5


def test_a_pass_over_both_sides_computes_at_most_a_part_of_two_orders(config_for: MakeConfig) -> None:
    reward, head = reward_config(config_for), config_for("llama")
    rows = rows_of(reward)
    items = {config.model.readout: open_inputs(config).builder.encode(rows) for config in (reward, head)}
    tokens = {
        name: BATCH_LAYOUTS[layout].lay_out(items_of(items[name], orders=2)).inputs["input_ids"]
        for name, layout in (("reward", "shared"), ("head", "packed"))
    }
    assert tokens["reward"].numel() <= 0.6 * tokens["head"].numel()  # type: ignore[union-attr]
    planned = {name: int(index_sequences(encoded).lengths.sum()) for name, encoded in items.items()}
    assert planned["reward"] <= 0.6 * planned["head"]
    assert max(len(sequence.ids) for (sequence,) in items["reward"]) == 160, "the longest row is cut to the budget"


def test_gradients_of_shared_prompts_are_those_of_each_side_alone(config_for: MakeConfig) -> None:
    config = reward_config(config_for)
    classifier, rows = reward_classifier(config), rows_of(config)
    (encoded,) = zip(*open_inputs(config).builder.encode(rows), strict=True)
    items = [Item(row, 0, sequence.ids) for row, sequence in enumerate(encoded)]
    alone = [Item(0, 0, branch) for item in items for branch in branches_of(item.ids)]
    targets = torch.eye(3)[[0, 1, 2, 0]]
    weights = [weight for weight in classifier.parameters() if weight.requires_grad]
    batch = shared(items)
    loss = LOSSES["labels"](classifier(batch.inputs, batch.read_at, batch.lengths), targets, config.task).sum()
    states = [classifier.backbone(input_ids=torch.from_numpy(one.ids).long()[None]) for one in alone]
    logits = classifier.head(torch.cat([state.last_hidden_state[:, -1] for state in states]))
    expected = LOSSES["labels"](logits, targets, config.task).sum()
    pairs = zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True)
    assert max(float((ours - theirs).abs().max()) for ours, theirs in pairs) <= 1e-5


def test_centred_rewards_add_the_square_of_their_sum(config_for: MakeConfig) -> None:
    config = reward_config(config_for)
    rows = [replace(row, target=(1.0, 0.0, 0.0), weight=2.0) for row in rows_of(config)]
    examples = make_examples(rows, open_inputs(config).builder.encode(rows), config)
    batch = shared([Item(row, 0, examples.encoded[row][0].ids) for row in range(len(rows))])
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.5, -0.5, 3.0], [0.0, 0.0, 1.0], [-1.0, 0.0, 0.0]])
    centred = override(config, ["train.center_rewards_coefficient=0.1"])
    apart = batch_loss(logits, batch, examples, centred) - batch_loss(logits, batch, examples, config)
    assert float(apart) == pytest.approx(0.1 * 2 * (9 + 0 + 0 + 1), rel=1e-5)


REWARD = {"readout": "reward"}
FOUR = {"name": "t", "fields": ["p", "x", "y"], "classes": ["a", "b", "c", "d"], "swap_fields": ["x", "y"]}
TEXT = {"text": "{response} {prompt}!"}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({**LABELS, "model": REWARD}, r"the task t has swap_fields None and 2 classes; set model.readout=head"),
        ({"task": {**FOUR, "swap_classes": ["a", "b"], "label_column": "l"}, "model": REWARD}, "and 4 classes"),
        ({"task": "wsdm", "model": {**REWARD, "tie_model": "davidson"}}, "the task wsdm has only"),
        ({"model": {"tie_model": "davidson"}}, "changes nothing with readout=head"),
        ({"model": {**REWARD, "head": "two_layer"}}, "reads neither head nor label_words"),
        ({"train": {"center_rewards_coefficient": 0.1}}, "changes nothing with model.readout=head"),
        ({"model": REWARD, "train": {"swap": "random"}}, "model.readout=reward sees one at a time"),
        ({"model": REWARD, "train": {"layout": "padded"}}, "set train.layout=shared and predict.layout=auto"),
        ({"model": REWARD, "predict": {"layout": "packed"}}, "set train.layout=shared and predict.layout=auto"),
        ({"model": REWARD, "inputs": {"template": {"turns": "interleaved"}}}, "turns=interleaved shows both sides"),
        ({"model": REWARD, "inputs": {"template": TEXT}}, r"must have \{response\} behind the other fields"),
        ({"model": REWARD, "inputs": {"template": {"text": "{prompt} {response_a}!"}}}, r"must contain \{response\}"),
        ({"model": REWARD, "train": {"max_steps": 0}}, "leaves the head of model.readout=reward at random"),
    ],
)
def test_settings_that_contradict_a_reward_are_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(tree)


def test_a_base_that_shares_no_tokens_gives_no_rewards(config_for: MakeConfig) -> None:
    config = reward_config(config_for)
    classifier = reward_classifier(config)
    classifier.isolation = classifier.isolation._replace(shared="of its chunks")
    with pytest.raises(ModelError, match="no layout is legal: of its chunks"):
        ClassifierScorer(classifier)


def test_show_marks_where_each_side_begins(config_for: MakeConfig) -> None:
    config = reward_config(config_for)
    (shown,) = show(open_inputs(config), rows_of(config)[0], coloured=False)
    _, prompt, first, second = re.split("⟨prompt⟩|⟨branch⟩", shown.plain.split("\n", 2)[2])
    assert "How?" in prompt
    assert "⟨response_a⟩So." in first
    assert "⟨response_b⟩Or so, at length." in second


@pytest.mark.parametrize("readout", ["label_tokens", "reward"])
def test_rows_of_any_size_are_scored_by_themselves(
    config_for: MakeConfig, label_config: MakeConfig, readout: str
) -> None:
    config = reward_config(config_for) if readout == "reward" else ends_in(label_config(), "\n")
    classifier, builder = build(config, CPU).eval(), open_inputs(config).builder
    empty, long = dict.fromkeys(config.task.fields, ("",)), dict.fromkeys(config.task.fields, ("a" * 100_000,))
    for fields in (empty, long, dict.fromkeys(config.task.fields, (None, ""))):
        (orders,) = builder.encode([Row("1", fields)])
        assert len(orders) == config.orders
        assert len(orders[0].ids) <= 160
        logits = score(classifier, items_of([orders], orders=2), tokens_per_batch=2_000)
        assert np.isfinite(logits).all()
        a, b, _ = probabilities(logits, config.task)[0]
        assert (abs(a - b) < 1e-6) == (readout == "reward"), "the sides are equal"
