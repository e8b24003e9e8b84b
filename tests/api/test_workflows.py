"""The functions of `import pairclf` are the commands: same files, same figures, same errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import pairclf
from pairclf.config import dump_config, resolve
from pairclf.errors import ConfigError
from pairclf.runs import sweep as sweeps
from pairclf.runs.cv import cross_validate as cv_workflow
from pairclf.runs.evaluation_report import as_tree

Cli = Callable[..., tuple[int, str]]


def first_json(printed: str) -> Any:
    """The JSON that a command printed; its notes follow."""
    return json.JSONDecoder().raw_decode(printed)[0]


@pytest.fixture
def config_file(classical_config: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(resolve(classical_config)))
    return path


def test_every_public_name_is_there_and_listed() -> None:
    assert {*pairclf.__all__} == {*pairclf._MODULES} <= {*dir(pairclf)}
    assert all(getattr(pairclf, name).__module__ == module for name, module in pairclf._MODULES.items())
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        pairclf.lod  # noqa: B018


def test_folds_of_a_dict_are_those_of_its_file(
    classical_config: dict[str, Any], config_file: Path, classical_bundles: list[Path]
) -> None:
    """What is trained is kept: a dict and a file with the same settings are one run."""
    folds = pairclf.cross_validate(classical_config)
    assert folds.bundles == pairclf.cross_validate(config_file).bundles == classical_bundles
    assert folds.scores.height == 36
    assert [figures["rows"] for figures in folds.metrics.values()] == [18, 18]
    assert f"{folds.metrics[0]['log_loss']:.4f}" in folds._repr_html_()
    with pytest.raises(ConfigError, match="trained with other settings"):
        pairclf.cross_validate(config_file, "classical.C=3")


def test_a_fit_holds_one_fold_out_or_none(classical_config: dict[str, Any], tmp_path: Path) -> None:
    own = {**classical_config, "output_dir": str(tmp_path / "run")}
    assert pairclf.fit(own, fold=1) == tmp_path / "run" / "fold1" / "bundle"
    bundle = pairclf.fit(own, "classical.C=3")
    assert bundle == tmp_path / "run" / "all" / "bundle"
    assert pairclf.load(bundle).ensemble.members[0].bundle.config.classical.C == 3


def test_an_evaluation_has_the_commands_figures(classical_config: dict[str, Any], config_file: Path, cli: Cli) -> None:
    evaluation = pairclf.evaluate(classical_config)
    code, printed = cli("evaluate", config_file, "--json")
    assert code == 0
    assert first_json(printed) == json.loads(json.dumps(as_tree(evaluation)))
    assert "Evaluation of 36 rows" in evaluation._repr_html_()
    assert str(evaluation).startswith("Evaluation of 36 rows")


def test_a_comparison_and_a_blend_are_the_commands(
    classical_config: dict[str, Any], config_file: Path, tmp_path: Path, cli: Cli
) -> None:
    other = {**classical_config, "output_dir": str(tmp_path / "other"), "classical": {"n_features": 512, "C": 0.01}}
    cv_workflow(resolve(other))
    comparison = pairclf.compare(classical_config, other)
    _, printed = cli("compare", classical_config["output_dir"], tmp_path / "other", "--json")
    assert first_json(printed) == json.loads(json.dumps(comparison.as_dict()))
    assert "log loss" in comparison._repr_html_()
    report = pairclf.blend(classical_config, other, out=tmp_path / "ensemble.yaml", method="uniform")
    _, printed = cli("blend", classical_config["output_dir"], tmp_path / "other", "--json", "--figures-only")
    assert first_json(printed)["blends"].keys() == report.as_dict()["blends"].keys()
    assert "Blends of 2 runs" in report._repr_html_()
    with pairclf.load(tmp_path / "ensemble.yaml") as judge:
        assert len(judge.ensemble.members) == 4
    with pytest.raises(pairclf.PairclfError, match=r"ensemble\.txt must end in"):
        pairclf.blend(classical_config, other, out=tmp_path / "ensemble.txt")


def test_a_sweep_of_a_dict_trains_its_runs(
    classical_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, for the test's sake."""
    from pairclf.config import load_config

    def train(processes: int, arguments: list[str], *, to_stderr: bool) -> int:
        _, path, *overrides = (argument for argument in arguments if argument != "--resume")
        cv_workflow(load_config(Path(path), overrides), resume=True)
        return 0

    monkeypatch.setattr(sweeps, "run_processes", train)
    own = {**classical_config, "output_dir": str(tmp_path / "run")}
    result = pairclf.sweep(own, "classical.C=0.001,1", folds=[0, 1])
    assert [settings["classical.C"] for settings, _ in result.arms] == [0.001, 1]
    losses = [figure for _, figure in result.arms]
    assert losses[0] > losses[1]
    assert "classical.C" in result._repr_html_()


def test_errors_are_those_of_the_commands(classical_config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"classical\.Cs.*nearest"):
        pairclf.fit(classical_config, "classical.Cs=1")
    with pytest.raises(ConfigError, match="output_dir is not set"):
        pairclf.fit({**classical_config, "output_dir": None})
    with pytest.raises(ConfigError, match="there is no config"):
        pairclf.cross_validate(tmp_path / "none.yaml")


def test_scores_of_folds_are_probabilities(classical_config: dict[str, Any]) -> None:
    scores = pairclf.cross_validate(classical_config).scores
    values = scores.select("winner_model_a", "winner_model_b", "winner_tie").to_numpy()
    assert np.allclose(values.sum(axis=1), 1)
    assert isinstance(scores, pl.DataFrame)
