"""`forecast-score` reads runs and the test file, measures a shift where it can, and explains two picks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.sparse import csr_matrix
from support.records import ledger_row

from pairclf.bundles.bundle import open_bundle
from pairclf.config import load_config
from pairclf.data.rows import read_rows
from pairclf.data.scores import class_matrix, read_scores
from pairclf.demo.arena import generate, write_lmsys
from pairclf.errors import ConfigError
from pairclf.publish.ledger import record, rows
from pairclf.runs import blended as blended_runs
from pairclf.runs import score_forecast
from pairclf.runs.blend import HEADER, blend_runs, write_ensemble
from pairclf.runs.blended import open_runs_and_ensembles
from pairclf.runs.evaluate import evaluate_run
from pairclf.runs.held_out import CommonRows, open_runs
from pairclf.runs.score_forecast import forecast_scores
from pairclf.runs.text_shift import chances_of, measure_shift
from pairclf.scores.blend import BLENDS, HeldOutRows, cross_fit
from pairclf.scores.metrics import log_loss
from pairclf.scores.score_forecast import ScoreInterval
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
    hidden.filter(length > length.quantile(0.75)).write_csv(tmp_path / "long.csv")
    shifted = forecast_scores(common, public_share=0.5, data=tmp_path / "long.csv")
    assert shifted.shift is not None
    assert shifted.shift.found
    assert shifted.shift.effective_rows < len(common.ids)
    assert "count for more" in shifted.remarks[0]
    held = np.log(common.frame["prompt"].list.join("\n").str.len_chars().to_numpy())
    rows = read_rows([tmp_path / "long.csv"], LMSYS, labelled=False)
    wanted = np.log(rows["prompt"].list.join("\n").str.len_chars().to_numpy()).mean()
    assert held.mean() < wanted - 0.3
    assert shifted.shift.importance @ held / len(held) == pytest.approx(wanted, abs=0.1)


def test_too_few_prompts_show_no_shift(common: CommonRows) -> None:
    one = common.frame.head(1)
    assert measure_shift(one, one, LMSYS) is None


@pytest.mark.parametrize("same", [True, False])
def test_a_classifier_that_errs_on_new_prompts_shows_no_shift(same: bool) -> None:
    """A word goes with the hidden rows of one fold; in the other fold, too, or with the rows that are not hidden. Words
    that no text has change nothing."""
    random = np.random.default_rng(0)
    hidden, folds = np.tile([True, False], 80), np.repeat([0, 1], 80)
    word = hidden if same else hidden ^ (folds == 1)
    lengths = random.integers(1, 50, (160, 4))
    features = np.column_stack([lengths, word, np.ones(160)])
    chances = chances_of(csr_matrix(features), hidden, folds, 4)
    if same:
        assert chances[hidden].min() > 0.5 > chances[~hidden].max()
    else:
        assert np.abs(chances - 0.5).max() < 0.25  # turned round, it would be nearly 0.5
    wider = csr_matrix(np.column_stack([features, np.zeros((160, 3))]))
    np.testing.assert_allclose(chances_of(wider, hidden, folds, 4), chances, atol=1e-6)


def test_words_count_beside_lengths() -> None:
    """One word is likelier among hidden rows; eight lengths and 40 other words say nothing."""
    random = np.random.default_rng(0)
    hidden, folds = random.random(800) < 0.5, np.arange(800) % 5
    word = random.random(800) < np.where(hidden, 0.6, 0.2)
    features = np.column_stack([random.integers(1, 50, (800, 8)), word, random.random((800, 40)) < 0.2])
    chances = chances_of(csr_matrix(features), hidden, folds, 8)
    assert chances[word].mean() - chances[~word].mean() > 0.3  # 0.75 - 0.33 in truth


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


@pytest.fixture(params=["geometric"])
def blended(arms: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """An ensemble's file of two runs, and `blend.parquet` beside it, with its nested scores."""
    pair = open_runs([arms / "runs" / name for name in ("plain", "strong")])
    report = blend_runs(pair, method=request.param, scores=tmp_path / "blend.parquet")
    write_ensemble(tmp_path / "ensemble.yaml", report, pair.runs)
    return tmp_path / "ensemble.yaml"


def test_an_ensemble_is_scored_by_weights_of_other_folds_as_blend_scores_it(blended: Path, arms: Path) -> None:
    common = open_runs_and_ensembles([arms / "runs/other-seed", blended])
    assert [run.name for run in common.runs] == ["other-seed", str(blended)]
    nested = pl.DataFrame({"id": common.ids}).join(read_scores(blended.with_name("blend.parquet"), LMSYS), on="id")
    assert nested["id"].to_list() == common.ids
    np.testing.assert_allclose(common.runs[1].probabilities, class_matrix(nested, LMSYS), atol=1e-9)
    rows = open_runs([arms / "runs" / name for name in ("plain", "strong")])
    members = HeldOutRows(np.stack([run.probabilities for run in rows.runs]), rows.targets, rows.weights, LMSYS)
    of_all_rows = BLENDS["geometric"](members).of(members.members, LMSYS)  # what would flatter
    assert np.abs(common.runs[1].probabilities - of_all_rows).max() > 1e-4


def test_a_plan_is_scored_with_its_shares(arms: Path, tmp_path: Path) -> None:
    """One model for all rows and another for the most uncertain half: the other half keeps the first one's ranking."""
    file = tmp_path / "plan.yaml"
    entries = [
        f"{{bundle: {arms}/runs/plain/fold0/bundle}}",
        f"{{bundle: {arms}/runs/strong/fold0/bundle, share: 0.5}}",
    ]
    file.write_text(f"{HEADER}\nmembers: [{', '.join(entries)}]\n", encoding="utf-8")
    common = open_runs_and_ensembles([arms / "runs/plain", file])
    first, planned = (run.probabilities for run in common.runs)
    assert common.folds is not None
    for fold in (0, 1):
        # One temperature moves all rows of a fold; log odds of a row that has the first model alone keep their ratios.
        logs = [np.log(values[common.folds == fold]) for values in (first, planned)]
        ratios = (logs[1][:, 0] - logs[1][:, 2]) / (logs[0][:, 0] - logs[0][:, 2])
        same = np.isclose(ratios, np.median(ratios), rtol=1e-3)
        assert 0.4 <= same.mean() <= 0.6


def test_a_plan_that_is_calibrated_at_the_end_is_scored_by_fits_to_other_folds(arms: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(
        f"{HEADER}\nmembers: [{{bundle: {arms}/runs/plain/fold0/bundle}}]\ntie_bias: -0.3\n", encoding="utf-8"
    )
    common = open_runs_and_ensembles([arms / "runs/plain", file])
    first, planned = (run.probabilities for run in common.runs)
    rows = HeldOutRows(first[None], common.targets, common.weights, LMSYS)
    assert common.folds is not None
    nested = cross_fit(BLENDS["arithmetic, tied vector scaling"], rows, common.folds, lambda: None)
    np.testing.assert_allclose(planned, nested, atol=1e-9)
    assert np.abs(planned - cross_fit(BLENDS["arithmetic, tempered"], rows, common.folds, lambda: None)).max() > 1e-3


def test_a_calibrated_run_is_scored_as_evaluate_judges_it(arms: Path, tmp_path: Path) -> None:
    config = load_config(arms / "plain.yaml")
    judged = evaluate_run(config, None)
    (nested, *_) = judged.calibrations
    entries = ", ".join(f"{{bundle: {arms}/runs/plain/fold{fold}/bundle, temperature: 2.0}}" for fold in (0, 1))
    figures = f"{{method: {nested.fitted.method}, rows: {judged.rows}, raw: 1.0, nested: 1.0, flattering: 1.0}}"
    file = tmp_path / "calibrated.yaml"
    file.write_text(f"members: [{entries}]\nnested: {figures}\n", encoding="utf-8")
    common = open_runs_and_ensembles([file])
    found = log_loss(common.runs[0].probabilities, common.targets, common.weights)
    assert found == pytest.approx(nested.nested, abs=1e-9)
    assert abs(found - nested.raw) > 1e-5
    assert abs(found - nested.fitted.flattering) > 1e-5


def test_an_ensemble_of_unknown_origin_is_refused_and_other_commands_say_what_to_give(
    blended: Path, tmp_path: Path, cli: Cli
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("members: [{bundle: a}]\n", encoding="utf-8")
    code, text = cli("forecast-score", str(file), "--public-share", "0.3")
    assert code != 0
    assert "was not written by `pairclf blend` or `evaluate --calibrated`" in text
    later = blended.read_text(encoding="utf-8").replace("method: geometric", "method: by a later pairclf")
    file.write_text(later, encoding="utf-8")
    with pytest.raises(ConfigError, match="was not written by `pairclf blend`"):
        open_runs_and_ensembles([file])
    code, text = cli("blend", str(blended), "--figures-only")
    assert code != 0
    assert "give the runs that it averages" in text


@pytest.mark.parametrize("blended", ["uniform"], indirect=True)
def test_the_ledger_gets_the_intervals_and_counts_the_scores_in_them(blended: Path, arms: Path, cli: Cli) -> None:
    path, seals = blended.with_name("ledger.jsonl"), {}
    for name in ("plain", "strong", "renamed"):
        bundles = [arms / "runs" / name / f"fold{fold}/bundle" for fold in (0, 1)]
        seals[name] = [open_bundle(bundle, verified=True).manifest.seal for bundle in bundles]
    for number, (bundles, public) in enumerate(
        [(seals["plain"][:1], 0.95), (seals["plain"] + seals["strong"], 5.0), (seals["renamed"], 1.1)]
    ):
        record(path, ledger_row(number, bundles=bundles, public=public))
    code, text = cli("forecast-score", str(blended), str(arms / "runs/plain"), "--rows", "500", "--ledger", str(path))
    assert code == 0, text
    assert "has 2 submissions of these runs" in text
    assert "public part: 26% of the hidden rows, as in lmsys-chatbot-arena" in text
    run, blend, other = [entry.forecast for entry in rows(path)]
    assert run is not None
    assert blend is not None
    assert run != blend
    assert other is None
    assert run.public[0] < run.private[0] < run.private[1] < run.public[1]
    code, text = cli("ledger", "--ledger", str(path))
    assert code == 0
    assert "1 of 2 real scores lay in their 90% interval" in text


def test_a_run_without_a_score_in_any_draw_leaves_the_ledger_alone(
    arms: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few rows, no draw may have one of AUC."""
    run, path, unknown = str(arms / "runs/plain"), tmp_path / "ledger.jsonl", ScoreInterval(np.nan, np.nan, np.nan)
    seal = open_bundle(arms / "runs/plain/fold0/bundle", verified=True).manifest.seal
    forecast = forecast_scores(open_runs([arms / "runs/plain"]), public_share=0.5, hidden_rows=2)
    runs = [replace(forecast.runs[0], public=unknown)]
    monkeypatch.setattr(score_forecast, "forecast_scores", lambda *_, **__: replace(forecast, runs=runs))
    record(path, ledger_row(1, bundles=[seal]))
    before = path.read_bytes()
    code, text = cli("forecast-score", run, "--ledger", str(path))
    assert code == 0, text
    assert "has 0 submissions of these runs" in text
    assert path.read_bytes() == before


def test_a_ledger_that_can_not_be_meant_is_said_before_any_work(
    arms: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blended_runs, "open_runs_and_ensembles", None)
    (tmp_path / "scores.jsonl").write_text('{"a": 1}\n')
    for name, words in (("none/ledger.jsonl", "lists no submission"), ("scores.jsonl", "which no submission has")):
        code, text = cli("forecast-score", str(arms / "runs/plain"), "--ledger", str(tmp_path / name))
        assert code == 2
        assert words in text
    assert [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"]


def test_the_public_part_of_an_unknown_competition_must_be_given(common: CommonRows) -> None:
    other = common.config.model_copy(
        update={"package": common.config.package.model_copy(update={"competition": "x-y"})}
    )
    with pytest.raises(ConfigError, match=r"public part of task lmsys is not known.*\n?.*--public-share"):
        forecast_scores(replace(common, config=other))
