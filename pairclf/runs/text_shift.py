"""Shift between held-out and hidden texts: a classifier that tells the two apart, out of fold."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

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

    Logistic regressions on curves of lengths and others on TF-IDF, of each the one of `STRENGTHS` with the lowest log
    loss; a further one on the two logits takes back overconfidence, chosen and fitted on other folds, too. Lengths and
    words are separate as one penalty can't suit both: scaled lengths would leave words no weight.

    Args:
        features: sparse `(N, F)`, as `text_features`.
        hidden: `(N,)`, whether the row is hidden.
        folds: `(N,)`; rows of one prompt share theirs, and the rows outside each have both kinds.
        lengths: number of leading columns that are lengths.
    """
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.linear_model import LogisticRegression

    sizes, words = features[:, :lengths].toarray(), features[:, lengths:]
    used = words.getnnz(axis=0) > 0  # of the hashes few are words of these texts, and a fit looks at each column
    used[:1] = True  # texts without a word still make a matrix
    words, logits = words[:, used], np.zeros((2, len(STRENGTHS), len(hidden)))
    for fold in np.unique(folds):
        rest = folds != fold
        weighted = TfidfTransformer(sublinear_tf=True).fit(words[rest]).transform(words)
        for kind, rows in enumerate((curves_of(sizes, rest), weighted)):
            for place, strength in enumerate(STRENGTHS):
                model = LogisticRegression(C=strength, solver="liblinear", class_weight="balanced")
                logits[kind, place, ~rest] = model.fit(rows[rest], hidden[rest]).decision_function(rows[~rest])
    chances = np.empty(len(hidden))
    for fold in np.unique(folds):
        chances[folds == fold] = _combined(logits, hidden, folds != fold)[folds == fold]
    return chances


def _combined(logits: Floats, hidden: NDArray[np.bool_], fitted: NDArray[np.bool_]) -> Floats:
    """Probabilities `(N,)` by logits `(2, S, N)`, of the choice and the combination that suit some of the rows best."""
    from scipy.special import expit
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    balance = np.where(hidden, 1 / hidden.mean(), 1 / (~hidden).mean())

    def calibrated(*columns: Floats) -> Floats:
        rows = np.stack(columns, axis=1)
        model = LogisticRegression(class_weight="balanced", C=1e6).fit(rows[fitted], hidden[fitted])
        # A falling curve means that the classifier learnt nothing: turned round, it would show a shift that is none.
        own: Floats = model.decision_function(rows) if (model.coef_ > 0).all() else np.zeros(len(rows))
        return own

    def loss(own: Floats) -> float:
        return float(log_loss(hidden[fitted], expit(own[fitted]), sample_weight=balance[fitted]))

    best = [min(map(calibrated, kind), key=loss) for kind in logits]
    chances: Floats = expit(min((*best, calibrated(*best)), key=loss))
    return chances


def curves_of(sizes: Floats, fitted: NDArray[np.bool_]) -> Floats:
    """Piecewise linear curves of lengths `(N, L)`, as `(N, K)` columns, scaled to a standard deviation of 1; knots and
    scale are fitted to some of the rows."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import SplineTransformer, StandardScaler

    curves = make_pipeline(SplineTransformer(n_knots=6, degree=1, knots="quantile"), StandardScaler())
    columns: Floats = curves.fit(sizes[fitted]).transform(sizes)
    return columns


def shift_of_features(
    features: Any, hidden: NDArray[np.bool_], groups: ArrayLike, folds: NDArray[np.int64], lengths: int
) -> TextShift:
    """The shift between hidden and held-out rows, whose weighted lengths are then as the hidden ones'.

    Args:
        features: as `chances_of`, and so are `hidden`, `folds` and `lengths`.
        hidden: `(N,)`.
        groups: `(N,)` keys, equal for rows of one prompt.
        folds: `(N,)`.
        lengths: number of columns.
    """
    chances = chances_of(features, hidden, folds, lengths)
    curves = curves_of(features[:, :lengths].toarray(), np.ones(len(hidden), dtype=bool))
    return shift_of(chances, hidden, groups, curves)


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
    return shift_of_features(text_features(frame, task), is_hidden, groups.to_numpy().astype(np.str_), folds, lengths)
