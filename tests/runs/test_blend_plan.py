"""A plan under a deadline is the best one in time, and its file predicts what was judged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pairclf.config import resolve
from pairclf.data.scores import class_matrix, read_scores
from pairclf.errors import ConfigError
from pairclf.inference.ensemble import open_ensemble
from pairclf.inference.predict import predict
from pairclf.run import FOLDS
from pairclf.runs.cv import cross_validate
from pairclf.runs.held_out import open_runs
from pairclf.runs.plan import hours_of, plan_blend, plannable, write_planned
from pairclf.scores import plans
from pairclf.scores.blend import Blend, HeldOutRows, arithmetic
from pairclf.scores.calibration import Method
from pairclf.scores.plans import (
    LEAST_GAIN,
    PlannableRows,
    Seconds,
    Use,
    best_within,
    expected_loss,
    fit_plan,
    probabilities_of,
    scored,
    search,
)
from pairclf.scores.probabilities import Calibration, probabilities
from pairclf.task import LMSYS

Cli = Callable[..., tuple[int, str]]


def planned_rows(models: int, rows: int = 240, *, two_orders: bool = True) -> PlannableRows:
    """Models whose logits err around a truth; both orders err less than one; better ones take longer."""
    random = np.random.default_rng(models)
    truth = random.normal(size=(rows, 3))
    targets = np.eye(3)[[random.choice(3, p=one) for one in probabilities(truth, LMSYS)]]
    first = [truth + random.normal(0, max(0.4, 1.2 - 0.2 * place), (rows, 3)) for place in range(models)]
    both = [(one + truth + random.normal(0, 1.0, (rows, 3))) / 2 for one in first] if two_orders else first
    return PlannableRows(
        HeldOutRows(np.stack([probabilities(one, LMSYS) for one in both]), targets, np.ones(rows), LMSYS),
        np.stack([probabilities(one, LMSYS) for one in first]),
        [two_orders] * models,
        [Seconds(60, 1000.0 * (1 + place), 900.0 * (1 + place)) for place in range(models)],
    )


@pytest.mark.parametrize(("exact", "models"), [(True, 2), (False, 2), (True, 3), (False, 3)])
def test_the_search_agrees_with_all_plans(exact: bool, models: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "SHARES", (1.0, 0.3))
    monkeypatch.setattr(plans, "SWAP_SHARES", plans.SWAP_SHARES if models == 2 else (1.0, 0.0))
    data = planned_rows(models)
    losses = [data.rows.loss(member) for member in data.rows.members]
    every = []
    for choice in product(*([None, *product((1.0, 0.3), plans.SWAP_SHARES)] for _ in losses)):
        uses = [Use(member, *way) for member, way in enumerate(choice) if way is not None]
        plan = tuple(sorted(uses, key=lambda use: (use.share < 1, losses[use.member])))
        if plan and plan[0].share == 1:
            every.append((data.seconds_of(plan), expected_loss(plan, data)))
    monkeypatch.setattr(plans, "EXACT", plans.EXACT if exact else 1)
    front = search(data)
    for limit in (1100, 2000, 2500, 3300, 4000, 6000):
        best = min(loss for seconds, loss in every if seconds <= limit)
        found = best_within(front, limit)
        assert found is not None
        assert found.seconds <= limit
        assert best - 1e-12 <= found.loss <= best + LEAST_GAIN
    assert best_within(front, 1000) is None
    assert any(found.loss > best + LEAST_GAIN for found in front), "a plan that is not the best would be seen"


def test_a_plan_scores_the_most_uncertain_rows_in_its_shares() -> None:
    data = planned_rows(2, rows=100)
    blend = Blend(np.array([0.7, 0.3]))
    values = scored((Use(0, 1.0, 0.3), Use(1, 0.2, 0.0)), data, blend)
    both = (values[0] == data.rows.members[0]).all(axis=1)
    assert both.sum() == 30
    np.testing.assert_array_equal(values[0][~both], data.first[0][~both])
    entropy = -(data.first[0] * np.log(data.first[0])).sum(axis=1)
    assert entropy[both].min() >= entropy[~both].max()
    known = np.isfinite(values[1]).all(axis=1)
    entropy = -(values[0] * np.log(values[0])).sum(axis=1)
    assert known.sum() == 20
    assert entropy[known].min() >= entropy[~known].max()


def test_a_mean_that_only_softens_sure_models_is_no_reason_to_wait() -> None:
    """The noisier model brings nothing that a temperature does not, although the untempered mean is better."""
    data = planned_rows(1, rows=3000, two_orders=False)
    random = np.random.default_rng(5)
    logits = 3 * np.log(data.first[0])
    noisier = logits + random.normal(0, 4, logits.shape)
    both = np.stack([probabilities(one, LMSYS) for one in (logits, noisier)])
    data = PlannableRows(replace(data.rows, members=both), both, [False, False], [Seconds(0, 10, 10)] * 2)
    pair = (Use(0), Use(1))
    assert data.rows.loss(arithmetic(data.rows).of(both, LMSYS)) < data.rows.loss(both[0]) - 0.05
    assert expected_loss(pair, data) > expected_loss(pair[:1], data)
    assert [entry.plan for entry in search(data)] == [pair[:1]]


def test_twin_models_and_ten_rows_and_equal_predictions_give_a_plan() -> None:
    for data in (planned_rows(2, rows=10), planned_rows(2)):
        same = replace(data, rows=replace(data.rows, members=data.rows.members[[0, 0]]), first=data.first[[0, 0]])
        flat = np.full_like(data.first, 1 / 3)
        for rows in (data, same, replace(data, rows=replace(data.rows, members=flat), first=flat)):
            assert all(np.isfinite(entry.loss) for entry in search(rows))
    assert len(search(replace(data, rows=replace(data.rows, members=flat), first=flat))) == 1


def test_the_file_has_the_plan_and_predict_reads_it(arms: Path, tmp_path: Path, cli: Cli) -> None:
    common = open_runs([arms / "runs" / name for name in ("plain", "strong")])
    hours = ["plain=1,1", "strong=3,2.5"]
    report = plan_blend(common, deadline=3600 * 8.5, device="t4x2", hours=hours)
    assert [judged.found.seconds for judged in report.curve] == sorted(judged.found.seconds for judged in report.curve)
    assert report.plan.found.seconds * 1.35 <= 3600 * 8.5
    file = write_planned(tmp_path / "ensemble.yaml", report, common.runs)
    ensemble = open_ensemble([tmp_path / "ensemble.yaml"], None, [])
    assert [(member.share, member.swap_share) for member in ensemble.members] == [
        (use.share, use.swap_share) for use in report.plan.found.plan
    ]
    assert file.out_of_fold["log_loss"] == pytest.approx(report.plan.nested["log_loss"], abs=1e-6)
    runs = [str(arms / "runs" / name) for name in ("plain", "strong")]
    page = tmp_path / "curve.html"
    options = ["--deadline", "8h30m", "--hours", hours[0], "--hours", hours[1], "--figures-only", "--json"]
    options += ["--plot", page]
    code, said = cli("blend", *runs, *options)
    assert code == 0, said
    assert json.loads(said[said.index("{") : said.rindex("}") + 1])["chosen"] == report.chosen
    shown = page.read_text(encoding="utf-8")
    for text in ("deadline, with time to spare", "hours on t4x2", f"{report.plan.flattering:.4f}", "own rows"):
        assert text in shown
    assert shown.count("<circle") == 2 * len(report.curve)
    code, said = cli("blend", *runs, "--hours", hours[0])
    assert (code, "--hours changes nothing without --deadline" in said) == (2, True)
    with pytest.raises(ConfigError, match="the quickest run takes 1 h 01 min"):
        plan_blend(common, deadline=3600, device="t4x2", hours=hours)
    with pytest.raises(ConfigError, match="--hours other=1 names no run"):
        hours_of(["other=1"], common.runs)
    with pytest.raises(ConfigError, match="must be one or two numbers above 0"):
        hours_of(["plain=soon"], common.runs)
    with pytest.raises(ConfigError, match="--hours names plain twice"):
        hours_of(["plain=1", "plain=2"], common.runs)


@pytest.mark.parametrize("bias", [0.0, 1.5], ids=["calibrated model", "ties are overrated"])
def test_a_plan_is_calibrated_at_the_end_if_that_is_really_better(arms: Path, tmp_path: Path, bias: float) -> None:
    """By a fit to the other folds; one to all rows, which the deliberately wrong judge takes, flatters."""
    common = open_runs([arms / "runs" / "plain"])
    logits = np.random.default_rng(0).normal(size=common.targets.shape) + common.targets + [0, 0, bias]
    values = probabilities(logits, LMSYS)
    common = replace(common, runs=[replace(common.runs[0], probabilities=values, first_order=values)])
    report = plan_blend(common, deadline=36_000, device="t4x2", hours=["plain=1,1"])
    file = write_planned(tmp_path / "ensemble.yaml", report, common.runs)
    assert (file.tie_bias < -0.5) == (bias > 0)
    assert any(f"{'better' if bias else 'no better'} than a temperature" in note for note in report.notes)
    method: Method = "tied vector scaling" if bias else "temperature"
    data, folds = plannable(common, report.seconds), common.folds
    assert folds is not None
    plan, nested, wrong = report.plan.found.plan, np.empty_like(values), np.empty_like(values)
    for fold in np.unique(folds):
        held_out = data.only(folds == fold)
        nested[folds == fold] = probabilities_of(plan, held_out, fit_plan(plan, data.only(folds != fold), method))
        wrong[folds == fold] = probabilities_of(plan, held_out, fit_plan(plan, data, method))
    assert report.plan.nested["log_loss"] == pytest.approx(data.rows.loss(nested), abs=1e-9)
    assert report.plan.flattering == pytest.approx(data.rows.loss(wrong), abs=1e-9)
    assert report.plan.optimism > 1e-4


def test_hours_are_forecast_from_bundles(arms: Path) -> None:
    common = open_runs([arms / "runs" / name for name in ("plain", "strong")])
    small, large = (
        plan_blend(common, deadline=36_000, device="t4x2", hidden_rows=rows).seconds[0] for rows in (1_000, 10_000)
    )
    assert small.load == large.load > 0
    assert large.first == pytest.approx(10 * small.first, rel=0.2)
    assert large.second == pytest.approx(large.first, rel=0.2)
    with pytest.raises(ConfigError, match="--device t5 is unknown"):
        plan_blend(common, deadline=36_000, device="t5")


def test_twenty_models_of_which_two_are_the_same_take_a_bounded_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far fewer plans than the 3 ** 20 that there are; a twin that takes longer is in no plan."""
    monkeypatch.setattr(plans, "SHARES", (1.0, 0.3))
    monkeypatch.setattr(plans, "SWAP_SHARES", (1.0,))
    data = planned_rows(20, rows=40, two_orders=False)
    twin = [*range(19), 3]
    data = replace(data, rows=replace(data.rows, members=data.rows.members[twin]), first=data.first[twin])
    fitted: list[int] = []
    front = search(data, 60_000.0, lambda: fitted.append(1))
    assert front
    assert all(use.member != 19 for entry in front for use in entry.plan)
    assert len(fitted) <= 1000


def test_the_second_order_of_a_model_that_scores_both_alike_is_in_no_plan() -> None:
    data = planned_rows(2)
    alike = replace(data, rows=replace(data.rows, members=data.first))
    assert {use.swap_share for entry in search(alike) for use in entry.plan} == {0.0}
    assert {use.swap_share for entry in search(data) for use in entry.plan} > {0.0}


def test_a_local_search_judges_its_best_plans_on_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "EXACT", 1)
    monkeypatch.setattr(plans, "LOCAL_ROWS", 60)
    data = planned_rows(2, rows=200)
    for entry in search(data):
        assert entry.loss == pytest.approx(expected_loss(entry.plan, data))


def test_a_class_without_a_row_gives_a_plan(arms: Path) -> None:
    common = open_runs([arms / "runs" / name for name in ("plain", "strong")])
    decided = common.targets[:, 2] == 0
    assert 0 < decided.sum() < len(decided)
    targets = np.where(decided[:, None], common.targets, [1.0, 0.0, 0.0])
    report = plan_blend(
        replace(common, targets=targets), deadline=36_000, device="t4x2", hours=["plain=1,1", "strong=3,2.5"]
    )
    assert np.isfinite([report.plan.nested["log_loss"], *report.gains]).all()


def test_predict_has_the_scores_that_the_plan_foretold(
    trained_run: Callable[[str], Path], tmp_path: Path, quick_workers: None
) -> None:
    """Two classical models and a language model; each row's scores are those that its fold's models had held out."""
    run = trained_run("llama")
    folders = [run / "run"]
    for name, c in (("weak", 0.01), ("strong", 1.0)):
        tree = {
            "approach": "classical",
            "output_dir": str(tmp_path / name),
            "data": {"folder": str(run), "train": ["train.csv"]},
            "folds": {"n_splits": 2},
            "classical": {"n_features": 256, "dense": False, "C": c},
        }
        (tmp_path / name).mkdir()
        shutil.copyfile(run / "run" / FOLDS, tmp_path / name / FOLDS)
        cross_validate(resolve(tree))
        folders.append(tmp_path / name)
    common = open_runs(folders)
    hours = [f"{one.name}=1,1" for one in common.runs]
    report = plan_blend(common, deadline=36_000, device="t4x2", hours=hours)
    plan = (Use(1, 1.0, 1.0), Use(2, 0.5, 0.0), Use(0, 0.8, 0.4))
    blend = Blend(np.array([0.3, 0.3, 0.4]), Calibration(1.1, 0.8, -0.2))
    judged = replace(report.plan, found=replace(report.plan.found, plan=plan), blend=blend)
    planned = replace(report, curve=[judged], chosen=0, gains=[0.1, 0.01, 0.01])
    write_planned(tmp_path / "ensemble.yaml", planned, common.runs)
    assert common.folds is not None
    held_out = common.folds == 0
    rows = pl.read_csv(run / "train.csv", schema_overrides={"id": pl.String})
    test, ids = tmp_path / "test.csv", [one for one, chosen in zip(common.ids, held_out, strict=True) if chosen]
    by_id = pl.DataFrame({"id": ids}).join(rows, on="id", how="left", maintain_order="left")
    by_id.select("id", "prompt", "response_a", "response_b").write_csv(test)
    predict([tmp_path / "ensemble.yaml"], test, tmp_path / "out.csv", scores=tmp_path / "scores.parquet", resume=False)
    scores = read_scores(tmp_path / "scores.parquet", LMSYS)
    found = class_matrix(pl.DataFrame({"id": ids}).join(scores, on="id", how="left", maintain_order="left"), LMSYS)
    data = plannable(common, report.seconds).only(held_out)
    differ = (by_id["response_a"] != by_id["response_b"]).to_numpy()  # equal sides: one order is the other one, too
    assert differ.sum() >= 16
    np.testing.assert_allclose(found[differ], probabilities_of(plan, data, blend)[differ], atol=2e-4)
    untied = probabilities_of(plan, data, replace(blend, calibration=Calibration(1.1)))
    assert np.abs(found - untied)[differ].max() > 2e-3
    other = (Use(1, 1.0, 1.0), Use(2, 0.5, 0.0), Use(0, 0.8, 1.0))
    assert np.abs(found - probabilities_of(other, data, blend)).max() > 2e-3
