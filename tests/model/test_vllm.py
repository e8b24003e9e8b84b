"""vLLM is refused with its reason where it can't serve; where it can, it must give the bundle's probes their logits."""

from __future__ import annotations

import importlib.machinery
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bundles_support import write_model
from tests_support import make_rows

from pairclf.approaches.protocol import Assignment
from pairclf.bundles.bundle import Bundle, open_bundle
from pairclf.bundles.inputs import builder_of
from pairclf.bundles.probes import pick_probes
from pairclf.config import Config, override
from pairclf.errors import BundleError, ModelError
from pairclf.inference.worker import load_bundle
from pairclf.inputs.render import InputBuilder
from pairclf.inputs.sequences import LargestPass
from pairclf.model import vllm as backend
from pairclf.model.backbone import load_tokenizer
from pairclf.model.engine import build
from pairclf.model.scoring import by_order, items_of, score
from pairclf.model.vllm import VllmScorer, why_not
from pairclf.model.weights import load_classifier

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture
def bundle_of(config_for: Callable[..., Config], tmp_path: Path) -> Callable[..., Bundle]:
    """`bundle_of("llama", lora=None)`: a bundle of random weights with probes."""

    def make(kind: str, **model: object) -> Bundle:
        config = config_for(kind, model={"lora": None, "dtype": "float32", **model})
        classifier = build(config, CPU).eval()
        for one in classifier.head.parameters():
            torch.nn.init.normal_(one, std=0.3)
        tokenizer = load_tokenizer(config.model.base)
        rows = make_rows(4)
        items = items_of(InputBuilder(tokenizer, config.task, config.inputs).encode(rows), orders=2)
        orders = by_order(items, score(classifier, items, tokens_per_batch=1_000), len(rows))
        probes = pick_probes(rows, orders)
        figures: Any = {"metrics": {}, "prior": [1 / 3] * 3}
        write_model(tmp_path, classifier, config, tokenizer, name="test", fold=0, probes=probes, **figures)
        return open_bundle(tmp_path)

    return make


class FakeLLM:
    """Embeds with the real backbone, as vLLM does: the last token's state, divided by its norm unless told not to."""

    given: dict[str, Any]

    def __init__(self, **options: Any) -> None:
        from transformers import AutoModel

        type(self).given = options | {"seen": os.environ.get("CUDA_VISIBLE_DEVICES")}
        self.model = AutoModel.from_pretrained(options["model"], dtype=getattr(torch, options["dtype"])).eval()

    @torch.inference_mode()
    def embed(self, prompts: list[dict[str, list[int]]], *, pooling_params: Any, use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        outputs = []
        for prompt in prompts:
            state = self.model(input_ids=torch.tensor([prompt["prompt_token_ids"]])).last_hidden_state[0, -1]
            state = state if pooling_params.raw else state / state.norm()
            outputs.append(SimpleNamespace(outputs=SimpleNamespace(embedding=state.tolist())))
        return outputs


def install(monkeypatch: pytest.MonkeyPatch, field: str = "use_activation") -> None:
    """A module that stands for vllm, and a GPU like a T4."""

    class PoolingParams:
        __struct_fields__ = ("dimensions", field)

        def __init__(self, **given: bool) -> None:
            assert set(given) == {field}
            self.raw = not given[field]

    module = ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.PoolingParams = FakeLLM, PoolingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")


@pytest.mark.parametrize("head", ["linear", "two_layer"])
@pytest.mark.parametrize("field", ["use_activation", "normalize"])
def test_it_gives_the_logits_of_the_bundle(
    bundle_of: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, head: str, field: str
) -> None:
    bundle = bundle_of("llama", head=head)
    install(monkeypatch, field)
    scorer = VllmScorer(bundle, [GPU])
    assert FakeLLM.given["seen"] == "6"
    assert (FakeLLM.given["runner"], FakeLLM.given["convert"], FakeLLM.given["max_model_len"]) == (
        "pooling",
        "embed",
        160,
    )
    items = items_of(builder_of(bundle).encode(make_rows(5)), orders=2)
    logits, rescored = scorer.collect(items, scorer.launch(items))
    assert rescored == 0
    assert np.abs(logits - score(load_classifier(bundle, CPU), items, tokens_per_batch=1_000)).max() <= 1e-5
    states = scorer.launch(items).clone()
    states[3, 0] = float("inf")
    assert np.flatnonzero(np.isnan(scorer.collect(items, states)[0]).any(axis=1)).tolist() == [3]


def test_one_that_divides_by_the_norm_is_found_out(
    bundle_of: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_of("llama")
    install(monkeypatch)
    embed = FakeLLM.embed
    normed = SimpleNamespace(raw=False)
    monkeypatch.setattr(
        FakeLLM, "embed", lambda self, prompts, **_: embed(self, prompts, pooling_params=normed, use_tqdm=False)
    )
    with pytest.raises(BundleError, match="vLLM scores the probe rows differently"):
        VllmScorer(bundle, [GPU])


def test_every_reason_is_said(bundle_of: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundle_of("gemma2")

    def reason(*changes: str, devices: tuple[torch.device, ...] = (GPU,)) -> str | None:
        return why_not(replace(bundle, config=override(bundle.config, changes)), devices)

    assert "not installed" in str(reason())
    with pytest.raises(
        ModelError,
        match=r"(?s)predict\.backend=vllm: the package vllm is not installed: pip install vllm.*transformers",
    ):
        VllmScorer(bundle, [GPU])
    install(monkeypatch)
    assert "several devices" in str(reason(devices=(GPU, CPU)))
    adapter = replace(bundle, manifest=replace(bundle.manifest, weights="adapter"))
    assert "holds an adapter" in str(why_not(adapter, (GPU,)))
    assert "reads every token" in str(reason("model.pooling=mean"))
    assert "needs a CUDA device, and this is cpu" in str(reason(devices=(CPU,)))
    assert "caps its scores softly" in str(reason())
    assert "bfloat16 needs compute capability 8.0, this GPU has 7.5" in str(reason("model.dtype=bfloat16"))
    found = backend.find_spec
    monkeypatch.setattr(backend, "find_spec", lambda name: name == "flashinfer" or found(name))
    assert reason() is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    assert "needs compute capability 7.0, this GPU has 6.1" in str(reason())


def test_the_worker_refuses_with_the_reason(bundle_of: Callable[..., Bundle]) -> None:
    bundle = bundle_of("llama")
    assignment = Assignment(bundle.folder, None, ("predict.backend=vllm",), ("cpu",), 0, LargestPass(64, 64, 2), 1)
    with pytest.raises(ModelError, match="package vllm is not installed"):
        load_bundle(assignment)
