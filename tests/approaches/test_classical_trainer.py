"""The trainer of the classical approach: features once a run, groups of near-duplicates, and data that is hard."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tests_support import make_rows, write_csv

from pairclf.approaches import classical, classical_model, classical_vectors
from pairclf.approaches.classical import ClassicalTrainer
from pairclf.config import Config, resolve
from pairclf.run import Run
from pairclf.task import Row

Cli = Callable[..., tuple[int, str]]


def config_of(folder: Path, rows: Sequence[Row], **settings: Any) -> Config:
    write_csv(folder / "train.csv", rows)
    near = settings.pop("near", 0.8)
    tree = {
        "task": "lmsys",
        "approach": "classical",
        "output_dir": str(folder / "run"),
        "data": {"folder": str(folder), "train": "train.csv"},
        "folds": {"n_splits": 2, "near_duplicate_threshold": near},
        "classical": {"n_features": 256, **settings},
    }
    return resolve(tree)


def test_features_are_computed_once_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []

    def extract(rows: Sequence[Row], *arguments: Any) -> Any:
        computed.extend(row.id for row in rows)
        return original(rows, *arguments)

    original = classical_vectors.extract
    monkeypatch.setattr(classical, "extract", extract)
    monkeypatch.setattr(classical, "CHUNK", 7)
    run = Run(config_of(tmp_path, make_rows(24)))
    trainer = ClassicalTrainer(run)
    for fold in (0, 1):
        split = run.split(fold)
        assert split.held_out is not None
        fitted = trainer.fit(split, tmp_path, resume=None, trust_checkpoint=False)
        assert fitted.logits(split.held_out).shape == (len(split.held_out), 2, 3)
    assert sorted(computed) == sorted(run.frame["id"])


@pytest.mark.parametrize("near", [0.8, None])
def test_inner_folds_get_the_groups_of_near_duplicates(
    near: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sequence[Hashable]] = []

    def fit(rows: object, groups: Sequence[Hashable], *arguments: object) -> None:
        seen.append(groups)

    monkeypatch.setattr(classical_model, "fit_extracted", fit)
    long = "an evening in the mountains with a book, a dog, a fire and nobody who asks for anything at all"
    prompts = [f"{long}, please", f"{long}, please!", "Say dog.", "Count to three."]
    rows = [
        Row(str(number), {"prompt": (prompts[number % 4],), "response_a": ("a",), "response_b": ("b",)}, target)
        for number, target in enumerate(np.eye(3)[[0, 1, 2] * 4].tolist())
    ]
    run = Run(config_of(tmp_path, rows, near=near, model="svm"))
    ClassicalTrainer(run).fit(run.split(None), tmp_path, resume=None, trust_checkpoint=False)
    (groups,) = seen
    assert (groups[0] == groups[1]) == (near is not None)
    assert groups[0] == groups[4] != groups[2]


HARD: dict[str, tuple[list[int], dict[str, str], str]] = {
    "one class": ([2] * 12, {}, ""),
    "a class that a fold lacks": ([0, 1] * 5 + [2], {}, ""),
    "only empty texts": ([0, 1, 2] * 4, {"prompt": "", "response_a": "", "response_b": ""}, ""),
    "equal texts": (
        [0, 1, 2] * 4,
        {"prompt": "p", "response_a": "a", "response_b": "a"},
        "1 different prompt can't fill",
    ),
    "one row": ([0], {}, "1 different prompt can't fill"),
}


@pytest.mark.parametrize("model", ["logistic", "stack"])
@pytest.mark.parametrize("name", HARD)
def test_hard_data_gives_a_result_or_says_what_to_do(name: str, model: str, tmp_path: Path, cli: Cli) -> None:
    labels, texts, refusal = HARD[name]
    classes = ["winner_model_a", "winner_model_b", "winner_tie"]
    fields = {"prompt": "prompt {}", "response_a": "words of {}", "response_b": "other words {}"} | texts
    cells = [
        {
            "id": number,
            **{field: json.dumps([text.format(number * 37 % 101)]) for field, text in fields.items()},
            **{column: int(place == label) for place, column in enumerate(classes)},
        }
        for number, label in enumerate(labels)
    ]
    pl.DataFrame(cells).write_csv(tmp_path / "train.csv")
    small = [] if model == "logistic" else ["classical.n_estimators=2", "classical.n_components=2"]
    (tmp_path / "config.yaml").write_text(
        json.dumps(
            {
                "task": "lmsys",
                "approach": "classical",
                "output_dir": str(tmp_path / "run"),
                "data": {"folder": str(tmp_path), "train": "train.csv"},
                "folds": {"n_splits": 2, "near_duplicate_threshold": None},
            }
        )
    )
    code, text = cli("cv", tmp_path / "config.yaml", f"classical.model={model}", "classical.n_features=256", *small)
    assert code == (2 if refusal else 0), text
    assert (refusal or "Out of fold: 2 of 2 folds") in text
    if refusal:
        assert "lower folds.n_splits" in text
        code, text = cli(
            "train", tmp_path / "config.yaml", f"classical.model={model}", "classical.n_features=256", *small
        )
        assert code == 0, text
