"""One way to measure: all commands have scikit-learn's figures, and setting a temperature gives what was promised."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
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
from pairclf.config import Config, Predict, dump_config, override, resolve
from pairclf.data.identity import row_hashes
from pairclf.data.rows import read_rows, to_rows
from pairclf.data.scores import class_matrix, read_scores, scores_frame, write_logits, write_scores
from pairclf.demo import demo
from pairclf.errors import DataError
from pairclf.inference.state import PredictionState
from pairclf.packaging import build
from pairclf.packaging.build_record import Build, PackedBundle
from pairclf.publish import ledger, submit
from pairclf.publish.push import Pushed
from pairclf.run import Paths, labelled_rows, out_of_fold_metric, output_of, trained_as
from pairclf.runs import cv, fit
from pairclf.runs.evaluate import Evaluation, evaluate, evaluate_run, out_of_fold, render, scored
from pairclf.scores.metrics import METRICS, Floats, Metric, measure, metrics_of, title
from pairclf.scores.probabilities import mean_of_orders
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
    for source in (out_of_fold(run, task, Predict()), scored(run / "oof.parquet", task)):
        judged = evaluate(labelled, source, task)
        assert judged.model == pytest.approx(wanted, rel=1e-9)
        assert judged.weighted
        assert row("model", wanted).search(shown(judged, task))
        summary = text_of(demo._summary(judged, 1.0, task, demo.Stages(), Path()))
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
        PackedBundle(folder=bundle.name, **{name: getattr(bundle.manifest, name) for name in PACKED})
        for bundle in bundles
    ]
    record = SimpleNamespace(
        bundles=packed, task=task, identity="b" * 64, config="x", out_of_fold=out_of_fold_figure,
        package=SimpleNamespace(competition="a-competition"),
    )  # fmt: skip
    line = submit._row(run, cast(Build, record), cast(Pushed, SimpleNamespace(seconds=1.0, kernel="k", version=1)), "m")
    assert list(line.folds.values()) == [bundle.manifest.metrics[task.metric] for bundle in bundles]
    (run / "ledger.jsonl").unlink(missing_ok=True)
    ledger.record(run / "ledger.jsonl", line)
    text = text_of(ledger.render(run / "ledger.jsonl"))
    assert f"a-competition counts {metric.title} ({metric.direction})" in text
    assert f"{out_of_fold_figure:.5f}" in text


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_has_scikit_learns_figures(kind: str, config_of: Callable[[str], tuple[Config, str]]) -> None:
    assert_every_command_prints(*config_of(kind))


def brier(values: Floats, targets: Floats, weights: Floats | None, *, multi_label: bool) -> float:
    """Glenn W. Brier's score: the squared distance from the target."""
    return float(np.average(((values - targets) ** 2).sum(axis=1), weights=weights))


def test_a_new_metric_is_one_record(
    base_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All commands print it, the first of all where it is the task's own, and a training may go by it."""
    monkeypatch.setitem(METRICS, "brier", Metric(brier, -1, "Brier score"))
    task = TOPICS.model_copy(update={"metric": "brier"})
    config, printed = cross_validated(
        tmp_path, task, base_of("llama"), metric_for_best_model="brier", keep_weights="best"
    )
    assert metrics_of(task)[0] == "brier"
    assert "Brier score" in printed
    first = Paths(output_of(config), 0)
    assert open_bundle(first.bundle).manifest.metrics["kept_step"] == trained_as(first)["training"]["kept_step"] == 1
    assert_every_command_prints(config, printed)


def text_of(printable: Any) -> str:
    console = wide()
    console.print(printable)
    return console.export_text()


def shown(judged: Evaluation, task: Task) -> str:
    return text_of(render(judged, task))


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

    def __init__(self, temperature: float) -> None:
        self.temperatures = [temperature]

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
    for now in (1.0, 0.7, promised.temperature):  # whatever the scores were made with
        again = judged(now)
        assert again.temperature == pytest.approx(promised.temperature, rel=1e-4)
        assert again.tempered["log_loss"] == pytest.approx(promised.tempered["log_loss"], abs=1e-9)
    assert judged(promised.temperature).model["log_loss"] == pytest.approx(promised.tempered["log_loss"], abs=1e-12)
    targets = np.array(labelled["target"].to_list())
    best = min(
        sklearn.metrics.log_loss(targets.argmax(axis=1), mean_of_orders(logits, LMSYS, one))
        for one in np.geomspace(0.5, 10, 400)
    )
    assert promised.tempered["log_loss"] == pytest.approx(best, abs=1e-5)
    # After the mean another temperature would be best, which does harm before it.
    mean = mean_of_orders(logits, LMSYS)
    write_scores(tmp_path / "s.parquet", scores_frame(labelled["id"].to_list(), mean, LMSYS, 2, ["m"]))
    after = evaluate(labelled, scored(tmp_path / "s.parquet", LMSYS), LMSYS)
    assert abs(after.temperature - promised.temperature) > 0.2
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
    assert judged.tempered["log_loss"] == pytest.approx(at(judged.temperature), abs=1e-9)
    assert judged.tempered["log_loss"] == pytest.approx(min(map(at, np.geomspace(0.5, 20, 400))), abs=1e-4)
    assert judged.swap_gain is None
    assert "order AB alone" in shown(judged, LMSYS)


def test_prediction_applies_it_where_it_was_fitted(tmp_path: Path) -> None:
    from pairclf.inputs.sequences import SequenceIndex

    _, logits = biased(tmp_path / "run", 20)
    places = np.arange(40).reshape(20, 2)
    standing = PredictionState(
        [SequenceIndex(np.full((20, 2), 9), np.zeros(20, int), places)], LMSYS, Judge(2.5), "full"
    )
    standing.add(0, [(row, order) for row in range(20) for order in (0, 1)], logits.reshape(-1, 3))
    np.testing.assert_array_equal(standing.probabilities(), mean_of_orders(logits, LMSYS, 2.5))


def test_several_labels_are_tempered_by_the_sigmoid(config_of: Callable[[str], tuple[Config, str]]) -> None:
    config, _ = config_of("tags")
    labelled, run = labelled_rows(config), output_of(config)
    promised = evaluate(labelled, out_of_fold(run, TAGS, Predict()), TAGS)
    at_it = evaluate(labelled, out_of_fold(run, TAGS, Predict(temperature=promised.temperature)), TAGS)
    assert at_it.model["log_loss"] == pytest.approx(promised.tempered["log_loss"], abs=1e-12)
    of_scores = evaluate(labelled, scored(run / "oof.parquet", TAGS), TAGS)
    assert of_scores.tempered["log_loss"] == pytest.approx(
        promised.tempered["log_loss"], abs=1e-6
    )  # one order: both places are one


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
    assert "in sample: the models were trained on prompts of 2 of these rows" in str(render(judged, task).caption)
    (tmp_path / "c.yaml").write_text(dump_config(config))
    line = ["evaluate", tmp_path / "c.yaml", "--scores"]
    code, text = cli(*line, tmp_path / "scores.parquet")
    assert (code, "--in-sample accepts them" in text) == (1, True)
    assert cli(*line, tmp_path / "scores.parquet", "--in-sample")[0] == cli(*line, run / "oof.parquet")[0] == 0
    out = evaluate(rows, scored(run / "oof.parquet", task), task)
    assert (out.seen, "in sample" in str(render(out, task).caption)) == (0, False)


def test_one_fold_is_evaluated(config_of: Callable[[str], tuple[Config, str]]) -> None:
    config, _ = config_of("lmsys")
    alone = evaluate_run(config, None, folds=[1])
    held_out = open_bundle(Paths(output_of(config), 1).bundle).manifest.metrics
    assert (alone.rows, alone.model["log_loss"]) == (held_out["rows"], pytest.approx(held_out["log_loss"]))
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
        (wrong, ["worse than the class prior: log loss 2.9957 against", "20 is at the bound of its range"]),
        ((1.0 - wrong) / 2, ["was fitted on these very rows"]),
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
