"""Runs are compared on the same rows, and a winner is named only where the difference exceeds the noise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import save_file
from sklearn.metrics import f1_score

from pairclf.bundles.bundle import open_bundle
from pairclf.config import Config
from pairclf.data.scores import read_scores
from pairclf.errors import ConfigError, DataError
from pairclf.run import Paths, output_of
from pairclf.runs import compare as module
from pairclf.runs.compare import Comparison, amount, compare_runs, seed_groups
from pairclf.runs.held_out import CommonRows, ScoredRun, open_runs
from pairclf.scores.intervals import difference
from pairclf.scores.metrics import Floats, log_loss, right_of_rows, row_losses
from pairclf.task import LMSYS

Cli = Callable[..., tuple[int, str]]
NAMES = ("plain", "strong", "other-seed")


@pytest.fixture(scope="module")
def common(arms: Path) -> CommonRows:
    return open_runs([arms / "runs" / name for name in NAMES])


@pytest.fixture(scope="module")
def comparison(common: CommonRows) -> Comparison:
    return compare_runs(common)


def of_scores(common: CommonRows, *scores: Floats) -> CommonRows:
    """Files of scores in place of the runs."""
    return replace(
        common,
        runs=[ScoredRun(f"file{place}", Path(f"file{place}"), own, None, None, {}) for place, own in enumerate(scores)],
    )


def test_figures_are_those_of_the_rows(common: CommonRows, comparison: Comparison) -> None:
    runs = {run.name: run for run in comparison.runs}
    assert [run.name for run in comparison.runs] == ["plain", "other-seed", "strong"]
    labels = common.targets.argmax(axis=1)
    for own in common.runs:
        figures, predicted = runs[own.name].figures, own.probabilities.argmax(axis=1)
        assert figures["log_loss"].value == pytest.approx(log_loss(own.probabilities, common.targets))
        assert figures["accuracy"].value == pytest.approx(right_of_rows(own.probabilities, common.targets).mean())
        macro = f1_score(labels, predicted, average="macro")
        assert figures["macro_f1"].value == pytest.approx(macro, abs=0.01)  # a tie of two sides counts one half each
        assert figures["flip_rate"].value == 0
        assert figures["log_loss"].low < figures["log_loss"].value < figures["log_loss"].high


def test_differences_are_paired(common: CommonRows, comparison: Comparison) -> None:
    plain, strong, _ = (row_losses(run.probabilities, common.targets) for run in common.runs)
    expected = difference(strong, plain, common.groups)
    gap = comparison.runs[2].to_best
    assert gap.value == pytest.approx(expected.value)
    assert gap.draws.std() == pytest.approx(expected.draws.std(), rel=1e-9)
    unpaired = math.hypot(*(run.figures["log_loss"].draws.std() for run in (comparison.runs[0], comparison.runs[2])))
    assert gap.draws.std() < 0.9 * unpaired


def test_a_winner_is_named_only_beyond_the_noise(common: CommonRows) -> None:
    generator = np.random.default_rng(3)
    good = 0.7 * common.targets + 0.1
    near = good + 1e-3 * generator.normal(size=good.shape)
    near /= near.sum(axis=1, keepdims=True)
    bad = np.full_like(good, 1 / 3)
    clear = compare_runs(of_scores(common, bad, good))
    assert clear.winner == "file1"
    assert [run.decision and run.decision.is_real for run in clear.runs] == [None, True]
    undecided = compare_runs(of_scores(common, bad, good, near))
    assert undecided.winner is None
    assert [run.decision.is_real for run in undecided.runs[1:] if run.decision] == [False, True]
    text = " ".join(module._remarks(undecided))
    assert "no winner" in text
    assert "seed noise: unknown" in text


def test_runs_that_differ_by_their_seed_alone_are_recognised(common: CommonRows, comparison: Comparison) -> None:
    assert seed_groups(common.runs) == [[0, 2]]
    assert comparison.noise is not None
    assert comparison.noise.degrees == 1
    assert comparison.runs[0].seeds == ("other-seed",)
    assert comparison.runs[2].seeds == ()
    other = common.runs[1]
    assert other.config is not None
    reseeded = replace(other, config=other.config.model_copy(update={"seed": 5}), name="x")
    assert seed_groups([common.runs[0], reseeded]) == []  # its C differs, too


def test_another_seed_of_the_best_run_is_no_rival(comparison: Comparison) -> None:
    assert [run.name for run in comparison.rivals] == ["strong"]
    assert comparison.winner == "plain"
    assert "plain is better than all others" in module._remarks(comparison)[0]
    alone = replace(comparison, runs=comparison.runs[:2])
    assert alone.winner is None
    assert module._remarks(alone)[0] == "no winner: all runs are seeds of one config"


def test_a_task_that_counts_accuracy_is_compared_by_it(common: CommonRows) -> None:
    task = LMSYS.model_copy(update={"metric": "accuracy"})
    files = of_scores(common, *(run.probabilities for run in common.runs))
    by_accuracy = compare_runs(replace(files, config=common.config.model_copy(update={"task": task})))
    assert by_accuracy.metric == "accuracy"
    values = [run.figures["accuracy"].value for run in by_accuracy.runs]
    assert values == sorted(values, reverse=True)
    assert all(run.to_best.value >= 0 for run in by_accuracy.runs)


def test_costs_are_those_that_are_recorded(arms: Path, comparison: Comparison) -> None:
    cost = comparison.runs[0].cost
    bundle = open_bundle(arms / "runs" / "plain" / "fold0" / "bundle")
    assert cost.trained_weights == cost.total_weights == module._numbers(bundle.files.classical)
    assert cost.training_hours is not None
    assert cost.training_hours > 0
    assert cost.hours is not None
    assert cost.hours > 0
    assert comparison.cost == "hours"
    assert comparison.runs[0].on_front
    trained = [json.loads((arms / f"runs/plain/fold{fold}/trained.json").read_text())["training"] for fold in (0, 1)]
    assert sum(record["scored_rows"] for record in trained) == comparison.rows
    assert cost.rows_per_second == pytest.approx(comparison.rows / sum(record["scored_seconds"] for record in trained))
    assert cost.peak_memory == max(1e9 * record["memory_gb"] for record in trained) > 5e7
    features = sum(record["seconds_before_scoring"] * record["scored_rows"] for record in trained)
    assert 0 < features < sum(record["scored_seconds"] for record in trained), "rows are scored from their texts"


def test_weights_are_counted_from_the_heads_of_files(tmp_path: Path) -> None:
    save_file({"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.int8)}, tmp_path / "x.safetensors")
    assert module._numbers(tmp_path / "x.safetensors") == 17
    text = "tree\nfeature_names=a b\nTree=0\nthreshold=1 2.5\nleaf_value=0.1 0.2 0.3\n\nTree=1\nleaf_value=0\n"
    (tmp_path / "lightgbm-0.txt").write_text(text)
    assert module._numbers_of_trees(tmp_path / "lightgbm-0.txt") == 6
    assert [amount(value) for value in (7, 16_700, 2_500_000, None)] == ["7", "16.7k", "2.5M", "-"]


def test_a_language_model_has_its_recorded_costs(trained_run: Callable[[str], Path]) -> None:
    """Steps, rows a second and peak memory as its training noted them; no forecast, which would load torch."""
    from support.runs import config_of

    folder = trained_run("llama")
    config: Config = config_of(folder)
    rows = open_runs([folder / "run"])
    cost = module._cost(rows.runs[0])
    assert cost.trained_weights is not None
    assert cost.total_weights is not None
    assert 0 < cost.trained_weights < cost.total_weights / 3
    assert cost.training_rows_per_second is not None
    records = [record["training"] for record in rows.runs[0].trained.values()]
    steps = config.train.max_steps or 0
    seconds = sum(record["seconds"] for record in records)
    assert cost.training_rows_per_second == pytest.approx(2 * steps * config.train.global_batch_size / seconds)
    assert cost.rows_per_second is not None
    assert cost.rows_per_second * sum(record["scored_seconds"] for record in records) == pytest.approx(len(rows.ids))
    lines = (Paths(output_of(config), 0).folder / "metrics.jsonl").read_text().splitlines()
    assert cost.peak_memory is not None
    assert cost.peak_memory >= 1e9 * json.loads(lines[0])["memory_gb"]
    assert cost.hours is None
    assert "--forecast makes it" in cost.why_not
    cost = module._cost(rows.runs[0], language_models=True)
    assert cost.hours is not None
    assert 0 < cost.hours < 9
    assert cost.hours > cost.trained_weights * 2 * 25_000 / 65e12 / 2 / 3600  # no row is free
    assert not cost.why_not
    assert rows.runs[0].flips is not None
    assert rows.runs[0].flips.any()


def test_costs_are_known_without_a_log_that_is_damaged(
    trained_run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(paths: Paths) -> list[dict[str, object]]:
        raise DataError(f"{paths.folder} is damaged")

    [run] = open_runs([trained_run("llama") / "run"]).runs
    monkeypatch.setattr(module, "training_log", damaged)
    assert module._peak_memory(replace(run, trained={0: {}})) is None
    assert "fold0 is damaged" in capsys.readouterr().err


def test_the_command_prints_tables_or_json(
    arms: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "total_seconds", lambda *_, **__: 3600.0)
    runs = [arms / "runs" / name for name in NAMES[:2]]
    code, text = cli("compare", *runs, "--out", tmp_path / "out", "--public-rows", "7000")
    assert code == 0, text
    for words in ("2 runs on 148 rows", "cal. RMSE", "P(better): the chance", "a leaderboard of 7,000 rows", "Costs"):
        assert words in text
    lines = pl.read_parquet(tmp_path / "out" / "figures.parquet").rows_by_key("figure", unique=True)
    losses = pl.read_parquet(tmp_path / "out" / "losses.parquet")
    assert losses.columns == ["id", "group", "weight", "loss_plain", "loss_strong"]
    code, text = cli("compare", *runs, "--json", "--public-rows", "7000")
    assert code == 0
    figures = json.loads(text[: text.rindex("}") + 1])
    assert figures == json.loads((tmp_path / "out" / "compare.json").read_text())
    plain = next(run for run in figures["runs"] if run["name"] == "plain")
    assert plain["figures"]["log_loss"]["value"] == pytest.approx(losses["loss_plain"].mean())
    assert lines["runs.plain.figures.log_loss"] == tuple(plain["figures"]["log_loss"].values())
    assert {"roc_auc", "brier", "matthews"} <= plain["figures"].keys(), "all figures of `evaluate`"
    assert plain["figures"]["brier"]["low"] is None
    assert math.isclose(figures["leaderboard"]["best_above"]["strong"], 1, abs_tol=0.5)


def test_a_copy_of_a_run_is_said_to_be_equal(common: CommonRows) -> None:
    copy = replace(common.runs[0], name="copy", config=None)
    comparison = compare_runs(replace(common, runs=[common.runs[0], copy, common.runs[1]]))
    assert [run.name for run in comparison.runs[1:] if run.equals_best] == [comparison.runs[1].name]
    text = " ".join(" ".join(module._remarks(comparison)).split())
    assert f"equal on all rows: {comparison.runs[0].name}, {comparison.runs[1].name}" in text
    assert comparison.winner is None


def test_one_run_is_no_comparison(arms: Path, common: CommonRows) -> None:
    with pytest.raises(ConfigError, match="one run can't be compared"):
        compare_runs(open_runs([arms / "runs" / "plain"]))
    scores = read_scores(arms / "runs" / "plain" / "oof.parquet", LMSYS)
    assert len(scores) == len(common.ids)


def test_ten_rows_one_prompt_and_an_absent_class_have_figures(common: CommonRows) -> None:
    ten = replace(
        of_scores(common, *(run.probabilities[:10] for run in common.runs[:2])),
        ids=common.ids[:10],
        targets=np.eye(3)[np.arange(10) % 2],
        weights=common.weights[:10],
        groups=common.groups[:10],
    )
    assert np.isfinite(compare_runs(ten).runs[1].to_best.value)
    single = compare_runs(replace(ten, groups=np.full(10, "x"), runs=ten.runs[:2]))
    assert single.winner is None
    assert json.dumps(single.as_dict())
