"""Rows of a batch score as each alone, or the base is refused: measured on every base, whatever its class claims."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from decoders_support import DECODERS, ENCODERS, LAYERS, decoder_of, outcome, rendered, rows, tiny_decoder
from models_support import logits_of
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModel
from transformers.masking_utils import (
    bidirectional_mask_function,
    blockwise_overlay,
    or_masks,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from pairclf.config import Config
from pairclf.errors import ModelError
from pairclf.inputs.sequences import Item
from pairclf.model import isolation, trim
from pairclf.model.attention import NAME, AttentionCalls, ScoreOptions, attend
from pairclf.model.backbone import checkpoint_gradients
from pairclf.model.engine import build, build_frozen
from pairclf.model.isolation import probe
from pairclf.model.layouts import Isolation, packed, padded, shared
from pairclf.model.scoring import ClassifierScorer

DOCS = Path(__file__).parents[2] / "docs"
CPU = torch.device("cpu")
LOOKS_BOTH_WAYS = {"bert-generation"}
"""No masked language models, and no decoders unless their config says so."""
EQUAL = dict.fromkeys(["eager, padded", "padded", "packed", "shared"], "equal")


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose layers drop keyword arguments, while its class claims that it packs."""
    folder = tmp_path_factory.mktemp("nemotron")
    tiny_decoder("nemotron", folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "layout", "why"),
    [
        ("nemotron", "packed", "NemotronAttention does not receive the places of the rows"),
        ("phimoe", "packed", "PhimoeAttention hands sliding_window=None to its attention, and its mask is another one"),
        pytest.param(
            "bamba", "packed", "layers of the kind linear_attention", marks=pytest.mark.thorough, id="bamba-packed"
        ),
        ("gpt_oss", "padded", "GptOssAttention gives s_aux to its attention"),
        ("cpmant", "base", "a row in a padded batch differ from those of the row alone"),
        ("gpt2", None, None),
        ("deepseek_v3", None, None),
    ],
)
def test_decoder_scores_each_row_as_alone_or_is_refused(kind: str, layout: str | None, why: str | None) -> None:
    found = outcome(kind)
    assert not [one for one in found.values() if one.startswith(("wrong", "not built"))]
    if layout is None:
        assert found == EQUAL
    else:
        assert str(why) in found[layout]
        assert found[layout].startswith("refused: ")


@pytest.mark.thorough
@pytest.mark.parametrize(("family", "kinds", "most"), [("decoder", DECODERS, 75), ("encoder", ENCODERS, 15)])
def test_models_of_transformers_score_each_row_as_alone_or_are_refused(
    tmp_path: Path, family: str, kinds: list[str], most: int
) -> None:
    table = {kind: outcome(kind, family) for kind in kinds}
    found = tmp_path / f"{family}s.md"
    found.write_text(rendered(table, family))
    assert not {kind: one for kind, one in table.items() if any(told.startswith("wrong") for told in one.values())}
    equal = [kind for kind, one in table.items() if one.get("packed") == "equal"]
    assert all(table[kind]["padded"] == "equal" for kind in equal)
    assert all(
        (table[kind]["shared"] == "equal") == (family == "decoder") for kind in equal if kind not in LOOKS_BOTH_WAYS
    )
    assert len(equal) >= most
    kept = (DOCS / found.name).read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}:" in kept:
        assert kept.endswith(rendered(table, family)), f"docs/{found.name} is to end as {found}"


def tiny(kind: str, **settings: object) -> nn.Module:
    """A decoder of random weights of order one, in our attention."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **{**sizes, **({} if kind == "gpt2" else more), **settings})
    model = AutoModel.from_config(config, attn_implementation=NAME).eval()
    for one in model.parameters():
        if one.ndim > 1:
            nn.init.normal_(one, std=one.shape[-1] ** -0.5)
    return model  # type: ignore[no-any-return]


def layer_of(model: nn.Module, index: int) -> nn.Module:
    return next(one for name, one in model.named_modules() if name in (f"layers.{index}", f"h.{index}"))


def _drop_keywords_in_one_layer(model: nn.Module) -> None:
    def drop(_layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return given, {name: one for name, one in named.items() if name not in ("topology", "cu_seq_lens_q")}

    layer_of(model, 1).register_forward_pre_hook(drop, with_kwargs=True)


def _compute_one_layer_by_other_attention(model: nn.Module) -> None:
    attention: Any = layer_of(model, 1).self_attn
    settings = attention.config.to_dict()
    attention.config = type(attention.config)(**settings)
    attention.config._attn_implementation = "sdpa"


def _let_positions_run_on(model: nn.Module) -> None:
    def run_on(_model: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = named["input_ids"]
        return given, {**named, "position_ids": torch.arange(ids.shape[1]).expand_as(ids)}

    model.register_forward_pre_hook(run_on, with_kwargs=True)


def _forget_the_window(model: nn.Module) -> None:
    layer_of(model, 0).self_attn.sliding_window = None  # type: ignore[union-attr, assignment]


def _shift_tokens(model: nn.Module) -> None:
    def shift(_layer: nn.Module, _given: object, states: Tensor) -> Tensor:
        return states + 0.1 * nn.functional.pad(states, (0, 0, 1, 0))[:, :-1]

    layer_of(model, 0).register_forward_hook(shift)


@pytest.mark.parametrize(
    ("kind", "settings", "break_", "why"),
    [
        ("llama", {}, _drop_keywords_in_one_layer, "LlamaAttention does not receive the places of the rows"),
        ("llama", {}, _compute_one_layer_by_other_attention, "differ from those of the row alone"),
        ("gpt2", {}, _let_positions_run_on, "differ from those of the row alone"),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 2}, _forget_the_window, "hands sliding_window=None"),
        ("llama", {}, _shift_tokens, "differ from those of the row alone"),
    ],
)
def test_probe_finds_what_a_class_claims_and_does_not_do(
    kind: str, settings: dict[str, object], break_: Callable[[nn.Module], None], why: str
) -> None:
    model = tiny(kind, **settings)
    assert probe(model, torch.float32)[:2] == (None, None)
    break_(model)
    found = probe(model, torch.float32)
    for one in (found.packed, found.shared, found.trimmed):
        assert one is not None
        assert why in one or "are not known" in one  # the reason for the last layer of gpt2 is its kind


def test_probe_refuses_a_batch_that_has_a_say_in_its_rows() -> None:
    model = tiny("llama")
    layer_of(model, 0).register_forward_hook(lambda _layer, _given, states: states - 0.1 * states.mean(dim=(0, 1)))
    with pytest.raises(ModelError, match="a row in a padded batch differ from those of the row alone"):
        probe(model, torch.float32)


def _call(window: int | None, mask: Tensor, *, causal: bool = True) -> tuple[str, ScoreOptions, Tensor]:
    return "Attention", ScoreOptions(1.0, None, window, 0.0, causal), mask


@pytest.mark.parametrize(
    ("function", "window", "causal", "is_right"),
    [
        (sliding_window_bidirectional_mask_function(3), 4, False, True),
        (sliding_window_bidirectional_mask_function(3), 3, False, False),
        (sliding_window_bidirectional_mask_function(3), None, False, False),
        (sliding_window_bidirectional_mask_function(3), 4, True, False),
        (sliding_window_causal_mask_function(4), 4, False, False),
        (bidirectional_mask_function, None, False, True),
        (bidirectional_mask_function, None, True, False),
        (bidirectional_mask_function, 4, False, False),
    ],
)
def test_watch_knows_windows_on_both_sides(
    function: Callable[..., Tensor], window: int | None, causal: bool, is_right: bool
) -> None:
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    found = AttentionCalls(masks=[(mask, function)], scores=[_call(window, mask, causal=causal)]).wrong_window()
    assert found is None if is_right else f"hands sliding_window={window}" in str(found)


def test_watch_knows_a_mask_made_of_one_batch() -> None:
    blocks = torch.zeros(1, 8, dtype=torch.long)
    plain = sliding_window_causal_mask_function(4)
    mixed = or_masks(plain, blockwise_overlay(blocks))
    for function, window, why in (
        (plain, 4, None),
        (plain, None, "hands sliding_window=None"),
        (mixed, 4, "one batch"),
    ):
        mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        found = AttentionCalls(masks=[(mask, function)], scores=[_call(window, mask)]).wrong_window()
        assert found is None if why is None else why in str(found)
    assert "another mask" in str(AttentionCalls(scores=[_call(None, torch.ones(1))]).wrong_window())


@pytest.mark.parametrize("ignored", ["softcap", "scaling"])
def test_probe_finds_what_our_attention_ignores(ignored: str) -> None:
    def deaf(*given: Any, **named: Any) -> tuple[Tensor, None]:
        return attend(*given, **{**named, ignored: None})

    model = tiny("gemma2", attn_logit_softcapping=1.0, query_pre_attn_scalar=2)
    assert probe(model, torch.float32).packed is None
    AttentionInterface.register(NAME, deaf)
    try:
        with pytest.raises(ModelError, match="differ from those of the row alone"):
            probe(model, torch.float32)
    finally:
        AttentionInterface.register(NAME, attend)


def test_probe_finds_a_wrong_last_layer_and_keeps_shared_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    monkeypatch.setattr(trim, "rotate_half", lambda states: states)
    found = probe(model, torch.float32)
    assert (found.packed, found.shared) == (None, None)
    assert "differ from those of the row alone" in str(found.trimmed)


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        pytest.param("gemma2", {"dtype": "bfloat16"}, id="gemma2-bfloat16"),
        pytest.param("qwen3", {"dtype": "float16"}, id="qwen3-float16"),
        pytest.param("gemma2", {"dtype": "float16", "quantization": "nf4"}, id="gemma2-float16-nf4"),
        pytest.param("qwen3", {"dtype": "bfloat16", "quantization": "int8"}, id="qwen3-bfloat16-int8"),
        pytest.param("gemma2", {"quantization": "nf4"}, id="gemma2-nf4"),
    ],
)
def test_probe_is_sharp_whatever_the_weights_are_stored_in(
    config_for: Callable[..., Config], kind: str, model: dict[str, object]
) -> None:
    classifier = build_frozen(config_for(kind, model=model), CPU, None, training=False)
    assert classifier.isolation == Isolation(None, None, None, 2)
    base: Any = classifier.backbone
    base.layers[1].register_forward_hook(lambda _layer, _given, states: states + 0.02 * states.roll(1, dims=1))
    with pytest.raises(ModelError, match="differ from those of the row alone"):
        probe(base, classifier.dtype)


def test_probe_leaves_the_model_as_it_was(config_for: Callable[..., Config]) -> None:
    classifier = build(config_for("gemma2", model={"quantization": "nf4"}), CPU).train()
    backbone: Any = classifier.backbone.get_base_model()  # type: ignore[operator]
    before = {name: one.clone() for name, one in backbone.state_dict().items()}

    def kept() -> list[tuple[bool, int, int, set[str]]]:
        return [
            (one.training, len(one._forward_hooks), len(one._forward_pre_hooks), set(vars(one)))
            for one in backbone.modules()
        ]

    told = kept()
    random = torch.get_rng_state()
    probe(backbone, classifier.dtype)
    assert torch.equal(torch.get_rng_state(), random)
    assert backbone.config._attn_implementation == NAME
    assert kept() == told
    after = backbone.state_dict()
    assert all(torch.equal(after[name], one) for name, one in before.items())
    assert all(one.grad is None for one in backbone.parameters())


def test_probe_runs_once_for_a_base(config_for: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[str] = []

    def counted(backbone: Any, dtype: torch.dtype) -> Isolation:
        met.append(backbone.config.name_or_path)
        return probe(backbone, dtype)

    monkeypatch.setattr(isolation, "probe", counted)
    monkeypatch.setattr(isolation, "_RESULTS", {})
    config = config_for("llama")
    for _ in range(3):
        build(config, CPU)
    build(config_for("qwen2"), CPU)
    assert met == [config.model.base, config_for("qwen2").model.base]


def test_scorer_falls_back_or_refuses_on_a_base_that_mixes_rows(nemotron: Path) -> None:
    classifier = decoder_of(nemotron)
    assert ClassifierScorer(classifier).layout == "padded"
    assert "not packed, as NemotronModel: NemotronAttention does not receive" in ClassifierScorer(classifier).why
    with pytest.raises(ModelError, match=r"predict\.layout=packed: NemotronModel.*\n.*predict\.layout=auto"):
        ClassifierScorer(classifier, "packed")
    with pytest.raises(ModelError, match=r"layout shared: NemotronModel.*\n.*train\.layout=padded"):
        logits_of(classifier, shared(rows()))


def test_build_refuses_packed_training_on_a_base_that_mixes_rows(
    nemotron: Path, config_for: Callable[..., Config]
) -> None:
    base = {"base": str(nemotron)}
    with pytest.raises(ModelError, match=rf"train\.layout=packed does not go with model\.base={nemotron}: Nemotron"):
        build(config_for("llama", model=base), CPU)
    assert build(config_for("llama", model=base, train={"layout": "padded"}), CPU).why_not("padded") is None


@pytest.mark.parametrize("recomputing", [False, True])
def test_packed_batch_whose_topology_is_lost_is_an_error(
    config_for: Callable[..., Config], *, recomputing: bool
) -> None:
    classifier = build(config_for("llama"), CPU)
    if recomputing:
        checkpoint_gradients(classifier.backbone)
    batch = packed(rows())
    classifier.train()(batch.inputs, batch.read_at, batch.lengths).sum().backward()
    _drop_keywords_in_one_layer(classifier.backbone.get_base_model())  # type: ignore[operator]
    for mode in (True, False):
        with pytest.raises(ModelError, match="LlamaAttention does not receive the places of the rows"):
            classifier.train(mode)(batch.inputs, batch.read_at, batch.lengths)
    logits_of(classifier, padded(rows()))


def test_packed_batch_whose_attention_was_not_called_is_an_error(config_for: Callable[..., Config]) -> None:
    classifier = build(config_for("llama"), CPU).eval()
    classifier.isolation = classifier.isolation._replace(attentions=LAYERS)
    for layout in (packed, shared):
        with pytest.raises(ModelError, match=f"called its attention 2 times, not {LAYERS}: rows would see each other"):
            logits_of(classifier, layout(rows()))
    logits_of(classifier, padded(rows()))


ROTARY: dict[str, dict[str, object]] = {
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        "max_position_embeddings": 32,
    },
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("kind", list(ROTARY))
def test_build_refuses_positions_that_depend_on_the_longest_row(
    config_for: Callable[..., Config], tmp_path: Path, kind: str
) -> None:
    """transformers takes the frequencies of all rows from the longest one: a short row scores by its neighbours."""
    tiny("llama", **ROTARY[kind]).save_pretrained(tmp_path)  # type: ignore[operator]
    model = {"base": str(tmp_path), "lora": None}
    with pytest.raises(ModelError, match=r"inputs\.max_length=33 .*32 tokens.*\n.*set inputs\.max_length=32"):
        build(config_for("llama", model=model, inputs={"max_length": 33}), CPU)
    allowed = build(config_for("llama", model=model, inputs={"max_length": 32}), CPU).eval()
    short, long = rows()[4], Item(9, 0, np.arange(1, 41, dtype=np.int32))
    alone, beside = (logits_of(allowed, packed(batch))[0] for batch in ([short], [short, long]))
    assert (beside - alone).abs().max() > 1e-4
