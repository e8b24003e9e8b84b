"""Every example of a task goes from generated files to a notebook, by the commands that docs/tasks.md names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from support.packages import RUNNING, hollow_wheelhouse

from pairclf.config import Config, load_config
from pairclf.data.submission import check_submission
from pairclf.demo.examples import EXAMPLES, next_commands, write_example
from pairclf.packaging.build_record import read_build
from pairclf.run import FOLDS, OOF
from pairclf.scores.metrics import entropy
from pairclf.scores.thresholds import fit_thresholds

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/tasks.md"
BLOCKS = dict(re.findall(r"```yaml\n# configs/examples/(\w+)\.yaml\n(.*?)```", PAGE.read_text(), re.DOTALL))
ROWS = 150
SIBLINGS = {"sentiment": "topics", "answers": "verdicts"}
"""Examples with fewer classes than another one of their kind, which the suite takes from its files to a notebook."""

Cli = Callable[..., tuple[int, str]]


def said(cli: Cli, *arguments: object) -> str:
    code, text = cli(*arguments)
    assert code == 0, text
    return text


def test_the_page_shows_the_config_of_each_example() -> None:
    assert BLOCKS.keys() == EXAMPLES.keys() == {path.stem for path in (ROOT / "configs/examples").glob("*.yaml")}
    for name, block in BLOCKS.items():
        config = (ROOT / f"configs/examples/{name}.yaml").read_text()
        assert f"\n{block}package:\n" in config
        assert load_config(ROOT / f"configs/examples/{name}.yaml").task.name == name


def test_the_commands_that_are_printed_stand_on_the_page() -> None:
    first, *lines = next_commands(Path("data/answers/answers.yaml")).splitlines()
    assert first == "wrote data/answers: two answers, two classes"
    shown = [" ".join(line.split("#")[0].split()) for line in PAGE.read_text().splitlines()]
    assert [line for line in lines if line not in shown] == []
    assert [line.split()[1] for line in lines] == ["check", "cv", "evaluate", "predict", "package"]
    assert "'data/a b/toxic.yaml'" in next_commands(Path("data/a b/toxic.yaml"))


@pytest.mark.usefixtures("quick_workers")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.thorough] * (name in SIBLINGS)) for name in EXAMPLES]
)
def test_an_example_goes_from_its_files_to_a_notebook(
    name: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hollow_wheelhouse(monkeypatch)
    folder, spoken = Path("data", name), said(cli, "example", name, "--rows", ROWS)
    path, outputs = folder / f"{name}.yaml", ("--out", "submission.csv", "--scores", "scores.parquet")
    config, fast = load_config(path), ("folds.n_splits=2", "classical.n_features=4096")
    bundles, sample = (
        [Path("runs", name, f"fold{fold}", "bundle") for fold in range(2)],
        folder / "sample_submission.csv",
    )
    for arguments in (
        ("check", folder / "train.csv", "--task", path),
        ("check", folder / "test.csv", "--task", path, "--unlabelled"),
        ("cv", path, *fast),
        ("evaluate", path, *fast, "--truth", folder / "truth.parquet"),
        ("predict", *bundles, "--data", folder / "test.csv", "--sample", sample, *outputs),
    ):
        spoken += said(cli, *arguments)
    if not config.task.swappable:
        assert re.findall(r"\b(?:swap\w*|orders?|AB|BA|sides?)\b", spoken) == []
    check_submission(Path("submission.csv"), sample, config.task, config.data.settled_submission)
    assert_learnt(config, Path("scores.parquet"))
    assert_together(config)
    if config.task.multi_label:
        assert_labels_at_fitted_thresholds(cli, bundles, config)
        printed = said(cli, "evaluate", path, *fast, "--json")
        tree = json.loads(printed[printed.index("{") : printed.rindex("}") + 1])
        assert tree["thresholds"]["thresholds"]["macro"].keys() == {*config.task.classes}
    said(
        cli, "package", path, *fast, "package.owner=someone", f"package.python_versions=['{RUNNING}']", "--out", "built"
    )
    assert [packed.base for packed in read_build(Path("built")).bundles] == [None, None]
    assert len(list(Path("built/kernel").glob("*.ipynb"))) == 1
    if name == "toxic":
        assert_without_ids(cli, bundles, config)


def assert_learnt(config: Config, scores: Path) -> None:
    """On test rows, the expected log loss is nearer to the lowest possible than the prior's, by a tenth of the way."""
    names, many = list(config.task.classes), config.task.multi_label
    table = pl.read_parquet(scores).join(pl.read_parquet(config.data.folder / "truth.parquet"), on="id", suffix="_true")
    predicted, true = (table.select(f"{name}{end}" for name in names).to_numpy() for end in ("", "_true"))
    prior = np.tile(true.mean(axis=0), (len(true), 1))

    def loss(values: np.ndarray) -> float:
        parts = true * np.log(values) + (((1 - true) * np.log(1 - values)) if many else 0)
        return float(-parts.sum(axis=1).mean())

    best = entropy(true, multi_label=many)
    assert best <= loss(predicted) < loss(prior) - 0.1 * (loss(prior) - best)


def assert_labels_at_fitted_thresholds(cli: Cli, bundles: list[Path], config: Config) -> None:
    """`predict` writes labels at the mean of the folds' thresholds, each of the best macro F1 on its held-out rows."""
    names = list(config.task.classes)
    fitted, oof = [], pl.read_parquet(Path("runs", config.task.name, OOF))
    for own in oof.partition_by("fold"):
        targets = own.select(f"target_{name}" for name in names).to_numpy()
        fitted.append(fit_thresholds(own.select(names).to_numpy(), targets, "macro"))
    levels, asked = np.mean(fitted, axis=0), ("data.submission.values=labels", "--out", "labels.csv")
    said(cli, "predict", *bundles, "--data", config.data.folder / "test.csv", *asked)
    chosen = pl.read_csv("labels.csv").select(names).to_numpy()
    scores = pl.read_parquet("scores.parquet").select(names).to_numpy()
    assert (chosen == (scores >= levels)).all()
    assert (chosen != (scores >= 0.5)).any()


def assert_together(config: Config) -> None:
    """Rows with one question, or of one group, are in one fold, and none of them is a test row."""
    key = config.folds.group or ("question" if config.task.swappable else None)
    folds = pl.read_csv(Path("runs", config.task.name, FOLDS), infer_schema=False)
    train = pl.read_csv(config.data.folder / "train.csv", infer_schema=False)
    assert len(train) == ROWS
    if key is not None:
        by_group = train.with_columns(folds["fold"]).group_by(key).agg(pl.col("fold").n_unique())
        assert by_group["fold"].to_list() == [1] * (ROWS // 3)
    if config.task.swappable:
        test = pl.read_csv(config.data.folder / "test.csv", infer_schema=False)
        assert not set(train["question"]) & set(test["question"])


def assert_without_ids(cli: Cli, bundles: list[Path], config: Config) -> None:
    """A test file without ids: its rows are those of the sample, in its order."""
    before = pl.read_csv("submission.csv")
    pl.read_csv(config.data.folder / "test.csv").drop("id").write_csv("plain.csv")
    sample_too = ("--sample", config.data.folder / "sample_submission.csv", "--out", "second.csv")
    text = said(cli, "predict", *bundles, "--data", "plain.csv", *sample_too, "data.test.columns.id=null")
    assert "its rows are those of the sample submission, in its order" in text
    assert pl.read_csv("second.csv").equals(before)


def test_the_same_seed_gives_the_same_files_and_another_one_others(tmp_path: Path) -> None:
    files = [write_example("topics", tmp_path / str(place), rows=30, seed=seed) for place, seed in enumerate((0, 0, 1))]
    first, again, other = ((file.parent / "train.csv").read_bytes() for file in files)
    assert first == again != other


def test_an_example_is_read_where_it_was_written_and_replaces_nothing(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / 'a "folder": # 1'
    path = write_example("sentiment", folder, rows=31, test_rows=5)
    config = load_config(path)
    assert config.data.folder == folder
    assert [pl.read_csv(folder / name).height for name in ("train.csv", "test.csv")] == [31, 5]
    before = (folder / "train.csv").read_bytes()
    code, text = cli("example", "sentiment", "--folder", folder)
    assert code == 2
    assert "holds files already" in text
    assert (folder / "train.csv").read_bytes() == before


def test_an_example_that_does_not_exist_is_refused(cli: Cli) -> None:
    code, text = cli("example", "imdb")
    assert code == 2
    assert "imdb is no example" in text
    assert "one of sentiment, topics, patents, toxic, answers, verdicts" in text
