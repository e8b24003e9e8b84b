"""One way to measure: all commands have scikit-learn's figures, and setting a temperature gives what was promised."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
import sklearn.metrics
from rich.console import Console
from scipy.special import softmax

from pairclf.approaches.finetune.drift import HeldOutSample, compare
from pairclf.approaches.finetune.drift import render as render_shift
from pairclf.bundles.bundle import Bundle, open_bundle
from pairclf.config import Config, Predict, deciding_settings, dump_config, override, resolve
from pairclf.data.identity import row_hashes
from pairclf.data.rows import read_rows, to_rows
from pairclf.data.scores import class_matrix, read_scores, scores_frame, write_logits, write_scores
from pairclf.demo import demo
from pairclf.errors import DataError
from pairclf.inference.ensemble import EnsembleFile, MemberFile, open_ensemble, read_ensemble
from pairclf.inference.state import PredictionState
from pairclf.packaging import build
from pairclf.packaging.build_record import Build, PackedBundle
from pairclf.publish import ledger, submit
from pairclf.publish.push import Pushed
from pairclf.run import Paths, labelled_rows, out_of_fold_metric, output_of, trained_as
from pairclf.runs import cv, fit
from pairclf.runs.calibrated import write_calibrated
from pairclf.runs.evaluate import Evaluation, _classical_beside, evaluate, evaluate_run, out_of_fold, scored
from pairclf.runs.evaluation_report import as_tree, render
from pairclf.scores.calibration import FittedCalibration, NestedCalibration
from pairclf.scores.figures import METRICS, Judged, Metric, measure, metrics_of, title
from pairclf.scores.intervals import Estimate, Statistic, mean_of
from pairclf.scores.metrics import Floats
from pairclf.scores.probabilities import Calibration, mean_of_orders
from pairclf.task import LMSYS, WSDM, Task

ROWS = 24
TOPICS = Task(name="topics", fields=("text",), classes=tuple("abcdef"), label_column="topic")
TAGS = Task(name="tags", fields=("text",), classes=("x", "y", "z"), multi_label=True)
KINDS = {"lmsys": LMSYS, "wsdm": WSDM, "topics": TOPICS, "tags": TAGS}
PACKED = ("name", "seal", "fold", "metrics", "base")


def write_data(path: Path, task: Task, *, prefix: str = "") -> None:
    """Rows whose labels follow no text, with a column of weights."""
    generator = np.random.default_rng(len(task.classes))
    texts = {
        name: [f"{prefix}{name} {number} {'word ' * (number % 5)}" for number in range(ROWS)] for name in task.fields
    }
    if task.multi_turn:
        texts = {name: [json.dumps([text]) for text in cells] for name, cells in texts.items()}
    labels: dict[str, Any]
    if task.label_column is not None:
        labels = {task.label_column: [task.classes[row % len(task.classes)] for row in range(ROWS)]}
    else:
        one_hot = np.eye(len(task.classes), dtype=int)[np.arange(ROWS) % len(task.classes)]
        drawn = generator.integers(2, size=one_hot.shape) if task.multi_label else one_hot
        labels = dict(zip(task.classes, drawn.T.tolist(), strict=True))
    columns = {"id": [str(row) for row in range(ROWS)], **texts, **labels}
    pl.DataFrame({**columns, "weight": generator.uniform(0.2, 3, ROWS)}).write_csv(path)


def scikit_learn(values: Floats, targets: Floats, task: Task, weights: Floats) -> dict[str, float]:
    """Log loss and accuracy as scikit-learn has them; of several labels the sum, and the mean, over the labels."""
    if not task.multi_label:
        labels, classes = targets.argmax(axis=1), list(range(len(task.classes)))
        return {
            "log_loss": sklearn.metrics.log_loss(labels, values, labels=classes, sample_weight=weights),
            "accuracy": sklearn.metrics.accuracy_score(labels, values.argmax(axis=1), sample_weight=weights),
        }
    by_label = list(zip(targets.T.astype(int), values.T, strict=True))
    return {
        "log_loss": sum(sklearn.metrics.log_loss(t, p, labels=[0, 1], sample_weight=weights) for t, p in by_label),
        "accuracy": np.mean([sklearn.metrics.accuracy_score(t, p > 0.5, sample_weight=weights) for t, p in by_label]),
    }


def wide() -> Console:
    return Console(width=250, record=True, file=io.StringIO())


def cross_validated(folder: Path, task: Task, base: Path, **settings: Any) -> tuple[Config, str]:
    """The config of a finished cross-validation with a look at the held-out rows, and what it printed."""
    write_data(folder / "train.csv", task)
    config = resolve(
        {
            "task": task.model_dump(mode="json"),
            "output_dir": str(folder / "run"),
            "data": {"folder": str(folder), "train": "train.csv"},
            "folds": {"n_splits": 2, "near_duplicate_threshold": None},
            "inputs": {"max_length": 96, "num_proc": 1},
            "model": {"base": str(base), "quantization": "none", "lora": {"r": 2}},
            "train": {"max_steps": 1, "global_batch_size": 8, "eval_steps": 1, **settings},
        }
    )
    console = wide()
    with pytest.MonkeyPatch.context() as patch:
        for module in (cv, fit):
            patch.setattr(module, "console", console)
        cv.cross_validate(config)
    return config, console.export_text()


@pytest.fixture(scope="module")
def config_of(
    base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Config, str]]:
    """As `cross_validated`, once for each kind of task."""
    made: dict[str, tuple[Config, str]] = {}

    def make(kind: str) -> tuple[Config, str]:
        if kind not in made:
            made[kind] = cross_validated(tmp_path_factory.mktemp(kind), KINDS[kind], base_of("llama"))
        return made[kind]

    return make


def row(label: object, figures: Mapping[str, float], digits: int = 4) -> re.Pattern[str]:
    """A line of a table that opens with the label and the figures."""
    cells = "".join(rf" +{value:.{digits}f}" for value in figures.values())
    return re.compile(rf"^{re.escape(str(label))}{cells}\b", re.MULTILINE)


def assert_every_command_prints(config: Config, printed: str) -> None:
    """What `train` writes, its looks see, `cv` and `evaluate` print, merging compares, `demo` sums up, and the package
    and the ledger say, are the same figures of the same scores; those of `expected`, all of the task's metrics."""
    task, labelled, run = config.task, labelled_rows(config), output_of(config)
    bundles = [open_bundle(Paths(run, fold).bundle) for fold in (0, 1)]

    def figures_of(scores: pl.DataFrame) -> dict[str, float]:
        joined = scores.select("id").join(labelled, on="id", how="left", maintain_order="left")
        targets, weights = np.array(joined["target"].to_list()), joined["weight"].to_numpy()
        figures = measure(class_matrix(scores, task), targets, task, weights)
        independent = scikit_learn(class_matrix(scores, task), targets, task, weights)
        assert {name: figures[name] for name in independent} == pytest.approx(independent, rel=1e-9)
        assert list(figures) == metrics_of(task)
        return figures

    for fold, bundle in enumerate(bundles):
        folder = Paths(run, fold).folder
        wanted = figures_of(read_scores(folder / "oof.parquet", task))
        manifest = bundle.manifest.metrics
        assert {name: manifest[name] for name in wanted} == pytest.approx(wanted, rel=1e-9)
        assert ", ".join(f"{title(name, task)} {value:.4f}" for name, value in wanted.items()) in printed
        looks = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        looked_at = f"held_out_{config.train.metric_for_best_model}"
        (look,) = [line[looked_at] for line in looks if looked_at in line]
        assert look == pytest.approx(wanted[config.train.metric_for_best_model], rel=1e-4)  # other batches
        assert row(f"{fold}       12", wanted).search(printed)
        described = build._line("x", bundle, task, "equal")
        assert ", ".join(f"{title(name, task)} {value:,.4f}" for name, value in wanted.items()) in described
    scores = read_scores(run / "oof.parquet", task)
    wanted = figures_of(scores)
    assert row("all     24", wanted).search(printed)
    prior = evaluate(labelled, out_of_fold(run, task, Predict()), task).prior
    assert f"class prior: {METRICS[task.metric].title} {prior[task.metric]:.4f}" in printed
    for source in (out_of_fold(run, task, Predict()), scored(run / "oof.parquet", task)):
        judged = evaluate(labelled, source, task)
        assert judged.model == pytest.approx(wanted, rel=1e-9)
        assert judged.weighted
        text = shown(judged, task)
        for name, value in wanted.items():
            assert row(title(name, task), {name: value}).search(text)
        summary = "\n".join(" ".join(line) for line in demo._figures(judged, 1.0, task))
        for name, value in wanted.items():
            assert row(f"{title(name, task)}, out of fold", {name: value}).search(summary)
    rows = scores.select("id").join(labelled, on="id", how="left", maintain_order="left")
    values = class_matrix(scores, task)
    shift = compare(
        HeldOutSample(to_rows(rows, task), [], values, False, None),
        values,
        values,
        task,
        num_bundles=1,
        operation="merged",
    )
    for figures in (shift.reference, shift.after, shift.out_of_fold):
        assert figures == pytest.approx(wanted, rel=1e-9)
    for name, value in wanted.items():
        assert row(title(name, task), {"before": value, "after": value}, digits=5).search(
            text_of(render_shift(shift, task))
        )
    assert {f"merged_{name}": shift.metrics[f"merged_{name}"] for name in wanted} == {
        f"merged_{name}": value for name, value in shift.after.items()
    }
    for name, figure in wanted.items():  # what a package says of its folds
        assert out_of_fold_metric(bundles, name) == (pytest.approx(figure) if METRICS[name].by_row else None)
    assert_the_ledger_prints(task, bundles, run)


def assert_the_ledger_prints(task: Task, bundles: Sequence[Bundle], run: Path) -> None:
    metric = METRICS[task.metric]
    out_of_fold_figure = out_of_fold_metric(bundles, task.metric)
    packed = [
        PackedBundle(folder=bundle.name, orders=2, **{name: getattr(bundle.manifest, name) for name in PACKED})
        for bundle in bundles
    ]
    models = SimpleNamespace(file=EnsembleFile(members=[MemberFile(bundle=run)]), bundles=dict(enumerate(bundles)))
    nested = build._nested(cast(Any, models))
    assert nested is not None
    record = SimpleNamespace(
        bundles=packed, task=task, identity="b" * 64, config="x", out_of_fold=out_of_fold_figure, nested=nested,
        package=SimpleNamespace(competition="a-competition"),
    )  # fmt: skip
    line = submit._row(run, cast(Build, record), cast(Pushed, SimpleNamespace(seconds=1.0, kernel="k", version=1)), "m")
    assert list(line.folds.values()) == [bundle.manifest.metrics[task.metric] for bundle in bundles]
    (run / "ledger.jsonl").unlink(missing_ok=True)
    ledger.record(run / "ledger.jsonl", line)
    text = text_of(ledger.render(run / "ledger.jsonl"))
    assert f"a-competition counts {metric.title} ({metric.direction})" in text
    assert f"{out_of_fold_figure:.5f}" in text
    assert all(f"{figure:.5f}" in text for figure in (nested.raw, nested.nested, nested.flattering))
    assert "(not applied)" in text


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_has_scikit_learns_figures(kind: str, config_of: Callable[[str], tuple[Config, str]]) -> None:
    assert_every_command_prints(*config_of(kind))


def distance(judged: Judged) -> Statistic:
    """The largest distance of a probability from the target."""
    return mean_of(np.abs(judged.predicted - judged.target).max(axis=1))


def test_a_new_metric_is_one_record(
    base_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All commands print it, the first of all where it is the task's own, and a training may go by it."""
    monkeypatch.setitem(METRICS, "distance", Metric(distance, "distance", -1, by_row=True))
    task = TOPICS.model_copy(update={"metric": "distance"})
    config, printed = cross_validated(
        tmp_path, task, base_of("llama"), metric_for_best_model="distance", keep_weights="best"
    )
    assert metrics_of(task)[0] == "distance"
    assert "distance" in printed
    first = Paths(output_of(config), 0)
    assert open_bundle(first.bundle).manifest.metrics["kept_step"] == trained_as(first)["training"]["kept_step"] == 1
    assert_every_command_prints(config, printed)


def text_of(printable: Any) -> str:
    console = wide()
    console.print(printable)
    return console.export_text()


def shown(judged: Evaluation, task: Task) -> str:
    return text_of(render(judged, task))


def tempered(judged: Evaluation) -> tuple[float, float]:
    """The temperature, and the log loss that the very rows have at it."""
    fitted = judged.calibrations[0].fitted
    assert isinstance(fitted.calibration.temperature, float)
    return fitted.calibration.temperature, fitted.flattering


def test_the_output_says_how_several_labels_come_together(config_of: Callable[[str], tuple[Config, str]]) -> None:
    config, printed = config_of("tags")
    evaluation = evaluate(labelled_rows(config), out_of_fold(output_of(config), TAGS, Predict()), TAGS)
    text = shown(evaluation, TAGS)
    for words in ("log loss: label sum", "accuracy: label mean"):
        assert words in printed
        assert words in text
    mean = f"adds up 3 labels; their mean, as Kaggle has it, is {evaluation.model['log_loss'] / 3:.4f}"
    assert mean in text
    assert "label" not in config_of("topics")[1]


def test_yes_to_everything_costs_something(config_of: Callable[[str], tuple[Config, str]], tmp_path: Path) -> None:
    labelled = labelled_rows(config_of("tags")[0])
    write_scores(tmp_path / "s.parquet", scores_frame(labelled["id"].to_list(), np.ones((ROWS, 3)), TAGS, 1, ["m"]))
    judged = evaluate(labelled, scored(tmp_path / "s.parquet", TAGS), TAGS)
    assert judged.model["log_loss"] > 10
    assert judged.model["accuracy"] < 0.8


# --- the temperature -------------------------------------------------------------------------------------------------


class Judge:
    """What `PredictionState` asks of an ensemble, for one member."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibrations = [calibration]

    def blend(self, per_member: Any) -> Floats:
        (only,) = per_member
        return np.asarray(only)


def biased(folder: Path, rows: int = 600) -> tuple[pl.DataFrame, Floats]:
    """Labelled rows, and their logits `(N, 2, 3)` with a bias of 3 for the side that stands first, at temperature 3."""
    generator = np.random.default_rng(0)
    truth = generator.normal(size=(rows, 3))
    labels = [generator.choice(3, p=one) for one in softmax(truth, axis=1)]
    cells = {"id": [str(row) for row in range(rows)]}
    cells |= {name: [json.dumps([f"{name} {row}"]) for row in range(rows)] for name in LMSYS.fields}
    one_hot = dict(zip(LMSYS.classes, np.eye(3, dtype=int)[labels].T.tolist(), strict=True))
    folder.mkdir(parents=True)
    pl.DataFrame({**cells, **one_hot}).write_csv(folder / "train.csv")
    both = np.stack([truth, truth[:, list(LMSYS.swapped_columns)]], axis=1)
    return read_rows([folder / "train.csv"], LMSYS, labelled=True), 3 * both + np.array([3.0, 0.0, 0.0])


def test_the_temperature_is_fitted_where_it_is_applied(tmp_path: Path) -> None:
    """With a position bias it matters whether it comes before or after the mean of both orders."""
    labelled, logits = biased(tmp_path / "run")
    write_logits(tmp_path / "run" / "oof-logits.parquet", labelled["id"], logits, row_hashes(labelled, LMSYS))

    def judged(temperature: float) -> Evaluation:
        return evaluate(labelled, out_of_fold(tmp_path / "run", LMSYS, Predict(temperature=temperature)), LMSYS)

    promised = judged(1.0)
    temperature, loss = tempered(promised)
    for now in (1.0, 0.7, temperature):  # whatever the scores were made with
        assert tempered(judged(now)) == (pytest.approx(temperature, rel=1e-4), pytest.approx(loss, abs=1e-9))
    assert judged(temperature).model["log_loss"] == pytest.approx(loss, abs=1e-12)
    targets = np.array(labelled["target"].to_list())
    best = min(
        sklearn.metrics.log_loss(targets.argmax(axis=1), mean_of_orders(logits, LMSYS, one))
        for one in np.geomspace(0.5, 10, 400)
    )
    assert loss == pytest.approx(best, abs=1e-5)
    # After the mean another temperature would be best, which does harm before it.
    mean = mean_of_orders(logits, LMSYS)
    write_scores(tmp_path / "s.parquet", scores_frame(labelled["id"].to_list(), mean, LMSYS, 2, ["m"]))
    after = evaluate(labelled, scored(tmp_path / "s.parquet", LMSYS), LMSYS)
    assert abs(tempered(after)[0] - temperature) > 0.2
    assert after.setting != promised.setting


@pytest.mark.parametrize("kept", [True, False])
def test_the_promise_of_one_order_is_that_of_one_order(kept: bool, tmp_path: Path) -> None:
    """With a position bias, the temperature for both orders does harm to predictions of order AB alone."""
    labelled, logits = biased(tmp_path / "run")
    hashes, one_way = row_hashes(labelled, LMSYS), logits[:, :1]
    if kept:
        write_logits(tmp_path / "run" / "oof-logits.parquet", labelled["id"], logits, hashes)
    else:  # a run of an older pairclf
        frame = scores_frame(labelled["id"].to_list(), mean_of_orders(one_way, LMSYS), LMSYS, 1, ["m"], hashes=hashes)
        write_scores(tmp_path / "run" / "oof-ab.parquet", frame)
    judged = evaluate(labelled, out_of_fold(tmp_path / "run", LMSYS, Predict(swap="off")), LMSYS)
    labels = np.array(labelled["target"].to_list()).argmax(axis=1)

    def at(temperature: float) -> float:
        return float(sklearn.metrics.log_loss(labels, mean_of_orders(one_way, LMSYS, temperature)))

    assert judged.model["log_loss"] == pytest.approx(at(1.0), abs=1e-9)
    temperature, loss = tempered(judged)
    assert loss == pytest.approx(at(temperature), abs=1e-9)
    assert loss == pytest.approx(min(map(at, np.geomspace(0.5, 20, 400))), abs=1e-4)
    assert judged.swap_gain is None
    assert "order AB alone" in shown(judged, LMSYS)


@pytest.mark.parametrize("calibration", [Calibration(2.5), Calibration(2.5, 0.7, -0.4)])
def test_prediction_applies_it_where_it_was_fitted(calibration: Calibration, tmp_path: Path) -> None:
    from pairclf.inputs.sequences import SequenceIndex

    _, logits = biased(tmp_path / "run", 20)
    places = np.arange(40).reshape(20, 2)
    standing = PredictionState(
        [SequenceIndex(np.full((20, 2), 9), np.zeros(20, int), places)], LMSYS, Judge(calibration), "full"
    )
    standing.add(0, [(row, order) for row in range(20) for order in (0, 1)], logits.reshape(-1, 3))
    np.testing.assert_array_equal(standing.probabilities(), mean_of_orders(logits, LMSYS, calibration))


def test_several_labels_are_tempered_by_the_sigmoid(config_of: Callable[[str], tuple[Config, str]]) -> None:
    config, _ = config_of("tags")
    labelled, run = labelled_rows(config), output_of(config)
    promised = evaluate(labelled, out_of_fold(run, TAGS, Predict()), TAGS)
    temperature, loss = tempered(promised)
    at_it = evaluate(labelled, out_of_fold(run, TAGS, Predict(temperature=temperature)), TAGS)
    assert at_it.model["log_loss"] == pytest.approx(loss, abs=1e-12)
    of_scores = evaluate(labelled, scored(run / "oof.parquet", TAGS), TAGS)
    assert tempered(of_scores)[1] == pytest.approx(loss, abs=1e-6)  # one order: both places are one


# --- files of other people ---------------------------------------------------------------------------------------


def of_others(path: Path, ids: Any, labelled: pl.DataFrame) -> None:
    """A file of probabilities that are the labels, mixed with one third, and no more of it is pairclf's."""
    shares = 0.1 / 3 + 0.9 * np.array(labelled["target"].to_list())
    columns = {name: shares[:, place] for place, name in enumerate(LMSYS.classes)}
    texts = {"prompt": [f"prompt {row}" for row in range(len(shares))]}
    pl.DataFrame({"id": ids, **texts, **columns})[::-1].write_parquet(path)


@pytest.mark.parametrize("kind", [pl.Int64, pl.Float64, pl.String, pl.Categorical])
def test_files_of_others_are_joined_on_ids_of_any_type(kind: Any, tmp_path: Path) -> None:
    labelled, _ = biased(tmp_path / "run", 30)
    of_others(tmp_path / "theirs.parquet", labelled["id"].cast(kind), labelled)
    judged = evaluate(labelled, scored(tmp_path / "theirs.parquet", LMSYS), LMSYS, truth=tmp_path / "theirs.parquet")
    chances = np.array([0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3])
    assert judged.model["log_loss"] == pytest.approx(-np.log(chances[0]))
    assert judged.best == pytest.approx(-(chances * np.log(chances)).sum())


def test_one_row_is_judged(tmp_path: Path) -> None:
    """Its own label is its prior, beside which the true probabilities look worse: there is no way to go."""
    labelled, _ = biased(tmp_path / "run", 30)
    of_others(tmp_path / "theirs.parquet", labelled["id"], labelled)
    pl.read_parquet(tmp_path / "theirs.parquet").head(1).write_csv(tmp_path / "one.csv")
    judged = evaluate(labelled, scored(tmp_path / "one.csv", LMSYS), LMSYS, truth=tmp_path / "theirs.parquet")
    assert (judged.rows, judged.model["accuracy"], judged.way) == (1, 1.0, None)
    assert judged.prior["log_loss"] == pytest.approx(0, abs=1e-9)


def test_true_probabilities_hold_each_row_once(tmp_path: Path) -> None:
    labelled, _ = biased(tmp_path / "run", 30)
    of_others(tmp_path / "theirs.parquet", labelled["id"], labelled)
    pl.concat([pl.read_parquet(tmp_path / "theirs.parquet")] * 2).write_parquet(tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="stand twice"):
        evaluate(labelled, scored(tmp_path / "theirs.parquet", LMSYS), LMSYS, truth=tmp_path / "twice.parquet")


# --- what stands beside the figures ---------------------------------------------------------------------------------


def test_a_run_is_judged_with_intervals_orders_slices_and_bins(tmp_path: Path) -> None:
    labelled, logits = biased(tmp_path / "run")
    logits -= np.array([0.0, 0.0, 4.0])  # too few ties
    write_logits(tmp_path / "run" / "oof-logits.parquet", labelled["id"], logits, row_hashes(labelled, LMSYS))
    judged = evaluate(labelled, out_of_fold(tmp_path / "run", LMSYS, Predict()), LMSYS)
    loss = judged.figures["log_loss"]
    assert loss.value == pytest.approx(judged.model["log_loss"], rel=1e-12)
    assert loss.low < loss.value < loss.high
    assert (judged.rows, judged.groups, judged.without_score) == (600, 600, 0)
    assert judged.orders is not None
    assert judged.orders.figures["first_position_bias"].low > 0.2
    assert judged.orders.figures["swap_gain"].value == pytest.approx(judged.swap_gain)
    advised = judged.advised
    assert advised is not None
    assert advised.fitted.method == "tied vector scaling"
    assert advised.nested < judged.calibrations[0].nested < judged.model["log_loss"] - 0.3
    text = shown(judged, LMSYS)
    for words in ("Both orders", "bias for the side that stands first", "nested in 5 folds of prompts", "raw"):
        assert words in text
    assert "--calibrated FILE writes it" in text
    tree = json.loads(json.dumps(as_tree(judged), allow_nan=False))
    assert tree["figures"]["log_loss"] == {"value": loss.value, "low": loss.low, "high": loss.high}
    assert tree["advised_calibration"] == "tied vector scaling"
    assert {line["class"] for line in tree["reliability"]} == {None, *LMSYS.classes}
    assert tree["orders"]["gain_curve"][-1]["gain"] == pytest.approx(judged.swap_gain)
    rows = judged.by_row
    assert rows["loss"].mean() == pytest.approx(loss.value)
    assert rows["loss_tied_vector_scaling"].mean() == pytest.approx(advised.nested)
    assert (rows["loss_ab"] - rows["loss"]).mean() == pytest.approx(judged.swap_gain)
    assert rows["id"].to_list() == labelled["id"].to_list()


def test_a_model_without_an_order_is_said_to_have_none(tmp_path: Path) -> None:
    labelled, logits = biased(tmp_path / "run", 60)
    logits[:, 1] = logits[:, 0][:, list(LMSYS.swapped_columns)]
    write_logits(tmp_path / "run" / "oof-logits.parquet", labelled["id"], logits, row_hashes(labelled, LMSYS))
    text = shown(evaluate(labelled, out_of_fold(tmp_path / "run", LMSYS, Predict()), LMSYS), LMSYS)
    assert "Both orders have the same probabilities." in text
    assert "the swap gained" not in text


def test_rows_of_one_prompt_are_drawn_together(tmp_path: Path) -> None:
    """Each row stands four times: the interval is that of the rows once, and not half as wide."""
    labelled, _ = biased(tmp_path / "run", 100)
    of_others(tmp_path / "once.parquet", labelled["id"], labelled)
    four = pl.concat([labelled.with_columns(id=pl.col("id") + f"-{copy}") for copy in range(4)])
    of_others(tmp_path / "four.parquet", four["id"], four)
    widths = []
    for name, rows in (("once", labelled), ("four", four)):
        frame = pl.read_parquet(tmp_path / f"{name}.parquet").with_columns(
            winner_tie=pl.col("winner_tie") * 0.5, winner_model_a=pl.col("winner_model_a") + pl.col("winner_tie") * 0.5
        )
        frame.drop("prompt").write_parquet(tmp_path / f"{name}.parquet")
        judged = evaluate(rows, scored(tmp_path / f"{name}.parquet", LMSYS), LMSYS)
        widths.append(judged.figures["log_loss"].high - judged.figures["log_loss"].low)
        assert judged.groups == 100
    assert widths[1] == pytest.approx(widths[0], rel=0.1)


def test_the_command_prints_json_and_writes_the_rows(
    config_of: Callable[[str], tuple[Config, str]], tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    config, _ = config_of("lmsys")
    (tmp_path / "c.yaml").write_text(dump_config(config))
    files = ("--losses", tmp_path / "rows.parquet", "--figures", tmp_path / "figures.parquet")
    code, text = cli("evaluate", tmp_path / "c.yaml", "--json", *files)
    tree = json.loads(text[text.index("{") : text.rindex("}") + 1])
    assert (code, tree["rows"], tree["folds"]) == (0, ROWS, "the run's folds")
    assert tree["source"] == "out-of-fold scores"
    assert f"wrote {tmp_path / 'rows.parquet'}" in text
    figures = pl.read_parquet(tmp_path / "figures.parquet").rows_by_key("figure", unique=True)
    assert figures["figures.log_loss"] == tuple(tree["figures"]["log_loss"].values())
    assert figures["calibrations.temperature.nested"][0] == tree["calibrations"][0]["nested"]
    assert figures["rows"] == (ROWS, None, None)
    assert {f"reliability.0.{key}" for key in ("predicted", "observed", "low", "high")} <= figures.keys()
    rows = pl.read_parquet(tmp_path / "rows.parquet")
    assert sorted(rows["fold"].unique()) == [0, 1]
    assert np.average(rows["loss"], weights=rows["weight"]) == pytest.approx(tree["model"]["log_loss"])


def test_a_run_folder_is_evaluated_as_its_config(
    config_of: Callable[[str], tuple[Config, str]], tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    config, _ = config_of("lmsys")
    (tmp_path / "x.yaml").write_text(dump_config(config), encoding="utf-8")
    expected = cli("evaluate", tmp_path / "x.yaml", "--json", "predict.temperature=1.5")
    assert expected[0] == 0
    assert cli("evaluate", output_of(config), "--json", "predict.temperature=1.5") == expected
    assert cli("evaluate", output_of(config), "--json") != expected
    code, text = cli("evaluate", tmp_path)
    assert code == 2
    assert "holds no finished training" in text


def test_a_labelled_holdout_is_judged(
    config_of: Callable[[str], tuple[Config, str]], tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    config, _ = config_of("wsdm")
    write_data(tmp_path / "holdout.csv", WSDM, prefix="held out ")
    labelled = read_rows([tmp_path / "holdout.csv"], WSDM, labelled=True)
    shares = 0.05 + 0.9 * np.array(labelled["target"].to_list())
    frame = pl.DataFrame({"id": labelled["id"], "model_b": shares[:, 1], "model_a": shares[:, 0]})  # another order
    frame.write_csv(tmp_path / "scores.csv")
    (tmp_path / "c.yaml").write_text(dump_config(config))
    line = ["evaluate", tmp_path / "c.yaml", "--data", tmp_path / "holdout.csv"]
    code, text = cli(*line, "--scores", tmp_path / "scores.csv", "--json")
    tree = json.loads(text[text.index("{") : text.rindex("}") + 1])
    assert (code, tree["rows"], tree["model"]["accuracy"]) == (0, ROWS, 1.0)
    assert tree["model"]["log_loss"] == pytest.approx(-np.log(0.95))
    code, text = cli(*line)
    assert code == 2
    assert "has other rows than the run's out-of-fold scores" in " ".join(text.split())


def test_a_simpler_model_is_compared_with(tmp_path: Path) -> None:
    """A file; a run folder; and without either, a classical run beside this one."""
    labelled, logits = biased(tmp_path / "runs" / "large")
    for name, heat in (("large", 3.0), ("small", 1.0)):
        folder = tmp_path / "runs" / name
        (folder / "fold0").mkdir(parents=True, exist_ok=True)
        values = mean_of_orders(logits, LMSYS, 3 / heat)
        hashes = row_hashes(labelled, LMSYS)
        frame = scores_frame(labelled["id"].to_list(), values, LMSYS, 2, ["m"], hashes=hashes)
        write_scores(folder / "oof.parquet", frame)
        config = resolve({"task": "lmsys", "approach": "classical" if heat == 1 else "finetune"})
        (folder / "fold0" / "trained.json").write_text(json.dumps(deciding_settings(config)))
    large, small = tmp_path / "runs" / "large", tmp_path / "runs" / "small"
    assert _classical_beside(large, config) == small
    assert _classical_beside(small, config) is None
    assert _classical_beside(large, resolve({"task": "wsdm"})) is None
    for baseline in (small, small / "oof.parquet"):
        judged = evaluate(labelled, scored(large / "oof.parquet", LMSYS), LMSYS, baseline=baseline)
        assert judged.baseline is not None
        expected = measure(mean_of_orders(logits, LMSYS, 3.0), np.array(labelled["target"].to_list()), LMSYS)
        assert judged.baseline.log_loss == pytest.approx(expected["log_loss"])
        assert judged.baseline.gain.value == pytest.approx(expected["log_loss"] - judged.model["log_loss"])
        assert f"worse than the baseline {baseline}: log loss" in shown(judged, LMSYS)
        assert as_tree(judged)["baseline"]["gain"]["high"] < 0
    same = evaluate(labelled, scored(small / "oof.parquet", LMSYS), LMSYS, baseline=small)
    assert "not distinguishable from the baseline" in shown(same, LMSYS)
    better = evaluate(labelled, scored(small / "oof.parquet", LMSYS), LMSYS, baseline=large)
    assert "better than the baseline" in shown(better, LMSYS)


def test_a_baseline_of_other_rows_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled, _ = biased(tmp_path / "run", 30)
    of_others(tmp_path / "all.parquet", labelled["id"], labelled)
    pl.read_parquet(tmp_path / "all.parquet").head(20).write_parquet(tmp_path / "some.parquet")
    scores = scored(tmp_path / "all.parquet", LMSYS)
    judged = evaluate(labelled, scores, LMSYS, baseline=tmp_path / "some.parquet")
    assert judged.baseline is None
    assert "it has no score of 10 rows of 30" in " ".join(capsys.readouterr().err.split())
    part = evaluate(labelled, scored(tmp_path / "some.parquet", LMSYS), LMSYS)
    assert "10 labelled rows have no score and are left out" in shown(part, LMSYS)


def test_the_calibration_that_is_worth_it_becomes_an_ensemble(
    config_of: Callable[[str], tuple[Config, str]], tmp_path: Path
) -> None:
    config, _ = config_of("lmsys")
    judged, path = evaluate_run(config, None), tmp_path / "deep" / "calibrated.yaml"
    path.parent.mkdir()
    assert judged.advised is None  # labels that follow no text
    assert not write_calibrated(judged, config, [], path)
    assert not path.exists()
    calibration = Calibration(1.25, 0.75, 0.5)
    fitted = FittedCalibration("tied vector scaling", calibration, np.zeros(ROWS), 0.9, np.zeros((ROWS, 3)))
    worth = NestedCalibration(fitted, 1.0, 0.95, Estimate(0.05, np.full(10, 0.05)))
    assert write_calibrated(replace(judged, calibrations=[worth]), config, [], path)
    ensemble = open_ensemble([path], None, [])
    assert ensemble.calibrations == [calibration] * 2
    assert [member.bundle.folder.resolve() for member in ensemble.members] == [
        Paths(output_of(config), fold).bundle.resolve() for fold in (0, 1)
    ]
    assert "0.95000 nested in the run's folds" in path.read_text()
    nested = read_ensemble([path]).nested
    assert nested is not None
    assert (nested.raw, nested.nested, nested.flattering, nested.applied) == (1.0, 0.95, 0.9, True)
    assert (nested.low, nested.high) == (pytest.approx(0.05), pytest.approx(0.05))


def test_a_manifest_keeps_what_a_temperature_would_gain(config_of: Callable[[str], tuple[Config, str]]) -> None:
    """It is nested: fitted by fold of prompts to the others, so that labels that follow no text gain nothing by it."""
    config, _ = config_of("lmsys")
    for fold in (0, 1):
        figures = open_bundle(Paths(output_of(config), fold).bundle).manifest.metrics
        assert figures["log_loss_calibrated_own_rows"] <= figures["log_loss"] + 1e-9
        assert figures["log_loss_calibrated_own_rows"] < figures["log_loss_calibrated"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--calibrated", "c.yaml", "--scores", "s.csv"], "names the bundles of a run"),
        (["--calibrated", "c.yaml", "predict.swap=off"], "predict.swap=off predicts with one"),
        (["--calibrated", "c.txt"], "must be a YAML file"),
        (["--losses", "."], "is a folder and will not be replaced"),
    ],
)
def test_what_cannot_be_written_is_refused_first(
    line: list[str], message: str, config_of: Callable[[str], tuple[Config, str]], tmp_path: Path,
    cli: Callable[..., tuple[int, str]],
) -> None:  # fmt: skip
    config, _ = config_of("lmsys")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    code, text = cli("evaluate", tmp_path / "config.yaml", *line)
    assert code == 2
    assert message in " ".join(text.split())


def test_out_of_fold_scores_need_no_join(config_of: Callable[[str], tuple[Config, str]]) -> None:
    """`oof.parquet` alone gives every figure: fold, targets, and the logits of both orders."""
    for kind in ("lmsys", "tags"):
        config, _ = config_of(kind)
        run, task = output_of(config), config.task
        frame = pl.read_parquet(run / "oof.parquet")
        names = {part: [f"{part}_{name}" for name in task.classes] for part in ("target", "logit_ab", "logit_ba")}
        targets = frame.select(names["target"]).to_numpy()
        judged = evaluate_run(config, None)
        weights = frame.select("id").join(labelled_rows(config), on="id", how="left", maintain_order="left")["weight"]
        assert measure(class_matrix(frame, task), targets, task, weights) == pytest.approx(judged.model)
        orders = [names[f"logit_{order}"] for order in (("ab", "ba") if task.swappable else ("ab",))]
        logits = np.stack([frame.select(order).to_numpy() for order in orders], axis=1)
        np.testing.assert_allclose(mean_of_orders(logits, task), class_matrix(frame, task), atol=1e-12)
        folds = pl.read_csv(run / "folds.csv", schema_overrides={"id": pl.String})
        assert frame.select("id", "fold").sort("id").rows() == folds.select("id", "fold").sort("id").rows()
        assert (
            read_scores(run / "oof.parquet", task).columns == pl.read_parquet(run / "oof-ab.parquet").columns
        )  # an older pairclf, and every command, reads the columns that it knows
        part = pl.read_parquet(Paths(run, 1).folder / "oof.parquet")
        assert frame.filter(fold=1).sort("id").equals(part.sort("id"))


# --- bad input --------------------------------------------------------------------------------------------------------


def spoilt(path: Path, labelled: pl.DataFrame, **changes: pl.Expr) -> Path:
    of_others(path.with_suffix(".parquet"), labelled["id"], labelled)
    pl.read_parquet(path.with_suffix(".parquet")).with_columns(**changes).write_csv(path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"winner_tie": pl.col("winner_tie") + 0.1}, "probabilities of 30 rows do not sum to one"),
        ({"winner_tie": pl.lit(float("nan"))}, "probabilities of 30 rows are no finite numbers"),
        ({"winner_tie": pl.lit(None, dtype=pl.Float64)}, "probabilities of 30 rows are no finite numbers"),
        ({"winner_tie": pl.lit(-0.2)}, "probabilities of 30 rows are outside"),
        ({"winner_tie": pl.lit("much")}, "scores can't be read"),
        ({"id": pl.lit("7")}, "ids that are empty or stand twice"),
        ({"id": pl.lit(None, dtype=pl.String)}, "ids"),
        ({"id": pl.col("id") + "x"}, "scored rows have no label"),
    ],
)
def test_bad_scores_are_one_message(changes: dict[str, pl.Expr], message: str, tmp_path: Path) -> None:
    labelled, _ = biased(tmp_path / "run", 30)
    with pytest.raises(DataError, match=message):
        evaluate(labelled, scored(spoilt(tmp_path / "s.csv", labelled, **changes), LMSYS), LMSYS)


def test_equal_predictions_an_absent_class_and_ten_rows_have_a_result(tmp_path: Path) -> None:
    labelled, _ = biased(tmp_path / "run", 30)
    ten = labelled.filter(pl.col("target").list.get(2) == 0).head(10)
    equal = {name: pl.lit(share) for name, share in zip(LMSYS.classes, (0.5, 0.25, 0.25), strict=True)}
    judged = evaluate(ten, scored(spoilt(tmp_path / "s.csv", ten, **equal), LMSYS), LMSYS)
    text = shown(judged, LMSYS)
    for words in (
        "10 prompts: too few for intervals to be relied on",
        "no row has the class winner_tie",
        "all rows have the same probabilities",
    ):
        assert words in text
    tree = as_tree(judged)
    assert tree["figures"]["roc_auc"] == {"value": None, "low": None, "high": None}
    assert tree["figures"]["roc_auc_sides"]["value"] == 0.5
    json.dumps(tree, allow_nan=False)


# --- which rows ------------------------------------------------------------------------------------------------------


def test_scores_of_other_rows_with_the_same_ids_are_refused(
    config_of: Callable[[str], tuple[Config, str]], tmp_path: Path
) -> None:
    config, _ = config_of("lmsys")
    run, task = output_of(config), config.task
    both = (out_of_fold(run, task, Predict()), scored(run / "oof.parquet", task))
    write_data(tmp_path / "other.csv", task, prefix="another ")
    other = read_rows([tmp_path / "other.csv"], task, labelled=True)
    a, b = task.swap_fields or ("", "")
    rows = labelled_rows(config)
    mirrored = rows.with_columns(rows[a].alias(b), rows[b].alias(a))
    for scores in both:
        with pytest.raises(DataError, match="24 rows have the id of a row here and another prompt"):
            evaluate(other, scores, task)
        with pytest.raises(DataError, match="24 rows have the id of a row here and its sides exchanged"):
            evaluate(mirrored, scores, task)
        with pytest.raises(DataError, match="1 row has the id of a row here and other texts") as caught:
            changed = pl.when(pl.col("id") == "7").then(pl.lit(["else"])).otherwise(a).alias(a)
            evaluate(rows.with_columns(changed), scores, task)
        assert caught.value.rows == ("7",)


def test_figures_of_rows_that_were_trained_on_say_so(
    config_of: Callable[[str], tuple[Config, str]], tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    config, _ = config_of("lmsys")
    run, task, rows = output_of(config), config.task, labelled_rows(config)
    known = read_scores(run / "oof.parquet", task)
    seen = pl.Series("seen", [2, 1, *[0] * (len(known) - 3), None], dtype=pl.UInt16)
    write_scores(tmp_path / "scores.parquet", known.with_columns(seen))
    judged = evaluate(rows, scored(tmp_path / "scores.parquet", task), task)
    assert judged.seen == 2
    assert "in sample: the models were trained on prompts of 2 of these rows" in shown(judged, task)
    (tmp_path / "c.yaml").write_text(dump_config(config))
    line = ["evaluate", tmp_path / "c.yaml", "--scores"]
    code, text = cli(*line, tmp_path / "scores.parquet")
    assert (code, "--in-sample accepts them" in text) == (1, True)
    assert cli(*line, tmp_path / "scores.parquet", "--in-sample")[0] == cli(*line, run / "oof.parquet")[0] == 0
    out = evaluate(rows, scored(run / "oof.parquet", task), task)
    assert (out.seen, "in sample" in shown(out, task)) == (0, False)


def test_one_fold_is_evaluated(config_of: Callable[[str], tuple[Config, str]]) -> None:
    config, _ = config_of("lmsys")
    alone = evaluate_run(config, None, folds=[1])
    held_out = open_bundle(Paths(output_of(config), 1).bundle).manifest.metrics
    assert (alone.rows, alone.model["log_loss"]) == (held_out["rows"], pytest.approx(held_out["log_loss"]))
    assert alone.without_score == 0  # the rows of the other fold are not asked for
    assert evaluate_run(config, None, folds=[0, 1]).model == pytest.approx(evaluate_run(config, None).model)


def test_settings_that_changed_since_the_training_are_named(
    config_of: Callable[[str], tuple[Config, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = config_of("lmsys")
    for changes, named in ([], False), (["train.max_grad_norm=0.25"], True), (["predict.swap=off"], False):
        evaluate_run(override(config, changes), None)
        said = " ".join(capsys.readouterr().err.split())
        assert ("are of a training with other settings: train.max_grad_norm=" in said) == named
        assert ("(now 0.25)" in said) == named


def test_bad_scores_are_called_so(tmp_path: Path) -> None:
    labelled, _ = biased(tmp_path / "run", 30)
    wrong = 0.05 + 0.425 * (1 - np.array(labelled["target"].to_list()))
    for values, words in (
        (
            wrong,
            [
                "worse than the class prior: log loss 2.9957 against",
                "is at the bound of its range",
                "no calibration is worth it: no other nested gain has",
            ],
        ),
        ((1.0 - wrong) / 2, ["no calibration is worth it", "on its own rows"]),
    ):
        frame = scores_frame(labelled["id"].to_list(), values / values.sum(axis=1, keepdims=True), LMSYS, 1, ["m"])
        write_scores(tmp_path / "s.parquet", frame)
        text = shown(evaluate(labelled, scored(tmp_path / "s.parquet", LMSYS), LMSYS), LMSYS)
        assert [part for part in words if part not in text] == []
        assert ("worse than" in text) == (values is wrong)


def test_folds_of_other_data_are_not_joined(config_of: Callable[[str], tuple[Config, str]], tmp_path: Path) -> None:
    config, _ = config_of("wsdm")
    source = Paths(output_of(config), 0).folder
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    write_data(data / "train.csv", config.task, prefix="other ")
    other = override(config, [f"data.folder={data}", f"output_dir={run}", "folds.run=[1]"])
    shutil.copytree(source, run / "fold0")  # the same settings; data.train has changed since
    with pytest.raises(DataError, match=r"other data .*: fold 0 \(the rows trained on .* and the rows held out\)"):
        cv.cross_validate(other)
    assert not (run / "oof.parquet").exists()
    assert (run / "fold1" / "bundle").is_dir()


@pytest.mark.parametrize("spoil", ["twice", "missing"])
def test_out_of_fold_scores_hold_each_row_once(
    spoil: str, config_of: Callable[[str], tuple[Config, str]], tmp_path: Path
) -> None:
    config, _ = config_of("topics")
    held_out = labelled_rows(config)
    values = np.full((ROWS, 6), 1 / 6)
    frame = scores_frame(held_out["id"].to_list(), values, config.task, 1, ["m"], hashes=row_hashes(held_out, TOPICS))
    spoilt = pl.concat([frame, frame[:1]]) if spoil == "twice" else frame[1:]
    with pytest.raises(DataError, match="ids are missing, unknown or stand twice") as caught:
        cv._check_rows(spoilt, held_out, TOPICS, tmp_path)
    assert set(caught.value.rows) == {"0"}
