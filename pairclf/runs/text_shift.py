"""Shift between held-out and hidden texts: a classifier that tells the two apart, out of fold."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pairclf.approaches.classical_features import MEASURES, MeasuredText
from pairclf.console import progress
from pairclf.data.folds import folds_of_groups, prompt_groups
from pairclf.scores.metrics import Floats
from pairclf.scores.score_forecast import TextShift, shift_of
from pairclf.task import Task

LENGTHS = ("characters", "words", "turns", "lines")
"""The classical approach's features of length."""

CHARACTERS = 2000
"""Of each field, so many characters are hashed to words; lengths are of the whole."""

STRENGTHS = (0.001, 0.03, 1.0)
"""Values of `C`. A weak classifier of few rows needs a low one: its overfitting hides a shift."""

FOLDS, COLUMNS, CHUNK = 5, 2**16, 1000


def text_features(frame: pl.DataFrame, task: Task) -> Any:
    """Sparse `(N, F)`: of each field the lengths, `len(LENGTHS)` columns a field, then its counts of hashed words.

    Args:
        frame: canonical table.
        task: names the fields.
    """
    from scipy.sparse import csr_matrix, hstack, vstack
    from sklearn.feature_extraction.text import HashingVectorizer

    hashing = HashingVectorizer(n_features=COLUMNS, alternate_sign=False, norm=None)
    parts = []
    with progress("reading texts", len(frame)) as advance:
        for chunk in frame.iter_slices(CHUNK):
            texts = {
                name: [MeasuredText(tuple(turns or ())) for turns in chunk[name].to_list()] for name in task.fields
            }
            lengths = [[MEASURES[of](text) for text in column] for column in texts.values() for of in LENGTHS]
            words = [hashing.transform([text.text[:CHARACTERS] for text in column]) for column in texts.values()]
            parts.append(hstack([csr_matrix(np.array(lengths).T), *words], format="csr"))
            advance(len(chunk))
    return vstack(parts, format="csr")


def chances_of(features: Any, hidden: NDArray[np.bool_], folds: NDArray[np.int64], lengths: int) -> Floats:
    """The probability that a row is hidden, `(N,)`, were both kinds equally frequent, by models of the other folds.

    Logistic regressions on TF-IDF and splines of lengths, one for each of `STRENGTHS`, and that with the lowest log
    loss is used; a further one, on the logit alone, takes back overconfidence.

    Args:
        features: sparse `(N, F)`, as `text_features`.
        hidden: `(N,)`, whether the row is hidden.
        folds: `(N,)`; rows of one prompt share theirs, and the rows outside each have both kinds.
        lengths: number of leading columns that are lengths.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    used = features.getnnz(axis=0) > 0  # of the hashes few are words of these texts, and a fit looks at each column
    used[:lengths] = True
    features, logits = features[:, used], np.zeros((len(hidden), len(STRENGTHS)))
    for fold in np.unique(folds):
        rest = folds != fold
        rows = _columns(features, rest, lengths)
        for place, strength in enumerate(STRENGTHS):
            model = LogisticRegression(C=strength, solver="liblinear", class_weight="balanced")
            logits[~rest, place] = model.fit(rows[rest], hidden[rest]).decision_function(rows[~rest])
    balance = np.where(hidden, 1 / hidden.mean(), 1 / (~hidden).mean())
    chances: list[Floats] = []
    for own in np.split(logits, len(STRENGTHS), axis=1):
        calibration = LogisticRegression(class_weight="balanced", C=1e6).fit(own, hidden)
        # A falling curve means that the classifier learnt nothing: turned round, it would show a shift that is none.
        known = calibration.coef_[0, 0] > 0
        chances.append(calibration.predict_proba(own)[:, 1] if known else np.full(len(hidden), 0.5))
    return min(chances, key=lambda own: float(log_loss(hidden, own, sample_weight=balance)))


def _columns(features: Any, fitted: NDArray[np.bool_], lengths: int) -> Any:
    """Sparse columns of splines of the lengths and of TF-IDF, both fitted to some of the rows."""
    from scipy.sparse import csr_matrix, hstack
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import SplineTransformer, StandardScaler

    sizes, words = features[:, :lengths].toarray(), features[:, lengths:]
    curves = make_pipeline(SplineTransformer(n_knots=6, knots="quantile"), StandardScaler()).fit(sizes[fitted])
    weighting = TfidfTransformer(sublinear_tf=True).fit(words[fitted])
    return hstack([csr_matrix(curves.transform(sizes)), weighting.transform(words)], format="csr")


def measure_shift(held_out: pl.DataFrame, hidden: pl.DataFrame, task: Task) -> TextShift | None:
    """How unlike the texts of two canonical tables are; None: they have too few prompts to tell."""
    columns = ["id", "group", *task.fields]
    frame = pl.concat([held_out.select(columns), hidden.select(columns)])
    is_hidden = np.arange(len(frame)) >= len(held_out)
    groups = prompt_groups(frame, task)
    folds = folds_of_groups(groups, FOLDS)
    for fold in range(FOLDS):
        if len(np.unique(is_hidden[folds != fold])) < 2:
            return None
    lengths = len(LENGTHS) * len(task.fields)
    chances = chances_of(text_features(frame, task), is_hidden, folds, lengths)
    return shift_of(chances, is_hidden, groups.to_numpy().astype(np.str_))
