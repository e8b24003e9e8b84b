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
from torch import Tensor
from transformers import AutoModel

from pairclf.config import Config, Lora, dump_config, load_config, override, resolve
from pairclf.data.arena import generate, write_lmsys
from pairclf.data.tables import read_scores, write_scores
from pairclf.errors import BundleError, ConfigError, DataError
from pairclf.jobs.cv import cross_validate
from pairclf.jobs.fit import fit
from pairclf.jobs.merge import check_alike, drift_of_factors, mean_of_factors, mean_of_products, merge
from pairclf.jobs.proof import Shift, judge
from pairclf.jobs.scoring import items_of, score, verify
from pairclf.model.bundle import amend, open_bundle, read_manifest
from pairclf.task import LMSYS

CPU = torch.device("cpu")
Cli = Callable[..., tuple[int, str]]


def small(folder: Path, base: Path, quantization: str) -> Config:
    """The config of a run in `folder`, whose few steps move the adapters of the folds well apart."""
    config = resolve(
        {
            "output": str(folder / "run"),
            "data": {"folder": str(folder), "train": ["train.csv"], "test": "test.csv"},
            "folds": {"n": 2},
            "inputs": {"max_length": 96},
            "model": {"base": str(base), "quantization": quantization, "lora": {"rank": 2, "dropout": 0.0}},
            "train": {"rows_per_step": 4, "max_steps": 3, "learning_rate": 3e-2},
        }
    )
    (folder / "config.yaml").write_text(dump_config(config))
    return load_config(folder / "config.yaml")


def trained(folder: Path, base: Path, quantization: str) -> Path:
    write_lmsys(generate(24, seed=1), folder, n_test=6)
    cross_validate(small(folder, base, quantization))
    return folder


@pytest.fixture(scope="module")
def plain(base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folds on a base that was not quantised."""
    return trained(tmp_path_factory.mktemp("plain"), base_of("llama"), "none")


@pytest.fixture(scope="module")
def nf4(base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folds on an NF4 base."""
    return trained(tmp_path_factory.mktemp("nf4"), base_of("llama"), "nf4")


def config_of(run: Path) -> Config:
    return load_config(run / "config.yaml")


def folds_of(run: Path) -> list[Path]:
    return [run / "run" / f"fold{fold}" / "bundle" for fold in (0, 1)]


def copy_of(run: Path, folder: Path) -> Config:
    """A run of one's own, to spoil."""
    shutil.copytree(run, folder, dirs_exist_ok=True)
    config = config_of(run)
    data = config.data.model_copy(update={"folder": folder})
    return config.model_copy(update={"output": folder / "run", "data": data})


def logits_of(folder: Path, rows_of: Path) -> np.ndarray[Any, Any]:
    """Logits of the probe rows of one bundle by another, as it is loaded."""
    bundle = open_bundle(folder)
    rows = [probe.row() for probe in open_bundle(rows_of).manifest.probes]
    return score(bundle.load(CPU), items_of(bundle.builder().encode(rows), orders=2), tokens_per_batch=2_000)


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


def test_exact_is_the_mean_of_the_updates_and_factors_is_not(
    plain: Path, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_of("llama")
    parts = [deltas(folder, base) for folder in folds_of(plain)]
    assert off(parts[0], parts) > 0.1  # the folds differ
    out = merge(config_of(plain), tmp_path / "exact", max_shift=1.0)
    assert off(deltas(out, base), parts) <= 1e-6
    other = merge(config_of(plain), tmp_path / "factors", max_shift=1.0, average="factors")
    drift = off(deltas(other, base), parts)
    assert drift > 0.01
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folds_of(plain)]
    assert drift_of_factors(adapters) == pytest.approx(drift, rel=1e-4)
    heads = [load_file(folder / "head.safetensors") for folder in [*folds_of(plain), out]]
    assert torch.allclose(heads[2]["weight"], (heads[0]["weight"] + heads[1]["weight"]) / 2, atol=1e-7)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_mean_of_products_under_either_scale(rslora: bool) -> None:
    """At alpha / rank or alpha / sqrt(rank), and the scale of the other one must be wrong."""
    generator = torch.Generator().manual_seed(0)

    def drawn() -> dict[str, Tensor]:
        return {f"q.lora_{name}.weight": torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}

    def update(weights: dict[str, Tensor], rank: int, rslora: bool) -> Tensor:
        return weights["q.lora_B.weight"] @ weights["q.lora_A.weight"] * 8 / (rank**0.5 if rslora else rank)

    parts = [drawn() for _ in range(3)]
    wanted = torch.stack([update(part, 4, rslora) for part in parts]).mean(0)
    right = mean_of_products(parts, Lora(rank=4, alpha=8, rslora=rslora))
    wrong = mean_of_products(parts, Lora(rank=4, alpha=8, rslora=not rslora))
    assert (update(right, 12, rslora) - wanted).abs().max() <= 1e-5
    assert (update(wrong, 12, rslora) - wanted).abs().max() > 0.1
    assert (update(mean_of_factors(parts), 4, rslora) - wanted).abs().max() > 0.1


SHAPES = {"A": (4, 16), "B": (24, 4)}


@pytest.mark.parametrize("average", ["exact", "factors"])
def test_the_mean_of_a_bundle_and_itself_is_the_bundle(nf4: Path, tmp_path: Path, average: str) -> None:
    config = copy_of(nf4, tmp_path)
    first, second = folds_of(tmp_path)
    kept = open_bundle(second).manifest
    shutil.rmtree(second)
    shutil.copytree(first, second)
    amend(second, metrics=kept.metrics, probes=open_bundle(first).manifest.probes)  # its own seal, fold 1's scores
    assert open_bundle(first).manifest.seal != open_bundle(second).manifest.seal
    out = merge(config, tmp_path / "out", max_shift=1e-6, average=average)
    assert open_bundle(out).manifest.metrics["merged_largest_change"] <= 1e-5
    assert np.abs(logits_of(out, first) - logits_of(first, first)).max() <= 1e-5


def test_merged_into_float32_it_is_the_unmerged_model(plain: Path, tmp_path: Path) -> None:
    first, second = folds_of(plain)
    out = merge(config_of(plain), tmp_path / "out", max_shift=1e-6, folds=[0], into="float32")
    merged = open_bundle(out)
    assert np.abs(logits_of(first, out) - logits_of(out, out)).max() <= 1e-4
    assert np.abs(logits_of(second, out) - logits_of(out, out)).max() > 1e-2
    assert (merged.config.model.lora, merged.config.model.quantization) == (None, "none")
    assert (merged.manifest.fold, merged.manifest.dtype) == (0, "float32")
    assert verify(merged, merged.load(CPU)) <= 1e-6


def rounded_once(saved: Path, part: Path, base: Path, dtype: torch.dtype) -> bool:
    """Whether the merged weights are W + BA of float32, in `dtype`; rounding the two apart must give others."""
    weights = load_file(saved / "backbone" / "model.safetensors")
    whole = AutoModel.from_pretrained(base, dtype=torch.float32).state_dict()
    updates = {name.removeprefix("base_model.model.") + ".weight": one for name, one in deltas(part, base).items()}
    assert any((weights[name] != whole[name].to(dtype) + one.to(dtype)).any() for name, one in updates.items())
    return all(torch.equal(weights[name], (whole[name] + one).to(dtype)) for name, one in updates.items())


@pytest.mark.parametrize("into", ["bfloat16", "float16"])
def test_weights_are_merged_in_float32_and_rounded_once(
    plain: Path, base_of: Callable[[str], Path], tmp_path: Path, into: str
) -> None:
    out = merge(config_of(plain), tmp_path / "out", max_shift=0.05, folds=[0], into=into)
    assert rounded_once(out, folds_of(plain)[0], base_of("llama"), getattr(torch, into))


def test_a_base_in_the_dtype_to_write_is_held_in_it(
    plain: Path, base_of: Callable[[str], Path], tmp_path: Path, cli: Cli
) -> None:
    base = Path(shutil.copytree(base_of("llama"), tmp_path / "base"))
    AutoModel.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    write_lmsys(generate(24, seed=1), tmp_path, n_test=6)
    part = fit(small(tmp_path, base, "none"), 0)
    line = ["merge", tmp_path / "config.yaml", "--out", tmp_path / "out", "--fold", 0, "--into", "bfloat16"]
    code, text = cli(*line, "--max-shift", 0.05)
    assert code == 0, text
    assert "to merge in (bfloat16)" in text
    assert rounded_once(tmp_path / "out", part, base, torch.bfloat16)


def test_the_base_may_have_moved_and_must_be_the_same(
    plain: Path, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(base_of("llama"), tmp_path / "moved"))
    out = merge(config_of(plain), tmp_path / "out", max_shift=1.0, rows=4, base=moved)
    assert open_bundle(out).config.model.base == str(moved)
    with pytest.raises(BundleError, match="not the one"):
        merge(config_of(plain), out, max_shift=1.0, rows=4, base=base_of("qwen2"))


def test_an_adapter_of_an_nf4_base_is_another_model_on_whole_weights(nf4: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "out"
    line = ["merge", nf4 / "config.yaml", "--out", out, "--fold", 0, "--into", "float32"]
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
    before = open_bundle(folds_of(nf4)[0]).manifest.metrics["log_loss"]
    assert open_bundle(out).manifest.metrics["merged_reference"] == pytest.approx(before)


def test_a_refusal_leaves_the_older_bundle(nf4: Path, tmp_path: Path) -> None:
    out = merge(config_of(nf4), tmp_path / "out", max_shift=1.0)
    seal = open_bundle(out).manifest.seal
    with pytest.raises(BundleError, match="moved the log loss"):
        merge(config_of(nf4), out, max_shift=1e-9, folds=[0], into="float32")
    assert open_bundle(out).manifest.seal == seal
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("into", [None, "bfloat16"])
def test_the_merged_bundle_is_like_any_other(nf4: Path, tmp_path: Path, cli: Cli, into: str | None) -> None:
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
    assert len(pl.read_csv(tmp_path / "submission.csv")) == 6


def test_what_the_parts_were_trained_on_the_merged_one_was_too(nf4: Path, tmp_path: Path) -> None:
    seen = [open_bundle(folder).trained_on() for folder in folds_of(nf4)]
    merged = open_bundle(merge(config_of(nf4), tmp_path / "out", max_shift=1.0, rows=4)).trained_on()
    assert merged is not None
    prompts = set(merged["prompt"])
    assert prompts == set().union(*(set(one["prompt"]) for one in seen if one is not None))
    assert all(one is not None and set(one["prompt"]) < prompts for one in seen)
    assert merged["sample"].null_count() == 0


def test_the_prior_of_a_merged_bundle_is_the_mean_of_its_parts(plain: Path, tmp_path: Path) -> None:
    priors = [read_manifest(folder).prior for folder in folds_of(plain)]
    assert all(sum(one) == pytest.approx(1) for one in priors)
    merged = read_manifest(merge(config_of(plain), tmp_path / "out", max_shift=1.0, rows=4))
    assert merged.prior == pytest.approx(np.mean(priors, axis=0))


def test_a_bundle_of_all_rows_is_compared_with_itself(plain: Path, tmp_path: Path) -> None:
    config = copy_of(plain, tmp_path)
    for fold in folds_of(tmp_path):
        shutil.rmtree(fold)
    fit(config, None)
    out = merge(config, tmp_path / "out", max_shift=1e-6, into="float32", rows=5)
    assert open_bundle(out).manifest.metrics["merged_largest_change"] <= 1e-5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("model.lora.rank=3", r"model\.lora\.rank \(2 and 3\)"),
        ("model.lora.alpha=8", r"model\.lora\.alpha \(32 and 8\)"),
        ("model.lora.targets=[q_proj]", r"model\.lora\.targets \(all-linear and"),
        ("model.lora.rslora=true", r"model\.lora\.rslora"),
        ("model.quantization=nf4", r"model\.quantization \(none and nf4\)"),
        ("model.head=two_layer", r"model\.head \(linear and two_layer\)"),
        ("inputs.max_length=64", r"inputs\.max_length"),
        ("inputs.template.text='{prompt} {response_a} {response_b} ?'", r"differ in inputs\.template;"),
        ("task.name=other", r"differ in task;"),
        ("model.lora.dora=true", "DoRA can't be averaged"),
        ("model.lora=null", "nothing to merge"),
    ],
)
def test_parts_of_unlike_kinds_are_refused(plain: Path, change: str, named: str) -> None:
    one, other = (open_bundle(folder) for folder in folds_of(plain))
    check_alike([one, other])
    check_alike([one, replace(other, config=override(other.config, ["model.lora.dropout=0.3", "train.epochs=3"]))])
    with pytest.raises(BundleError, match=named):
        check_alike([one, replace(other, config=override(other.config, [change]))])


def test_dora_is_merged_alone(plain: Path, tmp_path: Path) -> None:
    config = copy_of(plain, tmp_path)
    shutil.rmtree(folds_of(tmp_path)[1].parent)
    fit(override(config, ["model.lora.dora=true"]), 1)
    with pytest.raises(BundleError, match="DoRA can't be averaged"):
        merge(config, tmp_path / "out", max_shift=1.0)
    out = merge(config, tmp_path / "out", max_shift=1e-5, folds=[1], into="float32")
    assert open_bundle(out).manifest.metrics["merged_largest_change"] <= 1e-4


def test_what_can_not_be_merged_is_said(plain: Path, tmp_path: Path, cli: Cli) -> None:
    for arguments, words in (
        (["--fold", 0], "nothing is to be done"),
        (["--fold", 0, "--fold", 0], "twice"),
        (["--fold", 7], "does not exist"),
        (["--into", "int8"], "--into int8 is unknown"),
        (["--average", "slerp"], "--average slerp is unknown"),
    ):
        code, text = cli("merge", plain / "config.yaml", "--out", tmp_path / "out", *arguments)
        assert code == 2
        assert words in text
    code, text = cli("merge", plain / "config.yaml", "--out", folds_of(plain)[0])
    assert code == 2
    assert "would overwrite" in text
    with pytest.raises(ConfigError, match="would overwrite"):
        merge(config_of(plain), folds_of(plain)[0] / "adapter" / "new", max_shift=1.0)
    assert list(tmp_path.iterdir()) == []


def test_a_whole_model_has_nothing_to_merge(plain: Path, tmp_path: Path) -> None:
    config = copy_of(plain, tmp_path)
    out = merge(config, tmp_path / "out", max_shift=1.0, folds=[0], into="float32")
    shutil.rmtree(folds_of(tmp_path)[0])
    shutil.copytree(out, folds_of(tmp_path)[0])
    with pytest.raises(BundleError, match="whole model"):
        merge(config, tmp_path / "again", max_shift=1.0, folds=[0], into="float32")


def test_out_of_fold_scores_of_another_training_are_refused(plain: Path, tmp_path: Path) -> None:
    config = copy_of(plain, tmp_path)
    path = folds_of(tmp_path)[0].parent / "oof.parquet"
    scores = read_scores(path, LMSYS)
    a, b, _ = LMSYS.classes
    write_scores(path, scores.with_columns(pl.col(a).alias(b), pl.col(b).alias(a)))
    with pytest.raises(DataError, match="not of one training"):
        merge(config, tmp_path / "out", max_shift=1.0)
    write_scores(path, scores.with_columns(row_hash=scores["row_hash"].reverse()))
    with pytest.raises(DataError, match="have the id of a row here and other texts"):
        merge(config, tmp_path / "out", max_shift=1.0)
    write_scores(path, scores.with_columns(id="x" + pl.col("id")))
    with pytest.raises(DataError, match="not among the labelled rows"):
        merge(config, tmp_path / "out", max_shift=1.0)


def test_too_small_a_disk_is_found_before_the_writing(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1_000))
    with pytest.raises(BundleError, match="are free where --out is"):
        merge(config_of(plain), tmp_path / "out", max_shift=1.0, into="float32")
    assert list(tmp_path.iterdir()) == []


def shift_of(parts: int, merged: float) -> Shift:
    return Shift(parts, 10, 1.0, merged, 0.5, 0.5, 0.0, 0.0, None, None, in_sample=False)


def test_a_merge_may_not_move_and_a_mean_may_not_be_worse() -> None:
    for parts, merged in ((1, 1.003), (1, 0.997), (2, 1.003), (1, float("nan")), (2, float("nan"))):
        with pytest.raises(BundleError, match="moved the log loss"):
            judge(shift_of(parts, merged), 0.002, Path("out"))
    for parts, merged in ((1, 1.001), (1, 0.999), (2, 1.001), (2, 0.9)):
        judge(shift_of(parts, merged), 0.002, Path("out"))
