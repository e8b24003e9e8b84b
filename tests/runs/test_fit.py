"""What is finished stays: a bundle is made anew only if it is of other settings or rows, damaged, or asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from models_support import with_lm_head
from tests_support import make_rows, write_csv

from pairclf.bundles.bundle import open_bundle
from pairclf.config import Config, override, resolve
from pairclf.errors import CheckpointError, ConfigError
from pairclf.run import Run
from pairclf.runs import fit as module
from pairclf.runs.cv import cross_validate
from pairclf.runs.fit import fit, fit_fold, open_session

pytestmark = pytest.mark.usefixtures("without_forecast")


@pytest.fixture
def config(base_of: Callable[[str], Path], tmp_path: Path) -> Config:
    write_csv(tmp_path / "train.csv", make_rows(24))
    return resolve(
        {
            "output_dir": str(tmp_path / "run"),
            "data": {"folder": str(tmp_path), "train": "train.csv"},
            "folds": {"n_splits": 3},
            "inputs": {"max_length": 160, "num_proc": 1},
            "model": {"base": str(base_of("llama")), "quantization": "none", "lora": {"r": 2, "lora_dropout": 0.0}},
            "train": {"max_steps": 2, "global_batch_size": 8, "learning_rate": 1e-3},
        }
    )


def seal(config: Config, fold: int) -> tuple[str, int]:
    bundle = (config.output_dir or Path()) / f"fold{fold}" / "bundle"
    return open_bundle(bundle).manifest.seal, (bundle / "bundle.json").stat().st_ino


def test_fit_leaves_a_finished_fold_until_something_changes(config: Config, tmp_path: Path) -> None:
    fit(config, 0)
    first = seal(config, 0)
    for resume in (None, True):
        fit(override(config, ["train.logging_steps=1"]), 0, resume=resume)  # moves no weight
        assert seal(config, 0) == first
    fit(config, 0, resume=False)
    assert seal(config, 0)[1] != first[1]
    fit(override(config, ["train.learning_rate=2e-3"]), 0, resume=False)
    changed = seal(config, 0)
    assert changed[0] != first[0]
    write_csv(tmp_path / "train.csv", make_rows(21))  # other rows, the same settings
    (tmp_path / "run" / "folds.csv").unlink()
    fit(override(config, ["train.learning_rate=2e-3"]), 0, resume=True)
    assert seal(config, 0)[0] != changed[0]


def test_of_two_commands_at_once_the_later_one_replaces_no_fold_of_other_settings(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", make_rows(24))
    data = {"folder": str(tmp_path), "train": "train.csv"}
    one = resolve(
        {"approach": "classical", "output_dir": str(tmp_path / "run"), "data": data, "folds": {"n_splits": 2}}
    )
    first, second = (open_session(Run(config), [0, 1]) for config in (one, override(one, ["seed=1"])))
    fit_fold(first, 0)
    for fold in (0, 1):
        with pytest.raises(ConfigError, match=r"other settings: seed=1 \(was 0\); fold0 would be replaced"):
            fit_fold(second, fold)
    fit_fold(second, 0, resume=False)
    assert open_bundle(tmp_path / "run/fold0/bundle").config.seed == 1


@pytest.mark.parametrize("broken", ["bundle/head.safetensors", "oof.parquet", "trained.json"])
def test_fit_makes_anew_what_is_damaged(config: Config, broken: str) -> None:
    fit(config, 0)
    first = seal(config, 0)
    path = (config.output_dir or Path()) / "fold0" / broken
    path.write_bytes(path.read_bytes()[:40]) if broken != "oof.parquet" else path.unlink()
    fit(config, 0, resume=True)
    assert seal(config, 0)[0] == first[0]
    assert pl.read_parquet(path).height if broken == "oof.parquet" else path.stat().st_size > 40


def test_fit_goes_on_with_a_stopped_training_beside_an_old_bundle(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(config, 0)
    old = seal(config, 0)
    new = override(config, ["train.learning_rate=2e-3", "train.save_steps=1"])
    with monkeypatch.context() as patch:
        patch.setattr(module, "_save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit(new, 0, resume=False)
    assert seal(config, 0) == old
    with pytest.raises(CheckpointError, match="unfinished training"):
        fit(new, 0)
    fit(new, 0, resume=True)
    assert seal(config, 0)[0] != old[0]


def test_cross_validate_joins_and_shows_the_folds_of_these_settings(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows() -> int:
        return pl.read_parquet((config.output_dir or Path()) / "oof.parquet").height

    one = {fold: override(config, [f"folds.run=[{fold}]"]) for fold in range(3)}
    cross_validate(one[0])
    few = rows()
    assert 0 < few < 24
    cross_validate(one[2])
    assert few < rows() < 24
    capsys.readouterr()
    cross_validate(override(config, ["folds.run=null"]))
    assert rows() == 24
    text = capsys.readouterr().err
    assert text.count("exists for these settings and rows") == 2
    assert "Out of fold: 3 of 3 folds" in text
    assert "is of another training" not in text
    log = (config.output_dir or Path()) / "log.txt"
    assert log.read_text().count("Out of fold: 3 of 3 folds") == 1
    seals = [seal(config, fold) for fold in range(3)]
    for resume in (None, True, False):  # the other folds would be left behind
        with pytest.raises(ConfigError, match=r"train\.learning_rate=0\.002 \(was 0\.001\)") as caught:
            cross_validate(override(one[1], ["train.learning_rate=2e-3"]), resume=resume)
        assert ("fold1 would be replaced" in str(caught.value)) == (resume is not False)
        assert "the scores of fold0, fold2 could not be joined" in str(caught.value)
        assert f"output_dir={config.output_dir}/learning_rate-0.002;" in str(caught.value)
    assert [seal(config, fold) for fold in range(3)] == seals
    assert rows() == 24
    assert "error: this run was trained with other settings" in log.read_text()
    cross_validate(override(one[0], ["train.learning_rate=2e-3", "folds.run=null", "train.max_steps=1"]), resume=False)
    assert rows() == 24  # all folds together may be replaced
    said = " ".join(capsys.readouterr().err.split())
    assert "(different: train.max_steps, train.learning_rate); the new bundle replaces it" in said


def test_fit_refuses_evaluations_without_held_out_rows(config: Config) -> None:
    with pytest.raises(ConfigError, match="held-out rows") as caught:
        fit(override(config, ["train.eval_steps=1"]), None)
    assert "train.eval_steps=null" in str(caught.value)


def test_fit_writes_settings_by_dotted_names(config: Config) -> None:
    fit(config, None)
    trained = json.loads(((config.output_dir or Path()) / "all" / "trained.json").read_text())
    assert trained["train.learning_rate"] == 1e-3
    assert trained["training"]["steps"] == 2
    assert trained["training"]["seconds"] > 0
    assert "train.logging_steps" not in trained


def test_fit_without_steps_bundles_the_base_with_its_label_mass(
    config: Config, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = with_lm_head(base_of("llama"), tmp_path / "base", tied=True)
    words = dict(zip(config.task.classes, "ABt", strict=True))
    model = {"base": str(base), "readout": "label_tokens", "label_words": words}
    tree = config.model_dump(mode="json", exclude={*config.unread()}) | {"model": model, "train": {"max_steps": 0}}
    bundle = open_bundle(fit(resolve(tree), 0))
    folder = bundle.folder.parent
    assert 0 < bundle.manifest.metrics["label_mass"] < 1
    assert bundle.manifest.metrics["log_loss"] > 0
    assert "max_steps: 0" in (folder / "config.yaml").read_text()
    assert json.loads((folder / "trained.json").read_text())["training"]["steps"] == 0
