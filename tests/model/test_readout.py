"""Heads and pooling: what they compute, what they start from, and that a bundle gives back the same ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles_support import write_model
from models_support import logits_of, with_lm_head
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pairclf.bundles.bundle import open_bundle
from pairclf.config import Config
from pairclf.errors import BundleError, ModelError
from pairclf.inputs.sequences import Item
from pairclf.model.backbone import load_tokenizer
from pairclf.model.engine import build
from pairclf.model.layouts import MakeBatch, packed, padded
from pairclf.model.readout import HEADS, mean
from pairclf.model.weights import load_classifier

CPU = torch.device("cpu")
WORDS = {"winner_model_a": "A", "winner_model_b": "B", "winner_tie": "t"}


def items() -> list[Item]:
    random = np.random.default_rng(0)
    return [Item(row, 0, random.integers(0, 260, length, dtype=np.int32)) for row, length in enumerate([5, 1, 40, 12])]


@pytest.mark.parametrize("layout", [padded, packed])
def test_mean_is_over_a_sequence_alone(layout: MakeBatch) -> None:
    batch = layout(items())
    ids = batch.inputs["input_ids"]
    assert isinstance(ids, torch.Tensor)
    hidden = torch.randn(*ids.shape, 8, dtype=torch.bfloat16, requires_grad=True)
    found = mean(hidden, batch.read_at, batch.lengths)
    flat = hidden.flatten(0, 1).float()
    spans = zip(batch.read_at.tolist(), batch.lengths.tolist(), strict=True)
    expected = torch.stack([flat[end - length + 1 : end + 1].mean(dim=0) for end, length in spans])
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= 1e-6
    (ours,) = torch.autograd.grad(found.square().sum(), hidden, retain_graph=True)
    (plain,) = torch.autograd.grad(expected.square().sum(), hidden)
    assert (ours - plain).float().abs().max() <= 1e-2
    assert int((ours.abs().sum(dim=-1) > 0).sum()) == int(batch.lengths.sum())


@pytest.mark.parametrize("layout", [padded, packed])
def test_pooling_mean_does_not_see_neighbours(config_for: Callable[..., Config], layout: MakeBatch) -> None:
    classifier = build(config_for("gemma2", model={"pooling": "mean"}), CPU).eval()
    torch.nn.init.normal_(classifier.head.weight, std=0.2)  # type: ignore[arg-type]
    alone = torch.cat([logits_of(classifier, padded([item])) for item in items()])
    assert (logits_of(classifier, layout(items())) - alone).abs().max() <= 1e-5
    classifier.pooling = "last"
    assert (logits_of(classifier, layout(items())) - alone).abs().max() > 1e-3


@pytest.mark.parametrize("name", list(HEADS))
def test_heads_are_float32_and_start_near_even_odds(name: str) -> None:
    torch.manual_seed(0)
    head = HEADS[name](64, 3)
    logits = head(torch.randn(100, 64, dtype=torch.bfloat16))
    assert logits.dtype == torch.float32
    assert head.out_features == 3
    assert float(logits.detach().abs().mean()) < 0.3
    assert {one.dtype for one in head.parameters()} == {torch.float32}


def test_head_of_two_layers_is_not_linear() -> None:
    head = HEADS["two_layer"](64, 3)
    zero, x = head(torch.zeros(1, 64)), torch.randn(1, 64) * 10
    assert (head(x) + head(-x) - 2 * zero).abs().max() > 1e-3


SHAPES = {
    "linear": {"weight": (3, 64), "bias": (3,)},
    "two_layer": {"inner.weight": (64, 64), "inner.bias": (64,), "outer.weight": (3, 64), "outer.bias": (3,)},
}


@pytest.mark.parametrize(("head", "pooling"), [("linear", "mean"), ("two_layer", "last")])
def test_bundle_gives_back_head_and_pooling_exactly(
    config_for: Callable[..., Config], tmp_path: Path, head: str, pooling: str
) -> None:
    config = config_for("llama", model={"head": head, "pooling": pooling})
    classifier = build(config, CPU).eval()
    for parameter in classifier.head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokenizer = load_tokenizer(config.model.base)
    write_model(
        tmp_path, classifier, config, tokenizer, name="test", fold=None, metrics={}, prior=[0.4, 0.3, 0.3], probes=[]
    )
    assert {name: tuple(one.shape) for name, one in load_file(tmp_path / "head.safetensors").items()} == SHAPES[head]
    loaded = load_classifier(open_bundle(tmp_path), CPU)
    assert torch.equal(logits_of(loaded, packed(items())), logits_of(classifier, packed(items())))
    assert loaded.device == CPU


def test_bundle_refuses_a_head_of_another_kind(config_for: Callable[..., Config], tmp_path: Path) -> None:
    config = config_for("llama")
    tokenizer = load_tokenizer(config.model.base)
    other = build(config_for("llama", model={"head": "two_layer"}), CPU)
    write_model(
        tmp_path, other, config, tokenizer, name="test", fold=None, metrics={}, prior=[0.4, 0.3, 0.3], probes=[]
    )
    with pytest.raises(BundleError, match="head can't be loaded"):
        load_classifier(open_bundle(tmp_path), CPU)


@pytest.mark.parametrize(
    ("kind", "tied", "shard", "quantization"),
    [
        ("llama", False, "1GB", "none"),
        ("llama", False, "60KB", "nf4"),
        ("qwen3", True, "1GB", "none"),
        ("gemma2", True, "1GB", "nf4"),
    ],
)
def test_head_from_label_words_gives_the_logits_of_the_lm(
    config_for: Callable[..., Config],
    base_of: Callable[[str], Path],
    tmp_path: Path,
    kind: str,
    tied: bool,
    shard: str,
    quantization: str,
) -> None:
    base = with_lm_head(base_of(kind), tmp_path / "base", tied=tied, shard=shard)
    assert (base / "model.safetensors.index.json").is_file() == (shard == "60KB")
    model = {"base": str(base), "label_words": WORDS, "quantization": quantization}
    classifier = build(config_for(kind, model=model), CPU).eval()
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = [
        AutoTokenizer.from_pretrained(base)(word, add_special_tokens=False)["input_ids"][0] for word in WORDS.values()
    ]
    assert torch.equal(classifier.head.weight, lm.lm_head.weight[ids])  # type: ignore[arg-type]
    if quantization == "none" and kind != "gemma2":  # Gemma-2's LM caps its logits afterwards
        with torch.inference_mode():
            expected = torch.cat([lm(torch.from_numpy(one.ids).long()[None]).logits[:, -1, ids] for one in items()])
        assert (logits_of(classifier, packed(items())) - expected).abs().max() <= 1e-5


def test_label_words_of_two_tokens_or_without_lm_head_are_refused(
    config_for: Callable[..., Config], base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"' A' is 2 tokens[\s\S]*leading blank"):
        build(config_for("qwen3", model={"label_words": {**WORDS, "winner_model_a": " A"}}), CPU)
    base = Path(shutil.copytree(base_of("llama"), tmp_path / "base"))
    settings = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": False}
    (base / "config.json").write_text(json.dumps(settings))
    assert not any("lm_head" in name for name in load_file(base / "model.safetensors"))
    with pytest.raises(ModelError, match=r"no lm_head\.weight"):
        build(config_for("llama", model={"base": str(base), "label_words": WORDS}), CPU)
