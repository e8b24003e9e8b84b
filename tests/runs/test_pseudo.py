"""Pseudo-labels: weighted rows that no validation row and no test row knows, and that are never held out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from pairclf.bundles.bundle import open_bundle
from pairclf.config import Config, dump_config, override, resolve
from pairclf.data.folds import prompt_hashes
from pairclf.data.identity import row_hashes
from pairclf.data.rows import read_rows
from pairclf.data.scores import read_scores, scores_frame, write_scores
from pairclf.demo.arena import generate, write_lmsys
from pairclf.errors import ConfigError, DataError, LeakError
from pairclf.run import Run, labelled_rows
from pairclf.runs.fit import fit
from pairclf.runs.pseudo import Pseudo, pseudo
from pairclf.task import LMSYS, WSDM, Task

pytestmark = pytest.mark.usefixtures("without_forecast", "quick_workers")

TRAIN, TEST = (" ".join(f"{name}{number}" for number in range(30)) for name in ("train", "test"))

ROWS = {
    "fresh": ("nothing like the others at all", "left", "right"),
    "train": (f"  {TRAIN.upper()} ", "left", "right"),
    "near-train": (f"{TRAIN}!", "left", "right"),
    "test": (TEST, "left", "right"),
    "near-test": (f"{TEST} or so", "left", "right"),
    "again": ("nothing like the others at all", "left", "right"),
    "mirror": ("nothing like the others at all", "right", "left"),
    "other-answer": ("nothing like the others at all", "left", "wrong"),
    "blank-train": ("", "blank", "answer"),
    "blank": ("", "another", "answer"),
}
KEPT = ["fresh", "other-answer", "blank"]


def write(path: Path, rows: dict[str, tuple[str, str, str]], task: Task, label: str | None = None) -> Path:
    shown: Callable[[str], str] = (lambda text: json.dumps([text])) if task.multi_turn else str
    cells = {name: [shown(row[place]) for row in rows.values()] for place, name in enumerate(task.fields)}
    labels: dict[str, Any] = {}
    if label is not None:
        one_hot = {name: [float(name == label)] * len(rows) for name in task.classes}
        labels = {task.label_column: [label] * len(rows)} if task.label_column else one_hot
    pl.DataFrame({"id": list(rows), **cells, **labels}).write_parquet(path)
    return path


def write_scored(path: Path, data: Path, task: Task, seed: int = 0, **changes: Any) -> Path:
    """Random scores, out of sample, for the rows of an unlabelled file."""
    frame = read_rows([data], task, labelled=False)
    values = np.random.default_rng(seed).dirichlet(np.ones(len(task.classes)), size=len(frame))
    scores = scores_frame(frame["id"], values, task, 2, ["m"], seen=0, hashes=row_hashes(frame, task))  # type: ignore[arg-type]
    write_scores(path, scores.with_columns(**changes))
    return path


@pytest.fixture(params=[LMSYS, WSDM], ids=lambda task: task.name)
def task(request: pytest.FixtureRequest) -> Task:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def config(task: Task, tmp_path: Path) -> Config:
    """A folder with train.parquet, test.parquet and extra.parquet, and scores.parquet of the last."""
    labelled = {"1": (TRAIN, "a", "b"), "2": ("", "answer", "blank"), "3": ("short", "a", "b"), "4": ("else", "a", "b")}
    write(tmp_path / "train.parquet", labelled, task, label=task.classes[0])
    write(tmp_path / "test.parquet", {"t": (TEST, "a", "b")}, task)
    write_scored(tmp_path / "scores.parquet", write(tmp_path / "extra.parquet", ROWS, task), task)
    tree = {"folder": str(tmp_path), "train": ["train.parquet"], "test": "test.parquet"}
    return resolve(
        {"task": task.model_dump(), "data": tree, "folds": {"n_splits": 2}, "output_dir": str(tmp_path / "run")}
    )


def make(config: Config, **options: Any) -> tuple[Pseudo, pl.DataFrame]:
    folder = config.data.folder
    out = folder / options.pop("name", "pseudo.parquet")
    counts = pseudo(config, folder / "extra.parquet", folder / "scores.parquet", out, **options)
    return counts, read_rows([out], config.task, labelled=True)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_pseudo_leaves_out_duplicates_of_validation_and_test_rows(config: Config, suffix: str) -> None:
    counts, frame = make(config, name=f"pseudo{suffix}")
    assert counts == Pseudo(read=10, validation=3, test=2, repeated=2, unsure=0, written=3)
    assert frame["id"].to_list() == [f"pseudo-{name}" for name in KEPT]
    assert frame["weight"].to_list() == [0.5] * 3
    scores = read_scores(config.data.folder / "scores.parquet", config.task)
    expected = scores.filter(pl.col("id").is_in(KEPT)).select(config.task.classes).to_numpy()
    np.testing.assert_allclose(frame["target"].to_list(), expected, atol=1e-12)


def test_pseudo_leaves_out_equal_prompts_alone_without_folds_near(config: Config) -> None:
    counts, frame = make(override(config, ["folds.near_duplicate_threshold=null"]))
    assert (counts.validation, counts.test) == (2, 1)
    assert {"pseudo-near-train", "pseudo-near-test"} <= set(frame["id"])


def test_pseudo_labels_follow_confidence_temperature_and_hard(config: Config) -> None:
    soft = np.array(make(config)[1]["target"].to_list())
    sharp = np.array(make(config, temperature=0.25)[1]["target"].to_list())
    powers = soft**4 / (soft**4).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(sharp, powers, atol=1e-9)
    hard = np.array(make(config, hard=True, weight=1.0)[1]["target"].to_list())
    np.testing.assert_array_equal(hard, np.eye(soft.shape[1])[soft.argmax(axis=1)])
    bar = float(np.sort(soft.max(axis=1))[1])
    counts, frame = make(config, min_confidence=bar - 1e-9)
    assert (counts.unsure, counts.written) == (1, 2)
    assert min(max(target) for target in frame["target"]) >= bar - 1e-9
    (config.data.folder / "pseudo.parquet").unlink()
    with pytest.raises(DataError, match=r"none of the 10 rows is left.*3 are unsure"):
        make(config, min_confidence=1.0)
    assert not (config.data.folder / "pseudo.parquet").exists()


def test_scores_of_rows_with_their_sides_exchanged_label_nothing(config: Config, tmp_path: Path) -> None:
    mirrored = {name: (prompt, b, a) for name, (prompt, a, b) in ROWS.items()}
    write_scored(
        config.data.folder / "scores.parquet", write(tmp_path / "m.parquet", mirrored, config.task), config.task
    )
    with pytest.raises(DataError, match="3 rows have the id of a row here and its sides exchanged"):
        make(config)
    assert not (config.data.folder / "pseudo.parquet").exists()


def test_a_model_does_not_label_its_own_training_rows(config: Config) -> None:
    folder, task = config.data.folder, config.task
    own = pl.when(pl.col("id") == "blank").then(1).otherwise(0).cast(pl.UInt16)
    write_scored(folder / "scores.parquet", folder / "extra.parquet", task, seen=own)
    with pytest.raises(LeakError, match="trained on the very row") as caught:
        make(config)
    assert caught.value.rows == ("blank",)
    # Rows that go anyway may have been seen: they share their prompts with training rows.
    known = pl.col("id").str.contains("train").cast(pl.UInt16)
    write_scored(folder / "scores.parquet", folder / "extra.parquet", task, seen=known)
    assert make(config)[0].written == 3
    write_scored(folder / "scores.parquet", folder / "extra.parquet", task, seen=pl.lit(None, dtype=pl.UInt16))
    with pytest.raises(LeakError, match="do not say whether"):
        make(config)
    assert make(override(config, ["train.distill.allow_unknown_provenance=true"]))[0].written == 3


def test_every_kept_row_needs_its_own_score(config: Config) -> None:
    folder, task = config.data.folder, config.task
    scores = read_scores(folder / "scores.parquet", task)
    write_scores(folder / "scores.parquet", scores.filter(pl.col("id").is_in(["fresh", "blank"])))
    with pytest.raises(DataError, match="1 row has no score") as caught:
        make(config)
    assert caught.value.rows == ("other-answer",)
    write_scores(folder / "scores.parquet", scores.with_columns(id=pl.Series([*scores["id"][1:], "fresh"])))
    with pytest.raises(DataError, match="these are scores of other rows"):
        make(config)


def test_what_must_stay_unseen_must_be_there(config: Config) -> None:
    folder = config.data.folder
    with pytest.raises(ConfigError, match=r"gone\.parquet, which is not there"):
        make(override(config, ["data.test=gone.parquet"]))
    assert make(override(config, ["data.test=null"]))[0].test == 0
    with pytest.raises(ConfigError, match="no file whose rows may be held out"):
        make(override(config, ["data.train=[{files: [train.parquet], train_only: true}]"]))
    for name in ("train.parquet", "test.parquet", "extra.parquet", "scores.parquet"):
        with pytest.raises(ConfigError, match="one of the files that are read"):
            make(config, name=name)
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="--weight"):
            make(config, weight=weight)
    assert not (folder / "pseudo.parquet").exists() or make(config)[0].written == 3


def test_pseudo_labels_may_be_trained_on_and_other_rows_may_not(config: Config) -> None:
    """What `pseudo` writes passes the leak assertion; the unlabelled file as a whole, labelled alike, does not."""
    folder = config.data.folder
    write(
        folder / "train.parquet",
        {str(n): (f"{n} " * 9, "a", "b") for n in range(9)},
        config.task,
        config.task.classes[1],
    )
    assert make(config)[0].written == 6  # the planted training rows are fresh ones now
    mixed = override(config, ["data.train=[{files: pseudo.parquet, train_only: true}, train.parquet]"])
    rows = labelled_rows(mixed)
    assert rows["train_only"].to_list() == [False] * 9 + [True] * 6
    for fold in range(2):
        training, held_out = Run(mixed).split(fold)
        assert held_out is not None
        assert set(training.filter("train_only")["id"]) == set(rows.filter("train_only")["id"])
        assert not held_out["train_only"].any()
    label = config.task.classes[0]
    write(folder / "extra.parquet", {"x": ("3 " * 9, "c", "d"), "y": ("unlike", "c", "d")}, config.task, label)
    leaking = "{files: extra.parquet, train_only: true%s}"
    open_one = override(config, [f"data.train=[train.parquet, {leaking % ''}]"])
    with pytest.raises(LeakError, match="1 of 2 rows that are train_only") as caught:
        Run(open_one).split(0)
    assert caught.value.rows == ("x",)
    shut = override(config, [f"data.train=[train.parquet, {leaking % ', exclude_overlap: [train.parquet]'}]"])
    assert Run(shut).split(0)[0].filter("train_only")["id"].to_list() == ["y"]


def test_from_a_bundle_to_a_student(
    base_of: Callable[[str], Path], tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    """The commands: train a teacher, predict unlabelled rows, label them, and train on them and on what people said."""
    write_lmsys(generate(40, seed=5), tmp_path, n_test=8)
    (tmp_path / "extra").mkdir()
    write_lmsys(generate(30, seed=6), tmp_path / "extra", n_test=20)
    tree = {
        "output_dir": str(tmp_path / "run"),
        "data": {"folder": str(tmp_path), "train": ["train.csv"], "test": "test.csv"},
        "folds": {"n_splits": 2},
        "inputs": {"max_length": 96},
        "model": {"base": str(base_of("llama")), "quantization": "none", "lora": {"r": 2}},
        "train": {"max_steps": 1},
    }
    config = resolve(tree)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    bundle, scores, out = fit(config, None), tmp_path / "scores.parquet", tmp_path / "pseudo.parquet"
    data = tmp_path / "extra" / "test.csv"
    predicted = cli("predict", bundle, "--data", data, "--out", tmp_path / "s.csv", "--scores", scores)
    assert predicted[0] == 0, predicted[1]
    code, text = cli(
        "pseudo", tmp_path / "config.yaml", "--data", data, "--scores", scores, "--out", out, "--weight", 0.25
    )
    assert code == 0, text
    assert "written to" in text
    made = read_rows([out], LMSYS, labelled=True)
    assert set(made["weight"]) == {0.25}
    mixed = override(config, ["data.train=[train.csv, {files: pseudo.parquet, train_only: true}]"])
    trained_on = open_bundle(fit(mixed, 0)).trained_on()
    assert trained_on is not None
    assert set(prompt_hashes(made, LMSYS)) <= set(trained_on["prompt"])
    held_out = read_scores(tmp_path / "run" / "fold0" / "oof.parquet", LMSYS)
    assert not held_out["id"].str.starts_with("pseudo-").any()
    code, text = cli("pseudo", tmp_path / "config.yaml", "--data", tmp_path / "train.csv", "--scores", scores)
    assert code == 2
    assert "none of the" in text
