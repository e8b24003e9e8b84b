"""Encoder-decoders: the decoder's first state, its logits of label words, and the encoder's mean, in every layout."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from bundles_support import write_model
from encoder_decoders_support import KINDS, WINDOW, closing_tokenizer, tiny_encoder_decoder
from models_support import as_built, logits_of, one_at_a_time
from safetensors.torch import load_file
from tests_support import make_rows
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from pairclf.bundles.bundle import open_bundle
from pairclf.bundles.probes import pick_probes
from pairclf.config import Config, resolve
from pairclf.errors import ConfigError, ModelError
from pairclf.inference.verify import verify
from pairclf.inputs.builder import trie_of
from pairclf.inputs.sequences import Item
from pairclf.model import families, lm_head
from pairclf.model.backbone import checkpoint_gradients
from pairclf.model.cost import cost_of, cost_of_model, model_bytes
from pairclf.model.engine import Classifier, build, require_base
from pairclf.model.inputs import open_inputs
from pairclf.model.layouts import BATCH_LAYOUTS, padded
from pairclf.model.lm_head import lm_head_of
from pairclf.model.precision import LinearInFloat32
from pairclf.model.readout import LabelTokenHead, over_vocabulary
from pairclf.model.scoring import ClassifierScorer, by_order, items_of, score
from pairclf.model.weights import load_classifier
from pairclf.task import Row

CPU = torch.device("cpu")
WORDS = {"winner_model_a": "A", "winner_model_b": "B", "winner_tie": "t"}
WAYS: dict[str, dict[str, Any]] = {
    "head": {},
    "label_tokens": {"readout": "label_tokens", "label_words": WORDS},
    "mean": {"pooling": "mean"},
}
"""Of the encoder-decoder's three ways to logits, the settings of `model`."""

NO_MEAN = ("t5gemma2", "mean")
"""transformers has no class of its encoder without the decoder."""

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        tiny_encoder_decoder(kind, folder)
        return folder

    return make


@pytest.fixture(scope="module")
def config(base: Callable[[str], Path]) -> MakeConfig:
    """`config("t5", "head", model={...}, train={...})`."""

    def make(kind: str, way: str = "head", **sections: dict[str, Any]) -> Config:
        model = {"base": str(base(kind)), "quantization": "none", "lora": {"r": 4, "lora_dropout": 0.0}}
        tree: dict[str, dict[str, Any]] = {
            "inputs": {"max_length": 160},
            "model": {**model, **WAYS[way]},
            "train": {"layout": "padded"},
        }
        for name, section in sections.items():
            tree[name] = {**tree.get(name, {}), **section}
        return resolve(tree)

    return make


@pytest.fixture(scope="module")
def classifier(config: MakeConfig) -> Callable[[str, str], Classifier]:
    return cache(lambda kind, way: as_built(config(kind, way)))


def items() -> list[Item]:
    """From one token to more than a window of T5Gemma's, with the ids of `</s>` and of pad among the text."""
    random = np.random.default_rng(0)
    lengths = [1, 2, 7, 8, 9, 30, 5]
    return [Item(row, row % 2, random.integers(0, 320, length, dtype=np.int32)) for row, length in enumerate(lengths)]


# --- equality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "way"), [(kind, way) for kind in KINDS for way in WAYS if (kind, way) != NO_MEAN])
def test_legal_layouts_score_each_row_as_alone_with_stock_attention(
    classifier: Callable[[str, str], Classifier], config: MakeConfig, kind: str, way: str
) -> None:
    made = classifier(kind, way)
    alone = one_at_a_time(as_built(config(kind, way, model={"attn_implementation": "eager"})), items())
    assert alone.std(dim=0).min() > 1e-2, "the rows are told apart"
    legal = [name for name in BATCH_LAYOUTS if made.why_not(name) is None]
    assert legal == ["padded"]
    for name in legal:
        assert (logits_of(made, BATCH_LAYOUTS[name].lay_out(items())) - alone).abs().max() <= 1e-5


def gradients(made: Classifier, rows: list[Item]) -> tuple[float, dict[str, torch.Tensor]]:
    """Of a loss that is a sum over rows: of one forward pass, or of a pass for each row."""
    made.zero_grad()
    batch = padded(rows)
    losses = made(batch.inputs, batch.read_at, batch.lengths).log_softmax(dim=1)[:, 0]
    losses.sum().backward()
    return float(losses.sum()), {
        name: weight.grad for name, weight in made.named_parameters() if weight.grad is not None
    }


@pytest.mark.parametrize(
    ("kind", "way", "checkpointing"),
    [
        ("t5", "head", True),
        ("t5_v1_1", "label_tokens", False),
        ("t5gemma", "head", False),
        ("t5gemma", "mean", True),
        ("t5gemma2", "head", False),
        ("t5", "mean", False),
    ],
)
def test_loss_and_gradients_of_a_batch_are_the_sums_over_rows_alone(
    config: MakeConfig, kind: str, way: str, checkpointing: bool
) -> None:
    made = as_built(config(kind, way))
    alone = [gradients(made, [row]) for row in items()]
    if checkpointing:
        checkpoint_gradients(made.backbone)
        made.train()
    loss, together = gradients(made, items())
    assert loss == pytest.approx(sum(one for one, _ in alone), abs=1e-5)
    adapters = [name for name in together if "lora_" in name]
    assert len(adapters) == sum("lora_" in name for name, _ in made.named_parameters())
    for name, gradient in together.items():
        expected = sum(one[name] for _, one in alone)
        assert (gradient - expected).abs().max() <= 1e-5 * max(1.0, float(gradient.abs().max()))


def _see_padding(inputs: Any) -> Any:
    return {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}


def _shuffle(inputs: Any) -> Any:
    """As if positions had no say: the first two tokens change places."""
    ids = inputs["input_ids"].clone()
    ids[:, :2] = ids[:, :2].flip(1)
    return {**inputs, "input_ids": ids}


@pytest.mark.parametrize("way", ["head", "mean"])
@pytest.mark.parametrize("kind", ["t5", "t5_v1_1", "t5gemma"])
@pytest.mark.parametrize("spoil", [_see_padding, _shuffle])
def test_padding_that_is_seen_and_tokens_in_other_places_change_logits(
    classifier: Callable[[str, str], Classifier], kind: str, way: str, spoil: Callable[[Any], Any]
) -> None:
    made, batch = classifier(kind, way), padded(items())
    right = logits_of(made, batch)
    with torch.inference_mode():
        wrong = made(spoil(batch.inputs), batch.read_at, batch.lengths)
    assert (right - wrong).abs().max() > 1e-3


def test_a_wrong_window_changes_logits(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    made, batch = as_built(config("t5gemma")), padded(items())
    right = logits_of(made, batch)
    encoder: Any = made.backbone.encoder
    assert encoder.config.sliding_window == WINDOW
    monkeypatch.setattr(encoder.config, "sliding_window", WINDOW - 2)
    assert (logits_of(made, batch) - right).abs().max() > 1e-3


def test_the_decoder_begins_with_the_token_that_the_config_names(config: MakeConfig) -> None:
    for kind, start in {"t5": 0, "t5gemma": 2}.items():
        made = as_built(config(kind))
        settings: Any = made.backbone.config
        assert families.start_token(settings) == start
        right = logits_of(made, padded(items()))
        settings.decoder_start_token_id = 7
        assert families.start_token(settings) == 7
        assert (logits_of(made, padded(items())) - right).abs().max() > 1e-3
        settings.decoder_start_token_id = settings.pad_token_id = settings.get_text_config().bos_token_id = None
        with pytest.raises(ModelError, match="names no token that the decoder begins with"):
            families.start_token(settings)


def test_of_the_mean_no_decoder_is_loaded(
    classifier: Callable[[str, str], Classifier], config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    build(config("t5gemma", "mean"), CPU)
    assert "UNEXPECTED" not in capsys.readouterr().err, "nobody is told of weights that are left where they are"
    for kind in ("t5", "t5gemma"):
        whole, half = (
            sum("decoder." in name for name, _ in classifier(kind, way).named_modules()) for way in ("head", "mean")
        )
        assert whole > 10
        assert half == 0


# --- label words -----------------------------------------------------------------------------------------------------


def lm_logits(config: Config) -> torch.Tensor:
    """Of transformers' own model with an LM head, `(R, V)`, at the first place of its decoder, each row alone.

    Left without a mask, T5Gemma takes the id of pad in a text for padding.
    """
    lm = AutoModelForSeq2SeqLM.from_pretrained(config.model.base, dtype=torch.float32).eval()
    start = torch.tensor([[families.start_token(lm.config)]])
    rows = [torch.from_numpy(row.ids).long()[None] for row in items()]
    with torch.inference_mode():
        logits = [lm(ids, attention_mask=torch.ones_like(ids), decoder_input_ids=start).logits[:, 0] for ids in rows]
    return torch.cat(logits)


def label_ids(config: Config) -> list[int]:
    builder = open_inputs(config).builder
    return [int(builder.tokenizer([word], special=False, start=True)[0][0]) for word in WORDS.values()]


@pytest.mark.parametrize("kind", KINDS)
def test_label_words_have_the_logits_of_the_lm(config: MakeConfig, kind: str) -> None:
    settled = config(kind, "label_tokens", model={"lora": None})
    made, expected, ids = build(settled, CPU).eval(), lm_logits(settled), label_ids(settled)
    assert expected[:, ids].std(dim=0).min() > 1e-2
    batch = padded(items())
    allowed = 1e-5 * max(1.0, float(expected.abs().max()))
    assert (logits_of(made, batch) - expected[:, ids]).abs().max() <= allowed
    assert isinstance(made.head, LabelTokenHead)
    with over_vocabulary(made.head, lm_head_of(settled.model.base, made.backbone, "a test")):
        assert (logits_of(made, batch) - expected.log_softmax(dim=1)[:, ids]).abs().max() <= allowed


def _without_scale(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lm_head, "SCALES_STATES", ())


def _tied_after_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lm_head, "_open", lambda source, part: None)


def _with_scale(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lm_head, "_scale_of", lambda config: 0.125)


def _without_cap(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lm_head, "AFTERWARDS", {})


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [("t5", _without_scale), ("t5_v1_1", _tied_after_all), ("t5_v1_1", _with_scale), ("t5gemma", _without_cap)],
)
def test_a_wrong_lm_head_has_other_logits(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, kind: str, spoil: Callable[[pytest.MonkeyPatch], None]
) -> None:
    settled = config(kind, "label_tokens")
    spoil(monkeypatch)
    wrong = logits_of(build(settled, CPU).eval(), padded(items()))
    assert (wrong - lm_logits(settled)[:, label_ids(settled)]).abs().max() > 1e-3


def with_words(config: MakeConfig, **words: Any) -> Config:
    return config("t5", "label_tokens", model={"label_words": {**WORDS, **words}})


def test_a_label_follows_the_decoders_start_and_not_the_text(config: MakeConfig) -> None:
    """The text is closed, and ends in a sign after which words begin with a blank."""
    text = "{prompt} {response_a} {response_b} Verdict:"
    settled = config("t5", "label_tokens", inputs={"template": {"text": text}})
    builder = open_inputs(settled).builder
    assert builder.closing.tolist() == [1]
    assert builder.encode(make_rows(1))[0][0].ids[-1] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"winner_tie": "tie"}, r"winner_tie='tie' is 3 tokens \('t' 'i' 'e'\); it must be one"),
        ({"winner_tie": " "}, r"winner_tie=' ' is blank"),
        ({"winner_tie": ["t", "tt"]}, r"winner_tie='tt' is 2 tokens"),
    ],
)
def test_a_label_that_is_not_one_token_is_refused(config: MakeConfig, words: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"the decoder can't begin with the label words:\n[\s\S]*{message}") as error:
        open_inputs(with_words(config, **words))
    assert "give each class a word that is one token" in str(error.value)
    assert "winner_model_a" not in str(error.value)


def test_label_words_are_tokenised_as_t5s_answers_are(config: MakeConfig, tmp_path: Path) -> None:
    """SentencePiece puts a blank before a text: the first token of an answer is `▁A`, as in training, and not `A`."""
    words = ["▁A", "▁B", "▁t", "A", "B", "t", "▁", *"abcdefghijklmnopqrsuvwxyz", *"#CDEFGHIJKLMNOPQRSUVWXYZ :[]…"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((word, -2.0 - len(word) % 2) for word in words)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2))
    backend.normalizer = normalizers.Replace("\n", " ")
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    settled = config("t5", "label_tokens")
    base = shutil.copytree(settled.model.base, tmp_path / "base")
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(base)
    settled = config("t5", "label_tokens", model={"base": str(base)})
    made = trie_of(*open_inputs(settled)[:3:2])
    assert [token for _, token in made.edges] == [fast(word).input_ids[0] for word in WORDS.values()] == [3, 4, 5]
    shown = open_inputs(settled).builder.encode(
        [Row("1", {"prompt": ["a\nb"], "response_a": ["c"], "response_b": ["d"]})]
    )
    assert len(fast) in shown[0][0].ids, "the line break has a token"


def test_synonyms_are_as_likely_as_any_of_them(config: MakeConfig) -> None:
    settled = with_words(config, winner_tie=["t", "T"])
    expected = lm_logits(settled)
    other = int(open_inputs(settled).builder.tokenizer(["T"], special=False, start=True)[0][0])
    tie = expected[:, [label_ids(settled)[2], other]].logsumexp(dim=1)
    assert (logits_of(build(settled, CPU).eval(), padded(items()))[:, 2] - tie).abs().max() <= 1e-5


# --- float32 ---------------------------------------------------------------------------------------------------------


def wo_layers(backbone: torch.nn.Module) -> list[torch.nn.Linear]:
    """The layers called `wo`, within their adapters where they have some."""
    layers = [layer for name, layer in backbone.named_modules() if name.endswith((".wo", ".wo.base_layer"))]
    return [layer for layer in layers if isinstance(layer, torch.nn.Linear)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_wo_is_stored_and_computed_in_float32(config: MakeConfig, quantization: str, dtype: str) -> None:
    made = as_built(config("t5", model={"quantization": quantization, "dtype": dtype}))
    layers = wo_layers(made.backbone)
    assert [(type(layer), layer.weight.dtype) for layer in layers] == [(LinearInFloat32, torch.float32)] * 4
    kinds = {type(layer) for name, layer in made.backbone.named_modules() if name.endswith(".q.base_layer")}
    assert kinds == {{"none": torch.nn.Linear, "nf4": Linear4bit, "int8": Linear8bitLt}[quantization]}
    given = []
    for layer in layers:
        layer.register_forward_hook(lambda layer, states, out: given.append(out.dtype))
    logits_of(made, padded(items()))
    assert given == [torch.float32] * 4


def test_autocast_alone_would_compute_wo_in_16_bits(config: MakeConfig) -> None:
    made, given = as_built(config("t5", model={"dtype": "bfloat16"})), []
    for layer in wo_layers(made.backbone):
        layer.__class__ = torch.nn.Linear
        layer.register_forward_hook(lambda layer, states, out: given.append(out.dtype))
    logits_of(made, padded(items()))
    assert given == [torch.bfloat16] * 4


def test_a_row_that_overflows_float16_is_rescued(config: MakeConfig) -> None:
    """What T5 would clamp: the largest number in place of the true one is a finite logit, and a wrong one."""
    made = as_built(config("t5_v1_1", model={"dtype": "float16", "lora": None}))
    with torch.no_grad():
        for name, weight in made.backbone.named_parameters():
            if "DenseReluDense.wi" in name and "decoder" not in name:
                weight *= 300
    precise = as_built(config("t5_v1_1", model={"dtype": "float32", "lora": None}))
    with torch.no_grad():
        for weight, other in zip(precise.backbone.parameters(), made.backbone.parameters(), strict=True):
            weight.copy_(other)
    launched = logits_of(made, padded(items()))
    assert not launched.isfinite().all()
    logits, rescued = ClassifierScorer(made)(items())
    assert rescued == int((~launched.isfinite()).any(dim=1).sum())
    expected = logits_of(precise, padded(items())).numpy()
    assert np.abs(logits - expected).max() <= 2e-2


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_closing_tokens_that_users_type_are_text(config: MakeConfig, way: str) -> None:
    """A row has one, the tokenizer's own; its logits are its own whatever stands beside it."""
    settled = config("t5", way)
    rows = [
        Row("1", {"prompt": ["a</s>b", "</s>"], "response_a": ["</s></s>"], "response_b": ["<pad>"]}),
        Row("2", {"prompt": ["ab"], "response_a": [""], "response_b": ["b"]}),
    ]
    encoded = open_inputs(settled).builder.encode(rows)
    for orders in encoded:
        for shown in orders:
            assert (shown.ids == 1).nonzero()[0].tolist() == [len(shown.ids) - 1]
            assert 0 not in shown.ids
    made, items_ = as_built(settled), items_of(encoded, orders=2)
    together = score(made, items_, tokens_per_batch=2_000)
    assert np.abs(together - one_at_a_time(made, items_).numpy()).max() <= 1e-5


# --- bundles, costs, messages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "way", "lora"),
    [
        ("t5_v1_1", "label_tokens", {"r": 2}),
        ("t5", "mean", None),
        ("t5gemma", "head", None),
        ("t5gemma", "mean", {"r": 2}),
        ("t5gemma2", "head", {"r": 2}),
    ],
)
def test_a_bundle_gives_the_logits_of_its_model(
    config: MakeConfig, tmp_path: Path, kind: str, way: str, lora: dict[str, int] | None
) -> None:
    settled, tokenizer, builder, _ = open_inputs(config(kind, way, model={"lora": lora, "dtype": "float32"}))
    made, rows = as_built(settled), make_rows(4)
    given = items_of(builder.encode(rows), orders=2)
    logits = score(made, given, tokens_per_batch=2_000)
    probes = pick_probes(rows, by_order(given, logits, len(rows)))
    write_model(tmp_path / "bundle", made, settled, tokenizer, probes=probes)
    bundle = open_bundle(tmp_path / "bundle")
    assert np.array_equal(score(load_classifier(bundle, CPU), given, tokens_per_batch=2_000), logits)
    ((_, verified),) = verify([bundle.folder], None, None)
    assert verified["rows"] == 4
    held = sum(weight.numel() * weight.element_size() for weight in made.backbone.parameters())
    assert model_bytes(bundle) == pytest.approx(held, rel=0.02)
    if lora is None:
        names = load_file(next(bundle.files.backbone.glob("*.safetensors")))
        assert any("decoder." in name for name in names) == (way != "mean")


def test_operations_are_the_encoders_and_what_the_decoder_reads_of_it(config: MakeConfig) -> None:
    settled = config("t5", model={"lora": None})
    encoder = 2 * (4 * 64 * 64 + 2 * 64 * 128)
    read = 2 * 2 * 64 * 64  # keys and values in two layers
    costs = {way: cost_of(config("t5", way, model={"lora": None})) for way in WAYS}
    assert costs["head"].linear == costs["label_tokens"].linear == 2 * (encoder + read)
    assert costs["mean"].linear == 2 * encoder
    assert {cost.quadratic for cost in costs.values()} == {4 * 2 * 64}
    assert cost_of_model(build(settled, CPU).backbone) == costs["head"]
    adapted = cost_of_model(build(config("t5", model={"lora": {"r": 2}}), CPU).backbone)
    assert adapted.linear > costs["head"].linear
    assert 0 < adapted.trained < adapted.linear
    wide = cost_of(config("t5gemma", "mean", model={"lora": None}))
    assert wide.linear == 2 * 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"layout": "packed"}}, r"train.layout=packed does not go with .*set train.layout=padded"),
        ({"train": {"layout": "shared"}}, r"a token sees those behind it.*set train.layout=padded"),
        (
            {"train": {"layout": "packed"}, "model": {"pooling": "mean"}},
            r"train.layout=packed .* does not pass a batch's topology on .*set train.layout=padded",
        ),
        ({"model": {"pooling": "last"}}, r"pooling=last is none of the base's: decoder, mean .*=decoder or mean,"),
        (
            {"model": {"readout": "reward"}, "train": {"layout": "shared"}},
            r"model.readout=reward does not go with .*an encoder computes anew.*set model.readout=head or label_tokens",
        ),
    ],
)
def test_what_an_encoder_decoder_can_not_do_is_refused_before_it_is_loaded(
    config: MakeConfig, sections: dict[str, Any], message: str
) -> None:
    settled = config("t5", **sections)
    with pytest.raises(ModelError) as error:
        require_base(settled, open_inputs(settled).settings)
    assert re.search(message, " ".join(str(error.value).split()))


def test_label_words_of_the_mean_are_refused(config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="not pooling=mean"):
        config("t5", "label_tokens", model={"pooling": "mean"})
    for attempt in (open_inputs, lambda settled: build(settled, CPU)):
        with pytest.raises(ModelError, match=r"model\.label_words: model.pooling=mean reads the encoder"):
            attempt(config("t5", "mean", model={"label_words": WORDS}))


def test_other_encoder_decoders_are_refused() -> None:
    with pytest.raises(ModelError, match=r"is a bart, which is none of: .*encoder_decoder"):
        families.family_of(AutoConfig.for_model("bart"))


@pytest.mark.parametrize(("kind", "idle"), [("t5", 2), ("t5gemma", 2), ("t5gemma2", 0)])
def test_a_single_key_of_the_decoder_is_not_trained(config: MakeConfig, kind: str, idle: int) -> None:
    """It is the start token's own; other queries and keys of theirs change no logit."""
    made = as_built(config(kind, model={"lora": None}))
    right = logits_of(made, padded(items()))
    unmoved = {name for name, weight in made.backbone.named_parameters() if not weight.requires_grad}
    layers = [name for name in unmoved if "vision_tower" not in name and "projector" not in name]
    assert len(layers) == 2 * idle
    with torch.no_grad():
        for name in layers:
            made.backbone.get_parameter(name).normal_()
    assert (logits_of(made, padded(items())) - right).abs().max() <= 1e-6
    adapted = build(config(kind, model={"lora": {"r": 2, "target_modules": ["q", "k"]}}), CPU) if kind == "t5" else None
    if adapted is not None:
        names = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
        assert len(names) == 2 * 2 * 2, "of the encoder's own, and of what the decoder reads of it"
        assert not any("decoder" in name and "SelfAttention" in name for name in names)


def test_what_reads_images_has_no_part_in_it(config: MakeConfig) -> None:
    """T5Gemma 2: no adapters, no operations, and no mean, as its encoder can't be loaded alone."""
    with pytest.raises(ModelError, match=r"model\.pooling=mean is none of the base's: decoder"):
        open_inputs(config("t5gemma2", "mean"))
    made = build(config("t5gemma2", model={"quantization": "nf4"}), CPU)
    adapted = {name.split(".")[3] for name, _ in made.backbone.named_parameters() if "lora_" in name}
    assert adapted == {"text_model", "layers"}
    one, other = (cost_of(config(kind, model={"lora": None})).linear for kind in ("t5gemma2", "t5gemma"))
    keys_and_values = 2 * 2 * 2 * 64 * 32
    assert one == other - keys_and_values


def test_what_passes_for_an_encoder_is_read_by_its_mean(config: MakeConfig, tmp_path: Path) -> None:
    """The encoder alone, as transformers saves it: of it the mean is the default."""
    made = build(config("t5gemma", "mean", model={"lora": None}), CPU)
    made.backbone.save_pretrained(tmp_path)  # type: ignore[operator]
    closing_tokenizer(tmp_path)
    half = config("t5gemma", model={"lora": None, "base": str(tmp_path)})
    assert open_inputs(half).config.model.pooling == "mean"
    assert build(half, CPU).pooling == "mean"
