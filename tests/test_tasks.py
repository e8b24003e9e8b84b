"""Every config of docs/tasks.md goes from CSV files to a right submission, by the commands that the page names."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pairclf.config import Config, load_config, parse_yaml
from pairclf.data.submission import check_submission, open_sample
from pairclf.run import FOLDS
from pairclf.scores.metrics import accuracy

PAGE = Path(__file__).parents[1] / "docs/tasks.md"
CONFIGS = {
    Path(name).stem: text
    for name, text in re.findall(r"```yaml\n# (configs/\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
}
SAMPLES = {
    "answers": {"id": None, "better": "1"},
    "verdicts": {"id": None, "first": "0", "second": "0", "tie": "1"},
    "sentiment": {"review_id": None, "sentiment": "0.5"},
    "topics": {"id": None, "topic": "art"},
    "patents": {"id": None, "chemistry": "0", "mechanics": "0", "software": "0"},
    "toxic": {"id": None, "toxic": "0"},
}
TRAINING, TEST = 120, 24


def cells_of(config: Config, rng: random.Random, row: int) -> tuple[dict[str, str], list[int]]:
    """Texts and groups of a row in the files' columns, and its target: words tell the class.

    Questions and groups stand in several rows each.
    """
    task = config.task
    filler = " ".join(f"w{rng.randrange(50)}" for _ in range(6))
    group = {config.folds.group: f"g{row % 15}"} if config.folds.group else {}
    if task.swappable:
        marks = [(1, 0), (0, 1), (0, 0)][row % len(task.classes)]
        sides = [f"{'splendid' if mark else 'dreadful'} {filler}" for mark in marks]
        question = f"what about {' '.join([str(row % 15)] * 3)}"
        return {"question": question, "answer_1": sides[0], "answer_2": sides[1]} | group, [row % len(task.classes)]
    if task.multi_label:
        held = [place for place in range(len(task.classes)) if rng.random() < 0.4]
    else:
        held = [row % len(task.classes)]
    words = " ".join(f"word{place}" for place in held for _ in range(6))
    texts = {name: f"{name} {filler} {words} {row}" for name in task.fields}
    return texts | group, held


def write_files(config: Config, sample: dict[str, str | None]) -> list[list[int]]:
    """`train.csv`, `test.csv` and the sample of a config; returns the targets of the test rows."""
    task, rng, targets = config.task, random.Random(0), []
    rows = []
    for row in range(TRAINING + TEST):
        cells, held = cells_of(config, rng, row)
        labels = {name: str(int(place in held)) for place, name in enumerate(task.classes)}
        if task.label_column:
            labels = {task.label_column: task.classes[held[0]]}
        rows.append({next(iter(sample)): f"r{row}", **cells, **labels})
        targets.append(held)
    frame = pl.DataFrame(rows)
    folder = config.data.folder
    folder.mkdir(parents=True)
    frame.head(TRAINING).write_csv(folder / "train.csv")
    labels_and_group = [
        name for name in (*task.classes, task.label_column, config.folds.group) if name in frame.columns
    ]
    test = frame.tail(TEST).drop(labels_and_group)
    test.write_csv(folder / "test.csv")
    shuffled = test.select(next(iter(sample))).sample(fraction=1, shuffle=True, seed=1)
    filled = [pl.lit(text).alias(name) for name, text in sample.items() if text is not None]
    shuffled.with_columns(filled).select(*sample).write_csv(folder / "sample_submission.csv")
    return targets[TRAINING:]


def test_page_has_a_sample_for_each_config() -> None:
    assert CONFIGS.keys() == SAMPLES.keys()
    assert [parse_yaml(text, name)["task"]["name"] for name, text in CONFIGS.items()] == list(CONFIGS)


@pytest.mark.usefixtures("quick_workers")
@pytest.mark.parametrize("name", CONFIGS)
def test_config_of_the_page_goes_from_csv_to_submission(
    name: str, cli: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("configs", f"{name}.yaml")
    path.parent.mkdir()
    path.write_text(CONFIGS[name])
    config = load_config(path)
    targets, task, folder = write_files(config, SAMPLES[name]), config.task, config.data.folder
    sample, spoken = folder / "sample_submission.csv", ""
    for arguments in (
        ("check", folder / "train.csv", "--task", path),
        ("check", folder / "test.csv", "--task", path, "--unlabelled"),
        ("folds", path, "folds.n_splits=2"),
        ("cv", path, "folds.n_splits=2", "classical.n_features=4096"),
        ("evaluate", path),
    ):
        code, text = cli(*arguments)
        assert code == 0, text
        spoken += text
    bundles = sorted(Path("runs", name).glob("fold*/bundle"))
    code, text = cli("predict", *bundles, "--data", folder / "test.csv", "--sample", sample)
    assert code == 0, text
    spoken += text
    if not task.swappable:
        assert re.findall(r"\b(?:swap\w*|orders?|AB|BA|sides?)\b", spoken) == []
    if name == "toxic":  # and a test file without ids
        pl.read_csv(folder / "test.csv", infer_schema=False).drop("id").write_csv("plain.csv")
        in_order = (
            pl.read_csv(folder / "test.csv").select("id").join(pl.read_csv(sample), on="id", maintain_order="left")
        )
        in_order.write_csv("ordered.csv")
        before = pl.read_csv("submission.csv").sort("id")
        sample_too = ("--sample", "ordered.csv", "--out", "second.csv", "data.test.columns.id=null")
        code, text = cli("predict", *bundles, "--data", "plain.csv", *sample_too)
        assert code == 0, text
        assert "its rows are those of the sample submission, in its order" in text
        assert pl.read_csv("second.csv").sort("id").equals(before)
    check_submission(Path("submission.csv"), sample, task, config.data.settled_submission)
    assert_right(Path("submission.csv"), sample, config, targets)
    assert_together(config)


def assert_right(submission: Path, sample: Path, config: Config, targets: list[list[int]]) -> None:
    """The submission tells the classes of nearly all test rows."""
    form, _ = open_sample(sample, config.task, config.data.settled_submission)
    rows = pl.read_csv(submission, infer_schema=False)
    values = form.read(rows)[[rows[form.id].to_list().index(f"r{TRAINING + row}") for row in range(TEST)]]
    truth = np.array([[float(place in held) for place in range(len(config.task.classes))] for held in targets])
    assert accuracy(values, truth, multi_label=config.task.multi_label) > 0.9


def assert_together(config: Config) -> None:
    """Rows with one question, or of one group, are in one fold."""
    folds = pl.read_csv(Path("runs", config.task.name, FOLDS), infer_schema=False)
    train = pl.read_csv(config.data.folder / "train.csv", infer_schema=False)
    key = config.folds.group or ("question" if config.task.swappable else None)
    if key is not None:
        by_group = train.with_columns(folds["fold"]).group_by(key).agg(pl.col("fold").n_unique())
        assert by_group["fold"].to_list() == [1] * 15
