"""The benchmark of approaches in miniature: arms on the same rows, resumed, skipped with a reason, in the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
from support.scripts import benchmark_script

from pairclf.demo.arena import generate, write_lmsys
from pairclf.run import Run
from pairclf.task import LMSYS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/approaches.md"

Bench = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def approaches() -> ModuleType:
    return cast(ModuleType, benchmark_script("approaches"))


@pytest.fixture
def bench(approaches: ModuleType, tmp_path: Path) -> Bench:
    """Runs arms on a small synthetic arena; returns the lines of results by arm."""
    small = ["--rows", "60", "--sets", "synthetic", "--arena-rows", "84", "--max-length", "96", "--out", str(tmp_path)]

    def call(arms: list[str], *more: str) -> dict[str, dict[str, Any]]:
        approaches.main([*small, "--arms", *arms, *more])
        return {line["arm"]: line for line in approaches.read_results(tmp_path).values()}

    return call


def test_arms_are_run_once_and_skipped_ones_again(
    approaches: ModuleType, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ("--model", "embedded:llama-tiny")
    lines = bench(["logistic", "zero-shot", "reward", "four-shot", "encoder"], *model)
    assert lines["encoder"]["skipped"] == "no --encoder was given"
    assert "inputs.max_length=192 is too small for prompt.k=4" in lines["four-shot"]["skipped"]
    done = [lines[name] for name in ("logistic", "zero-shot", "reward")]
    ((training, held_out),) = {(line["training"], line["held_out"]) for line in done}
    assert training + held_out == 60
    assert len({line["prior_log_loss"] for line in done}) == 1, "the same rows"
    assert all(0 < line["log_loss"] < 3 and line["interval"] > 0 and line["rows_per_s"] > 0 for line in done)
    assert [line["flip_rate"] for line in done[:1]] == [0]
    assert "flip_rate" not in lines["reward"]
    assert [line["trained_weights"] > 0 for line in done] == [True, False, True]
    assert lines["reward"]["weights"] - lines["reward"]["trained_weights"] == lines["zero-shot"]["weights"]
    assert 0 <= lines["zero-shot"]["label_mass"] <= 1

    attempts: list[str] = []
    monkeypatch.setattr(approaches, "run_arm", lambda arm, *_: attempts.append(arm.title) or {"log_loss": 0.5})
    again = bench(["logistic", "zero-shot", "encoder"], *model, "--encoder", "somewhere/MiniLM")
    assert attempts == ["encoder, all weights"]
    assert again["encoder"]["base"] == "MiniLM"
    assert again["logistic"] == lines["logistic"]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 6, "a line an arm"

    page = tmp_path / "page.md"
    page.write_text(f"before\n{approaches.START}old\n{approaches.END}after\n")
    (tmp_path / "results.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines.values()))
    approaches.main(["--write", str(page), "--out", str(tmp_path)])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert f"**synthetic**: {training} training rows, {held_out} held-out rows" in text
    assert approaches.header() in text
    assert f"| zero-shot | embedded:llama-tiny | {lines['zero-shot']['log_loss']:.4f} |" in text
    assert "; head, LoRA; encoder, all weights (no --encoder was given)." in text


def test_all_arms_hold_out_the_same_rows(approaches: ModuleType, tmp_path: Path) -> None:
    write_lmsys(generate(64, seed=0), tmp_path / "synthetic", n_test=4)
    given = ["--rows", "45", "--out", str(tmp_path), "--model", "embedded:llama-tiny", "--encoder", "somewhere"]
    options, splits = approaches.options_of(given), set()
    for place, arm in enumerate(approaches.ARMS.values()):
        config = approaches.config_of(arm, "synthetic", options, tmp_path / str(place))
        split = Run(config).split(0)
        assert split.held_out is not None
        splits.add((tuple(split.training["id"]), tuple(split.held_out["id"])))
    assert len(splits) == 1


def test_the_page_has_the_columns_of_the_benchmark(approaches: ModuleType) -> None:
    """The figures are those of the last run; a column that is added or renamed needs the tables to be written again."""
    table = PAGE.read_text().partition(approaches.START)[2].partition(approaches.END)[0]
    assert table.count(approaches.header()) == table.count("| approach |") > 0


def test_rows_of_one_prompt_widen_the_interval(approaches: ModuleType) -> None:
    random = np.random.default_rng(0)
    values = random.dirichlet((1, 1, 1), 50)
    targets = np.eye(3)[random.integers(0, 3, 50)]
    losses = -np.log((values * targets).sum(axis=1))
    apart = approaches.interval(values, targets, pl.Series(range(50)))
    assert apart == pytest.approx(1.96 * losses.std() / np.sqrt(50))
    twice = approaches.interval(np.tile(values, (2, 1)), np.tile(targets, (2, 1)), pl.Series([*range(50), *range(50)]))
    assert twice == pytest.approx(apart), "a row that stands twice tells nothing new"


def test_the_flip_rate_compares_both_orders_in_the_same_columns(approaches: ModuleType) -> None:
    first = np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    same = np.stack([first, first[:, [1, 0, 2]]], axis=1)
    biased = np.stack([first, first], axis=1)  # the first place wins, whoever stands there
    assert approaches.flip_rate(same, LMSYS) == 0
    assert approaches.flip_rate(biased, LMSYS) == 0.5
    assert approaches.flip_rate(first[:, None], LMSYS) is None
