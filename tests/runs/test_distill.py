"""A student learns from out-of-fold teachers on their folds, and is compared with them and with itself untaught."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pairclf.approaches.classical_model import MODELS, fit_extracted
from pairclf.approaches.classical_vectors import extract
from pairclf.config import Config, dump_config, load_config, resolve
from pairclf.data.rows import targets_of, to_rows
from pairclf.data.scores import class_matrix, read_scores
from pairclf.errors import ConfigError, DataError, LeakError
from pairclf.inference.predict import predict
from pairclf.run import FOLDS, OOF, Run, output_of
from pairclf.runs.distill import SOFT_LABELS, TAUGHT, UNTAUGHT, distill, plan_students, rows_per_second
from pairclf.runs.evaluate import out_of_fold
from pairclf.scores.metrics import log_loss
from pairclf.task import LMSYS

PROMPT = """
approach: prompt
model:
  base: embedded:llama-tiny
  readout: label_tokens
  label_words: {winner_model_a: A, winner_model_b: B, winner_tie: tie}
"""

Cli = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its data and folds are others than the teacher's, which replace them."""
    path = tmp_path_factory.mktemp("student") / "small.yaml"
    path.write_text(
        "approach: classical\ndata: {folder: nowhere, train: [other.csv]}\nfolds: {n_splits: 7}\n"
        "classical: {n_features: 256, ngram_range: [1, 1], dense: false, C: 0.01}\n"
    )
    return path


@pytest.fixture(scope="module")
def distilled(arms: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    out = tmp_path_factory.mktemp("distilled")
    students = plan_students([arms / "runs" / "plain"], student, ["classical.C=0.02"], out=out)
    assert students.taught.classical.C == 0.02
    return out, distill(students, rows=0).as_dict()


def test_the_student_has_the_rows_and_folds_of_its_teacher(arms: Path, distilled: tuple[Path, object]) -> None:
    out, _ = distilled
    teacher = arms / "runs" / "plain"
    for run in (TAUGHT, UNTAUGHT):
        assert (out / run / FOLDS).read_bytes() == (teacher / FOLDS).read_bytes()
        scores, ours = (pl.read_parquet(folder / OOF).select("id", "fold") for folder in (teacher, out / run))
        assert ours.equals(scores)


def test_labels_are_the_mean_of_labels_and_teacher_in_training_alone(
    arms: Path, distilled: tuple[Path, object]
) -> None:
    out, _ = distilled
    taught = load_config(out / TAUGHT / "fold0" / "config.yaml")
    training, held_out = Run(taught).split(0)
    teacher = read_scores(arms / "runs" / "plain" / OOF, LMSYS)
    scores = training.select("id").join(teacher, on="id", how="left", maintain_order="left")
    given = Run(load_config(arms / "plain.yaml")).split(0)
    expected = (targets_of(given.training) + class_matrix(scores, LMSYS)) / 2
    assert targets_of(training) == pytest.approx(expected)
    assert held_out is not None
    assert given.held_out is not None
    assert held_out.equals(given.held_out), "held-out rows keep their labels"
    assert scores["seen"].to_list() == [0] * len(scores)


def test_figures_are_those_of_the_three_models_on_the_given_labels(
    arms: Path, distilled: tuple[Path, dict[str, object]]
) -> None:
    out, figures = distilled
    folders = {"teacher": arms / "runs" / "plain", "student": out / TAUGHT, "untaught": out / UNTAUGHT}
    losses = {}
    for name, folder in folders.items():
        frame = pl.read_parquet(folder / OOF)
        targets = frame.select(f"target_{label}" for label in LMSYS.classes).to_numpy()
        losses[name] = log_loss(class_matrix(frame, LMSYS), targets)
    assert figures["log_loss"] == pytest.approx(losses)
    cost, gain = figures["cost"], figures["gain"]
    assert cost["value"] == pytest.approx(losses["student"] - losses["teacher"])  # type: ignore[index]
    assert gain["value"] == pytest.approx(losses["student"] - losses["untaught"])  # type: ignore[index]
    assert gain["low"] < gain["value"] < gain["high"]  # type: ignore[index]
    assert figures["rows_per_second"] == {"teacher": None, "student": None}


def test_the_command_keeps_finished_folds_and_prints_json(
    arms: Path, student: Path, distilled: tuple[Path, dict[str, object]], cli: Cli
) -> None:
    out, figures = distilled
    words = ["distill", arms / "runs" / "plain", "--to", student, "classical.C=0.02", "--out", out, "--speed-rows", 0]
    before = (out / TAUGHT / "fold0" / "trained.json").stat().st_mtime_ns
    code, text = cli(*words, "--json")
    assert code == 0, text
    assert json.JSONDecoder().raw_decode(text[text.index("{") :])[0] == json.loads(json.dumps(figures))
    assert (out / TAUGHT / "fold0" / "trained.json").stat().st_mtime_ns == before
    code, text = cli(*words)
    assert code == 0
    assert "student less teacher" in text
    assert "Judge it on rows that no teacher saw" in text
    code, text = cli(*words[:-4], "classical.C=1", "--out", out)
    assert code != 0
    assert "trained with other settings: classical.C=1" in text


@pytest.mark.parametrize("model", MODELS)
def test_every_classical_model_learns_from_soft_labels(arms: Path, model: str) -> None:
    """A model that took the likeliest class or the given label in place of the soft one would not change sides."""
    topics = {"n_components": 4} if MODELS[model].topics else {}
    config = resolve({"approach": "classical", "classical": {"model": model, "n_features": 64, **topics}})
    frame = Run(load_config(arms / "plain.yaml")).frame
    rows = extract(to_rows(frame, LMSYS), LMSYS, config.classical)
    hard, groups = targets_of(frame), frame["id"].to_list()
    soft = 0.3 * hard + 0.7 * hard[:, [1, 0, 2]]
    models = [
        fit_extracted(rows, groups, targets, np.ones(len(frame)), LMSYS, config.classical, 0)
        for targets in (hard, soft)
    ]
    # So few rows let a model that has to prove itself on inner folds say nothing: it is asked without its weight.
    alone = [replace(fitted, weight=np.ones(len(fitted.members)) / len(fitted.members)) for fitted in models]
    fitted = [each.scores(rows)[:, 0] for each in alone]
    leads = [values[:, 0] - values[:, 1] for values in fitted]
    assert np.corrcoef(*leads)[0, 1] < 0.2, "the softened labels favour the other side a little"


@pytest.mark.usefixtures("quick_workers")
def test_a_student_is_the_first_stage_of_a_cascade(arms: Path, distilled: tuple[Path, object], tmp_path: Path) -> None:
    out, _ = distilled
    first, second = out / TAUGHT / "fold0" / "bundle", arms / "runs" / "plain" / "fold0" / "bundle"
    (tmp_path / "cascade.yaml").write_text(f"members: [{{bundle: {first}}}, {{bundle: {second}, share: 0.25}}]")
    scores = predict(
        [tmp_path / "cascade.yaml"], arms / "test.csv", tmp_path / "submission.csv", scores=tmp_path / "s.parquet"
    )
    assert scores is not None
    models = pl.read_parquet(tmp_path / "s.parquet")["models"].list.len().to_list()
    assert sorted(models) == [1] * 9 + [2] * 3


@pytest.mark.usefixtures("quick_workers")
def test_the_speed_is_of_rows_scored_under_the_clock(arms: Path) -> None:
    frame = Run(load_config(arms / "plain.yaml")).frame
    assert 0 < rows_per_second(arms / "runs" / "plain" / "fold0" / "bundle", frame, 20) < 1e6


def test_a_finetuned_student_gets_its_teachers_as_distillation(
    arms: Path, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    config = resolve({"model": {"base": str(base_of("llama")), "quantization": "none"}, "inputs": {"max_length": 96}})
    (tmp_path / "llama.yaml").write_text(dump_config(config))
    files = [arms / "runs" / name for name in ("plain", "strong")]
    students = plan_students(files, tmp_path / "llama.yaml", weight=0.7, out=tmp_path / "out")
    settings = students.taught.train.distill
    assert settings.scores == [path / OOF for path in files]
    assert (settings.ce_weight, settings.kl_weight) == pytest.approx((0.3, 0.7))
    assert students.untaught.train.distill.scores == []
    assert students.taught.data.soft_labels is None
    trained: list[Config] = []
    with pytest.raises(ConfigError, match="holds no finished training"):
        distill(students, trained.append)
    assert [output_of(run).name for run in trained] == [TAUGHT, UNTAUGHT]


@pytest.mark.thorough
@pytest.mark.usefixtures("quick_workers")
def test_a_finetuned_student_is_trained_and_timed(arms: Path, base_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Its cheap sibling looks at the settings of both runs."""
    config = resolve(
        {
            "model": {"base": str(base_of("llama")), "quantization": "none", "lora": {"r": 2}},
            "inputs": {"max_length": 96},
            "train": {"max_steps": 2},
        }
    )
    (tmp_path / "llama.yaml").write_text(dump_config(config))
    result = distill(plan_students([arms / "runs" / "plain"], tmp_path / "llama.yaml", out=tmp_path / "out"), rows=12)
    assert result.rows == 148
    assert result.log_loss["student"] != result.log_loss["untaught"]
    assert all(speed is not None and speed > 0 for speed in result.rows_per_second.values())


def test_teachers_that_can_t_teach_are_refused(arms: Path, student: Path, tmp_path: Path) -> None:
    run = arms / "runs" / "plain"
    scores = read_scores(run / OOF, LMSYS)

    def plan(*paths: Path, to: Path = student, out: Path = tmp_path / "out") -> None:
        plan_students(paths, to, out=out)

    def spoil(frame: pl.DataFrame) -> Path:
        frame.write_parquet(tmp_path / "spoiled.parquet")
        return tmp_path / "spoiled.parquet"

    with pytest.raises(ConfigError, match="don't say which labels"):
        plan(spoil(scores))
    with pytest.raises(ConfigError, match="is given twice"):
        plan(run, run)
    with pytest.raises(DataError, match="do not sum to one"):
        plan(run, spoil(scores.with_columns(winner_tie=pl.lit(0.9))))
    with pytest.raises(DataError, match="are no finite numbers"):
        plan(run, spoil(scores.with_columns(winner_tie=pl.lit(float("nan")))))
    with pytest.raises(DataError, match=r"has scored 147 rows and .* 148"):
        plan(run, spoil(scores[1:]))
    with pytest.raises(LeakError, match="were trained on the prompts"):
        plan(run, spoil(scores.with_columns(seen=pl.lit(1, dtype=pl.UInt16))))
    with pytest.raises(LeakError, match="do not say whether their models"):
        plan(run, spoil(scores.drop("seen")))
    (tmp_path / "prompt.yaml").write_text(PROMPT)
    with pytest.raises(ConfigError, match="approach=prompt trains nothing"):
        plan(run, to=tmp_path / "prompt.yaml")
    (tmp_path / "folds" / TAUGHT).mkdir(parents=True)
    shutil.copyfile(run / FOLDS, tmp_path / "folds" / TAUGHT / FOLDS)
    with (tmp_path / "folds" / TAUGHT / FOLDS).open("a") as file:
        file.write("x,0,y\n")
    with pytest.raises(DataError, match="has other folds than its teacher"):
        plan(run, out=tmp_path / "folds")


def test_a_teacher_of_some_folds_is_refused(arms: Path, student: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(arms / "runs" / "plain", run)
    shutil.rmtree(run / "fold1")
    for name in ("oof.parquet", "oof-logits.parquet"):
        shutil.copyfile(run / "fold0" / name, run / name)
    with pytest.raises(DataError, match=r"of 148 rows have no out-of-fold score of their teacher \(folds \[1\]\)"):
        plan_students([run], student, out=tmp_path / "out")


def test_soft_labels_are_written_by_class_name(arms: Path, student: Path, tmp_path: Path) -> None:
    """A second teacher whose classes stand in another order is matched by their names."""
    scores = read_scores(arms / "runs" / "strong" / OOF, LMSYS)
    order = ["id", *reversed(LMSYS.classes), "seen"]
    scores.select(order).write_parquet(tmp_path / "b.parquet")
    mixed = []
    for name, second in (("a", arms / "runs" / "strong"), ("b", tmp_path / "b.parquet")):
        plan_students([arms / "runs" / "plain", second], student, out=tmp_path / name, weight=1.0)
        mixed.append(read_scores(tmp_path / name / SOFT_LABELS, LMSYS))
    assert class_matrix(mixed[0], LMSYS) == pytest.approx(class_matrix(mixed[1], LMSYS))
    own = out_of_fold(arms / "runs" / "plain", LMSYS, resolve({}).predict)
    assert own.rows["id"].is_in(mixed[0]["id"].to_list()).all()
