"""`PairClassifier` keeps scikit-learn's contract, for every approach."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks

import pairclf
from pairclf.bundles.bundle import open_bundle
from pairclf.errors import ConfigError, DataError
from pairclf.task import LMSYS

SMALL: dict[str, Any] = {"classical__n_features": 512}

Pairs = tuple[pl.DataFrame, np.ndarray]


@pytest.fixture(scope="module")
def fitted(pairs_of_words: Pairs) -> pairclf.PairClassifier:
    return pairclf.PairClassifier(**SMALL).fit(*pairs_of_words)


@parametrize_with_checks([pairclf.PairClassifier()])
def test_checks_of_scikit_learn(estimator: pairclf.PairClassifier, check: Any) -> None:
    """Those that give no numbers for rows: an estimator that reads texts says so by its tags."""
    check(estimator)


def test_figures_are_those_of_the_bundle(fitted: pairclf.PairClassifier, pairs_of_words: Pairs) -> None:
    rows, labels = pairs_of_words
    probabilities = fitted.predict_proba(rows)
    with pairclf.load(fitted.bundle_) as judge:
        assert np.array_equal(judge.predict(rows).select(LMSYS.classes).to_numpy(), probabilities)
    assert fitted.classes_.tolist() == sorted(LMSYS.classes)
    assert np.array_equal(fitted.predict(rows), fitted.classes_[probabilities.argmax(axis=1)])
    assert fitted.score(rows, labels) == (fitted.predict(rows) == labels).mean() > 0.9
    assert (fitted.n_features_in_, fitted.feature_names_in_.tolist()) == (3, list(LMSYS.fields))


def test_rows_may_be_pandas_or_an_array_of_texts(fitted: pairclf.PairClassifier, pairs_of_words: Pairs) -> None:
    rows = pairs_of_words[0].head(5)
    expected = fitted.predict_proba(rows)
    assert np.array_equal(fitted.predict_proba(rows.to_pandas()), expected)
    assert np.array_equal(fitted.predict_proba(rows.to_numpy()), expected)
    with pytest.raises(DataError, match="must hold texts in the columns prompt, response_a, response_b"):
        fitted.predict_proba(np.zeros((3, 3)))


def test_labels_of_any_kind_are_sorted_classes(pairs_of_words: Pairs) -> None:
    """The columns follow the labels, not the task."""
    rows, labels = pairs_of_words
    names = {2: "winner_model_a", 1: "winner_tie", 0: "winner_model_b"}
    numbers = np.array([{name: number for number, name in names.items()}[label] for label in labels])
    classifier = pairclf.PairClassifier(labels=names, **SMALL).fit(rows, numbers)
    assert classifier.classes_.tolist() == [0, 1, 2]
    plain = pairclf.PairClassifier(**SMALL).fit(rows, labels).predict_proba(rows)
    assert np.array_equal(classifier.predict_proba(rows), plain[:, [1, 2, 0]])
    assert classifier.score(rows, numbers) > 0.9


def test_weights_count(pairs_of_words: Pairs) -> None:
    rows, labels = pairs_of_words
    classifier = pairclf.PairClassifier(**SMALL)
    half = classifier.fit(rows[:24], labels[:24]).predict_proba(rows)
    weights = np.r_[np.ones(24), np.zeros(12)]
    assert np.allclose(classifier.fit(rows, labels, sample_weight=weights).predict_proba(rows), half)
    weights[:12] = 5
    assert not np.allclose(classifier.fit(rows, labels, sample_weight=weights).predict_proba(rows), half, atol=1e-3)


def test_copies_searches_and_pipelines(pairs_of_words: Pairs) -> None:
    rows, labels = pairs_of_words
    classifier = pairclf.PairClassifier(**SMALL)
    assert clone(classifier).get_params() == classifier.get_params()
    search = GridSearchCV(classifier, {"classical__C": [1e-4, 1.0]}, cv=2, scoring="neg_log_loss")
    search.fit(rows.to_pandas(), labels)
    losses = search.cv_results_["mean_test_score"]
    assert search.best_params_ == {"classical__C": 1.0}
    assert losses[1] > losses[0] + 0.05, "the setting has an effect"
    pipeline = make_pipeline(FunctionTransformer(lambda frame: frame.rename({"question": "prompt"})), classifier)
    scores = cross_val_score(pipeline, rows.rename({"prompt": "question"}), labels, cv=2)
    assert (scores > 0.8).all()


def test_a_setting_and_its_section_add_up_in_any_order(pairs_of_words: Pairs) -> None:
    """And the section stays as its owner gave it."""
    rows, labels = pairs_of_words
    section = {"n_features": 512, "C": 1.0}
    for settings in ({"classical": section, "classical__C": 4.0}, {"classical__C": 4.0, "classical": section}):
        classifier = pairclf.PairClassifier(**settings).fit(rows, labels)
        settings_of = open_bundle(classifier.bundle_).config.classical
        assert (settings_of.n_features, settings_of.C) == (512, 4.0)
    assert section == {"n_features": 512, "C": 1.0}


def test_a_fitted_one_survives_pickle_and_its_folder_goes_with_it(
    fitted: pairclf.PairClassifier, pairs_of_words: Pairs
) -> None:
    rows = pairs_of_words[0]
    copy = pickle.loads(pickle.dumps(fitted))
    folder: Path = copy.bundle_
    assert folder != fitted.bundle_
    assert np.array_equal(copy.predict_proba(rows), fitted.predict_proba(rows))
    del copy
    assert not folder.exists()


def test_another_approach(pairs_of_words: Pairs, without_forecast: None) -> None:
    rows, labels = pairs_of_words
    classifier = pairclf.PairClassifier(
        "finetune",
        model={"base": "embedded:llama-tiny", "quantization": "none", "lora": {"r": 2}},
        train__max_steps=1,
        inputs__max_length=128,
    )
    probabilities = classifier.fit(rows[:12], labels[:12]).predict_proba(rows[:4])
    assert np.allclose(probabilities.sum(axis=1), 1)


def test_errors(pairs_of_words: Pairs) -> None:
    rows, labels = pairs_of_words
    with pytest.raises(NotFittedError):
        pairclf.PairClassifier().predict(rows)
    with pytest.raises(ConfigError, match=r"classical\.Cs.*nearest"):
        pairclf.PairClassifier(classical__Cs=1).fit(rows, labels)
    with pytest.raises(DataError, match=r"y has the shape \(\d+, 3\); it must hold one label a row: winner_model_a"):
        pairclf.PairClassifier().fit(rows, [[1, 0, 0]] * len(rows))
    with pytest.raises(DataError, match="y holds"):
        pairclf.PairClassifier().fit(rows, ["a"] * len(rows))
    with pytest.raises(ConfigError, match="must name each class once"):
        pairclf.PairClassifier(labels={"a": "winner_tie"}).fit(rows, labels)
    with pytest.raises(DataError, match="columns \\['response_b'\\] are missing"):
        pairclf.PairClassifier().fit(rows.drop("response_b"), labels)
    with pytest.raises(DataError, match="X has 36 rows, y 3"):
        pairclf.PairClassifier().fit(rows, labels[:3])
    with pytest.raises(DataError, match="y has the shape"):
        pairclf.PairClassifier().fit(rows, labels[:, None])
    with pytest.raises(ConfigError, match="have no order"):
        pairclf.PairClassifier(labels=dict(zip([0, "b", None], LMSYS.classes, strict=True))).fit(rows, labels)
    for wrong, words in (
        (-1, "below 0"),
        (np.nan, "not finite"),
        ("a", "no numbers"),
        ([1, 1], "of shape"),
        (0, "all"),
    ):
        with pytest.raises(DataError, match=f"sample_weight.*{words}|{words}.*sample_weight"):
            pairclf.PairClassifier().fit(rows, labels, sample_weight=[wrong] * len(rows))
    for setting in ({"output_dir": "runs/x"}, {"data__train": "x.csv"}, {"data": {"folder": "x"}}):
        with pytest.raises(ConfigError, match="can't be set: X and y are the rows"):
            pairclf.PairClassifier(**setting).fit(rows, labels)
    with pytest.raises(ConfigError, match="data=None is no section"):
        pairclf.PairClassifier(data=None).fit(rows, labels)
    with pytest.raises(ConfigError, match="several labels a row"):
        task = {"name": "t", "fields": ["text"], "classes": ["x", "y"], "multi_label": True}
        pairclf.PairClassifier(task=task).fit(pl.DataFrame({"text": ["a"]}), ["x"])
