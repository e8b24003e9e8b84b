"""A bundle as transformers' own class: equal logits for the probe rows, or a refusal that says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import bundles_of, random_bundle
from tests_support import make_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import pairclf
from pairclf.approaches.finetune import stock
from pairclf.approaches.finetune.stock import export_stock
from pairclf.bundles.bundle import Bundle, open_bundle
from pairclf.bundles.inputs import builder_of
from pairclf.config import Config, resolve
from pairclf.errors import ConfigError, ModelError
from pairclf.inputs.sequences import branches_of
from pairclf.model import readout

MakeConfig = Callable[..., Config]

DECODERS = ("llama", "gemma2")
ENCODERS = ("bert", "roberta", "electra", "deberta-v2")


@pytest.fixture(autouse=True)
def _biased_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As trained heads are: a bias that is lost would show."""

    def start(last: torch.nn.Linear) -> None:
        for weight in last.parameters():
            torch.nn.init.normal_(weight, std=0.5)

    monkeypatch.setattr(readout, "_start_small", start)


def bundle_of(folder: Path, config_for: MakeConfig, kind: str, **model: object) -> Bundle:
    own = {"head_bias": False} if kind in DECODERS else {}
    config = config_for(kind, model={**own, **model})
    return open_bundle(random_bundle(folder / "fold0" / "bundle", config, rows=make_rows(5)))


def logits_of(folder: Path, bundle: Bundle) -> np.ndarray:
    """`(P, 2, C)` of the probes, each row alone."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    encoded = builder_of(bundle).encode([probe.row() for probe in bundle.manifest.probes])
    with torch.inference_mode():
        logits = [
            [model(input_ids=torch.from_numpy(order.ids).long()[None]).logits[0].tolist() for order in row]
            for row in encoded
        ]
    return np.array(logits)


@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS])
def test_logits_are_those_of_the_bundle(kind: str, config_for: MakeConfig, tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, config_for, kind)
    export_stock(bundle.folder, tmp_path / "stock")
    expected = np.array([probe.logits for probe in bundle.manifest.probes])
    assert np.ptp(expected, axis=0).max() > 5e-3, "rows differ"
    assert np.abs(logits_of(tmp_path / "stock", bundle) - expected).max() <= 1e-4
    model: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "stock")
    assert list(model.config.id2label.values()) == bundle.manifest.classes
    assert AutoTokenizer.from_pretrained(tmp_path / "stock").vocab_size > 0
    assert not list((tmp_path / "stock").glob("*.bin"))


def reward_bundle(folder: Path, config_for: MakeConfig, **model: object) -> Bundle:
    tree = config_for("llama", model={"readout": "reward", **model}).model_dump(exclude={"classical"})
    tree["inputs"]["template"] = {"text": "{prompt}\n\nAnswer: {response}\n\nVerdict: "}
    config = resolve({**tree, "train": tree["train"] | {"layout": "shared"}})
    return open_bundle(random_bundle(folder / "fold0" / "bundle", config, rows=make_rows(5)))


@pytest.mark.parametrize("ties", ["davidson", "rao_kupper"])
def test_a_reward_model_has_one_label_and_reads_one_answer(
    ties: str, config_for: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As trl's reward models: a better answer has a larger number."""
    bundle = reward_bundle(tmp_path, config_for, tie_model=ties)
    export_stock(bundle.folder, tmp_path / "stock")
    model: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "stock").eval()
    assert model.config.id2label == {0: "reward"}
    rows = builder_of(bundle).encode([probe.row() for probe in bundle.manifest.probes])
    for probe, (both, *_) in zip(bundle.manifest.probes, rows, strict=True):
        sides = branches_of(both.ids)
        with torch.inference_mode():
            a, b = (model(input_ids=torch.from_numpy(side).long()[None]).logits.item() for side in sides)
        assert abs(a + b - sum(probe.logits[0][:2])) <= 1e-4
        assert (a > b) == (probe.logits[0][0] > probe.logits[0][1])
    monkeypatch.setattr(stock, "branches_of", lambda ids: branches_of(ids)[::-1])
    with pytest.raises(ModelError, match="its logits differ by"):
        export_stock(bundle.folder, tmp_path / "other")


@pytest.mark.parametrize(("kind", "name", "value"), [("electra", "SHIFT", 0.0), ("bert", "SCALE", 1.0)])
def test_other_logits_are_refused_and_nothing_is_written(
    kind: str, name: str, value: float, config_for: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock, name, value)
    bundle = bundle_of(tmp_path, config_for, kind)
    with pytest.raises(ModelError, match="its logits differ by"):
        export_stock(bundle.folder, tmp_path / "stock")
    assert not (tmp_path / "stock").exists()


def test_what_no_stock_class_has_is_refused(
    config_for: MakeConfig, trained_run: Callable[[str], Path], tmp_path: Path
) -> None:
    biased = bundle_of(tmp_path / "biased", config_for, "llama", head_bias=True)
    with pytest.raises(ModelError, match=r"(?s)head without a bias.*model\.head_bias=false"):
        export_stock(biased.folder, tmp_path / "stock")
    mean = bundle_of(tmp_path / "mean", config_for, "bert", pooling="mean")
    with pytest.raises(ModelError, match=r"model\.pooling=mean, and that class reads the first token's state"):
        export_stock(mean.folder, tmp_path / "stock")
    modern = bundle_of(tmp_path / "modern", config_for, "modernbert")
    with pytest.raises(ModelError, match="the head of the class of modernbert is none"):
        export_stock(modern.folder, tmp_path / "stock")
    with pytest.raises(ConfigError, match="takes one bundle"):
        pairclf.load(bundles_of(trained_run("llama"))).export_transformers(tmp_path / "stock")
    with pytest.raises(ConfigError, match=r"model\.head_bias=false is for"):
        resolve({"model": {"head_bias": False, "head": "two_layer"}})


def test_the_command_writes_it(
    trained_run: Callable[[str], Path], config_for: MakeConfig, tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    run, out = trained_run("llama"), tmp_path / "stock"
    code, printed = cli("export", run / "run", "--fold", 0, "--to", "transformers", "--out", out)
    assert (code, out.exists()) == (2, False)
    assert "head without a bias" in printed
    bundle = bundle_of(tmp_path, config_for, "llama")
    arguments = ["--bundle", bundle.folder, "--to", "transformers", "--out", out]
    assert cli("export", run / "config.yaml", *arguments)[0] == 0
    assert (out / "model.safetensors").is_file()
