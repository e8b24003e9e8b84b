"""Loading: what is frozen, what trains, what is refused, and NF4 that is the same in evaluation as in training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bundles_support import write_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from pairclf.bundles.base import fingerprint, resolve_base
from pairclf.bundles.bundle import open_bundle
from pairclf.config import Config
from pairclf.errors import ModelError
from pairclf.inputs.sequences import Item
from pairclf.model.backbone import checkpoint_gradients, load_tokenizer, pick_dtype
from pairclf.model.engine import build
from pairclf.model.layouts import packed, padded
from pairclf.model.weights import load_classifier

CPU = torch.device("cpu")


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_only_adapters_and_head_train(config_for: Callable[..., Config], quantization: str) -> None:
    classifier = build(config_for("gemma2", model={"quantization": quantization}), CPU)
    trained = {name for name, one in classifier.named_parameters() if one.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {"head.weight", "head.bias"}
    assert len(trained) == 2 + 2 * 7 * 2  # head; A and B of 7 linear modules in 2 layers
    assert classifier.head.weight.dtype == torch.float32


def test_layers_below_the_first_carry_no_adapter(config_for: Callable[..., Config]) -> None:
    classifier = build(config_for("llama", model={"lora": {"r": 4, "first_layer": 1}}), CPU)
    adapted = {name for name, _ in classifier.named_parameters() if "lora_" in name}
    assert adapted
    assert all("layers.1." in name for name in adapted)


def test_the_whole_model_trains_without_lora(config_for: Callable[..., Config]) -> None:
    classifier = build(config_for("llama", model={"lora": None}), CPU)
    assert all(one.requires_grad and one.dtype == torch.float32 for one in classifier.parameters())


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_rslora_scales_by_the_root_of_the_rank(config_for: Callable[..., Config], quantization: str) -> None:
    for rslora, scale in ((False, 32 / 4), (True, 32 / 2)):
        model = {"quantization": quantization, "lora": {"r": 4, "lora_alpha": 32, "use_rslora": rslora}}
        classifier = build(config_for("llama", model=model), CPU)
        scales = {one.scaling["default"] for one in classifier.modules() if isinstance(one, LoraLayer)}
        assert scales == {scale}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_dora_trains_magnitudes_and_starts_where_lora_does(
    config_for: Callable[..., Config], quantization: str
) -> None:
    shared = {"r": 4, "lora_dropout": 0.0}
    plain, dora = (
        build(config_for("gemma2", model={"quantization": quantization, "lora": lora}), CPU)
        for lora in (shared, {**shared, "use_dora": True})
    )
    magnitudes = {name: one for name, one in dora.named_parameters() if "magnitude" in name}
    others = {name for name, one in dora.named_parameters() if one.requires_grad} - magnitudes.keys()
    assert others == {name for name, one in plain.named_parameters() if one.requires_grad}
    assert len(magnitudes) == 7 * 2
    assert all(one.dtype == torch.float32 and one.requires_grad for one in magnitudes.values())
    batch = packed([Item(0, 0, np.arange(5, 60, dtype=np.int32)), Item(1, 0, np.arange(9, 12, dtype=np.int32))])
    logits = dora(batch.inputs, batch.read_at, batch.lengths)
    assert (logits - plain(batch.inputs, batch.read_at, batch.lengths)).abs().max() <= 1e-2
    logits.square().sum().backward()
    assert all(one.grad is not None and one.grad.abs().max() > 0 for one in magnitudes.values())
    first = next(iter(magnitudes.values()))
    with torch.no_grad():
        first.mul_(2)
    assert (dora(batch.inputs, batch.read_at, batch.lengths) - logits).abs().max() > 1e-4


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("variant", ["use_dora", "use_rslora"])
def test_a_bundle_gives_back_an_adapter_exactly(
    config_for: Callable[..., Config], tmp_path: Path, quantization: str, variant: str
) -> None:
    model = {"quantization": quantization, "lora": {"r": 4, variant: True}}
    config = config_for("gemma2", model=model)
    classifier = build(config, CPU).eval()
    for name, parameter in classifier.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=float("magnitude" in name), std=0.1)
    tokenizer = load_tokenizer(config.model.base)
    write_model(
        tmp_path, classifier, config, tokenizer, name="test", fold=None, metrics={}, prior=[0.4, 0.3, 0.3], probes=[]
    )
    batch = packed([Item(0, 0, np.arange(5, 60, dtype=np.int32)), Item(1, 0, np.arange(9, 12, dtype=np.int32))])
    with torch.inference_mode():
        saved = classifier(batch.inputs, batch.read_at, batch.lengths)
        loaded = load_classifier(open_bundle(tmp_path), CPU)(batch.inputs, batch.read_at, batch.lengths)
    assert torch.equal(saved, loaded)


def test_backbones_of_either_name_for_it_recompute_activations() -> None:
    asked = []
    new = SimpleNamespace(activation_checkpointing_enable=asked.append)
    old = SimpleNamespace(gradient_checkpointing_enable=asked.append)
    for backbone in (new, old):
        checkpoint_gradients(backbone)  # type: ignore[arg-type]
    assert asked == [{"use_reentrant": False}] * 2


def test_nf4_scores_alike_in_training_and_evaluation(config_for: Callable[..., Config]) -> None:
    """Where the CPU has AVX512-BF16, bitsandbytes would turn to bfloat16 in evaluation (1e-2 off)."""
    classifier = build(config_for("gemma2", model={"quantization": "nf4"}), CPU)
    batch = padded([Item(0, 0, np.arange(5, 60, dtype=np.int32))])
    with torch.inference_mode():
        training = classifier.train()(batch.inputs, batch.read_at, batch.lengths)
        evaluation = classifier.eval()(batch.inputs, batch.read_at, batch.lengths)
    assert (training - evaluation).abs().max() <= 1e-6


def test_the_seed_decides_the_fresh_weights(config_for: Callable[..., Config]) -> None:
    config = config_for("llama")
    first, again = build(config, CPU), build(config, CPU)
    other = build(config.model_copy(update={"seed": 1}), CPU)
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"base": "embedded:gpt-5"}, "not shipped"),
        ({"base": "./nowhere"}, "no folder"),
        ({"base": "someone/not-cached-here"}, "can't be loaded"),
        ({"lora": {"target_modules": ["query"]}}, "has not"),
        ({"lora": {"first_layer": 2}}, "leaves no layer"),
        ({"lora": {"use_dora": True}, "quantization": "int8"}, "does not run on a CPU"),
    ],
)
def test_what_can_not_be_loaded_is_said(
    config_for: Callable[..., Config], model: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        build(config_for("llama", model=model), CPU)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_weight_that_is_missing_is_not_filled_at_random(
    config_for: Callable[..., Config], base_of: Callable[[str], Path], tmp_path: Path, quantization: str
) -> None:
    base = Path(shutil.copytree(base_of("llama"), tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    weights.pop(next(name for name in weights if "q_proj" in name))
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing|can't be loaded"):
        build(config_for("llama", model={"base": str(base), "quantization": quantization}), CPU)
    (base / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="can't be loaded"):
        build(config_for("llama", model={"base": str(base), "quantization": quantization}), CPU)


def test_an_encoder_is_refused(config_for: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    with pytest.raises(ModelError, match="not a decoder"):
        build(config_for("llama", model={"base": str(tmp_path)}), CPU)


def test_the_fingerprint_sees_config_and_weights(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = base_of("llama")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    assert fingerprint(tmp_path) == fingerprint(source) != fingerprint(base_of("gemma2"))
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert fingerprint(tmp_path) != fingerprint(source)


def test_a_base_given_by_hand_must_hold_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve_base("embedded:gemma2-tiny", tmp_path)


def test_bfloat16_only_where_the_hardware_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, found=capability: found)
        assert pick_dtype("auto", cuda)[0] == dtype
    assert pick_dtype("auto", CPU)[0] == torch.float32
    assert pick_dtype("bfloat16", CPU) == (torch.bfloat16, "as set")
