"""A blend is judged on folds that it was not fitted to, and its file predicts what was judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pairclf.data.scores import class_matrix, read_scores
from pairclf.errors import ConfigError, DataError
from pairclf.inference.ensemble import open_ensemble, read_ensemble
from pairclf.inference.predict import predict
from pairclf.runs.blend import BlendReport, blend_runs, judging_folds, write_ensemble
from pairclf.runs.held_out import CommonRows, ScoredRun, open_runs
from pairclf.scores.blend import Blend, HeldOutRows, arithmetic, blends_of
from pairclf.scores.figures import measure
from pairclf.scores.metrics import row_losses
from pairclf.scores.probabilities import Calibration, probabilities
from pairclf.task import LMSYS

TIED = "arithmetic, tied vector scaling"

Cli = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def common(arms: Path) -> CommonRows:
    return open_runs([arms / "runs" / name for name in ("plain", "strong")])


@pytest.fixture(scope="module")
def report(common: CommonRows) -> BlendReport:
    return blend_runs(common)


def part(common: CommonRows, rows: slice, members: list[np.ndarray] | None = None) -> CommonRows:
    """Some of the rows, or other scores of them."""
    runs = [
        replace(run, probabilities=run.probabilities[rows] if members is None else members[place])
        for place, run in enumerate(common.runs)
    ]
    return replace(
        common,
        ids=common.ids[rows],
        targets=common.targets[rows],
        weights=common.weights[rows],
        groups=common.groups[rows],
        folds=None if common.folds is None else common.folds[rows],
        hashes=common.hashes[rows],
        runs=runs,
    )


def test_each_figure_says_on_which_rows_it_was_fitted(common: CommonRows, report: BlendReport) -> None:
    assert list(report.judged) == list(blends_of(LMSYS))
    assert common.folds is not None
    rows = HeldOutRows(np.stack([run.probabilities for run in common.runs]), common.targets, common.weights, LMSYS)
    scores = np.empty_like(common.targets)
    for fold in (0, 1):
        held_out = common.folds == fold
        scores[held_out] = arithmetic(rows.only(~held_out)).of(rows.members[:, held_out], LMSYS)
    judged = report.judged["arithmetic"]
    assert judged.scores == pytest.approx(scores, abs=1e-4)  # weights below .01 are left out
    assert judged.nested == measure(judged.scores, common.targets, LMSYS, common.weights)
    assert judged.flattering == pytest.approx(rows.loss(arithmetic(rows).of(rows.members, LMSYS)), abs=1e-4)
    assert judged.optimism >= 0
    single = report.judged["best single"]
    gap = row_losses(judged.scores, common.targets) - row_losses(single.scores, common.targets)
    assert judged.against_single.value == pytest.approx(np.average(gap, weights=common.weights))
    assert report.chosen == min(report.judged, key=lambda name: report.judged[name].nested["log_loss"])


def test_a_blend_is_compared_with_the_best_run_and_not_with_a_choice_fold_by_fold(common: CommonRows) -> None:
    """Each run knows the rows of one fold: chosen on the other fold, it is wrong on both, and worse than each run."""
    assert common.folds is not None
    sure = np.where(common.targets == 1, 0.8, 0.1)
    members = [np.where((common.folds == fold)[:, None], sure, 1 / 3) for fold in (0, 1)]
    report = blend_runs(part(common, slice(None), members))
    single = report.judged["best single"]
    losses = [measure(member, common.targets, LMSYS, common.weights)["log_loss"] for member in members]
    assert single.nested["log_loss"] == pytest.approx(min(losses))
    assert single.optimism == single.against_single.value == 0
    for judged in report.judged.values():
        assert judged.against_single.value == pytest.approx(judged.nested["log_loss"] - min(losses))


@pytest.mark.parametrize("method", ["uniform", "geometric", TIED])
def test_the_file_predicts_what_was_judged(arms: Path, common: CommonRows, method: str) -> None:
    report = blend_runs(common, method=method)
    out = arms / f"{method}.yaml"
    try:
        write_ensemble(out, report, common.runs)
        ensemble, nested = open_ensemble([out], None, []), read_ensemble([out]).nested
    finally:
        out.unlink()
    judged = report.judged[method]
    assert nested is not None
    assert nested.nested == pytest.approx(judged.nested["log_loss"], abs=1e-6)
    assert nested.flattering == pytest.approx(judged.flattering, abs=1e-6)
    assert nested.gain == pytest.approx(-judged.against_single.value, abs=2e-6)
    assert (nested.low, nested.high) == (-judged.against_single.high, -judged.against_single.low)
    runs = {run.name: run for run in common.runs}
    of_bundles = [runs[member.bundle.folder.parent.parent.name].probabilities for member in ensemble.members]
    blend = report.judged[method].blend
    expected = blend.of(np.stack([run.probabilities for run in common.runs]), LMSYS)
    assert len(of_bundles) == 2 * np.count_nonzero(blend.weights)
    assert ensemble.blend(of_bundles) == pytest.approx(expected, abs=1e-9)
    assert (ensemble.mean, ensemble.calibration) == (blend.mean, blend.calibration)
    assert (ensemble.calibration.tie_bias != 0) == (method == TIED)


def test_predict_calibrates_the_blend_of_its_members(
    arms: Path, common: CommonRows, tmp_path: Path, quick_workers: None
) -> None:
    """The file's prediction is the blend of the runs' own predictions, each the mean of its two folds."""
    fitted, test = blend_runs(common, method=TIED), arms / "test.csv"
    blend = Blend(np.array([0.6, 0.4]), Calibration(0.9, 0.5, -0.3))
    judged = {**fitted.judged, TIED: replace(fitted.judged[TIED], blend=blend)}
    report = replace(fitted, judged=judged, ordered=[(0, 0.1), (1, 0.01)])
    write_ensemble(tmp_path / "ensemble.yaml", report, common.runs)

    def predicted(name: str, bundles: list[Path]) -> np.ndarray:
        predict(bundles, test, tmp_path / f"{name}.csv", scores=tmp_path / f"{name}.parquet", resume=False)
        return class_matrix(read_scores(tmp_path / f"{name}.parquet", LMSYS).sort("id"), LMSYS)

    members = np.stack([predicted(run.name, list(run.bundles)) for run in common.runs])
    found = predicted("ensemble", [tmp_path / "ensemble.yaml"])
    np.testing.assert_allclose(found, blend.of(members, LMSYS), atol=1e-9)
    assert np.abs(found - replace(blend, calibration=Calibration()).of(members, LMSYS)).max() > 1e-3


@pytest.mark.parametrize("bias", [0.0, 1.5], ids=["calibrated members", "ties are overrated"])
def test_more_than_a_temperature_is_written_only_if_it_is_really_better(
    common: CommonRows, tmp_path: Path, bias: float
) -> None:
    logits = np.random.default_rng(0).normal(size=(2, *common.targets.shape)) + common.targets
    logits[..., 2] += bias
    report = blend_runs(part(common, slice(None), list(probabilities(logits, LMSYS))))
    assert (report.chosen == TIED) == (bias > 0)
    (note,) = (note for note in report.notes if note.startswith(TIED))
    assert ("no better than" in note) == (bias == 0)
    file = write_ensemble(tmp_path / "ensemble.yaml", report, common.runs)
    assert (file.tie_bias < -0.5) == (bias > 0)


def test_the_first_bundle_of_each_run_comes_first_with_the_gain(
    common: CommonRows, report: BlendReport, tmp_path: Path
) -> None:
    uniform = blend_runs(common, method="uniform")
    file = write_ensemble(tmp_path / "e.yaml", uniform, common.runs)
    assert file == read_ensemble([tmp_path / "e.yaml"]).model_copy(update={"members": file.members})
    gains = [entry.gain for entry in file.members]
    assert gains == [round(max(gain, 0), 6) for _, gain in uniform.ordered] + [None, None]
    assert [entry.weight for entry in file.members] == [0.25] * 4
    assert [entry.bundle.parts[-2] for entry in file.members] == ["fold0", "fold0", "fold1", "fold1"]
    assert file.out_of_fold["log_loss"] == pytest.approx(uniform.judged["uniform"].nested["log_loss"], abs=1e-6)


def test_rows_of_one_fold_are_judged_on_folds_of_prompts(common: CommonRows) -> None:
    rows = replace(common, folds=np.zeros(len(common.ids), dtype=np.int64))
    folds = judging_folds(rows)
    assert {*folds} == set(range(5))
    assert all(len({*folds[common.groups == group]}) == 1 for group in np.unique(common.groups))
    assert (judging_folds(replace(common, folds=None)) == folds).all()


def test_ten_rows_and_one_prompt(common: CommonRows) -> None:
    ten = part(common, slice(10))
    report = blend_runs(replace(ten, folds=None))
    assert np.isfinite([judged.nested["log_loss"] for judged in report.judged.values()]).all()
    with pytest.raises(DataError, match="10 rows of one prompt can't be judged"):
        blend_runs(replace(ten, folds=None, groups=np.full(10, "x")))


def test_twenty_runs_of_which_two_are_the_same(common: CommonRows) -> None:
    generator = np.random.default_rng(0)
    scores = [generator.dirichlet([2, 2, 2], size=len(common.ids)) for _ in range(19)]
    runs = [
        ScoredRun(str(place), Path(str(place)), one, None, None, {}) for place, one in enumerate([*scores, scores[3]])
    ]
    report = blend_runs(replace(common, runs=runs))
    assert any(note.startswith("equal scores: 19 and 3;") for note in report.notes)
    assert sum(report.judged[report.chosen].blend.weights) == pytest.approx(1)


def test_all_equal_predictions_are_not_distinguishable(common: CommonRows) -> None:
    same = np.full_like(common.targets, 1 / 3)
    report = blend_runs(part(common, slice(None), [same, same]))
    assert not report.decision.is_real
    assert report.judged["arithmetic"].nested["log_loss"] == pytest.approx(np.log(3))


def test_the_command_writes_the_file_and_says_what_it_is_worth(arms: Path, tmp_path: Path, cli: Cli) -> None:
    out, scores = tmp_path / "ensemble.yaml", tmp_path / "blend.parquet"
    runs = [arms / "runs" / name for name in ("plain", "strong")]
    code, text = cli("blend", *runs, "--out", out, "--scores", scores, "--method", "greedy")
    assert code == 0, text
    assert "each row by weights fitted to the other of 2 folds" in text
    assert f"wrote {out} with" in text
    assert f"pairclf predict {out} --data FILE" in text
    assert "single run" in text
    judged = read_scores(scores, LMSYS)
    assert judged["models"].to_list()[0] == ["plain", "strong"]
    assert class_matrix(judged, LMSYS).sum(axis=1) == pytest.approx(1)
    code, text = cli("blend", *runs, "--out", out, "--json")  # an own file is replaced
    assert code == 0
    figures = json.loads(text[: text.rindex("}") + 1])
    assert figures["rows"] == 148
    assert {*figures["blends"]} == {*blends_of(LMSYS)}
    code, text = cli("evaluate", arms / "plain.yaml", "--scores", scores)
    assert code == 0, text


def test_what_the_command_refuses(arms: Path, tmp_path: Path, cli: Cli) -> None:
    plain, out = arms / "runs" / "plain", tmp_path / "ensemble.yaml"
    copy = tmp_path / "scores.csv"
    read_scores(arms / "runs" / "strong" / "oof.parquet", LMSYS).select("id", *LMSYS.classes).write_csv(copy)
    code, text = cli("blend", plain, copy, "--out", out, "--method", "uniform")
    assert code == 2
    assert "scores has no bundle" in text
    assert "--figures-only" in text
    assert not out.exists()
    assert cli("blend", plain, copy, "--figures-only")[0] == 0
    code, text = cli("blend", plain, copy, "--method", "voting")
    assert code == 2
    assert "one of best single; uniform; greedy" in text
    out.write_text("members: []")
    code, text = cli("blend", plain, arms / "runs" / "strong", "--out", out)
    assert code == 2
    assert "`pairclf blend` did not write it" in text
    assert out.read_text() == "members: []"


def test_bundles_that_do_not_go_together_are_refused(arms: Path, tmp_path: Path) -> None:
    """The same run twice under two names counts its bundles twice."""
    common = open_runs([arms / "runs" / "plain"])
    doubled = replace(common, runs=[*common.runs, replace(common.runs[0], name="again")])
    with pytest.raises(ConfigError, match="a bundle is given twice"):
        write_ensemble(tmp_path / "e.yaml", blend_runs(doubled, method="uniform"), doubled.runs)
    assert not (tmp_path / "e.yaml").exists()
