"""Each kind of classical model and the stack: exact swaps, rows alone, files, rows at the edge, settings that count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from classical_support import LABELS, TASKS, TOPICS, fit, fitted, rows_of
from pydantic import ValidationError
from scipy import sparse
from sklearn.naive_bayes import MultinomialNB
from sklearn.neighbors import NearestNeighbors
from sklearn.tree import DecisionTreeRegressor

from pairclf.approaches import classical_model
from pairclf.approaches.classical_linear import _log_ratios
from pairclf.approaches.classical_model import MODELS, check, fit_extracted, load, reads_groups
from pairclf.approaches.classical_pool import fit_pool
from pairclf.approaches.classical_vectors import columns_of_orders, extract
from pairclf.config import Classical
from pairclf.config.classical import READ_BY
from pairclf.errors import BundleError, ConfigError
from pairclf.scores.metrics import log_loss
from pairclf.scores.probabilities import mean_of_orders
from pairclf.task import LMSYS, Row, Task

QUICK: dict[str, Any] = {"n_features": 256, "n_components": 4}
BOOSTED: dict[str, Any] = {"n_estimators": 8, "learning_rate": 0.3, "n_bags": 2}
SMALL = {
    "logistic": Classical(n_features=256),
    "svm": Classical(model="svm", n_features=256),
    "nb": Classical(model="nb", n_features=256),
    "knn": Classical(model="knn", n_neighbors=5, **QUICK),
    "tree": Classical(model="tree", min_child_samples=5, **QUICK),
    "lightgbm": Classical(model="lightgbm", min_child_samples=5, **QUICK, **BOOSTED),
    "no n-grams": Classical(model="lightgbm", min_child_samples=5, n_components=0, **BOOSTED),
    "stack": Classical(model="stack", estimators=tuple(MODELS), min_child_samples=5, **QUICK, **BOOSTED),
    "boosted stack": Classical(
        model="stack", estimators=("logistic",), final_estimator="lightgbm", min_child_samples=5, **QUICK, **BOOSTED
    ),
}


def test_every_kind_is_a_value_of_the_setting_and_has_a_test() -> None:
    assert {*SMALL} == {*MODELS, "no n-grams", "stack", "boosted stack"}
    assert all(readers <= {*MODELS} for readers in READ_BY.values())
    assert {name for name in MODELS if reads_groups(SMALL[name])} == {"svm", "nb", "knn"}


@pytest.mark.parametrize(
    ("name", "task"),
    [
        pytest.param(name, task, marks=[pytest.mark.thorough] * (name != "stack" and task not in (LMSYS, LABELS)))
        for name in SMALL
        for task in TASKS.values()
    ],
    ids=[f"{name}-{task}" for name in SMALL for task in TASKS],
)
def test_swaps_are_exact_rows_are_alone_and_a_file_gives_the_same_bits(name: str, task: Task, tmp_path: Path) -> None:
    model, path = fitted(task, 90, SMALL[name]), tmp_path / "classical.safetensors"
    rows, _ = rows_of(task, 24, seed=1)
    logits = model.logits(rows)
    assert logits.shape == (24, 2 if task.swappable else 1, len(task.classes))
    assert np.isfinite(logits).all()
    assert np.ptp(logits, axis=0).max() > 0.05
    assert np.array_equal(np.concatenate([model.logits([row]) for row in rows[:6]]), logits[:6])
    assert np.array_equal(model.logits(rows[::-1]), logits[::-1])
    if task.swappable:
        assert np.array_equal(model.logits([task.swap_row(row) for row in rows]), logits[:, ::-1])
        assert np.array_equal(logits[:, 1], logits[:, 0][:, list(task.swapped_columns)])
    model.save(path)
    assert np.array_equal(load(path, task, SMALL[name]).logits(rows), logits)
    reads_boosters = "lightgbm" in model.members or model.final is not None
    boosters = {f"lightgbm-{number}.txt" for number in range(4 if task is LABELS else 2)}
    assert {file.name for file in tmp_path.iterdir()} == {path.name} | (boosters if reads_boosters else set())
    for file in tmp_path.iterdir():  # protocol 2 or later
        assert not file.read_bytes().startswith(b"\x80")
        assert b"sklearn" not in file.read_bytes()


@pytest.mark.parametrize("task", [LMSYS, LABELS], ids=lambda task: task.name)
@pytest.mark.parametrize("name", SMALL)
def test_one_class_one_row_and_empty_or_equal_texts_give_finite_logits(name: str, task: Task) -> None:
    others = rows_of(task, 2)[0]
    for n, text in ((1, ""), (12, ""), (12, "the same words")):
        rows = [Row(str(number), dict.fromkeys(task.fields, (text,))) for number in range(n)]
        targets = np.eye(3)[[1] * n][:, : len(task.classes)]
        logits = fit(rows, targets, np.ones(n), task, SMALL[name]).logits([*rows, *others])
        assert np.isfinite(logits).all()
        if not task.swappable:
            assert (logits[:n, 0].argmax(axis=1) == 1).all()


@pytest.mark.parametrize("name", ["svm", "nb", "stack"])
def test_a_class_that_the_seen_rows_of_an_inner_fold_lack_does_no_harm(name: str) -> None:
    rows, _ = rows_of(TOPICS, 30)
    targets = np.eye(3)[[0, 1] * 14 + [2, 2]]
    logits = fit(rows, targets, np.ones(30), TOPICS, SMALL[name]).logits(rows)
    assert np.isfinite(logits).all()
    assert (mean_of_orders(logits, TOPICS)[:, 2] < 0.5).all()


def test_a_row_of_100_000_tokens_is_scored_by_all() -> None:
    row = Row("r", {"prompt": ("Say dog.",), "response_a": ("dog cat " * 50_000,), "response_b": ("x",)})
    assert np.isfinite(fitted(LMSYS, 40, SMALL["stack"]).logits([row])).all()


@pytest.mark.parametrize("name", ["svm", "nb", "knn", "tree", "lightgbm"])
def test_generated_comparisons_are_judged_better_than_by_the_prior(name: str) -> None:
    rows, targets = rows_of(LMSYS, 600, seed=3)
    settings = SMALL[name].model_copy(update={"n_features": 4096, "n_neighbors": 50, "min_child_samples": 40})
    chances = mean_of_orders(fit(rows[:450], targets[:450], np.ones(450), LMSYS, settings).logits(rows[450:]), LMSYS)
    prior = np.broadcast_to(targets[:450].mean(axis=0), chances.shape)
    if name == "tree":  # the honest worst: it has something to say, and is too sure of it
        assert (chances.argmax(axis=1) == targets[450:].argmax(axis=1)).mean() > 0.4
    else:
        assert log_loss(chances, targets[450:]) < log_loss(prior, targets[450:]) - 0.02


# --- figures of scikit-learn -----------------------------------------------------------------------------------------


def test_the_log_ratios_are_those_of_naive_bayes() -> None:
    random = np.random.default_rng(0)
    counts, classes = random.poisson(0.5, (40, 12)).astype(float), random.integers(0, 2, 40)
    reference = MultinomialNB().fit(counts, classes)
    ratios = _log_ratios(sparse.csr_matrix(counts), np.eye(2)[classes], np.ones(40))
    np.testing.assert_allclose(ratios, reference.feature_log_prob_[1] - reference.feature_log_prob_[0], atol=1e-12)
    differences = sparse.csr_matrix(counts[:20] - counts[20:])
    again = _log_ratios(-differences, np.eye(2)[classes[:20]][:, ::-1], np.ones(20))
    np.testing.assert_allclose(_log_ratios(differences, np.eye(2)[classes[:20]], np.ones(20)), again, atol=1e-12)


def test_neighbours_are_those_of_scikit_learn() -> None:
    rows, targets = rows_of(TOPICS, 60)
    model = fit(rows, targets, np.ones(60), TOPICS, SMALL["knn"])
    new, _ = rows_of(TOPICS, 10, seed=1)
    topics, of_new = (
        model.space.vectors(extract(some, TOPICS, SMALL["knn"]), tfidf=False).topics["text"] for some in (rows, new)
    )
    distances, places = NearestNeighbors(n_neighbors=5, metric="cosine").fit(topics).kneighbors(of_new)
    closeness = np.maximum(1 - distances, 0)
    sums = (closeness[:, :, None] * targets[places]).sum(axis=1) + targets.mean(axis=0)
    expected = sums / (closeness.sum(axis=1, keepdims=True) + 1)
    vectors = model.space.vectors(extract(new, TOPICS, SMALL["knn"]), tfidf=False)
    own = model.members["knn"].logits(vectors)
    np.testing.assert_allclose(mean_of_orders(own, TOPICS), expected, atol=1e-6)
    np.testing.assert_allclose(model.logits(new), model.weight[0] * own + model.bias, atol=1e-12)


def test_the_leaves_are_those_of_scikit_learn() -> None:
    rows, targets = rows_of(TOPICS, 120)
    settings = SMALL["tree"].model_copy(update={"min_child_samples": 10})
    model = fit(rows, targets, np.ones(120), TOPICS, settings)
    (values,) = columns_of_orders(model.space.vectors(extract(rows, TOPICS, settings), tfidf=False), TOPICS)
    tree = DecisionTreeRegressor(max_leaf_nodes=15, min_samples_leaf=10, random_state=0).fit(values, targets)
    held = np.unique(tree.apply(values), return_inverse=True, return_counts=True)
    count = held[2][held[1]][:, None]
    expected = (tree.predict(values) * count + 1 / 3) / (count + 1)
    np.testing.assert_allclose(mean_of_orders(model.logits(rows), TOPICS), expected, atol=1e-12)


# --- temperature, pool, inner folds ----------------------------------------------------------------------------------


def test_a_pool_of_one_model_is_its_temperature() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(5000, 3))
    chances = np.exp(logits / 2.5) / np.exp(logits / 2.5).sum(axis=1, keepdims=True)
    targets = np.eye(3)[[random.choice(3, p=chance) for chance in chances]]
    for scale in (1.0, 10.0):
        weight, bias = fit_pool(scale * logits[None], targets, np.ones(5000), equal=1.0)
        assert weight[0] * scale == pytest.approx(1 / 2.5, rel=0.1)
        assert np.abs(bias - bias.mean()).max() < 0.1


def test_a_pool_weighs_a_useless_model_by_nothing_and_ties_the_sides() -> None:
    random = np.random.default_rng(1)
    good, targets = random.normal(size=(4000, 3)), np.zeros((4000, 3))
    targets[np.arange(4000), (good + random.gumbel(size=good.shape)).argmax(axis=1)] = 1
    logits = np.stack([good, random.normal(size=good.shape)])
    weight, bias = fit_pool(logits, targets, np.ones(4000), equal=0.5, tied=(0, 1))
    assert weight == pytest.approx([1, 0], abs=0.1)
    assert (weight >= 0).all()
    assert bias[0] == bias[1]
    labels, _ = fit_pool(logits, 1 / (1 + np.exp(-good)), np.ones(4000), equal=0.5, independent=True)
    assert labels == pytest.approx([1, 0], abs=0.1)


@pytest.mark.parametrize(
    "settings",
    [Classical(model="svm", n_features=256, C=1000.0, max_iter=3000), Classical(model="knn", n_neighbors=3, **QUICK)],
    ids=lambda settings: settings.model,
)
def test_a_temperature_makes_up_for_what_is_too_sure(settings: Classical, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without their inner folds an SVM that was fitted with a large C, and few neighbours, are far too sure."""
    rows, targets = rows_of(LMSYS, 200)
    new, labels = rows_of(LMSYS, 200, seed=1)
    with_folds = fit(rows, targets, np.ones(200), LMSYS, settings).logits(new)
    monkeypatch.setattr(classical_model, "_inner_folds", lambda group: [])
    without = fit(rows, targets, np.ones(200), LMSYS, settings).logits(new)
    losses = [log_loss(mean_of_orders(logits, LMSYS), labels) for logits in (with_folds, without)]
    assert losses[0] < losses[1] - 0.1


def test_inner_folds_keep_groups_together() -> None:
    group = np.random.default_rng(0).integers(0, 30, 200)
    folds = classical_model._inner_folds(group)
    assert sorted(np.concatenate([unseen for _, unseen in folds])) == list(range(200))
    for seen, unseen in folds:
        assert not {*group[seen]} & {*group[unseen]}
    assert classical_model._inner_folds(np.zeros(5)) == []


def test_a_stack_is_weighed_by_rows_that_its_members_did_not_see() -> None:
    """Rows stand twice, a group each pair. Neighbours know every row that they saw: seen ones would praise them."""
    rows, _ = rows_of(TOPICS, 61)
    targets = np.eye(3)[np.random.default_rng(0).integers(0, 3, 61)]  # nothing to learn
    settings = Classical(model="stack", estimators=("logistic", "knn"), n_neighbors=1, n_features=256, C=0.01)
    features, twice = extract([*rows, *rows], TOPICS, settings), np.concatenate([targets, targets])
    grouped, alone = (
        fit_extracted(features, groups, twice, np.ones(122), TOPICS, settings, 0).weight[1]
        for groups in ([*range(61), *range(61)], range(122))
    )
    assert alone > grouped + 0.5


# --- settings --------------------------------------------------------------------------------------------------------


CHANGES: dict[str, list[dict[str, Any]]] = {
    "knn": [{"n_neighbors": 2}, {"n_components": 3}, {"n_features": 128}],
    "tree": [{"num_leaves": 2}, {"min_child_samples": 30}, {"n_components": 1}, {"dense": False}],
    "lightgbm": [
        {"num_leaves": 2}, {"min_child_samples": 30}, {"n_components": 1}, {"dense": False},
        {"n_estimators": 2}, {"learning_rate": 0.1}, {"n_bags": 1}, {"extra_trees": True},
    ],
    "svm": [{"C": 30.0}],
    "nb": [{"C": 30.0}],
    "stack": [{"estimators": ("nb", "lightgbm")}],
    "boosted stack": [{"final_estimator": "sum", "estimators": ("logistic", "lightgbm")}],
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_changes_the_logits(name: str) -> None:
    rows, targets = rows_of(LMSYS, 60, seed=3)
    before = fit(rows, targets, np.ones(60), LMSYS, SMALL[name]).logits(rows)
    for change in CHANGES[name]:
        settings = Classical.model_validate(SMALL[name].model_dump() | change)
        after = fit(rows, targets, np.ones(60), LMSYS, settings).logits(rows)
        assert not np.allclose(after, before, atol=1e-3), change


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"num_leaves": 7}, r"num_leaves changes nothing with classical\.model=logistic.*lightgbm or tree"),
        ({"model": "knn", "C": 2}, r"C changes nothing with classical\.model=knn"),
        ({"model": "knn", "dense": False}, "dense changes nothing"),
        ({"model": "svm", "n_components": 3}, "n_components changes nothing"),
        ({"model": "tree", "n_estimators": 3}, r"n_estimators changes nothing.*set classical\.model=lightgbm"),
        ({"estimators": ["nb", "svm"]}, r"estimators changes nothing.*set classical\.model=stack"),
        ({"model": "stack", "estimators": ["nb", "svm"], "n_neighbors": 3}, "n_neighbors changes nothing"),
        ({"model": "stack", "estimators": ["nb", "nb"]}, "name a model twice"),
        ({"model": "stack", "estimators": []}, "at least 1"),
        ({"model": "stack", "final_estimator": "lightgbm"}, "can hold it once"),
        ({"final_estimator": "lightgbm"}, "final_estimator changes nothing"),
        ({"model": "knn", "n_components": 0}, "set n_components to 1 or more"),
        ({"model": "tree", "n_components": 0, "n_features": 64}, "n_features changes nothing"),
        ({"model": "forest"}, "logistic"),
    ],
)  # fmt: skip
def test_settings_that_change_nothing_or_cannot_be_are_refused(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Classical.model_validate(tree)


def test_trees_without_columns_are_refused() -> None:
    settings = Classical(model="lightgbm", dense=False, n_components=0)
    with pytest.raises(ConfigError, match=r"(?s)nothing to read.*set classical\.dense=true"):
        check(settings, LMSYS)


# --- files -----------------------------------------------------------------------------------------------------------


SPOILED = {
    "out of the tree": ("tree.nodes", 2, 1e6),
    "backwards": ("tree.nodes", 3, -1.0),
    "half a node": ("tree.nodes", 2, 1.5),
    "unknown column": ("tree.nodes", 0, 1e6),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_decision_tree_that_leads_out_of_itself_is_refused(name: str, tmp_path: Path) -> None:
    model = fitted(TOPICS, 60, SMALL["tree"])
    part, column, value = SPOILED[name]
    model.members["tree"].arrays[part.removeprefix("tree.")][0, column] = value
    model.save(tmp_path / "classical.safetensors")
    with pytest.raises(BundleError, match=r"model can't be read: a node .* leads out of it"):
        load(tmp_path / "classical.safetensors", TOPICS, SMALL["tree"])


def test_neighbours_of_different_numbers_are_refused(tmp_path: Path) -> None:
    model = fitted(TOPICS, 60, SMALL["knn"])
    object.__setattr__(model.members["knn"], "mass", np.ones(3))
    model.save(tmp_path / "classical.safetensors")
    with pytest.raises(BundleError, match="different numbers of rows"):
        load(tmp_path / "classical.safetensors", TOPICS, SMALL["knn"])
