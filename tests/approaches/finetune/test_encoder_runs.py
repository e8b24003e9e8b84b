"""Encoders go where decoders go: exported, quantised and merged over folds, with whole weights and with adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.runs import run_config, train_run

from pairclf.approaches import verify_probes
from pairclf.approaches.finetune.export import export
from pairclf.approaches.finetune.merge import merge
from pairclf.bundles.bundle import open_bundle
from pairclf.config import Config, load_config
from pairclf.model.backbone import stored_weights
from pairclf.model.weights import load_classifier


@pytest.fixture(scope="module")
def config(base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Of a run with adapters, two folds trained; the tokenizer has a token of its own for line breaks."""
    folder = tmp_path_factory.mktemp("encoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pairclf.approaches.finetune.train.estimate_resources", lambda *_: None)
        train_run(folder, run_config(folder, base_of("modernbert"), model={"pooling": "mean"}))
    return load_config(folder / "config.yaml")


@pytest.mark.thorough  # `check_approach` goes through most of it, but for these two commands
@pytest.mark.parametrize("to", ["float16", "int8"])
def test_an_exported_encoder_verifies(config: Config, tmp_path: Path, to: str) -> None:
    bundle = open_bundle(export(config, tmp_path / to, to=to, fold=0, max_shift=1.0))
    assert bundle.manifest.weights == "whole"
    assert stored_weights(bundle.files.backbone) == (to if to == "int8" else None)
    kinds = {weight.dtype for weight in load_classifier(bundle, torch.device("cpu")).backbone.parameters()}
    assert (torch.int8 in kinds) == (to == "int8")
    assert verify_probes(bundle) <= 1e-5


@pytest.mark.thorough
def test_adapters_of_an_encoder_are_averaged_over_folds(config: Config, tmp_path: Path) -> None:
    bundle = open_bundle(merge(config, tmp_path / "merged", max_shift=1.0))
    assert (bundle.manifest.weights, bundle.config.model.pooling, bundle.config.train.swap) == (
        "adapter",
        "mean",
        "none",
    )
    assert verify_probes(bundle) <= 1e-5
