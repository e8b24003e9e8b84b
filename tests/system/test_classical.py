"""The approach `classical` through the command line, beside a language model, and alone without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from support.kernels import block
from support.packages import hollow_wheelhouse
from support.runs import TEST_ROWS, bundles_of

from pairclf.bundles.bundle import open_bundle
from pairclf.config import load_config
from pairclf.data.scores import class_matrix, read_scores
from pairclf.inference.predict import predict
from pairclf.inference.serve import Server
from pairclf.packaging.build_record import read_build
from pairclf.runs.fit import fit
from pairclf.task import LMSYS

Cli = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def run(trained_run: Callable[[str], Path]) -> Path:
    """A folder with an arena and a fine-tuned run; to read only."""
    return trained_run("gemma2")


@pytest.fixture(scope="module")
def config(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classical run on the rows of that arena."""
    path = tmp_path_factory.mktemp("classical") / "config.yaml"
    tree = {
        "task": "lmsys",
        "approach": "classical",
        "output_dir": str(path.parent / "run"),
        "data": {"folder": str(run), "train": ["train.csv"], "test": "test.csv"},
        "folds": {"n_splits": 2},
        "classical": {"n_features": 1024},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def said(cli: Cli, *arguments: object) -> str:
    code, text = cli(*arguments)
    assert code == 0, text
    return text


def bundle_of(config: Path, fold: int = 0) -> Path:
    return config.parent / "run" / f"fold{fold}" / "bundle"


def test_from_folds_to_a_package_with_a_language_model(
    config: Path, run: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "fold" in said(cli, "folds", config)
    assert "Out of fold: 2 of 2 folds" in said(cli, "cv", config)
    assert "exists for these settings and rows" in said(cli, "cv", config, "folds.run=[1]")
    assert "class prior" in said(cli, "evaluate", config)

    ensemble, scores, out = tmp_path / "ensemble.yaml", tmp_path / "scores.parquet", tmp_path / "submission.csv"
    members = [{"bundle": str(bundle_of(config)), "weight": 0.3}, {"bundle": str(bundles_of(run)[0]), "weight": 0.7}]
    ensemble.write_text(yaml.safe_dump({"members": members}))
    sample = run / "sample_submission.csv"
    said(cli, "predict", ensemble, "--data", run / "test.csv", "--sample", sample, "--out", out, "--scores", scores)
    assert read_scores(scores, LMSYS)["models"].list.len().to_list() == [2] * TEST_ROWS
    assert read_scores(scores, LMSYS)["orders"].to_list() == [2] * TEST_ROWS
    assert pl.read_csv(out).height == TEST_ROWS
    assert "What a deadline buys" in said(cli, "forecast", ensemble, "--data", run / "test.csv", "--device", "t4")

    hollow_wheelhouse(monkeypatch)
    base = open_bundle(bundles_of(run)[0]).config.model.base
    settings = ["package.owner=someone", f"package.ensemble={ensemble}", "package.base_model_source=someone/base"]
    said(cli, "package", config, *settings, "--out", tmp_path / "package")
    packed = [tmp_path / "package" / "bundle" / one.folder for one in read_build(tmp_path / "package").bundles]
    assert [one.base for one in read_build(tmp_path / "package").bundles] == [None, base]
    assert said(cli, "verify", *packed, "--base", base).count("verified") == 2


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which an import of torch, and of what imports it, fails and leaves a file `imported`."""
    block(tmp_path / "blocked")
    places = [str(tmp_path / "blocked"), str(Path(__file__).parents[2])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(places)}


COMMANDS = """import sys
from pairclf.cli import main
for line in sys.argv[1].splitlines():
    sys.argv = ["pairclf", *line.split("|")]
    try:
        main()
    except SystemExit as left:
        assert not left.code, line
"""


@pytest.mark.slow
def test_nothing_imports_torch(config: Path, run: Path, tmp_path: Path, without_torch: dict[str, str]) -> None:
    """Neither the command nor its workers: all that is done with a classical model at home."""

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", *arguments]
        return subprocess.run(command, env=without_torch, cwd=tmp_path, capture_output=True, text=True, check=False)

    output, out = f"output_dir={tmp_path / 'run'}", tmp_path / "submission.csv"
    bundle, test = tmp_path / "run" / "fold0" / "bundle", run / "test.csv"
    commands = [
        ["cv", config, "folds.run=[0]", output],
        ["evaluate", config, output],
        ["predict", bundle, "--data", test, "--out", out, "--strict", "predict.devices=[cpu,cpu]"],
        ["verify", bundle],
        ["forecast", bundle, "--data", test],
    ]
    done = python(COMMANDS, "\n".join("|".join(map(str, command)) for command in commands))
    assert done.returncode == 0, done.stderr
    for words in (str(bundle), "class prior", "verified"):
        assert words in done.stdout
    assert pl.read_csv(out).height == TEST_ROWS
    assert not (tmp_path / "blocked" / "imported").exists()
    assert python("import pairclf.model.engine").returncode
    assert (tmp_path / "blocked" / "imported").exists(), "it would have been found"


@pytest.mark.parametrize(
    ("arguments", "about"),
    [
        (["show", "{config}"], "inputs (from text to tokens)"),
        (["lengths", "{config}"], "inputs (from text to tokens)"),
        (["merge", "{config}", "--out", "merged"], "model (base model, adapters and head)"),
        (["export", "{config}", "--to", "int8", "--out", "exported"], "model (base model, adapters and head)"),
    ],
)
def test_commands_for_language_models_say_so(config: Path, cli: Cli, arguments: list[str], about: str) -> None:
    code, text = cli(*(argument.format(config=config) for argument in arguments))
    assert code == 2
    assert f"is about the section {about}, which approach=classical does not read" in text


def test_it_trains_in_one_process(config: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, text = cli("train", config, "--fold", "0")
    assert code == 2
    assert "approach=classical trains in one process, and 2 were started" in text


def test_its_scores_teach_a_language_model(config: Path, run: Path, tmp_path: Path, cli: Cli) -> None:
    """As a teacher of the training rows, and as labels of new ones."""
    said(cli, "cv", config)
    oof = config.parent / "run" / "oof.parquet"
    student = [f"output_dir={tmp_path / 'student'}", f"train.distill.scores=[{oof}]", "train.max_steps=1"]
    said(cli, "train", run / "config.yaml", "--fold", "0", *student)
    code, text = cli("train", config, "--fold", "0", f"train.distill.scores=[{oof}]")
    assert code == 2
    assert "train.distill changes nothing" in text
    scores, out = tmp_path / "scores.parquet", tmp_path / "pseudo.parquet"
    said(cli, "predict", bundle_of(config), "--data", run / "test.csv", "--out", tmp_path / "s.csv", "--scores", scores)
    labels = ["pseudo", config, "data.test=null", "--data", run / "test.csv", "--scores", scores, "--out", out]
    said(cli, *labels)
    assert pl.read_parquet(out).height > 0


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a language model"])
def test_a_server_answers_as_predict_does(config: Path, run: Path, tmp_path: Path, beside: bool) -> None:
    bundles = [fit(load_config(config), 0), *bundles_of(run)[:beside]]
    test = pl.read_csv(run / "test.csv", infer_schema=False)
    server = Server(bundles, seconds=600, rows=TEST_ROWS)
    try:
        answers = pl.concat([server.predict(test[:10]), server.predict(test[10:])])
        assert server.report()["both"] == TEST_ROWS
    finally:
        server.close()
    scores = predict(bundles, run / "test.csv", tmp_path / "submission.csv")
    assert answers["id"].to_list() == scores["id"].to_list()
    assert np.abs(answers.select(LMSYS.classes).to_numpy() - class_matrix(scores, LMSYS)).max() < 1e-4
