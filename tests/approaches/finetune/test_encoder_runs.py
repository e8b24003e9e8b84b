"""Encoders go where decoders go: taught by one, before one in a cascade, exported, quantised, merged over folds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from encoder_decoders_support import tiny_encoder_decoder
from support.runs import TEST_ROWS, run_config, train_run

from pairclf.approaches import verify_probes
from pairclf.approaches.finetune.export import export
from pairclf.approaches.finetune.merge import merge
from pairclf.bundles.bundle import open_bundle
from pairclf.config import Config, load_config
from pairclf.data.scores import class_matrix
from pairclf.inference.predict import predict
from pairclf.model.backbone import stored_weights
from pairclf.model.weights import load_classifier
from pairclf.runs.fit import fit
from pairclf.scores.metrics import entropy_of
from pairclf.task import LMSYS


@pytest.fixture(scope="module")
def config(base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Of a run with adapters, two folds trained; the tokenizer has a token of its own for line breaks."""
    folder = tmp_path_factory.mktemp("encoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pairclf.approaches.finetune.train.estimate_resources", lambda *_: None)
        train_run(folder, run_config(folder, base_of("modernbert"), model={"pooling": "mean"}))
    return load_config(folder / "config.yaml")


@pytest.mark.parametrize("kind", ["bert", pytest.param("t5", marks=pytest.mark.thorough)])
def test_a_decoder_teaches_an_encoder_and_scores_the_rows_that_it_is_least_sure_of(
    trained_run: Callable[[str], Path],
    base_of: Callable[[str], Path],
    tmp_path: Path,
    without_forecast: None,
    quick_workers: None,
    kind: str,
) -> None:
    """Out-of-fold scores of the decoder are a second target, and its bundle is the second stage of a cascade."""
    decoder = trained_run("llama")
    if kind == "t5":
        tiny_encoder_decoder(kind, base := tmp_path / "base")
    else:
        base = base_of(kind)
    train = {"layout": "padded", "max_steps": 2, "logging_steps": 1, "swap": "none"}
    bundles = {}
    for name, scores in {"taught": [str(decoder / "run" / "oof.parquet")], "untaught": []}.items():
        config = run_config(decoder, base, model={"lora": None}, train={**train, "distill": {"scores": scores}})
        bundles[name] = fit(config.model_copy(update={"output_dir": tmp_path / name}), 0)
    logs = {name: (bundle.parent / "metrics.jsonl").read_text().splitlines() for name, bundle in bundles.items()}
    first = {name: json.loads(lines[0])["loss"] for name, lines in logs.items()}
    assert first["taught"] > first["untaught"], "the divergence from the teacher is added"

    encoder, second = bundles["taught"], decoder / "run" / "fold0" / "bundle"
    cascade = tmp_path / "ensemble.yaml"
    cascade.write_text(f"members: [{{bundle: {encoder}}}, {{bundle: {second}, share: 0.25}}]")
    alone, other, scores = (
        predict([source], decoder / "test.csv", tmp_path / "submission.csv", sample=decoder / "sample_submission.csv")
        for source in (encoder, second, cascade)
    )
    cheap, dear, both = (class_matrix(table, LMSYS) for table in (alone, other, scores))
    twice = (scores["models"].list.len() == 2).to_numpy()
    assert twice.sum() == TEST_ROWS // 4
    assert np.abs(both - np.where(twice[:, None], (cheap + dear) / 2, cheap)).max() <= 1e-6
    unsure = entropy_of(cheap)
    assert unsure[twice].min() >= unsure[~twice].max()


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
