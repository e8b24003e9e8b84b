"""`forecast-score` reads runs and the test file, measures a shift where it can, and explains two picks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pairclf.demo.arena import generate, write_lmsys
from pairclf.errors import ConfigError
from pairclf.runs.held_out import CommonRows, open_runs
from pairclf.runs.score_forecast import forecast_scores
from pairclf.runs.text_shift import measure_shift
from pairclf.scores.metrics import log_loss
from pairclf.task import LMSYS

Cli = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def common(arms: Path) -> CommonRows:
    return open_runs([arms / "runs" / name for name in ("plain", "strong", "renamed")])


def test_intervals_surround_the_held_out_score(common: CommonRows) -> None:
    forecast = forecast_scores(common, public_share=0.2, hidden_rows=1000)
    assert (forecast.public_rows, forecast.private_rows) == (200, 800)
    for run, own in zip(forecast.runs, common.runs, strict=True):
        assert run.held_out == pytest.approx(log_loss(own.probabilities, common.targets))
        assert run.public.low < run.private.low < run.held_out < run.private.high < run.public.high
    assert forecast.shift is None
    assert "has 12 rows, and 100 are needed" in forecast.remarks[0]
    assert forecast.picks.first == int(np.argmin([run.private.mean for run in forecast.runs]))
    assert "best mean private score" in forecast.remarks[2]


def test_sizes_are_those_of_the_competition_where_the_file_shows_a_few_rows(common: CommonRows) -> None:
    forecast = forecast_scores(common, public_share=0.3)
    assert forecast.public_rows + forecast.private_rows == 25_000


@pytest.mark.parametrize("share", [0.0, 1.0, float("nan")])
def test_a_share_must_leave_both_parts(common: CommonRows, share: float) -> None:
    with pytest.raises(ConfigError, match=r"--public-share .* between 0 and 1"):
        forecast_scores(common, public_share=share)


def test_a_missing_file_is_named(common: CommonRows, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--data .* is no file"):
        forecast_scores(common, public_share=0.3, data=tmp_path / "none.csv")


def test_the_file_of_hidden_rows_gives_their_number_and_the_shift(common: CommonRows, tmp_path: Path) -> None:
    """The same arena's rows show no shift; those with long prompts alone do, and rows like them count for more."""
    write_lmsys(generate(900, seed=5), tmp_path, n_test=600)
    alike = forecast_scores(common, public_share=0.5, data=tmp_path / "test.csv")
    assert alike.public_rows + alike.private_rows == 600
    assert alike.shift is not None
    assert not alike.shift.found
    assert "none that a classifier finds" in alike.remarks[0]
    hidden = pl.read_csv(tmp_path / "test.csv")
    length = pl.col("prompt").str.len_chars()
    hidden.filter(length > length.median()).write_csv(tmp_path / "long.csv")
    shifted = forecast_scores(common, public_share=0.5, data=tmp_path / "long.csv")
    assert shifted.shift is not None
    assert shifted.shift.found
    assert shifted.shift.effective_rows < len(common.ids)
    assert "count for more" in shifted.remarks[0]
    characters = common.frame["prompt"].list.join("\n").str.len_chars().to_numpy()
    weights = shifted.shift.importance
    assert (
        weights[characters > np.median(characters)].mean() > 1.5 * weights[characters <= np.median(characters)].mean()
    )


def test_too_few_prompts_show_no_shift(common: CommonRows) -> None:
    one = common.frame.head(1)
    assert measure_shift(one, one, LMSYS) is None


def test_the_command_prints_tables_and_json(arms: Path, cli: Cli) -> None:
    runs = [str(arms / "runs" / name) for name in ("plain", "strong")]
    code, text = cli("forecast-score", *runs, "--public-share", "0.3", "--rows", "2000")
    assert code == 0, text
    assert "private, 1,400" in text
    assert "second pick" in text
    code, text = cli("forecast-score", *runs, "--public-share", "0.3", "--rows", "2000", "--json")
    found, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
    assert found["private_rows"] == 1400
    assert {found["picks"]["first"], found["picks"]["second"]} == {"plain", "strong"}
    assert found["shift"] is None


def test_an_ensemble_file_is_refused_with_what_to_give(arms: Path, tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "ensemble.yaml"
    file.write_text("members: [{bundle: a}]\n", encoding="utf-8")
    code, text = cli("forecast-score", str(file), "--public-share", "0.3")
    assert code != 0
    assert "blend" in text
    assert "--scores" in text
