"""The stack of LightGBM and the regressions: exact swaps, rows at the edge, and files without pickle."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from pairclf.approaches import classical_trees
from pairclf.approaches.classical_trees import BoostedModel, check, fit, load
from pairclf.config import Classical
from pairclf.demo.arena import generate
from pairclf.errors import BundleError, ConfigError
from pairclf.scores.metrics import Floats, log_loss
from pairclf.scores.probabilities import mean_of_orders
from pairclf.task import LMSYS, Row, Task

TOPICS = Task(name="topics", fields=("text",), classes=("animal", "tool", "fruit"))
LABELS = Task(name="labels", fields=("title", "text"), classes=("rude", "long"), multi_label=True)
SMALL = Classical(model="lightgbm", n_features=64, n_estimators=8, learning_rate=0.3, min_child_samples=3)


def rows_of(task: Task, n: int, *, seed: int = 0) -> tuple[list[Row], Floats]:
    rows, targets = [], []
    for comparison in generate(n, seed=seed, dirt=0.2).rows:
        texts = (comparison.prompt, comparison.response_a, comparison.response_b)
        rows.append(Row(comparison.id, dict(zip(task.fields, texts[-len(task.fields) :], strict=True))))
        targets.append(np.eye(3)[comparison.label][: len(task.classes)])
    return rows, np.array(targets)


@pytest.fixture(scope="module", params=[LMSYS, TOPICS, LABELS], ids=lambda task: task.name)
def model(request: pytest.FixtureRequest) -> BoostedModel:
    return fitted(request.param, 90)


def fitted(task: Task, n: int) -> BoostedModel:
    rows, targets = rows_of(task, n)
    return fit(rows, targets, np.ones(n), task, SMALL, seed=0)


def test_a_swap_exchanges_the_logits_to_the_last_bit_and_no_row_depends_on_another(model: BoostedModel) -> None:
    rows, _ = rows_of(model.task, 40, seed=1)
    logits = model.logits(rows)
    assert logits.shape == (40, 2 if model.task.swappable else 1, len(model.task.classes))
    assert np.ptp(logits, axis=0).max() > 0.1
    assert np.array_equal(np.concatenate([model.logits([row]) for row in rows]), logits)
    assert model.logits([]).shape == (0, *logits.shape[1:])
    if model.task.swappable:
        assert np.array_equal(model.logits([model.task.swap_row(row) for row in rows]), logits[:, ::-1])
        assert np.array_equal(logits[:, 1], logits[:, 0][:, list(model.task.swapped_columns)])


def test_a_saved_stack_is_text_and_safetensors_and_gives_the_same_bits(model: BoostedModel, tmp_path: Path) -> None:
    model.save(tmp_path / "classical.safetensors")
    names = {f"lightgbm-{number}.txt" for number in range(len(LABELS.classes) if model.task is LABELS else 1)}
    assert {path.name for path in tmp_path.iterdir()} == {"classical.safetensors", *names}
    assert all((tmp_path / name).read_text().startswith("tree\nversion=") for name in names)
    rows, _ = rows_of(model.task, 20, seed=2)
    assert np.array_equal(load(tmp_path / "classical.safetensors", model.task, SMALL).logits(rows), model.logits(rows))


def test_generated_comparisons_are_judged_better_than_by_the_prior() -> None:
    rows, targets = rows_of(LMSYS, 700, seed=3)
    model = fit(rows[:500], targets[:500], np.ones(500), LMSYS, SMALL, seed=0)
    chances = mean_of_orders(model.logits(rows[500:]), LMSYS)
    prior = np.broadcast_to(targets[:500].mean(axis=0), chances.shape)
    assert log_loss(chances, targets[500:]) < log_loss(prior, targets[500:]) - 0.05


@pytest.mark.parametrize("task", [LMSYS, TOPICS, LABELS], ids=lambda task: task.name)
@pytest.mark.parametrize("n", [1, 12])
def test_one_class_or_row_and_empty_or_equal_texts_give_finite_logits(task: Task, n: int) -> None:
    rows = [Row(str(number), dict.fromkeys(task.fields, ("",))) for number in range(n)]
    targets = np.eye(len(task.classes))[[1] * n]
    logits = fit(rows, targets, np.ones(n), task, SMALL, seed=0).logits([*rows, *rows_of(task, 2)[0]])
    assert np.isfinite(logits).all()
    if not task.swappable:
        assert (logits[:n, 0].argmax(axis=1) == 1).all()


SPOILED = {
    "size": (r"tree_sizes=\d+", "tree_sizes=99999999"),
    "feature": (r"split_feature=\d+", "split_feature=100000"),
    "circle": (r"left_child=\S+", "left_child=0"),
    "leaf": (r"left_child=\S+", "left_child=-1000"),
    "values": (r"leaf_value=\S+ ", "leaf_value="),
    "nodes": (r"num_leaves=\d+", "num_leaves=100000"),
    "category": (r"decision_type=\d+", "decision_type=1"),
    "twice": (r"num_cat=0", "num_cat=0\nnum_cat=1"),
}
"""What LightGBM's native code would follow out of its arrays, or for ever."""


@pytest.mark.parametrize("name", SPOILED)
def test_trees_that_lead_out_of_themselves_are_refused(name: str, tmp_path: Path) -> None:
    fitted(TOPICS, 30).save(tmp_path / "classical.safetensors")
    trees, (pattern, text) = tmp_path / "lightgbm-0.txt", SPOILED[name]
    written = trees.read_text()
    spoiled, count = re.subn(pattern, text, written, count=1)
    assert count == 1
    if name != "size":  # it stays right, so that what is inside is looked at
        size = int(re.findall(r"tree_sizes=(\d+)", written)[0])
        spoiled = spoiled.replace(f"tree_sizes={size}", f"tree_sizes={size + len(spoiled) - len(written)}", 1)
    trees.write_text(spoiled)
    with pytest.raises(BundleError, match=r"can't be read: "):
        load(tmp_path / "classical.safetensors", TOPICS, SMALL)


@pytest.mark.parametrize("change", ["missing", "no model", "other inputs"])
def test_other_trees_are_refused(change: str, tmp_path: Path) -> None:
    fitted(TOPICS, 30).save(tmp_path / "classical.safetensors")
    trees = tmp_path / "lightgbm-0.txt"
    if change == "missing":
        trees.unlink()
    elif change == "no model":
        trees.write_text("no trees")
    else:
        fitted(LMSYS, 30).save(tmp_path / "other.safetensors")
        fitted(TOPICS, 30).linear.save(tmp_path / "classical.safetensors")
    with pytest.raises(BundleError, match="must be" if change == "other inputs" else "can't be read") as caught:
        load(tmp_path / "classical.safetensors", TOPICS, SMALL)
    assert caught.value.where == trees


def test_without_lightgbm_the_config_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    check(SMALL, LMSYS)
    monkeypatch.setattr(classical_trees, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"(?s)not installed.*pip install lightgbm"):
        check(SMALL, LMSYS)


def test_a_setting_of_trees_needs_trees() -> None:
    with pytest.raises(ValidationError, match=r"num_leaves changes nothing with classical\.model=logistic"):
        Classical(num_leaves=7)
