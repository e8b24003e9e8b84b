"""A merged bundle is the mean that it is said to be, opens anywhere, and is not kept if its log loss moved too far."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.runs import TEST_ROWS, bundles_of, config_of, copy_run, run_config
from torch import Tensor
from transformers import AutoModel

from pairclf.approaches import verify_probes
from pairclf.approaches.finetune.drift import ScoreDrift, require_within
from pairclf.approaches.finetune.merge import check_alike, error_of_factors, mean_of_factors, mean_of_products, merge
from pairclf.bundles.bundle import open_bundle
from pairclf.bundles.inputs import builder_of
from pairclf.bundles.manifest import amend, read_manifest
from pairclf.config import Lora, dump_config, override
from pairclf.data.scores import read_scores, write_scores
from pairclf.demo.arena import generate, write_lmsys
from pairclf.errors import BundleError, ConfigError, DataError
from pairclf.model.scoring import items_of, score
from pairclf.model.weights import load_classifier
from pairclf.runs.fit import fit
from pairclf.task import LMSYS

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("without_forecast", "quick_workers")
Cli = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def plain(trained_run: Callable[[str], Path]) -> Path:
    """Two folds on a base that was not quantised."""
    return trained_run("llama")


@pytest.fixture(scope="module")
def nf4(trained_run: Callable[[str], Path]) -> Path:
    """Two folds on an NF4 base."""
    return trained_run("gemma2")


def logits_of(folder: Path, rows_of: Path) -> np.ndarray[Any, Any]:
    """Logits of the probe rows of one bundle by another, as it is loaded."""
    bundle = open_bundle(folder)
    rows = [probe.row() for probe in open_bundle(rows_of).manifest.probes]
    return score(
        load_classifier(bundle, CPU), items_of(builder_of(bundle).encode(rows), orders=2), tokens_per_batch=2_000
    )


def deltas(folder: Path, base: Path) -> dict[str, Tensor]:
    """The update of each weight, as plain peft has it: `{module: (out, in)}`."""
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base, dtype=torch.float32), str(folder / "adapter"))
    adapted = {name: one for name, one in model.named_modules() if hasattr(one, "lora_A")}
    return {name: one.get_delta_weight("default").detach() for name, one in adapted.items()}


def off(found: dict[str, Tensor], parts: list[dict[str, Tensor]]) -> float:
    """Norm of the difference from the mean of the parts, relative to the norm of that mean."""
    assert all(found.keys() == part.keys() for part in parts)
    means = {name: torch.stack([part[name] for part in parts]).mean(0) for name in found}
    wrong = sum(float((found[name] - means[name]).square().sum()) for name in found)
    return float((wrong / sum(float(one.square().sum()) for one in means.values())) ** 0.5)


def test_merge_exact_is_the_mean_of_updates_and_factors_is_not(
    plain: Path, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_of("llama")
    parts = [deltas(folder, base) for folder in bundles_of(plain)]
    assert off(parts[0], parts) > 0.1  # the folds differ
    out = merge(config_of(plain), tmp_path / "exact", max_shift=1.0)
    assert off(deltas(out, base), parts) <= 1e-6
    other = merge(config_of(plain), tmp_path / "factors", max_shift=1.0, average="factors")
    drift = off(deltas(other, base), parts)
    assert drift > 0.01
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in bundles_of(plain)]
    assert error_of_factors(adapters) == pytest.approx(drift, rel=1e-4)
    heads = [load_file(folder / "head.safetensors") for folder in [*bundles_of(plain), out]]
    assert torch.allclose(heads[2]["weight"], (heads[0]["weight"] + heads[1]["weight"]) / 2, atol=1e-7)


@pytest.mark.parametrize("rslora", [False, True])
def test_mean_of_products_goes_by_the_scale(rslora: bool) -> None:
    """At alpha / rank or alpha / sqrt(rank), and the scale of the other one must be wrong."""
    generator = torch.Generator().manual_seed(0)

    def drawn() -> dict[str, Tensor]:
        return {f"q.lora_{name}.weight": torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}

    def update(weights: dict[str, Tensor], rank: int, rslora: bool) -> Tensor:
        return weights["q.lora_B.weight"] @ weights["q.lora_A.weight"] * 8 / (rank**0.5 if rslora else rank)

    parts = [drawn() for _ in range(3)]
    wanted = torch.stack([update(part, 4, rslora) for part in parts]).mean(0)
    right = mean_of_products(parts, Lora(r=4, lora_alpha=8, use_rslora=rslora))
    wrong = mean_of_products(parts, Lora(r=4, lora_alpha=8, use_rslora=not rslora))
    assert (update(right, 12, rslora) - wanted).abs().max() <= 1e-5
    assert (update(wrong, 12, rslora) - wanted).abs().max() > 0.1
    assert (update(mean_of_factors(parts), 4, rslora) - wanted).abs().max() > 0.1


SHAPES = {"A": (4, 16), "B": (24, 4)}


@pytest.mark.parametrize("average", ["exact", "factors"])
def test_merge_of_a_bundle_and_itself_is_the_bundle(nf4: Path, tmp_path: Path, average: str) -> None:
    config = copy_run(nf4, tmp_path)
    first, second = bundles_of(tmp_path)
    kept = open_bundle(second).manifest
    shutil.rmtree(second)
    shutil.copytree(first, second)
    amend(second, metrics=kept.metrics, probes=open_bundle(first).manifest.probes)  # its own seal, fold 1's scores
    assert open_bundle(first).manifest.seal != open_bundle(second).manifest.seal
    out = merge(config, tmp_path / "out", max_shift=1e-6, average=average)
    assert open_bundle(out).manifest.metrics["merged_largest_change"] <= 1e-5
    assert np.abs(logits_of(out, first) - logits_of(first, first)).max() <= 1e-5


def test_merge_into_float32_scores_as_the_unmerged_model(plain: Path, tmp_path: Path) -> None:
    first, second = bundles_of(plain)
    out = merge(config_of(plain), tmp_path / "out", max_shift=1e-6, folds=[0], into="float32")
    merged = open_bundle(out)
    assert np.abs(logits_of(first, out) - logits_of(out, out)).max() <= 1e-4
    assert np.abs(logits_of(second, out) - logits_of(out, out)).max() > 1e-2
    assert (merged.config.model.lora, merged.config.model.quantization) == (None, "none")
    assert (merged.manifest.fold, merged.manifest.dtype) == (0, "float32")
    assert verify_probes(merged) <= 1e-6


def rounded_once(saved: Path, part: Path, base: Path, dtype: torch.dtype) -> bool:
    """Whether the merged weights are W + BA of float32, in `dtype`; rounding the two apart must give others."""
    weights = load_file(saved / "backbone" / "model.safetensors")
    whole = AutoModel.from_pretrained(base, dtype=torch.float32).state_dict()
    updates = {name.removeprefix("base_model.model.") + ".weight": one for name, one in deltas(part, base).items()}
    assert any((weights[name] != whole[name].to(dtype) + one.to(dtype)).any() for name, one in updates.items())
    return all(torch.equal(weights[name], (whole[name] + one).to(dtype)) for name, one in updates.items())


@pytest.mark.parametrize("into", ["bfloat16", "float16"])
def test_merge_rounds_weights_once(plain: Path, base_of: Callable[[str], Path], tmp_path: Path, into: str) -> None:
    out = merge(config_of(plain), tmp_path / "out", max_shift=0.05, folds=[0], into=into)
    assert rounded_once(out, bundles_of(plain)[0], base_of("llama"), getattr(torch, into))


def test_merge_holds_a_base_in_the_dtype_to_write(
    plain: Path, base_of: Callable[[str], Path], tmp_path: Path, cli: Cli
) -> None:
    base = Path(shutil.copytree(base_of("llama"), tmp_path / "base"))
    AutoModel.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    write_lmsys(generate(24, seed=1), tmp_path, n_test=6)
    config = run_config(tmp_path, base)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    part = fit(config, 0)
    line = ["merge", tmp_path / "config.yaml", "--out", tmp_path / "out", "--fold", 0, "--into", "bfloat16"]
    code, text = cli(*line, "--max-shift", 0.05)
    assert code == 0, text
    assert "of memory (bfloat16)" in text
    assert rounded_once(tmp_path / "out", part, base, torch.bfloat16)


def test_merge_finds_a_moved_base_and_refuses_another(
    plain: Path, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(base_of("llama"), tmp_path / "moved"))
    out = merge(config_of(plain), tmp_path / "out", max_shift=1.0, rows=4, base=moved)
    assert open_bundle(out).config.model.base == str(moved)
    with pytest.raises(BundleError, match="not the one"):
        merge(config_of(plain), out, max_shift=1.0, rows=4, base=base_of("qwen2"))


def test_merge_refuses_an_nf4_adapter_on_whole_weights_that_moves_the_loss(nf4: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "out"
    line = ["merge", nf4 / "run", "--out", out, "--fold", 0, "--into", "float32"]
    code, text = cli(*line, "--max-shift", "1e-6")
    assert code == 2
    assert "moved the log loss" in text
    assert "--max-shift allows 1e-06" in text
    assert "Traceback" not in text
    assert list(tmp_path.iterdir()) == []
    code, text = cli(*line, "--max-shift", "0.5")
    assert code == 0, text
    for words in ("log loss", "accuracy", "largest change of a probability", "mean change"):
        assert words in text
    moved = open_bundle(out).manifest.metrics["merged_shift"]
    assert 1e-6 < abs(moved) < 0.5
    before = open_bundle(bundles_of(nf4)[0]).manifest.metrics["log_loss"]
    assert open_bundle(out).manifest.metrics["merged_reference"] == pytest.approx(before)


def test_merge_refused_leaves_the_older_bundle(nf4: Path, tmp_path: Path) -> None:
    out = merge(config_of(nf4), tmp_path / "out", max_shift=1.0, folds=[0], into="bfloat16")
    seal = open_bundle(out).manifest.seal
    with pytest.raises(BundleError, match="moved the log loss"):
        merge(config_of(nf4), out, max_shift=1e-9, folds=[0], into="float32")
    assert open_bundle(out).manifest.seal == seal
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("into", [None, "bfloat16"])
def test_merged_bundle_verifies_and_predicts(nf4: Path, tmp_path: Path, cli: Cli, into: str | None) -> None:
    out = tmp_path / "merged"
    wanted = [] if into is None else ["--into", into]
    code, text = cli("merge", nf4 / "config.yaml", "--out", out, "--max-shift", 1, "--rows", 12, *wanted)
    assert code == 0, text
    assert "on 12 rows" in text
    assert "In sample" in text
    bundle = open_bundle(out)
    assert bundle.manifest.fold is None
    assert bundle.manifest.metrics["merged_rows"] == 12
    assert len(bundle.manifest.probes) == 8
    code, text = cli("verify", out)
    assert code == 0, text
    code, text = cli("predict", out, "--data", nf4 / "test.csv", "--out", tmp_path / "submission.csv")
    assert code == 0, text
    assert len(pl.read_csv(tmp_path / "submission.csv")) == TEST_ROWS


def test_merged_bundle_was_trained_on_what_its_parts_were(nf4: Path, tmp_path: Path) -> None:
    seen = [open_bundle(folder).trained_on() for folder in bundles_of(nf4)]
    merged = open_bundle(merge(config_of(nf4), tmp_path / "out", max_shift=1.0, rows=4)).trained_on()
    assert merged is not None
    prompts = set(merged["prompt"])
    assert prompts == set().union(*(set(one["prompt"]) for one in seen if one is not None))
    assert all(one is not None and set(one["prompt"]) < prompts for one in seen)
    assert merged["sample"].null_count() == 0


def test_merged_bundle_has_the_mean_prior_of_its_parts(plain: Path, tmp_path: Path) -> None:
    priors = [read_manifest(folder).prior for folder in bundles_of(plain)]
    assert all(sum(one) == pytest.approx(1) for one in priors)
    merged = read_manifest(merge(config_of(plain), tmp_path / "out", max_shift=1.0, rows=4))
    assert merged.prior == pytest.approx(np.mean(priors, axis=0))


def test_merge_compares_a_bundle_of_all_rows_with_itself(plain: Path, tmp_path: Path) -> None:
    config = copy_run(plain, tmp_path)
    for fold in bundles_of(tmp_path):
        shutil.rmtree(fold)
    fit(config, None)
    out = merge(config, tmp_path / "out", max_shift=1e-6, into="float32", rows=5)
    assert open_bundle(out).manifest.metrics["merged_largest_change"] <= 1e-5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("model.lora.r=3", r"model\.lora\.r \(2 and 3\)"),
        ("model.lora.lora_alpha=8", r"model\.lora\.lora_alpha \(32 and 8\)"),
        ("model.lora.target_modules=[q_proj]", r"model\.lora\.target_modules \(all-linear and"),
        ("model.lora.use_rslora=true", r"model\.lora\.use_rslora"),
        ("model.quantization=nf4", r"model\.quantization \(none and nf4\)"),
        ("model.head=two_layer", r"model\.head \(linear and two_layer\)"),
        ("inputs.max_length=64", r"inputs\.max_length"),
        ("inputs.template.text='{prompt} {response_a} {response_b} ?'", r"differ in inputs\.template;"),
        ("task.name=other", r"differ in task;"),
        ("model.lora.use_dora=true", "DoRA can't be averaged"),
        ("model.lora=null", "nothing to merge"),
    ],
)
def test_check_alike_refuses_parts_of_unlike_kinds(plain: Path, change: str, named: str) -> None:
    one, other = (open_bundle(folder) for folder in bundles_of(plain))
    check_alike([one, other])
    check_alike(
        [
            one,
            replace(other, config=override(other.config, ["model.lora.lora_dropout=0.3", "train.num_train_epochs=3"])),
        ]
    )
    with pytest.raises(BundleError, match=named):
        check_alike([one, replace(other, config=override(other.config, [change]))])


def test_merge_takes_dora_alone(plain: Path, tmp_path: Path) -> None:
    config = copy_run(plain, tmp_path)
    for folder in bundles_of(tmp_path):
        shutil.rmtree(folder.parent)
    fit(override(config, ["model.lora.use_dora=true"]), 1)
    out = merge(config, tmp_path / "out", max_shift=1e-5, folds=[1], into="float32")
    assert open_bundle(out).manifest.metrics["merged_largest_change"] <= 1e-4


def test_merge_says_what_it_can_not_do(plain: Path, tmp_path: Path, cli: Cli) -> None:
    for arguments, words in (
        (["--fold", 0], "there is nothing to merge"),
        (["--fold", 0, "--fold", 0], "twice"),
        (["--fold", 7], "does not exist"),
        (["--into", "int8"], "'int8' is not one of"),
    ):
        code, text = cli("merge", plain / "config.yaml", "--out", tmp_path / "out", *arguments)
        assert code == 2
        assert words in text
    code, text = cli("merge", plain / "config.yaml", "--out", bundles_of(plain)[0])
    assert code == 2
    assert "would overwrite" in text
    with pytest.raises(ConfigError, match="would overwrite"):
        merge(config_of(plain), bundles_of(plain)[0] / "adapter" / "new", max_shift=1.0)
    assert list(tmp_path.iterdir()) == []


def test_merge_refuses_a_whole_model(plain: Path, tmp_path: Path) -> None:
    config = copy_run(plain, tmp_path)
    out = merge(config, tmp_path / "out", max_shift=1.0, folds=[0], into="float32")
    shutil.rmtree(bundles_of(tmp_path)[0])
    shutil.copytree(out, bundles_of(tmp_path)[0])
    with pytest.raises(ConfigError, match="holds the bundle run-fold0-merged, and run-fold1-merged would replace it"):
        merge(config, out, max_shift=1.0, folds=[1], into="float32")
    with pytest.raises(BundleError, match="holds no adapter: there is nothing to merge"):
        merge(config, tmp_path / "again", max_shift=1.0, folds=[0], into="float32")


def test_merge_refuses_out_of_fold_scores_of_another_training(plain: Path, tmp_path: Path) -> None:
    config = copy_run(plain, tmp_path)
    path = bundles_of(tmp_path)[0].parent / "oof.parquet"
    scores = read_scores(path, LMSYS)
    a, b, _ = LMSYS.classes
    write_scores(path, scores.with_columns(pl.col(a).alias(b), pl.col(b).alias(a)))
    with pytest.raises(DataError, match="from different trainings"):
        merge(config, tmp_path / "out", max_shift=1.0)
    write_scores(path, scores.with_columns(row_hash=scores["row_hash"].reverse()))
    with pytest.raises(DataError, match="have the id of a row here and other texts"):
        merge(config, tmp_path / "out", max_shift=1.0)
    write_scores(path, scores.with_columns(id="x" + pl.col("id")))
    with pytest.raises(DataError, match="not among the labelled rows"):
        merge(config, tmp_path / "out", max_shift=1.0)


def test_merge_finds_a_small_disk_before_it_writes(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1_000))
    with pytest.raises(BundleError, match="are free where --out is"):
        merge(config_of(plain), tmp_path / "out", max_shift=1.0, into="float32")
    assert list(tmp_path.iterdir()) == []


def shift_of(parts: int, merged: float) -> ScoreDrift:
    return ScoreDrift(parts, 10, {"log_loss": 1.0}, {"log_loss": merged}, 0.0, 0.0, None, None, in_sample=False)


def test_judge_lets_a_mean_be_better_alone() -> None:
    for parts, merged in ((1, 1.003), (1, 0.997), (2, 1.003), (1, float("nan")), (2, float("nan"))):
        with pytest.raises(BundleError, match="moved the log loss"):
            require_within(shift_of(parts, merged), 0.002, Path("out"))
    for parts, merged in ((1, 1.001), (1, 0.999), (2, 1.001), (2, 0.9)):
        require_within(shift_of(parts, merged), 0.002, Path("out"))
