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
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from support.tokenizers import tiny_tokenizer
from transformers import Gemma3Config, Gemma3Model, GPT2Config, GPT2Model

from pairclf.approaches.finetune.merge import without_adapter
from pairclf.bundles.base import ask_hub, fingerprint, resolve_base
from pairclf.bundles.bundle import open_bundle
from pairclf.config import Config, Lora
from pairclf.errors import ModelError
from pairclf.inputs.sequences import Item
from pairclf.model.backbone import (
    add_adapters,
    checkpoint_gradients,
    load_base,
    load_tokenizer,
    pick_dtype,
    read_settings,
    weight_files,
)
from pairclf.model.cost import cost_of_model
from pairclf.model.engine import build
from pairclf.model.layouts import packed, padded
from pairclf.model.weights import load_classifier

CPU = torch.device("cpu")
TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 32,
}
"""Sizes of the text model of a multimodal one."""


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_only_adapters_and_head_train(config_for: Callable[..., Config], quantization: str) -> None:
    classifier = build(config_for("gemma2", model={"quantization": quantization}), CPU)
    trained = {name for name, one in classifier.named_parameters() if one.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {"head.weight", "head.bias"}
    assert len(trained) == 2 + 2 * 7 * 2  # head; A and B of 7 linear modules in 2 layers
    assert classifier.head.weight.dtype == torch.float32


@pytest.fixture
def multimodal(tmp_path: Path) -> Path:
    """A tiny Gemma-3 that could see."""
    text = {**TEXT, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16}
    images = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    places = {"mm_tokens_per_image": 4, "image_token_index": 300, "boi_token_index": 301, "eoi_token_index": 302}
    settings = Gemma3Config(text_config=text, vision_config={**images, "image_size": 28, "patch_size": 14}, **places)
    Gemma3Model(settings).save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    return tmp_path


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_what_sees_images_gets_no_adapter(
    config_for: Callable[..., Config], multimodal: Path, quantization: str, targets: object
) -> None:
    lora = {"r": 4, "target_modules": targets}
    config = config_for("llama", model={"base": str(multimodal), "quantization": quantization, "lora": lora})
    classifier = build(config, CPU)
    assert {name for name, _ in classifier.backbone.named_modules() if name.endswith("vision_tower")}
    adapted = [name for name, _ in classifier.named_parameters() if "lora_" in name]
    assert len(adapted) == 2 * 2 * (7 if targets == "all-linear" else 2)
    assert all(".language_model." in name for name in adapted)


def test_what_sees_images_is_neither_trained_nor_counted(config_for: Callable[..., Config], multimodal: Path) -> None:
    backbone = build(config_for("llama", model={"base": str(multimodal), "lora": None}), CPU).backbone
    trained = {name.split(".")[0] for name, weight in backbone.named_parameters() if weight.requires_grad}
    assert trained == {"language_model"}
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert cost_of_model(backbone).linear == 2 * linear
    with pytest.raises(ModelError, match=r"target_modules names \['fc1'\], which the base has not"):
        lora = {"r": 4, "target_modules": ["fc1"]}
        build(config_for("llama", model={"base": str(multimodal), "lora": lora}), CPU)


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
        ({"base": "someone/not-cached-here"}, "not in the cache of the hub"),
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


def test_a_model_of_no_family_is_refused(config_for: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "is_decoder": True}))
    with pytest.raises(ModelError, match="is a bert, which is none of: decoder, encoder"):
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


def _quantised_as(method: str) -> Callable[[Path], object]:
    def change(base: Path) -> None:
        config = json.loads((base / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", method: True}
        (base / "config.json").write_text(json.dumps(config))

    return change


def _index_of_others(base: Path) -> None:
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model-1-of-2.safetensors"}}))


LEFT: dict[str, tuple[Callable[[Path], object], str]] = {
    "adapter": (
        lambda base: (base / "adapter_config.json").write_text("{}"),
        r"with an adapter(?s:.*)remedy: remove adapter_config\.json and adapter_model\.safetensors if",
    ),
    "index": (_index_of_others, r"both model\.safetensors, which .* remedy: remove the one that was left"),
    "nf4": (_quantised_as("load_in_4bit"), r"quantised, and .*weight is torch\.float32.* remedy: remove quantization_"),
    "int8": (
        _quantised_as("load_in_8bit"),
        r"quantised, and .*weight is torch\.float32.* remedy: remove quantization_",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_an_earlier_model_left_in_a_folder_is_refused(
    base_of: Callable[[str], Path], config_for: Callable[..., Config], tmp_path: Path, name: str
) -> None:
    """transformers takes all of it without a word: an adapter was loaded and trained along."""
    base = Path(shutil.copytree(base_of("llama"), tmp_path / "base"))
    change, says = LEFT[name]
    change(base)
    with pytest.raises(ModelError, match=rf"(?s){says}"):
        build(config_for("llama", model={"base": str(base)}), CPU)
    if name == "adapter":  # as in a hub's repository, whose files are not looked at before
        with pytest.raises(ModelError, match=rf"(?s){says}"):
            load_base(str(base), config_for("llama").model, torch.float32, CPU)


def test_the_single_file_counts_where_a_hub_has_an_index_too(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(base_of("llama"), tmp_path / "base"))
    _index_of_others(base)
    assert weight_files(str(base)) == [base / "model.safetensors"]


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_conv1d_gets_adapters_as_linear_modules_do(
    base_of: Callable[[str], Path], config_for: Callable[..., Config], tmp_path: Path, quantization: str
) -> None:
    """GPT-2's linear modules: no adapter found one, and the error blamed `first_layer`."""
    base = Path(shutil.copytree(base_of("llama"), tmp_path / "base"))
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
    gpt2 = GPT2Model(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    gpt2.save_pretrained(base)
    assert cost_of_model(gpt2).linear == 2 * 2 * 12 * 64**2
    config = config_for("llama", model={"base": str(base), "quantization": quantization, "lora": {"r": 2}})
    classifier = build(config, CPU)
    adapted = {name.split(".lora_")[0].split(".h.")[1] for name, _ in classifier.named_parameters() if "lora_" in name}
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert adapted == {f"{layer}.{name}" for layer in (0, 1) for name in names}
    for parameter in filter(lambda one: one.requires_grad, classifier.parameters()):
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path / "bundle"
    folder.mkdir()
    write_model(
        folder, classifier, config, load_tokenizer(str(base)), name="g", fold=None, metrics={}, prior=[0.4, 0.3, 0.3],
        probes=[],
    )  # fmt: skip
    batch = padded([Item(0, 0, np.arange(5, 60, dtype=np.int32))])
    with torch.inference_mode():
        expected = classifier.eval()(batch.inputs, batch.read_at, batch.lengths)
        loaded = load_classifier(open_bundle(folder), CPU)
        assert torch.equal(loaded(batch.inputs, batch.read_at, batch.lengths), expected)
        if quantization == "none":
            merged = without_adapter(loaded, torch.float32)
            assert (merged(batch.inputs, batch.read_at, batch.lengths) - expected).abs().max() <= 1e-4


def test_a_base_without_linear_modules_is_named() -> None:
    with pytest.raises(ModelError, match="Embedding has no linear module"):
        add_adapters(torch.nn.Embedding(3, 3), Lora())


ANSWERS = {
    "gated": (GatedRepoError, "is gated", "accept its terms on https://huggingface.co/owner/x, and set HF_TOKEN"),
    "private": (RepositoryNotFoundError, "no public model owner/x", "if it is private, set HF_TOKEN"),
    "silent": (HTTPError, "can't be reached", "set HF_HUB_OFFLINE=1"),
    "offline": (None, "not in the cache of the hub", "run `hf download owner/x` before"),
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("read", [load_tokenizer, read_settings])
def test_the_hub_is_asked_once_and_its_answer_is_a_line(
    answer: str, read: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, what, remedy = ANSWERS[answer]
    asked: list[str] = []

    def auth_check(_: object, model: str) -> None:
        asked.append(model)
        response = SimpleNamespace(headers={}, request=None)
        raise kind("no", **({} if kind is HTTPError else {"response": response}))

    ask_hub.cache_clear()
    monkeypatch.setattr("huggingface_hub.HfApi.auth_check", auth_check)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", kind is None)
    with pytest.raises(ModelError, match=what) as caught:
        read("owner/x")
    assert remedy in str(caught.value)
    assert asked == ["owner/x"] * (kind is not None)
