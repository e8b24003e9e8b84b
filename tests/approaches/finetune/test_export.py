"""An exported bundle scores as its source did, needs no base, and is not kept if it does not."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pairclf.approaches import verify_probes
from pairclf.approaches.finetune import export as job
from pairclf.approaches.finetune.export import export
from pairclf.approaches.finetune.merge import merge
from pairclf.bundles.bundle import Saved, open_bundle
from pairclf.bundles.inputs import builder_of
from pairclf.bundles.manifest import read_manifest
from pairclf.config import Config, dump_config, load_config, resolve
from pairclf.demo.arena import generate, write_lmsys
from pairclf.errors import BundleError, ConfigError, ModelError
from pairclf.model.backbone import stored_weights
from pairclf.model.weights import load_classifier
from pairclf.runs.fit import fit

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("quick_workers")
Cli = Callable[..., tuple[int, str]]
KINDS = ["gemma2", "llama"]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`run_of("llama")` is a folder with data, `config.yaml` and a run whose fold 0 is trained, on the embedded base.

    The base is not quantised, so that what moves is the export's doing.
    """
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = made[kind] = tmp_path_factory.mktemp(kind)
            write_lmsys(generate(24, seed=1), folder, n_test=6)
            tree = {
                "output_dir": str(folder / "run"),
                "data": {"folder": str(folder), "train": ["train.csv"], "test": "test.csv"},
                "folds": {"n_splits": 2},
                "inputs": {"max_length": 96},
                "model": {
                    "base": f"embedded:{kind}-tiny",
                    "quantization": "none",
                    "lora": {"r": 2, "lora_dropout": 0.0},
                },
                "train": {"global_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2},
            }
            (folder / "config.yaml").write_text(dump_config(resolve(tree)))
            fit(load_config(folder / "config.yaml"), 0)
        return made[kind]

    return make


def config_of(run: Path) -> Config:
    return load_config(run / "config.yaml")


def source_of(run: Path) -> Path:
    return run / "run" / "fold0" / "bundle"


@pytest.fixture
def without_base(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From then on no base model is found."""

    def lose(*_: object) -> str:
        raise AssertionError("looked for the base")

    return lambda: monkeypatch.setattr("pairclf.model.weights.base_fingerprint", lose)


@pytest.mark.parametrize("kind", KINDS)
def test_int8_scores_like_its_source_and_is_smaller(
    run_of: Callable[[str], Path], tmp_path: Path, kind: str, without_base: Callable[[], None]
) -> None:
    run = run_of(kind)
    whole = export(config_of(run), tmp_path / "whole", to="float16", max_shift=1.0)
    out = export(config_of(run), tmp_path / "int8", to="int8", max_shift=0.05)
    without_base()
    bundle, source = open_bundle(out), read_manifest(source_of(run))
    metrics = bundle.manifest.metrics
    assert abs(metrics["exported_shift"]) <= 0.02
    assert 0 < metrics["exported_probe_change"] <= 0.2
    assert metrics["exported_reference"] == pytest.approx(source.metrics["log_loss"])
    assert "log_loss" not in metrics  # it was not measured out of fold in this form
    assert metrics["exported_bytes"] < 0.8 * read_manifest(whole).metrics["exported_bytes"]
    assert [one.id for one in bundle.manifest.probes] == [one.id for one in source.probes]
    assert bundle.manifest.prior == source.prior
    assert (bundle.config.model.lora, bundle.config.model.quantization) == (None, "none")
    assert stored_weights(out / "backbone") == "int8"
    assert sorted(entry.name for entry in out.iterdir()) == sorted(entry.name for entry in whole.iterdir())
    classifier = load_classifier(bundle, CPU)
    assert any(one.dtype == torch.int8 for one in classifier.backbone.parameters())
    assert verify_probes(bundle) <= 1e-6


def test_an_exported_bundle_is_like_any_other(run_of: Callable[[str], Path], tmp_path: Path, cli: Cli) -> None:
    run, out = run_of("llama"), tmp_path / "int8"
    code, text = cli("export", run / "config.yaml", "--to", "int8", "--out", out, "--fold", 0, "--max-shift", 0.05)
    assert code == 0, text
    for words in ("1 bundle exported, on 10 rows", "largest change of a logit on 8 probe rows", "log loss moved by"):
        assert words in text
    code, text = cli("verify", out)
    assert code == 0, text
    code, text = cli("predict", out, "--data", run / "test.csv", "--out", tmp_path / "submission.csv")
    assert code == 0, text
    assert len(pl.read_csv(tmp_path / "submission.csv")) == 6


@pytest.mark.parametrize("to", ["float32", "bfloat16"])
def test_a_dtype_is_what_merge_writes(run_of: Callable[[str], Path], tmp_path: Path, to: str) -> None:
    config = config_of(run_of("gemma2"))
    out = export(config, tmp_path / "out", to=to, max_shift=0.05)
    other = merge(config, tmp_path / "merged", folds=[0], into=to, max_shift=0.05)
    ours, theirs = (load_file(one / "backbone" / "model.safetensors") for one in (out, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_manifest(out).metrics["exported_log_loss"] == read_manifest(other).metrics["merged_log_loss"]


def test_a_merged_bundle_is_exported_without_its_base(
    run_of: Callable[[str], Path], tmp_path: Path, without_base: Callable[[], None]
) -> None:
    config = config_of(run_of("llama"))
    whole = merge(config, tmp_path / "whole", folds=[0], into="float16", max_shift=1.0)
    without_base()
    out = export(config, tmp_path / "int8", to="int8", bundle=whole, max_shift=0.05)
    metrics = read_manifest(out).metrics
    assert metrics["exported_rows"] == 10  # those that the fold held out, as its bundle has not seen their prompts
    assert metrics["exported_reference"] == pytest.approx(read_manifest(whole).metrics["merged_log_loss"], abs=1e-3)
    with pytest.raises(ConfigError, match="holds the bundle run-fold0-merged, and run-fold0-int8 would replace it"):
        export(config, whole, to="int8", fold=0)
    with pytest.raises(BundleError, match="holds int8 weights"):
        export(config, tmp_path / "again", to="int8", bundle=out)


# --- what is refused -------------------------------------------------------------------------------------------------


def _zero(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(one) for name, one in weights.items()}


def _wrong_scale(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """int8's scale of each row, off by a factor of four: as if it had been kept in another unit."""
    return {name: one * 4 if name.endswith("SCB") else one for name, one in weights.items()}


@pytest.mark.parametrize(
    ("file", "spoil"),
    [("head.safetensors", _zero), ("backbone/model.safetensors", _wrong_scale)],
    ids=["head", "scale"],
)
def test_a_spoilt_export_is_refused_and_leaves_nothing(
    run_of: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    spoil: Callable[..., dict[str, torch.Tensor]],
) -> None:
    save, run = job.save_weights, run_of("gemma2")

    def spoiling(new: Path, *arguments: Any, **options: Any) -> Saved:
        saved = save(new, *arguments, **options)
        save_file(spoil(load_file(new / file)), new / file, metadata={"format": "pt"})
        return saved

    monkeypatch.setattr(job, "save_weights", spoiling)
    with pytest.raises(BundleError, match=r"being exported moved the log loss .* --max-shift allows 0\.01"):
        export(config_of(run), tmp_path / "out", to="int8")
    assert list(tmp_path.iterdir()) == []


def test_what_can_not_be_exported_is_said(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = run_of("llama")
    config, source = config_of(run), source_of(run)
    shutil.copytree(source, tmp_path / "run" / "fold1" / "bundle")
    shutil.copytree(source, tmp_path / "run" / "fold0" / "bundle")
    several = config.model_copy(update={"output_dir": tmp_path / "run"})
    for settings, words, options in (
        (config, "does not exist", {"to": "int8", "fold": 1}),
        (config, "name two bundles", {"to": "int8", "fold": 0, "bundle": source}),
        (several, "the run has 2 bundles", {"to": "int8"}),
    ):
        with pytest.raises(ConfigError, match=words):
            export(settings, tmp_path / "out", **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="would overwrite"):
        export(config, source / "new", to="int8")
    other = config.model_copy(update={"task": config.task.model_copy(update={"name": "other"})})
    with pytest.raises(BundleError, match="of another task"):
        export(other, tmp_path / "out", to="int8", bundle=source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_a_format_whose_package_is_missing_is_refused_before_any_work(
    run_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    monkeypatch.setitem(sys.modules, "gptqmodel", None)  # as if it were not installed
    monkeypatch.setattr(job, "source_bundle", lambda *_: pytest.fail("began to work"))
    with pytest.raises(ModelError, match=r"(?s)needs the package gptqmodel.*pip install gptqmodel"):
        export(config_of(run_of("llama")), tmp_path / "out", to=to)


# --- GPTQ and AWQ, by a module that stands for gptqmodel -------------------------------------------------------------


class Quantiser:
    """Saves what it loaded, not quantised; and keeps what it was given."""

    def __init__(self, folder: str, settings: SimpleNamespace) -> None:
        self.folder, self.settings = folder, settings
        self.files = sorted(entry.name for entry in Path(folder).iterdir())

    def quantize(self, rows: list[dict[str, list[int]]], *, batch_size: int) -> None:
        self.rows = rows
        assert batch_size == 1

    def save(self, folder: str) -> None:
        shutil.copytree(self.folder, folder)


@pytest.fixture
def gptqmodel(run_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> list[Quantiser]:
    run_of("llama")  # peft, too, asks once whether it is installed, and is to hear that it is not
    made: list[Quantiser] = []

    def load(folder: str, settings: SimpleNamespace, *, dtype: torch.dtype, trust_remote_code: bool) -> Quantiser:
        assert (dtype, trust_remote_code) == (torch.float16, False)
        made.append(Quantiser(folder, settings))
        return made[-1]

    module = ModuleType("gptqmodel")
    module.QuantizeConfig = SimpleNamespace  # type: ignore[attr-defined]
    module.GPTQModel = SimpleNamespace(load=load)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gptqmodel", module)
    monkeypatch.setitem(sys.modules, "optimum", ModuleType("optimum"))
    return made


@pytest.mark.parametrize(("to", "bits"), [("gptq", 8), ("awq", 4)])
def test_the_quantiser_gets_whole_weights_and_rows_that_do_not_judge_it(
    run_of: Callable[[str], Path], tmp_path: Path, gptqmodel: list[Quantiser], to: str, bits: int
) -> None:
    config = config_of(run_of("llama"))
    out = export(config, tmp_path / "out", to=to, max_shift=0.05)
    (made,) = gptqmodel
    assert (made.settings.bits, made.settings.group_size, made.settings.offload_to_disk) == (bits, 128, False)
    assert getattr(made.settings, "method", "gptq") == to
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(made.files)
    source = open_bundle(source_of(run_of("llama")))
    assert len(made.rows) == 8  # the other fold's
    held_out = {
        tuple(one.ids) for probe in source.manifest.probes for one in builder_of(source).encode([probe.row()])[0]
    }
    assert not held_out & {tuple(row["input_ids"]) for row in made.rows}
    assert all(len(row["input_ids"]) == len(row["attention_mask"]) <= 96 for row in made.rows)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out"]
    assert not (out / "whole").exists()
    assert verify_probes(open_bundle(out)) <= 1e-6


def test_a_quantiser_that_fails_is_said(
    run_of: Callable[[str], Path], tmp_path: Path, gptqmodel: list[Quantiser], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("in_features 90 is not\n divisible by 128")

    monkeypatch.setattr(Quantiser, "quantize", fail)
    with pytest.raises(ModelError, match="can't quantise this model: in_features 90 is not divisible by 128"):
        export(config_of(run_of("llama")), tmp_path / "out", to="gptq")
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_quantised_weights_can_be_trained(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    from pairclf.model.engine import build

    out = export(config_of(run_of("llama")), tmp_path / "int8", to="int8", max_shift=0.05)
    tree = {"model": {"base": str(out / "backbone"), "quantization": "none", "lora": None}}
    with pytest.raises(ModelError, match="holds quantised weights"):
        build(resolve(tree), CPU)
    adapted = build(resolve({"model": tree["model"] | {"lora": {"r": 2}}}), CPU)
    trained = [name for name, one in adapted.backbone.named_parameters() if one.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert isinstance(adapted.head, nn.Linear)
    assert np.isfinite([float(one.sum()) for one in adapted.head.parameters()]).all()
