"""An ensemble's file is read whole, or refused with all that is wrong; a blend is probabilities, whatever is known."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tests_support import hollow_bundle

from pairclf.bundles import bundle as bundles
from pairclf.config import Config, resolve
from pairclf.config.load import override
from pairclf.config.predict import Predict
from pairclf.errors import BundleError, ConfigError
from pairclf.inference.ensemble import DEFAULT_MEMBER_GAINS, DEFAULT_SWAP_GAIN, Ensemble, EnsembleMember, open_ensemble
from pairclf.scores.probabilities import Calibration, apply_temperature
from pairclf.task import LMSYS, Task

SEVERAL = {"name": "tags", "fields": ["text"], "classes": ["x", "y", "z"], "multi_label": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Bundles `a` and `b` of one task, `other` of another, `tags` of one with several labels a row."""
    measured = {"log_loss": 0.95, "log_loss_one_order": 0.962}
    hollow_bundle(tmp_path / "a", Config(), "a", metrics=measured, prior=[0.5, 0.3, 0.2])
    hollow_bundle(tmp_path / "b", Config(), "b", metrics={}, prior=[0.1, 0.3, 0.6])
    hollow_bundle(tmp_path / "other", resolve({"task": "wsdm"}), "other")
    hollow_bundle(tmp_path / "tags", resolve({"task": SEVERAL}), "tags")
    return tmp_path


def written(folder: Path, text: str) -> list[Path]:
    (folder / "ensemble.yaml").write_text(text)
    return [folder / "ensemble.yaml"]


def test_folders_alone_count_alike(folder: Path) -> None:
    ensemble = open_ensemble([folder / "a", folder / "b"], folder / "base", ["predict.temperature=1.5"])
    assert [one.bundle.manifest.name for one in ensemble.members] == ["a", "b"]
    assert [(one.weight, one.calibration.temperature, one.share) for one in ensemble.members] == [(1.0, 1.5, 1.0)] * 2
    assert [one.base for one in ensemble.members] == [folder / "base"] * 2
    assert (ensemble.calibration, ensemble.task) == (Calibration(), LMSYS)
    assert ensemble.prior == pytest.approx([0.3, 0.3, 0.4])


def test_the_folder_of_a_run_stands_for_its_bundles(folder: Path) -> None:
    for name in ("fold10", "fold2", "all"):
        hollow_bundle(folder / "run" / name / "bundle", Config(), name, prior=[0.2, 0.2, 0.6])
    members = open_ensemble([folder / "run", folder / "a"], None, []).members
    assert [member.bundle.manifest.name for member in members] == ["fold2", "fold10", "a"]
    shutil.rmtree(folder / "run/fold2")
    shutil.rmtree(folder / "run/fold10")
    assert [member.name for member in open_ensemble([folder / "run"], None, []).members] == ["all"]


def test_bundles_of_one_name_are_told_apart(folder: Path) -> None:
    hollow_bundle(folder / "other-run", Config(), "a", prior=[0.2, 0.2, 0.6])
    ensemble = open_ensemble([folder / name for name in ("a", "b", "other-run")], None, [])
    assert [member.name for member in ensemble.members] == ["a (member 1)", "b", "a (member 3)"]


def test_a_file_says_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
        members:
          - {bundle: a, weight: 0.75, temperature: 1.03, base: bases/gemma}
          - {bundle: b, weight: 0.25, share: 0.3, gain: 0.004}
        temperature: 1.02
    """
    monkeypatch.chdir("/")  # paths are relative to the file
    ensemble = open_ensemble(written(folder, text), Path("given"), ["model.dtype=float32"])
    a, b = ensemble.members
    assert (a.bundle.folder, a.base, b.base) == (folder / "a", folder / "bases/gemma", Path("given"))
    assert (a.weight, a.calibration, a.share) == (0.75, Calibration(1.03), 1)
    assert (b.weight, b.calibration, b.share) == (0.25, Calibration(), 0.3)
    assert (a.gain_member, b.gain_member) == (DEFAULT_MEMBER_GAINS[0], 0.004)
    assert (a.gain_swap, b.gain_swap) == (pytest.approx(0.012), pytest.approx(0.3 * DEFAULT_SWAP_GAIN / 2))
    assert ensemble.calibration == Calibration(1.02)
    assert ensemble.prior == pytest.approx([0.4, 0.3, 0.3])
    assert {one.bundle.config.model.dtype for one in ensemble.members} == {"float32"}


def test_gains_of_all_rows_count_in_part_and_a_measured_one_as_it_is(folder: Path) -> None:
    text = "members: [{bundle: b, swap_share: 0.5}, {bundle: a, share: 0.2, swap_share: 0.5%s}]"
    for gain, expected in ("", 0.2 * DEFAULT_MEMBER_GAINS[1]), (", gain: 0.003", 0.003):
        b, a = open_ensemble(written(folder, text % gain), None, []).members
        assert (b.gain_member, b.gain_swap) == (DEFAULT_MEMBER_GAINS[0], DEFAULT_SWAP_GAIN / 2)
        assert (a.gain_member, a.gain_swap) == (pytest.approx(expected), pytest.approx(0.012 / 2 * 0.2 * 0.5))


def test_a_member_may_scale_its_tie_or_each_label(folder: Path) -> None:
    """Where the task has a tie, or several labels; elsewhere the setting would change nothing."""
    entries = "[{bundle: a, temperature: 1.2, tie_scale: 0.8, tie_bias: 0.1}, {bundle: b, tie_bias: -0.3}]"
    ensemble = open_ensemble(written(folder, f"members: {entries}"), None, ["model.dtype=float32"])
    assert ensemble.calibrations == [Calibration(1.2, 0.8, 0.1), Calibration(1.0, 1.0, -0.3)]
    text = "members: [{bundle: tags, temperature: [1.5, 0.7, 1]}]"
    (member,) = open_ensemble(written(folder, text), None, []).members
    assert member.calibration == Calibration((1.5, 0.7, 1.0))
    text = "members: [{bundle: tags}]\ntemperature: [1.5, 0.7, 1]"
    assert open_ensemble(written(folder, text), None, []).calibration == Calibration((1.5, 0.7, 1.0))
    text = "members: [{bundle: a}]\ntie_bias: -0.3"
    assert open_ensemble(written(folder, text), None, []).calibration == Calibration(1.0, 1.0, -0.3)
    with pytest.raises(ConfigError, match="tie_scale or tie_bias of the blend changes nothing"):
        open_ensemble(written(folder, "members: [{bundle: tags}]\ntie_bias: -0.3"), None, [])
    for entry, words in (
        ("temperature: [1.5]", "or one for each of the 3 labels"),
        ("tie_bias: 0.1", "tie_scale or tie_bias of .*tags changes nothing: task 'tags' has no tie"),
    ):
        with pytest.raises(ConfigError, match=words):
            open_ensemble(written(folder, f"members: [{{bundle: tags, {entry}}}]"), None, [])


def test_a_folder_outside_of_the_files_own_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stranger's file may lead to models of yours: it is followed, and never in silence."""
    below = folder / "below"
    below.mkdir()
    (below / "link").symlink_to(folder / "a")
    named = {f"{folder}/a": True, "../a": True, "link": True, "~nobody-of-that-name/a": False}
    for bundle, outside in named.items():
        file = written(below, f"members: [{{bundle: {bundle}, base: bases/x}}]")
        if bundle.startswith("~"):
            with pytest.raises(BundleError, match="is no bundle"):
                open_ensemble(file, None, [])
        else:
            open_ensemble(file, None, [])
        said = " ".join(capsys.readouterr().err.split())
        assert ("names a folder outside of its own" in said) == outside


def test_what_an_order_brings(folder: Path) -> None:
    worse = {"log_loss": 0.97, "log_loss_one_order": 0.962}
    hollow_bundle(folder / "worse", Config(), "worse", metrics=worse)
    ensemble = open_ensemble([folder / name for name in ("b", "a", "worse")], None, [])
    assert [one.gain_member for one in ensemble.members] == list(DEFAULT_MEMBER_GAINS)
    assert ensemble.members[2].gain_swap == 0
    assert open_ensemble([folder / "tags"], None, []).members[0].gain_swap == 0


def test_all_errors_of_a_file_at_once(folder: Path) -> None:
    text = """
        members:
          - {bundle: a, wieght: 2, share: 1.5}
          - {weight: -1}
        temprature: 2
    """
    with pytest.raises(ConfigError) as refused:
        open_ensemble(written(folder, text), None, [])
    for words in (
        "5 settings",
        "members.0.wieght: no such setting; the nearest is members.weight",
        "members.0.share: Input should be less than or equal to 1 (given: 1.5)",
        "members.1.bundle is missing: add `bundle` below `members.1`",
        "members.1.weight: Input should be greater than or equal to 0.000000001",
        "temprature: no such setting; the nearest is temperature",
        "ensemble.yaml",
    ):
        assert words in str(refused.value)


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("members: []", [], "at least 1 item"),
        ("", [], "valid dictionary"),
        ("members: [", [], "not valid YAML"),
        ("members: [{bundle: a, share: 0.5}, {bundle: b}]", [], r"members\.0\.share=0\.5: the first member"),
        ("members: [{bundle: a}, {bundle: a}]", [], "given twice"),
        ("members: [{bundle: a, temperature: 2}]", ["predict.temperature=3"], "is set, and the ensemble's file gives"),
        ("members: [{bundle: a, temperature: [1.1, 1, 2]}]", [], r"1.0, 2.0\] of .*a must be one number\n"),
        ("members: [{bundle: a, tie_scale: 0}]", [], "greater than or equal to 0.001"),
        ("members: [{bundle: a, tie_bias: 1.0e+308}]", [], "less than or equal to 1000"),
        ("members: [{bundle: a, temperature: 1.0e-320}]", [], "greater than or equal to 0.001"),
        ("members: [{bundle: a}]\ntemperature: 1.0e+300", [], "less than or equal to 1000"),
        (
            "members: [{bundle: a, weight: 1.0e+308}, {bundle: b, weight: 1.0e+308}]",
            [],
            "less than or equal to 1000000000",
        ),
        (
            "members: [{bundle: a, swap_share: 0.5}]",
            ["predict.swap=off"],
            "swap_share=0.5 changes nothing: predict.swap=off",
        ),
        (
            "members: [{bundle: a, swap_share: 0}]",
            ["predict.swap=budget"],
            "swap_share=0 changes nothing: predict.swap",
        ),
        ("members: [{bundle: tags, swap_share: 0.5}]", [], "swap_share=0.5 changes nothing: its rows have one order"),
        ("members: [{bundle: a, swap_share: 1.5}]", [], "less than or equal to 1"),
        ("members: [{bundle: a}]", ["inputs.max_length=9"], "can't be set for a trained bundle"),
        ("members: [{bundle: a}]", ["predict.swop=full"], r"nearest is predict\.swap"),
    ],
)
def test_a_file_that_can_not_be_used(folder: Path, text: str, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_ensemble(written(folder, text), None, overrides)


def test_what_is_no_ensemble(folder: Path) -> None:
    file = written(folder, "members: [{bundle: a}]")
    for paths, words in (
        ([], "no bundle is given"),
        ([folder / "a", *file], "must be given alone"),
        ([folder / "none.yaml"], "can't be read"),
        ([folder / "a" / "config.yaml"], "is the config of a run, and not an ensemble's file"),
        ([folder / "a", folder / "a"], "given twice"),
    ):
        with pytest.raises(ConfigError, match=words):
            open_ensemble(paths, None, [])
    with pytest.raises(BundleError, match="different tasks"):
        open_ensemble([folder / "a", folder / "other"], None, [])
    with pytest.raises(BundleError, match="is no bundle"):
        open_ensemble([folder], None, [])


@pytest.mark.parametrize("setting", ["swap=off", "layout=padded", "devices=[cpu]", "tokens_per_batch=64"])
def test_ensemble_refuses_members_that_differ_in_a_setting_of_the_run(tmp_path: Path, setting: str) -> None:
    for name, overrides in (("a", []), ("b", [f"predict.{setting}"])):
        hollow_bundle(tmp_path / name, override(Config(), overrides), name)
    folders = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(ConfigError, match=rf"predict\.{setting.partition('=')[0]} is .* in bundle a and .* in b"):
        open_ensemble(folders, None, [])
    assert len(open_ensemble(folders, None, [f"predict.{setting}"]).members) == 2


def test_nothing_is_hashed_but_a_changed_config_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "sha256_tree", lambda *_, **__: pytest.fail("hashed every file"))
    (folder / "a" / "head.safetensors").write_text("changed")
    open_ensemble([folder / "a"], None, [])
    config = folder / "a" / "config.yaml"
    config.write_text(config.read_text().replace("temperature: 1.0", "temperature: 2.0"))
    with pytest.raises(BundleError, match=r"config\.yaml"):
        open_ensemble([folder / "a"], None, [])


def test_labels_have_the_mean_of_the_bundles_thresholds_where_none_is_set(folder: Path) -> None:
    config = resolve({"task": SEVERAL, "data": {"submission": {"values": "labels"}}})
    for name, thresholds in (("low", [0.1, 0.2, 0.3]), ("high", [0.5, 0.6, 0.7]), ("none", [])):
        hollow_bundle(folder / name, config, name, thresholds=thresholds)
    text = "members: [{bundle: low, weight: 3}, {bundle: high, weight: 1}, {bundle: none, weight: 6}]"
    set_too = ["data.submission.thresholds={y: 0.9}"]
    for overrides, y in (([], 0.3), (set_too, 0.9)):
        fitted = open_ensemble(written(folder, text), None, overrides).submission.thresholds
        assert fitted == pytest.approx({"x": 0.2, "y": y, "z": 0.4})
    assert open_ensemble([folder / "none"], None, []).submission.thresholds == {}
    assert open_ensemble([folder / "a"], None, []).submission.thresholds == {}


@pytest.mark.parametrize(("task", "thresholds"), [("lmsys", [0.1, 0.2, 0.3]), (SEVERAL, [0.1])])
def test_thresholds_that_are_not_of_the_labels_are_refused(tmp_path: Path, task: Any, thresholds: list[float]) -> None:
    hollow_bundle(tmp_path / "odd", resolve({"task": task}), "odd", thresholds=thresholds)
    with pytest.raises(BundleError, match=r"thresholds .*0\.1.* are not those of several labels"):
        open_ensemble([tmp_path / "odd"], None, [])


# --- the blend -------------------------------------------------------------------------------------------------------


def ensemble_of(weights: list[float], temperature: float = 1.0, task: Task = LMSYS) -> Ensemble:
    nothing: Any = None
    members = tuple(EnsembleMember("m", nothing, None, weight, Calibration(), 1.0, 0.0, 0.0) for weight in weights)
    return Ensemble(members, Calibration(temperature), task, Predict(), np.array([0.5, 0.3, 0.2]))


@st.composite
def half_known(draw: st.DrawFn) -> list[np.ndarray[Any, Any]]:
    """Softmax of wild logits, some of whose rows, or single numbers, are not known."""
    members, rows = draw(st.integers(1, 4)), draw(st.integers(0, 6))
    logits = draw(hnp.arrays(float, (members, rows, 3), elements=st.floats(-700, 700)))
    shifted = np.exp(logits - logits.max(axis=2, keepdims=True, initial=-700))
    values = shifted / shifted.sum(axis=2, keepdims=True)
    values[draw(hnp.arrays(bool, (members, rows)))] = np.nan
    values[..., 1][draw(hnp.arrays(bool, (members, rows)))] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    return list(values)


@given(half_known(), st.floats(0.05, 20), st.data())
def test_a_blend_is_always_probabilities(
    values: list[np.ndarray[Any, Any]], temperature: float, data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.floats(1e-6, 1e6), min_size=len(values), max_size=len(values)))
    ensemble = ensemble_of(weights, temperature)
    result = ensemble.blend(values)
    assert result.shape == values[0].shape
    assert np.isfinite(result).all()
    assert (result >= 0).all()
    assert np.abs(result.sum(axis=1) - 1).max(initial=0) <= 1e-9
    for row in range(len(result)):
        known = [(w, one[row]) for w, one in zip(weights, values, strict=True) if np.isfinite(one[row]).all()]
        mean = sum(w * one for w, one in known) / sum(w for w, _ in known) if known else ensemble.prior
        wanted = apply_temperature(mean[None], temperature, LMSYS)[0] if known else mean
        assert result[row] == pytest.approx(wanted, abs=1e-9)


@given(half_known())
def test_several_labels_are_not_made_to_sum_to_one(values: list[np.ndarray[Any, Any]]) -> None:
    task = resolve({"task": SEVERAL}).task
    values = [one * 0.9 for one in values]
    result = ensemble_of([1.0] * len(values), task=task).blend(values)
    assert np.isfinite(result).all()
    sums = np.where(np.isfinite(values).all(axis=2).any(axis=0), 0.9, 1.0)
    assert result.sum(axis=1) == pytest.approx(sums)
    cooler = ensemble_of([1.0] * len(values), 2.0, task=task).blend(values)
    known = np.isfinite(values).all(axis=2).any(axis=0)
    odds = (result[known] / (1 - result[known])) ** 0.5  # by the sigmoid, each label by itself
    assert cooler[known] == pytest.approx(odds / (1 + odds))


def test_a_member_that_does_not_know_a_row_takes_no_part_in_it() -> None:
    first, second = np.array([[0.8, 0.1, 0.1]] * 2), np.array([[0.2, 0.7, 0.1], [np.nan] * 3])
    result = ensemble_of([3, 1]).blend([first, second])
    assert result[0] == pytest.approx([0.65, 0.25, 0.1])
    assert result[1] == pytest.approx(first[1])  # and not 3/4 of it


def test_a_geometric_mean_is_over_the_members_that_scored_a_row(folder: Path) -> None:
    members = "members: [{bundle: a, weight: 0.75}, {bundle: b, weight: 0.25}]"
    ensemble = open_ensemble(written(folder, f"{{mean: geometric, temperature: 1.5, {members}}}"), None, [])
    a, b = np.array([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1]]), np.array([[0.2, 0.2, 0.6], [np.nan] * 3])
    product = a[0] ** 0.75 * b[0] ** 0.25
    expected = [apply_temperature([product / product.sum()], 1.5, LMSYS)[0], apply_temperature(a[1:], 1.5, LMSYS)[0]]
    assert ensemble.blend([a, b]) == pytest.approx(np.array(expected))
    assert ensemble.blend([np.full((1, 3), np.nan)] * 2)[0] == pytest.approx(ensemble.prior)
