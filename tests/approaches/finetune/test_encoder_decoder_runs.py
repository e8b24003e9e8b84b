"""Runs on encoder-decoders: trained, merged over folds, exported, untrained with examples, and on flawed rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_decoders_support import tiny_encoder_decoder
from safetensors.torch import load_file
from support.runs import run_config, train_run
from tests_support import write_csv

from pairclf.approaches.finetune.export import export
from pairclf.approaches.finetune.merge import merge
from pairclf.approaches.finetune.optimizers import parameter_groups
from pairclf.bundles.bundle import open_bundle
from pairclf.config import Config, Train, load_config, resolve
from pairclf.data.scores import class_matrix, read_scores
from pairclf.demo.arena import generate, write_lmsys
from pairclf.inference.verify import verify
from pairclf.model.engine import build
from pairclf.runs.fit import fit
from pairclf.task import Row

WORDS = {"winner_model_a": "A", "winner_model_b": "B", "winner_tie": "t"}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5_v1_1": ("t5_v1_1", {"quantization": "nf4", "readout": "label_tokens", "label_words": WORDS}),
    "t5gemma": ("t5gemma", {"pooling": "mean"}),
}


@pytest.fixture(scope="module", params=RUNS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished cross-validation over two folds."""
    kind, model = RUNS[request.param]
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("run")
    tiny_encoder_decoder(kind, base)
    train_run(folder, run_config(folder, base, model={**model, "dtype": "float32"}, train={"layout": "padded"}))
    return load_config(folder / "config.yaml")


@pytest.mark.thorough  # the contract of approaches goes through the rest of a run, and recipes through NF4
def test_folds_are_merged_and_exported(trained: Config, tmp_path: Path) -> None:
    """NF4 weights are rounded, and whole ones are not: what a merge into these moves is another test's matter."""
    shift = 0.5 if trained.model.quantization == "nf4" else 0.01
    merged = merge(trained, tmp_path / "merged", max_shift=shift, into="float32")
    half = export(trained, tmp_path / "half", to="float16", fold=0, max_shift=shift)
    small = export(trained, tmp_path / "small", to="int8", fold=0, max_shift=0.5)
    for bundle in map(open_bundle, (merged, half, small)):
        assert not bundle.manifest.needs_base
        ((_, verified),) = verify([bundle.folder], None, None)
        assert verified["rows"] == len(bundle.manifest.probes) > 0
    names = {name: weight.dtype for name, weight in load_file(small / "backbone" / "model.safetensors").items()}
    held = {dtype for name, dtype in names.items() if name.endswith(".wo.weight")}
    assert held == ({torch.float32} if trained.model.readout == "label_tokens" else set())
    assert torch.int8 in names.values()
    assert any("decoder." in name for name in names) == (trained.model.pooling != "mean")


def test_a_base_is_asked_without_training_with_examples_before_each_row(tmp_path: Path) -> None:
    tiny_encoder_decoder("t5", base := tmp_path / "base")
    write_lmsys(generate(30, seed=1), tmp_path, n_test=4)
    config = resolve({
        "approach": "prompt",
        "output_dir": str(tmp_path / "run"),
        "data": {"folder": str(tmp_path), "train": ["train.csv"]},
        "folds": {"n_splits": 2},
        "inputs": {"max_length": 600},
        "model": {"base": str(base), "quantization": "none", "readout": "label_tokens", "label_words": WORDS},
        "prompt": {"k": 2},
    })  # fmt: skip
    bundle = open_bundle(fit(config, 0))
    assert bundle.manifest.weights == "base"
    assert bundle.config.model.pooling == "decoder"
    assert {"log_loss", "label_mass"} <= bundle.manifest.metrics.keys()


def test_rows_of_one_class_with_empty_and_endless_texts_are_trained_and_scored(
    tmp_path: Path, without_forecast: None
) -> None:
    tiny_encoder_decoder("t5", base := tmp_path / "base")
    texts = ["", "x" * 100_000, "a", "b"]
    rows = [
        Row(str(number), {"prompt": (f"q{number}",), "response_a": (text,), "response_b": ("",)}, (1.0, 0.0, 0.0))
        for number, text in enumerate(texts)
    ]
    write_csv(tmp_path / "train.csv", rows)
    config = run_config(tmp_path, base, model={"pooling": "mean"}, train={"layout": "padded", "max_steps": 1})
    bundle = open_bundle(fit(config, 0))
    scores = read_scores(tmp_path / "run" / "fold0" / "oof.parquet", config.task)
    assert np.isfinite(class_matrix(scores, config.task)).all()
    assert len(bundle.manifest.probes) == len(scores) == 2


def test_lower_layers_learn_slower_and_the_encoder_is_below_the_decoder(tmp_path: Path) -> None:
    tiny_encoder_decoder("t5", tmp_path)
    classifier = build(
        run_config(tmp_path, tmp_path, model={"lora": None}, train={"layout": "padded"}), torch.device("cpu")
    )
    names = {id(weight): name for name, weight in classifier.named_parameters()}
    rates = {
        names[id(weight)].removeprefix("backbone."): group["lr"]
        for group in parameter_groups(classifier, Train(learning_rate=1.0, layer_decay=0.5))
        for weight in group["params"]
    }
    expected = {
        "head.weight": 1.0,
        "decoder.final_layer_norm.weight": 1.0,
        "decoder.block.1.layer.0.SelfAttention.v.weight": 1.0,
        "decoder.block.0.layer.1.EncDecAttention.k.weight": 0.5,
        "encoder.final_layer_norm.weight": 0.25,
        "encoder.block.1.layer.1.DenseReluDense.wo.weight": 0.25,
        "encoder.block.0.layer.0.SelfAttention.q.weight": 0.125,
        "shared.weight": 0.0625,
    }
    assert {name: rates[name] for name in expected} == expected
